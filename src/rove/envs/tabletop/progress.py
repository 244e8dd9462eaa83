"""What counts as success, failure and progress: geometric and contact predicates over all slots at once."""

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
    """[n]: of the target object."""
    destination: np.ndarray
    """[n, 3]: what the target is to be on: top of a receptacle or object; for a pick, unused."""
    touched: np.ndarray
    """bool [n, 2]: left and right finger touch the target."""
    supported: np.ndarray
    """bool [n]: the target touches its destination."""
    open: np.ndarray
    """bool [n]: the gripper is commanded open."""

    @property
    def held(self) -> np.ndarray:
        """bool [n]: both fingers touch the target."""
        return np.all(self.touched, axis=-1)

    @property
    def height(self) -> np.ndarray:
        """[n]: of the target's underside above the table."""
        return self.target[:, 2] - self.half_height


def inside(s: Situation, margin: float = 0.0) -> np.ndarray:
    """bool [n]: the target's centre is over its destination, `margin` metres within its border."""
    offset = s.target[:, :2] - s.destination[:, :2]
    square = np.abs(offset).max(-1)
    radius = np.linalg.norm(offset, axis=-1)
    return np.select(
        [s.family == STACK, s.family == PUSH],
        [radius <= STACK_RADIUS - margin, square <= sc.ZONE_HALF - margin],
        radius <= sc.PLATE_RADIUS - 0.008 - margin,
    )


def achieved(s: Situation) -> np.ndarray:
    """bool [n]: the goal predicate holds now."""
    released = s.open & ~s.touched.any(-1)
    lifted = s.height >= LIFT_HEIGHT
    low = s.height <= s.destination[:, 2] + ON_TABLE
    return np.select(
        [s.family == PICK, s.family == PUSH],
        [lifted & s.held, inside(s) & ~s.held & (s.height <= ON_TABLE)],
        inside(s) & s.supported & released & low,
    )


def failed(s: Situation) -> np.ndarray:
    """bool [n]: what cannot be undone: the target left the arm's reach, or a push has lifted it."""
    lost = (np.abs(s.target[:, :2]) > np.array(sc.REACH)).any(-1)
    return lost | ((s.family == PUSH) & (s.height > PUSH_LIFT))


def potential(s: Situation) -> np.ndarray:
    """[n], in [-1, 0]: minus what is left to do, half of it reaching the target, half moving it.

    Rewards Phi(s') - Phi(s), with Phi = 0 where an episode terminates, leave the optimal policy as it is
    (Ng, Harada and Russell 1999, theorem 1, undiscounted).
    """
    grasp = s.target + np.array([0.0, 0.0, -sc.HALF_HEIGHT + 0.01])
    reach = np.linalg.norm(s.gripper[:, :3] - grasp, axis=-1)
    lift = np.maximum(LIFT_HEIGHT - s.height, 0.0)
    goal = s.destination + np.array([0.0, 0.0, 1.0]) * s.half_height[:, None]
    move = np.where(s.family == PICK, lift, np.linalg.norm(s.target - goal, axis=-1))
    # Once the target is where it belongs, letting go of it costs nothing.
    reach = np.where(s.held | (move < 0.03), 0.0, reach)
    return -0.5 * (np.minimum(reach / 0.3, 1.0) + np.minimum(move / 0.3, 1.0))
