"""A process's use of its machine: a device, cores, threads, and what its allocator does with freed
memory."""

from __future__ import annotations

import ctypes
import gc
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from rove.errors import RoveError

# mallopt parameters of glibc, see mallopt(3).
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def prepare(threads: int) -> None:
    """Use `threads` for tensor work, and keep freed memory instead of returning it to the system.

    Every pass of a training step frees and takes the same large blocks; by default glibc maps each anew and
    the kernel clears it page by page, which took 30 % of a tiny policy's training step. Elsewhere than on
    glibc only the threads are set.
    """
    torch.set_num_threads(threads)
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    mallopt(_M_MMAP_THRESHOLD, 1 << 30)
    mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)


def device(wanted: str) -> torch.device:
    """The device that `placement.device` means for a single process: "auto" is a GPU where there is one.

    Raises RoveError where there is none and one is asked for by name.
    """
    if wanted == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    count = torch.cuda.device_count()
    kind, _, index = wanted.partition(":")
    if kind == "cuda" and int(index or 0) >= count:
        raise RoveError(
            f"placement.device = {wanted!r}, but {count} CUDA devices are visible. Use 'auto' or 'cpu'."
        )
    return torch.device("cpu" if kind == "cpu" else f"cuda:{index or 0}")


def release() -> None:
    """Give back what this process no longer uses of a GPU's memory, which others could not have otherwise."""
    gc.collect()
    torch.cuda.empty_cache()


def cores() -> tuple[int, ...]:
    """The cores that this thread may run on; () where the system does not say."""
    return tuple(sorted(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else ()


@contextmanager
def bound(to: Sequence[int], threads: int) -> Iterator[None]:
    """Within the block, keep this thread on the cores `to` (none: leave it where it is), and use `threads`
    for tensor work."""
    before, used = cores(), torch.get_num_threads()
    if to:
        os.sched_setaffinity(0, to)
    if threads != used:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        if threads != used:
            torch.set_num_threads(used)
        if to:
            os.sched_setaffinity(0, before)
