"""Arms that have LeRobot's `Robot` interface, by import path: MODULE:NAME makes one.

The interface: `connect(calibrate)`, `observation_features` and `action_features` (name -> float, or a
picture's shape), `get_observation()`, `send_action(dict)`, `disconnect()`. LeRobot itself is not needed here;
it is imported by whoever names a robot of its. The axes are the entries of an action, in its own units, and
are commanded by absolute targets.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from rove.errors import RoveError
from rove.robots.base import Frame, RobotObservation
from rove.robots.cameras import Watch
from rove.robots.limits import AxisLimits, Limits
from rove.types import ActionSpec

_FREE = 0.5
"""Seconds that stopping waits for a call that is under way: a bus takes one at a time."""


class LeRobotArm:
    """An arm with LeRobot's interface. See `rove.robots.base.Robot`."""

    judges = False

    def __init__(self, name: str, make: Callable[[], Any], limits: Mapping[str, Any]) -> None:
        """`name` is what `make` was imported by; `limits` is the table of a setup file, and has all limits of
        every axis: nothing is known of this arm. Raises RoveError where one is missing."""
        self.address = f"lerobot {name}"
        try:
            self._robot = make()
            actions, seen = dict(self._robot.action_features), dict(self._robot.observation_features)
        except RoveError:
            raise
        except Exception as error:  # a driver raises whatever it likes
            raise RoveError(f"{name} made no robot: {type(error).__name__}: {error}") from error
        self.axes = tuple(actions)
        if missing := [axis for axis in self.axes if axis not in seen]:
            raise RoveError(f"{name} takes {missing[0]!r} and does not observe it: it cannot be limited.")
        self.cameras = tuple(key for key, kind in seen.items() if isinstance(kind, tuple))
        self._numbers = tuple(key for key in seen if key not in self.cameras)
        self.limits = Limits(_axes(self.axes, limits)).changed(
            {key: value for key, value in limits.items() if key != "axes"}
        )
        low, high = zip(*((a.low, a.high) for a in self.limits.axes.values()), strict=True)
        self.action_spec = ActionSpec(self.axes, ("1",) * len(self.axes), low, high, control="absolute")
        self._watches = [Watch(camera, self.limits) for camera in self.cameras]
        self._lock = threading.Lock()
        self._connected = False
        self._last: np.ndarray | None = None

    def connect(self) -> None:
        with self._lock:
            self._call(self._robot.connect)
            self._connected = True

    def begin(self, episode: int) -> None:
        """Nothing: the interface has no home; a person puts the arm where it begins."""

    def observe(self) -> RobotObservation:
        asked = time.monotonic()
        with self._lock:
            found = self._call(self._robot.get_observation)
        now = time.monotonic()
        try:
            position = np.array([found[axis] for axis in self.axes], float)
            state = np.array([found[key] for key in self._numbers], np.float32)
            for watch in self._watches:
                image = np.asarray(found[watch.name])
                if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
                    raise ValueError(f"{watch.name} is {image.dtype} {list(image.shape)}")
                watch.take(Frame(image, now, now), asked)
        except (KeyError, TypeError, ValueError) as error:
            raise RoveError(f"{self.address} observed something else than it says: {error!r}.") from error
        self._last = position
        frames = {watch.name: watch.frame() for watch in self._watches}
        return RobotObservation(frames, position, None, state, now)

    def aim(self, observation: RobotObservation, action: np.ndarray, previous: np.ndarray) -> np.ndarray:
        return np.array(action, float)

    def carried_out(self, observation: RobotObservation, target: np.ndarray, asked: np.ndarray) -> np.ndarray:
        return np.array(target, float)

    def act(self, target: np.ndarray) -> None:
        with self._lock:
            self._send(target)

    def stop(self) -> None:
        if not self._lock.acquire(timeout=_FREE):
            raise RoveError(f"{self.address} is busy with another call.")
        try:
            if self._last is not None:
                self._send(self._last)
        finally:
            self._lock.release()

    def close(self) -> None:
        if self._connected:
            self._connected = False
            self._call(self._robot.disconnect)

    def _send(self, target: np.ndarray) -> None:
        named = {axis: float(value) for axis, value in zip(self.axes, target, strict=True)}
        self._call(lambda: self._robot.send_action(named))

    def _call(self, what: Callable[[], Any]) -> Any:
        try:
            return what()
        except Exception as error:  # a driver raises whatever it likes
            raise RoveError(f"{self.address} failed: {type(error).__name__}: {error}") from error


def _axes(names: tuple[str, ...], limits: Mapping[str, Any]) -> dict[str, AxisLimits]:
    given = limits.get("axes", {})
    axes = {}
    for name in names:
        if not isinstance(given, Mapping) or not isinstance(given.get(name), Mapping):
            raise RoveError(
                f"The limits of {name!r} are not given: write low, high, step, speed, fastest and lag below "
                f'[limits.axes."{name}"] in the setup file.'
            )
        try:
            axes[name] = AxisLimits(**given[name])
        except (TypeError, RoveError) as error:
            raise RoveError(f'limits.axes."{name}": {error}') from error
    if unknown := given.keys() - set(names):
        raise RoveError(f"There is no axis {min(unknown)!r} in this arm: it has {', '.join(names)}.")
    return axes
