"""What is in the machine's shared memory, where other programs keep theirs too."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

FOLDER = Path("/dev/shm")


def listed() -> set[str]:
    """Names of all segments and semaphores on this machine."""
    return set(os.listdir(FOLDER))


def left_behind(before: set[str]) -> set[str]:
    """Names that are new since `before` and that no living process has mapped: nobody will remove them."""
    maps = ""
    for process in Path("/proc").glob("[0-9]*/maps"):
        with suppress(OSError):  # it has ended, or is another user's
            maps += process.read_text()
    return {name for name in listed() - before if f"{FOLDER / name}\n" not in maps}
