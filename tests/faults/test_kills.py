"""A run, or an evaluation, that is killed at any change of a file goes on, and ends as one that was not."""

from __future__ import annotations

import shutil
import signal

import pytest
from tests.faults.forks import FULL, Found, forked
from tests.faults.runs import (
    DIRECTORY,
    EVALUATE,
    OUT,
    RESUME,
    START,
    command,
    difference,
    left,
    moments_of,
    struck,
)

PARTS = 6 if FULL else 1
"""Into which the moments are dealt, so that several processes can try them."""
FEW = 6
"""Moments that are tried where not all are."""


def chosen(names: list[str], part: int) -> list[int]:
    """The moments of this part, counted from 1."""
    if FULL:
        return list(range(part + 1, len(names) + 1, PARTS))
    return [1 + (2 * i + 1) * len(names) // (2 * FEW) for i in range(FEW)]


def kill_a_run(part: int) -> Found:
    names = moments_of(DIRECTORY, True, *START)
    wanted = left(DIRECTORY)
    found = Found("a run is killed as a file changes")
    for at in chosen(names, part):
        shutil.rmtree(DIRECTORY)
        found.judge(f"killed before {names[at - 1]} ({at})", killed_and_gone_on(at, wanted))
    return found


def killed_and_gone_on(at: int, wanted: dict) -> str | None:
    killed = forked(struck, DIRECTORY, at, (signal.SIGKILL,), True, *START)
    if killed.status != -signal.SIGKILL:
        return f"it was not killed: {killed}"
    # Half of the users start it again, as they had started it, where others resume it.
    first, second = (START, RESUME) if at % 2 else (RESUME, START)
    ended = forked(command, *first)
    if ended.refused:
        ended = forked(command, *second)
    return str(ended) if ended.status else difference(left(DIRECTORY), wanted)


def kill_an_evaluation() -> Found:
    assert forked(command, *START).status == 0
    names = moments_of(OUT.parent, True, *EVALUATE)
    wanted = left(OUT.parent)
    found = Found("an evaluation is killed as a file changes")
    for at in range(1, len(names) + 1):
        shutil.rmtree(OUT.parent)
        killed = forked(struck, OUT.parent, at, (signal.SIGKILL,), True, *EVALUATE)
        ended = forked(command, *EVALUATE)
        problem = str(ended) if ended.status else difference(left(OUT.parent), wanted)
        found.judge(f"killed before {names[at - 1]}", problem if killed.status == -9 else str(killed))
    return found


@pytest.mark.parametrize("part", range(PARTS))
def test_a_run_that_is_killed_goes_on(part, sweep):
    sweep(kill_a_run, part)


@pytest.mark.skipif(not FULL, reason="long: make test-faults runs it")
def test_an_evaluation_that_is_killed_goes_on(sweep):
    sweep(kill_an_evaluation)
