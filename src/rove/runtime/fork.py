"""A call in a copy of this process, which leaves the process itself as it was, to the bit.

What a library keeps to itself, and neither shows nor takes back, can be tried out all the same: fork copies
all of it, for the price of page tables, and the copy is thrown away. It has the calling thread and no other.
So the call must wait for none: it draws nothing, uses no GPU, and steps no simulation that has threads of its
own. The system's allocator and Python's locks are made whole again by handlers of theirs, and PyTorch works
on the one thread, as in the workers of its DataLoader, which are copies too.
"""

from __future__ import annotations

import gc
import os
import signal
import socket
import sys
import warnings
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

import torch

from rove.errors import RoveError
from rove.host import with_parent
from rove.runtime.actor import Lost
from rove.runtime.channel import Channel, ChannelClosed
from rove.runtime.process import Crash, crash
from rove.runtime.pulse import WAKE, Patience, headway

R = TypeVar("R")

DEADLINE = 600.0
"""Seconds after which a copy that has not answered counts as hung."""


def in_copy(name: str, function: Callable[[], R], deadline: float = DEADLINE) -> R:
    """Call the function in a copy of this process, and return its answer, which has to be picklable.

    The copy hears no signals, and ends with this process. Raises what the function raises; Lost, which calls
    the copy by `name`, where it cannot be made, crashes or hangs; RoveError on another system than Linux.
    """
    if sys.platform != "linux":
        raise RoveError(f"A process with threads can be copied on Linux alone, not on {sys.platform}.")
    tied = with_parent(signal.SIGKILL)  # made here: the copy had better not search libraries
    ours, theirs = socket.socketpair()
    channel, original, pid, status = Channel(ours, patience=deadline), os.getpid(), 0, 0
    faults = {signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGABRT}
    heard = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals() - faults)
    try:
        try:
            with warnings.catch_warnings():  # Python 3.12 warns of the threads that the copy does not have
                warnings.simplefilter("ignore", DeprecationWarning)
                try:
                    pid = os.fork()
                except OSError as error:
                    raise Lost(name, f"could not be made: {error}") from error
            if pid == 0:
                _be_copy(theirs, function, original, tied)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, heard)
            theirs.close()
        answer = _await(name, channel, deadline)
    finally:
        channel.close()
        if pid:
            status = _end(pid)
    if answer is None:
        code = os.waitstatus_to_exitcode(status)
        how = f"was killed by signal {-code}" if code < 0 else f"exited with code {code}"
        raise Lost(name, f"{how} (process {pid})")
    if isinstance(answer, Crash):
        answer.error.add_note(f"It was raised in {name}:\n{answer.trace.rstrip()}")
        raise answer.error
    return answer[0]


def _be_copy(
    theirs: socket.socket, function: Callable[[], Any], original: int, tied: Callable[[], None]
) -> NoReturn:
    """Be the copy, to the end: no handler, destructor or buffer of the original is run or emptied."""
    try:
        channel = Channel(theirs)
        tied()
        if os.getppid() == original:  # else it has gone before it could be told
            gc.disable()  # a destructor may wait for a thread that is not here
            torch.set_num_threads(1)
            try:
                channel.send((function(),))
            except BaseException as error:  # noqa: BLE001 - whatever it was, the original is told
                channel.send(crash(error))
    finally:
        os._exit(0)


def _end(pid: int) -> int:
    """End a copy, and return its status; one that is ending already ends as it would have."""
    try:
        os.kill(pid, signal.SIGKILL)
        return os.waitpid(pid, 0)[1]
    except (ProcessLookupError, ChildProcessError):  # where SIGCHLD is ignored nobody is told
        return 0


def _await(name: str, channel: Channel, deadline: float) -> Any:
    """Wait for the copy's message; None: it has ended without one. Raises Lost where it hangs."""
    patience = Patience()
    while not channel.poll(WAKE):
        headway()  # to wait for a process that has a deadline of its own is no standstill
        if patience.look(None) > deadline:
            raise Lost(name, f"did not answer for {deadline:g} s")
    try:
        return channel.recv()
    except ChannelClosed:
        return None
