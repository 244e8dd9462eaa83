"""The reference: the policy that a run started from, to which a KL term keeps the trained one close."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from rove.training.parallel import gather_full, shard_like


class Reference:
    """A copy of the trainable weights at construction: in nothing else will the two policies differ.

    With adapters only these are copied, whatever they were at the start; frozen weights are not copied. The
    copy takes the places of the policy's own tensors while the reference is evaluated.
    """

    def __init__(self, policy: nn.Module) -> None:
        """Copy the trainable weights of `policy`, sharded where they are."""
        self._policy = policy
        self._trained = {name: p for name, p in policy.named_parameters() if p.requires_grad}
        self._kept = {name: p.detach().clone() for name, p in self._trained.items()}

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Make the policy the reference within the block. No autograd graph may reach into or out of it."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        """Swap contents tensor by tensor: FSDP and captured graphs know tensors by their memory."""
        for name, parameter in self._trained.items():
            now = parameter.detach().clone()
            parameter.copy_(self._kept[name])
            self._kept[name].copy_(now)
        for module in self._policy.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # what was gathered before is no longer so

    def state_dict(self) -> dict[str, Tensor]:
        """Return the copy, whole; every rank has to call it."""
        return gather_full(self._kept)

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore the copy that `state_dict` returned."""
        for name, tensor in self._kept.items():
            tensor.copy_(shard_like(state[name], tensor))
