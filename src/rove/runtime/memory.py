"""Memory of this machine: how much there is, and taking it at once, so that none is missing later."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from pathlib import Path

from rove.errors import RoveError

_LIMITS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)
"""Files of a container's limit and of what it uses, of both versions of control groups."""
_SMALL = 1 << 26
"""Bytes of shared memory that are taken without asking first whether they are there."""
_FIX = (
    "Give the machine or container more (docker --memory; --shm-size where it has no memfd_create), lower "
    "--rollout.num_envs or --rollout.chunks, or let one process do all: --placement.map colocated "
    "--placement.stages 1."
)


def available() -> int | None:
    """Bytes that this process can still have, without swapping; None where the system does not say."""
    found = [_free_of_machine(), *(_left(Path(limit), Path(used)) for limit, used in _LIMITS)]
    known = [count for count in found if count is not None]
    return min(known) if known else None


def _free_of_machine() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)


def _left(limit: Path, used: Path) -> int | None:
    """Bytes up to a container's limit. What only caches files counts as used: it can be given up."""
    try:
        most, now = limit.read_text().strip(), int(used.read_text())
        cached = dict(line.split() for line in (limit.parent / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    files = int(cached.get("inactive_file", 0)) + int(cached.get("active_file", 0))
    return max(0, int(most) - now + files) if most.isdecimal() else None


def require(size: int, what: str) -> None:
    """Raise RoveError, with the fix, where `what` needs more bytes than there are."""
    there = available()
    if there is not None and size > there:
        raise RoveError(f"{what} needs {_say(size)} of memory, and {_say(there)} are there. {_FIX}")


def anonymous_file(size: int) -> int:
    """Descriptor of a file without a name, in memory where the system has such files, with all of its bytes
    reserved: to write to one that turns out to have no room would end the process.

    Raises RoveError, with the fix, where there is not so much.
    """
    # Not in /dev/shm, which a container limits to 64 MB.
    in_memory = hasattr(os, "memfd_create")
    if in_memory and size > _SMALL:
        require(size, "Shared memory")
    try:
        descriptor = os.memfd_create("rove") if in_memory else _file()
        try:
            os.ftruncate(descriptor, size)
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(descriptor, 0, size)
            elif size > shutil.disk_usage(tempfile.gettempdir()).free:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except BaseException:  # an interrupt too: nobody else knows the descriptor
            os.close(descriptor)
            raise
    except OSError as error:
        where = "memory" if in_memory else tempfile.gettempdir()
        raise RoveError(f"{_say(size)} of shared memory cannot be had in {where}: {error}. {_FIX}") from error
    return descriptor


def _file() -> int:
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _say(size: float) -> str:
    """Bytes for a reader: "1.5 GiB"."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
