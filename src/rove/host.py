"""A process's use of its machine: a device, cores, threads, memory that is freed, and folders to keep things
in.

What not every system offers is asked for here and nowhere else.
"""

from __future__ import annotations

import ctypes
import gc
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rove.errors import RoveError

if TYPE_CHECKING:  # imported where it is used: `rove doctor` runs without it
    import torch

# mallopt parameters of glibc, see mallopt(3).
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_PR_SET_PDEATHSIG = 1
"""See prctl(2)."""


def prepare(threads: int) -> None:
    """Use `threads` for tensor work, and keep freed memory instead of returning it to the system.

    Every pass of a training step frees and takes the same large blocks; by default glibc maps each anew and
    the kernel clears it page by page, which took 30 % of a tiny policy's training step. Elsewhere than on
    glibc only the threads are set.
    """
    import torch

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
    import torch

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
    import torch

    gc.collect()
    torch.cuda.empty_cache()


# --- cores ----------------------------------------------------------------------------------------


def cores() -> tuple[int, ...]:
    """The cores that this thread may run on; () where the system does not say, and binds nothing to any."""
    return tuple(sorted(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else ()


def core_count() -> int:
    """The number of cores that this thread may run on, as far as the system says."""
    return len(cores()) or os.cpu_count() or 1


def bind(to: Sequence[int]) -> None:
    """Keep this thread, and those that it starts, on the cores `to`, where the system can."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, to)


@contextmanager
def bound(to: Sequence[int], threads: int) -> Iterator[None]:
    """Within the block, keep this thread on the cores `to` (none: leave it where it is), and use `threads`
    for tensor work."""
    import torch

    before, used = cores(), torch.get_num_threads()
    if to:
        bind(to)
    if threads != used:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        if threads != used:
            torch.set_num_threads(used)
        if to:
            bind(before)


# --- processes ----------------------------------------------------------------------------------------


def with_parent(number: int) -> Callable[[], None]:
    """Return what a child calls before anything else so that it is sent the signal `number` when the process
    that has started it ends, however that ends; where the system cannot, nothing."""
    try:
        prctl = ctypes.CDLL("libc.so.6").prctl
    except (OSError, AttributeError):
        return lambda: None
    return lambda: prctl(_PR_SET_PDEATHSIG, number)


# --- folders --------------------------------------------------------------------------------------


def home(variable: str) -> Path:
    """The user's home. Raises RoveError where the system knows of none, naming the `variable` to set."""
    try:
        return Path.home()
    except RuntimeError:
        raise RoveError(f"There is no home directory to keep files in: set {variable} to a folder.") from None


def cache() -> Path:
    """The folder of everything that is made once and kept: `$ROVE_CACHE`, else `$XDG_CACHE_HOME/rove`, else
    `~/.cache/rove`, whether or not it exists. Raises RoveError where there is no home."""
    if given := os.environ.get("ROVE_CACHE"):
        return Path(given).absolute()
    if given := os.environ.get("XDG_CACHE_HOME"):
        return Path(given).absolute() / "rove"
    return home("ROVE_CACHE") / ".cache" / "rove"


def writable(folder: Path) -> Path:
    """Make a folder of the cache, and return it. Raises RoveError where nothing can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        raise RoveError(
            f"Nothing can be written to the cache {folder}: {error.strerror}. Set ROVE_CACHE to a folder."
        ) from error
