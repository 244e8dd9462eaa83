"""A signal in any phase of a run is heard at once, and the run goes on as if it had not come."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable

import pytest
from tests.faults.forks import FULL, Ended, Found, forked
from tests.faults.runs import DIRECTORY, START, command, difference, gone_on, left, moments_of, struck

from rove import checkpoint, train
from rove.reporting.progress import Progress

INT, TERM, HUP = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
SIGNALS = ((INT,), (TERM,), (HUP,), (INT, INT), (TERM, TERM), (TERM, INT))
STATUS = {INT: (130,), TERM: (143,), HUP: (-HUP,)}
PHASES = (
    *("demonstrate", "picture", "point", "sft", "start", "evaluate before RL", "collect", "update"),
    *("evaluate", "evaluate after RL"),
)
"""As `Progress` calls them; "start" is the environments' and the policy's."""
CALLS = {"settings": "validate", "preflight": "before_loading", "report": "write_report"}
"""What else a run does -> the function of `rove.train` that does it."""
IDLE = 2.0
"""Seconds in which a signal is to be heard, of a processor that does nothing else."""


def signalled(
    phase: str, signals: tuple[int, ...], more: tuple[str, ...] = (), everyone: bool = False
) -> int:
    """A run, in this process, to which signals come in a phase. `everyone`: to its own children as well."""
    sent: list[float] = []

    def send() -> None:
        if not sent:
            sent.append(time.process_time())
            for number in signals:
                if everyone:
                    os.killpg(0, number)
                else:
                    os.kill(os.getpid(), number)

    def first(place: object, name: str) -> None:
        """Have it come before a function does what it does."""
        function: Callable = getattr(place, name)
        setattr(place, name, lambda *args, **kwargs: (send(), function(*args, **kwargs))[1])

    if phase in CALLS:
        first(train, CALLS[phase])
    elif phase == "save":
        first(checkpoint, "save")
    else:
        begin = Progress.phase
        Progress.phase = lambda self, name, total: (
            begin(self, name, total),
            send() if name == phase else None,
        )[0]
    code = command(*START, *more)
    print(f"\nheard in {time.process_time() - sent[0] if sent else -1}")
    return code


def problem_of(ended: Ended, signals: tuple[int, ...], early: bool) -> str | None:
    """What is wrong with how a run ended to which these signals came; `early`: before it handles any."""
    # Where the first ends it, the second finds nothing.
    wanted = STATUS[signals[0]] + STATUS[signals[-1]] + ((-signals[0],) if early else ())
    if ended.status not in wanted or ended.crashed:
        return f"expected {wanted}: {ended}"
    heard = ended.text.rpartition("heard in ")[2]
    if ended.status > 0 and not 0 <= float(heard) < IDLE:
        return f"it was heard after {heard.strip()} s of processor time"
    return None


def signal_in_phases() -> Found:
    assert forked(command, *START).status == 0
    wanted = left(DIRECTORY)
    found = Found("a signal in a phase")
    tried = [(phase, signals) for phase in (*CALLS, *PHASES, "save") for signals in SIGNALS]
    for phase, signals in tried if FULL else tried[:: len(tried) // 5]:
        shutil.rmtree(DIRECTORY, ignore_errors=True)
        ended = forked(signalled, phase, signals)
        problem = problem_of(ended, signals, phase in ("settings", "preflight"))
        if problem is None:
            again = gone_on()
            problem = str(again) if again.status else difference(left(DIRECTORY), wanted)
        found.judge(f"{' and '.join(signal.Signals(n).name for n in signals)}, {phase}", problem)
    return found


def signal_as_files_change() -> Found:
    """At every third event: what a signal meets changes less from one to the next than what a kill does."""
    names = moments_of(DIRECTORY, False, *START)
    wanted = left(DIRECTORY)
    found = Found("a signal as a file changes")
    for at in range(1, len(names), 3):
        shutil.rmtree(DIRECTORY)
        signals = ((INT,), (TERM, TERM), (TERM,))[at // 3 % 3]
        ended = forked(struck, DIRECTORY, at, signals, False, *START)
        problem = None if ended.status in STATUS[signals[-1]] and not ended.crashed else str(ended)
        if problem is None:
            again = gone_on()
            problem = str(again) if again.status else difference(left(DIRECTORY), wanted)
        found.judge(
            f"{' and '.join(signal.Signals(n).name for n in signals)} before {names[at - 1]}", problem
        )
    return found


def signal_everyone() -> Found:
    """As a terminal does with Ctrl-C, and as schedulers do: to environment workers too."""
    apart = ("--placement.map", "hybrid", "--placement.env_workers", "1", "--placement.deterministic", "true")
    assert forked(command, *START, *apart).status == 0
    wanted = left(DIRECTORY)
    found = Found("a signal to every process of a run")
    for phase, signals in (
        ("collect", (INT,)),
        ("collect", (TERM,)),
        ("update", (TERM,)),
        ("collect", (INT, INT)),
    ):
        shutil.rmtree(DIRECTORY)
        ended = forked(signalled, phase, signals, apart, True)
        problem = problem_of(ended, signals, False)
        if problem is None and "replaced" in ended.text:
            problem = f"a worker heard it, too: {ended.text}"
        if problem is None:
            again = gone_on()
            problem = str(again) if again.status else difference(left(DIRECTORY), wanted)
        found.judge(f"{' and '.join(signal.Signals(n).name for n in signals)}, {phase}", problem)
    return found


def test_a_signal_in_a_phase(sweep):
    sweep(signal_in_phases)


@pytest.mark.skipif(not FULL, reason="long: make test-faults runs it")
def test_a_signal_as_a_file_changes(sweep):
    sweep(signal_as_files_change)


@pytest.mark.skipif(not FULL, reason="long: make test-faults runs it")
def test_a_signal_to_every_process(sweep):
    sweep(signal_everyone)
