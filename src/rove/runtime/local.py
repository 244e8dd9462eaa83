"""Actors on this machine: in this process, or in a child of it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Concatenate, Generic

from rove.runtime.actor import Actor, Done, Future, Lost, P, R, Resting, Shared, T, V_co, Worker
from rove.runtime.channel import Channel, ChannelClosed, fill, pack, unpack, views
from rove.runtime.process import Child, Crash
from rove.runtime.pulse import WAKE, Watch, headway


class InProcess(Actor[T]):
    """A worker in this process: a call is carried out at once, and raises what the method raises."""

    here = True

    def __init__(self, name: str, make: Callable[[], T]) -> None:
        self.name = name
        self.worker = make()

    def call(self, method: Callable[Concatenate[T, P], R], *args: P.args, **kwargs: P.kwargs) -> Future[R]:
        return Done(method(self.worker, *args, **kwargs))

    def close(self) -> None:
        self.worker.close()

    def kill(self) -> None:
        self.close()


class InChild(Actor[T]):
    """A worker in a child process. Calls queue up in its channel, and are answered in order."""

    here = False

    def __init__(
        self,
        name: str,
        make: Callable[[], T],
        *,
        deadline: float = 600.0,
        patient: bool = False,
        cores: Sequence[int] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """`make` has to be picklable, a `functools.partial` of the class for example. `deadline` and
        `patient` say when it counts as hung, and so lost: see `pulse.Watch`. The rest: see
        `process.Child`."""
        self.name = name
        self.child = Child(serve, make, cores=cores, environment=environment)
        self._asked: deque[_Call[Any]] = deque()
        self._watch = Watch(deadline, patient)
        self.lost: Lost | None = None

    def call(self, method: Callable[Concatenate[T, P], R], *args: P.args, **kwargs: P.kwargs) -> Future[R]:
        asked = _Call[R](self)
        if not self._asked:
            self._watch.asked(self.child.signs)
        self._asked.append(asked)
        if self.lost is None:
            with suppress(ChannelClosed):  # reading says why
                self.child.channel.send((method, args, kwargs))
        return asked

    @property
    def gone(self) -> bool:
        return self.lost is not None or self.child.process.poll() is not None

    def read(self, block: bool) -> bool:
        """Give the oldest call its answer, if it is there, or with `block` when it is. Returns whether it
        was, or none will come."""
        while self.lost is None and not self.child.channel.poll(WAKE if block else 0.0):
            if (how := self._watch.overdue(self.child.signs)) is not None:
                self.lost = Lost(self.name, how)
            elif not block:
                return False
            headway()  # to wait for a process that has a deadline of its own is no standstill
        if self.lost is not None:
            return True
        try:
            answer = self.child.channel.recv()
        except ChannelClosed:
            self.lost = Lost(self.name, self.child.ended())
        except Exception as error:  # noqa: BLE001 - bytes that are no message fail in any way they like
            self.lost = Lost(self.name, f"sent what is no message: {error!r}", error)
        else:
            if isinstance(answer, Crash):
                self.lost = Lost(self.name, f"failed:\n{answer.trace.rstrip()}", answer.error)
            else:
                self._asked.popleft().set(answer[0])
                self._watch.answered(self.child.signs)
        return True

    def close(self) -> None:
        self.child.join()

    def kill(self) -> None:
        self.child.kill()


class _Call(Future[R]):
    """A call of a child, answered or not."""

    def __init__(self, actor: InChild[Any]) -> None:
        self._actor, self._done = actor, False
        self._value: R

    def set(self, value: R) -> None:
        self._value, self._done = value, True

    def result(self) -> R:
        while not self._done:
            self._actor.read(block=True)
            self._raise()
        return self._value

    def ready(self) -> bool:
        while not self._done and self._actor.lost is None and self._actor.read(block=False):
            pass
        return self._done or self._actor.lost is not None

    def fileno(self) -> int:
        return self._actor.child.channel.fileno()

    def _raise(self) -> None:
        if not self._done and self._actor.lost is not None:
            raise self._actor.lost


def serve(channel: Channel, make: Callable[[], Worker]) -> None:
    """Carry out the calls of an `InChild` until its channel is closed."""
    worker = make()
    try:
        while True:
            if isinstance(worker, Resting):
                while not channel.poll() and worker.rest():
                    pass
            method, args, kwargs = channel.recv()
            channel.send((method(worker, *args, **kwargs),))
    finally:
        worker.close()


class Packed(Shared[V_co], Generic[V_co]):
    """A shared argument in memory that all children map: packed once, however many are given it."""

    def __init__(self, value: V_co) -> None:
        """Tensors in it are copied."""
        self._data, buffers = pack(value)
        self._sizes = [len(buffer) for buffer in buffers]
        self.segment = fill(buffers) if buffers else None

    @property
    def value(self) -> V_co:
        """The value; its tensors are views of the memory, to be read only."""
        return unpack(self._data, views(self.segment, self._sizes) if self.segment else ())
