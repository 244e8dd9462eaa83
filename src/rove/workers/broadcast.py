"""Weights from the learner's first rank to policies that are apart from it, device to device: NCCL between
GPUs, gloo between CPUs. They do not pass through the host's memory, and the driver has no part in it."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed

_PATIENCE = timedelta(seconds=120)
"""How long a member waits for the others. One that died is found out before, or else after this time."""


class Member(NamedTuple):
    """A process's place in the group of a learner and the policies that it sends its weights to."""

    address: str
    """ "host:port", which the sender serves."""
    place: int
    """0 sends, the others receive."""
    size: int


class Broadcast:
    """A process group of its own, beside that in which learners join their gradients."""

    def __init__(self, member: Member, device: torch.device) -> None:
        """Returns when all members are there. Raises RuntimeError where they are not in time."""
        host, _, port = member.address.rpartition(":")
        sends = member.place == 0
        store = distributed.TCPStore(  # pyright: ignore[reportPrivateImportUsage]
            host, int(port), member.size, sends, timeout=_PATIENCE, wait_for_workers=False
        )
        self._group: Any
        if device.type == "cuda":
            options = distributed.ProcessGroupNCCL.Options()
            options._timeout = _PATIENCE
            self._group = distributed.ProcessGroupNCCL(store, member.place, member.size, options)
        else:
            self._group = distributed.ProcessGroupGloo(store, member.place, member.size, timeout=_PATIENCE)

    def __call__(self, tensors: Sequence[Tensor]) -> int:
        """Send them, or receive into them; they have to be contiguous, and alike in every process. Returns
        how many bytes that were."""
        for tensor in tensors:
            self._group.broadcast(tensor, 0).wait()
        return sum(tensor.nbytes for tensor in tensors)
