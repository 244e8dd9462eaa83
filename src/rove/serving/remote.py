"""A policy on the other end of a socket: whatever speaks openpi's protocol, Rove's server or another."""

from __future__ import annotations

import queue
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import fields
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from websockets.exceptions import WebSocketException
from websockets.sync.client import ClientConnection, connect

from rove.errors import RoveError
from rove.policies.base import SamplingNoise
from rove.serving import wire
from rove.serving.keys import PRESETS, Keys
from rove.types import ActionChunk, ActionSpec, Mode, Observation

_SIDE = 224
"""Pixels of a picture's side, as openpi's clients send it."""
_EXECUTED = 5
"""Actions that openpi's LIBERO client executes of each answer."""
_PATIENCE = 60.0
"""Seconds in which a server that went away has to be back."""


_Connected = tuple[ClientConnection, ExitStack]
"""A connection, and what closes it."""


class RemotePolicy:
    """An `ActingPolicy` that asks a server, over several connections at once so that it can batch.

    A server of Rove's says what it answers: its action spec, its chunk, its keys. Any other is taken for one
    of openpi's LIBERO set-up: two pictures, padded to a square of 224 pixels, the robot's state, and actions
    in the units of the suite, of which the first few are executed. It acts greedily, or as the server does.
    """

    def __init__(
        self,
        uri: str,
        *,
        connections: int,
        execute: int | None = None,
        api_key: str | None = None,
        patience: float = _PATIENCE,
        timeout: float | None = None,
    ) -> None:
        """Connect. `execute` is the number of actions of an answer that are executed; None: all of Rove's, 5
        of another's. A server that went away has to be back in `patience` seconds; an answer may take
        `timeout` seconds, None: as long as it takes.

        Raises RoveError where nobody answers, or something that speaks another protocol does.
        """
        self._uri, self._patience, self._timeout = uri, patience, timeout
        self._headers = {"Authorization": f"Api-Key {api_key}"} if api_key else {}
        self._idle: queue.LifoQueue[_Connected | None] = queue.LifoQueue()
        first, metadata = self._connect()
        self._idle.put(first)
        for _ in range(connections - 1):
            self._idle.put(None)  # connected when it is needed
        self._threads = ThreadPoolExecutor(connections, "asks")
        own = metadata.get("rove")
        self._own_spec: ActionSpec | None = None
        self._keys, self._side, self.chunk = PRESETS["libero"], _SIDE, execute or _EXECUTED
        if isinstance(own, Mapping):
            self._own_spec, self._side = _record(ActionSpec, own["action_spec"]), None
            self._keys, self.chunk = _record(Keys, own["keys"]), min(own["chunk"], execute or own["chunk"])

    def placed(self, action_spec: ActionSpec) -> RemotePolicy:
        """This policy for an environment's action spec, in which a server answers that says none."""
        self.action_spec = self._own_spec or action_spec
        return self

    def act(
        self,
        observation: Observation,
        mode: Mode,
        noise: SamplingNoise | None = None,
        samples: int | None = None,
    ) -> ActionChunk:
        """Ask for the actions of each row. Raises RoveError where it is to sample: a server decides that."""
        if mode == "sample":
            raise RoveError(f"{self._uri} decides how it samples: evaluate it with --decoding greedy.")
        rows = [observation.select([row]) for row in range(len(observation))]
        actions = torch.stack(list(self._threads.map(self._ask, rows)))
        nothing = torch.zeros_like(actions)
        return ActionChunk(actions, nothing.long(), nothing, None)

    def close(self) -> None:
        """End all connections."""
        self._threads.shutdown(cancel_futures=True)
        while not self._idle.empty():
            if (connected := self._idle.get()) is not None:
                connected[1].close()

    def _ask(self, row: Observation) -> Tensor:
        images = row.images[0].numpy()
        if self._side is not None:
            images = np.stack([_padded(image, self._side) for image in images])
        state = None if row.state is None else row.state[0].numpy()
        message = wire.pack(self._keys.message(images, row.instruction[0], state))
        until = time.monotonic() + self._patience
        while True:
            try:
                with self._connection() as connection:
                    connection.send(message)
                    answer = connection.recv(timeout=self._timeout)
                break
            except (OSError, WebSocketException) as error:
                if time.monotonic() >= until:
                    raise Gone(f"{self._uri} has gone: {error}.") from error
                time.sleep(1.0)
        return self._actions(answer)

    def _actions(self, answer: str | bytes) -> Tensor:
        if isinstance(answer, str):
            raise RoveError(f"{self._uri} answered: {answer.strip()}")
        try:
            actions = wire.unpack(answer)["actions"]
            actions = np.asarray(actions, dtype=np.float32)
        except (ValueError, KeyError, TypeError) as error:
            raise RoveError(f"{self._uri} sent no actions: {error}.") from error
        wanted = self.action_spec.dim
        if actions.ndim != 2 or actions.shape[1] != wanted or len(actions) < self.chunk:
            raise RoveError(
                f"{self._uri} sent actions of shape {list(actions.shape)}: expected "
                f"[{self.chunk} or more, {wanted}]."
            )
        if not np.isfinite(actions).all():
            raise RoveError(f"{self._uri} sent actions that are not finite.")
        low, high = np.asarray((self.action_spec.low, self.action_spec.high), np.float32)
        return torch.from_numpy(actions[: self.chunk].clip(low, high))

    @contextmanager
    def _connection(self) -> Iterator[ClientConnection]:
        """One connection, nobody else's for now; one that broke is opened anew when it is next needed."""
        connected = self._idle.get()
        try:
            if connected is None:
                connected, _ = self._connect()
            yield connected[0]
        except BaseException:
            # What was asked may still be answered, and is not to be taken for the next question's answer.
            if connected is not None:
                connected[1].close()
            self._idle.put(None)
            raise
        self._idle.put(connected)

    def _connect(self) -> tuple[_Connected, Mapping[str, Any]]:
        opened, patience = ExitStack(), self._timeout or _PATIENCE
        try:
            connection = opened.enter_context(
                connect(
                    self._uri,
                    compression=None,
                    max_size=None,
                    additional_headers=self._headers,
                    open_timeout=patience,
                    close_timeout=1.0,
                )
            )
            metadata = connection.recv(timeout=patience)
        except (OSError, WebSocketException, TimeoutError) as error:
            opened.close()
            raise Gone(
                f"Nobody serves a policy at {self._uri}: {error}. Start one there, rove serve CHECKPOINT."
            ) from error
        try:
            found = wire.unpack(metadata) if isinstance(metadata, bytes) else None
        except ValueError:
            found = None
        if not isinstance(found, Mapping):
            opened.close()
            raise RoveError(
                f"{self._uri} speaks another protocol than openpi's: it did not send its metadata."
            )
        return (connection, opened), found


class Gone(RoveError, OSError):
    """There is no server now; there may be one later."""


def _record(kind: type[Any], found: Mapping[str, Any]) -> Any:
    """A record of tuples and plain values, from the metadata; what it does not know is left out."""
    known = {field.name for field in fields(kind)}
    return kind(
        **{
            name: tuple(value) if isinstance(value, list) else value
            for name, value in found.items()
            if name in known
        }
    )


def _padded(image: np.ndarray, side: int) -> np.ndarray:
    """Resize a picture uint8 [h, w, 3] to a square, keeping its proportions, on black."""
    height, width = image.shape[:2]
    if (height, width) == (side, side):
        return image
    scale = max(height, width) / side
    size = (int(width / scale), int(height / scale))
    small = Image.fromarray(image).resize(size, Image.Resampling.BILINEAR)
    square = Image.new("RGB", (side, side))
    square.paste(small, ((side - size[0]) // 2, (side - size[1]) // 2))
    return np.asarray(square)
