"""A policy behind a socket: the websocket protocol of openpi, which robots and simulators already speak.

`wire` is the bytes of a message, `keys` what its entries mean, `batcher` shares forward passes among clients,
`server` speaks to them, `remote` is the other side: a policy that asks a server.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from rove.errors import RoveError

SCHEMES = ("ws://", "wss://")
"""Beginnings of what names a served policy in place of a checkpoint."""


def is_remote(name: object) -> bool:
    """Whether `name` is the address of a served policy."""
    return str(name).startswith(SCHEMES)


@contextmanager
def installed() -> Iterator[None]:
    """Within the block what serving needs is imported. Raises RoveError, with the fix, where it is absent."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise RoveError(
            f"Serving needs the package {error.name!r}, which is not installed. Install it: pip install "
            "'rove[serve]'"
        ) from error
