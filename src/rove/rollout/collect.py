"""One environment and one policy in turn, as an evaluation steps them; rollouts go through `pipeline`."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import torch
from torch import Tensor

from rove import transfer
from rove.envs.base import VectorEnv
from rove.errors import RoveError
from rove.policies.actions import ActionConverter
from rove.policies.base import ActingPolicy, SamplingNoise
from rove.types import ActionChunk, ActionSpec, Mode, Observation


def running(env: VectorEnv) -> Tensor:
    """int64 [R]: the slots that run an episode."""
    return torch.tensor([b for b, spec in enumerate(env.specs) if spec is not None], dtype=torch.long)


def act_rows(
    policy: ActingPolicy, env: VectorEnv, observation: Observation, rows: Tensor, mode: Mode, seed: int
) -> ActionChunk:
    """Act for the running slots only. R rows, in the environment's convention."""
    seen = observation if len(rows) == env.num_envs else observation.select(rows)
    specs = env.specs
    episode = torch.tensor([spec.seed for b in rows.tolist() if (spec := specs[b]) is not None])
    noise = SamplingNoise(seed, episode, env.elapsed[rows] // env.chunk)
    chunk = act(policy, env.action_spec, seen, noise, mode=mode)
    refuse_not_finite(chunk, policy, "in an evaluation")
    return chunk


def act(
    policy: ActingPolicy,
    action_spec: ActionSpec,
    observation: Observation,
    noise: SamplingNoise | None,
    samples: int | None = None,
    mode: Mode = "sample",
) -> ActionChunk:
    """Return the actions that the policy chooses, in the convention `action_spec`; on the host, which waits
    for it once. Without `noise` it chooses greedily."""
    with torch.inference_mode():
        if noise is None:
            chunk = policy.act(observation, "greedy")
        elif samples is None:
            chunk = policy.act(observation, mode, noise)
        else:  # a policy of which nobody asks for several need not know of them
            chunk = policy.act(observation, "sample", noise=noise, samples=samples)
        chunk = transfer.to(chunk, "cpu")
    if policy.action_spec == action_spec:
        return chunk
    return replace(chunk, actions=_converter(policy.action_spec, action_spec)(chunk.actions))


def refuse_not_finite(chunk: ActionChunk, policy: ActingPolicy, when: str) -> None:
    """Raise RoveError, naming the policy and saying `when`, where a chunk on the host is not finite."""
    for what, numbers in (("actions", chunk.actions), ("log-probabilities", chunk.logprob)):
        if not bool(numbers.isfinite().all()):
            raise RoveError(
                f"The policy {type(policy).__name__} gave {what} that are not finite {when}: its weights "
                "have diverged, or its number format is too small. Go on from an earlier checkpoint with a "
                "lower training.optim.lr, or with --policy.dtype float32; what was saved until now is whole."
            )


@cache
def _converter(source: ActionSpec, target: ActionSpec) -> ActionConverter:
    return ActionConverter(source, target)


def scatter(actions: Tensor, rows: Tensor, env: VectorEnv) -> Tensor:
    """[R, C, A] of the running slots → [B, C, A], zeros elsewhere."""
    if len(rows) == env.num_envs:
        return actions
    full = torch.zeros(env.num_envs, *actions.shape[1:], dtype=actions.dtype)
    full[rows] = actions
    return full
