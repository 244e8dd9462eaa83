"""A policy behind a socket: the websocket protocol of openpi, which robots and simulators already speak.

`wire` is the bytes of a message, `keys` what its entries mean, `batcher` shares forward passes among clients,
`server` speaks to them, `remote` is the other side: a policy that asks a server.
"""

SCHEMES = ("ws://", "wss://")
"""Beginnings of what names a served policy in place of a checkpoint."""


def is_remote(name: object) -> bool:
    """Whether `name` is the address of a served policy."""
    return str(name).startswith(SCHEMES)
