"""The critic: a small MLP on the language model's hidden states."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

from rove.config.schema import ValueHeadConfig


class ValueHead(nn.Module):
    """Values of a chunk, one per action (`level="action"`) or one for all of it (`"chunk"`)."""

    def __init__(self, config: ValueHeadConfig, *, width: int, chunk: int) -> None:
        super().__init__()
        self.config = config
        sizes = (width, *config.hidden)
        layers: list[nn.Module] = []
        for a, b in itertools.pairwise(sizes):
            layers += [nn.Linear(a, b), nn.GELU()]
        self.layers = nn.Sequential(*layers, nn.Linear(sizes[-1], chunk if config.level == "action" else 1))

    @torch.no_grad()
    def initialize(self, generator: torch.Generator) -> None:
        """Normal weights of variance 1 / fan-in; the last layer starts at zero, and so does every value."""
        linear = [layer for layer in self.layers if isinstance(layer, nn.Linear)]
        for layer in linear:
            layer.weight.normal_(0.0, layer.in_features**-0.5, generator=generator)
            layer.bias.zero_()
        linear[-1].weight.zero_()

    def forward(self, hidden: Tensor) -> Tensor:
        """float32 [B, C] or [B, 1] of hidden states [B, positions, D], the first action position first."""
        if self.config.detach:
            hidden = hidden.detach()
        pooled = hidden[:, 0] if self.config.source == "first" else hidden.mean(dim=1)
        with torch.autocast(hidden.device.type, enabled=False):  # returns are learned to more than 8 bits
            return self.layers(pooled.float())
