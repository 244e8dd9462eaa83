"""Signs of life between processes, so that one that hangs can be told from one that is busy.

A second thread of every worker's process counts on as long as the process runs: a stopped one (SIGSTOP, a
frozen container) does not. Beside it stands what the worker itself counts, with `headway`, whenever a part
of a long call is done: a chunk, a micro-batch, a wait for a process of its own.
"""

from __future__ import annotations

import threading
import time
from typing import NamedTuple

WAKE = 1.0
"""Seconds between two looks at whoever is waited for."""
_BEAT = 0.5
"""Seconds between two counts of the second thread."""
_LATER = 5.0
"""Seconds by which a worker that makes no headway is found out after one that is stopped: it may be waiting
for that one."""
START = 300.0
"""Seconds that a process has at least for its first answer: it has to import, and perhaps to compile."""
LONG = 1800.0
"""Seconds that a call of a process with a policy has at least until it first makes headway: it may have to
read or write a large checkpoint, or to build the environments of an evaluation."""

_shown = memoryview(bytearray(16)).cast("q")
"""This process's own signs, where the one that started it sees them."""


def headway() -> None:
    """Say that this process's worker is getting on with what it was asked for."""
    _shown[1] += 1


class Signs(NamedTuple):
    """What a process shows of itself; any other numbers than before are news."""

    beats: int
    """Of its second thread; 0: it has not begun."""
    headway: int


def own() -> Signs:
    """This process's own."""
    return Signs(*_shown)


def start(shown: memoryview) -> None:
    """Give this process's signs in `shown` (int64 [2], zeros) from now on: its beats from a second thread."""
    global _shown
    _shown = shown

    def beat() -> None:
        while True:
            shown[0] += 1
            time.sleep(_BEAT)

    threading.Thread(target=beat, daemon=True).start()


class Patience:
    """Seconds in which a process was looked at without anything new. Time in which nobody looked does not
    count: this process may have been stopped itself."""

    def __init__(self) -> None:
        self.begin()
        self._sign: object = None

    def begin(self) -> None:
        self.waited, self._looked = 0.0, time.monotonic()

    def look(self, sign: object) -> float:
        """Return how long there has been nothing new, now that there is this."""
        now = time.monotonic()
        self.waited = 0.0 if sign != self._sign else self.waited + min(now - self._looked, 2 * WAKE)
        self._sign, self._looked = sign, now
        return self.waited


class Watch:
    """Says when a process that was asked for something counts as hung."""

    def __init__(self, deadline: float, patient: bool = False) -> None:
        """`deadline` is the setting placement.deadline. `patient`: for a process whose calls are long, and
        which may wait for others like it."""
        self.deadline = deadline
        self._patient = patient
        self._life, self._work = Patience(), Patience()
        self._answers = 0
        self._before = 0
        """Its headway when it last answered, or was asked while it had nothing to do."""

    def asked(self, seen: Signs) -> None:
        """It has been given something to do, and had nothing before."""
        self._work.begin()
        self._before = seen.headway

    def answered(self, seen: Signs) -> None:
        """It has answered."""
        self._answers += 1
        self._before = seen.headway

    def overdue(self, seen: Signs) -> str | None:
        """What is wrong, to be said of it; None as long as nothing is. To be asked about once a second."""
        if self._life.look(seen.beats) > self.deadline and seen.beats:
            return f"has shown no sign of life for {self.deadline:g} s: its process is stopped, or frozen"
        waited, limit = self._work.look((self._answers, seen.headway)), self._limit(seen)
        if waited <= limit:
            return None
        return f"did not answer for {limit:g} s (placement.deadline = {self.deadline:g})"

    def _limit(self, seen: Signs) -> float:
        if self._patient:
            going = self._answers and seen.headway != self._before
            return self.deadline + _LATER if going else max(self.deadline, LONG)
        return self.deadline if self._answers else max(self.deadline, START)
