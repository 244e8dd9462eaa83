"""Runs a Plan in this process: simulation, inference and training take turns on one set of weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rove.algorithms import Algorithm
from rove.config.schema import GRPO, PPO, Run, Vine
from rove.envs import registry as envs
from rove.envs.base import VectorEnv
from rove.envs.sampler import EpisodeSampler
from rove.evaluation.evaluate import evaluate
from rove.placement.plan import Plan
from rove.policies import registry as policies
from rove.rollout.collect import Collector
from rove.timing import Stopwatch
from rove.training.learner import Learner
from rove.types import EpisodeSpec, EvalReport, TrainBatch, Trajectory


class LocalExecutor:
    """The workers of a run, in one process. `train.py` drives it and does not know its kind."""

    def __init__(self, run: Run, plan: Plan, algorithm: Algorithm, start: Path) -> None:
        self.run = run
        self.watch = Stopwatch()
        self.version = 0
        device = torch.device(plan.device)
        grouped = isinstance(run.algorithm, GRPO)
        self.env = envs.make(
            run.env,
            num_envs=run.rollout.num_envs,
            chunk=run.rollout.chunk,
            autoreset="stop" if grouped else "refill",
        )
        self._evaluation_env: VectorEnv | None = None
        policy = policies.build(
            replace(run.policy, checkpoint=str(start)),
            chunk=run.rollout.chunk,
            action_spec=self.env.action_spec,
            image_size=run.env.image_size,
            vocabulary=(),
            statistics=None,
            seed=run.seed,
        )
        assert isinstance(policy, nn.Module)
        self.policy = policy.to(device)
        sampler = EpisodeSampler(
            self.env.suite, run.seed, run.algorithm.group_size if isinstance(run.algorithm, GRPO) else 1
        )
        self.collector = Collector(
            self.env,
            self.policy,
            sampler,
            chunks=run.rollout.chunks,
            seed=run.seed,
            bootstrap=run.algorithm.bootstrap if isinstance(run.algorithm, PPO) else None,
            branches=run.algorithm.branches if isinstance(run.algorithm, Vine) else 1,
        )
        self.learner = Learner(self.policy, algorithm, run, device)

    def sync(self, version: int) -> None:
        """Give the rollout the learner's weights: the same tensors here, so only the number moves."""
        self.version = version

    def collect(self, on_chunk: Callable[[], None]) -> Trajectory:
        """One rollout of T chunks in B slots."""
        return self.collector.collect(self.version, self.watch, on_chunk)

    def update(self, batch: TrainBatch, iteration: int, on_step: Callable[[], None]) -> dict[str, float]:
        """The iteration's optimizer steps."""
        with self.watch("training"):
            return self.learner.update(batch, iteration, on_step)

    def evaluate(self, specs: Sequence[EpisodeSpec], name: str, about: dict[str, Any], **hooks) -> EvalReport:
        """Run the episodes given, in an environment kept for that."""
        if self._evaluation_env is None:
            config = self.run.evaluation
            self._evaluation_env = envs.make(
                self.run.env, num_envs=config.num_envs, chunk=self.run.rollout.chunk, autoreset="refill"
            )
        with self.watch("evaluation"):
            return evaluate(
                self._evaluation_env,
                self.policy,
                specs,
                decoding=self.run.evaluation.decoding,
                seed=self.run.seed,
                name=name,
                about=about,
                **hooks,
            )

    def state_dict(self) -> dict[str, Any]:
        """All that a bit-exact resume needs, besides the policy's weights."""
        return {
            "learner": self.learner.state_dict(),
            "env": self.env.state_dict(),
            "cursor": self.collector.sampler.cursor,
            "started": self.collector.observation is not None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave; the policy was loaded from the same checkpoint."""
        self.learner.load_state_dict(state["learner"])
        observation = self.env.load_state_dict(state["env"])
        self.collector.observation = observation if state["started"] else None
        self.collector.sampler.cursor = state["cursor"]

    def close(self) -> None:
        """Free the environments."""
        self.env.close()
        if self._evaluation_env is not None:
            self._evaluation_env.close()
