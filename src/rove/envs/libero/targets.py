"""Things that a goal names: what they are held by, and where they go."""

# pyright: reportAttributeAccessIssue=false
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from rove.envs.libero.grasps import Grasp, Obstacles, grasps, shape
from rove.envs.libero.predicates import Region
from rove.envs.libero.scenes import TaskModel

LET_GO = 0.012
"""Metres over its place at which a thing is let go."""


class Target:
    """One predicate: a thing, and where it goes."""

    def __init__(self, task: TaskModel, spec: Mapping[str, Any]) -> None:
        model = task.model
        self.body = model.body(spec["body"]).id
        self.points = shape(model, self.body)
        self.obstacles = Obstacles(model, self.body)
        self.region = Region(model, spec["region"]) if "region" in spec else None
        self.inside = spec["kind"] == "in_region"
        self.other = -1 if self.region else model.body(spec["other"]).id

    def shape(self, data: Mapping[str, np.ndarray], row: int) -> np.ndarray:
        """Return the thing's corners [n, 3] from its position, along the world's axes."""
        return self.points @ data["xmat"][row, self.body].reshape(3, 3).T

    def grasps(self, data: Mapping[str, np.ndarray], row: int) -> list[Grasp]:
        """List ways to hold the thing as it lies, best first: rather those that strike nothing else."""
        xpos, xmat = data["xpos"][row], data["xmat"][row]
        return sorted(
            grasps(self.shape(data, row)),
            key=lambda option: self.obstacles.hits(option, xpos[self.body], xpos, xmat),
        )

    def destination(self, data: Mapping[str, np.ndarray], rows: np.ndarray) -> np.ndarray:
        """Return where the thing's position should be when it is let go, [n, 3]."""
        lowest = -(self.points @ data["xmat"][rows, self.body].reshape(-1, 3, 3).transpose(0, 2, 1))[
            ..., 2
        ].min(1)
        if self.region is None:
            place = data["xpos"][rows, self.other].copy()
            place[:, 2] += LET_GO + lowest
            return place
        position, rotation = self.region.pose(data, rows)
        half = np.abs(rotation @ self.region.size)
        place = position.copy()
        if self.inside:
            place[:, 2] += np.minimum(half[:, 2], lowest + LET_GO - half[:, 2])
        else:
            place[:, 2] += lowest + LET_GO + half[:, 2]
        return place
