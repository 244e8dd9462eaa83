"""Carries out a Plan. `train.py` drives it through a few calls and does not know where anything runs.

    sync      the learner's weights become the rollout's, as a numbered version
    collect   the next rollout of all units, side by side
    update    the iteration's optimizer steps, on all ranks
    evaluate  held-out episodes, dealt out over the units

Subclasses say where a seat is put: `local.py` in this process or a child of it, `ray.py` in an actor. In
asynchronous mode rollouts are begun ahead and taken in order; `plan.staleness` proves how old they can be.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from rove.config.schema import Run
from rove.envs import registry as envs
from rove.errors import RoveError
from rove.findings import Finding
from rove.placement.broadcast import Member
from rove.placement.plan import Plan
from rove.placement.seat import Collected, Judged, SeatPlan, SeatWorker, noop
from rove.placement.weights import Weights
from rove.rollout.stage import Position
from rove.runtime.actor import Actor, Future, Lost, Shared, Supervisor
from rove.timing import Stopwatch
from rove.training import parallel
from rove.training.deal import deal, schedule
from rove.types import ActionSpec, Conventions, EpisodeSpec, EvalReport, TrainBatch, Trajectory

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
        """The newest that units were given, as `_share` made them fit to be given."""
        self._members: dict[int, Member] = {}
        """Seats that weights are broadcast among; none where they go through the host."""
        self.sent = 0
        """Bytes that the last broadcast took, to all policies together."""
        self._begun: deque[list[tuple[int, Future[Collected]]]] = deque()
        self._lost: dict[int, list[Position | None]] = {}
        self._units = [n for n, seat in enumerate(plan.seats) if seat.unit is not None]
        self._units.sort(key=lambda n: plan.seats[n].unit or 0)
        self._learners = [n for n, seat in enumerate(plan.seats) if seat.rank is not None]
        self._seats: list[Actor[SeatWorker]] = []

    def _seat_all(self) -> None:
        """Put every seat in its place; they build at the same time."""
        if self.plan.ranks > 1:
            self._rendezvous = self._meeting_point()
        if self.plan.broadcasts:
            group = (self._learners[0], *self.plan.apart)
            address = self._meeting_point()
            self._members = {n: Member(address, place, len(group)) for place, n in enumerate(group)}
        self._seats = [self._put(self._seat_plan(n)) for n in range(len(self.plan.seats))]

    def _meeting_point(self) -> str:
        """ "host:port" on the node of rank 0."""
        return parallel.free_address()

    @abstractmethod
    def _put(self, seat: SeatPlan) -> Actor[SeatWorker]:
        """A seat in its place, under construction."""

    def _seat_plan(self, number: int) -> SeatPlan:
        return SeatPlan(
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
        """`value`, as an argument that several seats are given."""

    # --- the loop's calls -------------------------------------------------------------------------

    def sync(self, version: int) -> None:
        """Give the rollout the learner's weights. Seats that train and collect share them: nothing moves."""
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
        if self._members and any(self._seats[n].gone for n in apart):
            self._members = {}
        if not apart:
            self._refresh()
            return None
        if not self._members:
            new = self._share(self._pull())
            self._gather([self._seats[n].call(SeatWorker.load_weights, new) for n in apart], apart)
            return new
        layout = self._result(self._seats[self._learners[0]].call(SeatWorker.layout))
        # First those that wait for it: a learner in this process sends before the call returns.
        calls = [self._seats[n].call(SeatWorker.receive_weights, layout) for n in apart]
        calls += [self._seats[n].call(SeatWorker.send_weights, layout) for n in self._learners]
        received = self._gather(calls, [*apart, *self._learners])[: len(apart)]
        self.sent = sum(size or 0 for size in received)  # one that was lost meanwhile is mended later
        return None

    def _pull(self) -> Weights:
        """The newest weights of the learner; a collective of its ranks, of which the first answers."""
        calls = [
            self._seats[n].call(SeatWorker.weights, self.version, self.plan.seats[n].rank == 0)
            for n in self._learners
        ]
        return next(found for found in self._gather(calls, self._learners) if found is not None)

    def _refresh(self) -> None:
        """Have seats that train shares of the weights, and collect with whole ones, make these the newest."""
        calls = [self._seats[n].call(SeatWorker.weights, self.version, False) for n in self._learners]
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
        """Begin a rollout on all units, on the newest weights that were published."""
        new = self._weights if self.plan.staleness else None
        calls = []
        for n in self._units:
            if new is not None and self.plan.seats[n].rank is None:
                self._seats[n].call(SeatWorker.load_weights, new)
            calls.append((n, self._seats[n].call(SeatWorker.collect, self.version, self._hook(on_chunk))))
        self._begun.append(calls)

    def _collected(self, number: int, future: Future[Collected]) -> Collected:
        """Return what a unit collected."""

        def again() -> Future[Collected]:
            # Before the rollouts that were begun ahead: those come after this one.
            future = self._seats[number].call(SeatWorker.collect, self.version)
            self._begin_again(number)
            return future

        done = self._mended(number, future, again)
        self._lost[number] = done.positions
        return done

    def _mended(self, number: int, future: Future[R], again: Callable[[], Future[R]]) -> R:
        """A unit's answer. Where the unit was lost, another takes its place, and is asked `again`."""
        while True:
            try:
                result = future.result()
            except Lost as lost:
                if self.plan.seats[number].rank is not None or isinstance(lost.error, RoveError):
                    raise lost.reason() from lost
                self.supervisor.note(lost)
                self._replace(number)
                future = again()
            else:
                self.supervisor.works(self._seats[number].name)
                return result

    def _replace(self, number: int) -> None:
        """A new unit in the place of one that was lost, with its weights and where its episodes began."""
        self._seats[number].kill()
        if self._members:  # a group has no place for another: from now on weights go through the host
            self._members = {}
            self._weights = self._share(self._pull())
        seat = self._seats[number] = self._put(self._seat_plan(number))
        if self._weights is not None:
            seat.call(SeatWorker.load_weights, self._weights)
        if number in self._lost:
            seat.call(SeatWorker.place, self._lost[number])

    def _begin_again(self, number: int) -> None:
        """Rollouts that were begun ahead are lost with their unit."""
        for calls in self._begun:
            for i, (n, _) in enumerate(calls):
                if n == number:
                    calls[i] = (n, self._seats[number].call(SeatWorker.collect, self.version))

    def update(self, batch: TrainBatch, iteration: int, on_step: Callable[[], None]) -> dict[str, float]:
        """The iteration's optimizer steps. A rank is given its rows alone, one rank after the other: of the
        batch there is never more than one share twice."""
        steps = schedule(len(batch), self.run, iteration)
        calls = []
        for n in self._learners:
            share = deal(batch, steps, self.plan.seats[n].rank or 0, self.plan.ranks)
            calls.append(self._seats[n].call(SeatWorker.update, share, iteration, self._hook(on_step)))
        done = self._answers(calls)
        self.watch.merge(done[0].seconds, [span for one in done for span in one.spans])
        return done[0].metrics

    def evaluate(
        self,
        specs: Sequence[EpisodeSpec],
        name: str,
        about: dict[str, Any],
        on_episode: Callable[..., None] = lambda record: None,
        on_frames: Callable[[EpisodeSpec, torch.Tensor], None] | None = None,
    ) -> EvalReport:
        """Run the episodes given, on the learner's newest weights."""
        began = time.perf_counter()
        seats, new = self._judges()
        parts = {n: part for i, n in enumerate(seats) if (part := list(specs[i :: len(seats)]))}
        hook = on_episode if self._inline else noop

        def ask(n: int) -> Future[Judged]:
            return self._seats[n].call(
                SeatWorker.evaluate, parts[n], name, about, on_frames is not None, hook
            )

        def ask_again(n: int) -> Future[Judged]:
            self._begin_again(n)
            if new is not None:  # else the new unit came with the newest
                self._seats[n].call(SeatWorker.load_weights, new)
            return ask(n)

        calls = {n: ask(n) for n in parts}
        judged = [self._mended(n, calls[n], partial(ask_again, n)) for n in parts]
        for one in judged:
            self.supervisor.add(one.faults)
        records = {record.spec: record for one in judged for record in one.report.records}
        for spec in specs:
            if not self._inline:
                on_episode(records[spec])
            if on_frames is not None:
                on_frames(spec, next(one.frames[spec] for one in judged if spec in one.frames))
        seconds = time.perf_counter() - began
        if not self._inline:
            self.watch.count("evaluation", seconds)
        first = judged[0].report
        return EvalReport(
            suite=first.suite,
            split=first.split,
            decoding=first.decoding,
            records=tuple(records[spec] for spec in specs),
            seconds=seconds,
            policy=name,
            about={**about, "diverged": sum(one.report.about["diverged"] for one in judged)},
        )

    def _judges(self) -> tuple[list[int], Shared[Weights] | None]:
        """The seats that evaluate, with the newest weights in place; and these, see `_give`."""
        if self._inline or (self.plan.ranks == 1 and self.plan.staleness):
            return self._learners, None
        return self._units, self._give()

    # --- weights and state ------------------------------------------------------------------------

    def preflight(self, wanted: Conventions) -> list[Finding]:
        """Have the policy that the run starts from check its environments, on the device where it acts."""
        return self._result(self._seats[self._units[0]].call(SeatWorker.preflight, wanted))

    def save_policy(self, directory: Path) -> None:
        """Write the learner's newest weights to a directory that its first rank can reach."""
        calls = [
            self._seats[n].call(SeatWorker.save, directory if self.plan.seats[n].rank == 0 else None)
            for n in self._learners
        ]
        self._gather(calls, self._learners)

    @property
    def action_spec(self) -> ActionSpec:
        """The environments' convention."""
        return self._result(self._seats[self._units[0]].call(SeatWorker.spec))

    def state_dict(self) -> dict[str, Any]:
        """All that a resume needs, besides the policy's weights; bit-exact where nothing is asynchronous.

        Rollouts that were begun ahead end first, and are then left out: their episodes are not run again.
        """

        def ask_again(n: int) -> Future[dict[str, Any]]:
            if self._begun:
                self._begin_again(n)
            else:
                # A new unit comes to its episodes when it collects. What it does is not trained on.
                self._seats[n].call(SeatWorker.collect, self.version)
            return self._seats[n].call(SeatWorker.state_dict)

        calls = [seat.call(SeatWorker.state_dict) for seat in self._seats]
        states = [self._mended(n, call, partial(ask_again, n)) for n, call in enumerate(calls)]
        rank = {seat.rank: state for seat, state in zip(self.plan.seats, states, strict=True)}
        units = [states[n]["unit"] for n in self._units]
        return {"learner": rank[0]["learner"], "units": units}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave, here or on another number of learners; not of units."""
        if len(state["units"]) != len(self._units):
            raise RoveError(
                f"The checkpoint has the environments of {len(state['units'])} policies, the plan has "
                f"{len(self._units)}: resume on as many devices for the policy."
            )
        unit = dict(zip(self._units, state["units"], strict=True))
        calls = [
            seat.call(SeatWorker.load_state_dict, {"learner": state["learner"], "unit": unit.get(n)})
            for n, seat in enumerate(self._seats)
        ]
        self._gather(calls, list(range(len(self._seats))))

    def take_faults(self) -> list[str]:
        """Faults that were recovered from since the last call."""
        return self.supervisor.take_faults()

    @property
    def _inline(self) -> bool:
        """Whether the one seat is in this process, so that calls can call back."""
        return len(self._seats) == 1 and self._seats[0].here

    def _hook(self, callback: Callable[[], None]) -> Callable[[], None]:
        """The callback, where a call can call back; it does not reach other processes."""
        return callback if self._inline else noop

    def _gather(self, calls: Sequence[Future[R]], numbers: Sequence[int]) -> list[R | None]:
        """All results; None of a rollout's seat that is lost: it is mended when its rollout is asked for."""
        results: list[R | None] = []
        for number, call in zip(numbers, calls, strict=True):
            try:
                results.append(call.result())
            except Lost as lost:
                if self.plan.seats[number].rank is None and not isinstance(lost.error, RoveError):
                    results.append(None)
                    continue
                raise lost.reason("The learner failed: ") from lost
        return results

    def _answers(self, calls: Sequence[Future[R]]) -> list[R]:
        """All results of the learner's ranks. RoveError where one is lost: that ends the run."""
        return [self._result(call, "The learner failed: ") for call in calls]

    @staticmethod
    def _result(call: Future[R], what: str = "") -> R:
        """The result of a call whose seat cannot be lost without the run."""
        try:
            return call.result()
        except Lost as lost:
            raise lost.reason(what) from lost

    def close(self) -> None:
        """End everything."""
        for seat in self._seats:
            seat.close()
