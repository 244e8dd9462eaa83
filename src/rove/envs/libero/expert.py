"""Scripted experts: they see where everything is, take hold of what the goal names and put it down there.

Each slot goes through the phases of `Phase`; a thing that is not in the hand when it should be is gone back
to, and then held another way (`grasps.py`). Goals with several things are done one by one, in their order.
"""

# pyright: reportAttributeAccessIssue=false
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from rove.envs.libero import package
from rove.envs.libero.controller import REACH, TURN
from rove.envs.libero.targets import Target
from rove.envs.libero.worlds import Place
from rove.envs.rotations import axis_angle_between
from rove.errors import RoveError

HOVER = 0.12
"""Metres over a grasp at which the hand comes to it."""
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
LOST = 0.06
"""Metres that a thing has moved in the hand when it is no longer held."""


class Phase(IntEnum):
    APPROACH = 0
    DESCEND = 1
    CLOSE = 2
    RAISE = 3
    CARRY = 4
    LOWER = 5
    OPEN = 6
    LEAVE = 7


@dataclass
class _Course:
    """The plan of one slot's expert."""

    targets: Sequence[Target]
    target: int = 0
    attempt: int = 0


UNREACHED = frozenset(
    f"90/{name}"
    for name in (
        # the arm strikes a drawer that stands open
        "KITCHEN_SCENE5_put_the_black_bowl_in_the_top_drawer_of_the_cabinet",
        "KITCHEN_SCENE5_put_the_black_bowl_on_the_plate",
        "KITCHEN_SCENE5_put_the_black_bowl_on_top_of_the_cabinet",
        "KITCHEN_SCENE5_put_the_ketchup_in_the_top_drawer_of_the_cabinet",
        # to be entered from the side
        "KITCHEN_SCENE9_put_the_frying_pan_on_the_cabinet_shelf",
        "KITCHEN_SCENE9_put_the_frying_pan_under_the_cabinet_shelf",
        "STUDY_SCENE4_pick_up_the_book_in_the_middle_and_place_it_on_the_cabinet_shelf",
        "STUDY_SCENE4_pick_up_the_book_on_the_right_and_place_it_on_the_cabinet_shelf",
        "STUDY_SCENE4_pick_up_the_book_on_the_right_and_place_it_under_the_cabinet_shelf",
        # too narrow for a thing held this way
        "STUDY_SCENE1_pick_up_the_book_and_place_it_in_the_front_compartment_of_the_caddy",
        "STUDY_SCENE2_pick_up_the_book_and_place_it_in_the_front_compartment_of_the_caddy",
        "STUDY_SCENE3_pick_up_the_book_and_place_it_in_the_front_compartment_of_the_caddy",
        # lost again and again
        "KITCHEN_SCENE2_stack_the_black_bowl_at_the_front_on_the_black_bowl_in_the_middle",
        "STUDY_SCENE3_pick_up_the_red_mug_and_place_it_to_the_right_of_the_caddy",
    )
) | {"goal/open_the_top_drawer_and_put_the_bowl_inside"}  # which its goal does not say is closed
"""Tasks that ask for no more, and in which the expert has not succeeded."""


def has_expert(task: str) -> bool:
    """Tell whether a task only asks to put things somewhere, as its definition says, and was not out of
    reach."""
    return task not in UNREACHED and all(name.lower() in ("in", "on") for name, *_ in package.goal(task))


def check(suite: str, tasks: Sequence[str]) -> None:
    """Raise RoveError unless all of a suite's tasks have an expert."""
    able = [task for task in tasks if has_expert(task)]
    if len(able) < len(tasks):
        lacking = next(task for task in tasks if task not in able)
        raise RoveError(
            f"{suite} has tasks without a scripted expert, such as {lacking!r}: the experts put things "
            "somewhere, they do not open, close, turn or push. Those that have one: "
            f"{','.join(able) or 'none'}."
        )


class Expert:
    """The experts of B slots."""

    def __init__(self, count: int) -> None:
        self._courses: list[_Course | None] = [None] * count
        self._targets: dict[str, list[Target]] = {}
        self.phase = np.zeros(count, np.int64)
        self._since = np.zeros(count, np.int64)
        self._grasp = np.zeros((count, 3))
        self._wanted = np.zeros((count, 3, 3))
        self._height = np.zeros(count)
        self._held = np.zeros((count, 3))
        self._last = np.zeros((count, 3))
        self._gain = np.full(count, GAIN)
        self._hover = np.full(count, HOVER)

    def begin(self, slot: int, place: Place, generator: np.random.Generator) -> None:
        """Begin an episode in a slot: how fast this one is done, and in how high an arc, is drawn."""
        name = place.task.task
        if name not in self._targets:
            self._targets[name] = [Target(place.task, spec) for spec in place.task.goal]
        self._courses[slot] = _Course(self._targets[name])
        self._gain[slot] = GAIN * generator.uniform(0.75, 1.1)
        self._hover[slot] = HOVER + generator.uniform(-0.02, 0.02)
        self._height[slot] = 0.0
        self._aim(slot, place)

    def _aim(self, slot: int, place: Place) -> None:
        """Choose a grasp of the slot's next thing; go to it."""
        course = self._courses[slot]
        assert course is not None
        data, target = place.group.data, course.targets[course.target]
        options = target.grasps(data, place.row)
        if not options:
            raise RoveError(f"No way to hold what {place.task.task!r} names was found.")
        grasp = options[course.attempt % len(options)]
        turn, home = grasp.yaw, place.group.arm.home.rotation[0]
        cos, sin = np.cos(turn), np.sin(turn)
        rotation = data["xmat"][place.row, target.body].reshape(3, 3)
        self._grasp[slot] = grasp.point @ rotation  # in the thing's frame
        self._wanted[slot] = np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]]) @ home
        self.phase[slot], self._since[slot] = Phase.APPROACH, 0

    def act(self, slots: np.ndarray, places: Sequence[Place]) -> tuple[np.ndarray, np.ndarray]:
        """Return actions [n, 7] for slots whose worlds are in one group, and how freely [n] each hand moves:
        1 on the way, less near contact."""
        group, rows = places[0].group, np.array([place.row for place in places])
        data, site = group.data, group.arm.site
        hand = data["site_xpos"][rows, site]
        rotation = data["site_xmat"][rows, site].reshape(-1, 3, 3)
        thing, destination, grasp = np.zeros((3, len(slots), 3))
        for i, (slot, row) in enumerate(zip(slots, rows, strict=True)):
            target = self.target(slot)
            thing[i] = data["xpos"][row, target.body]
            destination[i] = target.destination(data, np.array([row]))[0]
            grasp[i] = thing[i] + data["xmat"][row, target.body].reshape(3, 3) @ self._grasp[slot]
        turn = axis_angle_between(rotation, self._wanted[slots])
        self._advance(slots, places, hand, turn, thing, destination, grasp)
        return self._actions(slots, hand, turn, thing, destination, grasp)

    def about(self, slot: int) -> int:
        """The predicate of the goal that the slot's expert is about."""
        course = self._courses[slot]
        return 0 if course is None else course.target

    def target(self, slot: int) -> Target:
        """The object that the slot's expert is about to put somewhere."""
        course = self._courses[slot]
        assert course is not None, f"no episode was begun in slot {slot}"
        return course.targets[course.target]

    def _advance(
        self,
        slots: np.ndarray,
        places: Sequence[Place],
        hand: np.ndarray,
        turn: np.ndarray,
        thing: np.ndarray,
        destination: np.ndarray,
        grasp: np.ndarray,
    ) -> None:
        """Go on to the next phase where the present one is done, or back where the thing was lost."""
        off = hand - grasp
        flat = np.linalg.norm(off[:, :2], axis=1)
        high = np.abs(off[:, 2] - self._hover[slots])
        left = np.linalg.norm((thing - destination)[:, :2], axis=1)
        slipped = np.linalg.norm((thing - hand) - self._held[slots], axis=1) > LOST
        stuck = np.linalg.norm(hand - self._last[slots], axis=1) < STUCK
        self._last[slots] = hand
        for i, (slot, place) in enumerate(zip(slots.tolist(), places, strict=True)):
            since, phase = self._since[slot], self.phase[slot]
            self._since[slot] += 1
            late = since >= PATIENCE or (since >= 6 and stuck[i])
            done = (
                (flat[i] < 0.009 and high[i] < 0.03 and abs(turn[i, 2]) < 0.06) or since >= 40,
                np.linalg.norm(off[i]) < 0.008 or late,
                since >= CLOSING,
                hand[i, 2] > self._height[slot] - 0.03 or late,
                left[i] < 0.008 or since >= 50,
                thing[i, 2] < destination[i, 2] + 0.006 or late,
                since >= OPENING,
                since >= RISING,
            )[phase]
            if Phase.RAISE <= phase <= Phase.LOWER and slipped[i]:
                self._again(slot, place)
            elif done and phase == Phase.LEAVE:
                self._next(slot, place, left[i])
            elif done:
                self.phase[slot], self._since[slot] = phase + 1, 0
                if phase == Phase.CLOSE:
                    self._held[slot] = thing[i] - hand[i]
                    # never lower than the things that stand about
                    top = max(thing[i, 2], destination[i, 2])
                    self._height[slot] = top + LIFT - self._held[slot, 2]

    def _again(self, slot: int, place: Place) -> None:
        course = self._courses[slot]
        assert course is not None
        course.attempt += 1
        self._aim(slot, place)

    def _next(self, slot: int, place: Place, left: float) -> None:
        """Go on to the next thing, if this one is where it should be."""
        course = self._courses[slot]
        assert course is not None
        if left > 0.08:
            self._again(slot, place)
        else:
            course.target, course.attempt = (course.target + 1) % len(course.targets), 0
            self._aim(slot, place)

    def _actions(
        self,
        slots: np.ndarray,
        hand: np.ndarray,
        turn: np.ndarray,
        thing: np.ndarray,
        destination: np.ndarray,
        grasp: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray]:
        phase = self.phase[slots]
        want = hand.copy()

        def at(*phases: Phase) -> np.ndarray:
            return np.isin(phase, phases)

        over = grasp + self._hover[slots, None] * [0.0, 0.0, 1.0]
        # a hand that is low beside the thing goes up first
        low = (np.linalg.norm((hand - grasp)[:, :2], axis=1) > 0.04) & (hand[:, 2] < over[:, 2] - 0.04)
        want[at(Phase.APPROACH)] = over[at(Phase.APPROACH)]
        want[at(Phase.APPROACH) & low, :2] = hand[at(Phase.APPROACH) & low, :2]
        want[at(Phase.DESCEND)] = grasp[at(Phase.DESCEND)]
        moving = at(Phase.RAISE, Phase.CARRY)
        want[moving, 2] = self._height[slots][moving]
        carrying = at(Phase.CARRY, Phase.LOWER)
        want[carrying, :2] += (destination - thing)[carrying, :2]
        lowering = at(Phase.LOWER)
        want[lowering, 2] += (destination - thing)[lowering, 2]
        want[at(Phase.LEAVE), 2] += 0.06
        action = np.zeros((len(slots), 7))
        action[:, :3] = np.clip(self._gain[slots, None] * (want - hand) / REACH, -1, 1)
        turning = (np.linalg.norm(turn, axis=1) > 0.04) & at(Phase.APPROACH)
        action[turning, 3:6] = np.clip(turn[turning] / TURN, -1, 1)
        closed = (phase >= Phase.CLOSE) & (phase <= Phase.LOWER)
        action[:, 6] = np.where(closed, 1.0, -1.0)
        distance = np.linalg.norm(want - hand, axis=1)
        free = np.where(at(Phase.APPROACH, Phase.RAISE, Phase.CARRY), distance / REACH, 0.0)
        return action, np.clip(free, 0.1, 1.0)
