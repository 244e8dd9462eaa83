"""Whoever is waited for has a deadline: a process that is stopped, and one that makes no headway."""

from __future__ import annotations

import os
import signal
import time
from contextlib import contextmanager
from functools import partial

import pytest

from rove import host
from rove.runtime import pulse
from rove.runtime.actor import Lost, as_ready
from rove.runtime.local import InChild
from rove.runtime.pulse import Signs, Watch, headway


class Sleeper:
    """Sleeps, and says that it gets on every `every` seconds."""

    def sleep(self, seconds: float, every: float = 0.2) -> float:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            headway()
            time.sleep(min(every, seconds))
        return seconds

    def close(self) -> None:
        pass


@contextmanager
def started(**limits):
    actor = InChild("sleeper", Sleeper, **limits)
    try:
        assert actor.call(Sleeper.sleep, 0.0).result() == 0.0
        yield actor
    finally:
        actor.kill()


def test_a_stopped_process_is_told_from_a_busy_one():
    with started(deadline=1.0, patient=True) as actor, started(deadline=1.0, patient=True) as busy:
        calls = [busy.call(Sleeper.sleep, 4.0), actor.call(Sleeper.sleep, 60.0)]
        os.kill(actor.child.process.pid, signal.SIGSTOP)
        order = [place for place in as_ready(calls) if place >= 0]
        assert order == [1, 0], "the busy one was not waited for"
        with pytest.raises(Lost, match="sleeper has shown no sign of life for 1 s"):
            calls[1].result()
        assert calls[0].result() == 4.0


def test_a_call_that_makes_no_headway_is_given_up(monkeypatch):
    monkeypatch.setattr(pulse, "_LATER", 0.5)
    with started(deadline=1.0, patient=True) as actor:
        began = time.monotonic()
        with pytest.raises(Lost, match=r"sleeper did not answer for 1\.5 s \(placement.deadline = 1\)"):
            actor.call(Sleeper.sleep, 60.0, 60.0).result()
        assert time.monotonic() - began < 10


def test_what_is_long_by_nature_has_longer_until_it_first_gets_on(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    watch = Watch(10.0, patient=True)

    def look(seconds: int, headway: int = 0) -> str | None:
        for _ in range(seconds):
            now[0] += 1
            if (how := watch.overdue(Signs(int(now[0]), headway))) is not None:
                return how
        return None

    watch.asked(Signs(1, 0))
    watch.answered(Signs(1, 0))
    assert look(int(pulse.LONG)) is None
    watch.answered(Signs(1, 0))
    assert look(15, headway=1) is None
    assert "did not answer for 15 s" in str(look(5, headway=1))
    watch.answered(Signs(1, 1))
    now[0] += 10_000  # nobody looked: this process was stopped itself
    assert look(3, headway=1) is None


def test_an_answer_is_waited_for_as_long_as_the_worker_waits_for_its_own(monkeypatch):
    """What a worker waits for has a deadline of its own, which must not be cut short by the worker's."""
    monkeypatch.setattr(pulse, "_LATER", 0.0)
    with started(deadline=2.0) as actor:
        before = actor.child.signs.headway
        assert actor.call(Sleeper.sleep, 5.0, 0.5).result() == 5.0
        assert actor.child.signs.headway > before


def test_a_child_has_no_cores_to_keep_to_where_there_is_no_way(monkeypatch):
    monkeypatch.delattr(os, "sched_setaffinity")
    host.bind([0])
    assert partial(Sleeper)().sleep(0.0) == 0.0
