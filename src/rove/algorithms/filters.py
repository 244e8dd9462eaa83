"""Filters that choose the groups of episodes worth training on."""

from __future__ import annotations

import torch
from torch import Tensor

from rove.types import Trajectory


def slot_success(trajectory: Trajectory) -> Tensor:
    """Return whether the first episode of each slot succeeded, bool [B]; an unfinished one has not."""
    success: dict[int, bool] = {}
    for record in trajectory.finished:
        success.setdefault(record.slot, record.success)
    return torch.tensor([success.get(slot, False) for slot in range(trajectory.shape[1])], dtype=torch.bool)


def informative_groups(
    success: Tensor,
    score: Tensor,
    group_size: int,
    *,
    keep_low: float,
    keep_high: float,
    keep_uniform: bool = False,
) -> Tensor:
    """Select groups with a success rate in [keep_low, keep_high] whose members do not all score alike.

    A uniform group has zero advantage throughout: it would cost a forward and backward pass and teach
    nothing (Yu et al. 2025, section 3.2); with `keep_uniform` it is selected all the same. success: bool [B];
    score: float [B]; groups are consecutive.
    Returns bool [B / G].
    """
    scores = score.reshape(-1, group_size)
    rate = success.reshape(-1, group_size).double().mean(1)
    varied = scores.amax(1) > scores.amin(1)
    return (varied | keep_uniform) & (rate >= keep_low) & (rate <= keep_high)
