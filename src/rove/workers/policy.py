"""A process that holds weights: it collects with them, trains them, or both, as the plan says.

The same object works in this process, in a child of it and in a Ray actor: executors differ in where they put
it and how calls reach it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rove import algorithms, host, transfer
from rove.config.needs import needs
from rove.config.schema import Run
from rove.findings import Finding
from rove.placement.plan import Plan
from rove.policies import registry as policies
from rove.policies.base import Policy
from rove.rollout.stage import Position
from rove.runtime.actor import Shared, Supervisor
from rove.runtime.pulse import headway
from rove.timing import Span, Stopwatch
from rove.training import parallel
from rove.training.deal import Share
from rove.training.learner import Learner
from rove.types import ActionSpec, Conventions, EpisodeRecord, EpisodeSpec, Trajectory
from rove.workers import weights
from rove.workers.broadcast import Broadcast, Member
from rove.workers.environment import action_spec, start_environments
from rove.workers.evaluator import Evaluated, Evaluator
from rove.workers.pipeline import Pipeline
from rove.workers.weights import Layout, Weights


@dataclass(frozen=True, slots=True)
class Assignment:
    """Everything that a policy worker is made from; picklable."""

    run: Run
    plan: Plan
    number: int
    """Index of the worker in the plan."""
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
        """Name of the worker in errors."""
        own = self.plan.workers[self.number]
        return f"policy {own.rollout}" if own.rank is None else f"learner {own.rank}"


class Collected(NamedTuple):
    """Result of a rollout."""

    trajectory: Trajectory
    seconds: dict[str, float]
    spans: list[Span]
    faults: list[str]
    """Faults of environment workers that were replaced, one text each."""
    positions: list[Position | None]
    """Positions of the stages; see `Pipeline.positions`."""


class Updated(NamedTuple):
    """Result of an iteration's optimizer steps."""

    metrics: dict[str, float]
    seconds: dict[str, float]
    spans: list[Span]


def noop(*_: object) -> None:
    """No-op callback."""


class PolicyWorker:
    """One set of weights, and what the plan has it do."""

    def __init__(self, assignment: Assignment) -> None:
        run, plan = assignment.run, assignment.plan
        self.plan, self.run, self.start = plan, run, assignment.start
        self._member = assignment.member
        self._group: Broadcast | None = None
        own = plan.workers[assignment.number]
        self.device = torch.device("cpu" if own.gpu is None else f"cuda:{own.gpu}")
        if self.device.type == "cuda":
            # What names no device (FSDP, NCCL, a library's context) takes the current one.
            torch.cuda.set_device(self.device)
        host.prepare(own.threads)
        name = " and ".join(
            f"{what} {number}"
            for what, number in (("policy", own.rollout), ("learner", own.rank))
            if number is not None
        )
        self.watch = Stopwatch(name, spans=assignment.spans)
        self.supervisor = Supervisor(run.placement.max_restarts)
        self.rollout = None if own.rollout is None else plan.rollouts[own.rollout]
        environments = [] if own.rollout is None else start_environments(run, plan, own.rollout)
        self._spec = environments[0].hello().action_spec if environments else action_spec(run, own.gpu)
        self.policy = policies.restore(run, self.start, self._spec, self.device)
        self.learner: Learner | None = None
        trained = self.policy
        if own.rank is not None:
            ranks = parallel.join(own.rank, plan.ranks, assignment.rendezvous, self.device)
            if environments and ranks.world > 1 and run.training.parallel == "fsdp":
                # The learner's weights are in pieces: the rollout acts on whole ones of its own.
                trained = policies.restore(run, self.start, self._spec, self.device)
            self.learner = Learner(trained, algorithms.get(run.algorithm.kind), run, self.device, ranks)
        self.shares = trained is self.policy
        """Whether the rollout acts on the learner's own weights."""
        self.pipeline: Pipeline | None = None
        if environments:
            self.pipeline = Pipeline(
                environments,
                self.policy,
                chunks=run.rollout.chunks,
                seed=run.seed,
                critic=needs(run.algorithm).critic,
                branches=needs(run.algorithm).branches,
                service="fixed" if plan.deterministic else "first_ready",
                supervisor=self.supervisor,
            )
        self._evaluator: Evaluator | None = None
        self._copy: Policy | None = None

    def spec(self) -> ActionSpec:
        """Return the environments' action spec."""
        return self._spec

    def preflight(self, wanted: Conventions) -> list[Finding]:
        """See `Policy.preflight`."""
        return self.policy.preflight(wanted, rl=True)

    # --- rollout ----------------------------------------------------------------------------------

    def collect(self, version: int, on_chunk: Callable[[], None] = noop) -> Collected:
        """One rollout of T chunks, in the slots of this worker's environments."""
        assert self.pipeline is not None
        assert self.rollout is not None
        if self.learner is not None and self.run.training.offload:
            self.learner.offload()
        with host.bound(self.rollout.cores, self.rollout.threads):
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
        on_episode: Callable[[EpisodeRecord], None] = noop,
    ) -> Evaluated:
        """Run the episodes given, in an environment kept for that."""
        if self._evaluator is None:
            gpu = None if self.rollout is None else self.rollout.environments[0].gpu
            self._evaluator = Evaluator(self.run, gpu)
        with self.watch("evaluation"):
            return self._evaluator(self.policy, specs, name, about, frames, on_episode)

    # --- learner ----------------------------------------------------------------------------------

    def update(self, share: Share, iteration: int, on_step: Callable[[], None] = noop) -> Updated:
        """The iteration's optimizer steps, on this rank's share of the batch."""
        assert self.learner is not None

        def stepped() -> None:
            headway()
            on_step()

        with self.watch("training"):
            metrics = self.learner.train(share, iteration, stepped)
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
        if self._member is None:
            return 0
        return self._broadcast(transfer.to(weights.flatten(whole, layout), self.device))

    def _broadcast(self, flat: Sequence[Tensor]) -> int:
        assert self._member is not None
        if self._group is None:  # when it is first needed: it waits for all
            self._group = Broadcast(self._member, self.device)
        return self._group(flat)

    # --- saving -----------------------------------------------------------------------------------

    def save(self, directory: Path | None) -> None:
        """Write the learner's newest weights; every rank has to call it, one of them with a directory.

        Raises RoveError where they are not finite.
        """
        assert self.learner is not None
        self.learner.optimizer.check_weights()
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
        """Return all that resuming this worker's part of the run needs, besides the policy's weights.

        Raises RoveError where these are not finite: nothing is to be saved.
        """
        if self.learner is not None:
            self.learner.optimizer.check_weights()
        return {
            "learner": None if self.learner is None else self.learner.state_dict(),
            "rollout": None if self.pipeline is None else self.pipeline.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave; the policy was loaded from the same checkpoint."""
        if self.learner is not None and state["learner"] is not None:
            self.learner.load_state_dict(state["learner"])
        if self.pipeline is not None and state["rollout"] is not None:
            self.pipeline.load_state_dict(state["rollout"])

    def place(self, positions: Sequence[Position | None]) -> None:
        """In the place of a worker that was lost: begin with its episodes."""
        assert self.pipeline is not None
        self.pipeline.place(positions)

    def close(self) -> None:
        """Free environments and process group."""
        if self.pipeline is not None:
            self.pipeline.close()
        if self._evaluator is not None:
            self._evaluator.close()
        if self.learner is not None:
            parallel.leave()
