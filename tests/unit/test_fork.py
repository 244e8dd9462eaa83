"""A call in a copy of this process: what it answers, how it ends, and that nothing is left of it."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from functools import partial

import pytest
import torch

from rove.errors import RoveError
from rove.runtime import fork
from rove.runtime.actor import Lost
from rove.runtime.fork import in_copy

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are copied on Linux alone")


def gone(pid: int) -> bool:
    """Whether a process ends within ten seconds, or has."""
    until = time.monotonic() + 10
    while time.monotonic() < until:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.01)
    return False


@pytest.fixture
def pipe():
    """Where a copy says which process it is."""
    ends = os.pipe()
    yield ends
    for end in ends:
        os.close(end)


def pid_of(pipe: tuple[int, int]) -> int:
    return int(os.read(pipe[0], 20))


def hang(pipe: tuple[int, int]) -> None:
    os.write(pipe[1], str(os.getpid()).encode())
    time.sleep(100)


def test_a_copy_answers_and_leaves_everything_as_it_was():
    numbers, large = [1, 2], torch.zeros(1 << 16)

    def change() -> tuple[int, list[int], torch.Tensor]:
        numbers.append(3)
        large.add_(1.0)
        return os.getpid(), numbers, large

    pid, changed, added = in_copy("a copy", change)
    assert pid != os.getpid() and gone(pid)
    assert changed == [1, 2, 3] and numbers == [1, 2]
    assert bool((added == 1).all()) and not large.any()


def test_a_copy_computes_beside_threads_that_it_does_not_have():
    """PyTorch's own, which wait for work, and Python's, one of which holds the interpreter now and then."""
    before, stop = torch.get_num_threads(), threading.Event()
    thread = threading.Thread(target=lambda: [sum(range(1000)) for _ in iter(stop.is_set, True)])
    thread.start()
    try:
        torch.set_num_threads(2)
        matrix = torch.randn(300, 300, generator=torch.Generator().manual_seed(0))
        product = matrix @ matrix
        for _ in range(5):
            assert torch.allclose(in_copy("a copy", lambda: matrix @ matrix), product, atol=1e-4)
            assert torch.equal(in_copy("a copy", lambda: torch.exp(matrix)), torch.exp(matrix))
    finally:
        stop.set()
        thread.join()
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("end", "how"),
    [
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "was killed by signal 9"),
        (lambda: os._exit(3), "exited with code 3"),
        (lambda: os._exit(0), "exited with code 0"),
    ],
)
def test_a_copy_that_ends_without_an_answer_is_lost_by_name(end: Callable[[], None], how: str):
    with pytest.raises(Lost, match=rf"^a try {how} \(process \d+\)$"):
        in_copy("a try", end)


def test_what_a_call_raises_is_raised_here():
    def fail() -> None:
        raise RoveError("There is no such thing.")

    with pytest.raises(RoveError, match="There is no such thing"):
        in_copy("a copy", fail)


def test_a_copy_that_hangs_is_ended(pipe):
    with pytest.raises(Lost, match="a try did not answer for 0.5 s"):
        in_copy("a try", partial(hang, pipe), deadline=0.5)
    assert gone(pid_of(pipe))


def test_a_copy_ends_with_its_original(pipe):
    """Here the original is a copy too, which is killed at its deadline."""
    with pytest.raises(Lost, match="the original did not answer"):
        in_copy("the original", lambda: in_copy("its copy", partial(hang, pipe)), deadline=0.5)
    assert gone(pid_of(pipe))


def test_a_copy_hears_no_signals(monkeypatch):
    heard: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    try:

        def interrupted() -> list[int]:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                os.kill(os.getpid(), number)
            return heard

        assert in_copy("a copy", interrupted) == []
        os.kill(os.getpid(), signal.SIGTERM)
        assert heard == [signal.SIGTERM], "the original hears as before"
    finally:
        signal.signal(signal.SIGTERM, before)


def test_an_interrupt_of_the_original_ends_the_copy(pipe, tmp_path):
    def interrupt() -> None:
        (tmp_path / "pid").write_text(str(os.getpid()))
        os.kill(os.getppid(), signal.SIGINT)
        hang(pipe)

    with pytest.raises(KeyboardInterrupt):
        in_copy("a copy", interrupt)
    with pytest.raises(ChildProcessError):  # it has been waited for, so that it is no child any more
        os.waitpid(int((tmp_path / "pid").read_text()), os.WNOHANG)


def test_another_system_is_named(monkeypatch):
    monkeypatch.setattr(fork.sys, "platform", "darwin")
    with pytest.raises(RoveError, match="on Linux alone, not on darwin"):
        in_copy("a copy", os.getpid)
