"""Proximal policy optimisation (Schulman et al. 2017) with a critic, for slots that refill as episodes end.

rounds ─ bootstrap ─ gae ─▶ rows of executed chunks ─ normalise over all of them ─▶ TrainBatch ─▶ loss
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Tensor

from rove.algorithms import advantages, batching, losses
from rove.algorithms.masking import per_chunk
from rove.types import PolicyOutput, TrainBatch, Trajectory

if TYPE_CHECKING:
    from rove.config.schema import PPO


def wants_more(rounds: Sequence[Trajectory], config: PPO, num_envs: int) -> bool:
    """Ask for one rollout an iteration."""
    return not rounds


def prepare(rounds: Sequence[Trajectory], config: PPO) -> tuple[TrainBatch, dict[str, float]]:
    """Compute advantages and returns of every executed action, as rows.

    With `bootstrap="truncated"` a rollout's `final_value` is read where an episode was truncated; with
    "always" at every end, so the collector must fill it there too. Raises ValueError without values.
    """
    batch = batching.cat([_rows(trajectory, config) for trajectory in rounds])
    assert batch.value is not None
    assert batch.returns is not None
    mask = _mask_like(batch.mask, batch.advantage)
    counted = batch.advantage[mask]
    metrics = {
        "train/advantage_mean": float(counted.mean()) if counted.numel() else 0.0,
        "train/advantage_std": float(counted.std()) if counted.numel() > 1 else 0.0,
        "train/return_mean": float(batch.returns[mask].mean()) if counted.numel() else 0.0,
        "train/explained_variance": advantages.explained_variance(batch.value, batch.returns, mask),
    }
    if config.normalize_advantage:
        batch = replace(batch, advantage=advantages.normalize(batch.advantage, mask))
    return batch, metrics


def loss(
    output: PolicyOutput,
    batch: TrainBatch,
    config: PPO,
    *,
    denominator: float,
    value_denominator: float,
    reference: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Clipped surrogate + value_coef · value loss − entropy_coef · entropy; see `Algorithm.loss`.

    `reference` is not used: PPO has no KL term.
    """
    assert output.value is not None
    assert batch.value is not None
    assert batch.returns is not None
    policy, metrics = losses.policy_loss(
        output.logprob,
        batch.logprob,
        batch.advantage,
        batch.mask,
        level=config.ratio_level,
        clip_low=config.clip_low,
        clip_high=config.clip_high,
        dual_clip=config.dual_clip,
        proximal=batch.proximal,
        max_behavior_weight=config.max_behavior_weight,
        denominator=denominator,
    )
    value, value_metrics = losses.value_loss(
        output.value,
        batch.value,
        batch.returns,
        _mask_like(batch.mask, batch.value),
        clip=config.value_clip,
        huber_delta=config.huber_delta,
        denominator=value_denominator,
    )
    entropy = losses.token_mean(output.entropy, batch.mask, level=config.ratio_level, denominator=denominator)
    total = policy + config.value_coef * value
    if config.entropy_coef:
        total = total - config.entropy_coef * entropy
    return total, metrics | value_metrics | {"entropy": entropy.detach()}


def _rows(trajectory: Trajectory, config: PPO) -> TrainBatch:
    if trajectory.value is None or trajectory.final_value is None:
        raise ValueError("PPO needs a critic, but the rollout has no values: give the policy a value head")
    always = config.bootstrap == "always"
    ended = trajectory.done if always else trajectory.truncated & ~trajectory.terminated
    advantage, returns = advantages.gae(
        advantages.bootstrap(trajectory.reward, trajectory.final_value, ended, gamma=config.gamma),
        trajectory.value,
        trajectory.done,
        gamma=config.gamma,
        lam=config.lam,
        level=config.advantage_level,
    )
    mask = per_chunk(trajectory.executed) if config.ratio_level == "chunk" else trajectory.executed
    return batching.flatten(trajectory, advantage=advantage, mask=mask, returns=returns)


def _mask_like(mask: Tensor, like: Tensor) -> Tensor:
    """Return the mask at the level of `like` ([N, C] or [N, 1])."""
    return mask if mask.shape == like.shape else per_chunk(mask)
