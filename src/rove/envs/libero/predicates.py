"""LIBERO's predicates, by which a goal holds or not, on rows of a batch, as the stock environment judges
them.

It judges after an action's last substep, without a forward pass: the positions and contacts that it looks at
are those before that substep, the joints those after it. Hence the two parts of a goal.
"""

# pyright: reportAttributeAccessIssue=false
from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import mujoco
import numpy as np

from rove.envs.rotations import matrix
from rove.errors import RoveError

BOUND = ("xpos", "xmat", "qpos")
"""MuJoCo's arrays that the predicates read."""
NEAR = 0.03
"""Metres between the middles of two things of which one lies on the other."""
ABOVE, BELOW = 0.10, 0.005
"""Metres over the top of a region in which a thing is on it, and under it."""
SUNK = 0.01
"""Metres under a region in which a thing is still in it."""

Data = Mapping[str, np.ndarray]
"""Bound arrays [B, …]."""
Touching = Callable[[int, np.ndarray, np.ndarray], bool]
"""(row, geoms, other geoms) -> whether any of the one touch any of the other."""
Test = Callable[[Data, np.ndarray, Touching], np.ndarray]
"""(data, rows [n], touching) -> bool [n]."""

COMPARISONS = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}


class Goal:
    """A conjunction of predicates; both parts must hold."""

    def __init__(self, model: mujoco.MjModel, goal: Sequence[Mapping[str, Any]]) -> None:
        joints = [predicate for predicate in goal if predicate["kind"] == "joint"]
        places = [predicate for predicate in goal if predicate["kind"] != "joint"]
        self._joints = [KINDS[predicate["kind"]](model, predicate) for predicate in joints]
        self._places = [KINDS[predicate["kind"]](model, predicate) for predicate in places]

    def placed(self, data: Data, rows: np.ndarray, touching: Touching) -> np.ndarray:
        """Tell in which of `rows` [n] things are where they should be: bool [n]."""
        return _all(self._places, data, rows, touching)

    def joined(self, data: Data, rows: np.ndarray, touching: Touching) -> np.ndarray:
        """Tell in which of `rows` [n] drawers, doors and knobs are as they should be: bool [n]."""
        return _all(self._joints, data, rows, touching)


def _all(tests: Sequence[Test], data: Data, rows: np.ndarray, touching: Touching) -> np.ndarray:
    holds = np.ones(len(rows), bool)
    for test in tests:
        holds &= test(data, rows, touching)
    return holds


def _joint(model: mujoco.MjModel, spec: Mapping[str, Any]) -> Test:
    """Judge Open, Close, TurnOn, TurnOff: one joint, or all of several, past a limit."""
    where = np.array([model.jnt_qposadr[model.joint(name).id] for name in spec["joints"]])
    passes, limit = COMPARISONS[spec["comparison"]], spec["limit"]

    def test(data: Data, rows: np.ndarray, touching: Touching) -> np.ndarray:
        passed = passes(data["qpos"][rows[:, None], where], limit)
        return np.array(passed.all(1) if spec["all"] else passed.any(1))

    return test


class Region:
    """A box that a body carries."""

    def __init__(self, model: mujoco.MjModel, spec: Mapping[str, Any]) -> None:
        self.body = model.body(spec["body"]).id
        self.position, self.size = np.array(spec["position"]), np.array(spec["size"])
        self.rotation = matrix(np.array(spec["quaternion"]))

    def pose(self, data: Data, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the box's positions [n, 3] and rotations [n, 3, 3] in the world."""
        body = data["xmat"][rows, self.body].reshape(-1, 3, 3)
        return data["xpos"][rows, self.body] + body @ self.position, body @ self.rotation


def _in_region(model: mujoco.MjModel, spec: Mapping[str, Any]) -> Test:
    """Judge In: the middle of a thing is in the box, taken as if it had been turned by quarters."""
    thing, region = model.body(spec["body"]).id, Region(model, spec["region"])

    def test(data: Data, rows: np.ndarray, touching: Touching) -> np.ndarray:
        position, rotation = region.pose(data, rows)
        half = np.abs(rotation @ region.size)
        low, high = position - half, position + half
        low[:, 2] -= SUNK
        where = data["xpos"][rows, thing]
        return np.asarray(((low < where) & (where < high)).all(1))

    return test


def _on_region(model: mujoco.MjModel, spec: Mapping[str, Any]) -> Test:
    """Judge On, of a part of a thing, which must be touched, or of an area of the table, which need not."""
    thing, region, size = model.body(spec["body"]).id, Region(model, spec["region"]), spec["region"]["size"]
    touched = _touch(model, spec["touching"]) if spec["touching"] else None

    def test(data: Data, rows: np.ndarray, touching: Touching) -> np.ndarray:
        position, rotation = region.pose(data, rows)
        # the rotation is not inverted in the published predicate either
        offset = (rotation @ (data["xpos"][rows, thing] - position)[..., None])[..., 0]
        over = (size[2] - BELOW < offset[:, 2]) & (offset[:, 2] < size[2] + ABOVE)
        placed = over & (np.abs(offset[:, :2]) < size[:2]).all(1)
        return placed if touched is None else touched(placed, rows, touching)

    return test


def _on_object(model: mujoco.MjModel, spec: Mapping[str, Any]) -> Test:
    """Judge On, of one thing on another: touching it, its middle no lower, and near it in the plane."""
    thing, other = model.body(spec["body"]).id, model.body(spec["other"]).id
    touched = _touch(model, spec["touching"])

    def test(data: Data, rows: np.ndarray, touching: Touching) -> np.ndarray:
        upper, lower = data["xpos"][rows, thing], data["xpos"][rows, other]
        near = np.linalg.norm(lower[:, :2] - upper[:, :2], axis=1) < NEAR
        return touched((lower[:, 2] <= upper[:, 2]) & near, rows, touching)

    return test


def _touch(
    model: mujoco.MjModel, names: Sequence[Sequence[str]]
) -> Callable[[np.ndarray, np.ndarray, Touching], np.ndarray]:
    """Look for contacts, which takes longer, only where everything else holds."""
    geoms, others = (np.array([model.geom(name).id for name in group]) for group in names)

    def touched(placed: np.ndarray, rows: np.ndarray, touching: Touching) -> np.ndarray:
        return np.array(
            [p and touching(row, geoms, others) for p, row in zip(placed, rows, strict=True)], bool
        )

    return touched


class _Unknown(dict):
    def __missing__(self, kind: str) -> Any:
        raise RoveError(f"The cache names a predicate {kind!r} that this version of Rove does not know.")


KINDS: Mapping[str, Callable[[mujoco.MjModel, Mapping[str, Any]], Test]] = _Unknown(
    joint=_joint, in_region=_in_region, on_region=_on_region, on_object=_on_object
)
