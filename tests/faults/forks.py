"""Commands in processes that are forked from one that has imported everything already, and their ends.

A fresh interpreter takes seconds to import PyTorch, a forked one none. Forking is safe in a process of one
thread only: `Nursery` is one.
"""

from __future__ import annotations

import gc
import importlib
import os
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

FULL = bool(os.environ.get("FAULTS_FULL"))
"""Whether all of the sweep is asked for, as by `make test-faults`, or a small part of it."""


class Ended(NamedTuple):
    """How a process ended."""

    status: int
    """Exit status; -9 where SIGKILL ended it."""
    text: str
    """What it printed, to both streams."""
    hung: bool = False

    @property
    def said(self) -> str:
        """Its last line."""
        lines = self.text.strip().splitlines()
        return lines[-1] if lines else ""

    @property
    def refused(self) -> bool:
        """Whether it ended with an error, as the command line says what is wrong."""
        return self.status == 2 and self.text.count("\nrove: error: ") == 1 and not self.crashed

    @property
    def crashed(self) -> bool:
        return "Traceback (most recent call last)" in self.text

    def __str__(self) -> str:
        return f"{'hung, ' if self.hung else ''}status {self.status}: {self.said[:300]}"


def forked(function: Callable[..., int | None], *args: Any, seconds: float = 300) -> Ended:
    """Call the function in a child of this process; its result, where it has one, is the exit status. What is
    not over after so many `seconds` is killed, with its own children."""
    with tempfile.TemporaryFile() as printed:
        sys.stdout.flush()
        sys.stderr.flush()
        if not (pid := os.fork()):
            _become(printed.fileno(), function, *args)
        descriptor = os.pidfd_open(pid)
        hung = not select.select([descriptor], [], [], seconds)[0]
        os.close(descriptor)
        with suppress(ProcessLookupError):  # the group of what it started, itself included
            os.killpg(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        printed.seek(0)
        text = printed.read().decode(errors="backslashreplace")
    return Ended(os.waitstatus_to_exitcode(status), f"\n{text}", hung)


def _become(printed: int, function: Callable[..., int | None], *args: Any) -> None:
    """Be the child, to the end."""
    code = 1
    try:
        os.setpgid(0, 0)
        os.dup2(printed, 1)
        os.dup2(printed, 2)
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        code = function(*args) or 0
    except BaseException:  # noqa: BLE001 - what an interpreter prints, and the status that it ends with
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def rove(*words: str) -> int:
    """A command of Rove's, in this process."""
    from rove import cli

    return cli.main(words)


@dataclass
class Found:
    """What came of faults of one kind."""

    kind: str
    held: int = 0
    broken: list[str] = field(default_factory=list)
    """Of each fault that did not do as is promised, what it was and what came of it."""
    seconds: float = 0.0
    """Processor time that it took."""

    def judge(self, fault: str, problem: str | None) -> None:
        """Count a fault; `problem` says what was wrong with what came of it, None: nothing."""
        if problem is None:
            self.held += 1
        else:
            self.broken.append(f"{fault}: {problem}")

    @property
    def injected(self) -> int:
        return self.held + len(self.broken)


class Nursery:
    """A process of one thread that has imported everything, in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self._pool = ProcessPoolExecutor(
            1, mp_context=get_context("spawn"), initializer=_prepare, initargs=(folder,)
        )

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """The result of an importable function there, in an empty folder that is the working directory."""
        return self._pool.submit(_alone, function, *args).result()

    def close(self) -> None:
        self._pool.shutdown()


def _prepare(folder: Path) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    os.chdir(folder)
    from tests.faults import runs

    # What a run imports as it goes is here before it is forked.
    loaded = Path("modules")
    forked(runs.imported, loaded)
    for name in loaded.read_text().split():
        with suppress(ImportError):  # some are no modules that can be imported by name
            importlib.import_module(name)
    loaded.unlink()
    shutil.rmtree(runs.DIRECTORY)
    Image.init()
    gc.collect()
    gc.freeze()  # or every child would look at all of it


def _alone(function: Callable[..., Any], *args: Any) -> Any:
    above = Path.cwd()
    own = Path(tempfile.mkdtemp(dir=above))
    os.chdir(own)
    began = time.perf_counter(), _used()
    try:
        result = function(*args)
    finally:
        os.chdir(above)
        shutil.rmtree(own)
    if isinstance(result, Found):
        result.seconds = _used() - began[1]
    return result


def _used() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system
