"""The work of a process that holds weights: collect with them, train them, or both, as the plan says.

The same object works in this process, in a child of it and in a Ray actor: executors differ in where they put
it and how calls reach it.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rove import algorithms, host, transfer
from rove.config.needs import needs
from rove.config.schema import Run
from rove.envs import registry as envs
from rove.envs.base import VectorEnv
from rove.evaluation.evaluate import evaluate, make_env
from rove.findings import Finding
from rove.placement import gpus, weights
from rove.placement.broadcast import Broadcast, Member
from rove.placement.plan import Plan, UnitPlan, WorkerPlan
from rove.placement.weights import Layout, Weights
from rove.policies import registry as policies
from rove.policies.base import Policy
from rove.rollout.pipeline import Pipeline
from rove.rollout.stage import Position, StagePlan, supervise, take_faults
from rove.rollout.workers import Environments, EnvironmentWorker, Slots
from rove.runtime.actor import Actor, Shared, Supervisor
from rove.runtime.local import InChild, InProcess
from rove.timing import Span, Stopwatch
from rove.training import parallel
from rove.training.deal import Share
from rove.training.learner import Learner
from rove.types import ActionSpec, Conventions, EpisodeSpec, EvalReport, Trajectory


@dataclass(frozen=True, slots=True)
class SeatPlan:
    """Everything that a seat is made from; picklable."""

    run: Run
    plan: Plan
    number: int
    """Index of the seat in the plan."""
    start: Path
    """The checkpoint directory that every process reads."""
    rendezvous: str
    """"host:port" where learner ranks meet; not read with one rank."""
    spans: bool = False
    """Keep a timeline."""
    member: Member | None = None
    """Place in the group in which weights are broadcast; None where they come through the host."""

    @property
    def name(self) -> str:
        """Said of it in errors."""
        own = self.plan.seats[self.number]
        return f"policy {own.unit}" if own.rank is None else f"learner {own.rank}"


class Collected(NamedTuple):
    """Result of a rollout."""

    trajectory: Trajectory
    seconds: dict[str, float]
    spans: list[Span]
    faults: list[str]
    """Faults of environment workers that were replaced, one text each."""
    positions: list[Position | None]
    """Positions of the unit's stages; see `Pipeline.positions`."""


class Updated(NamedTuple):
    """Result of an iteration's optimizer steps."""

    metrics: dict[str, float]
    seconds: dict[str, float]
    spans: list[Span]


class Judged(NamedTuple):
    """Result of an evaluation."""

    report: EvalReport
    frames: dict[EpisodeSpec, Tensor]
    """With `frames`: uint8 [n, H, W, 3] of each episode."""
    faults: list[str]
    """Faults of processes that the environment replaced, one text each."""


def noop(*_: object) -> None:
    """No-op callback."""


class SeatWorker:
    """One set of weights, and what the plan has it do."""

    def __init__(self, seat: SeatPlan) -> None:
        self.plan, self.run, self.start = seat.plan, seat.run, seat.start
        self._seat = seat
        self._group: Broadcast | None = None
        own = seat.plan.seats[seat.number]
        self.device = torch.device("cpu" if own.gpu is None else f"cuda:{own.gpu}")
        if self.device.type == "cuda":
            # What names no device (FSDP, NCCL, a library's context) takes the current one.
            torch.cuda.set_device(self.device)
        self._cores, self._threads = host.cores(), own.threads
        host.prepare(own.threads)
        name = " and ".join(
            f"{what} {number}"
            for what, number in (("policy", own.unit), ("learner", own.rank))
            if number is not None
        )
        self.watch = Stopwatch(name, spans=seat.spans)
        self.supervisor = Supervisor(seat.run.placement.max_restarts)
        self.unit = None if own.unit is None else seat.plan.units[own.unit]
        workers = [] if own.unit is None else _environments(seat, own.unit)
        spec = workers[0].hello().action_spec if workers else _action_spec(seat.run, own.gpu)
        self._spec = spec
        self.policy = policies.restore(seat.run, seat.start, spec, self.device)
        self.learner: Learner | None = None
        trained = self.policy
        if own.rank is not None:
            ranks = parallel.join(own.rank, seat.plan.ranks, seat.rendezvous, self.device)
            if workers and ranks.world > 1 and seat.run.training.parallel == "fsdp":
                # The learner's weights are in pieces: the rollout acts on whole ones of its own.
                trained = policies.restore(seat.run, seat.start, spec, self.device)
            algorithm = algorithms.get(seat.run.algorithm.kind)
            self.learner = Learner(trained, algorithm, seat.run, self.device, ranks)
        self.shares = trained is self.policy
        """Whether the rollout acts on the learner's own weights."""
        self.pipeline: Pipeline | None = None
        if workers:
            self.pipeline = Pipeline(
                workers,
                self.policy,
                chunks=seat.run.rollout.chunks,
                seed=seat.run.seed,
                critic=needs(seat.run.algorithm).critic,
                branches=needs(seat.run.algorithm).branches,
                service="fixed" if seat.plan.deterministic else "first_ready",
                supervisor=self.supervisor,
            )
        self._evaluation_env: VectorEnv | None = None
        self._copy: Policy | None = None

    def spec(self) -> ActionSpec:
        """Return the environments' action spec."""
        return self._spec

    def preflight(self, wanted: Conventions) -> list[Finding]:
        """See `Policy.preflight`."""
        return self.policy.preflight(wanted, rl=True)

    # --- rollout ----------------------------------------------------------------------------------

    def collect(self, version: int, on_chunk: Callable[[], None] = noop) -> Collected:
        """One rollout of T chunks in this unit's slots."""
        assert self.pipeline is not None
        assert self.unit is not None
        if self.learner is not None and self.run.training.offload:
            self.learner.offload()
        with host.bound(self.unit.cores, self.unit.threads):
            trajectory = self.pipeline.collect(version, self.watch, on_chunk)
        faults = self.supervisor.take_faults()
        positions = self.pipeline.positions
        return Collected(trajectory, self.watch.take(), self.watch.take_spans(), faults, positions)

    def load_weights(self, new: Shared[Weights]) -> None:
        """Act on these from now on."""
        weights.load(self.policy, new.value)

    def receive_weights(self, layout: Layout) -> int:
        """Take part in the learner's `send_weights`, and act on what it sends. Returns its bytes."""
        flat = weights.room(self.policy, layout)
        size = self._broadcast(flat)
        weights.load(self.policy, Weights(0, flat, layout))
        return size

    def evaluate(
        self,
        specs: Sequence[EpisodeSpec],
        name: str,
        about: dict[str, Any],
        frames: bool = False,
        on_episode: Callable[..., None] = noop,
    ) -> Judged:
        """Run the episodes given, in an environment kept for that."""
        if self._evaluation_env is None:
            gpu = None if self.unit is None else self.unit.workers[0].gpu
            self._evaluation_env = make_env(self.run, chunk=self.run.rollout.chunk, gpu=gpu)
            supervise(self._evaluation_env, self.run)
        seen: dict[EpisodeSpec, list[Tensor]] = defaultdict(list)
        with self.watch("evaluation"):
            report = evaluate(
                self._evaluation_env,
                self.policy,
                specs,
                decoding=self.run.evaluation.decoding,
                seed=self.run.seed,
                name=name,
                about=about,
                on_episode=on_episode,
                on_frames=(lambda spec, part: seen[spec].append(part)) if frames else None,
            )
        frames_of = {spec: torch.cat(parts) for spec, parts in seen.items()}
        return Judged(report, frames_of, take_faults(self._evaluation_env))

    # --- learner ----------------------------------------------------------------------------------

    def update(self, share: Share, iteration: int, on_step: Callable[[], None] = noop) -> Updated:
        """The iteration's optimizer steps, on this rank's share of the batch."""
        assert self.learner is not None
        with self.watch("training"):
            metrics = self.learner.train(share, iteration, on_step)
        return Updated(metrics, self.watch.take(), self.watch.take_spans())

    def weights(self, version: int, wanted: bool = True) -> Weights | None:
        """The newest; every rank has to call it, None from those of which they are not `wanted`."""
        assert self.learner is not None
        new = weights.publish(version, self.learner.trainable())
        if not self.shares:
            weights.load(self.policy, new)
        return new if wanted else None

    def layout(self) -> Layout:
        """How the weights that training changes are sent."""
        assert self.learner is not None
        return weights.layout(self.learner.parameters())

    def send_weights(self, layout: Layout) -> int:
        """Send the newest from device to device; every rank has to call it, the first one sends. Returns the
        bytes that went to each policy."""
        assert self.learner is not None
        whole = self.learner.trainable()
        if self._seat.member is None:
            return 0
        return self._broadcast(transfer.to(weights.flatten(whole, layout), self.device))

    def _broadcast(self, flat: Sequence[Tensor]) -> int:
        assert self._seat.member is not None
        if self._group is None:  # when it is first needed: it waits for all
            self._group = Broadcast(self._seat.member, self.device)
        return self._group(flat)

    # --- saving -----------------------------------------------------------------------------------

    def save(self, directory: Path | None) -> None:
        """Write the learner's newest weights; every rank has to call it, one of them with a directory."""
        assert self.learner is not None
        whole = self.policy
        if self.learner.model.sharded:
            # Where the rollout has weights of its own they are whole, and the newest after this.
            new = self.weights(0, wanted=self.shares and directory is not None)
            if new is not None:
                if self._copy is None:
                    self._copy = policies.restore(self.run, self.start, self._spec, torch.device("cpu"))
                weights.load(whole := self._copy, new)
        if directory is not None:
            whole.save_pretrained(directory)

    def state_dict(self) -> dict[str, Any]:
        """Return all that resuming this seat's part of the run needs, besides the policy's weights."""
        return {
            "learner": None if self.learner is None else self.learner.state_dict(),
            "unit": None if self.pipeline is None else self.pipeline.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave; the policy was loaded from the same checkpoint."""
        if self.learner is not None and state["learner"] is not None:
            self.learner.load_state_dict(state["learner"])
        if self.pipeline is not None and state["unit"] is not None:
            self.pipeline.load_state_dict(state["unit"])

    def place(self, positions: Sequence[Position | None]) -> None:
        """In the place of a unit that was lost: begin with its episodes."""
        assert self.pipeline is not None
        self.pipeline.place(positions)

    def close(self) -> None:
        """Free environments and process group."""
        if self.pipeline is not None:
            self.pipeline.close()
        if self._evaluation_env is not None:
            self._evaluation_env.close()
        if self.learner is not None:
            parallel.leave()


def _action_spec(run: Run, gpu: int | None) -> ActionSpec:
    """That of the environments, where none is at hand; `gpu` is the CUDA index of this process's."""
    env = envs.make(run.env, num_envs=1, chunk=run.rollout.chunk, autoreset="stop", gpu=gpu)
    with closing(env):
        return env.action_spec


def _environments(seat: SeatPlan, unit: int) -> list[Environments]:
    """The environment workers of a unit. Slots count from the unit's first, stages over the whole run."""
    plan, run = seat.plan, seat.run
    own: UnitPlan = plan.units[unit]
    count = sum(worker.stages for u in plan.units for worker in u.workers)
    index = sum(worker.stages for u in plan.units[:unit] for worker in u.workers)
    workers: list[Environments] = []
    first = 0
    for number, worker in enumerate(own.workers):
        # A worker sees the GPU that the plan gives it, and no other; this process sees all.
        gpu = worker.gpu if own.in_process or worker.gpu is None else 0
        stages = [StagePlan(run, index + i, count, worker.slots, gpu) for i in range(worker.stages)]
        slots = [
            Slots(first + i * worker.slots, first + (i + 1) * worker.slots) for i in range(worker.stages)
        ]
        name = f"environment worker {number} of policy {unit}"
        workers.append(Environments(partial(_start, name, stages, worker, own.in_process, run), slots))
        index += worker.stages
        first += worker.stages * worker.slots
    return workers


def _start(
    name: str, stages: Sequence[StagePlan], plan: WorkerPlan, in_process: bool, run: Run
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
