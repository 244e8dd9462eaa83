"""Weights on their one way back: versioned, from the learner to the policies that collect.

Only what training changes travels: with frozen parts, or an adapter, that is all that differs from the
checkpoint that every process has read. One message holds all tensors, so a transport moves one block.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rove.policies.base import Policy


@dataclass(frozen=True, slots=True, eq=False)
class Weights:
    """The trainable parameters of one version."""

    version: int
    tensors: Mapping[str, Tensor]
    """By parameter name, whole, on the CPU."""

    @property
    def bytes(self) -> int:
        """What a transfer moves."""
        return sum(tensor.numel() * tensor.itemsize for tensor in self.tensors.values())


@torch.no_grad()
def load(policy: Policy, weights: Weights) -> None:
    """Write them into `policy`. Raises KeyError on a name that it does not have."""
    assert isinstance(policy, nn.Module)
    own = dict(policy.named_parameters())
    for name, tensor in weights.tensors.items():
        own[name].copy_(tensor)
