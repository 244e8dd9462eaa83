"""Success, failure and progress: geometric and contact predicates over all slots at once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rove.envs.tabletop import scene as sc
from rove.envs.tabletop.tasks import FAMILIES

PICK, PUT, STACK, PUSH = range(len(FAMILIES))

HELD_FOR = 2
"""Consecutive actions for which the predicate has to hold."""
LIFT_HEIGHT = 0.06
"""Metres above its place on the table at which an object counts as picked up."""
ON_TABLE = 0.012
"""Metres above its support at which an object still counts as lying on it."""
PUSH_LIFT = 0.022
"""Metres above the table at which a pushed object counts as lifted, which fails the push for good.

More than the hop of an object that is hit fast, less than any way of carrying it over another.
"""
STACK_RADIUS = 0.024
"""Largest horizontal distance of the two centres of a stack."""

GRASP = 0.010
"""Fingertip height above the underside of what is grasped, metres."""
CLEARANCE = 0.05
"""Height above that at which the hand clears what stands on the table."""
CARRY_CLEARANCE = 0.035
"""Height above its destination at which what is carried clears it."""
BEHIND = 0.045
"""Metres behind a target's centre at which the hand that pushes it is."""
GRIP = 0.05
"""Metres of way that opening or closing the gripper counts for."""
FULL_WAY = 0.8
"""Metres of way that the potential counts as all."""


@dataclass(frozen=True, slots=True)
class Situation:
    """The privileged state of n running slots."""

    family: np.ndarray
    """int [n], index into FAMILIES."""
    gripper: np.ndarray
    """[n, 4]: x, y, z of the point between the fingertips [m], yaw [rad]."""
    target: np.ndarray
    """[n, 3]: centre of the target object."""
    half_height: np.ndarray
    """Half height [n] of the target object, metres."""
    destination: np.ndarray
    """Place [n, 3] that the target is to be on: top of a receptacle or object; for a pick, unused."""
    touched: np.ndarray
    """bool [n, 2]: left and right finger touch the target."""
    supported: np.ndarray
    """bool [n]: the target touches its destination."""
    open: np.ndarray
    """bool [n]: the gripper is commanded open."""

    @property
    def held(self) -> np.ndarray:
        """Rows in which both fingers touch the target, bool [n]."""
        return np.all(self.touched, axis=-1)

    @property
    def height(self) -> np.ndarray:
        """Height [n] of the target's underside above the table, metres."""
        return self.target[:, 2] - self.half_height


def inside(s: Situation, margin: float = 0.0) -> np.ndarray:
    """Tell where the target's centre is over its destination, `margin` metres within its border: bool [n]."""
    offset = s.target[:, :2] - s.destination[:, :2]
    square = np.abs(offset).max(-1)
    radius = np.linalg.norm(offset, axis=-1)
    return np.select(
        [s.family == STACK, s.family == PUSH],
        [radius <= STACK_RADIUS - margin, square <= sc.ZONE_HALF - margin],
        radius <= sc.PLATE_RADIUS - 0.008 - margin,
    )


def achieved(s: Situation) -> np.ndarray:
    """Tell where the goal predicate holds now: bool [n]."""
    released = s.open & ~s.touched.any(-1)
    lifted = s.height >= LIFT_HEIGHT
    low = s.height <= s.destination[:, 2] + ON_TABLE
    return np.select(
        [s.family == PICK, s.family == PUSH],
        [lifted & s.held, inside(s) & ~s.held & (s.height <= ON_TABLE)],
        inside(s) & s.supported & released & low,
    )


def failed(s: Situation) -> np.ndarray:
    """Tell what cannot be undone, bool [n]: the target left the arm's reach, or a push has lifted it."""
    lost = (np.abs(s.target[:, :2]) > np.array(sc.REACH)).any(-1)
    return lost | ((s.family == PUSH) & (s.height > PUSH_LIFT))


def potential(s: Situation) -> np.ndarray:
    """Return the potential [n], in [-1, 0]: minus what is left to do, as the way that the hand still has to
    go.

    Rewards are Phi(s') - Phi(s), as in Ng, Harada and Russell (1999): a step is paid for what it brings, at
    once. Unlike theirs, which is the same after every end, Phi is 0 after success and -1 after failure: a
    discounted policy would else be paid for failing, which ends all that is left to do.
    """
    return -np.clip(np.where(s.family == PUSH, _left_to_push(s), _left_to_carry(s)) / FULL_WAY, 0.0, 1.0)


def _left_to_carry(s: Situation) -> np.ndarray:
    """Measure the way [n] over the target, down, grasp it, lift, over the destination, down, let go;
    metres."""
    off = np.linalg.norm(s.gripper[:, :2] - s.target[:, :2], axis=-1)
    low = s.height + GRASP
    reach = np.maximum(off - 0.006, 0.0) + _descent(off, s.gripper[:, 2] - low, CLEARANCE)
    ready = (off < 0.014) & (s.gripper[:, 2] < low + 0.014)
    # A hand that closes too early has to open again.
    grasp = reach + GRIP + np.where(s.open | ready, 0.0, GRIP)
    shift = np.linalg.norm(s.target[:, :2] - s.destination[:, :2], axis=-1)
    above = s.height - s.destination[:, 2]
    carry = np.maximum(shift - 0.006, 0.0) + _descent(shift, above, CARRY_CLEARANCE)
    carry = np.where(s.family == PICK, np.maximum(LIFT_HEIGHT - s.height, 0.0), carry)
    placed = (s.family != PICK) & inside(s) & s.supported & (above < ON_TABLE)
    release = np.where(s.open, 0.0, GRIP)
    return np.where(placed, release, np.where(s.held, 0.0, grasp) + carry + GRIP * (s.family != PICK))


def _left_to_push(s: Situation) -> np.ndarray:
    """Measure the way [n] behind the target as seen from its destination, down, along the line; metres."""
    line = s.destination[:, :2] - s.target[:, :2]
    shift = np.linalg.norm(line, axis=-1)
    ahead = line / np.maximum(shift, 1e-6)[:, None]
    off = np.linalg.norm(s.gripper[:, :2] - (s.target[:, :2] - BEHIND * ahead), axis=-1)
    reach = np.maximum(off - 0.02, 0.0) + _descent(off - 0.014, s.gripper[:, 2] - GRASP, CLEARANCE)
    reach = reach + np.where(s.open, GRIP, 0.0)
    left = np.maximum(shift - 0.03, 0.0)
    return np.where(left > 0, reach + left, 0.0)


def _descent(off: np.ndarray, above: np.ndarray, clearance: float) -> np.ndarray:
    """Return the way [n] up and down of what is `above` its goal and `off` to the side of it, metres.

    It has to be `clearance` above before it may come near: a funnel around the goal.
    """
    needed = clearance * np.clip((off - 0.012) / 0.03, 0.0, 1.0)
    return np.maximum(above, needed) + np.maximum(needed - above, 0.0)
