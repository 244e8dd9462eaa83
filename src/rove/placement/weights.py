"""Weights on their one way back: versioned, from the learner to the policies that collect.

Only what training changes travels: with frozen parts, or an adapter, that is all that differs from the
checkpoint that every process has read. It lies end to end in a few flat tensors, so that a device copies a
block, and not a thousand parameters one by one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rove import transfer
from rove.policies.base import Policy

_BLOCK = 1 << 28
"""Bytes after which a flat tensor is full: a device has to have room for one beside the weights."""


@dataclass(frozen=True, slots=True, eq=False)
class Weights:
    """The trainable parameters of one version."""

    version: int
    flat: tuple[Tensor, ...]
    """[numbers], each of one dtype, on the CPU."""
    layout: tuple[tuple[tuple[str, torch.Size], ...], ...]
    """Names and shapes of the parameters in each."""

    @property
    def bytes(self) -> int:
        """What a transfer moves."""
        return sum(tensor.numel() * tensor.itemsize for tensor in self.flat)


@torch.no_grad()
def publish(version: int, tensors: Mapping[str, Tensor]) -> Weights:
    """A copy of whole tensors, by name, as they are now."""
    bytes_of: dict[torch.dtype, int] = defaultdict(int)
    blocks: dict[tuple[torch.dtype, int], list[tuple[str, Tensor]]] = defaultdict(list)
    for name, tensor in tensors.items():
        blocks[tensor.dtype, bytes_of[tensor.dtype] // _BLOCK].append((name, tensor))
        bytes_of[tensor.dtype] += tensor.nbytes
    flat = [torch.cat([tensor.reshape(-1) for _, tensor in block]).cpu() for block in blocks.values()]
    layout = [tuple((name, tensor.shape) for name, tensor in block) for block in blocks.values()]
    return Weights(version, tuple(flat), tuple(layout))


@torch.no_grad()
def load(policy: Policy, weights: Weights) -> None:
    """Write them into `policy`. Raises KeyError on a name that it does not have."""
    assert isinstance(policy, nn.Module)
    own = dict(policy.named_parameters())
    for flat, block in zip(weights.flat, weights.layout, strict=True):
        there = transfer.to(flat, own[block[0][0]].device)
        for (name, shape), part in zip(block, there.split([s.numel() for _, s in block]), strict=True):
            own[name].copy_(part.view(shape))
