"""Initial states of protocol "generated_wide": things lie anywhere on the table that the arm can reach.

The rules of a stock reset hold (`placement.py`) but for three: things that nothing else fixes lie anywhere in
reach, clear of fixtures and of each other; never near where LIBERO-PRO shifts them to; and the arm's joints
vary more. What stays in its stock region is what an instruction may tell by its place: things of which there
are several of a kind (books of two colours, where it says "the right book") and, where an area of the table
is the goal, all that the goal does not name.
"""

# pyright: reportAttributeAccessIssue=false
from __future__ import annotations

import copy
import functools
import itertools
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import mujoco
import numpy as np

from rove.envs.libero import package
from rove.envs.libero.grasps import shape
from rove.envs.libero.joints import slide_of, way_out
from rove.envs.libero.predicates import Goal
from rove.envs.rotations import matrix

if TYPE_CHECKING:  # scenes draw their states with what is here
    from rove.envs.libero.scenes import TaskModel

ARM_NOISE = 0.05
"""Standard deviation of the arm's joints, radians."""
REACH = (0.38, 0.72)
"""Metres from the robot's base, in the plane, between which a thing lies."""
ASIDE = 0.33
"""Metres to the left and right of the robot's base up to which it lies."""
EDGE = 0.03
"""Metres that its rim stays off the table's edge."""
GAP = 0.02
"""Metres between it and what stands about, at least: room for a finger."""
HAND = 0.1
"""Metres that the hand takes before a drawer that it pulls."""
SHIFTED = 0.05
"""Metres from all of its published positions at which a thing of LIBERO-PRO's has been shifted."""
AVOIDED = 0.05
"""Metres around where LIBERO-PRO shifts a thing to within which it never lies."""


PLACED = re.compile(r"\b(left|right|middle|front|back)\b")
"""Words by which an instruction tells a thing from another one."""


class Scene:
    """The bodies of a model in a state that is being drawn."""

    def __init__(self, model: mujoco.MjModel) -> None:
        self.model = copy.copy(model)
        self.data = mujoco.MjData(self.model)

    def arrange(self, fixtures: Sequence[int], poses: np.ndarray, qpos: np.ndarray) -> None:
        """Put fixtures to their poses [fixtures, 7], and everything that moves where `qpos` [nq] says."""
        self.model.body_pos[list(fixtures)], self.model.body_quat[list(fixtures)] = poses[:, :3], poses[:, 3:]
        self.data.qpos[:] = qpos
        mujoco.mj_kinematics(self.model, self.data)

    def footprints(self, boxes: Sequence[tuple[int, np.ndarray, np.ndarray]]) -> np.ndarray:
        """Return the lowest and highest x and y [n, 2, 2] of boxes that bodies carry, metres."""
        found = np.zeros((len(boxes), 2, 2))
        for i, (body, low, high) in enumerate(boxes):
            corners = np.array(list(itertools.product(*zip(low, high, strict=True))))
            corners = corners @ self.data.xmat[body].reshape(3, 3).T + self.data.xpos[body]
            found[i] = corners[:, :2].min(0), corners[:, :2].max(0)
        return found

    def solved(self, goal: Sequence[Mapping[str, Any]]) -> bool:
        """Tell whether a goal may hold, were everything touching that is to touch."""
        arrays = {name: getattr(self.data, name)[None] for name in ("xpos", "xmat", "qpos")}
        test, rows = Goal(self.model, goal), np.array([0])

        def touching(row: int, geoms: np.ndarray, others: np.ndarray) -> bool:
            return True

        return bool((test.placed(arrays, rows, touching) & test.joined(arrays, rows, touching))[0])


@dataclass(frozen=True, slots=True)
class Wide:
    """What a task's wide initial states are drawn by."""

    scene: Scene
    goal: Sequence[Mapping[str, Any]]
    """What holds in no initial state: see `TaskModel.goal`."""
    radii: Mapping[str, float]
    """Things that lie anywhere -> metres around their middle within which all of them is."""
    base: np.ndarray
    """The robot's base [2], metres."""
    area: np.ndarray
    """Lowest and highest x and y [2, 2] of the table; endless where things lie on the floor."""
    avoided: Mapping[str, np.ndarray]
    """Thing -> positions [n, 2] that it keeps off."""
    boxes: Sequence[tuple[int, np.ndarray, np.ndarray]]
    """What collides of the fixtures: body, and lowest and highest corner [3] in that body's frame."""

    def anywhere(self, rng: np.random.Generator) -> np.ndarray:
        """Draw a position [2] about the robot, metres."""
        x, y = rng.uniform((0.0, -ASIDE), (REACH[1], ASIDE))
        return self.base + np.array([x, y])

    def admits(self, thing: str, xy: np.ndarray) -> bool:
        """Tell whether a thing may lie at a position [2], as far as the arm, the table and LIBERO-PRO go."""
        offset, rim = xy - self.base, self.radii[thing] + EDGE
        return bool(
            REACH[0] < np.linalg.norm(offset) < REACH[1]
            and abs(offset[1]) < ASIDE
            and (self.area[0] + rim < xy).all()
            and (xy < self.area[1] - rim).all()
            and (np.linalg.norm(self.avoided[thing] - xy, axis=1) > AVOIDED).all()
        )

    def clear(self, thing: str, xy: np.ndarray, footprints: np.ndarray) -> bool:
        """Tell whether a thing at a position [2] is clear of fixtures; `footprints`: see `Scene`."""
        outside = np.maximum(np.maximum(footprints[:, 0] - xy, xy - footprints[:, 1]), 0.0)
        return bool((np.linalg.norm(outside, axis=1) > self.radii[thing] + GAP).all())


_known: dict[str, Wide] = {}


def rules(task: TaskModel) -> Wide:
    """Return what a task's wide initial states are drawn by."""
    if task.task not in _known:
        _known[task.task] = _find(task)
    return _known[task.task]


def _find(task: TaskModel) -> Wide:
    model, things = task.model, task.placement["things"]
    kind = _noun if PLACED.search(task.instruction) else _kind
    kinds = Counter(kind(thing["name"]) for thing in things)
    free = [
        thing
        for thing in things
        if thing["joint"] is not None and thing["reference"] is None and kinds[kind(thing["name"])] == 1
    ]
    if any(spec["kind"] == "on_region" and spec["touching"] is None for spec in task.goal):
        named = {spec["body"] for spec in task.goal if "body" in spec}
        free = [thing for thing in free if thing["body"] in named]
    radii = {}
    for thing in free:
        corners = shape(model, model.body(thing["body"]).id)
        radii[thing["name"]] = max(thing["radius"], float(np.linalg.norm(corners[:, :2], axis=1).max()))
    fixtures = [thing for thing in things if thing["joint"] is None]
    return Wide(
        scene=Scene(model),
        goal=task.goal,
        radii=radii,
        base=model.body("robot0_base").pos[:2].copy(),
        area=_table(model, min((thing["origin"][2] for thing in free), default=0.0)),
        avoided={thing["name"]: shifted(task, thing) for thing in free},
        boxes=[
            _ahead(model, task.goal, box)
            for thing in fixtures
            for box in _boxes(model, model.body(thing["body"]).id)
        ],
    )


def _kind(name: str) -> str:
    """Return what a thing is: "black_book" of "black_book_1"."""
    return re.sub(r"_\d+$", "", name)


def _noun(name: str) -> str:
    """Return what an instruction may call it: "book", as in "the book on the right"."""
    return _kind(name).rpartition("_")[2]


def _table(model: mujoco.MjModel, z: float) -> np.ndarray:
    """Return the lowest and highest x and y [2, 2] of what is level at a height z, metres: the largest box of
    the scene whose top is there; endless where there is none, but a floor."""
    data = mujoco.MjData(model)
    mujoco.mj_kinematics(model, data)
    best, found = 0.0, np.array([[-np.inf, -np.inf], [np.inf, np.inf]])
    for geom in np.flatnonzero((model.geom_type == mujoco.mjtGeom.mjGEOM_BOX) & (model.geom_contype != 0)):
        half = np.abs(data.geom_xmat[geom].reshape(3, 3)) @ model.geom_size[geom]
        middle = data.geom_xpos[geom]
        if model.geom_bodyid[geom] and model.body_weldid[model.geom_bodyid[geom]] == 0:
            area = float(half[0] * half[1])
            if abs(middle[2] + half[2] - z) < 0.02 and area > best:
                best, found = area, np.stack([middle[:2] - half[:2], middle[:2] + half[:2]])
    return found


def _ahead(
    model: mujoco.MjModel, goal: Sequence[Mapping[str, Any]], box: tuple[int, np.ndarray, np.ndarray]
) -> tuple[int, np.ndarray, np.ndarray]:
    """Return a box, longer where it is part of a drawer that a goal is about: by as far as that is pulled
    out, and the hand before it."""
    body, low, high = box
    named = {name for spec in goal if spec["kind"] == "joint" for name in spec["joints"]}
    inside = {spec["region"]["body"] for spec in goal if spec["kind"] == "in_region"}
    if (joint := slide_of(model, body)) is None:
        return box
    if model.joint(joint).name not in named and model.body(body).name not in inside:
        return box
    way = way_out(model, joint) * (np.abs(model.jnt_range[joint]).max() + HAND)
    return body, np.minimum(low, low + way), np.maximum(high, high + way)


def _boxes(model: mujoco.MjModel, root: int) -> list[tuple[int, np.ndarray, np.ndarray]]:
    """List what collides of a body and those on it, each as a box in the frame of its own body."""
    boxes = []
    for geom in range(model.ngeom):
        owner = body = int(model.geom_bodyid[geom])
        while owner not in (0, root):
            owner = int(model.body_parentid[owner])
        if owner == root and (model.geom_contype[geom] or model.geom_conaffinity[geom]):
            corners = np.array(list(itertools.product((-1, 1), repeat=3))) * model.geom_aabb[geom, 3:]
            corners = (corners + model.geom_aabb[geom, :3]) @ matrix(model.geom_quat[geom]).T
            corners += model.geom_pos[geom]
            boxes.append((body, corners.min(0), corners.max(0)))
    return boxes


@functools.cache
def _perturbed(task: str) -> tuple[np.ndarray, ...]:
    """Initial states [n, 1 + nq + nv] of a task's perturbed versions in which the same things are."""
    folder, _, name = task.partition("/")
    own, found = package.initial_states(task), []
    for other in package.folders():
        if other.startswith(f"{folder}_") and f"{other}/{name}" in package.tasks(other):
            states = package.initial_states(f"{other}/{name}")
            if states.shape[1] == own.shape[1]:
                found.append(states)
    return tuple(found)


def shifted(task: TaskModel, thing: Mapping[str, Any]) -> np.ndarray:
    """Return the positions [n, 2] that LIBERO-PRO shifts a thing of a task to: those in its perturbed
    versions that are not about where the task itself has it."""
    start = 1 + int(task.model.joint(thing["joint"]).qposadr[0])
    published = task.initial_states[:, start : start + 2]
    there = [states[:, start : start + 2] for states in _perturbed(task.task)]
    found = np.concatenate([np.zeros((0, 2)), *there])
    apart = np.linalg.norm(found[:, None] - published, axis=-1).min(1)
    return np.unique(found[apart > SHIFTED].round(3), axis=0)
