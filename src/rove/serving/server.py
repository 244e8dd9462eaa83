"""A server of one policy: openpi's websocket protocol, /healthz and /metrics on one port.

It speaks first: one message of metadata. Then each message of a client is an observation, and each answer
{"actions": float32 [C, A], "server_timing": {"infer_ms": …}}. What cannot be answered is answered by text
that says why, which openpi's client raises as an error, and the connection goes on.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import signal
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

from torch import Tensor
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response

from rove.errors import RoveError
from rove.serving import wire
from rove.serving.batcher import Batcher
from rove.serving.keys import Keys
from rove.serving.metrics import Metrics
from rove.types import Observation

_DRAIN = 10.0
"""Seconds that answers which are under way have, once the server is told to stop."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ServerOptions:
    """How a server listens."""

    host: str = "127.0.0.1"
    """The address to listen at; 0.0.0.0 is reached from other machines."""
    port: int = 8000
    """0: any that is free."""
    api_key: str | None = None
    """What a client has to send as "Authorization: Api-Key KEY"; None: nothing."""
    limit: int = 32
    """Observations in a forward pass, at most."""
    wait: float = 0.005
    """Seconds that an observation waits for others, at most."""
    message_limit: int = 64 << 20
    """Bytes of a message, at most; a larger one ends its connection."""


def bind(host: str, port: int) -> socket.socket:
    """Take an address, so that nobody is refused by it after the policy has been loaded.

    Raises RoveError where it is taken, or is no address of this machine.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        taken = socket.socket(family, kind, protocol)
        try:
            taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            taken.bind(address)
        except BaseException:
            taken.close()
            raise
    except (OSError, OverflowError) as error:
        raise RoveError(
            f"{host}:{port} cannot be listened at: {error}. Name another with --host or --port; --port 0 "
            "takes any that is free."
        ) from error
    return taken


@dataclass(eq=False)
class PolicyServer:
    """Answers clients until it is told to stop."""

    act: Callable[[Observation], Tensor]
    """Actions float [B, C, A] for B observations; called in one thread."""
    keys: Keys
    """Which entries of a message are what."""
    metadata: Mapping[str, Any]
    """What a client is told first."""
    options: ServerOptions = field(default_factory=ServerOptions)

    def __post_init__(self) -> None:
        gauges = {
            "rove_queue_length": ("Observations that wait", lambda: self._batcher.waiting),
            "rove_clients": ("Connected clients", lambda: self._batcher.clients),
        }
        self.metrics = Metrics(gauges)
        self._stopping = False

    async def run(self, taken: socket.socket, on_ready: Callable[[int], None] = lambda port: None) -> None:
        """Listen at a bound socket until SIGINT, SIGTERM or `stop`; then answer what is under way, and end.

        `on_ready` is told the port, once clients can connect.
        """
        loop = asyncio.get_running_loop()
        self._end = asyncio.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                loop.add_signal_handler(number, self.stop)
            except (ValueError, NotImplementedError, RuntimeError):
                break  # Not the main thread, or a system without: whoever runs this calls `stop`.
        self._loop = loop
        self._batcher = Batcher(
            self.act, limit=self.options.limit, wait=self.options.wait, on_batch=self.metrics.batch
        )
        answering = asyncio.create_task(self._batcher.run())
        try:
            async with serve(
                self._converse,
                sock=taken,
                process_request=self._http,
                compression=None,
                max_size=self.options.message_limit,
                logger=_log,
            ):
                on_ready(taken.getsockname()[1])
                await self._end.wait()
                await self._drain()
        finally:
            answering.cancel()

    def stop(self) -> None:
        """Tell the server to answer what is under way and to end; from any thread."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._end.set)

    async def _drain(self) -> None:
        """Wait for the answers that are under way, while nobody else is let in."""
        self._stopping = True
        until = time.monotonic() + _DRAIN
        while self._batcher.busy and time.monotonic() < until:
            await asyncio.sleep(0.01)

    def _http(self, connection: ServerConnection, request: Request) -> Response | None:
        """Answer what is no websocket; None lets the client in."""
        path = request.path.partition("?")[0]
        if path == "/healthz":
            return connection.respond(HTTPStatus.OK, "OK\n")
        if path == "/metrics":
            return connection.respond(HTTPStatus.OK, self.metrics.text())
        if self._stopping:
            return connection.respond(HTTPStatus.SERVICE_UNAVAILABLE, "The server is stopping.\n")
        if self.options.api_key is not None:
            given = request.headers.get("Authorization", "")
            if not hmac.compare_digest(given.encode(), f"Api-Key {self.options.api_key}".encode()):
                return connection.respond(
                    HTTPStatus.UNAUTHORIZED, "Send the header Authorization: Api-Key KEY.\n"
                )
        return None

    async def _converse(self, connection: ServerConnection) -> None:
        self._batcher.clients += 1
        try:
            await connection.send(wire.pack(dict(self.metadata)))
            previous: float | None = None
            async for message in connection:
                start = time.monotonic()
                answer = await self._answer(message, previous)
                await connection.send(answer)
                previous = time.monotonic() - start
                if isinstance(answer, bytes):
                    self.metrics.answered(previous)
                else:
                    self.metrics.refused()
        except ConnectionClosed:
            pass  # A client may go whenever it likes.
        finally:
            self._batcher.clients -= 1

    async def _answer(self, message: str | bytes, previous: float | None) -> bytes | str:
        """The answer to one message, as bytes; or a text that says why there is none."""
        if self._stopping:
            return "The server is stopping."
        start = time.monotonic()
        try:
            if isinstance(message, str):
                raise RoveError("The message is text: send an observation, packed by msgpack.")
            actions = await self._batcher.ask(self.keys.observation(wire.unpack(message)))
        except (RoveError, ValueError) as error:
            return str(error)
        except Exception as error:  # noqa: BLE001
            # One request's trouble, of whatever kind, is not to end the others' connections.
            _log.exception("The policy failed on an observation.")
            return f"The policy failed on this observation: {type(error).__name__}: {error}"
        timing = {"infer_ms": 1000 * (time.monotonic() - start)}
        if previous is not None:
            timing["prev_total_ms"] = 1000 * previous
        return wire.pack({"actions": actions.float().numpy(), "server_timing": timing})
