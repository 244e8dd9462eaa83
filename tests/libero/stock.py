"""Stock LIBERO beside ours: what the parity tests compare with."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np

from rove.envs.libero import controller as control
from rove.envs.libero import package
from rove.envs.libero.build import without_pictures
from rove.envs.libero.controller import Controller, Reading

# Numba rounds otherwise than NumPy, and so than the stock environment without it.
assert "robosuite" not in sys.modules, "robosuite was imported before its Numba could be turned off"
numba.config.DISABLE_JIT = True
try:
    with without_pictures():
        from libero.libero.envs.env_wrapper import ControlEnv
        from robosuite.utils import control_utils
finally:
    numba.config.DISABLE_JIT = False


@dataclass
class Seen:
    """What the stock environment shows after an action."""

    qpos: np.ndarray
    qvel: np.ndarray
    success: bool
    state: np.ndarray
    """float64 [8], composed as published policies read it."""


class Stock:
    """One stock environment, without pictures."""

    def __init__(self, task: str) -> None:
        self.env = ControlEnv(
            bddl_file_name=str(package.bddl(task)),
            has_offscreen_renderer=False,
            use_camera_obs=False,
            ignore_done=True,
        )

    def reset(self, state: np.ndarray, number: int = 0) -> Seen:
        """Start from an initial state, after the published resets that lead to its number."""
        self.env.seed(0)
        for _ in range(number + 1):
            self.env.reset()
        return self._seen(self.env.set_init_state(state), bool(self.env.check_success()))

    def judge(self, state: np.ndarray) -> bool:
        """Whether the goal holds in a state."""
        self.env.set_init_state(state)
        return bool(self.env.check_success())

    def step(self, action: np.ndarray) -> Seen:
        observation, _, done, _ = self.env.step(action)
        return self._seen(observation, bool(done))

    def _seen(self, observation: dict[str, Any], success: bool) -> Seen:
        data = self.env.sim.data
        x, y, z, w = observation["robot0_eef_quat"]
        w = np.clip(w, -1.0, 1.0)
        axis = np.array([x, y, z]) * 2 * np.arccos(w) / np.sqrt(1 - w * w)
        state = np.concatenate([observation["robot0_eef_pos"], axis, observation["robot0_gripper_qpos"]])
        return Seen(data.qpos.copy(), data.qvel.copy(), success, state)


class ExactController(Controller):
    """Torques by robosuite's own functions, on operands laid out in memory as it has them.

    What a matrix product rounds to depends on the layout; with that, the whole must agree to the last bit.
    """

    def command(
        self, rows: np.ndarray, data: Mapping[str, np.ndarray], grip: np.ndarray, motors: np.ndarray
    ) -> None:
        now, bias = self.reading(rows, data), data["qfrc_bias"][rows, : control.JOINTS]
        position, rotation = self.goal_position[rows], self.goal_rotation[rows]
        torques = np.stack([self._torques(now, bias, position, rotation, i) for i in range(len(rows))])
        control._drive(rows, torques, grip, self.gripper, self.arm.limits, motors)
        self.fresh[rows] = False

    def _torques(
        self, now: Reading, bias: np.ndarray, position: np.ndarray, rotation: np.ndarray, i: int
    ) -> np.ndarray:
        nv = self.arm.nv
        translation, spin = np.zeros((3, nv)), np.zeros((3, nv))
        translation[:, : control.JOINTS] = now.jacobian[i, :, :3].T
        spin[:, : control.JOINTS] = now.jacobian[i, :, 3:].T
        speed = np.zeros(nv)
        speed[: control.JOINTS] = now.qd[i]
        v, w = np.dot(translation, speed), np.dot(spin, speed)
        columns = list(range(control.JOINTS))
        jp, jo = np.array(translation[:, columns]), np.array(spin[:, columns])
        j = np.array(np.vstack([jp, jo]))
        mass = np.asfortranarray(now.mass[i])
        error = control_utils.orientation_error(np.array(rotation[i]), np.array(now.rotation[i]))
        kp, kd = control.STIFFNESS * np.ones(3), 2 * np.sqrt(control.STIFFNESS * np.ones(3))
        force = np.multiply(position[i] - now.position[i], kp) + np.multiply(-v, kd)
        torque = np.multiply(error, kp) + np.multiply(-w, kd)
        _, lambda_p, lambda_o, nullspace = control_utils.opspace_matrices(mass, j, jp, jo)
        wrench = np.concatenate([np.dot(lambda_p, force), np.dot(lambda_o, torque)])
        torques = np.dot(j.T, wrench) + bias[i]
        torques += control_utils.nullspace_torques(mass, nullspace, control.POSTURE, now.q[i], now.qd[i])
        return torques
