"""Scripted experts: they see where everything is, take hold of what the goal names and put it down there, or
open, close and turn it (`handles.py`).

Each slot goes through the phases of `Phase`; a thing that is not in the hand when it should be is gone back
to, and then held another way (`grasps.py`), as is a joint that is not where it should be. Goals with several
parts are done one by one, in an order that works (`course.py`).
"""

# pyright: reportAttributeAccessIssue=false
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

import numpy as np

from rove.envs.libero import grasps
from rove.envs.libero.controller import REACH, TURN
from rove.envs.libero.course import Step, course
from rove.envs.libero.handles import Handle
from rove.envs.libero.targets import Target
from rove.envs.libero.worlds import Group, Place
from rove.envs.rotations import axis_angle_between
from rove.errors import RoveError

HOVER = 0.12
"""Metres over a grasp at which the hand comes to it."""
BEFORE = 0.05
"""Metres before a drawer that is pushed shut at which it comes to it."""
LOW = 0.04
"""Metres over a grasp at which it comes at least, where the arm does not reach higher."""
LIFT = 0.20
"""Metres that a thing is carried above the higher of where it was and where it goes."""
GAIN = 1.5
"""Share of the way that is left which an action asks for."""
CLOSING, OPENING, RISING = 10, 8, 12
"""Actions that the fingers are given, and the hand that leaves."""
PATIENCE = 30
"""Actions after which a movement that should have ended is ended."""
STUCK = 0.001
"""Metres in an action, of a hand that something is in the way of."""
CRUISE = 0.12
"""Metres above the place before a handle in which the hand comes there from the side."""
SHOULDER, WRIST, BEHIND, STRETCH = 0.333, 0.21, 0.088, 0.66
"""Metres: the arm's second joint over its base; the sixth over the grip site of a hand that points down, and
behind it; how far they may be apart: with its elbow straight an arm cannot be made to bend it."""
LOST = 0.06
"""Metres that a thing has moved in the hand when it is no longer held."""
ROOM = 0.10
"""Metres from what is touched next at which a hand moves freely."""
FUNNEL = 0.25
"""Metres, for each above its grasp, that a hand may be off and still come down; where another has brought it
there it need not go up again."""
ASTRAY = 0.04
"""Metres beside its grasp at which a hand that was coming down has left its way."""
TAKEN = 0.02
"""Metres that a thing has been raised when another must have taken it."""


class Phase(IntEnum):
    """What an expert is doing. A thing is raised, carried and lowered; a drawer, door or knob is moved."""

    APPROACH = 0
    DESCEND = 1
    CLOSE = 2
    RAISE = 3
    CARRY = 4
    LOWER = 5
    MOVE = 6
    OPEN = 7
    LEAVE = 8


@dataclass
class _Course:
    """The plan of one slot's expert."""

    steps: Sequence[Step]
    step: int = 0
    attempt: int = 0


class _Sight(NamedTuple):
    """How things stand for n experts; positions in the world [n, 3], metres."""

    hand: np.ndarray
    turn: np.ndarray
    """Axis times angle [n, 3] by which the hand is to be turned, radians."""
    thing: np.ndarray
    destination: np.ndarray
    """Where the thing goes, or where the hand goes with the handle."""
    grasp: np.ndarray
    back: np.ndarray
    """Unit vectors along which the hand comes and leaves."""
    handle: np.ndarray
    """Whether the expert is about a handle, [n]; the rest is about that."""
    pushes: np.ndarray
    joint: np.ndarray
    """Position in the direction in which the joint is to move, and its changes as metres of the handle."""
    lever: np.ndarray
    passed: np.ndarray
    """Whether the joint is where it should be, or where the hand that moves it lets it go."""
    closed: np.ndarray
    """How far the fingers are told to close, [n], from -1 to 1."""
    ceiling: np.ndarray
    """Height [n] to which the arm reaches where the hand is, metres."""
    hover: np.ndarray
    """Metres [n] off its grasp at which the hand comes to it."""


UNREACHED = frozenset(
    (
        # the handle is so low that the palm strikes the table
        "90/KITCHEN_SCENE1_open_the_bottom_drawer_of_the_cabinet",
        # it stands in the drawer, higher than that is deep, and would have to be laid down
        "90/KITCHEN_SCENE5_put_the_ketchup_in_the_top_drawer_of_the_cabinet",
        # it lies under the handle of the drawer that stands open, which the arm strikes
        "90/KITCHEN_SCENE10_put_the_chocolate_pudding_in_the_top_drawer_of_the_cabinet_and_close_it",
        # to be entered from the side, with a thing that is held from the side
        "10/KITCHEN_SCENE6_put_the_yellow_and_white_mug_in_the_microwave_and_close_it",
        "90/KITCHEN_SCENE9_put_the_frying_pan_on_the_cabinet_shelf",
        "90/KITCHEN_SCENE9_put_the_frying_pan_under_the_cabinet_shelf",
        "90/STUDY_SCENE4_pick_up_the_book_in_the_middle_and_place_it_on_the_cabinet_shelf",
        "90/STUDY_SCENE4_pick_up_the_book_on_the_right_and_place_it_on_the_cabinet_shelf",
        "90/STUDY_SCENE4_pick_up_the_book_on_the_right_and_place_it_under_the_cabinet_shelf",
        # the book strikes the compartment's rim, which leaves it 13 mm on either side
        "90/STUDY_SCENE1_pick_up_the_book_and_place_it_in_the_front_compartment_of_the_caddy",
        "90/STUDY_SCENE2_pick_up_the_book_and_place_it_in_the_front_compartment_of_the_caddy",
        "90/STUDY_SCENE3_pick_up_the_book_and_place_it_in_the_front_compartment_of_the_caddy",
    )
)
"""Tasks in which the expert has not succeeded, or hardly ever."""


def has_expert(task: str) -> bool:
    """Tell whether a task exists whose expert is not known to fail."""
    return task not in UNREACHED


def check(suite: str, tasks: Sequence[str]) -> None:
    """Raise RoveError unless all of a suite's tasks have an expert."""
    able = [task for task in tasks if has_expert(task)]
    if len(able) < len(tasks):
        lacking = next(task for task in tasks if task not in able)
        raise RoveError(
            f"{suite} has tasks without a scripted expert, such as {lacking!r}, in which it does not "
            f"succeed. Those that have one: {','.join(able) or 'none'}."
        )


class Expert:
    """The experts of B slots."""

    def __init__(self, count: int) -> None:
        self._courses: list[_Course | None] = [None] * count
        self._steps: dict[str, list[Step]] = {}
        self.phase = np.zeros(count, np.int64)
        self._since = np.zeros(count, np.int64)
        self._point = np.zeros((count, 3))
        """Where the hand takes hold, or has taken it, in the frame of the body that it is about."""
        self._wanted = np.zeros((count, 3, 3))
        """The hand's rotation: in the world, of a handle in the frame of its body."""
        self._back = np.zeros((count, 3))
        self._pushes = np.zeros(count, bool)
        self._turning = np.zeros(count, bool)
        """Whether a thing is turned on its way, to fit where it goes."""
        self._height = np.zeros(count)
        self._drawn = np.zeros(count, bool)
        """Whether a thing is drawn along, not lifted."""
        self._lying = np.zeros(count)
        """Height of the thing when the expert turned to it."""
        self._held = np.zeros((count, 3))
        self._watches = np.zeros(count, bool)
        """Whether another moved the hand in the last action, and the expert looked on."""
        self._last, self._joint = np.zeros((count, 3)), np.zeros(count)
        self._near = np.full(count, grasps.NEAR)
        self._gain = np.full(count, GAIN)
        self._hover = np.full(count, HOVER)

    def begin(self, slot: int, place: Place, generator: np.random.Generator) -> None:
        """Begin an episode in a slot: how fast this one is done, and in how high an arc, is drawn."""
        name = place.task.task
        if name not in self._steps:
            self._steps[name] = course(place.task)
        self._courses[slot] = _Course(self._steps[name], -1)
        self._gain[slot] = GAIN * generator.uniform(0.75, 1.1)
        self._hover[slot] = HOVER + generator.uniform(-0.02, 0.02)
        self._height[slot], self._watches[slot] = 0.0, False
        self._go_on(slot, place)

    def _aim(self, slot: int, place: Place) -> None:
        """Choose how to hold the slot's next thing, or handle; go to it."""
        own, data = self._course(slot), place.group.data
        subject = own.steps[own.step].subject
        hold = subject.hold(data, place.row, place.group.arm.home.rotation[0], own.attempt)
        self._point[slot], self._wanted[slot], self._back[slot] = hold.point, hold.rotation, hold.back
        self._pushes[slot], self._turning[slot] = hold.pushes, False
        self._near[slot] = grasps.NEAR
        frame = data["xmat"][place.row, subject.body].reshape(3, 3)
        if isinstance(subject, Handle):
            self._wanted[slot] = frame.T @ hold.rotation
        else:
            self._drawn[slot] = subject.drawn(data, place.row)
            self._near[slot] = grasps.around(subject.shape(data, place.row), frame @ hold.point)
            self._lying[slot] = data["xpos"][place.row, subject.body, 2]
        self.phase[slot], self._since[slot] = Phase.APPROACH, 0

    def act(
        self, slots: np.ndarray, places: Sequence[Place], watches: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return actions [n, 7] for slots whose worlds are in one group, and how freely [n] each hand moves:
        1 on the way, less near contact. `watches` says where something else will be done, bool [n]."""
        group, rows = places[0].group, np.array([place.row for place in places])
        sight = self._look(group, slots, rows)
        self._advance(slots, places, sight)
        self._watches[slots] = watches
        return self._actions(slots, sight)

    def step(self, slot: int) -> Step | None:
        """The step that the slot's expert is about; None before its first episode."""
        course = self._courses[slot]
        return None if course is None else course.steps[course.step]

    def _course(self, slot: int) -> _Course:
        course = self._courses[slot]
        assert course is not None, f"no episode was begun in slot {slot}"
        return course

    def _subject(self, slot: int) -> Target | Handle:
        """The thing or the handle that the slot's expert is about."""
        own = self._course(slot)
        return own.steps[own.step].subject

    def _look(self, group: Group, slots: np.ndarray, rows: np.ndarray) -> _Sight:
        """Look at what the experts are about."""
        data, site = group.data, group.arm.site
        base = data["xpos"][rows, group.arm.root]
        rotation = data["site_xmat"][rows, site].reshape(-1, 3, 3)
        wanted = self._wanted[slots]
        thing, destination, grasp = np.zeros((3, len(slots), 3))
        handle, passed = np.zeros((2, len(slots)), bool)
        joint, lever = np.zeros((2, len(slots)))
        for i, (slot, row) in enumerate(zip(slots, rows, strict=True)):
            subject = self._subject(slot)
            frame = data["xmat"][row, subject.body].reshape(3, 3)
            thing[i] = data["xpos"][row, subject.body]
            if isinstance(subject, Handle):
                grasp[i], destination[i], turn = subject.moved(data, row, self._point[slot], subject.lead)
                wanted[i] = (turn if self.phase[slot] == Phase.MOVE else np.eye(3)) @ frame @ wanted[i]
                handle[i] = True
                passed[i] = subject.passed(data, row, moving=self.phase[slot] == Phase.MOVE)
                joint[i], lever[i] = data["qpos"][row, subject.joint] * subject.towards, subject.lever
            else:
                grasp[i] = thing[i] + frame @ self._point[slot]
                destination[i] = subject.destination(data, np.array([row]))[0]
        hand = data["site_xpos"][rows, site]
        ceiling = _ceiling(hand - base, base[:, 2])
        hover, back, pushes = self._hover[slots], self._back[slots], self._pushes[slots]
        # before a drawer that stands open an arm does not reach as far out
        hover = np.where(handle & pushes & (back[:, 2] < 0.5), np.minimum(hover, BEFORE), hover)
        return _Sight(
            hand,
            axis_angle_between(rotation, wanted),
            thing,
            destination,
            grasp,
            back,
            handle,
            pushes,
            joint,
            lever,
            passed,
            group.controller.gripper[rows, 1],
            ceiling,
            np.where(handle, hover, np.clip(ceiling - grasp[:, 2], LOW, hover)),
        )

    def _advance(self, slots: np.ndarray, places: Sequence[Place], sight: _Sight) -> None:
        """Go on to the next phase where the present one is done, or back where the thing was lost."""
        left = np.linalg.norm((sight.thing - sight.destination)[:, :2], axis=1)
        slipped = np.linalg.norm((sight.thing - sight.hand) - self._held[slots], axis=1) > LOST
        ended = self._ended(slots, sight, left)
        brought = self._brought(slots, sight)
        self._last[slots], self._joint[slots] = sight.hand, sight.joint
        self._count(slots, sight)
        for i, (slot, place) in enumerate(zip(slots.tolist(), places, strict=True)):
            phase, handle = Phase(self.phase[slot]), bool(sight.handle[i])
            placed = left[i] < 0.08 and abs(sight.thing[i, 2] - sight.destination[i, 2]) < 0.03
            if phase == Phase.LOWER and slipped[i] and left[i] < LOST:
                self.phase[slot], self._since[slot] = Phase.OPEN, 0  # it fell where it goes
            elif not handle and Phase.RAISE <= phase <= Phase.LOWER and slipped[i]:
                (self._go_on if self._watches[slot] and placed else self._again)(slot, place)
            elif ended[i] and phase == Phase.LEAVE:
                done = sight.passed[i] if handle else left[i] < 0.08
                (self._go_on if done else self._again)(slot, place)
            elif ended[i] or brought[i] != phase:
                following = Phase(brought[i])
                if following == phase:
                    following = _following(phase, handle, bool(sight.pushes[i]))
                self.phase[slot], self._since[slot] = following, 0
                if following == Phase.RAISE:
                    self._held[slot] = sight.thing[i] - sight.hand[i]
                    # never lower than the things that stand about
                    lay = self._lying[slot] if self._watches[slot] else sight.thing[i, 2]
                    top = max(lay, sight.destination[i, 2])
                    lifted = top + LIFT - self._held[slot, 2]
                    self._height[slot] = sight.hand[i, 2] if self._drawn[slot] else lifted
                elif following == Phase.CARRY:
                    self._fit(slot, place)
                elif following == Phase.MOVE and not sight.pushes[i]:
                    frame = place.group.data["xmat"][place.row, self._subject(slot).body].reshape(3, 3)
                    self._point[slot] = (sight.hand[i] - sight.thing[i]) @ frame

    def _fit(self, slot: int, place: Place) -> None:
        """Want a hand that turns what it carries so that it fits where it goes."""
        subject = self._subject(slot)
        turn = subject.turn(place.group.data, place.row) if isinstance(subject, Target) else 0.0
        self._turning[slot] = turn != 0.0
        cos, sin = np.cos(turn), np.sin(turn)
        self._wanted[slot] = np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]]) @ self._wanted[slot]

    def _count(self, slots: np.ndarray, sight: _Sight) -> None:
        """Count the actions in each phase, but not while another leaves the fingers as they are that it is
        to close or to open."""
        phase = self.phase[slots]
        idle = (phase == Phase.CLOSE) & (sight.closed < -0.9) | (phase == Phase.OPEN) & (sight.closed > 0.9)
        self._since[slots] += ~(self._watches[slots] & idle)

    def _brought(self, slots: np.ndarray, sight: _Sight) -> np.ndarray:
        """Return the phases [n], as another has brought it about where the expert looked on."""
        now = self.phase[slots]
        distance, along, flat = _off(sight)
        above = (along > 0) & (flat < 0.006 + FUNNEL * along) & self._turned(sight)
        above &= ~sight.handle | (along < sight.hover - 0.03)  # before a handle it first comes down
        taken = ~sight.handle & (sight.thing[:, 2] > self._lying[slots] + TAKEN)
        taken &= (distance < LOST) & (sight.closed > 0)
        phase = np.where((now == Phase.APPROACH) & above, Phase.DESCEND, now)
        phase = np.where((now == Phase.DESCEND) & (flat > ASTRAY), Phase.APPROACH, phase)
        phase = np.where((now < Phase.RAISE) & taken, Phase.RAISE, phase)
        phase = np.where((now < Phase.CLOSE) & sight.handle & sight.passed, Phase.LEAVE, phase)
        return np.where(self._watches[slots], phase, now)

    def _turned(self, sight: _Sight) -> np.ndarray:
        """Tell whose hand is turned as its grasp needs, bool [n]."""
        angle = np.linalg.norm(sight.turn, axis=1)
        # a hand that still tilts, as after a drawer was opened, would swing aside on its way down
        return (angle < 0.12) & (sight.handle | (np.abs(sight.turn[:, 2]) < 0.06))

    def _ended(self, slots: np.ndarray, sight: _Sight, left: np.ndarray) -> np.ndarray:
        """Tell whose present phase is done, or is not to be waited for any longer: bool [n]."""
        hand, since = sight.hand, self._since[slots]
        distance, along, flat = _off(sight)
        turned = self._turned(sight)
        stuck = (since >= 6) & (np.linalg.norm(hand - self._last[slots], axis=1) < STUCK)
        # an arm that is stretched may come to rest a little off
        over = (flat < np.where(stuck, 0.018, 0.009)) & (np.abs(along - sight.hover) < 0.03) & turned
        # another that rests, or is long about it, need not have come as far as it goes
        there = ~self._watches[slots] | (distance < 0.025)
        stuck &= there
        still = stuck & (sight.lever * np.abs(sight.joint - self._joint[slots]) < STUCK / 2)
        late = (since >= PATIENCE) | stuck
        height = np.minimum(self._height[slots], sight.ceiling)
        return np.choose(
            self.phase[slots],
            (
                over | (since >= np.where(sight.handle, 60, 40)),
                # as soon as the fingers are around it: a hand that waits there is hard to imitate
                ((flat < 0.008) & (np.abs(along) < self._near[slots])) | (late & there),
                since >= CLOSING,
                (hand[:, 2] > height - 0.03) | late,
                ((left < 0.008) & (turned | ~self._turning[slots])) | (since >= 50),
                (sight.thing[:, 2] < sight.destination[:, 2] + 0.006) | late,
                sight.passed | still | (since >= 3 * PATIENCE),
                since >= OPENING,
                since >= RISING,
            ),
        )

    def _again(self, slot: int, place: Place) -> None:
        self._course(slot).attempt += 1
        self._aim(slot, place)

    def _go_on(self, slot: int, place: Place) -> None:
        """Turn to the next step; joints that are where they should be are left alone."""
        course = self._course(slot)
        for _ in course.steps:
            course.step, course.attempt = (course.step + 1) % len(course.steps), 0
            subject = course.steps[course.step].subject
            if isinstance(subject, Target) or not subject.passed(place.group.data, place.row):
                break
        self._aim(slot, place)

    def _actions(self, slots: np.ndarray, sight: _Sight) -> tuple[np.ndarray, np.ndarray]:
        hand, turn, thing, destination, grasp, back, handle, pushes, *_ = sight
        phase = self.phase[slots]

        def at(*phases: Phase) -> np.ndarray:
            return np.isin(phase, phases)

        over = grasp + sight.hover[:, None] * back
        # from the side a hand comes to the place before a handle from above
        aside = np.linalg.norm((hand - np.where(handle[:, None], over, grasp))[:, :2], axis=1) > 0.04
        over[aside & handle, 2] += CRUISE
        # a hand that is low beside the thing goes up first
        low = aside & (hand[:, 2] < over[:, 2] - 0.04)
        want = hand.copy()
        want[at(Phase.APPROACH)] = over[at(Phase.APPROACH)]
        want[at(Phase.APPROACH) & low, :2] = hand[at(Phase.APPROACH) & low, :2]
        # fingers that close around a handle are pushed on, to get behind it
        descending = at(Phase.DESCEND) | (at(Phase.CLOSE) & handle)
        want[descending] = grasp[descending]
        moving = at(Phase.RAISE, Phase.CARRY)
        want[moving, 2] = np.minimum(self._height[slots], sight.ceiling)[moving]
        carrying = at(Phase.CARRY, Phase.LOWER)
        want[carrying, :2] += (destination - thing)[carrying, :2]
        lowering = at(Phase.LOWER)
        want[lowering, 2] += (destination - thing)[lowering, 2]
        want[at(Phase.MOVE)] = destination[at(Phase.MOVE)]
        leaving = at(Phase.LEAVE)
        want[leaving] += 0.06 * back[leaving]
        want[leaving, 2] = np.minimum(want[:, 2], np.maximum(sight.ceiling, hand[:, 2]))[leaving]
        action = np.zeros((len(slots), 7))
        action[:, :3] = np.clip(self._gain[slots, None] * (want - hand) / REACH, -1, 1)
        turning = at(Phase.APPROACH, Phase.MOVE) | (at(Phase.CARRY) & self._turning[slots])
        turning &= np.linalg.norm(turn, axis=1) > 0.04
        action[turning, 3:6] = np.clip(turn[turning] / TURN, -1, 1)
        closed = ((phase >= Phase.CLOSE) & (phase <= Phase.MOVE)) | pushes
        action[:, 6] = np.where(closed, 1.0, -1.0)
        return action, np.clip(self._room(slots, sight) / ROOM, 0.1, 1.0)

    def _room(self, slots: np.ndarray, sight: _Sight) -> np.ndarray:
        """Return how far hands, or what they hold, are from what they touch next or touched last, metres [n].

        A hand that is pushed aside on its way down shows how to come back, which whoever has learned from it
        needs there: what it has never seen it does not correct.
        """
        phase, off = self.phase[slots], sight.thing - sight.destination
        coming = np.isin(phase, (Phase.APPROACH, Phase.DESCEND))
        going = np.isin(phase, (Phase.CARRY, Phase.LOWER))
        to_go = np.where(self._drawn[slots], np.linalg.norm(off[:, :2], axis=1), off[:, 2])
        lifted = np.where(phase == Phase.RAISE, sight.thing[:, 2] - self._lying[slots], 0.0)
        return np.where(coming, _off(sight)[0], np.where(going, to_go, lifted))


def _off(sight: _Sight) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return how far hands are from their grasps, along the way they come and beside it, metres, [n] each."""
    off = sight.hand - sight.grasp
    along = (off * sight.back).sum(1)
    beside = np.linalg.norm(off - along[:, None] * sight.back, axis=1)
    return np.linalg.norm(off, axis=1), along, beside


def _ceiling(hand: np.ndarray, base: np.ndarray) -> np.ndarray:
    """Return the height [n] to which a hand that points down can be raised with the elbow bent, for hands
    [n, 3] from the robot's base, which is at a height [n]."""
    out = np.linalg.norm(hand[:, :2], axis=1) - BEHIND
    return base + SHOULDER - WRIST + np.sqrt(np.maximum(STRETCH**2 - out**2, 0.0))


def _following(phase: Phase, handle: bool, pushes: bool) -> Phase:
    """Return the phase after one, for who puts a thing somewhere, or moves a handle, or only pushes it."""
    if not handle:
        return Phase.OPEN if phase == Phase.LOWER else Phase(phase + 1)
    if phase == Phase.DESCEND and not pushes:
        return Phase.CLOSE
    if phase == Phase.MOVE:
        return Phase.LEAVE if pushes else Phase.OPEN
    return Phase.MOVE if phase in (Phase.DESCEND, Phase.CLOSE) else Phase(phase + 1)
