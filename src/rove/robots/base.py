"""The contract of an arm, and what is seen of it.

An arm has *axes*: the numbers that it is commanded by, each with a limit of its own. Of a Franka they are
the position of its hand, its turn from a reference, and the opening of its gripper; of an arm that is driven
by joints, its joints. Times are seconds of `time.monotonic` of this process, unless a field says otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from rove.types import ActionSpec


@dataclass(frozen=True, slots=True, eq=False)
class Frame:
    """A picture of a camera."""

    image: np.ndarray
    """uint8 [H, W, 3]."""
    stamp: float
    """When it was taken, seconds of the camera's own clock, of which only differences mean something."""
    received: float
    """When it arrived here."""


@dataclass(frozen=True, slots=True, eq=False)
class RobotObservation:
    """What is known of an arm at one moment."""

    frames: Mapping[str, Frame]
    """The newest picture of each camera, in the order in which the policy takes them."""
    position: np.ndarray
    """float64 [n]: where its axes are."""
    velocity: np.ndarray | None
    """float64 [n]: how fast they move, a second; None where the arm does not say."""
    state: np.ndarray
    """float32 [P]: the robot's state as the policy reads it."""
    time: float
    """When the arm was there."""
    success: bool | None = None
    """Whether the task is done; None where nothing but a person can tell."""


class Robot(Protocol):
    """An arm and its cameras. Every call but `stop` comes from one thread."""

    address: str
    """Where the arm is: what two runners of one arm have in common."""
    axes: tuple[str, ...]
    """Names of its n axes."""
    action_spec: ActionSpec
    """The convention of the actions that `aim` takes."""
    cameras: tuple[str, ...]
    """Names of its cameras, in the order in which the policy takes their pictures."""
    judges: bool
    """Whether it tells by itself when the task is done, and puts the scene back for the next episode."""

    def connect(self) -> None:
        """Reach arm and cameras. Raises RoveError where one does not answer."""
        ...

    def begin(self, episode: int) -> None:
        """Bring the arm to where an episode begins; may take half a minute. Raises RoveError."""
        ...

    def observe(self) -> RobotObservation:
        """Return what is known now, without waiting for a picture. Raises `Stopped` where a camera has
        failed, RoveError where the arm does not answer."""
        ...

    def aim(self, observation: RobotObservation, action: np.ndarray, previous: np.ndarray) -> np.ndarray:
        """Return the target [n] of an action [A], given the target before. Sends nothing."""
        ...

    def carried_out(self, observation: RobotObservation, target: np.ndarray, asked: np.ndarray) -> np.ndarray:
        """Return the action [A] that a target [n] is of: the one that was `asked` for, but for what limits
        took away."""
        ...

    def act(self, target: np.ndarray) -> None:
        """Go towards a target [n], and stay there. Raises RoveError where the arm does not take it."""
        ...

    def stop(self) -> None:
        """Hold still where the arm is, with the gripper as it is. From any thread, also while another call is
        under way. Raises RoveError where the arm cannot be told."""
        ...

    def close(self) -> None:
        """Let go of arm and cameras; harmless when called twice."""
        ...


class Recorder(Protocol):
    """Keeps what happens."""

    def add(
        self, observation: RobotObservation, action: np.ndarray, asked: np.ndarray, clipped: bool
    ) -> None:
        """Keep one period: what was seen, the `action` [A] that was carried out, the one that the policy
        `asked` for [A], and whether limits changed its target."""
        ...

    def end_episode(self, success: bool | None) -> None:
        """End an episode, with whether it succeeded; None: nobody said."""
        ...

    def close(self) -> None:
        """Write what has not been written; harmless when called twice."""
        ...
