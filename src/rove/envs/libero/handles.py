"""Handles: what drawers, doors and knobs are moved by, and how a hand comes to it."""

# pyright: reportAttributeAccessIssue=false
from __future__ import annotations

from collections.abc import Mapping

import mujoco
import numpy as np

from rove.envs.libero.grasps import UP, Hold, grasps, shape
from rove.envs.libero.joints import opens, way_out
from rove.envs.rotations import axis_angle_matrix

HANDLE = 0.025
"""Metres from the outermost point of a drawer, door or knob within which its points are its handle."""
OUTSIDE = 0.02
"""Metres before a handle at which the hand pushes it."""
KNOB = 0.08
"""Metres around its axis within which all of a knob is."""
TILTS = np.deg2rad([82, 75, 68, 60])
"""Angles from straight down to try, at which the fingers point at a handle that is pulled out sideways."""
SHUTS = np.deg2rad([30, 45, 0, 60])
"""Angles from straight down to try, at which shut fingers push a drawer: before one that is low and far out
an arm cannot point further forward."""
PALM = (0.03, 0.1)
"""Metres from between the fingertips to the palm, and half its length."""
LEAD = 0.05
"""Metres by which a hand that moves a joint is ahead of it."""


def _turned(across: np.ndarray, towards: np.ndarray, home: np.ndarray) -> np.ndarray:
    """Return the rotation [3, 3] of a hand that points `towards` [3] and whose fingers open along `across`
    [3], either way round: the one that is closer to `home`."""
    ways = (np.stack([x, np.cross(towards, x), towards], axis=1) for x in (across, -across))
    return max(ways, key=lambda rotation: float(np.trace(rotation @ home.T)))


class Door:
    """A slab that turns about an upright axis: directions in its frame, points from the axis, metres."""

    DEPTH = 0.02
    """Metres below its top at which it is pushed: the palm stays above it."""

    def __init__(self, points: np.ndarray, radii: np.ndarray, out: np.ndarray) -> None:
        """`points` [n, 3] are those of the slab and its handle, `radii` [n] their distances from the axis;
        `out` [3] is the axis, in the direction in which the door opens."""
        edge = points[radii > radii.max() - 0.003]
        middle = edge.mean(0) * [1.0, 1.0, 0.0]
        self.along = middle / np.linalg.norm(middle)
        """Unit vector from the axis to the edge."""
        self.normal = np.cross(out, self.along)
        """Unit vector to the side on which the handle is."""
        across, z = edge @ self.normal, edge[:, 2].max() - self.DEPTH
        reach = 0.75 * radii.max() * self.along + [0.0, 0.0, z]
        self.outside = reach + (across.max() + OUTSIDE) * self.normal
        self.inside = reach + (across.min() - OUTSIDE) * self.normal


class Handle:
    """What is taken hold of, or pushed, to move a joint."""

    def __init__(
        self,
        model: mujoco.MjModel,
        joint: int,
        limit: float,
        towards: float,
        at: bool,
        pushed: bool,
        end: float | None = None,
    ) -> None:
        """The joint is to move `towards` (1 or -1) beyond its `limit`, or to be `at` it; it is `pushed` where
        it is not pulled, a door that is to open from within. A hand that moves it goes on to its `end`; None:
        no further than it has to."""
        self.body = int(model.jnt_bodyid[joint])
        self.root = int(model.body_rootid[self.body])
        self.joint = int(model.jnt_qposadr[joint])
        self.limit, self.towards, self.at = limit, towards, at
        self._end = limit if end is None else end
        self._axis, self._anchor = model.jnt_axis[joint].copy(), model.jnt_pos[joint].copy()
        self.turns = bool(model.jnt_type[joint] == mujoco.mjtJoint.mjJNT_HINGE)
        points = shape(model, self.body) - self._anchor
        axis, self.lever = self._axis, 1.0
        out = way_out(model, joint)
        self.out = np.zeros(3)
        """The way from which the hand comes, in the body's frame; zero: from above."""
        self.door: Door | None = None
        if self.turns:
            radii = np.linalg.norm(np.cross(axis, points), axis=1)
            self.lever = float(radii.max())
            if self.lever < KNOB:
                out, pushed = np.abs(axis), False  # taken from above, and turned
            else:
                self.door = Door(points, radii, out)
                out, points = self.door.normal, points[radii > self.lever / 2]
        else:
            self.out = out
        along = points @ out
        self.points = points[along > along.max() - HANDLE] + self._anchor
        self.middle = (self.points.min(0) + self.points.max(0)) / 2
        """Where the hand takes hold, in the body's frame."""
        self.pushed = pushed
        self.lead = towards * min(LEAD / self.lever, 0.5)
        """How far a hand that moves the joint is ahead of it, metres or radians."""
        self.push = self.points.mean(0) + OUTSIDE * out
        """Where the hand pushes, in the body's frame."""
        if self.door is not None:
            side = self.door.inside if towards == opens(model, joint) else self.door.outside
            self.push = self._anchor + side
            self.middle[2] = self.points[:, 2].max() - self.door.DEPTH

    def hold(self, data: Mapping[str, np.ndarray], row: int, home: np.ndarray, attempt: int) -> Hold:
        """Choose how to come to the handle as it is now, another way with each attempt; `home` [3, 3] is the
        grip site's rotation when the hand points down."""
        frame = data["xmat"][row, self.body].reshape(3, 3)
        if self.door is not None:  # from above
            turned = _turned(frame @ self.door.along, -UP, home)
            return Hold(self.push if self.pushed else self.middle, turned, UP, self.pushed)
        if not self.out.any():
            options = grasps(self.points @ frame.T)
            return options[attempt % len(options)].hold(frame, home)
        out = frame @ self.out
        aside = np.cross(out, UP)
        if self.pushed:
            tilt = SHUTS[attempt % len(SHUTS)]
            towards = -(np.sin(tilt) * out + np.cos(tilt) * UP)
            return Hold(self.push, _turned(aside, towards, home), out, True)
        points = self.points @ frame.T
        upright = np.ptp(points @ UP) > np.ptp(points @ aside)
        # the palm, which is as long as the fingers open, stays off the table that the fixture stands on
        floor = data["xpos"][row, self.root][2]
        height = (data["xpos"][row, self.body] + frame @ self.middle)[2] - floor
        tilts = [t for t in TILTS if height + PALM[0] * np.cos(t) - PALM[1] * np.sin(t) > 0.01]
        flat = upright or not tilts
        tilt = (TILTS if flat else tilts)[attempt % len(TILTS if flat else tilts)]
        towards = -(np.sin(tilt) * out + np.cos(tilt) * UP)
        # the fingers open across the handle's length, which is along `aside` or upright
        across = aside if flat else np.cross(towards, aside)
        return Hold(self.middle, _turned(across, towards, home), out)

    def passed(self, data: Mapping[str, np.ndarray], row: int, moving: bool = False) -> bool:
        """Tell whether the joint is where it should be, or where a hand that is `moving` it lets it go."""
        limit = self._end if moving else self.limit
        beyond = (data["qpos"][row, self.joint] - limit) * self.towards
        return bool(beyond > 0 or (self.at and beyond == 0))

    def moved(
        self, data: Mapping[str, np.ndarray], row: int, point: np.ndarray, by: float
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return where a point [3] of the body's frame is in the world, where it is when the joint has moved
        `by` metres or radians more, and the rotation [3, 3] between."""
        frame, position = data["xmat"][row, self.body].reshape(3, 3), data["xpos"][row, self.body]
        now, axis = position + frame @ point, frame @ self._axis
        if not self.turns:
            return now, now + by * axis, np.eye(3)
        turn = axis_angle_matrix((by * axis)[None])[0] if by else np.eye(3)
        anchor = position + frame @ self._anchor
        return now, anchor + turn @ (now - anchor), turn

    def left(self, data: Mapping[str, np.ndarray], row: int) -> float:
        """Return how far the joint still is from its limit, metres or radians; 0 when it has passed."""
        return 0.0 if self.passed(data, row) else float(self.limit - data["qpos"][row, self.joint])
