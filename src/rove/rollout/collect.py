"""One environment and one policy in turn, as an evaluation steps them; rollouts go through `pipeline`."""

from __future__ import annotations

import torch
from torch import Tensor

from rove.envs.base import VectorEnv
from rove.policies.base import Policy, SamplingNoise
from rove.types import ActionChunk, Observation


def running(env: VectorEnv) -> Tensor:
    """int64 [R]: the slots that run an episode."""
    return torch.tensor([b for b, spec in enumerate(env.specs) if spec is not None], dtype=torch.long)


def act_rows(
    policy: Policy, env: VectorEnv, observation: Observation, rows: Tensor, seed: int | None
) -> ActionChunk:
    """Act for the running slots only; without a seed, greedily. R rows."""
    seen = observation if len(rows) == env.num_envs else observation.select(rows)
    with torch.inference_mode():
        if seed is None:
            return policy.act(seen, "greedy")
        specs = env.specs
        episode = torch.tensor([spec.seed for b in rows.tolist() if (spec := specs[b]) is not None])
        chunk = env.elapsed[rows] // env.chunk
        return policy.act(seen, "sample", SamplingNoise(seed, episode, chunk))


def scatter(actions: Tensor, rows: Tensor, env: VectorEnv) -> Tensor:
    """[R, C, A] of the running slots → [B, C, A], zeros elsewhere."""
    if len(rows) == env.num_envs:
        return actions
    full = torch.zeros(env.num_envs, *actions.shape[1:], dtype=actions.dtype)
    full[rows] = actions.cpu()
    return full
