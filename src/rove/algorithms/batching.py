"""Conversion of rollouts [T, B, …] to rows [N, …]: only chunks in which something counts become rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace

import torch
from torch import Tensor

from rove.types import Observation, TrainBatch, Trajectory


def flatten(
    trajectory: Trajectory,
    *,
    advantage: Tensor,
    mask: Tensor,
    returns: Tensor | None = None,
    episode_length: Tensor | None = None,
    horizon: int | None = None,
) -> TrainBatch:
    """Return the chunks of a rollout of which anything counts, in order of t, then slot.

    advantage, mask, returns: [T, B, C] or [T, B, 1]; episode_length: int64 [B]; horizon: actions.
    """
    t = trajectory.shape[0]
    kept = mask.any(-1).flatten().nonzero().squeeze(1)

    def rows(x: Tensor) -> Tensor:
        return x.flatten(0, 1)[kept]

    return TrainBatch(
        observation=trajectory.observation.select(kept),
        sample=rows(trajectory.sample),
        logprob=rows(trajectory.logprob),
        advantage=rows(advantage),
        mask=rows(mask),
        returns=None if returns is None else rows(returns),
        value=None if returns is None or trajectory.value is None else rows(trajectory.value[:-1]),
        episode_length=None if episode_length is None else rows(episode_length.expand(t, -1)[..., None]),
        horizon=horizon,
        version=trajectory.version,
    )


def cat(parts: Sequence[TrainBatch]) -> TrainBatch:
    """Concatenate the rows of all parts; other fields must agree, and are the first part's."""
    if len(parts) == 1:
        return parts[0]
    joined = {
        f.name: torch.cat([getattr(part, f.name) for part in parts])
        for f in fields(TrainBatch)
        if isinstance(getattr(parts[0], f.name), Tensor)
    }
    versions = [part.version for part in parts if part.version is not None]
    return replace(
        parts[0],
        observation=Observation.cat([part.observation for part in parts]),
        version=min(versions, default=None),
        **joined,
    )
