"""Ctrl-C, and the SIGTERM of a scheduler: what is under way is saved where it can be, and the run ends."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType


class Interrupted(KeyboardInterrupt):
    """A signal has ended the run."""

    def __init__(self, number: int) -> None:
        super().__init__(f"ended by {signal.Signals(number).name}")
        self.number = number

    @property
    def exit_code(self) -> int:
        """The exit status that tells an interrupted run from a finished one: 130 after SIGINT, 143 after
        SIGTERM."""
        return 128 + self.number


class Interrupt:
    """Context manager that handles SIGINT and SIGTERM by raising `Interrupted` at once.

    In a `patient` part the first signal only makes `requested` true, and the part ends by itself; the second
    raises. Outside the main thread, where signals cannot be handled, it does nothing.
    """

    _signals = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self._number: int | None = None
        self._waits_for = ""
        self._before: dict[int, object] = {}

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in self._signals}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]

    @property
    def requested(self) -> bool:
        """Whether a signal has come."""
        return self._number is not None

    def check(self) -> None:
        """Raise `Interrupted` where a signal has come."""
        if self._number is not None:
            raise Interrupted(self._number)

    @contextmanager
    def patient(self, until: str) -> Iterator[None]:
        """A part that looks at `requested`, or calls `check`, after each `until`: "this iteration"."""
        self._waits_for = until
        try:
            yield
        finally:
            self._waits_for = ""

    def _handle(self, number: int, frame: FrameType | None) -> None:
        again, self._number = self.requested, number
        if again or not self._waits_for:
            raise Interrupted(number)
        with suppress(OSError, ValueError):  # a stream that is closed or full has to stop nothing
            print(
                f"\nStopping after {self._waits_for}; press Ctrl-C again to stop at once.",
                file=sys.stderr,
                flush=True,
            )
