"""What turns an action into motor commands: operational-space control of the arm, and the gripper's ramp.

The controller is the published one (OSC_POSE of robosuite 1.4 in LIBERO's settings), after Khatib 1987, "A
unified approach for motion and force control of robot manipulators". With F = kp Δp − kd v, T = kp e − kd ω
at the grip site, M the arm's mass matrix, J its Jacobian there, and u = 10 (q₀ − q) − 2 √10 q̇ a pull towards
the default posture, in the directions that do not move the hand:

    τ = Jᵀ [Λp F; Λo T] + bias + (I − M⁻¹ Jᵀ Λ J)ᵀ M u,    Λ = (J M⁻¹ Jᵀ)⁻¹, Λp and Λo of its halves alone.

Linear solves stand where robosuite inverts: with Y = M⁻¹ Jᵀ and A = J Y the last term is M u − Jᵀ A⁻¹ (J u).
"""

# pyright: reportAttributeAccessIssue=false
from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields

import mujoco
import numpy as np

SUBSTEPS = 25
"""Of 2 ms in an action."""
REACH = 0.05
"""Metres that the largest translation asks for."""
TURN = 0.5
"""Radians that the largest rotation asks for."""
STIFFNESS = 150.0
DAMPING = 2 * math.sqrt(STIFFNESS)
POSTURE_STIFFNESS = 10.0
POSTURE_DAMPING = 2 * math.sqrt(POSTURE_STIFFNESS)
POSTURE = np.array([0.0, -0.161037389, 0.0, -2.44459747, 0.0, 2.2267522, np.pi / 4])
"""q₀: the arm's joints after a stock reset, radians."""
GRIPPER_SPEED = 0.01
"""Of the whole way from the middle, in a substep."""
JOINTS = 7
FINGERS = ("gripper0_finger_joint1", "gripper0_finger_joint2")
HAND = "robot0_right_hand"
"""The body whose orientation is observed."""
BOUND = ("site_xpos", "site_xmat", "subtree_com", "cdof", "M", "qfrc_bias", "qpos", "qvel", "xquat")
"""What of MuJoCo's data the controller and the observation read."""


@dataclass(frozen=True, slots=True)
class Reading:
    """What the controller knows of n arms."""

    position: np.ndarray
    """[n, 3], of the grip site."""
    rotation: np.ndarray
    """[n, 3, 3], of the grip site."""
    jacobian: np.ndarray
    """[n, 7, 6], transposed: a row a joint, translation before rotation."""
    mass: np.ndarray
    """[n, 7, 7]."""
    q: np.ndarray
    """[n, 7]."""
    qd: np.ndarray
    """[n, 7]."""

    def where(self, rows: np.ndarray, other: Reading) -> Reading:
        """`other` (of one arm) in the rows that are True."""
        values = {}
        for f in fields(self):
            own = getattr(self, f.name)
            values[f.name] = np.where(rows.reshape(-1, *[1] * (own.ndim - 1)), getattr(other, f.name), own)
        return Reading(**values)


class Arm:
    """Where a model keeps its arm, and what a stock reset leaves in its controller."""

    def __init__(self, model: mujoco.MjModel) -> None:
        self.site = model.site("gripper0_grip_site").id
        self.nv = model.nv
        self.root = int(model.body_rootid[model.site_bodyid[self.site]])
        self.hand = model.body(HAND).id
        self.fingers = np.array([model.jnt_qposadr[model.joint(name).id] for name in FINGERS])
        first = model.joint("robot0_joint1")
        assert first.qposadr[0] == 0 == first.dofadr[0], "the arm's joints come first"
        self._mass = _mass_addresses(model)
        low, high = model.actuator_ctrlrange.T
        self.torque_low, self.torque_high = low[:JOINTS], high[:JOINTS]
        self.finger_middle = 0.5 * (high[JOINTS:] + low[JOINTS:])
        self.finger_half = 0.5 * (high[JOINTS:] - low[JOINTS:])
        data = mujoco.MjData(model)
        data.qpos[:JOINTS] = POSTURE
        mujoco.mj_kinematics(model, data)
        mujoco.mj_comPos(model, data)
        mujoco.mj_makeM(model, data)
        self.home = self.read({name: getattr(data, name)[None] for name in BOUND}, np.array([0]))
        """The reading of a stock reset: default posture, at rest. A new initial state does not refresh it, so
        that an episode's first action still starts from it."""

    def read(self, data: Mapping[str, np.ndarray], rows: np.ndarray) -> Reading:
        """Of `rows` of bound arrays [B, …], as of the last forward pass."""
        position = data["site_xpos"][rows, self.site]
        cdof = data["cdof"][rows, :JOINTS].reshape(len(rows), JOINTS, 6)
        spin, shift = cdof[..., :3], cdof[..., 3:]
        offset = (position - data["subtree_com"][rows, self.root])[:, None]
        jacobian = np.empty_like(cdof)
        jacobian[..., :3] = shift + _cross(spin, offset)
        jacobian[..., 3:] = spin
        return Reading(
            position=position,
            rotation=data["site_xmat"][rows, self.site].reshape(-1, 3, 3),
            jacobian=jacobian,
            mass=data["M"][rows[:, None, None], self._mass],
            q=data["qpos"][rows, :JOINTS],
            qd=data["qvel"][rows, :JOINTS],
        )


def _mass_addresses(model: mujoco.MjModel) -> np.ndarray:
    """int [7, 7]: where M's sparse lower triangle has the arm's block."""
    where = np.zeros((JOINTS, JOINTS), np.int64)
    for i in range(JOINTS):
        start = model.M_rowadr[i]
        for address in range(start, start + model.M_rownnz[i]):
            j = model.M_colind[address]
            where[i, j] = where[j, i] = address
    return where


def _cross(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cross products of the last axes."""
    ax, ay, az = a[..., 0], a[..., 1], a[..., 2]
    bx, by, bz = b[..., 0], b[..., 1], b[..., 2]
    return np.stack([ay * bz - az * by, az * bx - ax * bz, ax * by - ay * bx], axis=-1)


class Controller:
    """The controllers of B arms of one model: what they want, and how."""

    def __init__(self, arm: Arm, count: int) -> None:
        self.arm = arm
        self.goal_position = np.zeros((count, 3))
        self.goal_rotation = np.zeros((count, 3, 3))
        self.gripper = np.zeros((count, 2))
        """Commanded opening of both fingers: −1 … 1, one closes with +1, the other with −1."""
        self.fresh = np.zeros(count, bool)
        """Whether no action has been executed since the reset."""

    def reset(self, row: int) -> None:
        self.goal_position[row] = self.arm.home.position[0]
        self.goal_rotation[row] = self.arm.home.rotation[0]
        self.gripper[row], self.fresh[row] = 0.0, True

    def aim(self, rows: np.ndarray, reading: Reading, actions: np.ndarray) -> None:
        """Set goals from actions [n, 7] (−1 … 1), relative to where the hand is.

        An action without rotation keeps the orientation that was wanted before.
        """
        actions = np.clip(actions, -1.0, 1.0)
        self.goal_position[rows] = reading.position + REACH * actions[:, :3]
        for row, turn, rotation in zip(rows, TURN * actions[:, 3:6], reading.rotation, strict=True):
            if turn.any():
                self.goal_rotation[row] = np.dot(_rotation(turn), rotation)

    def command(self, rows: np.ndarray, reading: Reading, bias: np.ndarray, grip: np.ndarray) -> np.ndarray:
        """Motor commands [n, 9] of one substep; `grip` [n] opens (< 0), closes (> 0) or holds."""
        arm = self.arm
        torques = self.torques(reading, bias, self.goal_position[rows], self.goal_rotation[rows])
        step = GRIPPER_SPEED * np.sign(grip)
        self.gripper[rows] = gripper = np.clip(self.gripper[rows] + np.stack([-step, step], 1), -1.0, 1.0)
        return np.concatenate(
            [
                np.clip(torques, arm.torque_low, arm.torque_high),
                arm.finger_middle + arm.finger_half * gripper,
            ],
            axis=1,
        )

    def torques(
        self, now: Reading, bias: np.ndarray, position: np.ndarray, rotation: np.ndarray
    ) -> np.ndarray:
        """Joint torques [n, 7] towards positions [n, 3] and rotations [n, 3, 3]; see the module's head."""
        jt, j = now.jacobian, now.jacobian.transpose(0, 2, 1)
        velocity = (j @ now.qd[..., None])[..., 0]
        # half the sum of the cross products of the axes, of which column i is rotation[:, :, i]
        turn = 0.5 * _cross(now.rotation.transpose(0, 2, 1), rotation.transpose(0, 2, 1)).sum(1)
        error = np.concatenate([position - now.position, turn], axis=1)
        wanted = (STIFFNESS * error - DAMPING * velocity)[..., None]
        posture = (POSTURE_STIFFNESS * (POSTURE - now.q) - POSTURE_DAMPING * now.qd)[..., None]
        a = j @ _solve(now.mass, jt)
        wrench = -_solve(a, j @ posture)
        wrench[:, :3] += _solve(a[:, :3, :3], wanted[:, :3])
        wrench[:, 3:] += _solve(a[:, 3:, 3:], wanted[:, 3:])
        return (jt @ wrench + now.mass @ posture)[..., 0] + bias


def _solve(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Solutions of n linear systems; zero for one that has none, as of a world that has diverged."""
    try:
        return np.linalg.solve(a, b)
    except np.linalg.LinAlgError:
        return np.stack([_solve_one(x, y) for x, y in zip(a, b, strict=True)])


def _solve_one(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    try:
        return np.linalg.solve(a, b)
    except np.linalg.LinAlgError:
        return np.zeros_like(b)


def _rotation(turn: np.ndarray) -> np.ndarray:
    """Rotation matrix [3, 3] of an axis-angle vector [3], in float32 as robosuite computes it."""
    angle = np.linalg.norm(turn)
    q = np.zeros(4)
    q[0], q[1:] = np.cos(angle / 2.0), turn / angle * np.sin(angle / 2.0)
    q = q.astype(np.float32)
    q *= math.sqrt(2.0 / np.dot(q, q))
    p = np.outer(q, q)
    return np.array(
        [
            [1.0 - p[2, 2] - p[3, 3], p[1, 2] - p[3, 0], p[1, 3] + p[2, 0]],
            [p[1, 2] + p[3, 0], 1.0 - p[1, 1] - p[3, 3], p[2, 3] - p[1, 0]],
            [p[1, 3] - p[2, 0], p[2, 3] + p[1, 0], 1.0 - p[1, 1] - p[2, 2]],
        ]
    )
