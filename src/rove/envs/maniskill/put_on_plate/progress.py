"""Grasped, on target, and progress: pure functions on batches of n worlds."""

from __future__ import annotations

import torch
from torch import Tensor

from rove.envs.rotations import tensor_matrix

GRASP_FORCE, GRASP_ANGLE = 0.5, 85.0
"""Least force of a finger, newtons, and greatest angle between it and the way the finger opens, degrees."""
HELD_FOR = 5
"""Consecutive actions of a grasp that count as held."""
MARGIN, SLACK = 0.01, 0.05
"""Metres: how far beyond the receptacle's border, and how far above it, the source may be."""
TOUCH_FORCE = 0.03
"""Least force between source and receptacle, newtons."""
SHAPED = (0.1, 0.1, 1.0)
"""Potential of a grasp, of one that was held, and of success after a grasp."""

TIP = 0.012
"""Metres from the end effector's frame to the fingertips, along the way the hand points."""
BELOW, DEEP, FLOOR = 0.012, 0.030, 0.004
"""Metres: how far below its middle an object is grasped; below its top at most, where the palm lies on it;
above its bottom at least."""
OVER, CARRY_OVER = 0.05, 0.035
"""Metres above its goal at which the hand, or what it carries, may come near from the side."""
GRIP = 0.05
"""Metres of way that opening or closing the gripper counts for."""
FULL_WAY = 0.8
"""Metres of way that the dense potential counts as all."""


def extents(quaternion: Tensor, size: Tensor) -> Tensor:
    """Return what turned boxes of `size` [n, 3] take up along the world's axes, [n, 3] metres."""
    return (tensor_matrix(quaternion).abs() @ size[..., None])[..., 0]


def grasped(left: Tensor, right: Tensor, left_axis: Tensor, right_axis: Tensor) -> Tensor:
    """Tell where both fingers press on the source, against the way they open, bool [n].

    `left` and `right` [n, 3] are the contact forces, newtons; the axes [n, 3] point where a finger opens.
    """
    presses = []
    for force, axis in ((left, left_axis), (right, right_axis)):
        size = force.norm(dim=-1)
        cosine = (force * axis).sum(-1) / (size * axis.norm(dim=-1)).clamp_min(1e-12)
        angle = torch.rad2deg(torch.acos(cosine.clamp(-1.0, 1.0)))
        presses.append((size >= GRASP_FORCE) & (angle <= GRASP_ANGLE))
    return presses[0] & presses[1]


def on_target(
    source: Tensor, receptacle: Tensor, source_extents: Tensor, receptacle_extents: Tensor, force: Tensor
) -> Tensor:
    """Tell where the source rests on the receptacle, bool [n]; it may still be held.

    Positions and extents [n, 3] in metres, `force` [n, 3] between the two in newtons.
    """
    offset = source - receptacle
    near = offset[:, :2].norm(dim=-1) <= receptacle_extents.amax(-1) / 2 + MARGIN
    above = offset[:, 2] - receptacle_extents[:, 2] / 2 - source_extents[:, 2] / 2
    return near & (offset[:, 2] > 0) & (above <= SLACK) & (force.norm(dim=-1) > TOUCH_FORCE)


def potential(grasped_once: Tensor, held_once: Tensor, success: Tensor) -> Tensor:
    """Return the potential [n], 0 to 1.2. A reward is its change; its first value is 0."""
    a, b, c = SHAPED
    return a * grasped_once.float() + b * held_once.float() + c * (success & grasped_once).float()


def way_left(
    hand: Tensor,
    opened: Tensor,
    source: Tensor,
    receptacle: Tensor,
    source_extents: Tensor,
    receptacle_extents: Tensor,
    held: Tensor,
) -> Tensor:
    """Return what the hand still has to do, as a way: over the source, down, grasp, lift, over, down.

    `hand` [n, 3] is the point between the fingertips, `opened` and `held` bool [n]; the rest as `on_target`.
    """
    half = source_extents[:, 2] / 2
    off = (hand - source)[:, :2].norm(dim=-1)
    low = torch.maximum((half - DEEP).clamp_min(-BELOW), FLOOR - half)
    above = hand[:, 2] - source[:, 2] - low
    # A hand that closes too early has to open again.
    ready = opened | ((off < 0.02) & (above < 0.015))
    reach = (off - 0.006).clamp_min(0.0) + _descent(off, above, OVER) + torch.where(ready, GRIP, 2 * GRIP)
    shift = (source - receptacle)[:, :2].norm(dim=-1)
    above = (source - receptacle)[:, 2] - receptacle_extents[:, 2] / 2 - half
    carry = (shift - 0.006).clamp_min(0.0) + _descent(shift, above, CARRY_OVER)
    return torch.where(held, 0.0, reach) + carry


def _descent(off: Tensor, above: Tensor, clearance: float) -> Tensor:
    """Return the way up and down of what is `above` its goal and `off` to the side of it, metres: a
    funnel."""
    needed = clearance * ((off - 0.012) / 0.03).clamp(0.0, 1.0)
    return torch.maximum(above, needed) + (needed - above).clamp_min(0.0)


def dense_potential(way: Tensor, success: Tensor) -> Tensor:
    """Return the potential [n], -1 to 1: minus the `way` left [n] in metres, until success, which is worth 1.

    Unlike `potential` it pays for each action what it brings, at once; it is not the published reward.
    """
    return torch.where(success, 1.0, -(way / FULL_WAY).clamp(0.0, 1.0))
