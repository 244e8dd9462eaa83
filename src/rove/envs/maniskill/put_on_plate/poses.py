"""Starting poses: the published sets of places, and of joint offsets, in episode order.

Places lie on grids whose points are compared by distance. Some pairs are exactly 0.15 m apart, and on which
side of the threshold they fall is decided by float64 rounding; the arithmetic below rounds as published.
"""

from __future__ import annotations

import math
from functools import cache
from itertools import product

import numpy as np

Place = tuple[float, float]
"""x, y in metres, world frame."""

_CENTRE, _HALF_EDGE = np.array([-0.16, 0.0]), np.array([0.075, 0.075])
_APART, _FAR = 0.070, 0.150
"""Least distances, metres: of what must not touch, and of what must not be confused."""

YAWS = (0.0, math.pi / 4, math.pi / 2, 3 * math.pi / 4)
SHIFTED_YAWS = tuple(-math.pi * k / 8 for k in (1, 3, 5, 7))
"""Yaws of the source object, rad, in the train splits and in the shifted ones."""

JOINTS = (-0.01840777, 0.0398835, 0.22242722, -0.00460194, 1.36524296, 0.00153398, 0.037, 0.037)
"""Joints of the robot at the start: six joints of the arm, rad, and two fingers, m."""
_OFFSETS, _LAST_OFFSETS = (-0.15, -0.08, 0.0, 0.08, 0.15), (-0.6, -0.3, 0.0, 0.3, 0.6)


def _points(coordinates: list[tuple[float, float]]) -> np.ndarray:
    return (np.array(coordinates) * 2 - 1) * _HALF_EDGE + _CENTRE


def _distances(points: np.ndarray) -> np.ndarray:
    """Return distances [n, n], one pair at a time: a vectorised sum of squares may round otherwise."""
    return np.array([[np.linalg.norm(a - b) for b in points] for a in points])


def _grid() -> np.ndarray:
    steps = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
    return _points(list(product(steps, steps)))


def _ring() -> np.ndarray:
    """Return the border of a grid one step wider."""
    steps = (-0.2, 0.0, 0.2, 0.4, 0.6, 0.8, 1.0, 1.2)
    ends = (steps[0], steps[-1])
    return _points([(a, b) for a in steps for b in steps if a in ends or b in ends])


def _pairs(points: np.ndarray) -> np.ndarray:
    """List pairs of source and receptacle, int [n, 2]."""
    return np.argwhere(_distances(points) > _APART)


def _triples(third_from: int) -> np.ndarray:
    """List triples, int [n, 3]: source, receptacle, a third place far from the first (0) or second (1)."""
    apart = _distances(_grid())
    near, far = apart > _APART, apart > _FAR
    from_source, from_plate = (far, near) if third_from == 0 else (near, far)
    return np.argwhere(near[:, :, None] & from_source[:, None, :] & from_plate.T[None, :, :])


@cache
def places(name: str) -> tuple[tuple[Place, ...], ...]:
    """Return a set of placements: each the places of source, receptacle and, in triples, of a third thing.

    "pairs" (784), "ring" (628, around those), "triples_object" and "triples_receptacle" (2104 each: the third
    is far from the source, or from the receptacle).
    """
    points = _ring() if name == "ring" else _grid()
    rows = {
        "pairs": lambda: _pairs(points),
        "ring": lambda: _pairs(points),
        "triples_object": lambda: _triples(0),
        "triples_receptacle": lambda: _triples(1),
    }[name]()
    where = [(float(x), float(y)) for x, y in points]
    return tuple(tuple(where[i] for i in row) for row in rows.tolist())


@cache
def joint_offsets() -> np.ndarray:
    """List joint offsets [14376, 8]: zeros, then all combinations with shoulder and elbow within 0.25 rad."""
    rows = [
        (*offsets, last, 0.0, 0.0)
        for *offsets, last in product(*[_OFFSETS] * 5, _LAST_OFFSETS)
        if abs(offsets[1] + offsets[2]) <= 0.25
    ]
    return np.concatenate([np.zeros((1, 8)), np.array(rows)])
