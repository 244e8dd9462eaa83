"""Environments × policy → Trajectory, overlapped. Knows no algorithm: T chunks, and what happened in them.

    env worker 0:  │ sim a │ sim b │ sim a │ sim b │ …        a, b: stages of worker 0; c, d: of worker 1.
    env worker 1:  │ sim c │ sim d │ sim c │ sim d │ …        Every stage has its own environments, episodes
    policy:        │ a │ c │ b │ d │ a │ c │ b │ d │ …        and slots of the rollout.

The policy's loop (`Pipeline.collect`)
    consumes        reports: stage s has its observation in row t of the shared rollout
    produces        actions of stage s, in the shared rollout, and the request to execute them as chunk t
    waits for       the next report, only while no stage is waiting for actions
    is unblocked by a worker's report; or a worker's end, or its deadline: then the worker is replaced
An environment worker's loop (`environment.EnvironmentWorker`)
    consumes        requests (s, t) in the order in which they came
    produces        reward, ends and next observation in the rows of stage s, then a report
    waits for       the next request; until it comes, resets the stages whose rollout is over
    is unblocked by the policy's request

With k ≥ 2 stages a worker simulates one while the policy serves another, so a chunk of all slots takes
max(simulation, inference) rather than their sum. Whichever stage reported first is served first; stages that
wait together share one forward pass, but never more than half of those that still run: the other half keeps
the environments busy meanwhile. `service="fixed"` serves stage after stage in order, one a pass, whatever
arrives when, so that results do not depend on timing. One stage in this process is the plain loop: act,
step, act, step.

Idle slots cost neither inference nor simulation. Values of observations that nothing acted on (after the
last chunk, and at the end of episodes) fill the policy's pauses, a few rows at a time, so that no stage waits
long for them; what is left when the last stage is through is computed in one batch. `fixed` leaves all of it
for that batch.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal, TypeVar

import torch
from torch import Tensor

from rove import transfer
from rove.policies.base import Policy, SamplingNoise
from rove.rollout.buffer import Layout, Memory, RolloutBuffer
from rove.rollout.collect import act, refuse_not_finite
from rove.rollout.stage import Position, Report
from rove.runtime import memory
from rove.runtime.actor import Future, Lost, Supervisor, wait
from rove.runtime.channel import Segment
from rove.runtime.pulse import WAKE, headway
from rove.timing import Stopwatch
from rove.types import ActionChunk, EpisodeRecord, Observation, Trajectory
from rove.workers.environment import Environments

R = TypeVar("R")
Service = Literal["first_ready", "fixed"]


@dataclass(frozen=True, slots=True)
class _Unvalued:
    """Observations [R] that nothing acted on."""

    t: int | None
    """They ended episodes in chunk t; None: they came after the last chunk."""
    slots: Tensor
    """int64 [R]."""
    observation: Observation

    def split(self, rows: int) -> tuple[_Unvalued, _Unvalued]:
        """The first `rows`, and the others."""
        first, others = range(rows), range(rows, len(self.slots))
        return (
            _Unvalued(self.t, self.slots[:rows], self.observation.select(first)),
            _Unvalued(self.t, self.slots[rows:], self.observation.select(others)),
        )


@dataclass(eq=False)
class _Track:
    """A stage's way through one rollout."""

    worker: Environments
    number: int
    """Number of the stage in its worker."""
    first: int
    last: int
    """Its slots of the rollout: from `first` up to `last`."""
    asked: Future[Report] | None = None
    """The report that it is working on."""
    report: Report | None = None
    """The newest."""
    position: Position | None = None
    """The stage's position when the rollout began."""
    finished: list[tuple[int, EpisodeRecord]] = field(default_factory=list)
    unvalued: list[_Unvalued] = field(default_factory=list)

    def running(self) -> list[int]:
        """Slots within the stage that run an episode."""
        assert self.report is not None
        return [slot for slot, seed in enumerate(self.report.seeds) if seed is not None]


class Pipeline:
    """Collects rollouts of T chunks in all slots of its workers; an episode in flight goes on in the next."""

    def __init__(
        self,
        workers: Sequence[Environments],
        policy: Policy,
        *,
        chunks: int,
        seed: int,
        critic: bool,
        branches: int = 1,
        service: Service = "first_ready",
        supervisor: Supervisor | None = None,
    ) -> None:
        """`branches` chunks are tried in each state, and the first carried on. `supervisor` counts workers
        that are replaced, without a completed rollout in between."""
        self.workers, self.policy = workers, policy
        self.chunks, self.seed, self.critic = chunks, seed, critic
        self.branches = branches
        self.service: Service = service
        self.supervisor = supervisor or Supervisor(3)
        self.positions: list[Position | None] = []
        """The position of each stage when its next rollout begins."""
        self._placed = False
        memory.require(self._layout().size, f"A rollout of {chunks} chunks in {self._slots} environments")

    def collect(
        self, version: int, watch: Stopwatch, on_chunk: Callable[[], None] = lambda: None
    ) -> Trajectory:
        """One rollout; `version` numbers the weights that act. RoveError where a worker goes on failing."""
        began, before = time.perf_counter(), dict(watch.seconds)
        self._watch, self._version = watch, version
        self._tracks = [
            _Track(worker, number, *slots)
            for worker in self.workers
            for number, slots in enumerate(worker.slots)
        ]
        self._open, self._waiting = list(self._tracks), deque[_Track]()
        self._turn = 0
        self._pause = max(1, min(track.last - track.first for track in self._tracks) // 4)
        """Rows that are valued at once while every stage is being simulated."""
        self._memory = self._allocate()
        for worker in self.workers:
            self._ask(worker, worker.begin(self._memory, self._first_positions(worker)))
        self._placed = False
        advanced = 0
        while self._open:
            served = self._next()
            if served:
                self._serve(served)
            done = sum(track.report.t for track in self._tracks if track.report) // len(self._tracks)
            for _ in range(done - advanced):
                on_chunk()
            advanced = max(advanced, done)
        self._bootstrap(self._owed())
        self.supervisor.works()
        self.positions = [track.report.position if track.report else None for track in self._tracks]
        self._count_idle(time.perf_counter() - began, before)
        return self._buffer.trajectory(version, self._finished())

    def _first_positions(self, worker: Environments) -> list[Position] | None:
        """None where its stages go on where they were: no episodes were given by `place`."""
        known = [p for p, track in zip(self.positions, self._tracks, strict=False) if track.worker is worker]
        return _all(known) if self._placed else None

    def _ask(self, worker: Environments, reports: Sequence[Future[Report]]) -> None:
        """Reports of all stages of a worker are on their way."""
        for track in self._tracks:
            if track.worker is worker:
                track.asked = reports[track.number]

    @property
    def _slots(self) -> int:
        return self.workers[-1].slots[-1].last

    def _layout(self) -> Layout:
        hello = self.workers[0].hello()
        return Layout(
            chunks=self.chunks,
            num_envs=self._slots,
            chunk=self.policy.chunk,
            action_dim=hello.action_spec.dim,
            image=hello.image,
            state=hello.state,
            branches=self.branches,
        )

    def _allocate(self) -> Memory:
        self._action_spec = self.workers[0].hello().action_spec
        layout = self._layout()
        shared = not all(worker.actor.here for worker in self.workers)
        whole = Memory(layout, Segment(layout.size) if shared else None)
        self._buffer = RolloutBuffer(
            layout, whole.exchange, self.policy.sample_shape, self.policy.sample_dtype
        )
        return whole

    # --- reports in -------------------------------------------------------------------------------

    def _next(self) -> list[_Track]:
        """The stages to serve now; none where only finished ones have reported."""
        self._read(block=False)
        pauses = self.service == "first_ready"
        while pauses and self._open and not self._waiting and (owed := self._owed(self._pause)):
            self._bootstrap(owed)
            self._read(block=False)
        if self._open and not self._waiting:
            self._read(block=True)
        if self.service == "fixed":
            while self._open:
                track = self._open[self._turn % len(self._open)]
                if track in self._waiting:
                    self._waiting.remove(track)
                    self._turn = self._open.index(track) + 1
                    return [track]
                self._read(block=True)
            return []
        # With every environment idle the first pass is a short one: they should not wait for all of it.
        limit = len(self._open) // 2 if len(self._waiting) < len(self._open) else 1
        limit = max(1, limit)
        return [self._waiting.popleft() for _ in range(min(limit, len(self._waiting)))]

    def _read(self, block: bool) -> None:
        """Accept every report that is there; with `block`, wait for one (or a fault)."""
        asked = [(track, track.asked) for track in self._tracks if track.asked is not None]
        # In the order of the stages: with `fixed` service nothing may depend on who was heard first.
        for number in wait([future for _, future in asked], WAKE if block else 0):
            track, future = asked[number]
            if track.asked is not future:
                continue  # its worker has just been replaced
            try:
                self._accept(track, future.result())
            except Lost as lost:
                self._recover(track.worker, lost)

    def _accept(self, track: _Track, report: Report) -> None:
        headway()
        self._check(track, report)
        track.asked = None
        if report.t == 0:
            track.position = report.position
        track.report = report
        track.finished += [(report.t, replace(r, slot=track.first + r.slot)) for r in report.finished]
        if self.critic and report.final_observation is not None:
            slots = torch.tensor(report.final_slots) + track.first
            track.unvalued.append(_Unvalued(report.t - 1, slots, report.final_observation))
        self.supervisor.add(report.faults)
        self._buffer.put_texts(report.t, track.first, report.instruction)
        self._watch.add("simulation", *report.span, track=track.worker.name)
        if report.t == self.chunks or not report.running:
            self._close(track)
        else:
            self._waiting.append(track)

    def _check(self, track: _Track, report: Report) -> None:
        """Raise Lost on a report that cannot be true."""
        slots, expected = track.last - track.first, 0 if track.report is None else track.report.t + 1
        lengths = {len(report.instruction), len(report.seeds), len(report.elapsed)}
        if report.t != expected or lengths != {slots}:
            raise Lost(
                track.worker.name,
                f"reported row {report.t} of {sorted(lengths)} slots, not row {expected} of {slots}",
            )

    def _close(self, track: _Track) -> None:
        """The rollout is over for this stage; whose turn comes next does not change."""
        if self.critic and (rows := track.running()):
            slots = torch.tensor(rows) + track.first
            track.unvalued.append(_Unvalued(None, slots, self._seen(track, rows)))
        index = self._open.index(track)
        self._open.remove(track)
        if index < self._turn:
            self._turn -= 1

    # --- actions out ------------------------------------------------------------------------------

    def _serve(self, tracks: Sequence[_Track]) -> None:
        """Choose actions for the running slots of `tracks` in one pass, and send them off."""
        seen, episodes, elapsed, counts = [], [], [], []
        for track in tracks:
            report, rows = track.report, track.running()
            assert report is not None
            seen.append(self._seen(track, rows))
            episodes += [report.seeds[row] for row in rows]
            elapsed += [report.elapsed[row] for row in rows]
            counts.append(len(rows))
        noise = SamplingNoise(self.seed, torch.tensor(episodes), torch.tensor(elapsed) // self.policy.chunk)
        with self._watch("inference"):
            observation = seen[0] if len(seen) == 1 else Observation.cat(seen)
            samples = self.branches if self.branches > 1 else None
            chunk = act(self.policy, self._action_spec, observation, noise, samples)
            at = max(track.report.t for track in tracks if track.report)
            refuse_not_finite(chunk, self.policy, f"in iteration {self._version + 1}, chunk {at + 1}")
            parts = _split(chunk, counts)
            for track, part in zip(tracks, parts, strict=True):
                assert track.report is not None
                slots = torch.tensor(track.running()) + track.first
                self._buffer.put_action(track.report.t, slots, part)
        for track in tracks:
            assert track.report is not None
            track.asked = track.worker.step(track.number, track.report.t)

    def _seen(self, track: _Track, rows: Sequence[int]) -> Observation:
        """The last observation of these slots of a stage; no frame is copied where that is all of them."""
        assert track.report is not None
        observation = self._buffer.observation(track.report.t, track.first, track.last)
        return observation if len(rows) == len(observation) else observation.select(rows)

    def _owed(self, rows: float = math.inf) -> list[_Unvalued]:
        """Takes observations that lack a value from the stages: all of them, or as many as `rows`."""
        owed: list[_Unvalued] = []
        for track in self._tracks:
            while track.unvalued and rows > 0:
                part = track.unvalued.pop(0)
                if len(part.slots) > rows:
                    part, others = part.split(int(rows))
                    track.unvalued.insert(0, others)
                owed.append(part)
                rows -= len(part.slots)
        # never in the order of arrival
        return sorted(owed, key=lambda part: (-1 if part.t is None else part.t, int(part.slots[0])))

    def _bootstrap(self, owed: Sequence[_Unvalued]) -> None:
        """Compute the values of observations that nothing acted on, in one pass."""
        if not owed:
            return
        with self._watch("inference"), torch.inference_mode():
            value = self.policy.value(Observation.cat([part.observation for part in owed]))
            value = transfer.to(value, "cpu")
        for part, values in zip(owed, value.split([len(part.slots) for part in owed]), strict=True):
            self._buffer.put_value(part.t, part.slots, values)

    def _finished(self) -> list[EpisodeRecord]:
        """In order of chunk, then slot: never of arrival."""
        records = [entry for track in self._tracks for entry in track.finished]
        return [record for _, record in sorted(records, key=lambda entry: (entry[0], entry[1].slot))]

    # --- faults -----------------------------------------------------------------------------------

    def _recover(self, worker: Environments, lost: Lost) -> None:
        """Replace a worker; its stages begin the rollout's episodes again, the others go on.

        Episodes that were under way when the rollout began are begun from their first observation.
        """
        self.supervisor.note(lost)
        positions = [self._rewind(track) for track in self._tracks if track.worker is worker]
        self._ask(worker, worker.restart(self._memory, _all(positions)))

    def _rewind(self, track: _Track) -> Position | None:
        """Forget what the stage did in this rollout; returns what it began with, None where not known."""
        if track.position is None and self.positions:
            track.position = self.positions[self._tracks.index(track)]
        track.report, track.finished, track.unvalued = None, [], []
        self._buffer.clear(track.first, track.last)
        if track in self._waiting:
            self._waiting.remove(track)
        if track not in self._open:
            self._open.append(track)
            self._open.sort(key=self._tracks.index)
        return track.position

    def _count_idle(self, seconds: float, before: dict[str, float]) -> None:
        """Seconds in which the policy, and an environment worker on average, had nothing to do."""
        spent = {n: self._watch.seconds.get(n, 0.0) - before.get(n, 0.0) for n in ("simulation", "inference")}
        self._watch.count("policy_idle", max(0.0, seconds - spent["inference"]))
        self._watch.count("env_idle", max(0.0, seconds - spent["simulation"] / len(self.workers)))

    # --- saving -----------------------------------------------------------------------------------

    def state_dict(self) -> list[list[dict]]:
        """Between rollouts: of every worker, of every stage, all that a bit-exact resume needs."""
        return [self._answer(worker, worker.state_dict) for worker in self.workers]

    def load_state_dict(self, state: Sequence[Sequence[dict]]) -> None:
        """Restore what `state_dict` gave."""
        for worker, own in zip(self.workers, state, strict=True):
            self._answer(worker, partial(worker.load_state_dict, list(own)))

    def _answer(self, worker: Environments, ask: Callable[[], R]) -> R:
        """What a worker answers between rollouts. One that is lost is replaced, and begins its episodes
        again."""
        while True:
            try:
                return ask()
            except Lost as lost:
                self.supervisor.note(lost)
                first = sum(len(other.slots) for other in self.workers[: self.workers.index(worker)])
                worker.replace(_all(self.positions[first : first + len(worker.slots)]))

    def place(self, positions: Sequence[Position | None]) -> None:
        """Before the first rollout: begin it with these episodes, one position a stage."""
        self.positions, self._placed = list(positions), True

    def close(self) -> None:
        """End the workers, free the environments."""
        for worker in self.workers:
            worker.close()


def _all(positions: Sequence[Position | None]) -> list[Position] | None:
    """None unless each is known."""
    known = [position for position in positions if position is not None]
    return known if known and len(known) == len(positions) else None


def _split(chunk: ActionChunk, counts: Sequence[int]) -> list[ActionChunk]:
    """The rows of each stage."""
    if len(counts) == 1:
        return [chunk]
    values = [None] * len(counts) if chunk.value is None else list(chunk.value.split(list(counts)))
    columns = (x.split(list(counts)) for x in (chunk.actions, chunk.sample, chunk.logprob))
    return [
        ActionChunk(actions, sample, logprob, value)
        for actions, sample, logprob, value in zip(*columns, values, strict=True)
    ]
