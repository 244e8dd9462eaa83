"""The controller that turns an action into motor commands: operational-space control of the arm, and the
gripper's ramp.

The controller is the published one (OSC_POSE of robosuite 1.4 in LIBERO's settings), after Khatib 1987, "A
unified approach for motion and force control of robot manipulators". With F = kp Δp − kd v, T = kp e − kd ω
at the grip site, M the arm's mass matrix, J its Jacobian there, and u = 10 (q₀ − q) − 2 √10 q̇ a pull towards
the default posture, in the directions that do not move the hand:

    τ = Jᵀ [Λp F; Λo T] + bias + (I − M⁻¹ Jᵀ Λ J)ᵀ M u,    Λ = (J M⁻¹ Jᵀ)⁻¹, Λp and Λo of its halves alone.

Linear solves stand where robosuite inverts: with Y = M⁻¹ Jᵀ and A = J Y the last term is M u − Jᵀ A⁻¹ (J u).

Reading and torques are compiled by Numba, arm after arm: what comes 25 times an action, on arrays of a few
arms, takes NumPy half as long as the physics takes, and holds up the other threads meanwhile.
"""

# pyright: reportAttributeAccessIssue=false
from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass, fields

import mujoco
import numpy as np
from numba import njit

from rove.envs.rotations import axis_angle_matrix

SUBSTEPS = 25
"""Substeps of 2 ms in an action."""
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
"""Share of the whole way from the middle that the gripper goes in a substep."""
JOINTS = 7
FINGERS = ("gripper0_finger_joint1", "gripper0_finger_joint2")
HAND = "robot0_right_hand"
"""The body whose orientation is observed."""
READ = ("site_xpos", "site_xmat", "subtree_com", "cdof", "M", "qpos", "qvel")
"""MuJoCo's arrays that say how the arm stands and moves."""
_arrays = operator.itemgetter(*READ)
BOUND = (*READ, "qfrc_bias", "xquat")
"""MuJoCo's arrays that the controller and the observation read."""


@dataclass(frozen=True, slots=True)
class Reading:
    """The controller's state of n arms."""

    position: np.ndarray
    """Positions [n, 3] of the grip site."""
    rotation: np.ndarray
    """Rotations [n, 3, 3] of the grip site."""
    jacobian: np.ndarray
    """Jacobians [n, 7, 6], transposed: a row a joint, translation before rotation."""
    mass: np.ndarray
    """Mass matrices [n, 7, 7]."""
    q: np.ndarray
    """Joint positions [n, 7], radians."""
    qd: np.ndarray
    """Joint velocities [n, 7], radians a second."""

    def where(self, rows: np.ndarray, other: Reading) -> Reading:
        """Return this reading with `other` (of one arm) in the rows that are True."""
        values = {}
        for f in fields(self):
            own = getattr(self, f.name)
            values[f.name] = np.where(rows.reshape(-1, *[1] * (own.ndim - 1)), getattr(other, f.name), own)
        return Reading(**values)


class Arm:
    """Indices of a model's arm, and what a stock reset leaves in its controller."""

    def __init__(self, model: mujoco.MjModel) -> None:
        self.site = model.site("gripper0_grip_site").id
        self.nv = model.nv
        self.root = int(model.body_rootid[model.site_bodyid[self.site]])
        self.hand = model.body(HAND).id
        self.fingers = np.array([model.jnt_qposadr[model.joint(name).id] for name in FINGERS])
        first = model.joint("robot0_joint1")
        assert first.qposadr[0] == 0 == first.dofadr[0], "the arm's joints come first"
        self.mass = _mass_addresses(model)
        """int [7, 7]: where M's sparse lower triangle has the arm's block."""
        low, high = model.actuator_ctrlrange.T
        middle, half = 0.5 * (high[JOINTS:] + low[JOINTS:]), 0.5 * (high[JOINTS:] - low[JOINTS:])
        self.limits = (low[:JOINTS], high[:JOINTS], middle, half)
        """Lowest and highest torques [7], N m; middle of the fingers' commands and half their range [2]."""
        data = mujoco.MjData(model)
        data.qpos[:JOINTS] = POSTURE
        mujoco.mj_kinematics(model, data)
        mujoco.mj_comPos(model, data)
        mujoco.mj_makeM(model, data)
        self.home = self.read({name: getattr(data, name)[None] for name in BOUND}, np.array([0]))
        """The reading of a stock reset: default posture, at rest. A new initial state does not refresh it, so
        that an episode's first action still starts from it."""

    def read(self, data: Mapping[str, np.ndarray], rows: np.ndarray) -> Reading:
        """Read the state of `rows` from bound arrays [B, …], as of the last forward pass."""
        n = len(rows)
        position, rotation, jacobian = np.empty((n, 3)), np.empty((n, 3, 3)), np.empty((n, JOINTS, 6))
        mass, q, qd = np.empty((n, JOINTS, JOINTS)), np.empty((n, JOINTS)), np.empty((n, JOINTS))
        _read(rows, self.site, self.root, self.mass, _arrays(data), position, rotation, jacobian, mass, q, qd)
        return Reading(position, rotation, jacobian, mass, q, qd)


def _mass_addresses(model: mujoco.MjModel) -> np.ndarray:
    """Find where M's sparse lower triangle has the arm's block, int [7, 7]."""
    where = np.zeros((JOINTS, JOINTS), np.int64)
    for i in range(JOINTS):
        start = model.M_rowadr[i]
        for address in range(start, start + model.M_rownnz[i]):
            j = model.M_colind[address]
            where[i, j] = where[j, i] = address
    return where


@njit(cache=True, nogil=True)
def _read(rows, site, root, addresses, data, position, rotation, jacobian, mass, q, qd):
    """Read as `Arm.read` does, into arrays; `data` are those that `READ` names."""
    xpos, xmat, com, cdof, m, qpos, qvel = data
    for i, row in enumerate(rows):
        x, y, z = xpos[row, site]
        cx, cy, cz = com[row, root]
        x, y, z, position[i] = x - cx, y - cy, z - cz, xpos[row, site]
        for k in range(3):
            for j in range(3):
                rotation[i, k, j] = xmat[row, site, 3 * k + j]
        for k in range(JOINTS):
            rx, ry, rz, px, py, pz = cdof[row, k]
            jacobian[i, k, 0] = px + (ry * z - rz * y)
            jacobian[i, k, 1] = py + (rz * x - rx * z)
            jacobian[i, k, 2] = pz + (rx * y - ry * x)
            jacobian[i, k, 3], jacobian[i, k, 4], jacobian[i, k, 5] = rx, ry, rz
            q[i, k], qd[i, k] = qpos[row, k], qvel[row, k]
            for j in range(JOINTS):
                mass[i, k, j] = m[row, addresses[k, j]]


@njit(cache=True, nogil=True)
def _solve(a, b):
    """Solve a x = b in place by Cholesky's decomposition; `a` [n, n], `b` [n, m]. Zeros where `a` is not
    positive definite, as of a world that has diverged."""
    n, columns = b.shape
    for k in range(n):
        pivot = a[k, k]
        for j in range(k):
            pivot -= a[k, j] * a[k, j]
        if not pivot > 0.0:
            b[:] = 0.0
            return
        a[k, k] = pivot = math.sqrt(pivot)
        for i in range(k + 1, n):
            rest = a[i, k]
            for j in range(k):
                rest -= a[i, j] * a[k, j]
            a[i, k] = rest / pivot
    for c in range(columns):
        for i in range(n):
            rest = b[i, c]
            for j in range(i):
                rest -= a[i, j] * b[j, c]
            b[i, c] = rest / a[i, i]
        for i in range(n - 1, -1, -1):
            rest = b[i, c]
            for j in range(i + 1, n):
                rest -= a[j, i] * b[j, c]
            b[i, c] = rest / a[i, i]


@njit(cache=True, nogil=True)
def _torques(position, rotation, jacobian, mass, q, qd, goal_position, goal_rotation, bias, torques):
    """Compute joint torques [n, 7] into the last argument; see the module's head."""
    y, m, a, half = np.empty((JOINTS, 6)), np.empty((JOINTS, JOINTS)), np.empty((6, 6)), np.empty((3, 3))
    wanted, wrench, posture = np.empty((6, 1)), np.empty((6, 1)), np.empty(JOINTS)
    for i in range(len(bias)):
        jt = jacobian[i]
        # half the sum of the cross products of the axes: column k of a rotation is its k-th axis
        wanted[:] = 0.0
        for k in range(3):
            ax, ay, az = rotation[i, 0, k], rotation[i, 1, k], rotation[i, 2, k]
            bx, by, bz = goal_rotation[i, 0, k], goal_rotation[i, 1, k], goal_rotation[i, 2, k]
            wanted[k, 0] += goal_position[i, k] - position[i, k]
            wanted[3, 0] += 0.5 * (ay * bz - az * by)
            wanted[4, 0] += 0.5 * (az * bx - ax * bz)
            wanted[5, 0] += 0.5 * (ax * by - ay * bx)
        for r in range(6):
            velocity = 0.0
            for k in range(JOINTS):
                velocity += jt[k, r] * qd[i, k]
            wanted[r, 0] = STIFFNESS * wanted[r, 0] - DAMPING * velocity
        for k in range(JOINTS):
            posture[k] = POSTURE_STIFFNESS * (POSTURE[k] - q[i, k]) - POSTURE_DAMPING * qd[i, k]
        y[:], m[:] = jt, mass[i]
        _solve(m, y)
        for r in range(6):
            wrench[r, 0] = 0.0
            for k in range(JOINTS):
                wrench[r, 0] -= jt[k, r] * posture[k]
            for c in range(6):
                a[r, c] = 0.0
                for k in range(JOINTS):
                    a[r, c] += jt[k, r] * y[k, c]
        for first in (0, 3):
            half[:] = a[first : first + 3, first : first + 3]
            _solve(half, wanted[first : first + 3])
        _solve(a, wrench)
        for k in range(JOINTS):
            torque = bias[i, k]
            for r in range(6):
                torque += jt[k, r] * (wrench[r, 0] + wanted[r, 0])
            for j in range(JOINTS):
                torque += mass[i, k, j] * posture[j]
            torques[i, k] = torque


@njit(cache=True, nogil=True)
def _drive(rows, torques, grip, gripper, limits, motors):
    """Write torques within their limits and the gripper's ramp into `motors`: see `Controller.command`."""
    low, high, middle, half = limits
    for i, row in enumerate(rows):
        for k in range(JOINTS):
            motors[row, k] = min(max(torques[i, k], low[k]), high[k])
        step = GRIPPER_SPEED * np.sign(grip[i])
        for finger, towards in enumerate((-step, step)):
            opening = min(max(gripper[row, finger] + towards, -1.0), 1.0)
            gripper[row, finger] = opening
            motors[row, JOINTS + finger] = middle[finger] + half[finger] * opening


@njit(cache=True, nogil=True)
def _command(
    rows, site, root, addresses, data, bias, fresh, home, goal_position, goal_rotation,
    grip, gripper, limits, motors,
):  # fmt: skip
    """Do all of `Controller.command` in one go: calls from Python, 25 an action, cost as much as what they
    compute."""
    n = len(rows)
    position, rotation, jacobian = np.empty((n, 3)), np.empty((n, 3, 3)), np.empty((n, JOINTS, 6))
    mass, q, qd = np.empty((n, JOINTS, JOINTS)), np.empty((n, JOINTS)), np.empty((n, JOINTS))
    _read(rows, site, root, addresses, data, position, rotation, jacobian, mass, q, qd)
    pull, to, towards = np.empty((n, JOINTS)), np.empty((n, 3)), np.empty((n, 3, 3))
    for i, row in enumerate(rows):
        to[i], towards[i], pull[i] = goal_position[row], goal_rotation[row], bias[row, :JOINTS]
        if fresh[row]:
            position[i], rotation[i], jacobian[i] = home[0][0], home[1][0], home[2][0]
            mass[i], q[i], qd[i] = home[3][0], home[4][0], home[5][0]
            fresh[row] = False
    torques = np.empty((n, JOINTS))
    _torques(position, rotation, jacobian, mass, q, qd, to, towards, pull, torques)
    _drive(rows, torques, grip, gripper, limits, motors)


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

    def reading(self, rows: np.ndarray, data: Mapping[str, np.ndarray]) -> Reading:
        """Return the state of the arms in `rows`; before the first action of an episode, that of a stock
        reset."""
        now, fresh = self.arm.read(data, rows), self.fresh[rows]
        return now.where(fresh, self.arm.home) if fresh.any() else now

    def aim(self, rows: np.ndarray, data: Mapping[str, np.ndarray], actions: np.ndarray) -> None:
        """Set goals from actions [n, 7] (−1 … 1), relative to where the hand is.

        An action without rotation keeps the orientation that was wanted before.
        """
        reading, actions = self.reading(rows, data), np.clip(actions, -1.0, 1.0)
        self.goal_position[rows] = reading.position + REACH * actions[:, :3]
        turns = TURN * actions[:, 3:6]
        turning = turns.any(1)
        if turning.any():
            self.goal_rotation[rows[turning]] = axis_angle_matrix(turns[turning]) @ reading.rotation[turning]

    def command(
        self, rows: np.ndarray, data: Mapping[str, np.ndarray], grip: np.ndarray, motors: np.ndarray
    ) -> None:
        """Put commands of one substep into `rows` of `motors` [B, 9], by bound arrays as of the last forward
        pass; `grip` [n] opens (< 0), closes (> 0) or holds. See the module's head for the torques."""
        arm, home = self.arm, self.arm.home
        _command(
            rows, arm.site, arm.root, arm.mass, _arrays(data), data["qfrc_bias"],
            self.fresh, (home.position, home.rotation, home.jacobian, home.mass, home.q, home.qd),
            self.goal_position, self.goal_rotation, grip, self.gripper, arm.limits, motors,
        )  # fmt: skip
