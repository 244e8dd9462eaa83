"""A typed handle on an object that may be in another process.

    learner: Actor[Learner] = InChild("learner 0", partial(Learner, config))
    done: Future[Metrics] = learner.call(Learner.update, batch, iteration)
    done.result()

A call names the method itself: an editor goes to its definition, and a type checker checks its arguments and
knows its result. `local.py` has actors in this process and in children of it, `ray.py` on Ray.
"""

from __future__ import annotations

import select
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Concatenate, Generic, ParamSpec, Protocol, TypeVar, runtime_checkable

from rove.errors import RoveError
from rove.runtime.pulse import WAKE, headway


class Worker(Protocol):
    """An object that an actor can hold."""

    def close(self) -> None:
        """Free what it holds."""
        ...


@runtime_checkable
class Resting(Protocol):
    """Optional: a worker with something to do while nothing is asked of it, in a process of its own."""

    def rest(self) -> bool:
        """Do a part of it. Returns whether there was any left."""
        ...


T = TypeVar("T", bound=Worker)
P = ParamSpec("P")
R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)
V_co = TypeVar("V_co", covariant=True)


class Lost(Exception):
    """An actor's process is gone, or has failed, or does not answer: the text says which, and of whom."""

    def __init__(self, name: str, how: str, error: BaseException | None = None) -> None:
        """`error` is the exception that ended it, where there was one."""
        super().__init__(f"{name} {how}")
        self.name, self.how, self.error = name, how, error
        self.__cause__ = error

    def __reduce__(self) -> tuple[type[Lost], tuple[str, str]]:
        return Lost, (self.name, self.how)

    def reason(self, what: str = "") -> RoveError:
        """The error to end a run with: the RoveError that ended the worker, else one that says `what`, and
        how it was lost."""
        return self.error if isinstance(self.error, RoveError) else RoveError(f"{what}{self}")


class Future(ABC, Generic[R_co]):
    """A call under way."""

    @abstractmethod
    def result(self) -> R_co:
        """Wait for the result. Raises Lost where none will come."""

    @abstractmethod
    def ready(self) -> bool:
        """Whether `result` would not have to wait."""

    @abstractmethod
    def fileno(self) -> int | None:
        """A descriptor that can be read when there is news of a call that is not `ready`; None: there is
        none, so that it has to be asked again and again."""


class Done(Future[R_co]):
    """The result of a call that has been carried out."""

    def __init__(self, value: R_co) -> None:
        self._value = value

    def result(self) -> R_co:
        return self._value

    def ready(self) -> bool:
        return True

    def fileno(self) -> int:
        raise AssertionError("nobody waits for what is there")


def wait(futures: Sequence[Future[Any]], seconds: float) -> list[int]:
    """Which of the calls are ready, by their places; waits for one of them for so many seconds at most."""
    ready = [number for number, future in enumerate(futures) if future.ready()]
    if ready or seconds <= 0 or not futures:
        return ready
    headway()  # those that are waited for have deadlines of their own
    descriptors = [future.fileno() for future in futures]
    known = {descriptor for descriptor in descriptors if descriptor is not None}
    if None not in descriptors:
        select.select(known, [], [], seconds)
        return [number for number, future in enumerate(futures) if future.ready()]
    until, pause = time.monotonic() + seconds, 0.001
    while not ready and time.monotonic() < until:
        time.sleep(pause)
        pause = min(2 * pause, 0.05)
        ready = [number for number, future in enumerate(futures) if future.ready()]
    return ready


def as_ready(futures: Sequence[Future[Any]]) -> Iterator[int]:
    """The places of the calls, in the order in which they are ready, each once. Yields -1 every second in
    which none is."""
    pending = dict(enumerate(futures))
    while pending:
        places = list(pending)
        found = [places[number] for number in wait(list(pending.values()), WAKE)]
        for place in found:
            del pending[place]
        yield from found or [-1]


class Actor(ABC, Generic[T]):
    """A `T` somewhere. Calls are carried out in the order in which they were made."""

    name: str
    """Said of it in errors: "learner 0"."""
    here: bool
    """Whether it is in this process, so that it can call back."""

    @abstractmethod
    def call(self, method: Callable[Concatenate[T, P], R], *args: P.args, **kwargs: P.kwargs) -> Future[R]:
        """Have it carry out `method(worker, *args, **kwargs)`; arguments and result have to be picklable
        where it is in another process."""

    @property
    def gone(self) -> bool:
        """Whether its process is known to have ended; the next result says so in any case."""
        return False

    @abstractmethod
    def close(self) -> None:
        """End it in order."""

    @abstractmethod
    def kill(self) -> None:
        """End it now, whatever it is doing."""


class Shared(ABC, Generic[V_co]):
    """An argument that several actors are given; it exists once for all of them that are on one machine."""

    @property
    @abstractmethod
    def value(self) -> V_co: ...


class Given(Shared[V_co]):
    """A shared argument that is at hand."""

    def __init__(self, value: V_co) -> None:
        self._value = value

    @property
    def value(self) -> V_co:
        return self._value


class Supervisor:
    """The one policy on workers that are lost: each is replaced, but only so many times in a row."""

    def __init__(self, limit: int) -> None:
        """`limit` is the setting placement.max_restarts."""
        self.limit = limit
        self._faults: list[str] = []
        self._in_a_row: Counter[str] = Counter()

    def note(self, lost: Lost) -> None:
        """Count a worker that is about to be replaced. Raises RoveError where that has been tried too
        often."""
        self._in_a_row[lost.name] += 1
        count = self._in_a_row[lost.name]
        if count > self.limit:
            raise RoveError(
                f"{lost.name} failed {count} times in a row, more than placement.max_restarts. "
                f"The last time: {lost}"
            ) from lost
        self._faults.append(str(lost))

    def add(self, faults: Sequence[str]) -> None:
        """Count workers that were replaced by somebody else."""
        self._faults += faults

    def works(self, name: str | None = None) -> None:
        """The worker of this name has answered; None: all have."""
        if name is None:
            self._in_a_row.clear()
        else:
            self._in_a_row.pop(name, None)

    def take_faults(self) -> list[str]:
        """One text for each worker that was replaced since the last call: what was wrong with it."""
        taken, self._faults = self._faults, []
        return taken
