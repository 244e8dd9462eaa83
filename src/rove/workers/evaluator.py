"""Runs held-out episodes beside training, in an environment that is kept from one evaluation to the next."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rove.config.schema import Run
from rove.envs.answers import Checked
from rove.evaluation.evaluate import evaluate, make_env
from rove.policies.base import Policy
from rove.rollout.stage import supervise, take_faults
from rove.types import EpisodeRecord, EpisodeSpec, EvalReport


class Evaluated(NamedTuple):
    """Result of an evaluation."""

    report: EvalReport
    frames: dict[EpisodeSpec, Tensor]
    """With `frames`: uint8 [n, H, W, 3] of each episode."""
    faults: list[str]
    """Faults of processes that the environment replaced, one text each."""


class Evaluator:
    """Evaluates a policy as its run says: with its number of environments, its decoding and its seed."""

    def __init__(self, run: Run, gpu: int | None) -> None:
        """`gpu` is the CUDA index of the device that simulates or renders, where the suite uses one."""
        self.run = run
        self._env = make_env(run, chunk=run.rollout.chunk, gpu=gpu)
        supervise(self._env, run)

    def __call__(
        self,
        policy: Policy,
        specs: Sequence[EpisodeSpec],
        name: str,
        about: dict[str, Any],
        frames: bool,
        on_episode: Callable[[EpisodeRecord], None],
    ) -> Evaluated:
        """Run the episodes given; with `frames` every action of theirs is rendered."""
        seen: dict[EpisodeSpec, list[Tensor]] = defaultdict(list)
        report = evaluate(
            self._env,
            policy,
            specs,
            decoding=self.run.evaluation.decoding,
            seed=self.run.seed,
            name=name,
            about=about,
            on_episode=on_episode,
            on_frames=(lambda spec, part: seen[spec].append(part)) if frames else None,
        )
        frames_of = {spec: torch.cat(parts) for spec, parts in seen.items()}
        return Evaluated(report, frames_of, take_faults(self._env))

    def close(self) -> None:
        """Free the environment."""
        Checked(self._env).close()
