"""A scripted expert that sees the privileged state: the next action of every slot, from its state alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from rove.envs.tabletop import robot
from rove.envs.tabletop.progress import GRASP, PICK, PUSH, PUT, Situation, inside

HOVER = 0.075
"""Fingertip height at which the hand clears every object that stands on the table."""
OVER = 0.060
"""Height of what is carried, which then clears them too."""
BEHIND = 0.062
"""Distance behind the object's centre at which a push begins."""
PUSH_STEP = 0.035
"""Metres that a push goes in an action."""
OPEN, CLOSE = 1.0, -1.0
APPROACH, CARRY = 3, 4
"""Actions over which the way to the target, and that to its destination, is divided."""
SLIP = 0.03
"""Metres by which the expert misses when it slips: the hand then closes on nothing, or lets go beside the
goal."""


def _wrap(angle: np.ndarray, period: np.ndarray) -> np.ndarray:
    """Return the equivalent angle in [-period/2, period/2]; zero where the period is zero (any angle will
    do)."""
    safe = np.where(period > 0, period, 1.0)
    return np.where(period > 0, angle - safe * np.round(angle / safe), 0.0)


def _grasp(
    s: Situation, pose: np.ndarray, turn: np.ndarray, late: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Go above the target, down, close: wanted pose [n, 4] and gripper command [n]."""
    off = np.linalg.norm(s.target[:, :2] - s.gripper[:, :2], axis=-1)
    aligned = late & (off < 0.02) & (np.abs(turn) < 0.25)
    low = GRASP + s.height
    height = np.where(aligned, low, HOVER + s.height)
    # A hand that is low beside the target goes up first: it would sweep the table on a straight way.
    stuck = (off > 0.03) & (s.gripper[:, 2] < s.height + 0.05)
    xy = np.where(stuck[:, None], pose[:, :2], s.target[:, :2])
    want = np.column_stack([xy, height, pose[:, 3] + turn])
    down = aligned & (s.gripper[:, 2] < low + 0.012) & (off < 0.014)
    return want, np.where(down | (s.held & ~s.open), CLOSE, OPEN)


def _carry(s: Situation, pose: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lift, go over the destination, down, let go, up."""
    grip = s.gripper[:, 2] - s.height  # how far above the object's underside the fingertips hold it
    above = np.maximum(s.destination[:, 2] + 0.035, OVER) + grip
    shift = s.destination[:, :2] - s.target[:, :2]
    over = np.linalg.norm(shift, axis=-1) < np.where(s.family == PUT, 0.020, 0.010)
    clear = s.height > np.maximum(s.destination[:, 2] + 0.018, OVER - 0.018)
    want = pose.copy()
    want[:, :2] = np.where((clear | over)[:, None], s.gripper[:, :2] + shift, pose[:, :2])
    want[:, 2] = np.where(over, s.destination[:, 2] + grip + 0.001, above)
    # An object that has slid up in the grasp is let go from as low as the hand gets.
    lowest = s.gripper[:, 2] < robot.WORKSPACE_LOW[2] + 0.002
    settled = over & ((s.height < s.destination[:, 2] + 0.006) | lowest)
    return want, np.where(settled, OPEN, CLOSE)


def _push(s: Situation, pose: np.ndarray) -> np.ndarray:
    """Go behind the target with a closed fist, down, along the line to the zone: wanted pose [n, 4]."""
    line = s.destination[:, :2] - s.target[:, :2]
    ahead = line / np.maximum(np.linalg.norm(line, axis=-1, keepdims=True), 1e-6)
    offset = s.gripper[:, :2] - s.target[:, :2]
    along = (offset * ahead).sum(-1)
    across = offset[:, 0] * ahead[:, 1] - offset[:, 1] * ahead[:, 0]
    behind = (along < -0.03) & (np.abs(across) < 0.012)
    start = s.target[:, :2] - BEHIND * ahead
    at_start = np.linalg.norm(s.gripper[:, :2] - start, axis=-1) < 0.015
    low = s.gripper[:, 2] < 0.02
    heading = np.arctan2(ahead[:, 1], ahead[:, 0])
    turn = _wrap(heading - pose[:, 3], np.full(len(heading), np.pi / 2))
    push = low & behind
    # Slowly enough that the target neither tips nor slides away from the fist.
    step = np.minimum(np.linalg.norm(line, axis=-1), PUSH_STEP)
    lead = s.gripper[:, :2] + step[:, None] * ahead
    want = np.concatenate([np.where(push[:, None], lead, start), pose[:, 2:]], -1)
    want[:, 2] = np.where(push | at_start, GRASP, HOVER)
    want[:, 3] += np.where(low, 0.0, turn)
    # A fist that has lost its line draws back from the target, which its friction would lift, and up.
    lost = low & ~push & ~at_start
    away = offset / np.maximum(np.linalg.norm(offset, axis=-1, keepdims=True), 1e-6)
    want[:, :2] = np.where(lost[:, None], pose[:, :2] + 0.04 * away, want[:, :2])
    return np.where(inside(s, margin=0.022)[:, None], pose, want)


def mistaken(s: Situation, astray: np.ndarray) -> Situation:
    """Beliefs of the expert when it slips: target and destination are `astray` [n, 2, 2] metres (x and y)
    from where they are, and a closed hand has what it was closed for. Where `astray` is 0 it knows better."""
    slips = astray.any(axis=(1, 2))
    fooled = slips & ~s.held & ~s.open & (s.family != PUSH)
    grasped = s.gripper[:, :3] + np.column_stack([np.zeros_like(s.target[:, :2]), s.half_height - GRASP])
    target, destination = s.target.copy(), s.destination.copy()
    target[:, :2] += np.where(s.held[:, None], 0.0, astray[:, 0])
    destination[:, :2] += astray[:, 1]
    return replace(
        s,
        target=np.where(fooled[:, None], grasped, target),
        destination=destination,
        touched=s.touched | fooled[:, None],
    )


def expert_action(
    s: Situation,
    pose: np.ndarray,
    target_yaw: np.ndarray,
    symmetry: np.ndarray,
    elapsed: np.ndarray,
    held_for: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Return actions [n, 5] for n slots, and how freely [n] the hand moves: 1 on the way, less near its goal.

    `pose` [n, 4] is the commanded gripper pose, `target_yaw` [n] the target's, `symmetry` [n] the angle by
    which turning it changes nothing, `elapsed` and `held_for` [n] the actions since the episode began and
    since the target is held. Long ways are divided evenly over a fixed number of actions: what a chunk has
    to say is then linear in where things are, and a policy learns it from far fewer demonstrations.
    """
    turn = _wrap(target_yaw - pose[:, 3], symmetry)
    want, grip = _grasp(s, pose, turn, elapsed >= APPROACH)
    held = s.held & ~s.open
    lifted = np.concatenate([pose[:, :2], np.full((len(pose), 1), 0.13), pose[:, 3:]], -1)
    carried, carry_grip = _carry(s, pose)
    pick = s.family == PICK
    want = np.where(held[:, None], np.where(pick[:, None], lifted, carried), want)
    grip = np.where(held & ~pick, carry_grip, grip)
    placed = ~pick & (s.family != PUSH) & inside(s) & s.supported & (s.height < s.destination[:, 2] + 0.012)
    retreat = np.concatenate([pose[:, :2], (s.destination[:, 2] + HOVER)[:, None], pose[:, 3:]], -1)
    want = np.where((placed & s.open)[:, None], retreat, want)
    grip = np.where(placed, OPEN, grip)
    pushing = s.family == PUSH
    want = np.where(pushing[:, None], _push(s, pose), want)
    grip = np.where(pushing, CLOSE, grip)
    low, high = np.array(robot.ACTION_SPEC.low), np.array(robot.ACTION_SPEC.high)
    delta = want - pose
    delta /= np.where(held, 1, np.clip(APPROACH - elapsed, 1, None))[:, None]
    left = np.clip(CARRY + 2 - held_for, 1, CARRY)
    delta[:, :2] /= np.where(held & ~pick & ~placed, left, 1)[:, None]
    action = np.clip(np.concatenate([delta, grip[:, None]], -1), low, high)
    distance = np.linalg.norm(want[:, :3] - pose[:, :3], axis=-1)
    freedom = np.where(s.gripper[:, 2] < 0.06, 0.0, distance / high[0])
    return action, np.clip(freedom, 0.15, 1.0) * ~placed
