"""Process-wide settings: threads for tensor work, and what the allocator does with freed memory."""

from __future__ import annotations

import ctypes

import torch

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
