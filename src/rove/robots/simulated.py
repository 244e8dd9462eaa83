"""A Franka in a task of LIBERO, in real time: MuJoCo behind the calls of a real arm.

World, controller and renderer are those of `rove.envs.libero`. The controller is the environment's, but its
goal is the pose that is sent, as of a Cartesian impedance controller, and moves whenever one is: an arm that
is sent nothing goes on to where it was sent last, and stays there.
"""

# pyright: reportAttributeAccessIssue=false
from __future__ import annotations

import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import closing
from types import FrameType
from typing import Any

import mujoco
import numpy as np

from rove.config.schema import LiberoConfig
from rove.envs.libero import controller as control
from rove.envs.libero.pictures import Pictures
from rove.envs.libero.scenes import CAMERAS, load_task
from rove.envs.libero.suite import LiberoSuite
from rove.envs.libero.worlds import WAIT_ACTION, Group, Place
from rove.envs.rotations import matrix
from rove.errors import RoveError
from rove.robots import turns
from rove.robots.endpoints import ArmServer
from rove.types import Split

TICK = 5
"""Substeps of 2 ms between two moments at which the arm is looked at, and its record kept: 100 a second."""
COLUMNS = ("time", "x", "y", "z", "rx", "ry", "rz", "gripper", "speed", "success")
"""Of the arm's own record: s of simulated time since it began, m, rad, share of opening, m/s, 0 or 1."""
BOX = ((0.25, -0.50, -0.03), (0.85, 0.50, 0.70))
"""Corners in which the hand may be by default, m in the base frame: the table, and what stands on it."""
_RECORD = 1_000_000
"""Rows that are kept: the last hours."""
_BEHIND = 0.25
"""Seconds that the simulation may be behind before it lets time go: it is then slower than real."""
_SHARED = 0.01
"""Seconds for which a picture is new."""
_NAMES = ("agentview", "wrist")
"""Of the cameras, in the order of `CAMERAS`."""
_ROW = np.array([0])


class _Follower(control.Controller):
    """The environment's controller, with a goal that was sent in place of one relative to the hand."""

    sent: tuple[np.ndarray, np.ndarray] | None = None
    """Position [3] (m, world) and rotation [3, 3] of the grip site; None: whatever the action says."""
    opening: float | None = None
    """Share that the gripper is to be open; None: whatever the action says."""

    def aim(self, rows: np.ndarray, data: Mapping[str, np.ndarray], actions: np.ndarray) -> None:
        super().aim(rows, data, actions)
        if self.sent is not None:
            self.goal_position[0], self.goal_rotation[0] = self.sent

    def command(
        self, rows: np.ndarray, data: Mapping[str, np.ndarray], grip: np.ndarray, motors: np.ndarray
    ) -> None:
        if self.opening is not None:
            away = 2 * self.opening - 1 - self.gripper[0, 0]
            # It ramps by a fixed step, and ends up beside what was sent by less than that.
            grip = np.array([0.0 if abs(away) < control.GRIPPER_SPEED else -np.sign(away)])
        super().command(rows, data, grip, motors)


class SimulatedArm:
    """The arm of one task, and its scene: see `rove.robots.endpoints.Arm`."""

    def __init__(
        self, task: str, *, image_size: int, wrist: bool = True, speed: float = 1.0, split: Split = "held_out"
    ) -> None:
        """`task` is one of LIBERO's ("object/pick_up_the_milk_and_place_it_in_the_basket"); `speed` is that
        of its time, 1 for real time. Episode n begins in the n-th initial state of `split`, "train" or
        "held_out". Raises RoveError on an unknown task."""
        self._config = LiberoConfig(tasks=task, image_size=image_size, wrist=wrist)
        suite = LiberoSuite(self._config)
        if len(suite.tasks) != 1:
            raise RoveError(f"{task!r} is {len(suite.tasks)} tasks: name one, such as {suite.tasks[0]!r}.")
        self._task = load_task(suite.tasks[0])
        self._states = suite.initial_states(suite.tasks[0], split)
        self._speed = speed
        self.cameras = _NAMES[: 2 if wrist else 1]
        self._group = Group(self._task.scene, 1, "end", _Follower)
        model = self._task.model
        self._base = np.array(model.body("robot0_base").pos)
        self._turn = self._site_turn()
        self._pictures = Pictures(self._config, CAMERAS[: len(self.cameras)], 1, 1, None)
        self._lock, self._drawing = threading.Lock(), threading.Lock()
        self._drawn, self._taken = np.zeros(0), -1.0
        self._episode = 0
        self._grain = np.random.default_rng(0)
        self._rows: deque[tuple[float, ...]] = deque(maxlen=_RECORD)
        self._clock = 0.0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="physics", daemon=True)
        self.reset(0)

    def start(self) -> None:
        """Let time pass, from now on."""
        self.picture(self.cameras[0])  # the first one compiles
        self._begun = time.monotonic()
        self._thread.start()

    def advance(self, ticks: int = 1) -> None:
        """Let so many `TICK`s pass, at once."""
        with self._lock:
            for _ in range(ticks):
                self._step()

    # --- what the routes call ---------------------------------------------------------------------

    def state(self) -> Mapping[str, Any]:
        with self._lock:
            group, data = self._group, self._group.data
            position, quaternion = self._hand()
            q, dq = data["qpos"][0, : control.JOINTS], data["qvel"][0, : control.JOINTS]
            jacobian = group.controller.reading(_ROW, data).jacobian[0].T
            return {
                "pose": [*position.tolist(), *quaternion.tolist()],
                "vel": (jacobian @ dq).tolist(),
                "force": [0.0] * 3,
                "torque": [0.0] * 3,
                "q": q.tolist(),
                "dq": dq.tolist(),
                "jacobian": jacobian.tolist(),
                "gripper_pos": self._opening(),
                "success": self._success,
            }

    def go(self, pose: np.ndarray) -> None:
        size = float(np.linalg.norm(pose[3:]))
        if not 0.5 < size < 2.0:
            raise RoveError(f"The quaternion {pose[3:].tolist()} is none: its length is {size:.3f}, not 1.")
        x, y, z, w = pose[3:] / size
        with self._lock:
            hand = matrix(np.array([w, x, y, z]))
            self._follower.sent = pose[:3] + self._base, hand @ self._turn

    def grip(self, opening: float) -> None:
        with self._lock:
            self._follower.opening = opening

    def reset(self, episode: int | None) -> None:
        """Begin an episode; without a number the present one is begun anew."""
        with self._drawing, self._lock:
            self._taken = -1.0  # a picture that is shared is none of this episode
            self._episode = self._episode if episode is None else episode
            self._follower.sent = self._follower.opening = None
            group, state = self._group, self._states[self._episode % len(self._states)]
            group.start(0, self._task, state)
            for _ in range(self._config.wait):
                group.act(_ROW, WAIT_ACTION[None].copy())
            self._success, self._before = False, None
            position, quaternion = self._hand()
            self._sent_here(position, quaternion)
            self._begun = time.monotonic()
            self._simulated = 0.0

    def picture(self, camera: str) -> tuple[np.ndarray, float]:
        with self._drawing:
            now = time.monotonic()
            # All cameras' pictures are drawn at once; who asks for one after the other gets those.
            if now - self._taken > _SHARED:
                place = Place(self._group, 0, self._task, self._states[0])
                self._drawn, self._taken = self._noisy(self._pictures.draw([place])[0]), now
            return self._drawn[self.cameras.index(camera)], self._taken

    def task(self) -> Mapping[str, Any]:
        return {
            "task": self._task.task,
            "instruction": self._task.instruction,
            "cameras": list(self.cameras),
            "episode": self._episode,
            "initial_state": self._states[self._episode % len(self._states)],
            "success": self._success,
            "origin": self._base.tolist(),
            "box": BOX,
            "columns": COLUMNS,
            "speed": self._speed,
        }

    def record(self) -> np.ndarray:
        with self._lock:
            return np.array(self._rows, float).reshape(-1, len(COLUMNS))

    def close(self) -> None:
        """Stop the simulation; harmless when called twice."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join(5.0)
        self._pictures.close()

    # --- the simulation ---------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._ended.is_set():
            with self._lock:
                due = (time.monotonic() - self._begun) * self._speed
                if due - self._simulated > _BEHIND * self._speed:
                    self._begun += (due - self._simulated) / self._speed
                ahead = self._simulated - due
                if ahead <= 0:
                    self._step()
            if ahead > 0:
                self._ended.wait(ahead / self._speed)

    def _step(self) -> None:
        holds, _ = self._group.act(_ROW, np.zeros((1, 7)), TICK)
        self._success = self._success or bool(holds[0])
        position, quaternion = self._hand()
        # A scene that is put back is no motion.
        way = 0.0 if self._before is None else float(np.linalg.norm(position - self._before))
        self._before = position
        turn, done = turns.from_down(quaternion), float(self._success)
        self._clock += TICK * 0.002
        self._simulated += TICK * 0.002
        self._rows.append((self._clock, *position, *turn, self._opening(), way / (TICK * 0.002), done))

    def _hand(self) -> tuple[np.ndarray, np.ndarray]:
        """Where the hand is in the base frame: position [3], quaternion x, y, z, w."""
        w, x, y, z = self._group.hand_quaternion[0]
        return self._group.hand_position[0] - self._base, np.array([x, y, z, w])

    def _opening(self) -> float:
        """How far the fingers are apart, as a share of the most."""
        return float((self._group.fingers[0, 0] - self._group.fingers[0, 1]) / (2 * 0.04))

    def _sent_here(self, position: np.ndarray, quaternion: np.ndarray) -> None:
        x, y, z, w = quaternion
        self._follower.sent = position + self._base, matrix(np.array([w, x, y, z])) @ self._turn
        self._follower.opening = 1.0

    @property
    def _follower(self) -> _Follower:
        assert isinstance(self._group.controller, _Follower)
        return self._group.controller

    def _site_turn(self) -> np.ndarray:
        """The rotation [3, 3] from the hand to the grip site, which the controller turns."""
        model = self._task.model
        data = mujoco.MjData(model)
        mujoco.mj_kinematics(model, data)
        arm = self._task.scene.arm
        return data.xmat[arm.hand].reshape(3, 3).T @ data.site_xmat[arm.site].reshape(3, 3)

    def _noisy(self, images: np.ndarray) -> np.ndarray:
        """Add what any sensor has, one step in one of a hundred values: by it a picture that is new differs
        from one that is repeated, also where nothing moves."""
        grain = self._grain.random(images.shape, np.float32)
        return np.where(grain < 0.01, images ^ 1, images)


def serve(
    task: str,
    host: str,
    port: int,
    *,
    image_size: int = 128,
    wrist: bool = True,
    speed: float = 1.0,
    split: Split = "held_out",
    say: Callable[[str], None] = print,
) -> None:
    """Simulate an arm behind its HTTP interface until SIGINT or SIGTERM, as `rove simulate` does.

    See `SimulatedArm` for the arguments. Raises RoveError where the port is taken, or there is no such task.
    """
    with closing(ArmServer(host, port)) as server:
        server.arm = arm = SimulatedArm(task, image_size=image_size, wrist=wrist, speed=speed, split=split)
        arm.start()
        say(f"Simulating {task} at http://{host}:{server.port}.")

        def end(number: int, frame: FrameType | None) -> None:
            # `shutdown` waits for `serve_forever`, which this very thread is in.
            threading.Thread(target=server.shutdown).start()

        before = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            server.serve_forever(0.1)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            arm.close()
