"""Where stages run: in this process, or several to an environment worker, a process of its own.

Both answer the same calls. `begin` and `step` return at once and are answered by one `Report` for each stage,
which `read` hands over; in this process the environment has then been stepped already.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from rove.ipc import Channel, ChannelClosed, Child, Crash, Segment, Setup
from rove.rollout.buffer import Exchange, Layout
from rove.rollout.stage import Position, Report, Stage, StagePlan
from rove.types import ActionSpec


class Hello(NamedTuple):
    """What the environments of a worker look like."""

    action_spec: ActionSpec
    image: tuple[int, ...]
    """(n, H, W, 3)."""
    state: int | None


class Slots(NamedTuple):
    """The slots of a stage in the rollout."""

    first: int
    last: int


class WorkerFault(Exception):
    """A worker died, hung or answered nonsense; `str` says which, with the original traceback."""

    def __init__(self, message: str, error: BaseException | None = None) -> None:
        super().__init__(message)
        self.error = error


class Host(Protocol):
    """Runs the stages `slots` describes."""

    name: str
    slots: Sequence[Slots]
    shared: bool
    """Whether rollouts have to lie in shared memory."""

    def hello(self) -> Hello: ...
    def begin(
        self,
        layout: Layout,
        exchange: Exchange,
        segment: Segment | None,
        positions: Sequence[Position] | None,
    ) -> None:
        """With `positions`, one a stage, those episodes are begun again; else it goes on where it was."""
        ...

    def step(self, stage: int, t: int) -> None: ...
    def read(self) -> Report: ...
    def fileno(self) -> int: ...
    def restart(self, positions: Sequence[Position] | None) -> None: ...
    def state_dict(self) -> list[dict[str, Any]]: ...
    def load_state_dict(self, state: Sequence[dict[str, Any]]) -> None: ...
    def close(self) -> None: ...

    @property
    def overdue(self) -> bool: ...
    @property
    def pending(self) -> int:
        """Reports that can be read without waiting."""
        ...


class InProcess:
    """Stages in this process, stepped by the caller."""

    name, shared, overdue = "environments", False, False

    def __init__(self, plans: Sequence[StagePlan], slots: Sequence[Slots]) -> None:
        self.stages: list[Stage] = [plan.build(number) for number, plan in enumerate(plans)]
        self.slots = slots
        self._reports: deque[Report] = deque()
        self._hello: Hello | None = None

    def hello(self) -> Hello:
        if self._hello is None:  # asked once: it resets, which belongs to a rollout's simulation
            self._hello = _hello(self.stages[0])
        return self._hello

    def begin(
        self,
        layout: Layout,
        exchange: Exchange,
        segment: Segment | None,
        positions: Sequence[Position] | None,
    ) -> None:
        for number, (stage, slots) in enumerate(zip(self.stages, self.slots, strict=True)):
            if positions is not None:
                stage.restart(positions[number])
            self._reports.append(stage.begin(exchange.slots(*slots)))

    def step(self, stage: int, t: int) -> None:
        self._reports.append(self.stages[stage].step(t))

    @property
    def pending(self) -> int:
        return len(self._reports)

    def read(self) -> Report:
        return self._reports.popleft()

    def fileno(self) -> int:
        raise AssertionError("a report is always there already")

    def restart(self, positions: Sequence[Position] | None) -> None:
        raise AssertionError("an error in this process is the caller's")

    def state_dict(self) -> list[dict[str, Any]]:
        return [stage.state_dict() for stage in self.stages]

    def load_state_dict(self, state: Sequence[dict[str, Any]]) -> None:
        for stage, own in zip(self.stages, state, strict=True):
            stage.load_state_dict(own)

    def close(self) -> None:
        for stage in self.stages:
            stage.close()


_START = 300.0
"""Seconds that a process has to start."""


class EnvWorker:
    """Stages in a child process. While it steps one, the policy can serve the others."""

    shared, pending = True, 0

    def __init__(
        self,
        name: str,
        plans: Sequence[StagePlan],
        slots: Sequence[Slots],
        *,
        setup: Setup,
        deadline: float,
        cores: Sequence[int] = (),
        environment: dict[str, str] | None = None,
    ) -> None:
        """`deadline`: seconds without an answer, after which it counts as hung. The rest: see `ipc.Child`."""
        self.name, self.plans, self.slots = name, tuple(plans), slots
        self._setup, self._cores, self._environment = setup, cores, environment
        self._deadline = deadline
        self._rollout: tuple[Layout, Segment] | None = None
        self._loaded: list[dict[str, Any]] | None = None
        self._start()

    def _start(self) -> None:
        target = "rove.rollout.workers:serve"
        self._child = Child(
            target, (self.plans,), setup=self._setup, cores=self._cores, environment=self._environment
        )
        self._hello: Hello | None = None
        self._waiting, self._asked = 1, time.monotonic()

    def hello(self) -> Hello:
        if self._hello is None:
            self._answer(Hello)
        assert self._hello is not None
        return self._hello

    def begin(
        self,
        layout: Layout,
        exchange: Exchange,
        segment: Segment | None,
        positions: Sequence[Position] | None,
    ) -> None:
        assert segment is not None
        self._rollout = (layout, segment)
        self._begin(positions)

    def _begin(self, positions: Sequence[Position] | None) -> None:
        assert self._rollout is not None
        layout, segment = self._rollout
        message = ("begin", layout, tuple(self.slots), positions)
        self._send(message, answers=len(self.slots), segment=segment)

    def step(self, stage: int, t: int) -> None:
        self._send(("step", stage, t), answers=1)

    def read(self) -> Report:
        return self._answer(Report)

    def fileno(self) -> int:
        return self._child.channel.fileno()

    @property
    def overdue(self) -> bool:
        return self._waiting > 0 and time.monotonic() - self._asked > self._limit

    @property
    def _limit(self) -> float:
        """Seconds that it has for an answer; for the first one it has to import and to compile."""
        return self._deadline if self._hello is not None else max(self._deadline, _START)

    def restart(self, positions: Sequence[Position] | None) -> None:
        """A new process in the place of this one, which begins these episodes in the rollout under way.

        Without positions it begins as the first one did: with the state that was loaded, or from the start.
        """
        self._child.kill()
        self._start()
        if positions is None and self._loaded is not None:
            self._send(("load", self._loaded), answers=1)
        self._begin(positions)

    def state_dict(self) -> list[dict[str, Any]]:
        return self._call("state", None)

    def load_state_dict(self, state: Sequence[dict[str, Any]]) -> None:
        self._loaded = list(state)
        self._call("load", self._loaded)

    def close(self) -> None:
        self._child.join()

    def _call(self, name: str, argument: Any) -> Any:
        self.hello()
        self._send((name, argument), answers=1)
        return self._answer(tuple)[0]

    def _send(self, message: Any, *, answers: int, segment: Segment | None = None) -> None:
        if self._waiting == 0:
            self._asked = time.monotonic()
        self._waiting += answers
        try:
            self._child.channel.send(message, segment=segment)
        except ChannelClosed:
            raise self._died() from None

    def _answer(self, kind: type) -> Any:
        """The next message, which has to be a `kind`. Raises WorkerFault where it is not, or none comes."""
        left = self._limit - (time.monotonic() - self._asked)
        if not self._child.channel.poll(max(left, 0.0)):
            raise WorkerFault(f"{self.name} did not answer for {self._limit:g} s")
        try:
            message = self._child.channel.recv()
        except ChannelClosed:
            raise self._died() from None
        except Exception as error:  # bytes that are no message fail in any way they like
            raise WorkerFault(f"{self.name} sent what is no message: {error!r}") from error
        if isinstance(message, Crash):
            raise WorkerFault(f"{self.name} failed:\n{message.trace.rstrip()}", message.error)
        self._waiting, self._asked = self._waiting - 1, time.monotonic()
        if isinstance(message, Hello):
            self._hello = message
            return message if kind is Hello else self._answer(kind)
        if message == (None,) and kind is Report:  # a state has been loaded
            return self._answer(kind)
        if not isinstance(message, kind):
            raise WorkerFault(f"{self.name} answered {message!r} where a {kind.__name__} was expected")
        return message

    def _died(self) -> WorkerFault:
        """The process is gone; if it could still say why, that."""
        try:
            while self._child.channel.poll():
                message = self._child.channel.recv()
                if isinstance(message, Crash):
                    return WorkerFault(f"{self.name} failed:\n{message.trace.rstrip()}", message.error)
        except ChannelClosed:
            pass
        code = self._child.process.wait(5)
        how = f"was killed by signal {-code}" if code < 0 else f"exited with code {code}"
        return WorkerFault(f"{self.name} {how} (process {self._child.process.pid})")


def serve(channel: Channel, plans: Sequence[StagePlan]) -> None:
    """What an environment worker does until its channel is closed."""
    stages = [plan.build(number) for number, plan in enumerate(plans)]
    channel.send(_hello(stages[0]))
    over = list(stages)
    """Stages between rollouts: their resets are done while nothing else is asked."""
    layout: Layout | None = None
    while True:
        if over and not channel.poll():
            over.pop(0).ready()
            continue
        message, fd = channel.recv_segment()
        match message:
            case ("begin", Layout() as layout, slots, positions):
                assert fd is not None
                exchange = layout.map(Segment.attach(fd, layout.size))
                for number, (stage, own) in enumerate(zip(stages, slots, strict=True)):
                    if positions is not None:
                        stage.restart(positions[number])
                    channel.send(stage.begin(exchange.slots(*own)))
                over = []
            case ("step", number, t):
                assert layout is not None
                report = stages[number].step(t)
                channel.send(report)
                if report.t == layout.chunks or not report.running:
                    over.append(stages[number])
            case ("state", None):
                channel.send(([stage.state_dict() for stage in stages],))
            case ("load", state):
                for stage, own in zip(stages, state, strict=True):
                    stage.load_state_dict(own)
                channel.send((None,))


def _hello(stage: Stage) -> Hello:
    observation = stage.ready()
    state = None if observation.state is None else observation.state.shape[1]
    return Hello(stage.env.action_spec, tuple(observation.images.shape[1:]), state)
