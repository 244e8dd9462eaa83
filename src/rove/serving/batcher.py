"""Several clients' observations in one forward pass."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from rove.errors import RoveError
from rove.types import Observation


@dataclass(frozen=True, slots=True, eq=False)
class _Request:
    observation: Observation
    answer: asyncio.Future[Tensor]


class Batcher:
    """A queue of observations in front of a policy, which answers up to `limit` of them at once.

    The first one waits for the other `clients`, at most `wait` seconds; while the policy computes, those that
    come queue up and are its next batch. Pictures of several sizes make several batches. `on_batch` is told
    the size of each and the seconds that it took.
    """

    def __init__(
        self,
        act: Callable[[Observation], Tensor],
        *,
        limit: int,
        wait: float,
        on_batch: Callable[[int, float], None] = lambda size, seconds: None,
    ) -> None:
        """`act` gives actions float [B, C, A] for B observations; it is called in one thread of its own."""
        self._act, self._limit, self._wait, self._on_batch = act, limit, wait, on_batch
        self._queue: asyncio.Queue[_Request] = asyncio.Queue()
        self._thread = ThreadPoolExecutor(1, "policy")
        self._busy = 0
        self.clients = 0
        """Number of clients that are connected; who connects them counts them."""

    @property
    def waiting(self) -> int:
        """Number of observations that are in the queue."""
        return self._queue.qsize()

    async def ask(self, observation: Observation) -> Tensor:
        """The actions for one observation, float [C, A]. Raises what the policy raised for it."""
        request = _Request(observation, asyncio.get_running_loop().create_future())
        self._busy += 1
        try:
            await self._queue.put(request)
            return await request.answer
        finally:
            self._busy -= 1

    @property
    def busy(self) -> int:
        """Number of observations that have no answer yet."""
        return self._busy

    async def run(self) -> None:
        """Answer what is asked, until this is cancelled."""
        try:
            while True:
                await self._answer(await self._collect())
        finally:
            self._thread.shutdown(wait=False, cancel_futures=True)

    async def _collect(self) -> list[_Request]:
        batch = [await self._queue.get()]
        try:
            async with asyncio.timeout(self._wait):
                # A client asks one thing at a time: more than there are clients will not come.
                while len(batch) < min(self._limit, max(self.clients, self._busy)):
                    batch.append(await self._queue.get())
        except TimeoutError:
            pass  # Then these are the batch.
        return batch

    async def _answer(self, batch: Sequence[_Request]) -> None:
        groups: dict[tuple, list[_Request]] = {}
        for request in batch:
            seen = request.observation
            shape = (seen.images.shape, None if seen.state is None else seen.state.shape)
            groups.setdefault(shape, []).append(request)
        for group in groups.values():
            try:
                answers = await self._call(group)
            except Exception as error:  # noqa: BLE001  # it is the asker's, whatever it is
                if len(group) > 1:
                    # One of them is at fault; the others are not to suffer for it.
                    for request in group:
                        await self._answer([request])
                    continue
                answers = [error]
            for request, answer in zip(group, answers, strict=True):
                if not request.answer.done():  # its client may have gone
                    if isinstance(answer, Exception):
                        request.answer.set_exception(answer)
                    else:
                        request.answer.set_result(answer)

    async def _call(self, group: Sequence[_Request]) -> list[Tensor | Exception]:
        seen = Observation.cat([request.observation for request in group])
        start = time.monotonic()
        actions = await asyncio.get_running_loop().run_in_executor(self._thread, self._act, seen)
        self._on_batch(len(group), time.monotonic() - start)
        return [
            row
            if torch.isfinite(row).all()
            else RoveError("The policy answered with numbers that are not finite.")
            for row in actions
        ]
