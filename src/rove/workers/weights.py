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
from torch import Tensor

from rove import transfer
from rove.policies.base import Policy

_BLOCK = 1 << 28
"""Bytes after which a flat tensor is full: a device has to have room for one beside the weights."""


@dataclass(frozen=True, slots=True, eq=False)
class Weights:
    """The trainable parameters of one version."""

    version: int
    flat: tuple[Tensor, ...]
    """[numbers], each of one dtype."""
    layout: Layout

    @property
    def bytes(self) -> int:
        """Bytes that a transfer moves."""
        return sum(tensor.numel() * tensor.itemsize for tensor in self.flat)


Layout = tuple[tuple[tuple[str, torch.Size], ...], ...]
"""Names and shapes of the parameters in each flat tensor."""


def layout(tensors: Mapping[str, Tensor]) -> Layout:
    """How parameters, by name, are laid out in flat tensors: of one dtype each, and no longer than a
    block."""
    bytes_of: dict[torch.dtype, int] = defaultdict(int)
    blocks: dict[tuple[torch.dtype, int], list[tuple[str, torch.Size]]] = defaultdict(list)
    for name, tensor in tensors.items():
        blocks[tensor.dtype, bytes_of[tensor.dtype] // _BLOCK].append((name, tensor.shape))
        bytes_of[tensor.dtype] += tensor.numel() * tensor.itemsize
    return tuple(tuple(block) for block in blocks.values())


@torch.no_grad()
def flatten(tensors: Mapping[str, Tensor], layout: Layout) -> tuple[Tensor, ...]:
    """A copy of whole tensors, end to end, where they are."""
    return tuple(torch.cat([tensors[name].reshape(-1) for name, _ in block]) for block in layout)


def publish(version: int, tensors: Mapping[str, Tensor]) -> Weights:
    """A copy of whole tensors, by name, as they are now."""
    laid_out = layout(tensors)
    return Weights(version, tuple(flat.cpu() for flat in flatten(tensors, laid_out)), laid_out)


def room(policy: Policy, layout: Layout) -> tuple[Tensor, ...]:
    """Flat tensors for weights to come, on the policy's device."""
    own = dict(policy.named_parameters())
    sizes = (sum(shape.numel() for _, shape in block) for block in layout)
    return tuple(own[block[0][0]].new_empty(size) for size, block in zip(sizes, layout, strict=True))


@torch.no_grad()
def load(policy: Policy, weights: Weights) -> None:
    """Write them into `policy`. Raises KeyError on a name that it does not have."""
    own = dict(policy.named_parameters())
    for flat, block in zip(weights.flat, weights.layout, strict=True):
        there = transfer.to(flat, own[block[0][0]].device)
        for (name, shape), part in zip(block, there.split([s.numel() for _, s in block]), strict=True):
            own[name].copy_(part.view(shape))
