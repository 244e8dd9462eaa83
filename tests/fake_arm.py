"""An arm without physics behind the routes of a Franka's server: it goes straight to where it is sent."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

from rove.robots import turns
from rove.robots.endpoints import ArmServer

HOME = np.array([0.45, 0.0, 0.3, 1.0, 0.0, 0.0, 0.0])
BOX = ((0.25, -0.3, 0.05), (0.65, 0.3, 0.6))
FASTEST = 0.5
"""Metres a second."""
TICK = 0.005
"""Seconds between two rows of its record."""


class FakeArm:
    """See `rove.robots.endpoints.Arm`."""

    cameras = ("front",)

    def __init__(self, success_after: int | None = None) -> None:
        """`success_after` is the number of targets after which its task is done."""
        self._lock, self._ended = threading.Lock(), threading.Event()
        self._success_after, self.sent, self.episodes = success_after, 0, []
        self._pose, self._target = HOME.copy(), HOME.copy()
        self._velocity, self._opening, self._wanted = np.zeros(6), 1.0, 1.0
        self._grain = np.random.default_rng(0)
        self._rows: list[list[float]] = []
        self.targets: list[tuple[float, np.ndarray]] = []
        """When a pose came, by `time.monotonic`, and what it was."""
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def state(self) -> Mapping[str, Any]:
        with self._lock:
            done = self._success_after is not None and self.sent >= self._success_after
            return {
                "pose": self._pose.tolist(),
                "vel": self._velocity.tolist(),
                "gripper_pos": self._opening,
                "success": done,
            }

    def go(self, pose: np.ndarray) -> None:
        with self._lock:
            self.sent += 1
            self._target = pose
            self.targets.append((time.monotonic(), pose))

    def grip(self, opening: float) -> None:
        self._wanted = opening

    def reset(self, episode: int | None) -> None:
        with self._lock:
            self.episodes.append(episode)
            self.sent = 0
            self._pose, self._target = HOME.copy(), HOME.copy()

    def picture(self, camera: str) -> tuple[np.ndarray, float]:
        return self._grain.integers(60, 200, (16, 16, 3), np.uint8), time.monotonic()

    def task(self) -> Mapping[str, Any]:
        return {
            "instruction": "reach",
            "cameras": list(self.cameras),
            "origin": [0, 0, 0],
            "box": BOX,
            "speed": 1.0,
        }

    def record(self) -> np.ndarray:
        with self._lock:
            return np.array(self._rows)

    def close(self) -> None:
        self._ended.set()

    def _run(self) -> None:
        while not self._ended.wait(TICK):
            with self._lock:
                way = 0.2 * (self._target[:3] - self._pose[:3])
                way = np.clip(way, -FASTEST * TICK, FASTEST * TICK)
                self._pose[:3] += way
                self._pose[3:] = self._target[3:]
                self._velocity[:3] = way / TICK
                self._opening += float(np.clip(self._wanted - self._opening, -0.02, 0.02))
                turn = turns.from_down(self._pose[3:])
                self._rows.append([time.monotonic(), *self._pose[:3], *turn, self._opening])


@contextmanager
def fake_arm(**options: Any) -> Iterator[tuple[ArmServer, FakeArm]]:
    """A fake arm behind a socket of this process; its record is checked at the end: it stayed in its box."""
    server = ArmServer("127.0.0.1", 0)
    server.arm = arm = FakeArm(**options)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server, arm
    finally:
        server.shutdown()
        server.server_close()
        arm.close()
    stayed_inside(arm.record())


def stayed_inside(record: np.ndarray, box: Any = BOX) -> None:
    """Assert, on an arm's own record [n, …], that its hand never left its box."""
    assert len(record)
    low, high = np.array(box)
    assert (record[:, 1:4] >= low).all(), record[:, 1:4].min(0)
    assert (record[:, 1:4] <= high).all(), record[:, 1:4].max(0)


class ToyArm:
    """An arm with LeRobot's interface, which is where it is sent at once."""

    made: list[ToyArm] = []

    action_features = {"shoulder.pos": float, "gripper.pos": float}
    observation_features = {**action_features, "front": (8, 8, 3)}

    def __init__(self) -> None:
        self.position = {"shoulder.pos": 0.0, "gripper.pos": 50.0}
        self.sent: list[dict[str, float]] = []
        self.connected = False
        ToyArm.made.append(self)

    def connect(self, calibrate: bool = True) -> None:
        self.connected = True

    def get_observation(self) -> dict:
        image = np.random.default_rng(time.monotonic_ns()).integers(50, 200, (8, 8, 3), np.uint8)
        return {**self.position, "front": image}

    def send_action(self, action: dict[str, float]) -> dict[str, float]:
        self.sent.append(action)
        self.position = dict(action)
        return action

    def disconnect(self) -> None:
        self.connected = False
