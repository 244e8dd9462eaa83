"""Rotations as quaternions (w, x, y, z), matrices, and axes times angles; all angles in radians.

Several formulas say the same and round differently. Each function keeps the one of the simulator that its
results are compared with, so that they agree to the last bit.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor


def yaw_quaternion(yaw: float) -> np.ndarray:
    """The quaternion [4] of a turn about the vertical axis."""
    return np.array([np.cos(yaw / 2), 0.0, 0.0, np.sin(yaw / 2)])


def yaw_of(quaternion: np.ndarray) -> np.ndarray:
    """The angle [...] about the vertical axis, of unit quaternions [..., 4]."""
    w, x, y, z = np.moveaxis(quaternion, -1, 0)
    return np.arctan2(2 * (w * z + x * y), 1 - 2 * (y * y + z * z))


def matrix(quaternion: np.ndarray) -> np.ndarray:
    """Matrices [..., 3, 3] of unit quaternions [..., 4], rounded as by MuJoCo."""
    w, x, y, z = np.moveaxis(quaternion, -1, 0)
    rows = [
        [w * w + x * x - y * y - z * z, 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), w * w - x * x + y * y - z * z, 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), w * w - x * x - y * y + z * z],
    ]
    return np.stack([np.stack(row, -1) for row in rows], -2)


def tensor_matrix(quaternion: Tensor) -> Tensor:
    """Matrices [..., 3, 3] of unit quaternions [..., 4], on the device of these."""
    w, x, y, z = quaternion.unbind(-1)
    rows = (
        (1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)),
        (2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)),
        (2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)),
    )
    return torch.stack([torch.stack(row, -1) for row in rows], -2)


def axis_angle(quaternion: np.ndarray) -> np.ndarray:
    """Axis times angle [3] of a quaternion [4]; zero where it does not turn. Rounded as by robosuite."""
    w = min(max(quaternion[0], -1.0), 1.0)
    sine = np.sqrt(1.0 - w * w)
    return np.zeros(3) if sine == 0.0 else quaternion[1:] * 2.0 * np.arccos(w) / sine


def axis_angle_between(rotation: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Axis times angle [n, 3] from rotations to wanted ones, [n, 3, 3] each, for angles below 180°."""
    between = wanted @ rotation.transpose(0, 2, 1)
    axis = np.stack(
        [
            between[:, 2, 1] - between[:, 1, 2],
            between[:, 0, 2] - between[:, 2, 0],
            between[:, 1, 0] - between[:, 0, 1],
        ],
        axis=1,
    )
    sine = np.linalg.norm(axis, axis=1)
    angle = np.arctan2(sine, np.trace(between, axis1=1, axis2=2) - 1)
    return axis * (angle / np.maximum(sine, 1e-9))[:, None]


def axis_angle_matrix(turns: np.ndarray) -> np.ndarray:
    """Matrices [n, 3, 3] of axes times angles [n, 3], none of them zero, in float32 as robosuite computes
    them: dot products are taken one by one, as it takes them, which decides what they round to."""
    angle = np.array([math.sqrt(turn.dot(turn)) for turn in turns])
    q = np.empty((len(turns), 4))
    q[:, 0] = np.cos(angle / 2.0)
    q[:, 1:] = turns / angle[:, None] * np.sin(angle / 2.0)[:, None]
    q = q.astype(np.float32)
    squares = np.array([own.dot(own) for own in q])
    q *= np.sqrt(2.0 / squares, dtype=np.float64).astype(np.float32)[:, None]
    p = (q[:, :, None] * q[:, None, :]).transpose(1, 2, 0)
    one = np.float32(1.0)
    rows = [
        [one - p[2, 2] - p[3, 3], p[1, 2] - p[3, 0], p[1, 3] + p[2, 0]],
        [p[1, 2] + p[3, 0], one - p[1, 1] - p[3, 3], p[2, 3] - p[1, 0]],
        [p[1, 3] - p[2, 0], p[2, 3] + p[1, 0], one - p[1, 1] - p[2, 2]],
    ]
    return np.array(rows).transpose(2, 0, 1)
