"""Ends this process where its own thread cannot: it waits for what has no deadline and never comes back.

A process that was started by another is watched by that one, see `pulse.py`. Nobody watches the first one:
when the environments in it hang, or Ray's head has gone away, a second thread says so, and ends it.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from rove.runtime import pulse
from rove.runtime.pulse import START, WAKE, Patience

EXIT_CODE = 2
"""As of every error that `rove` ends with."""


class Guard:
    """A second thread that asks what is wrong, once a second, and ends the process with the first answer.

    It needs Python to run: while code that holds the interpreter's lock never returns, it is not asked.
    Nothing milder would do, because the first thread cannot be reached; what was saved is whole, and
    processes and Ray actors that this one has started end with it.
    """

    def __init__(self, wrong: Callable[[], str | None]) -> None:
        """`wrong` returns None as long as nothing is. The thread starts at once."""
        self._wrong, self._over = wrong, threading.Event()
        threading.Thread(target=self._look, daemon=True, name="guard").start()

    def _look(self) -> None:
        while not self._over.wait(WAKE):
            what = self._wrong()
            if what is not None and not self._over.is_set():
                _end(what)

    def stop(self) -> None:
        """End nothing from now on; twice is harmless."""
        self._over.set()


def _end(what: str) -> None:
    """Print an error as `rove` does, and leave with its exit status, whatever the other threads are doing."""
    with suppress(OSError, ValueError):  # a stream that is closed or full has to stop nothing
        shown = "\x1b[?25h" if sys.stderr.isatty() else ""  # the cursor, which a live view hides
        os.write(sys.stderr.fileno(), f"{shown}\nrove: error: {what}\n".encode())
    os._exit(EXIT_CODE)


# --- environments in this process -----------------------------------------------------------------

_calls: list[tuple[str, str]] = []
"""Calls of foreign code, and whose, that this process's worker is in, the innermost last."""
_count = 0
"""Number of such calls that have begun or ended."""
_returned: set[tuple[str, str]] = set()
"""Those that have once come back."""


@contextmanager
def foreign(who: str, call: str) -> Iterator[None]:
    """Within the block code runs that may never come back: `who` ("Environment 'x'") carries out `call`."""
    global _count
    _calls.append((who, call))
    _count += 1
    try:
        yield
        _returned.add((who, call))
    finally:
        _calls.pop()
        _count += 1


@contextmanager
def guarded(deadline: float) -> Iterator[None]:
    """Within the block this process ends, with a line that says which, where a `foreign` call takes longer
    than `deadline` seconds (the setting placement.deadline) without headway.

    The first call of a kind has `pulse.START` at least. Time in which the process was stopped does not count.
    """
    patience = Patience()

    def wrong() -> str | None:
        if not _calls:
            return None  # what is not looked at does not count
        who, call = inside = _calls[-1]
        limit = deadline if inside in _returned else max(deadline, START)
        if patience.look((_count, pulse.own().headway)) <= limit:
            return None
        return (
            f"{who} has not come back from {call} for {limit:g} s (placement.deadline = {deadline:g}): it "
            "hangs, or takes longer by nature, then set --placement.deadline. The newest checkpoint is kept; "
            "in a process of its own (--placement.map hybrid) one that hangs is replaced."
        )

    guard = Guard(wrong)
    try:
        yield
    finally:
        guard.stop()
