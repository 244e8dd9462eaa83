"""Runs a Plan on this machine: one learner in this process, everything else in children of it."""

from __future__ import annotations

from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import Any

from rove.config.schema import Run
from rove.errors import RoveError
from rove.ipc import Channel, ChannelClosed, Child, Crash, Packed
from rove.placement.executor import Answer, Executor, Here, Seated, SeatLost
from rove.placement.plan import Plan
from rove.placement.seat import SeatPlan, SeatWorker


class LocalExecutor(Executor):
    """See `Executor`."""

    def __init__(self, run: Run, plan: Plan, start: Path, profile: bool = False) -> None:
        super().__init__(run, plan, start, profile)
        self._seat_all()

    def _put(self, seat: SeatPlan) -> Seated:
        alone = self.plan.seats[seat.number].rank is not None and self.plan.ranks == 1
        return Here(seat) if alone else InChild(seat)

    def _share(self, value: Any) -> Any:
        return Packed(value)


class InChild:
    """A seat in a child process. Calls queue up in its channel and are answered in order."""

    def __init__(self, seat: SeatPlan) -> None:
        own = seat.plan.seats[seat.number]
        self.name = f"policy {own.unit}" if own.rank is None else f"learner {own.rank}"
        self._child = Child("rove.placement.local:serve", (seat,), setup=seat.setup)
        self._asked: deque[_Pending] = deque()
        self._gone: SeatLost | None = None

    def call(self, method: str, *args: Any) -> Answer:
        pending = _Pending(self)
        self._asked.append(pending)
        if self._gone is None:
            with suppress(ChannelClosed):  # reading says why
                given = next((arg.segment for arg in args if isinstance(arg, Packed)), None)
                self._child.channel.send((method, args), segment=given)
        return pending

    @property
    def gone(self) -> bool:
        return self._gone is not None or self._child.process.poll() is not None

    def read(self) -> None:
        """Give the next result to the oldest call."""
        if self._gone is None:
            try:
                answer = self._child.channel.recv()
            except ChannelClosed:
                self._gone = self._died()
            else:
                if isinstance(answer, Crash):
                    self._gone = SeatLost(f"{self.name} failed:\n{answer.trace.rstrip()}")
                    self._gone.__cause__ = answer.error
                else:
                    self._asked.popleft().set(answer[0])
                    return
        if isinstance(self._gone.__cause__, RoveError):
            raise self._gone.__cause__
        raise self._gone

    def _died(self) -> SeatLost:
        code = self._child.process.wait(5)
        how = f"was killed by signal {-code}" if code < 0 else f"exited with code {code}"
        return SeatLost(f"{self.name} {how} (process {self._child.process.pid})")

    def close(self) -> None:
        self._child.join()


class _Pending:
    """A call of a child, answered or not."""

    def __init__(self, seat: InChild) -> None:
        self._seat, self._value, self._done = seat, None, False

    def set(self, value: Any) -> None:
        self._value, self._done = value, True

    def result(self) -> Any:
        while not self._done:
            self._seat.read()
        return self._value


def serve(channel: Channel, seat: SeatPlan) -> None:
    """What a child with a seat does until its channel is closed."""
    worker = SeatWorker(seat)
    try:
        while True:
            (method, args), fd = channel.recv_segment()
            args = [arg.unpack(fd) if isinstance(arg, Packed) else arg for arg in args]
            channel.send((getattr(worker, method)(*args),))
    finally:
        worker.close()
