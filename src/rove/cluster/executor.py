"""Carries out a Plan. `train.py` drives it through a few calls and does not know where anything runs.

    sync      the learner's weights become the rollout workers', as a numbered version
    collect   the next rollout of all rollout workers, side by side
    update    the iteration's optimizer steps, on all ranks
    evaluate  held-out episodes, dealt out over the rollout workers

Subclasses say where a policy worker is put: `local.py` in this process or a child of it, `ray.py` on Ray. In
asynchronous mode rollouts are begun ahead and taken in order; `plan.staleness` proves how old they can be.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from rove.config.schema import Run
from rove.envs import registry as envs
from rove.errors import RoveError
from rove.findings import Finding
from rove.placement.plan import Plan
from rove.rollout.stage import Position
from rove.runtime.actor import Actor, Future, Lost, Shared, Supervisor, as_ready
from rove.timing import Stopwatch
from rove.training import parallel
from rove.training.deal import deal, schedule
from rove.types import ActionSpec, Conventions, EpisodeRecord, EpisodeSpec, EvalReport, TrainBatch, Trajectory
from rove.workers.broadcast import Member
from rove.workers.policy import Assignment, Collected, Evaluated, PolicyWorker, noop
from rove.workers.weights import Weights

R = TypeVar("R")
V = TypeVar("V")


class Executor(ABC):
    """The workers of a run."""

    def __init__(self, run: Run, plan: Plan, start: Path, profile: bool = False) -> None:
        self.run, self.plan, self.start = run, plan, start
        self.suite = envs.suite(run.env)
        self.watch = Stopwatch("driver", spans=profile)
        self.version = 0
        self.supervisor = Supervisor(run.placement.max_restarts)
        self._profile = profile
        self._rendezvous = ""
        self._weights: Shared[Weights] | None = None
        """The newest that rollout workers were given, as `_share` made them fit to be given."""
        self._members: dict[int, Member] = {}
        """Workers that weights are broadcast among; none where they go through the host."""
        self._begun: deque[list[tuple[int, Future[Collected]]]] = deque()
        self._lost: dict[int, list[Position | None]] = {}
        self._rollouts = [n for n, worker in enumerate(plan.workers) if worker.rollout is not None]
        self._rollouts.sort(key=lambda n: plan.workers[n].rollout or 0)
        self._learners = [n for n, worker in enumerate(plan.workers) if worker.rank is not None]
        self._workers: list[Actor[PolicyWorker]] = []

    def _start_all(self) -> None:
        """Put every worker in its place; they build at the same time."""
        if self.plan.ranks > 1:
            self._rendezvous = self._meeting_point()
        if self.plan.broadcasts:
            group = (self._learners[0], *self.plan.apart)
            address = self._meeting_point()
            self._members = {n: Member(address, place, len(group)) for place, n in enumerate(group)}
        self._workers = [self._put(self._assignment(n)) for n in range(len(self.plan.workers))]

    def _meeting_point(self) -> str:
        """ "host:port" on the node of rank 0."""
        return parallel.free_address()

    @abstractmethod
    def _put(self, assignment: Assignment) -> Actor[PolicyWorker]:
        """A worker in its place, under construction."""

    def _assignment(self, number: int) -> Assignment:
        return Assignment(
            self.run,
            self.plan,
            number,
            self.start,
            self._rendezvous,
            self._profile,
            self._members.get(number),
        )

    @abstractmethod
    def _share(self, value: V) -> Shared[V]:
        """`value`, as an argument that several workers are given."""

    # --- the loop's calls -------------------------------------------------------------------------

    def sync(self, version: int) -> None:
        """Give the rollout workers the learner's weights. Those that also train share them: nothing moves."""
        self.version = version
        with self.watch("sync"):
            whole = self.plan.ranks == 1 or self.run.training.parallel == "ddp"
            if not self.plan.apart and whole:
                return
            if not self.plan.staleness:
                self._weights = self._give()
            elif self.plan.apart:
                self._weights = self._share(self._pull())
            else:
                self._refresh()

    def _give(self) -> Shared[Weights] | None:
        """The newest weights to all policies that are apart from the learner. Returns them, as `_share` made
        them fit to be given again; None where they were broadcast."""
        apart = self.plan.apart
        if self._members and any(self._workers[n].gone for n in apart):
            self._members = {}
        if not apart:
            self._refresh()
            return None
        if not self._members:
            new = self._share(self._pull())
            self._gather([self._workers[n].call(PolicyWorker.load_weights, new) for n in apart], apart)
            return new
        layout = self._result(self._workers[self._learners[0]].call(PolicyWorker.layout))
        # First those that wait for it: a learner in this process sends before the call returns.
        calls = [self._workers[n].call(PolicyWorker.receive_weights, layout) for n in apart]
        calls += [self._workers[n].call(PolicyWorker.send_weights, layout) for n in self._learners]
        self._gather(calls, [*apart, *self._learners])
        return None

    def _pull(self) -> Weights:
        """The newest weights of the learner; a collective of its ranks, of which the first answers."""
        calls = [
            self._workers[n].call(PolicyWorker.weights, self.version, self.plan.workers[n].rank == 0)
            for n in self._learners
        ]
        return next(found for found in self._gather(calls, self._learners) if found is not None)

    def _refresh(self) -> None:
        """Have workers that train shares of the weights but collect with whole ones renew the whole ones."""
        calls = [self._workers[n].call(PolicyWorker.weights, self.version, False) for n in self._learners]
        self._gather(calls, self._learners)

    def collect(self, on_chunk: Callable[[], None]) -> Trajectory:
        """The oldest rollout that was begun, else one begun now: T chunks in B slots."""
        if not self._begun:
            self._begin(on_chunk)
        with self.watch("wait"):
            parts = [self._collected(n, future) for n, future in self._begun.popleft()]
        while len(self._begun) < self.plan.staleness:
            self._begin()
        for part in parts:
            seconds = {k: v / len(parts) for k, v in part.seconds.items()}
            self.watch.merge(seconds, part.spans)
            self.supervisor.add(part.faults)
        if not self._inline:
            for _ in range(self.run.rollout.chunks):
                on_chunk()
        trajectories = [part.trajectory for part in parts]
        return trajectories[0] if len(trajectories) == 1 else Trajectory.cat(trajectories)

    def _begin(self, on_chunk: Callable[[], None] = noop) -> None:
        """Begin a rollout on all rollout workers, on the newest weights that were published."""
        new = self._weights if self.plan.staleness else None
        calls = []
        for n in self._rollouts:
            if new is not None and self.plan.workers[n].rank is None:
                self._workers[n].call(PolicyWorker.load_weights, new)
            calls.append((n, self._workers[n].call(PolicyWorker.collect, self.version, self._hook(on_chunk))))
        self._begun.append(calls)

    def _collected(self, number: int, future: Future[Collected]) -> Collected:
        """What a rollout worker collected."""

        def again() -> Future[Collected]:
            # Before the rollouts that were begun ahead: those come after this one.
            future = self._workers[number].call(PolicyWorker.collect, self.version)
            self._begin_again(number)
            return future

        done = self._recovered(number, future, again)
        self._lost[number] = done.positions
        return done

    def _recovered(self, number: int, future: Future[R], again: Callable[[], Future[R]]) -> R:
        """A rollout worker's answer. Where it was lost, another takes its place, and is asked `again`."""
        while True:
            try:
                result = future.result()
            except Lost as lost:
                if self.plan.workers[number].rank is not None or isinstance(lost.error, RoveError):
                    raise lost.reason() from lost
                self.supervisor.note(lost)
                self._replace(number)
                future = again()
            else:
                self.supervisor.works(self._workers[number].name)
                return result

    def _replace(self, number: int) -> None:
        """A new rollout worker in the place of one that was lost, with its weights and where its episodes
        began."""
        self._workers[number].kill()
        if self._members:  # a group has no place for another: from now on weights go through the host
            self._members = {}
            self._weights = self._share(self._pull())
        worker = self._workers[number] = self._put(self._assignment(number))
        if self._weights is not None:
            worker.call(PolicyWorker.load_weights, self._weights)
        if number in self._lost:
            worker.call(PolicyWorker.place, self._lost[number])

    def _begin_again(self, number: int) -> None:
        """Rollouts that were begun ahead are lost with their worker: begin them anew."""
        for calls in self._begun:
            for i, (n, _) in enumerate(calls):
                if n == number:
                    calls[i] = (n, self._workers[number].call(PolicyWorker.collect, self.version))

    def update(self, batch: TrainBatch, iteration: int, on_step: Callable[[], None]) -> dict[str, float]:
        """The iteration's optimizer steps. A rank is given its rows alone, one rank after the other: of the
        batch there is never more than one share twice."""
        steps = schedule(len(batch), self.run, iteration)
        calls = []
        for n in self._learners:
            share = deal(batch, steps, self.plan.workers[n].rank or 0, self.plan.ranks)
            calls.append(self._workers[n].call(PolicyWorker.update, share, iteration, self._hook(on_step)))
        done = self._answers(calls)
        self.watch.merge(done[0].seconds, [span for one in done for span in one.spans])
        return done[0].metrics

    def evaluate(
        self,
        specs: Sequence[EpisodeSpec],
        name: str,
        about: dict[str, Any],
        on_episode: Callable[[EpisodeRecord], None] = noop,
        on_frames: Callable[[EpisodeSpec, torch.Tensor], None] | None = None,
    ) -> EvalReport:
        """Run the episodes given, on the learner's newest weights."""
        began = time.perf_counter()
        evaluators, new = self._evaluators()
        count = len(evaluators)
        parts = {n: part for i, n in enumerate(evaluators) if (part := list(specs[i::count]))}
        hook = on_episode if self._inline else noop

        def ask(n: int) -> Future[Evaluated]:
            return self._workers[n].call(
                PolicyWorker.evaluate, parts[n], name, about, on_frames is not None, hook
            )

        def ask_again(n: int) -> Future[Evaluated]:
            self._begin_again(n)
            if new is not None:  # else the new worker came with the newest
                self._workers[n].call(PolicyWorker.load_weights, new)
            return ask(n)

        calls = {n: ask(n) for n in parts}
        done = [self._recovered(n, calls[n], partial(ask_again, n)) for n in parts]
        for one in done:
            self.supervisor.add(one.faults)
        records = {record.spec: record for one in done for record in one.report.records}
        for spec in specs:
            if not self._inline:
                on_episode(records[spec])
            if on_frames is not None:
                on_frames(spec, next(one.frames[spec] for one in done if spec in one.frames))
        seconds = time.perf_counter() - began
        if not self._inline:
            self.watch.count("evaluation", seconds)
        first = done[0].report
        return EvalReport(
            suite=first.suite,
            split=first.split,
            decoding=first.decoding,
            records=tuple(records[spec] for spec in specs),
            seconds=seconds,
            policy=name,
            about={**about, "diverged": sum(one.report.about["diverged"] for one in done)},
        )

    def _evaluators(self) -> tuple[list[int], Shared[Weights] | None]:
        """The workers that evaluate, with the newest weights in place; and these, see `_give`."""
        if self._inline or (self.plan.ranks == 1 and self.plan.staleness):
            return self._learners, None
        return self._rollouts, self._give()

    # --- weights and state ------------------------------------------------------------------------

    def preflight(self, wanted: Conventions) -> list[Finding]:
        """Have the policy that the run starts from check its environments, on the device where it acts."""
        return self._result(self._workers[self._rollouts[0]].call(PolicyWorker.preflight, wanted))

    def save_policy(self, directory: Path) -> None:
        """Write the learner's newest weights to a directory that its first rank can reach."""
        calls = [
            self._workers[n].call(PolicyWorker.save, directory if self.plan.workers[n].rank == 0 else None)
            for n in self._learners
        ]
        self._gather(calls, self._learners)

    @property
    def action_spec(self) -> ActionSpec:
        """The environments' convention."""
        return self._result(self._workers[self._rollouts[0]].call(PolicyWorker.spec))

    def state_dict(self) -> dict[str, Any]:
        """All that a resume needs, besides the policy's weights; bit-exact where nothing is asynchronous.

        Rollouts that were begun ahead end first, and are then left out: their episodes are not run again.
        """

        def ask_again(n: int) -> Future[dict[str, Any]]:
            if self._begun:
                self._begin_again(n)
            else:
                # A new worker comes to its episodes when it collects. What it does is not trained on.
                self._workers[n].call(PolicyWorker.collect, self.version)
            return self._workers[n].call(PolicyWorker.state_dict)

        calls = [worker.call(PolicyWorker.state_dict) for worker in self._workers]
        states = [self._recovered(n, call, partial(ask_again, n)) for n, call in enumerate(calls)]
        of_rank = {worker.rank: state for worker, state in zip(self.plan.workers, states, strict=True)}
        rollouts = [states[n]["rollout"] for n in self._rollouts]
        return {"learner": of_rank[0]["learner"], "rollouts": rollouts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave, here or on another number of learners; not of rollout
        workers."""
        if len(state["rollouts"]) != len(self._rollouts):
            raise RoveError(
                f"The checkpoint has the environments of {len(state['rollouts'])} policies, the plan has "
                f"{len(self._rollouts)}: resume on as many devices for the policy."
            )
        rollouts = dict(zip(self._rollouts, state["rollouts"], strict=True))
        calls = [
            worker.call(
                PolicyWorker.load_state_dict, {"learner": state["learner"], "rollout": rollouts.get(n)}
            )
            for n, worker in enumerate(self._workers)
        ]
        self._gather(calls, list(range(len(self._workers))))

    def take_faults(self) -> list[str]:
        """Faults that were recovered from since the last call."""
        return self.supervisor.take_faults()

    @property
    def _inline(self) -> bool:
        """Whether the one worker is in this process, so that calls can call back."""
        return len(self._workers) == 1 and self._workers[0].here

    def _hook(self, callback: Callable[[], None]) -> Callable[[], None]:
        """The callback, where a call can call back; it does not reach other processes."""
        return callback if self._inline else noop

    def _gather(self, calls: Sequence[Future[R]], numbers: Sequence[int]) -> list[R | None]:
        """All results; None of a rollout worker that is lost: it is replaced when its rollout is wanted."""
        results: list[R | None] = [None] * len(calls)
        for place in self._as_ready(calls):
            number = numbers[place]
            try:
                results[place] = calls[place].result()
            except Lost as lost:
                if self.plan.workers[number].rank is not None or isinstance(lost.error, RoveError):
                    raise lost.reason("The learner failed: ") from lost
        return results

    def _answers(self, calls: Sequence[Future[R]], what: str = "The learner failed: ") -> list[R]:
        """All results of workers that cannot be lost without the run. RoveError where one is."""
        results: dict[int, R] = {}
        for place in self._as_ready(calls):
            try:
                results[place] = calls[place].result()
            except Lost as lost:
                raise lost.reason(what) from lost
        return [results[place] for place in range(len(calls))]

    def _result(self, call: Future[R], what: str = "") -> R:
        """The result of a call whose worker cannot be lost without the run."""
        return self._answers([call], what)[0]

    def _as_ready(self, calls: Sequence[Future[Any]]) -> Iterator[int]:
        """Places of the calls, in the order in which they are ready: ranks wait for each other, and it is the
        one that is lost that has to be told of. So is one that nothing was asked of."""
        for place in as_ready(calls):
            if place >= 0:
                yield place
                continue
            for n in self._learners:
                if self._workers[n].gone:
                    try:
                        self._workers[n].call(PolicyWorker.spec).result()
                    except Lost as lost:
                        raise lost.reason("The learner failed: ") from lost

    def close(self) -> None:
        """End everything."""
        for worker in self._workers:
            worker.close()
