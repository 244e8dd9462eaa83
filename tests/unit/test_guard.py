"""A process that waits for what never comes back says so, and ends itself."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from rove.runtime import guard, pulse


def run(code: str) -> tuple[int, list[str], float]:
    """Exit status, lines of standard error and seconds of a process of its own."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120
    )
    return done.returncode, [line for line in done.stderr.splitlines() if line], time.monotonic() - began


@pytest.mark.parametrize("hang", ["time.sleep(3600)", "while True: pass"], ids=["in C", "in Python"])
def test_code_that_never_comes_back_ends_the_process_with_a_line(hang):
    code, printed, _ = run(
        "import time; from rove.runtime import guard; guard.START = 0\n"
        "with guard.guarded(1.5), guard.foreign('Environment x', 'reset'):\n"
        f"    {hang}"
    )
    assert code == 2
    assert len(printed) == 1 and printed[0].startswith(
        "rove: error: Environment x has not come back from reset for 1.5 s (placement.deadline = 1.5)"
    )
    assert "--placement.deadline" in printed[0]


def test_what_gets_on_or_waits_for_others_is_left_alone():
    """Many calls, none of which is long; one that makes headway; and no call at all."""
    code, printed, _ = run(
        "import time; from rove.runtime import guard, pulse; guard.START = 0\n"
        "with guard.guarded(1.5):\n"
        "    for _ in range(6):\n"
        "        with guard.foreign('Environment x', 'reset'): time.sleep(0.5)\n"
        "    with guard.foreign('Environment x', 'reset'):\n"
        "        for _ in range(6): time.sleep(0.5); pulse.headway()\n"
        "    time.sleep(3)\n"
        "print('through')"
    )
    assert (code, printed) == (0, [])


def test_the_first_call_of_a_kind_has_longer(monkeypatch):
    asked = []
    monkeypatch.setattr(guard, "Guard", lambda wrong: (asked.append(wrong), guard)[1])
    monkeypatch.setattr(guard, "stop", lambda: None, raising=False)
    monkeypatch.setattr(guard, "_returned", set())
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def waits(seconds: int) -> str | None:
        for _ in range(seconds):
            now[0] += 1
            if (what := asked[0]()) is not None:
                return what
        return None

    with guard.guarded(10.0):
        with guard.foreign("Environment x", "reset"):
            assert waits(int(pulse.START)) is None
        with guard.foreign("Environment x", "reset"):
            now[0] += 10_000  # nobody looked: this process was stopped itself
            assert waits(7) is None
            assert "for 10 s" in str(waits(10))
        assert waits(1000) is None


HEAD = """
import sys, time, types
from rove.runtime import ray as ours
def nodes(): {nodes}
sys.modules["ray"] = types.SimpleNamespace(is_initialized=lambda: True, nodes=nodes)
ours._HEAD = 3.0
head = ours._Head("somewhere:6379")
time.sleep({seconds})
{then}
"""


@pytest.mark.parametrize("nodes", ["time.sleep(3600)", "raise RuntimeError('x')"], ids=["waits", "fails"])
def test_a_head_that_does_not_answer_ends_the_process(nodes):
    code, printed, _ = run(HEAD.format(nodes=nodes, seconds=60, then=""))
    assert code == 2 and len(printed) == 1, printed
    assert (
        "rove: error: The head of the Ray cluster at placement.ray_address = 'somewhere:6379'" in printed[0]
    )
    assert "has not answered for 3 s" in printed[0] and "--resume" in printed[0]


def test_a_head_that_answers_ends_nothing_and_neither_does_one_that_was_left():
    code, printed, _ = run(HEAD.format(nodes="return []", seconds=6, then="head.stop()\ntime.sleep(5)"))
    assert (code, printed) == (0, [])


WITNESS = """
import os, socket, subprocess, time
from rove.runtime import ray as ours
store = socket.socket(socket.AF_UNIX)
store.bind("store")
store.listen()
witness = ours._Witness("store")
time.sleep(0.5)
{then}
os._exit(1)
"""
IN_ANOTHER_PROCESS = (
    "quiet = dict.fromkeys(('stdout', 'stderr'), subprocess.DEVNULL)\n"
    "subprocess.Popen(['sleep', '5'], pass_fds=[store.fileno()], **quiet)"
)


@pytest.mark.parametrize(
    ("then", "lines"),
    [
        ("store.close()", 1),
        ("store.close(); witness.dismiss(); witness.dismiss()", 0),
        (IN_ANOTHER_PROCESS, 0),
    ],
    ids=["with Ray", "by itself", "while Ray is well"],
)
def test_a_process_that_ray_ends_has_a_witness(then, lines, tmp_path):
    """Of Ray here is but a socket, on which something listens or not when the process is gone."""
    words = [sys.executable, "-c", WITNESS.format(then=then)]
    # In the folder: a socket's path has at most a hundred letters. Lasts until the witness has ended, too.
    ran = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path)
    said = [line for line in ran.stderr.splitlines() if line.startswith("rove: error: ")]
    assert ran.returncode == 1 and len(said) == lines, ran.stderr
    assert all("with the Ray processes of this machine" in line for line in said)
