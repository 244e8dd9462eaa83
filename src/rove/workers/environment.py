"""Environment workers: the stages of one process, and the rollout worker's end of it.

A rollout worker asks an `EnvironmentWorker`, in its own process or in another one, through `Environments`,
which starts it again where it was lost.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial
from typing import Any, NamedTuple

from rove.config.schema import Run
from rove.envs import registry as envs
from rove.placement.plan import EnvironmentPlan, Plan
from rove.rollout.buffer import Memory
from rove.rollout.stage import Position, Report, Stage, StagePlan
from rove.runtime import gpus
from rove.runtime.actor import Actor, Future, Lost
from rove.runtime.local import InChild, InProcess
from rove.types import ActionSpec


class Hello(NamedTuple):
    """Shapes and conventions of a worker's environments."""

    action_spec: ActionSpec
    image: tuple[int, ...]
    """(n, H, W, 3)."""
    state: int | None


class Slots(NamedTuple):
    """The slots of a stage in the rollout."""

    first: int
    last: int


class EnvironmentWorker:
    """Steps stages, each when it is asked to. In a process of its own it steps one while the policy serves
    the others, and resets those whose rollout is over while nothing is asked."""

    def __init__(self, plans: Sequence[StagePlan]) -> None:
        self.stages: list[Stage] = [plan.build(number) for number, plan in enumerate(plans)]
        self._over = list(self.stages)
        """Stages between rollouts."""
        self._chunks = 0

    def hello(self) -> Hello:
        """The first stage's shapes; resets it, if need be, to see them."""
        stage = self.stages[0]
        observation = stage.ready()
        state = None if observation.state is None else observation.state.shape[1]
        return Hello(stage.env.action_spec, tuple(observation.images.shape[1:]), state)

    def begin(self, stage: int, memory: Memory, slots: Slots, position: Position | None) -> Report:
        """Begin a rollout in `slots` of it: with the episodes of `position`, else where the stage was."""
        own, self._chunks = self.stages[stage], memory.layout.chunks
        if own in self._over:
            self._over.remove(own)
        if position is not None:
            own.restart(position)
        return own.begin(memory.exchange.slots(*slots))

    def restart(self, positions: Sequence[Position]) -> None:
        """Between rollouts: begin the episodes of each stage's position again."""
        for stage, position in zip(self.stages, positions, strict=True):
            stage.restart(position)

    def step(self, stage: int, t: int) -> Report:
        """Execute the actions that are in the memory, as chunk t."""
        report = self.stages[stage].step(t)
        if report.t == self._chunks or not report.running:
            self._over.append(self.stages[stage])
        return report

    def rest(self) -> bool:
        """Reset a stage between two rollouts. Returns whether there was one."""
        if self._over:
            self._over.pop(0).ready()
            return True
        return False

    def state_dict(self) -> list[dict[str, Any]]:
        """All that a bit-exact resume needs, of each stage."""
        return [stage.state_dict() for stage in self.stages]

    def load_state_dict(self, state: Sequence[dict[str, Any]]) -> None:
        """Restore what `state_dict` gave."""
        for stage, own in zip(self.stages, state, strict=True):
            stage.load_state_dict(own)

    def close(self) -> None:
        """Free the environments."""
        for stage in self.stages:
            stage.close()


class Environments:
    """A rollout worker's end of an environment worker."""

    def __init__(self, start: Callable[[], Actor[EnvironmentWorker]], slots: Sequence[Slots]) -> None:
        """`slots` are those of each of its stages."""
        self.slots, self._start = slots, start
        self.actor = start()
        self._hello: Hello | None = None
        self._loaded: Sequence[dict[str, Any]] | None = None

    @property
    def name(self) -> str:
        return self.actor.name

    def hello(self) -> Hello:
        """See `EnvironmentWorker.hello`. Raises RoveError where the worker does not start."""
        if self._hello is None:  # asked once: it resets, which belongs to a rollout's simulation
            try:
                self._hello = self.actor.call(EnvironmentWorker.hello).result()
            except Lost as lost:
                raise lost.reason() from lost
        return self._hello

    def begin(self, memory: Memory, positions: Sequence[Position] | None) -> list[Future[Report]]:
        """Begin a rollout; with positions, one a stage, those episodes are begun again."""
        return [
            self.actor.call(
                EnvironmentWorker.begin, stage, memory, slots, None if positions is None else positions[stage]
            )
            for stage, slots in enumerate(self.slots)
        ]

    def step(self, stage: int, t: int) -> Future[Report]:
        """See `EnvironmentWorker.step`."""
        return self.actor.call(EnvironmentWorker.step, stage, t)

    def restart(self, memory: Memory, positions: Sequence[Position] | None) -> list[Future[Report]]:
        """A new worker in the place of this one, which begins these episodes in the rollout under way.

        Without positions it begins as the first one did: with the state that was loaded, or from the start.
        """
        self._start_again(positions is None)
        return self.begin(memory, positions)

    def replace(self, positions: Sequence[Position] | None) -> None:
        """A new worker in the place of this one, between rollouts, with these episodes begun again."""
        self._start_again(positions is None)
        if positions is not None:
            self.actor.call(EnvironmentWorker.restart, positions)

    def _start_again(self, load: bool) -> None:
        self.actor.kill()
        self.actor = self._start()
        if load and self._loaded is not None:
            self.actor.call(EnvironmentWorker.load_state_dict, self._loaded)

    def state_dict(self) -> list[dict[str, Any]]:
        """See `EnvironmentWorker.state_dict`."""
        return self.actor.call(EnvironmentWorker.state_dict).result()

    def load_state_dict(self, state: Sequence[dict[str, Any]]) -> None:
        """Restore what `state_dict` gave."""
        self._loaded = state
        self.actor.call(EnvironmentWorker.load_state_dict, state).result()

    def close(self) -> None:
        """End the worker."""
        self.actor.close()


def start_environments(run: Run, plan: Plan, rollout: int) -> list[Environments]:
    """Start the environment workers of a rollout worker. Slots count from its first, stages over the whole
    run."""
    own = plan.rollouts[rollout]
    count = sum(worker.stages for each in plan.rollouts for worker in each.environments)
    index = sum(worker.stages for each in plan.rollouts[:rollout] for worker in each.environments)
    workers: list[Environments] = []
    first = 0
    for number, worker in enumerate(own.environments):
        # A worker sees the GPU that the plan gives it, and no other; this process sees all.
        gpu = worker.gpu if own.in_process or worker.gpu is None else 0
        stages = [StagePlan(run, index + i, count, worker.slots, gpu) for i in range(worker.stages)]
        slots = [
            Slots(first + i * worker.slots, first + (i + 1) * worker.slots) for i in range(worker.stages)
        ]
        name = f"environment worker {number} of policy {rollout}"
        workers.append(Environments(partial(_start, name, stages, worker, own.in_process, run), slots))
        index += worker.stages
        first += worker.stages * worker.slots
    return workers


def _start(
    name: str, stages: Sequence[StagePlan], plan: EnvironmentPlan, in_process: bool, run: Run
) -> Actor[EnvironmentWorker]:
    make = partial(EnvironmentWorker, stages)
    if in_process:
        return InProcess("environments", make)
    return InChild(
        name,
        make,
        deadline=run.placement.deadline,
        cores=plan.cores,
        environment={gpus.VISIBLE: gpus.visible(plan.gpu, os.environ.get(gpus.VISIBLE))},
    )


def action_spec(run: Run, gpu: int | None) -> ActionSpec:
    """The environments' action spec, where no environment is at hand; `gpu` is the CUDA index of this
    process's device."""
    env = envs.make(run.env, num_envs=1, chunk=run.rollout.chunk, autoreset="stop", gpu=gpu)
    with closing(env):
        return env.action_spec
