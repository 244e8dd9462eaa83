"""Advantages: how much better than expected each action was. `done` is true once, where an episode ends."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor


def bootstrap(reward: Tensor, final_value: Tensor, ended: Tensor, *, gamma: float) -> Tensor:
    """Add γ·V(final observation) to the reward of the last action of the episodes that ended.

    An episode cut off by the horizon would have gone on to earn what its final observation is worth
    (Pardo et al. 2018, section 3.1). reward: float [T, B, C]; final_value: float [T, B, 1];
    ended: bool [T, B, C], true at those last actions. Returns float [T, B, C].
    """
    return torch.where(ended, reward + gamma * final_value, reward)


def gae(
    reward: Tensor,
    value: Tensor,
    done: Tensor,
    *,
    gamma: float,
    lam: float,
    level: Literal["action", "chunk"] = "action",
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al. 2016, equations 11 and 16).

    δ_t = r_t + γ·V_{t+1}·(1 − done_t) − V_t and A_t = δ_t + γλ·(1 − done_t)·A_{t+1}; the return is A + V.
    reward: float [T, B, C]; done: bool [T, B, C]. Truncation is unknown here: see `bootstrap`.
    At action level time runs over T·C actions and value is [T + 1, B, C], of which the first entry of the
    last chunk is the value of what comes after the rollout; γ and λ act per action.
    At chunk level rewards are summed within a chunk, any end inside ends it, value is [T + 1, B, 1], and
    γ and λ act per chunk.
    Returns advantage and returns, both [T, B, C], at chunk level [T, B, 1].
    Raises ValueError if the value's shape does not fit the level.
    """
    if level == "chunk":
        reward, done = reward.sum(-1, keepdim=True), done.any(-1, keepdim=True)
    t, b, c = reward.shape
    if value.shape != (t + 1, b, c):
        raise ValueError(
            f"gae at {level} level needs value of shape [T + 1, B, {'1' if level == 'chunk' else 'C'}] = "
            f"{[t + 1, b, c]}, not {list(value.shape)}: the value head's level must be {level!r} too"
        )
    r, running = _by_step(reward), 1.0 - _by_step(done).to(reward.dtype)
    v = _by_step(value)[: t * c + 1]
    delta = r + gamma * v[1:] * running - v[:-1]
    advantage = torch.empty_like(delta)
    ahead = torch.zeros_like(delta[0])
    for step in reversed(range(t * c)):
        ahead = delta[step] + gamma * lam * running[step] * ahead
        advantage[step] = ahead
    advantage = advantage.reshape(t, c, b).transpose(1, 2)
    return advantage, advantage + value[:-1]


def _by_step(x: Tensor) -> Tensor:
    """Reorder [T, B, C] to [T·C, B], in the order in which actions are executed."""
    return x.transpose(1, 2).flatten(0, 1)


def group_relative(score: Tensor, group_size: int) -> Tensor:
    """Standardise scores, (s − mean)/(std + 1e-6), in consecutive groups (Shao et al. 2024, section 4.1.2).

    score: float [B], one an episode; the standard deviation is unbiased. Returns float [B]: zero where all
    members of a group score alike. Raises ValueError unless group_size ≥ 2 divides B.
    """
    if group_size < 2 or score.shape[0] % group_size:
        raise ValueError(
            f"{score.shape[0]} episodes cannot form groups of {group_size}: "
            "a group has at least 2 members, and the group size divides the number of episodes"
        )
    groups = score.reshape(-1, group_size)
    centred = groups - groups.mean(1, keepdim=True)
    std = (centred.square().sum(1, keepdim=True) / (group_size - 1)).sqrt()
    return (centred / (std + 1e-6)).flatten()


def branch_relative(reward: Tensor, executed: Tensor, *, gamma: float, floor: float) -> tuple[Tensor, Tensor]:
    """Compare the return of each action of G chunks tried from one state with the others'.

    reward: float [..., G, C]; executed: bool, the same shape. The discounted rewards from an action to the
    end of its chunk, minus their mean over the tries that still acted then, over their standard deviation
    (unbiased) plus `floor`, in units of reward: tries that end alike but for less than that say little.
    Returns the advantage [..., G, C], zero where nothing was executed, and the standard deviation at the
    first action, [...].
    """
    to_go = torch.zeros_like(reward)
    ahead = torch.zeros_like(reward[..., 0])
    for c in reversed(range(reward.shape[-1])):
        ahead = to_go[..., c] = reward[..., c] + gamma * ahead
    count = executed.sum(-2, keepdim=True)
    mean = (to_go * executed).sum(-2, keepdim=True) / count.clamp_min(1)
    centred = (to_go - mean) * executed
    std = (centred.square().sum(-2, keepdim=True) / (count - 1).clamp_min(1)).sqrt()
    return centred / (std + floor), std[..., 0, 0]


def normalize(advantage: Tensor, mask: Tensor) -> Tensor:
    """Standardise to (A − mean)/(std + 1e-5), statistics over masked entries; every entry is transformed.

    advantage: float, any shape; mask: bool, the same shape. Fewer than two masked entries have no spread:
    they are only centred.
    """
    picked = advantage[mask].double()
    count = picked.numel()
    mean = picked.mean() if count else 0.0
    std = picked.std() if count > 1 else 1.0
    return ((advantage - mean) / (std + 1e-5)).to(advantage.dtype)


def explained_variance(value: Tensor, returns: Tensor, mask: Tensor) -> float:
    """1 − Var(returns − value)/Var(returns) over the masked entries: 1 is a perfect critic, 0 a constant one.

    `value`, `returns` and the mask have one shape. The result is zero where the returns do not vary.
    """
    target, error = returns[mask], (returns - value)[mask]
    if target.numel() < 2 or target.var() == 0:
        return 0.0
    return float(1 - error.var() / target.var())
