"""The moments at which what is on the disk changes, and what a signal at one of them does to a command."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

_CHANGES = {
    "os.mkdir": (0, 2),
    "os.remove": (0, 1),
    "os.rmdir": (0, 1),
    "os.truncate": (0, None),
    "os.rename": (0, 2),
    "os.link": (0, 2),
    "os.symlink": (1, 2),
}
"""Audit events that change a directory -> the places of a path and of its `dir_fd` among their arguments."""
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class Moments:
    """Counts the moments of a process at which something below a folder is about to be changed, and has a
    signal come at one of them.

    They are before each call of the system that makes, opens for writing, syncs, renames or removes
    something. With `halves` they are those before which something has changed, and half-way through whatever
    was written to a file between two of them too, in whatever language it was: all that a kill can leave.
    """

    def __init__(self, folder: Path, at: int = 0, signals: tuple[int, ...] = (), halves: bool = True) -> None:
        """`at` counts from 1; 0: none. `signals` come one after the other, each when the one before it was
        not the end."""
        self.names: list[str] = []
        self._folder, self._at, self._signals, self._halves = str(folder.resolve()), at, signals, halves
        self._there: dict[str, tuple[int, int, int]] = {}
        self._sizes: dict[int, int] = {}
        self._new = True
        self._emptied: set[str] = set()
        self._busy = False

    def watch(self) -> None:
        """From now on, until the process ends."""
        fsync = os.fsync

        def synced(descriptor: Any) -> None:
            number = descriptor if isinstance(descriptor, int) else descriptor.fileno()
            self._event("fsync", os.readlink(f"/proc/self/fd/{number}"))
            fsync(descriptor)

        os.fsync = synced
        sys.addaudithook(self._hear)

    def end(self) -> None:
        """What was written last counts too."""
        self._event("the end of", self._folder)

    def _hear(self, event: str, args: tuple[Any, ...]) -> None:
        if self._busy:
            return
        if event == "open":
            path, flags = args[0], args[2]
            if isinstance(flags, int) and flags & _WRITES and not isinstance(path, int) and path is not None:
                self._event("open", os.path.abspath(os.fsdecode(path)), emptied=bool(flags & os.O_TRUNC))
        elif event in _CHANGES:
            place, beside = _CHANGES[event]
            at = -1 if beside is None else args[beside]
            above = os.getcwd() if at in (-1, None) else os.readlink(f"/proc/self/fd/{at}")
            self._event(event.removeprefix("os."), os.path.join(above, os.fsdecode(args[place])))

    def _event(self, what: str, path: str, emptied: bool = False) -> None:
        if not f"{path}/".startswith(f"{self._folder}/"):
            return
        self._busy = True
        grown = self._look()
        for file, half in grown if self._halves else ():
            self._moment(f"half-way through writing {file}", partial(os.truncate, file, half))
        if emptied:
            self._emptied.add(path)
        if self._new or not self._halves:
            self._moment(f"{what} {path}")
        self._busy = False

    def _look(self) -> list[tuple[str, int]]:
        """The files that have grown since the last look, with the sizes at which they were half written."""
        grown, there = [], {}
        for folder, folders, files in os.walk(self._folder):
            for name in (*folders, *files):
                path = os.path.join(folder, name)
                try:
                    status = os.lstat(path)
                except FileNotFoundError:  # another thread's
                    continue
                there[path] = (status.st_ino, status.st_size, status.st_mtime_ns)
                # By its number, which a file keeps when it is renamed.
                before = 0 if path in self._emptied else self._sizes.get(status.st_ino, 0)
                if stat.S_ISREG(status.st_mode) and status.st_size > before:
                    grown.append((path, (before + status.st_size) // 2))
        self._new = there != self._there
        self._there, self._sizes = there, {number: size for number, size, _ in there.values()}
        self._emptied.clear()
        return sorted(grown)

    def _moment(self, name: str, first: Callable[[], None] = lambda: None) -> None:
        self.names.append(name.replace(self._folder, "."))
        if len(self.names) == self._at:
            first()
            self._busy = False
            for number in self._signals:
                os.kill(os.getpid(), number)
