"""Vine sampling (Schulman et al. 2015, TRPO, section 5.2): compare several chunks from the same state.

    rounds ─ returns within the chunk ─ compare the G from one state ─▶ rows of states ─▶ TrainBatch ─▶ loss

One of the G chunks tried from a state is carried on. Their returns differ only by the actions taken:
comparing them needs no critic, and has a fraction of the noise of comparing episodes. The comparison ends
with the chunk, so vine sampling suits dense rewards, such as potential differences.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rove.algorithms import batching, losses
from rove.algorithms.advantages import branch_relative
from rove.algorithms.masking import per_chunk
from rove.types import PolicyOutput, TrainBatch, Trajectory

if TYPE_CHECKING:
    from rove.config.schema import Vine


def wants_more(rounds: Sequence[Trajectory], config: Vine, num_envs: int) -> bool:
    """Ask for one rollout an iteration."""
    return not rounds


def prepare(rounds: Sequence[Trajectory], config: Vine) -> tuple[TrainBatch, dict[str, float]]:
    """Turn the states in which anything was done into rows, each with its G tries; see `branch_relative`.

    Raises ValueError where a rollout tried nothing.
    """
    parts = [_rows(trajectory, config) for trajectory in rounds]
    batch = batching.cat([part for part, _ in parts])
    spread = torch.cat([spread for _, spread in parts])
    return batch, {"train/branch_spread": float(spread.mean()) if len(spread) else 0.0}


def loss(
    output: PolicyOutput,
    batch: TrainBatch,
    config: Vine,
    *,
    denominator: float,
    value_denominator: float = 1.0,
    reference: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Clipped surrogate − entropy_coef · entropy over all tries; see `Algorithm.loss`.

    `value_denominator` and `reference` are not used: there is no critic and no KL term.
    """
    mask = batch.mask.flatten(0, 1)
    policy, metrics = losses.policy_loss(
        output.logprob.flatten(0, 1),
        batch.logprob.flatten(0, 1),
        batch.advantage.flatten(0, 1),
        mask,
        level=config.ratio_level,
        clip_low=config.clip_low,
        clip_high=config.clip_high,
        dual_clip=config.dual_clip,
        denominator=denominator,
        proximal=None if batch.proximal is None else batch.proximal.flatten(0, 1),
        max_behavior_weight=config.max_behavior_weight,
    )
    entropy = losses.token_mean(
        output.entropy.flatten(0, 1), mask, level=config.ratio_level, denominator=denominator
    )
    total = policy - config.entropy_coef * entropy if config.entropy_coef else policy
    return total, metrics | {"entropy": entropy.detach()}


def _rows(trajectory: Trajectory, config: Vine) -> tuple[TrainBatch, Tensor]:
    """Return the rows of one rollout, and the spread of the returns of their tries, [N]."""
    tried = trajectory.branches
    if tried is None:
        raise ValueError(
            "vine sampling compares branches, but the rollout has none: collect with branches > 1"
        )
    advantage, spread = branch_relative(
        tried.reward, tried.executed, gamma=config.gamma, floor=config.spread_floor
    )
    # From its first action on a chunk's return is all of it.
    chunk = config.ratio_level == "chunk"
    kept = tried.executed.any(-1).any(-1).flatten().nonzero().squeeze(1)

    def rows(x: Tensor) -> Tensor:
        return x.flatten(0, 1)[kept]

    batch = TrainBatch(
        observation=trajectory.observation.select(kept),
        sample=rows(tried.sample),
        logprob=rows(tried.logprob),
        advantage=rows(advantage[..., :1] if chunk else advantage),
        mask=rows(per_chunk(tried.executed) if chunk else tried.executed),
        returns=None,
        value=None,
        episode_length=None,
        version=trajectory.version,
    )
    return batch, rows(spread)
