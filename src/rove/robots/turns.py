"""Turns of a hand, as quaternions x, y, z, w, and as axes times angles from a hand that points down.

A hand at work points down more or less, so that its turn from there is small and its three numbers can be
limited one by one; from the base's own orientation it would be half a turn, where they jump.
"""

from __future__ import annotations

import math

import numpy as np

from rove.envs import rotations

DOWN = np.array([1.0, 0.0, 0.0, 0.0])
"""A Franka's hand that points straight down, its fingers across y."""


def product(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """The quaternion [4] of the turn `second`, then `first`."""
    (ax, ay, az, aw), (bx, by, bz, bw) = first, second
    return np.array(
        [
            aw * bx + ax * bw + ay * bz - az * by,
            aw * by - ax * bz + ay * bw + az * bx,
            aw * bz + ax * by - ay * bx + az * bw,
            aw * bw - ax * bx - ay * by - az * bz,
        ]
    )


def of(turn: np.ndarray) -> np.ndarray:
    """The quaternion [4] of an axis times angle [3], rad."""
    angle = math.sqrt(float(turn @ turn))
    # sin(x / 2) / x, also where x is 0
    return np.array([*(0.5 * np.sinc(angle / (2 * math.pi)) * turn), math.cos(angle / 2)])


def from_down(quaternion: np.ndarray) -> np.ndarray:
    """The turn [3] of a hand from one that points down, axis times angle in the base frame, below half a
    turn."""
    return between(DOWN, quaternion)


def between(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """The turn [3] from one orientation to another, axis times angle in the base frame, below half a turn."""
    x, y, z, w = product(second, first * (-1, -1, -1, 1))
    axis, sine = np.array([x, y, z]), math.sqrt(x * x + y * y + z * z)
    if sine < 1e-12:
        return np.zeros(3)
    return axis * (2.0 * math.atan2(sine * math.copysign(1.0, w), abs(w)) / sine)


def down(turn: np.ndarray) -> np.ndarray:
    """The quaternion [4] of a hand that is turned by an axis times angle [3] from one that points down."""
    return product(of(turn), DOWN)


def axis_angle(quaternion: np.ndarray) -> np.ndarray:
    """Axis times angle [3] of a quaternion, as LIBERO's state has it: of the one of its two signs that is
    given."""
    x, y, z, w = quaternion
    return rotations.axis_angle(np.array([w, x, y, z]))
