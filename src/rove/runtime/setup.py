"""The calls and the module path that every new process begins with."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

_calls: dict[tuple[Callable[..., object], tuple[Any, ...]], None] = {}
"""In the order in which they were made."""


def repeat(function: Callable[..., object], *args: Any) -> None:
    """From now on every process that this one starts, and theirs in turn, begins with `function(*args)`.

    Whoever changes what unpickling or a registry depends on calls this, so that a child can read what it is
    sent. The function has to be importable by name.
    """
    _calls[function, args] = None


@dataclass(frozen=True, slots=True)
class Setup:
    """Everything a new process needs before it can unpickle the user's own classes."""

    path: tuple[str, ...]
    """`sys.path`."""
    calls: tuple[tuple[Callable[..., object], tuple[Any, ...]], ...]

    @staticmethod
    def here() -> Setup:
        """The setup by which another process becomes like this one."""
        return Setup(tuple(sys.path), tuple(_calls))

    def apply(self) -> None:
        """Make this process like the one that the setup was taken in."""
        sys.path[:] = [*self.path, *(entry for entry in sys.path if entry not in self.path)]
        for function, args in self.calls:
            function(*args)
