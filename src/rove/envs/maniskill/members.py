"""Who simulates a share of the slots: this process, or one of its own.

Calls and answers are those of `Fleet`. A member is sent an order, and asked for its answer later: so several
work at once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Protocol

from rove.envs.maniskill.fleet import Call, Fleet
from rove.errors import RoveError
from rove.ipc import ChannelClosed, Child, Crash, Setup


class Died(Exception):
    """A worker is gone; `str` says how."""


class Member(Protocol):
    """Runs the worlds of some slots."""

    def send(self, call: Call, argument: Any) -> None: ...
    def recv(self) -> Any:
        """The answer. Raises Died."""
        ...

    def close(self) -> None: ...


class Local:
    """In this process."""

    def __init__(self, config: Any, slots: Sequence[int], chunk: int, gpu: int | None) -> None:
        self.fleet = Fleet(config, slots, chunk, gpu)
        self._answers: deque[Any] = deque()

    def send(self, call: Call, argument: Any) -> None:
        self._answers.append(getattr(self.fleet, call)(argument))

    def recv(self) -> Any:
        return self._answers.popleft()

    def close(self) -> None:
        self.fleet.close()


class Remote:
    """In a process of its own."""

    def __init__(self, config: Any, slots: Sequence[int], chunk: int, gpu: int | None, threads: int) -> None:
        self.child = Child(
            "rove.envs.maniskill.fleet:serve",
            (config, tuple(slots), chunk, gpu),
            setup=Setup.here(),
            # Mesa's software renderer takes every core unless told otherwise.
            environment={"LP_NUM_THREADS": str(threads)},
        )

    def send(self, call: Call, argument: Any) -> None:
        with suppress(ChannelClosed):  # the answer says so
            self.child.channel.send((call, argument))

    def recv(self) -> Any:
        try:
            answer = self.child.channel.recv()
        except ChannelClosed:
            code = self.child.process.wait(5)
            how = f"was killed by signal {-code}" if code < 0 else f"exited with code {code}"
            raise Died(f"simulator process {self.child.process.pid} {how}") from None
        if isinstance(answer, Crash):
            if isinstance(answer.error, RoveError):
                raise answer.error
            raise Died(f"simulator process {self.child.process.pid} failed:\n{answer.trace.rstrip()}")
        return answer[0]

    def close(self) -> None:
        self.child.join()
