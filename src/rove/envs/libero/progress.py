"""Progress towards a goal, as the metres that the hand still has to go: the potential of the dense reward.

A goal is done in stages: what has to stand open is opened and what has to be on is turned on, things are put
where they belong, then doors, drawers and knobs are closed and turned off. The way through the first stage
that is not done is measured: to the grasp that the expert would take, closing the fingers, lifting, over the
destination, down, letting go; or to the handle, and along the joint. Later stages count as a whole way each.

This is privileged: it reads where everything is, which no robot knows. It is for training only. All of it is
a function of a world's state and of the grasps that were chosen when its episode began, row by row and in
plain arithmetic, so that a world's potential does not depend on how many others it is computed with.
"""

# pyright: reportAttributeAccessIssue=false
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from rove.envs.libero.controller import Arm
from rove.envs.libero.course import course
from rove.envs.libero.grasps import NEAR, Grasp, around, grasps
from rove.envs.libero.handles import Handle
from rove.envs.libero.scenes import TaskModel
from rove.envs.libero.targets import Target

FULL_WAY = 1.5
"""Metres of way that the potential counts as one, as much as success."""
GRIP = 0.05
"""Metres of way that closing or opening the fingers counts for."""
HOVER = 0.08
"""Metres over a grasp at which the hand clears what it is about to hold."""
CLEARANCE = 0.16
"""Metres over its destination at which a thing that is carried, not drawn along, clears what stands there."""
LEVER = 0.1
"""Metres of way that a radian of the hand's turn counts for."""
SLACK = 0.1
"""Radians by which the hand's orientation may be off."""
BESIDE = 0.02
"""Metres beside its grasp at which fingers still close around it; how far over it, says `grasps.around`."""
MISSED = 0.015
"""Metres further off at which fingers that close have missed, and have to open again."""
LEFT_BEHIND = (0.05, 0.08)
"""Metres from its grasp within which an open hand has not left a thing yet, and beyond which it has."""
SETTLED = (-0.05, 0.03)
"""Metres above and below its destination between which a thing has been put down."""
STAGES = 6
"""Stages of a goal at most; LIBERO's have up to three predicates."""

_NONE, _PLACE, _JOINT = range(3)
_STAGE = np.dtype([
    ("kind", "i8"),
    ("body", "i8"),  # what is taken hold of
    ("pushed", "?"),  # needs no grasp
    ("out", "f8", 3),  # the way from which the hand comes, in the body's frame; zero: from above
    ("late", "?"),  # counts only when everything before it is done
    ("onto", "i8"), ("offset", "f8", 3), ("near", "f8"),  # destination: a place on a body, and how far off
    ("joint", "i8"), ("limit", "f8"), ("towards", "f8"), ("at", "?"), ("lever", "f8"),
    ("until", "i8"),  # a stage that, once done, makes this one needless; -1: none
])  # fmt: skip
"""What a task says about a stage."""
_POINT, _AXIS, _TURN, _RISE, _NEAR, _CLEAR = slice(0, 3), 3, slice(4, 6), 6, 7, 8
GRASP = 9
"""Numbers about a stage that are chosen when an episode begins: the point to take hold of in the body's
frame; which axis of that frame shows its heading; cosine and sine of the hand's turn from there; how far the
thing's position is above its destination when it is let go; how far over its grasp the hand may close; how
far over its destination the thing is carried."""


class Sight(NamedTuple):
    """How things stand in n worlds, as far as their goals are about it."""

    hand: np.ndarray
    """Position [n, 3] of the grip site, metres."""
    turn: np.ndarray
    """Rotation [n, 9] of the grip site."""
    gripper: np.ndarray
    """The controller's command [n, 2]."""
    where: np.ndarray
    """Position [n, stages, 3] of what each stage takes hold of."""
    frame: np.ndarray
    """Its rotation [n, stages, 9]."""
    onto: np.ndarray
    """Position [n, stages, 3] of what it is put on or in."""
    onto_frame: np.ndarray
    """Its rotation [n, stages, 9]."""
    joint: np.ndarray
    """Position [n, stages] of the joint that a stage moves."""


class Guide:
    """The stages of each world of a group, and the way that is left."""

    def __init__(self, arm: Arm, size: int) -> None:
        self._arm = arm
        self._stages = np.zeros((size, STAGES), _STAGE)
        self.grasp = np.zeros((size, STAGES, GRASP))
        self._most = 1
        self._courses: dict[str, tuple[np.ndarray, list[Target | Handle]]] = {}

    def place(self, row: int, task: TaskModel) -> None:
        """Give a row to a task; its grasps are chosen by `begin`, or restored."""
        if task.task not in self._courses:
            self._courses[task.task] = _stages(task)
        self._stages[row], subjects = self._courses[task.task]
        self._most = max(self._most, len(subjects))

    def begin(self, row: int, task: TaskModel, data: Mapping[str, np.ndarray]) -> None:
        """Choose the grasps of an episode, by how things stand in bound arrays that are up to date."""
        self.grasp[row] = 0.0
        for stage, subject in enumerate(self._courses[task.task][1]):
            self.grasp[row, stage] = _chosen(subject, self._stages[row, stage], row, data)

    def sight(self, rows: np.ndarray, data: Mapping[str, np.ndarray], gripper: np.ndarray) -> Sight:
        """Look at `rows` of bound arrays, as of the last forward pass, and of the controller's command."""
        at, row, site = self._stages[rows, : self._most], rows[:, None], self._arm.site
        body, onto = at["body"], at["onto"]
        return Sight(
            data["site_xpos"][rows, site],
            data["site_xmat"][rows, site],
            gripper[rows],
            data["xpos"][row, body],
            data["xmat"][row, body],
            data["xpos"][row, onto],
            data["xmat"][row, onto],
            data["qpos"][row, at["joint"]],
        )

    def left(self, rows: np.ndarray, sight: Sight) -> np.ndarray:
        """Measure the way [n] that is left in `rows`, metres; `sight`: see `Group.sight`."""
        stages = sight.where.shape[1]
        at, grasp = self._stages[rows, :stages], self.grasp[rows, :stages]
        where, frame = sight.where, sight.frame.reshape(*sight.where.shape, 3)
        point = where + _rotate(frame, grasp[..., _POINT])
        offset = sight.hand[:, None] - point
        sideways = np.asarray(at["out"].any(-1))
        above = np.where(sideways, _dot(offset, _rotate(frame, at["out"])), offset[..., 2])
        off = np.sqrt(np.maximum(_dot(offset, offset) - above * above, 0.0))
        turned = self._turned(sight, frame, grasp, sideways)
        reach = np.maximum(off - 0.006, 0.0) + _descent(off, above, HOVER) + np.where(at["pushed"], 0, turned)
        distance = np.sqrt(_dot(offset, offset))
        closed = 0.5 * (1.0 + sight.gripper[:, 1:])
        over = np.maximum(np.maximum(above - grasp[..., _NEAR], -above - NEAR), 0.0)
        there = _fades(over + np.maximum(off - BESIDE, 0.0), (0.0, MISSED))
        # a hand that closes where it holds nothing has to open again
        grip = GRIP * (there * (1.0 - closed) + (1.0 - there) * (1.0 + closed))
        taken = reach + np.where(at["pushed"], 0.0, grip)
        carry, placed = _to_carry(at, grasp, sight)
        release = GRIP * closed * _fades(distance, LEFT_BEHIND)
        to_place = np.where(placed, release, taken + carry + GRIP)
        left, done = to_place, (placed & (release < 0.1 * GRIP)) | (at["kind"] == _NONE)
        if (jointed := at["kind"] == _JOINT).any():
            moved, passed = _to_move(at, sight)
            left = np.where(jointed, np.where(passed, 0.0, taken + moved), left)
            done = np.where(jointed, passed, done)
            until = at["until"]
            done |= (until >= 0) & np.take_along_axis(placed, np.maximum(until, 0), axis=1)
        return _in_order(left, done, at["late"])

    def _turned(
        self,
        sight: Sight,
        frame: np.ndarray,
        grasp: np.ndarray,
        sideways: np.ndarray,
    ) -> np.ndarray:
        """Measure how far the hand is turned from each grasp [n, stages], as metres of way; it may hold a
        thing either way round, and a handle that it comes to sideways at any tilt."""
        axis = grasp[..., _AXIS].astype(int)[..., None]
        x, y = (np.take_along_axis(frame[..., i, :], axis, axis=-1)[..., 0] for i in (0, 1))
        length = np.maximum(np.sqrt(x * x + y * y), 1e-6)
        c, s = grasp[..., _TURN][..., 0], grasp[..., _TURN][..., 1]
        cos, sin = (x * c - y * s) / length, (x * s + y * c) / length
        hand = sight.turn.reshape(-1, 1, 3, 3)
        home = self._arm.home.rotation[0]
        since = [[_dot(hand[..., i, :], home[j]) for j in range(3)] for i in range(3)]
        about = np.abs(cos * (since[0][0] + since[1][1]) + sin * (since[1][0] - since[0][1])) + since[2][2]
        along = 2.0 * np.abs(cos * since[0][0] + sin * since[1][0])
        # twice the sine of half the angle between, which is the angle where it is small
        chord = np.sqrt(np.maximum(np.where(sideways, 2.0 - along, 3.0 - about), 0.0))
        return LEVER * np.maximum(chord - SLACK, 0.0)


def _to_carry(at: np.ndarray, grasp: np.ndarray, sight: Sight) -> tuple[np.ndarray, np.ndarray]:
    """Measure the way over its destination and down, metres, and tell what has been put down there: [n,
    stages] each."""
    frame = sight.onto_frame.reshape(*sight.onto.shape, 3)
    offset = sight.where - sight.onto - _rotate(frame, at["offset"])
    shift, above = _flat(offset), offset[..., 2] - grasp[..., _RISE]
    off = shift - 0.5 * at["near"]
    carry = np.maximum(off, 0.0) + _descent(off, above, grasp[..., _CLEAR])
    return carry, (shift < at["near"]) & (SETTLED[0] < above) & (above < SETTLED[1])


def _to_move(at: np.ndarray, sight: Sight) -> tuple[np.ndarray, np.ndarray]:
    """Measure the way along each joint, metres, and tell which are past their limit: [n, stages] each."""
    beyond = (sight.joint - at["limit"]) * at["towards"]
    return at["lever"] * np.maximum(-beyond, 0.0), (beyond > 0) | (at["at"] & (beyond == 0))


def _in_order(left: np.ndarray, done: np.ndarray, late: np.ndarray) -> np.ndarray:
    """Add up the way [n] through the first stage that is not done, and a whole one for each later."""
    stage = np.arange(done.shape[1])
    now = np.where(done, len(stage), stage).min(1, keepdims=True)
    later = (stage > now) & (~done | late)
    return np.where(stage == now, left, 0.0).sum(1) + FULL_WAY * later.sum(1)


def _descent(off: np.ndarray, above: np.ndarray, clearance: np.ndarray | float) -> np.ndarray:
    """Measure the way up and down of what is `above` its goal and `off` to the side of it, metres: it has to
    be `clearance` above before it may come near."""
    needed = clearance * np.clip((off - 0.012) / 0.05, 0.0, 1.0)
    return np.maximum(above, needed) + np.maximum(needed - above, 0.0)


def _fades(distance: np.ndarray, between: tuple[float, float]) -> np.ndarray:
    """Return 1 up to the first distance, 0 from the second on."""
    return np.clip((between[1] - distance) / (between[1] - between[0]), 0.0, 1.0)


def _flat(offset: np.ndarray) -> np.ndarray:
    return np.sqrt(offset[..., 0] * offset[..., 0] + offset[..., 1] * offset[..., 1])


def _dot(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    return one[..., 0] * other[..., 0] + one[..., 1] * other[..., 1] + one[..., 2] * other[..., 2]


def _rotate(frame: np.ndarray, point: np.ndarray) -> np.ndarray:
    x, y, z = (frame[..., i] * point[..., i, None] for i in range(3))
    return x + y + z


# --- the stages of a goal -------------------------------------------------------------------------


def _stages(task: TaskModel) -> tuple[np.ndarray, list[Target | Handle]]:
    """Return the stages of a task's goal, and what each is about."""
    stages = np.zeros(STAGES, _STAGE)
    stages["until"] = -1
    subjects: list[Target | Handle] = []
    for row, step in zip(stages, steps := course(task), strict=False):
        if isinstance(step.subject, Handle):
            _describe_handle(row, step.subject)
        else:
            _describe_target(row, step.subject)
        row["until"], row["late"] = step.until, step.late
        subjects.append(step.subject)
    assert len(subjects) == len(steps), f"more than {STAGES} stages in {task.task!r}"
    return stages, subjects


def _describe_target(row: np.void, target: Target) -> None:
    row["kind"], row["body"] = _PLACE, target.body
    if target.region is None:
        row["onto"], row["near"] = target.other, 0.03
    else:
        row["onto"], row["offset"] = target.region.body, target.region.position
        flat = np.sort(np.abs(target.region.rotation @ target.region.size))[-2]
        row["near"] = max(0.8 * flat, 0.02)


def _describe_handle(row: np.void, handle: Handle) -> None:
    row["kind"], row["body"], row["pushed"] = _JOINT, handle.body, handle.pushed
    row["joint"], row["limit"], row["towards"] = handle.joint, handle.limit, handle.towards
    row["at"], row["lever"], row["out"] = handle.at, handle.lever, handle.out


# --- what is chosen when an episode begins --------------------------------------------------------


def _chosen(
    subject: Target | Handle, stage: np.ndarray, row: int, data: Mapping[str, np.ndarray]
) -> np.ndarray:
    """Return the numbers of a stage, see `GRASP`."""
    numbers = np.zeros(GRASP)
    frame = data["xmat"][row, subject.body].reshape(3, 3)
    axis = int(np.abs(frame[2]).argmin())
    numbers[_AXIS] = axis
    if isinstance(subject, Handle):
        options: Sequence[Grasp] = [] if subject.pushed else grasps(subject.points @ frame.T)
        numbers[_NEAR] = NEAR
        point = subject.push if subject.pushed else subject.points.mean(0)
    else:
        options, point = subject.grasps(data, row), np.zeros(3)
        numbers[_NEAR] = around(subject.shape(data, row), options[0].point) if options else NEAR
        rise = subject.destination(data, np.array([row]))[0] - data["xpos"][row, stage["onto"]]
        onto = data["xmat"][row, stage["onto"]].reshape(3, 3)
        numbers[_RISE] = (rise - onto @ stage["offset"])[2]
        numbers[_CLEAR] = 0.0 if subject.drawn(data, row) else CLEARANCE
    numbers[_POINT] = options[0].point @ frame if options else point
    yaw = (options[0].yaw if options else 0.0) - np.arctan2(frame[1, axis], frame[0, axis])
    numbers[_TURN] = np.cos(yaw), np.sin(yaw)
    return numbers
