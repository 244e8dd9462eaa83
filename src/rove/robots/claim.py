"""One runner for an arm: two that send targets in turn would tear it to and fro."""

from __future__ import annotations

import fcntl
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rove.errors import RoveError


@contextmanager
def claimed(address: str) -> Iterator[None]:
    """Within the block, the arm at `address` is this process's. Raises RoveError where it is another's.

    A process that dies lets go. It holds for this machine: an arm that several can reach has to be kept from
    the others by its network.
    """
    name = re.sub(r"[^A-Za-z0-9.-]+", "_", address.strip().lower())
    path = Path(tempfile.gettempdir()) / f"rove-arm-{name[:120]}.lock"
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    except OSError as error:
        raise RoveError(
            f"{path}, which says who runs the arm {address}, cannot be opened: {error}."
        ) from error
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.read(file, 20).decode(errors="replace").strip()
            raise RoveError(
                f"The arm {address} is being run by another process ({owner or 'unknown'}): stop that one "
                "first."
            ) from None
        os.ftruncate(file, 0)
        os.pwrite(file, str(os.getpid()).encode(), 0)
        yield
    finally:
        os.close(file)
