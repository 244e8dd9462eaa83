"""One GPU by two names: its CUDA index in a process, and what `CUDA_VISIBLE_DEVICES` calls it."""

from __future__ import annotations

from rove.errors import RoveError

VISIBLE = "CUDA_VISIBLE_DEVICES"
"""Lists the GPUs that a process may use, by index, UUID or MIG name; it numbers them from 0 in that order."""


def visible(gpu: int | None, own: str | None) -> str:
    """Return the value of `VISIBLE` for a child that is to see one of this process's GPUs, or none.

    `own` is this process's: None where it is not set, and so all GPUs are seen. Raises RoveError where it
    lists fewer.
    """
    if gpu is None:
        return ""
    if own is None:
        return str(gpu)
    names = _names(own)
    if gpu >= len(names):
        raise RoveError(f"GPU {gpu} was asked for, but {VISIBLE}={own!r} lists {len(names)}: list more.")
    return names[gpu]


def index_of(name: int | str, own: str | None) -> int:
    """The CUDA index by which this process knows a GPU that `VISIBLE` would call `name`; `own` as above.

    Raises RoveError where it does not see that one.
    """
    names = None if own is None else _names(own)
    if names is None and str(name).isdigit():
        return int(name)
    if names is None or str(name) not in names:
        raise RoveError(f"GPU {name} was assigned, but {VISIBLE}={own!r} does not list it.")
    return names.index(str(name))


def _names(listed: str) -> list[str]:
    return [name.strip() for name in listed.split(",") if name.strip()]
