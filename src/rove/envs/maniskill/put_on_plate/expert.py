"""A scripted expert for the put-on-plate tasks: the next action of a world, from its state alone.

It sees the shape of the object: the fingers close across its narrow side, at the height of its middle.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rove.envs.maniskill.put_on_plate import progress
from rove.envs.rotations import tensor_matrix

TABLE = 0.8695
"""Height of the table, metres, world frame."""
STEP, TURN = 0.04, 0.4
"""Longest step of a target pose in an action, metres along an axis, radians."""
CLEARANCE = 0.045
"""Metres that the fingertips keep above the object on the way to it, and it above all else on the way
back."""
CLOSED = 0.0165
"""Position of a finger that has closed on nothing, metres."""
OPEN, CLOSE = 1.0, -1.0
_ANGLES = np.linspace(0.0, np.pi, 24, endpoint=False)


class Grasp(NamedTuple):
    """Pose of the hand that takes hold of the object."""

    place: np.ndarray
    """Point [3] between the fingertips, metres."""
    angle: float
    """Angle of the axis along which the fingers close, in [0, pi)."""
    top: float
    """Height of the object's top, metres."""
    bottom: float


@cache
def _surface(file: Path) -> np.ndarray:
    """Return points [2000, 3] on an object's collision mesh."""
    import trimesh

    mesh = trimesh.load(file, force="mesh")
    return np.asarray(trimesh.sample.sample_surface(mesh, 2000, seed=0)[0])


def _numpy(x: Any) -> np.ndarray:
    return x.detach().cpu().numpy().astype(np.float64)


def _rotation(quaternion: Any) -> np.ndarray:
    return _numpy(tensor_matrix(quaternion))


def _points(env: Any, row: int, source: Any) -> np.ndarray:
    folder, _ = env._models["more_carrot"][env.scenes[row].object]
    local = _surface(env._data / "tasks/carrot/more_carrot" / folder / "collision.obj")
    return local @ _rotation(source.pose.q[row]).T + _numpy(source.pose.p[row])


def grasp(points: np.ndarray, centre: np.ndarray, now: float) -> Grasp:
    """Choose how to take hold of an object with `points` [n, 3] on its surface and its mass at `centre` [3].

    `now` is the angle that the fingers have, from which a turn costs a little.
    """
    top, bottom = float(points[:, 2].max()), float(points[:, 2].min())
    tip = max(
        bottom + progress.FLOOR, min((top + bottom) / 2 - progress.BELOW, top - 0.008), top - progress.DEEP
    )
    band = points[(points[:, 2] > tip - 0.004) & (points[:, 2] < tip + 0.030), :2]
    band = band if len(band) > 20 else points[:, :2]
    best = None
    for angle in _ANGLES:
        along, across = np.array([np.cos(angle), np.sin(angle)]), np.array([-np.sin(angle), np.cos(angle)])
        beside = np.abs((band - centre[:2]) @ across) < 0.012
        span = (band[beside] if beside.sum() > 5 else band) @ along
        width = span.max() - span.min()
        cost = width + 0.004 * abs(_turn(angle, now))
        if best is None or cost < best[0]:
            middle = along * (span.max() + span.min()) / 2 + across * (centre[:2] @ across)
            best = cost, angle, middle
    assert best is not None
    return Grasp(np.array([*best[2], tip]), float(best[1]), top, bottom)


def _turn(angle: float, now: float) -> float:
    """The shortest turn from `now` to `angle`, of an axis without a direction."""
    return (angle - now + np.pi / 2) % np.pi - np.pi / 2


class _Hand(NamedTuple):
    """The hand of one world, in the world frame."""

    place: np.ndarray
    """Point [3] between the fingertips."""
    wanted: np.ndarray
    """Place [3] at which the controller wants that point."""
    angle: float
    """Angle of the axis along which the fingers close, as the controller wants it."""
    open: float
    """Mean position of a finger, metres."""


def _hand(env: Any, row: int) -> _Hand:
    robot = env.agent.robot
    base, arm = robot.pose, env.agent.controller.controllers["arm"]
    target = arm._target_pose
    turned = _rotation(base.q[row])
    wanted = turned @ _numpy(target.p[row]) + _numpy(base.p[row])
    wanted[2] -= progress.TIP
    axes = turned @ _rotation(target.q[row])
    angle = float(np.arctan2(axes[1, 1], axes[0, 1]))
    fingers = float(robot.get_qpos()[row, -2:].mean())
    return _Hand(_numpy(env.hands()[row]), wanted, angle, fingers)


def action(env: Any, row: int, elapsed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the next action [7], and how far noise may push it [7]; see `world.ManiSkillTask.expert`."""
    source, plate = env.model("more_carrot", row), env.model("more_plate", row)
    hand, points = _hand(env, row), _points(env, row, source)
    body = source._bodies[row]
    mass = body.get_cmass_local_pose().p
    centre = _rotation(source.pose.q[row]) @ mass + _numpy(source.pose.p[row])
    hold = grasp(points, centre, hand.angle)
    goal = _numpy(plate.pose.p[row])
    rim = goal[2] + float(env.receptacle_extents[row, 2])
    near = np.linalg.norm(hand.place - centre) < 0.06
    lifted = hold.bottom > TABLE + 0.02 and near and hand.open > CLOSED
    if bool(env.held_for[row] > 0) or lifted:
        want, turn, grip = _carry(env, row, hand, hold, _numpy(source.pose.p[row]), goal, rim)
        freedom = 0.01 if hold.bottom > rim + 0.02 else 0.0
    else:
        want, turn, grip = _reach(hand, hold)
        freedom = 0.02 if hand.place[2] > hold.top + 0.01 else 0.0
    step = np.clip(want - hand.wanted, -STEP, STEP)
    # The base is turned by half a turn: its x and y axes are the world's, reversed.
    return np.array([-step[0], -step[1], step[2], 0.0, 0.0, np.clip(turn, -TURN, TURN), grip]), np.array(
        [freedom, freedom, freedom, 0.0, 0.0, 0.0, 0.0]
    )


def _reach(hand: _Hand, hold: Grasp) -> tuple[np.ndarray, float, float]:
    """Go above the object, down, close: wanted place, turn and gripper."""
    turn = _turn(hold.angle, hand.angle)
    above = np.array([*hold.place[:2], hold.top + CLEARANCE])
    if hand.open < CLOSED:  # closed on nothing
        return np.array([*hand.wanted[:2], above[2]]), 0.0, OPEN
    off = np.linalg.norm(hand.place[:2] - hold.place[:2])
    low = hand.place[2] < hold.place[2] + 0.010
    if low and off < 0.020:
        return np.array([*hand.wanted[:2], max(hold.place[2], TABLE + 0.004)]), 0.0, CLOSE
    deep = hand.place[2] < hold.top + 0.005
    if (off < 0.010 and abs(turn) < 0.12) or (deep and off < 0.02):
        return hold.place, 0.0 if deep else turn, OPEN
    if deep:
        return np.array([*hand.wanted[:2], above[2]]), 0.0, OPEN
    return above, turn, OPEN


def _carry(
    env: Any, row: int, hand: _Hand, hold: Grasp, source: np.ndarray, goal: np.ndarray, rim: float
) -> tuple[np.ndarray, float, float]:
    """Go up, over the receptacle, down: wanted place, turn and gripper."""
    shift = goal[:2] - source[:2]
    over = np.linalg.norm(shift) < 0.025
    want = hand.wanted.copy()
    held = int(env.held_for[row])
    if held == 1:
        return want, 0.0, CLOSE
    clear = hold.bottom > rim + 0.015
    if over and held >= progress.HELD_FOR:
        want[2] -= 0.02
        want[:2] += 0.5 * shift
        return want, 0.0, CLOSE
    if clear or over:
        want[:2] = hand.place[:2] + shift
    if not clear:
        want[2] = hand.place[2] + max(rim + CLEARANCE - hold.bottom, 0.0)
    return want, 0.0, CLOSE
