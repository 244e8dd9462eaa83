"""Ctrl-C ends a run at the next iteration's end, saved; a second one ends it at once."""

from __future__ import annotations

import signal
import threading
from types import FrameType


class Interrupt:
    """Context manager; `requested` turns True at the first SIGINT or SIGTERM.

    The second raises KeyboardInterrupt. Outside the main thread, where signals cannot be handled, it does
    nothing.
    """

    _signals = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in self._signals}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        print("\nStopping after this iteration; press Ctrl-C again to stop at once.", flush=True)
