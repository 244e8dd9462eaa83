"""A server that stands in front of another and lets its answers go wrong, so that clients can be tried."""

from __future__ import annotations

import threading
import time
from typing import Literal

import numpy as np
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect
from websockets.sync.server import ServerConnection, serve

from rove.serving import wire

Fault = Literal["gone", "late", "silent", "nan", "far"]
"""What goes wrong: nobody answers or lets anybody in; answers come 0.5 s late, or not at all; they are not
finite; they all say the most of the first dimension."""
LATE = 0.5
"""Seconds that a late answer is held back."""


class FaultyServer:
    """A server of openpi's protocol between a client and a server; a context manager."""

    fault: Fault | None = None

    def __init__(self, upstream: str) -> None:
        """`upstream` is the address of the server that answers, ws://HOST:PORT."""
        self._upstream = upstream
        self._server = serve(self._converse, "127.0.0.1", 0, compression=None, max_size=None)
        self.address = f"ws://127.0.0.1:{self._server.socket.getsockname()[1]}"
        """Where clients connect."""
        self.questions = 0
        """Number of messages that came."""

    def __enter__(self) -> FaultyServer:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.fault = None
        self._server.shutdown()

    def _converse(self, client: ServerConnection) -> None:
        if self.fault == "gone":
            client.close(1011)
            return
        with connect(self._upstream, compression=None, max_size=None) as server:
            try:
                client.send(server.recv())
                for message in client:
                    self.questions += 1
                    if self.fault == "gone":
                        break
                    server.send(message)
                    answer = self._altered(server.recv())
                    if self.fault == "gone":
                        break
                    client.send(answer)
            except ConnectionClosed:
                pass  # Either side may go whenever it likes.

    def _altered(self, answer: str | bytes) -> str | bytes:
        fault = self.fault
        if fault == "late":
            time.sleep(LATE)
        while self.fault == "silent":
            time.sleep(0.05)
        if fault in ("nan", "far") and isinstance(answer, bytes):
            found = wire.unpack(answer)
            actions = np.array(found["actions"])
            if fault == "nan":
                actions[:] = np.nan
            else:
                actions[:] = 0.0
                actions[:, 0] = 1.0
            return wire.pack({**found, "actions": actions})
        return answer
