"""Franka arms behind the HTTP server that SERL and HIL-SERL set-ups run, a real one or the simulated one.

The server (serl_robot_infra, franka_server.py) sets the equilibrium pose of a Cartesian impedance controller
and checks nothing. The axes are the hand's position in the base frame (m), its turn from a hand that points
straight down (axis times angle in the base frame, rad), and the opening of the gripper (0 shut, 1 open).
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rove.envs.conventions import POSE
from rove.errors import RoveError
from rove.robots import turns
from rove.robots.base import RobotObservation
from rove.robots.cameras import Camera, Cameras, HttpCamera
from rove.robots.connection import Connection
from rove.robots.limits import AxisLimits, Limits, axis_table
from rove.types import ActionSpec

AXES = ("x", "y", "z", "rx", "ry", "rz", "gripper")
ACTIONS = ActionSpec(POSE, ("1",) * 7, (-1.0,) * 7, (1.0,) * 7, gripper="open_low")
"""What is asked of a policy: translation, rotation, gripper, each from −1 to 1."""
FINGER = 0.04
"""Metres from shut to open, of each finger."""
_RESET = 60.0
"""Seconds that going to the home pose may take: the server answers once it is there."""


def limits(low: Sequence[float], high: Sequence[float]) -> Limits:
    """Return the limits of a Franka whose hand stays between two corners, m in the base frame.

    At 20 periods a second they let through what a policy with LIBERO's actions asks for (5 cm and 0.5 rad an
    action), and an arm that does as it is told comes near none of them.
    """
    hand = [
        AxisLimits(float(a), float(b), step=0.06, speed=2.2, fastest=1.2, lag=0.15, margin=0.01)
        for a, b in zip(low, high, strict=True)
    ]
    turn = AxisLimits(-2.0, 2.0, step=0.6, speed=22.0, fastest=4.0, lag=1.0, margin=0.05)
    gripper = AxisLimits(-0.05, 1.05, step=1.1, speed=2.5, fastest=20.0, lag=5.0, margin=0.05, ramp=True)
    return Limits(axis_table(AXES, [*hand, turn, turn, turn, gripper]))


@dataclass(frozen=True, slots=True)
class Scale:
    """What an action of 1 means."""

    position: float = 0.05
    """m."""
    rotation: float = 0.5
    """rad."""


class Franka:
    """A Franka behind a SERL server, with cameras of one's own. See `rove.robots.base.Robot`."""

    axes: tuple[str, ...] = AXES
    action_spec = ACTIONS
    judges = False
    speed = 1.0
    """Seconds of the arm's time in a second of this process."""

    def __init__(
        self,
        address: str,
        cameras: Mapping[str, Camera],
        limits: Limits,
        *,
        rate: float,
        origin: Sequence[float] = (0.0, 0.0, 0.0),
        scale: Scale = Scale(),
    ) -> None:
        """`origin` is where the base stands in the frame of the policy's state, m; `rate` is how often a
        second the cameras are read. Raises RoveError where `address` is none."""
        self.address = address.rstrip("/")
        self._arm, self._aside = Connection(address), Connection(address)
        self.cameras = tuple(cameras)
        self._cameras = Cameras(cameras, limits, rate)
        self._origin, self._scale = np.asarray(origin, float), scale
        self._gripper: int | None = None
        self._trip = self._ahead = 0.0

    def connect(self) -> None:
        self._state()
        self._cameras.start()

    def begin(self, episode: int) -> None:
        self._begin(None)

    def _begin(self, body: Any) -> None:
        self._ask("/jointreset", body, timeout=_RESET)
        self._gripper = None
        self._cameras.renew()  # an episode does not begin with what was seen before

    def observe(self) -> RobotObservation:
        asked = time.monotonic()
        found = self._state()
        # One way to the arm; what it answered was so when the question was there.
        self._trip = (time.monotonic() - asked) / 2
        try:
            pose, gripper = np.array(found["pose"], float), float(found["gripper_pos"])
            velocity = np.array(found["vel"], float) if found.get("vel") is not None else None
            if pose.shape != (7,) or (velocity is not None and velocity.shape != (6,)):
                raise ValueError(f"pose {pose.shape}")
        except (KeyError, TypeError, ValueError) as error:
            raise RoveError(
                f"{self.address}/getstate answered with no state of a Franka ({error!r}): expected pose [7] "
                "and gripper_pos."
            ) from error
        state = np.concatenate(
            [
                pose[:3] + self._origin,
                turns.axis_angle(pose[3:]),
                [FINGER * gripper, -FINGER * gripper],
            ]
        )
        success = found.get("success")
        return RobotObservation(
            frames=self._cameras.frames(),
            position=np.concatenate([pose[:3], turns.from_down(pose[3:]), [gripper]]),
            velocity=None if velocity is None else np.append(velocity, 0.0),
            state=state.astype(np.float32),
            time=asked + self._trip,
            success=None if success is None else bool(success),
        )

    def aim(self, observation: RobotObservation, action: np.ndarray, previous: np.ndarray) -> np.ndarray:
        """Return the target of an action: relative to where the hand will be when it is told, as LIBERO's and
        SERL's are to where it is.

        A target that is relative to where the hand was 20 ms before asks a moving hand for less than the
        policy did. An action that does not turn keeps the turn that was wanted before, one that neither opens
        nor shuts the gripper keeps what was asked of it.
        """
        self._ahead = max(0.0, time.monotonic() + self._trip - observation.time)
        position, hand = self._expected(observation)
        target = np.array(previous)
        target[:3] = position + self._scale.position * action[:3]
        turn = self._scale.rotation * action[3:6]
        if turn.any():
            target[3:6] = turns.from_down(turns.product(turns.of(turn), hand))
        if action[6]:
            target[6] = float(action[6] < 0)
        return target

    def carried_out(self, observation: RobotObservation, target: np.ndarray, asked: np.ndarray) -> np.ndarray:
        action = np.array(asked, float)
        position, hand = self._expected(observation)
        action[:3] = (target[:3] - position) / self._scale.position
        if asked[3:6].any():
            action[3:6] = turns.between(hand, turns.down(target[3:6])) / self._scale.rotation
        return action

    def _expected(self, observation: RobotObservation) -> tuple[np.ndarray, np.ndarray]:
        """Return position (m) and quaternion of the hand when the target that was last aimed is there."""
        position, hand = observation.position[:3], turns.down(observation.position[3:6])
        if observation.velocity is None:
            return position, hand
        way = observation.velocity[:6] * self._ahead * self.speed
        return position + way[:3], turns.product(turns.of(way[3:]), hand)

    def act(self, target: np.ndarray) -> None:
        pose = [*target[:3], *turns.down(target[3:6])]
        self._ask("/pose", {"arr": [float(value) for value in pose]})
        # As a Robotiq's: 0 is open, 255 is shut. It is slow to answer, so that it is told what is new only.
        gripper = round(255 * (1.0 - float(np.clip(target[6], 0.0, 1.0))))
        if gripper != self._gripper:
            self._ask("/move_gripper", {"gripper_pos": gripper})
            self._gripper = gripper

    def stop(self) -> None:
        # Over a connection of its own: the other may be waiting for an answer.
        try:
            pose = self._aside.json("/getpos")["pose"]
            self._aside.post("/pose", {"arr": pose})
        except (KeyError, TypeError) as error:
            raise RoveError(f"{self.address}/getpos answered with no pose.") from error
        except OSError as error:
            raise RoveError(f"The arm at {self.address} does not answer: {error}.") from error

    def close(self) -> None:
        self._cameras.close()
        self._arm.close()
        self._aside.close()

    def _state(self) -> Mapping[str, Any]:
        try:
            found = self._arm.json("/getstate")
        except OSError as error:
            raise RoveError(
                f"The arm at {self.address} does not answer: {error}. Start its server; a simulated one: "
                "rove simulate TASK."
            ) from error
        if not isinstance(found, Mapping):
            raise RoveError(f"{self.address}/getstate answered with no state of a Franka.")
        return found

    def _ask(self, path: str, body: Any = None, timeout: float = 2.0) -> None:
        try:
            self._arm.post(path, body, timeout)
        except OSError as error:
            raise RoveError(f"The arm at {self.address} did not take {path}: {error}.") from error


class SimulatedFranka(Franka):
    """The arm of `rove simulate`: it has cameras, tells when its task is done, and puts the scene back."""

    judges = True

    def __init__(self, address: str, changes: Mapping[str, Any], *, rate: float) -> None:
        """Ask the process at `address` what it is. `changes` are limits that differ from its own.

        Raises RoveError where no simulated arm answers there.
        """
        connection = Connection(address)
        try:
            about = connection.json("/task", {})
            self.instruction, names = str(about["instruction"]), [str(name) for name in about["cameras"]]
            box, origin, self.speed = about["box"], about["origin"], float(about["speed"])
            self.limits = limits(*box).changed(changes)
        except OSError as error:
            raise RoveError(
                f"Nobody answers at {address}: {error}. Start a simulated arm there: rove simulate TASK."
            ) from error
        except (KeyError, TypeError, ValueError) as error:
            raise RoveError(
                f"{address} is no simulated arm ({error}): describe a real one in a file, and name that."
            ) from error
        finally:
            connection.close()
        cameras = {name: HttpCamera(f"{address.rstrip('/')}/camera/{name}") for name in names}
        super().__init__(address, cameras, self.limits, rate=rate, origin=origin)

    def begin(self, episode: int) -> None:
        self._begin({"episode": episode})
