"""A stage: one VectorEnv with its share of the episodes, stepped in this process or in a worker's.

It reads the actions of its slots and writes what came of them where the policy looks: into its part of the
rollout's `Exchange`. What is not a tensor goes into a `Report`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from rove.config.needs import needs
from rove.config.schema import Run
from rove.envs import registry as envs
from rove.envs.answers import Checked
from rove.envs.base import Brancher, Supervised, VectorEnv
from rove.envs.sampler import EpisodeSampler
from rove.errors import RoveError
from rove.rollout.buffer import Exchange
from rove.types import EpisodeRecord, EpisodeSpec, Finals, Observation

_FINALS: dict[str | None, Finals] = {None: "none", "truncated": "truncated", "always": "ended"}


def supervise(env: VectorEnv, run: Run) -> None:
    """Have an environment with processes of its own replace them as often as the run says."""
    if isinstance(env, Supervised):
        env.supervisor.limit = run.placement.max_restarts


def take_faults(env: VectorEnv) -> list[str]:
    """Faults of processes that an environment has replaced since the last call."""
    return env.supervisor.take_faults() if isinstance(env, Supervised) else []


@dataclass(frozen=True, slots=True)
class Report:
    """A stage's observation is in row t; what came of chunk t - 1 is in its row."""

    stage: int
    """Number of the stage in its worker."""
    t: int
    instruction: tuple[str, ...]
    """b instructions."""
    seeds: tuple[int | None, ...]
    """`EpisodeSpec.seed` of each slot; None where it idles."""
    elapsed: tuple[int, ...]
    """Executed actions of the running episodes."""
    finished: tuple[EpisodeRecord, ...]
    """Episodes that ended in chunk t - 1, slots counted within the stage."""
    final_slots: tuple[int, ...]
    final_observation: Observation | None
    span: tuple[float, float]
    """When the environment worked on it, seconds of `time.perf_counter`."""
    position: Position | None = None
    """In a rollout's first report what it began with, in its last what the next one will."""
    faults: tuple[str, ...] = ()
    """Faults of processes that the environment has replaced since the last report."""

    @property
    def running(self) -> bool:
        """Whether any slot runs an episode."""
        return any(seed is not None for seed in self.seeds)


@dataclass(frozen=True, slots=True)
class Position:
    """Place of a stage in its list of episodes, enough to begin them again."""

    specs: tuple[EpisodeSpec, ...]
    """Running in the slots, in order; () where the next rollout takes new ones."""
    cursor: int
    """Index in the stage's sampler of the first episode that has not begun."""


@dataclass(frozen=True, slots=True)
class StagePlan:
    """Everything that a stage is made from; picklable."""

    run: Run
    index: int
    """Index of this stage among all stages of the run, which decides its share of the episodes."""
    count: int
    """Number of stages in the run."""
    num_envs: int
    """b, slots of this stage."""
    gpu: int | None = None
    """CUDA index of the one that it simulates or renders on, in the process that builds it."""

    def build(self, number: int) -> Stage:
        """The stage, its environment idle; it reports as `number` of its worker."""
        run = self.run
        wanted = needs(run.algorithm)
        env = envs.make(
            run.env,
            num_envs=self.num_envs,
            chunk=run.rollout.chunk,
            autoreset="refill" if wanted.group_size is None and wanted.refill else "stop",
            gpu=self.gpu,
        )
        if wanted.branches > 1 and not isinstance(env, Brancher):
            raise RoveError(
                f"The environment of {env.suite.name!r} cannot try chunks and put everything back, as "
                f"{run.algorithm.kind!r} does; choose --algorithm.kind ppo or grpo."
            )
        supervise(env, run)
        share = (self.index, self.count, self.num_envs)
        sampler = EpisodeSampler(
            env.suite, run.seed, wanted.group_size or 1, share=share, emphasis=run.rollout.emphasis
        )
        return Stage(env, sampler, bootstrap=wanted.bootstrap, number=number)


class Stage:
    """Steps one environment through rollouts; an episode in flight goes on in the next one.

    `bootstrap` says which ends are followed by the value of their last observation; None without a critic.
    """

    def __init__(
        self,
        env: VectorEnv,
        sampler: EpisodeSampler,
        *,
        bootstrap: Literal["truncated", "always"] | None,
        number: int = 0,
    ) -> None:
        self.env, self.sampler, self.number = env, sampler, number
        self.calls = Checked(env)
        env.finals = _FINALS[bootstrap]
        self.observation: Observation | None = None
        self._fresh = False
        """Whether `observation` opens episodes of which no action has been executed, in every slot."""
        self._exchange: Exchange | None = None

    def ready(self) -> Observation:
        """The observation that the next rollout begins with; resets where there is none, or it is over."""
        over = self.env.autoreset == "stop" and not self._fresh
        if self.observation is None or over:
            first = self.observation is None
            self.observation = self.calls.reset(self.sampler.take(self.env.num_envs))
            if first:  # what cannot be saved is found out here, and not after hours of training
                self.calls.state_dict()
            self._fresh = True
        return self.observation

    def restart(self, position: Position) -> None:
        """Begin the episodes of a position again, from their first observation."""
        self.sampler.cursor = position.cursor
        self.observation = self.calls.reset(position.specs) if position.specs else None
        self._fresh = bool(position.specs)

    @property
    def position(self) -> Position:
        """Between two chunks: what `restart` needs."""
        goes_on = self._fresh or self.env.autoreset == "refill"
        specs = tuple(spec for spec in self.env.specs if spec is not None) if goes_on else ()
        return Position(specs, self.sampler.cursor - self.env.queued)

    def begin(self, exchange: Exchange) -> Report:
        """Put the first observation into row 0 of `exchange`, views of this stage's slots."""
        began = time.perf_counter()
        observation = self.ready()
        self._exchange = exchange
        self._put(0, observation)
        return replace(self._report(0, began), position=self.position)

    def step(self, t: int) -> Report:
        """Execute the actions that are in the exchange, as chunk t."""
        began, x = time.perf_counter(), self._exchange
        assert x is not None, "begin comes first"
        self._refill()
        self._fresh = False
        if x.actions.shape[1] > 1:
            assert isinstance(self.env, Brancher)  # see StagePlan.build
            x.tried_reward[t], x.tried_executed[t] = self.calls.try_chunks(x.actions[:, 1:])
        result = self.calls.step_chunk(x.actions[:, 0])
        x.reward[t] = result.reward
        x.terminated[t] = result.terminated
        x.truncated[t] = result.truncated
        x.executed[t] = result.executed
        self.observation = result.observation
        self._put(t + 1, result.observation)
        report = self._report(t + 1, began)
        if report.t == x.reward.shape[0] or not report.running:
            report = replace(report, position=self.position)
        if result.final_observation is None:
            return replace(report, finished=result.finished)
        return replace(
            report,
            finished=result.finished,
            final_slots=tuple(result.final_slots.tolist()),
            final_observation=result.final_observation,
        )

    def _put(self, t: int, observation: Observation) -> None:
        x = self._exchange
        assert x is not None
        x.images[t] = observation.images
        if observation.state is not None:
            x.state[t] = observation.state

    def _report(self, t: int, began: float) -> Report:
        assert self.observation is not None
        return Report(
            stage=self.number,
            t=t,
            instruction=self.observation.instruction,
            seeds=tuple(None if spec is None else spec.seed for spec in self.env.specs),
            elapsed=tuple(self.env.elapsed.tolist()),
            finished=(),
            final_slots=(),
            final_observation=None,
            span=(began, time.perf_counter()),
            faults=tuple(take_faults(self.env)),
        )

    def _refill(self) -> None:
        missing = self.env.num_envs - self.env.queued
        if self.env.autoreset == "refill" and missing > 0:
            self.env.enqueue(self.sampler.take(missing))

    def state_dict(self) -> dict[str, Any]:
        """All that a bit-exact resume needs."""
        return {
            "env": self.calls.state_dict(),
            "cursor": self.sampler.cursor,
            "started": self.observation is not None,
            "fresh": self._fresh,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        observation = self.calls.load_state_dict(state["env"])
        self.observation = observation if state["started"] else None
        self.sampler.cursor = state["cursor"]
        self._fresh = state["fresh"]

    def close(self) -> None:
        """Free the environment."""
        self.calls.close()
