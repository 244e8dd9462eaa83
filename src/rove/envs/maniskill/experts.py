"""Scripted experts for some of ManiSkill's own tasks: the next action of a world, from its state alone.

For arms with a parallel gripper under `pd_ee_delta_pose`, whose actions are fractions of 0.1 m and 0.1 rad.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from rove.envs.rotations import tensor_matrix, yaw_of
from rove.errors import RoveError

REACH = 0.1
"""Metres and radians that an action of 1 stands for."""
OPEN, CLOSE = 1.0, -1.0
AHEAD, UP = np.array([1.0, 0.0, 0.0]), np.array([0.0, 0.0, 1.0])
HOVER = 0.08
"""Metres above an object at which the hand approaches it."""


class Want(NamedTuple):
    """Pose that the hand is to go to."""

    place: np.ndarray
    """Point [3] between the fingertips, metres."""
    grip: float
    yaw: float | None = None
    """Yaw of the object's side that the fingers close across, rad; None: as it is."""


def _at(thing: Any, row: int) -> np.ndarray:
    return _doubles(thing.pose.p[row])


def _doubles(values: Any) -> np.ndarray:
    return values.cpu().numpy().astype(np.float64)


def _grasp(env: Any, row: int, thing: Any, hand: np.ndarray) -> Want | None:
    """Go above the thing, down, close; None while it is held."""
    if bool(env.agent.is_grasping(thing)[row]):
        return None
    place, yaw = _at(thing, row), float(yaw_of(_doubles(thing.pose.q[row])))
    off = np.linalg.norm(hand[:2] - place[:2])
    if off > 0.012 and hand[2] < place[2] + HOVER - 0.02:
        return Want(np.array([*hand[:2], place[2] + HOVER]) if off > 0.02 else place, OPEN, yaw)
    if off > 0.012:
        return Want(place + UP * HOVER, OPEN, yaw)
    return Want(place, CLOSE if hand[2] < place[2] + 0.012 else OPEN, yaw)


def _pick_cube(env: Any, row: int, hand: np.ndarray) -> Want:
    if (want := _grasp(env, row, env.cube, hand)) is not None:
        return want
    return Want(hand + _at(env.goal_site, row) - _at(env.cube, row), CLOSE)


def _stack_cube(env: Any, row: int, hand: np.ndarray) -> Want:
    a, b = _at(env.cubeA, row), _at(env.cubeB, row)
    side = 2 * float(env.cube_half_size[-1])
    goal = b + UP * side
    on_top = np.linalg.norm((a - b)[:2]) < 0.012 and abs(a[2] - b[2] - side) < 0.006
    if on_top:
        let_go = env.agent.robot.get_qpos()[row, -1] >= 0.035
        return Want(hand + UP * (0.05 if let_go else 0.01), OPEN)
    if (want := _grasp(env, row, env.cubeA, hand)) is not None:
        return want
    shift = goal - a
    if np.linalg.norm(shift[:2]) > 0.006:
        shift[2] = b[2] + side + 0.03 - a[2]
        if a[2] < b[2] + side + 0.015:
            shift[:2] = 0.0
    return Want(hand + shift, CLOSE)


def _push_cube(env: Any, row: int, hand: np.ndarray) -> Want:
    cube, goal = _at(env.obj, row), _at(env.goal_region, row)
    behind = cube - AHEAD * 0.10
    if hand[0] < cube[0] - 0.02 and abs(hand[1] - cube[1]) < 0.015 and hand[2] < cube[2] + 0.03:
        return Want(np.array([min(goal[0] - 0.02, hand[0] + 0.06), cube[1], cube[2]]), CLOSE)
    if np.linalg.norm((hand - behind)[:2]) < 0.02:
        return Want(behind, CLOSE)
    return Want(behind + UP * HOVER, CLOSE)


def _pull_cube(env: Any, row: int, hand: np.ndarray) -> Want:
    cube, goal = _at(env.obj, row), _at(env.goal_region, row)
    beyond = cube + AHEAD * 0.08
    if hand[0] > cube[0] + 0.02 and abs(hand[1] - cube[1]) < 0.02 and hand[2] < cube[2] + 0.03:
        return Want(np.array([max(goal[0] + 0.02, hand[0] - 0.06), cube[1], cube[2]]), CLOSE)
    if np.linalg.norm((hand - beyond)[:2]) < 0.02:
        return Want(beyond, CLOSE)
    return Want(beyond + UP * HOVER, CLOSE)


def _place_sphere(env: Any, row: int, hand: np.ndarray) -> Want:
    ball, bin_ = _at(env.obj, row), _at(env.bin, row)
    over = np.linalg.norm((ball - bin_)[:2]) < 0.008
    if over and ball[2] < bin_[2] + 0.045:
        return Want(hand, OPEN)
    if (want := _grasp(env, row, env.obj, hand)) is not None:
        return Want(want.place, want.grip)
    shift = bin_ - ball
    shift[2] = 0.0 if over else max(bin_[2] + 0.08 - ball[2], 0.0)
    if not over and ball[2] < bin_[2] + 0.06:
        shift[:2] = 0.0
    if over:
        shift[2] = bin_[2] + 0.035 - ball[2]
    return Want(hand + shift, CLOSE)


_EXPERTS: dict[str, Callable[[Any, int, np.ndarray], Want]] = {
    "PickCube-v1": _pick_cube,
    "StackCube-v1": _stack_cube,
    "PushCube-v1": _push_cube,
    "PullCube-v1": _pull_cube,
    "PlaceSphere-v1": _place_sphere,
}


def stock(task: str, env: Any, row: int, elapsed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the next action [7], and how far noise may push it [7]; see `world.ManiSkillTask.expert`.

    Raises RoveError where the task has no expert, or the control mode is another.
    """
    if task not in _EXPERTS or env.control_mode != "pd_ee_delta_pose":
        raise RoveError(
            f"There is no scripted expert for {task} under {env.control_mode!r}. There are experts under "
            f"'pd_ee_delta_pose' for {', '.join(_EXPERTS)}."
        )
    tcp = env.agent.tcp.pose
    hand = _doubles(tcp.p[row])
    want = _EXPERTS[task](env, row, hand)
    step = np.clip((want.place - hand) / REACH, -1.0, 1.0)
    turn = 0.0
    if want.yaw is not None:  # a cube looks the same after a quarter turn
        fingers = _doubles(tensor_matrix(tcp.q[row].double())[:, 1])  # they close along y of the hand
        turn = -(want.yaw - float(np.arctan2(fingers[1], fingers[0]))) % (np.pi / 2)
        turn = turn - np.pi / 2 if turn > np.pi / 4 else turn
    action = np.array([*step, 0.0, 0.0, np.clip(-turn / REACH, -1.0, 1.0), want.grip])
    freedom = 0.3 * min(1.0, float(np.linalg.norm(want.place - hand)) / 0.1)
    return action, np.array([freedom] * 3 + [0.0] * 4)
