"""Processes that end with the one that started them.

A child ends itself when the other end of its channel is gone: after Ctrl-C, and after `kill -9` of the
parent, no process is left.
"""

from __future__ import annotations

import faulthandler
import os
import pickle
import select
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch

from rove import host
from rove.runtime import pulse
from rove.runtime.channel import Channel, ChannelClosed, Segment
from rove.runtime.pulse import Signs
from rove.runtime.setup import Setup

_PATIENCE = 600.0
"""Seconds in which a message is through, once it is begun: the other end may be stopped in the middle."""


@dataclass(frozen=True, slots=True)
class Crash:
    """A child's last message: the exception that ended it."""

    error: BaseException
    trace: str


class Child:
    """A process that runs `function(channel, *args)`, and dies with this one."""

    def __init__(
        self,
        function: Callable[..., None],
        *args: Any,
        cores: Sequence[int] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """The function has to be importable by name. `cores` bind the process, () leaves it everywhere;
        `environment` holds variables besides those of this process."""
        ours, theirs = socket.socketpair()
        self.channel = Channel(ours, patience=_PATIENCE)
        command = [
            sys.executable,
            "-P",  # the working directory is no place to import from, where the parent does not
            "-c",
            f"from rove.runtime import process as ipc; ipc.child({theirs.fileno()})",
        ]
        # `sys.path` may hold what an interpreter does not start with: a checkout, a test's folder.
        paths = os.pathsep.join(entry for entry in sys.path if entry)
        self.process = subprocess.Popen(
            command,
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": paths, **(environment or {})},
        )
        theirs.close()
        shown = Segment(16)
        self._shown = shown.numbers()
        self.channel.send((Setup.here(), tuple(cores), shown))
        self.channel.send((function, args))
        shown.release()

    @property
    def signs(self) -> Signs:
        """What the process has shown of itself until now."""
        return Signs(*self._shown)

    def ended(self) -> str:
        """How the process ended, to be said of it: "was killed by signal 9 (process 123)"."""
        try:
            code = self.process.wait(5)
        except subprocess.TimeoutExpired:
            return f"closed its channel, and goes on (process {self.process.pid})"
        how = f"was killed by signal {-code}" if code < 0 else f"exited with code {code}"
        return f"{how} (process {self.process.pid})"

    def kill(self) -> None:
        """End it now, and reap it."""
        self.channel.close()
        self.process.kill()
        # One that is stuck in the kernel ends when it comes out of it: there is nothing to wait for.
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(10)

    def join(self, seconds: float = 5.0) -> None:
        """Close the channel, at which it ends itself; kill it if it has not in time."""
        self.channel.close()
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()


def child(fd: int) -> None:
    """Entry point of a `Child`'s process."""
    faulthandler.enable()
    for number in (signal.SIGINT, signal.SIGTERM):  # a terminal's and a scheduler's: the parent's to handle
        signal.signal(number, signal.SIG_IGN)
    sock = socket.socket(fileno=fd)
    channel = Channel(sock)
    threading.Thread(target=_die_with_parent, args=(fd,), daemon=True).start()
    try:
        setup, cores, shown = channel.recv()
        pulse.start(shown.numbers())
        shown.release()
        # A cluster's nodes may be given more cores than there are. What this process inherited says nothing:
        # its parent may have kept to a core of its own when it started it.
        if own := set(cores) & set(range(os.cpu_count() or 0)):
            host.bind(sorted(own))
            torch.set_num_threads(len(own))
        setup.apply()
        function, args = channel.recv()
        function(channel, *args)
    except ChannelClosed:
        pass
    except BaseException as error:  # noqa: BLE001 - whatever it was, the parent is told
        with suppress(ChannelClosed):
            channel.send(crash(error))
    # Threads of simulators and renderers need not be waited for.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def crash(error: BaseException) -> Crash:
    """The exception being handled, fit to travel: one that cannot be pickled goes as text."""
    trace = traceback.format_exc()
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # noqa: BLE001 - any exception of the user's own making may not survive pickling
        error = RuntimeError(f"{type(error).__name__}: {error}")
    return Crash(error, trace)


def _die_with_parent(fd: int) -> None:
    """End this process when the parent's end of the channel is gone, whatever it is doing."""
    poll = select.poll()
    poll.register(fd, 0)  # POLLHUP and POLLERR are always reported
    poll.poll()
    os._exit(1)
