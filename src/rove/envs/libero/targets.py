"""Things that a goal names: what they are held by, and where they go."""

# pyright: reportAttributeAccessIssue=false
from __future__ import annotations

import copy
import functools
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import mujoco
import numpy as np

from rove.envs.libero.controller import HAND
from rove.envs.libero.grasps import OPENING, Grasp, Hold, Obstacles, grasps, shape
from rove.envs.libero.joints import slide_of, way_out
from rove.envs.libero.predicates import Region
from rove.envs.libero.scenes import TaskModel
from rove.errors import RoveError

FAR = 0.70
"""Metres from the robot's base, in the plane, from which on its arm is stretched."""
STRETCHED = 400.0
"""Points of the hand in another thing that a metre beyond that is as bad as."""
ROOM = 0.02
"""Metres by which a region should be wider than what goes into it."""
USUAL, NEAR = 12, 0.06
"""Initial states in which it is looked up how a task's thing is usually held, and metres from where it is in
them, in the mean, within which it is held so."""
ODD = 15.0
"""Points of the hand in another thing, more than usual, from which on a thing is held otherwise."""
FALLEN = 0.1
"""Metres below or above where it is in most initial states of a thing that has fallen."""
CRAMPED = 0.5
"""Points of the hand in other things from which on, in the mean, a thing is held off its centre."""
FLAT, LEVEL = 0.025, 0.02
"""Height of what is flat, metres, and how far apart in height two places are on one level."""
FRONT = 0.02
"""Metres before the middle of a drawer at which a thing is let go: a bowl further back comes to lie on the
handle of the drawer above, and leans when it has slid off."""
LET_GO = 0.012
"""Metres over its place at which a thing is let go."""


class Target:
    """One predicate: a thing, and where it goes."""

    def __init__(self, task: TaskModel, spec: Mapping[str, Any], aside: float = 0.0) -> None:
        """`aside` is how far beside the middle of its region the thing goes, as a share of its half size."""
        model = task.model
        self.name: str = spec["body"]
        self.body = model.body(self.name).id
        self.robot = int(model.body_rootid[model.body(HAND).id])
        self.points = shape(model, self.body)
        self._task = task
        self.obstacles = Obstacles(model, self.body)
        self.region = Region(model, spec["region"]) if "region" in spec else None
        self.aside = 0.0 if self.region is None else aside * float(self.region.size[0])
        self.inside = spec["kind"] == "in_region"
        self._out = np.zeros(3)
        """The way out of the drawer that the thing goes into, in the frame of its body; zero: it is none."""
        if self.region and self.inside and (joint := slide_of(model, self.region.body)) is not None:
            self._out = way_out(model, joint)
        self.other = -1 if self.region else model.body(spec["other"]).id

    def shape(self, data: Mapping[str, np.ndarray], row: int) -> np.ndarray:
        """Return the thing's corners [n, 3] from its position, along the world's axes."""
        return self.points @ data["xmat"][row, self.body].reshape(3, 3).T

    def grasps(self, data: Mapping[str, np.ndarray], row: int) -> list[Grasp]:
        """List ways to hold the thing as it lies, best first: rather those that strike nothing else, and for
        which the arm need not be stretched.

        Where the thing is about where it usually is, that is judged by the task's initial states together: a
        way that changed from one to the next could not be imitated, since what decides it cannot be seen.
        """
        xpos, xmat = data["xpos"][row], data["xmat"][row]
        place, usual = self._usually
        options = [
            (option, self._cost(option, xpos, xmat)) for option in self._options(xpos, xmat, self._cramped)
        ]
        near = np.linalg.norm((xpos[self.body] - place)[:2]) < NEAR
        if near and options and options[0][0].way in usual:  # not of what leans once it has come to rest
            means = [usual.get(option.way, np.inf) for option, _ in options]
            options = [
                (option, mean + max(0.0, cost - mean - ODD))
                for (option, cost), mean in zip(options, means, strict=True)
            ]
        return [option for option, _ in sorted(options, key=lambda one: one[1])]

    def _options(self, xpos: np.ndarray, xmat: np.ndarray, off_centre: bool) -> list[Grasp]:
        """The ways to hold the thing, with bodies at `xpos` [n, 3] and `xmat` [n, 9]."""
        frame = xmat[self.body].reshape(3, 3)
        return grasps(self.points @ frame.T, frame[:, 2], off_centre)

    def _cost(self, option: Grasp, xpos: np.ndarray, xmat: np.ndarray) -> float:
        """Points of the hand that would be in another thing, and as much for an arm that is stretched."""
        origin = xpos[self.body]
        out = float(np.linalg.norm((origin + option.point - xpos[self.robot])[:2]))
        return self.obstacles.hits(option, origin, xpos, xmat) + STRETCHED * max(0.0, out - FAR)

    @functools.cached_property
    def _usually(self) -> tuple[np.ndarray, dict[int, float]]:
        """Where the thing is in the mean of the task's initial states [3], and what each way to hold it that
        there is in all of them costs in the mean."""
        return self._judged(self._cramped)

    @functools.cached_property
    def _cramped(self) -> bool:
        """Whether something tall usually stands so close that the thing is held off its centre."""
        costs = self._judged(off_centre=False)[1]
        return bool(costs) and min(costs.values()) > CRAMPED

    def _judged(self, off_centre: bool) -> tuple[np.ndarray, dict[int, float]]:
        """What `_usually` says, of the ways to hold the thing in its middle, or off its centre too."""
        task, model = self._task, copy.copy(self._task.model)
        data, fixtures = mujoco.MjData(model), list(task.fixtures)
        places, costs = [], defaultdict(list)
        for number in range(min(USUAL, len(task.initial_states))):
            state, poses = task.start(number)
            model.body_pos[fixtures], model.body_quat[fixtures] = poses[:, :3], poses[:, 3:]
            data.qpos[:] = state[1 : 1 + model.nq]
            mujoco.mj_kinematics(model, data)
            places.append(data.xpos[self.body].copy())
            for option in self._options(data.xpos, data.xmat, off_centre):
                costs[option.way].append(self._cost(option, data.xpos, data.xmat))
        # In a few of the published states a thing has fallen to the floor.
        lies = np.abs(np.subtract(places, np.median(places, axis=0))[:, 2]) < FALLEN
        whole = {
            way: float(np.mean(np.array(own)[lies])) for way, own in costs.items() if len(own) == len(places)
        }
        return np.array(places)[lies].mean(axis=0), whole

    def hold(self, data: Mapping[str, np.ndarray], row: int, home: np.ndarray, attempt: int) -> Hold:
        """Choose how to hold the thing as it lies, another way with each attempt; `home`: see `Grasp.hold`.
        Raises RoveError where there is no way."""
        options = self.grasps(data, row)
        if not options:
            raise RoveError(f"No way to hold the body {self.name!r} was found.")
        frame = data["xmat"][row, self.body].reshape(3, 3)
        return options[attempt % len(options)].hold(frame, home)

    def turn(self, data: Mapping[str, np.ndarray], row: int) -> float:
        """Return the turn about the vertical, radians, with which the thing fits into its region: 0 where it
        does as it is."""
        if self.region is None or not self.inside:
            return 0.0
        rotation = self.region.pose(data, np.array([row]))[1][0]
        room = 2.0 * np.abs(rotation @ self.region.size)[:2] - ROOM
        turns = np.deg2rad(np.arange(-90, 90, 3))
        x, y = self.shape(data, row)[:, :2].T
        turned = [(x * np.cos(t) - y * np.sin(t), x * np.sin(t) + y * np.cos(t)) for t in turns]
        over = [sum(max(np.ptp(u) - own, 0.0) for u, own in zip(us, room, strict=True)) for us in turned]
        best = np.lexsort((np.abs(turns), np.round(over, 3)))[0]
        return float(turns[best]) if over[np.abs(turns).argmin()] > over[best] + 0.005 else 0.0

    def drawn(self, data: Mapping[str, np.ndarray], row: int) -> bool:
        """Tell whether the thing is drawn along where it lies to where it goes: one that is flat and held by
        its edge would tilt out of the fingers if it were lifted."""
        *wide, high = np.ptp(self.shape(data, row), axis=0)
        rise = self.destination(data, np.array([row]))[0, 2] - data["xpos"][row, self.body, 2]
        return bool(high < FLAT and min(wide) > OPENING and abs(rise) < LEVEL)

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
        place = position + self.aside * rotation[:, :, 0]
        place += FRONT * data["xmat"][rows, self.region.body].reshape(-1, 3, 3) @ self._out
        if self.inside:
            place[:, 2] += np.minimum(half[:, 2], lowest + LET_GO - half[:, 2])
        else:
            place[:, 2] += lowest + LET_GO + half[:, 2]
        return place
