"""Group-relative policy optimisation (Shao et al. 2024, section 4.1): groups of episodes, no critic.

    rounds ─ keep informative groups ─ score ─ group_relative ─▶ rows of executed chunks ─▶ TrainBatch ─▶ loss

A slot's first episode counts; slots come in groups of G consecutive ones, from one task and initial state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Tensor

from rove.algorithms import batching, losses
from rove.algorithms.advantages import group_relative
from rove.algorithms.filters import informative_groups, slot_success
from rove.algorithms.masking import episode_mask, per_chunk
from rove.types import PolicyOutput, TrainBatch, Trajectory

if TYPE_CHECKING:
    from rove.config.schema import GRPO


def wants_more(rounds: Sequence[Trajectory], config: GRPO, num_envs: int) -> bool:
    """Ask for rollouts until kept episodes fill the environments once, at most `max_rounds` (dynamic
    sampling, Yu et al. 2025, section 3.2)."""
    if not rounds:
        return True
    kept = sum(len(_kept_slots(trajectory, config)) for trajectory in rounds)
    return kept < num_envs and len(rounds) < config.max_rounds


def filter(trajectory: Trajectory, config: GRPO) -> Trajectory:
    """Keep only the slots of informative groups; where all groups are, return the very same trajectory."""
    kept = _kept_slots(trajectory, config)
    return trajectory if len(kept) == trajectory.shape[1] else trajectory.slots(kept)


def prepare(rounds: Sequence[Trajectory], config: GRPO) -> tuple[TrainBatch, dict[str, float]]:
    """Turn the executed chunks of the kept groups' episodes into rows; no row where no group is kept.

    The denominator of the length-normalised loss stays kept episodes × horizon × elements per action slot,
    executed or not; without length normalisation it is left to the mask.
    """
    kept = [filter(trajectory, config) for trajectory in rounds]
    batch = batching.cat([_rows(trajectory, config) for trajectory in kept])
    sampled, episodes = (sum(part.shape[1] for part in parts) for parts in (rounds, kept))
    if batch.horizon is not None:
        batch = replace(batch, denominator=episodes * batch.horizon * _elements_per_action(batch, config))
    return batch, {
        "rollout/groups": sampled // config.group_size,
        "rollout/kept_groups": episodes // config.group_size,
        "rollout/kept_fraction": episodes / sampled,
        "rollout/rounds": len(rounds),
    }


def loss(
    output: PolicyOutput,
    batch: TrainBatch,
    config: GRPO,
    *,
    denominator: float,
    value_denominator: float = 1.0,
    reference: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Clipped surrogate − entropy_coef · entropy + kl_coef · KL(policy ‖ reference); see `Algorithm.loss`.

    `value_denominator` is not used: GRPO has no critic. `reference` is needed where kl_coef is not 0.
    """
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
        episode_length=batch.episode_length,
        horizon=batch.horizon,
        denominator=denominator,
    )

    def token_mean(x: Tensor) -> Tensor:
        return losses.token_mean(
            x,
            batch.mask,
            level=config.ratio_level,
            episode_length=batch.episode_length,
            horizon=batch.horizon,
            denominator=denominator,
        )

    total = policy
    entropy = token_mean(output.entropy)
    metrics["entropy"] = entropy.detach()
    if config.entropy_coef:
        total = total - config.entropy_coef * entropy
    if config.kl_coef:
        if reference is None:
            raise ValueError("kl_coef is not 0: the loss needs the reference policy's log-probabilities")
        kl = token_mean(losses.kl_estimate(output.logprob, reference))
        metrics["kl_reference"] = kl.detach()
        total = total + config.kl_coef * kl
    return total, metrics


def _first_episodes(trajectory: Trajectory) -> tuple[Tensor, Tensor]:
    """Return each slot's first episode: executed actions, bool [T, B, C], and return, float [B]."""
    mask = episode_mask(trajectory.done)[0] & trajectory.executed
    return mask, (trajectory.reward * mask).sum((0, 2))


def _kept_slots(trajectory: Trajectory, config: GRPO) -> Tensor:
    """Return the slots of the groups to train on, int64 [B']."""
    groups = informative_groups(
        slot_success(trajectory),
        _first_episodes(trajectory)[1],
        config.group_size,
        keep_low=config.keep_low,
        keep_high=config.keep_high,
        keep_uniform=getattr(config, "keep_uniform", False),
    )
    return groups.repeat_interleave(config.group_size).nonzero().squeeze(1)


def _rows(trajectory: Trajectory, config: GRPO) -> TrainBatch:
    t, _, c = trajectory.shape
    mask, score = _first_episodes(trajectory)
    # Settings of one's own, which come here as well, need not have the switches that studies compare with.
    if not getattr(config, "valid_action_mask", True):
        mask = per_chunk(mask).expand_as(mask)
    normalized = config.length_normalization
    return batching.flatten(
        trajectory,
        advantage=group_relative(score, config.group_size).expand(t, -1)[..., None],
        mask=per_chunk(mask) if config.ratio_level == "chunk" else mask,
        episode_length=mask.sum((0, 2)) if normalized else None,
        horizon=t * c if normalized else None,
    )


def _elements_per_action(batch: TrainBatch, config: GRPO) -> float:
    """Return the number of ratios per action slot: A for tokens, 1 for actions, 1/C for chunks."""
    _, c, a = batch.logprob.shape
    return {"token": a, "action": 1, "chunk": 1 / c}[config.ratio_level]
