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
from typing import Any, Protocol

import torch

from rove.config.schema import Run
from rove.envs import registry as envs
from rove.errors import RoveError
from rove.findings import Finding
from rove.ipc import Setup
from rove.placement.broadcast import Member
from rove.placement.plan import Plan
from rove.placement.seat import Collected, Judged, SeatPlan, SeatWorker, Updated
from rove.rollout.stage import Position
from rove.timing import Stopwatch
from rove.training import parallel
from rove.training.deal import deal, schedule
from rove.types import ActionSpec, Conventions, EpisodeSpec, EvalReport, TrainBatch, Trajectory


class SeatLost(Exception):
    """The process of a seat is gone; the text says how, with the original error where there was one."""


class Answer(Protocol):
    """A call under way."""

    def result(self) -> Any:
        """Wait for it. Raises what the call raised, or SeatLost."""
        ...


class Seated(Protocol):
    """A SeatWorker, wherever it is. Calls are carried out in the order in which they were made."""

    @property
    def gone(self) -> bool:
        """Whether its process is known to have ended."""
        ...

    def call(self, method: str, *args: Any) -> Answer: ...
    def close(self) -> None: ...


class Here:
    """A seat in this process: a call is carried out at once."""

    gone = False

    def __init__(self, seat: SeatPlan) -> None:
        self.worker = SeatWorker(seat)

    def call(self, method: str, *args: Any) -> Answer:
        return Done(getattr(self.worker, method)(*args))

    def close(self) -> None:
        self.worker.close()


class Done:
    """An answer that is there already."""

    def __init__(self, value: Any) -> None:
        self._value = value

    def result(self) -> Any:
        return self._value


class Executor(ABC):
    """The workers of a run."""

    def __init__(self, run: Run, plan: Plan, start: Path, profile: bool = False) -> None:
        self.run, self.plan, self.start = run, plan, start
        self.suite = envs.suite(run.env)
        self.watch = Stopwatch("driver", spans=profile)
        self.version = 0
        self.restarts = 0
        self.faults: list[str] = []
        """What went wrong and was mended, since they were last taken."""
        self._profile = profile
        self._rendezvous = ""
        self._weights: Any = None
        """The newest that units were given, as `_share` made them fit to be given."""
        self._members: dict[int, Member] = {}
        """Seats that weights are broadcast among; none where they go through the host."""
        self.sent = 0
        """Bytes that the last broadcast took, to all policies together."""
        self._begun: deque[list[tuple[int, Answer]]] = deque()
        self._lost: dict[int, list[Position | None]] = {}
        self._units = [n for n, seat in enumerate(plan.seats) if seat.unit is not None]
        self._units.sort(key=lambda n: plan.seats[n].unit or 0)
        self._learners = [n for n, seat in enumerate(plan.seats) if seat.rank is not None]
        self._seats: list[Seated] = []

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
    def _put(self, seat: SeatPlan) -> Seated:
        """A seat in its place, under construction."""

    def _seat_plan(self, number: int) -> SeatPlan:
        return SeatPlan(
            self.run,
            self.plan,
            number,
            self.start,
            Setup.here(),
            self._rendezvous,
            self._profile,
            self._members.get(number),
        )

    def _share(self, value: Any) -> Any:
        """`value`, as an argument that several seats are given."""
        return value

    # --- the loop's calls -------------------------------------------------------------------------

    def sync(self, version: int) -> None:
        """Give the rollout the learner's weights. Seats that train and collect share them: nothing moves."""
        self.version = version
        with self.watch("sync"):
            whole = self.plan.ranks == 1 or self.run.training.parallel == "ddp"
            if not self.plan.apart and whole:
                return
            if self.plan.staleness:
                self._weights = self._share(self._pull()) if self.plan.apart else self._pull(wanted=False)
            else:
                self._weights = self._give()

    def _give(self) -> Any:
        """The newest weights to all policies that are apart from the learner. Returns them, as `_share` made
        them fit to be given again; None where they were broadcast."""
        apart = self.plan.apart
        if self._members and any(self._seats[n].gone for n in apart):
            self._members = {}
        if not self._members:
            pulled = self._pull(wanted=bool(apart))
            new = self._share(pulled) if apart else None
            self._gather([self._seats[n].call("load_weights", new) for n in apart], apart)
            return new
        layout = self._seats[self._learners[0]].call("layout").result()
        # First those that wait for it: a learner in this process sends before the call returns.
        calls = [self._seats[n].call("receive_weights", layout) for n in apart]
        calls += [self._seats[n].call("send_weights", layout) for n in self._learners]
        received = self._gather(calls, [*apart, *self._learners])[: len(apart)]
        self.sent = sum(size or 0 for size in received)  # one that was lost meanwhile is mended later
        return None

    def _pull(self, wanted: bool = True) -> Any:
        """The newest weights of the learner; a collective of its ranks, of which the first answers, if they
        are `wanted` here."""
        calls = [
            self._seats[n].call("weights", self.version, wanted and self.plan.seats[n].rank == 0)
            for n in self._learners
        ]
        return next((found for found in self._gather(calls, self._learners) if found is not None), None)

    def collect(self, on_chunk: Callable[[], None]) -> Trajectory:
        """The oldest rollout that was begun, else one begun now: T chunks in B slots."""
        if not self._begun:
            self._begin(on_chunk)
        with self.watch("wait"):
            parts = [self._collected(n, answer) for n, answer in self._begun.popleft()]
        while len(self._begun) < self.plan.staleness:
            self._begin()
        for part in parts:
            seconds = {k: v / len(parts) for k, v in part.seconds.items()}
            self.watch.merge(seconds, part.spans)
            self.faults += part.faults
            self.restarts += len(part.faults)
        if not self._inline:
            for _ in range(self.run.rollout.chunks):
                on_chunk()
        trajectories = [part.trajectory for part in parts]
        return trajectories[0] if len(trajectories) == 1 else Trajectory.cat(trajectories)

    def _begin(self, *hooks: Any) -> None:
        """Begin a rollout on all units, on the newest weights that were published."""
        new = self._weights if self.plan.staleness else None
        calls = []
        for n in self._units:
            if new is not None and self.plan.seats[n].rank is None:
                self._seats[n].call("load_weights", new)
            calls.append((n, self._seats[n].call("collect", self.version, *(hooks if self._inline else ()))))
        self._begun.append(calls)

    def _collected(self, number: int, answer: Answer) -> Collected:
        """What a unit collected."""

        def again() -> Answer:
            # Before the rollouts that were begun ahead: those come after this one.
            answer = self._seats[number].call("collect", self.version)
            self._begin_again(number)
            return answer

        done: Collected = self._mended(number, answer, again)
        self._lost[number] = done.positions
        return done

    def _mended(self, number: int, answer: Answer, again: Callable[[], Answer]) -> Any:
        """A unit's answer. Where the unit was lost, another takes its place, and is asked `again`."""
        failures = 0
        while True:
            try:
                return answer.result()
            except SeatLost as lost:
                failures += 1
                if self.plan.seats[number].rank is not None or failures > self.run.placement.max_restarts:
                    raise RoveError(str(lost)) from lost
                self.faults.append(str(lost))
                self.restarts += 1
                self._replace(number)
                answer = again()

    def _replace(self, number: int) -> None:
        """A new unit in the place of one that was lost, with its weights and where its episodes began."""
        self._seats[number].close()
        if self._members:  # a group has no place for another: from now on weights go through the host
            self._members = {}
            self._weights = self._share(self._pull())
        seat = self._seats[number] = self._put(self._seat_plan(number))
        if self._weights is not None:
            seat.call("load_weights", self._weights)
        if number in self._lost:
            seat.call("place", self._lost[number])

    def _begin_again(self, number: int) -> None:
        """Rollouts that were begun ahead are lost with their unit."""
        for calls in self._begun:
            for i, (n, _) in enumerate(calls):
                if n == number:
                    calls[i] = (n, self._seats[number].call("collect", self.version))

    def update(self, batch: TrainBatch, iteration: int, on_step: Callable[[], None]) -> dict[str, float]:
        """The iteration's optimizer steps. A rank is given its rows alone, one rank after the other: of the
        batch there is never more than one share twice."""
        hooks = (on_step,) if self._inline else ()
        steps = schedule(len(batch), self.run, iteration)
        calls = []
        for n in self._learners:
            share = deal(batch, steps, self.plan.seats[n].rank or 0, self.plan.ranks)
            calls.append(self._seats[n].call("update", share, iteration, *hooks))
        done: list[Updated] = self._gather(calls, self._learners)
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
        hooks = (on_episode,) if self._inline else ()

        def ask(n: int) -> Answer:
            return self._seats[n].call("evaluate", parts[n], name, about, on_frames is not None, *hooks)

        def ask_again(n: int) -> Answer:
            self._begin_again(n)
            if new is not None:  # else the new unit came with the newest
                self._seats[n].call("load_weights", new)
            return ask(n)

        calls = {n: ask(n) for n in parts}
        judged: list[Judged] = [self._mended(n, calls[n], partial(ask_again, n)) for n in parts]
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

    def _judges(self) -> tuple[list[int], Any]:
        """The seats that evaluate, with the newest weights in place; and these, see `_give`."""
        if self._inline or (self.plan.ranks == 1 and self.plan.staleness):
            return self._learners, None
        return self._units, self._give()

    # --- weights and state ------------------------------------------------------------------------

    def preflight(self, wanted: Conventions) -> list[Finding]:
        """What the policy that the run starts from finds of its environments, on the device where it acts."""
        return self._seats[self._units[0]].call("preflight", wanted).result()

    def save_policy(self, directory: Path) -> None:
        """Write the learner's newest weights to a directory that its first rank can reach."""
        calls = [
            self._seats[n].call("save", directory if self.plan.seats[n].rank == 0 else None)
            for n in self._learners
        ]
        self._gather(calls, self._learners)

    @property
    def action_spec(self) -> ActionSpec:
        """The environments' convention."""
        return self._seats[self._units[0]].call("spec").result()

    def state_dict(self) -> dict[str, Any]:
        """All that a resume needs, besides the policy's weights; bit-exact where nothing is asynchronous.

        Rollouts that were begun ahead end first, and are then left out: their episodes are not run again.
        """

        def ask_again(n: int) -> Answer:
            if self._begun:
                self._begin_again(n)
            else:
                # A new unit comes to its episodes when it collects. What it does is not trained on.
                self._seats[n].call("collect", self.version)
            return self._seats[n].call("state_dict")

        calls = [seat.call("state_dict") for seat in self._seats]
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
            seat.call("load_state_dict", {"learner": state["learner"], "unit": unit.get(n)})
            for n, seat in enumerate(self._seats)
        ]
        self._gather(calls, list(range(len(self._seats))))

    def take_faults(self) -> list[str]:
        """What went wrong and was mended since the last call."""
        taken, self.faults = self.faults, []
        return taken

    @property
    def _inline(self) -> bool:
        """Whether the one seat is in this process, so that calls can call back."""
        return len(self._seats) == 1 and isinstance(self._seats[0], Here)

    def _gather(self, calls: Sequence[Answer], numbers: Sequence[int]) -> list[Any]:
        """All results. A seat that is lost here ends the run: a rollout's is mended where it is collected."""
        results = []
        for number, call in zip(numbers, calls, strict=True):
            try:
                results.append(call.result())
            except SeatLost as lost:
                if self.plan.seats[number].rank is None:
                    results.append(None)  # mended when its rollout is asked for
                    continue
                raise RoveError(f"The learner failed: {lost}") from lost
        return results

    def close(self) -> None:
        """End everything."""
        for seat in self._seats:
            seat.close()
