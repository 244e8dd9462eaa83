"""Policy × environment → Trajectory. Knows no algorithm: it fills T chunks and says what happened.

    observation ─ act ─▶ ActionChunk ─ step_chunk ─▶ ChunkResult ─▶ buffer row t
         ▲                                              │
         └──────────── observation after ◀──────────────┘

Idle slots cost neither inference nor simulation. Values of observations that nothing acted on (after the
last chunk, and at the end of truncated episodes) are computed for the rows that need them, in one batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from rove.envs.base import Brancher, VectorEnv
from rove.envs.sampler import EpisodeSampler
from rove.errors import RoveError
from rove.policies.actions import ActionConverter
from rove.policies.base import Policy, SamplingNoise
from rove.rollout.buffer import RolloutBuffer
from rove.timing import Stopwatch
from rove.types import ActionChunk, ActionSpec, Finals, Observation, Trajectory

FINALS: dict[str | None, Finals] = {None: "none", "truncated": "truncated", "always": "ended"}


class Collector:
    """Steps one environment with one policy; an episode in flight goes on in the next rollout.

    `bootstrap` says which ends are followed by the value of their last observation; None without a critic.
    `branches` chunks are tried in each state, and the first of them carried on.
    """

    def __init__(
        self,
        env: VectorEnv,
        policy: Policy,
        sampler: EpisodeSampler,
        *,
        chunks: int,
        seed: int,
        bootstrap: Literal["truncated", "always"] | None,
        branches: int = 1,
    ) -> None:
        """Raises RoveError where chunks are to be tried in an environment that cannot."""
        if branches > 1 and not isinstance(env, Brancher):
            raise RoveError(
                f"The environment of {env.suite.name!r} cannot try chunks and put everything back, as vine "
                "sampling does; choose --algorithm ppo or grpo."
            )
        self.branches = branches
        self.env, self.policy, self.sampler = env, policy, sampler
        self.chunks, self.seed = chunks, seed
        self.critic = bootstrap is not None
        env.finals = FINALS[bootstrap]
        self.observation: Observation | None = None

    def collect(
        self, version: int, watch: Stopwatch, on_chunk: Callable[[], None] = lambda: None
    ) -> Trajectory:
        """One rollout of T chunks; `version` numbers the weights that act."""
        env = self.env
        observation = self._begin(watch)
        buffer = RolloutBuffer(self.chunks, env.num_envs, env.chunk, self.policy.action_spec.dim)
        finals: list[tuple[int, Tensor]] = []
        final_observations: list[Observation] = []
        for t in range(self.chunks):
            rows = running(env)
            if not len(rows):
                break
            with watch("inference"):
                chunk = act_rows(self.policy, env, observation, rows, self.seed, self._samples)
            tried, chunk = chunk, first(chunk) if self._samples else chunk
            buffer.put_action(t, observation, rows, chunk)
            with watch("simulation"):
                self._refill()
                others = self._try(tried, rows)
                result = env.step_chunk(scatter(chunk.actions, rows, env))
            buffer.put_result(t, result)
            if others is not None:
                came = zip((result.reward, result.executed), others, strict=True)
                buffer.put_branches(t, rows, tried, *(torch.cat((x[:, None], y), 1) for x, y in came))
            if self.critic and result.final_observation is not None:
                finals.append((t, result.final_slots))
                final_observations.append(result.final_observation)
            observation = result.observation
            on_chunk()
        self.observation = observation
        if self.critic:
            with watch("inference"):
                self._bootstrap(buffer, observation, finals, final_observations)
        return buffer.trajectory(version)

    @property
    def _samples(self) -> int | None:
        return self.branches if self.branches > 1 else None

    def _try(self, tried: ActionChunk, rows: Tensor) -> tuple[Tensor, Tensor] | None:
        """Reward and executed, [B, G - 1, C], of all tries but the first."""
        if self._samples is None:
            return None
        assert isinstance(self.env, Brancher)
        return self.env.try_chunks(scatter(tried.actions[:, 1:], rows, self.env))

    def _begin(self, watch: Stopwatch) -> Observation:
        if self.observation is not None and self.env.autoreset == "refill":
            return self.observation
        with watch("simulation"):
            return self.env.reset(self.sampler.take(self.env.num_envs))

    def _refill(self) -> None:
        missing = self.env.num_envs - self.env.queued
        if self.env.autoreset == "refill" and missing > 0:
            self.env.enqueue(self.sampler.take(missing))

    def _bootstrap(
        self,
        buffer: RolloutBuffer,
        observation: Observation,
        finals: list[tuple[int, Tensor]],
        final_observations: list[Observation],
    ) -> None:
        rows = running(self.env)
        wanted = ([observation.select(rows)] if len(rows) else []) + final_observations
        if wanted:
            with torch.inference_mode():
                value = self.policy.value(Observation.cat(wanted))
            buffer.put_values(rows, finals, value)


def running(env: VectorEnv) -> Tensor:
    """int64 [R]: the slots that run an episode."""
    return torch.tensor([b for b, spec in enumerate(env.specs) if spec is not None], dtype=torch.long)


def act_rows(
    policy: Policy,
    env: VectorEnv,
    observation: Observation,
    rows: Tensor,
    seed: int | None,
    samples: int | None = None,
) -> ActionChunk:
    """Act for the running slots only; without a seed, greedily. R rows, in the environment's convention."""
    seen = observation if len(rows) == env.num_envs else observation.select(rows)
    noise = None
    if seed is not None:
        specs = env.specs
        episode = torch.tensor([spec.seed for b in rows.tolist() if (spec := specs[b]) is not None])
        noise = SamplingNoise(seed, episode, env.elapsed[rows] // env.chunk)
    with torch.inference_mode():
        if noise is not None and samples:  # asked for by branches only: a policy need not know of them
            chunk = policy.act(seen, "sample", noise, samples)
        else:
            chunk = policy.act(seen, "greedy" if noise is None else "sample", noise)
    if policy.action_spec == env.action_spec:
        return chunk
    return replace(chunk, actions=_converter(policy.action_spec, env.action_spec)(chunk.actions))


@cache
def _converter(source: ActionSpec, target: ActionSpec) -> ActionConverter:
    return ActionConverter(source, target)


def scatter(actions: Tensor, rows: Tensor, env: VectorEnv) -> Tensor:
    """[R, ...] of the running slots → [B, ...], zeros elsewhere."""
    if len(rows) == env.num_envs:
        return actions
    full = torch.zeros(env.num_envs, *actions.shape[1:], dtype=actions.dtype)
    full[rows] = actions.cpu()
    return full


def first(tried: ActionChunk) -> ActionChunk:
    """The first of the G samples of each row."""
    return ActionChunk(tried.actions[:, 0], tried.tokens[:, 0], tried.logprob[:, 0], tried.value)
