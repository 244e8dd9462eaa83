"""What a run keeps of itself: a data set in LeRobot's layout, which `rove data` reads and LeRobot too."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rove import data
from rove.errors import RoveError
from rove.robots.base import Robot, RobotObservation

if TYPE_CHECKING:  # it needs packages that a run without a recording does not
    from rove.data.lerobot import Writer


class LeRobotRecorder:
    """A `Recorder` that writes LeRobot v3.0.

    A frame holds `observation.images.NAME` of each camera, `observation.state`, `action` (what was carried
    out, in the policy's units), `policy_action` (what it asked for) and `limited` (whether limits changed
    it).
    """

    def __init__(self, folder: Path, robot: Robot, kind: str, *, rate: float, instruction: str) -> None:
        """`folder` is new, or a data set of the same features, which is continued. Raises RoveError where
        `rate` is no whole number, or recording is not installed."""
        if rate != int(rate):
            raise RoveError(
                f"LeRobot counts whole frames a second, not {rate:g} of the arm's time: change --rate."
            )
        with data.installed():
            from rove.data.lerobot import Writer
        self._make, self._folder, self._kind, self._rate = Writer, folder, kind, int(rate)
        self._spec, self._instruction = robot.action_spec, instruction
        self._writer: Writer | None = None

    def add(
        self, observation: RobotObservation, action: np.ndarray, asked: np.ndarray, clipped: bool
    ) -> None:
        frame = {f"observation.images.{name}": frame.image for name, frame in observation.frames.items()}
        values = {
            "observation.state": observation.state,
            "action": np.asarray(action, np.float32),
            "policy_action": np.asarray(asked, np.float32),
            "limited": np.array([clipped]),
        }
        if self._writer is None:
            self._writer = self._open(frame, values)
        self._writer.add({**frame, **values}, self._instruction)

    def end_episode(self, success: bool | None) -> None:
        if self._writer is not None:
            self._writer.end_episode(success)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()

    def _open(self, frame: dict[str, np.ndarray], values: dict[str, np.ndarray]) -> Writer:
        names = {"action": list(self._spec.names), "policy_action": list(self._spec.names)}
        features: dict[str, dict[str, Any]] = {
            name: {"dtype": "video", "shape": list(image.shape), "names": ["height", "width", "channels"]}
            for name, image in frame.items()
        }
        for name, value in values.items():
            features[name] = {
                "dtype": value.dtype.name,
                "shape": list(value.shape),
                "names": names.get(name),
            }
        about = {"action_spec": asdict(self._spec)}
        return self._make(self._folder, fps=self._rate, features=features, robot_type=self._kind, about=about)
