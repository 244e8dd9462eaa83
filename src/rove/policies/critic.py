"""The critic: a small MLP on the language model's hidden states."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

from rove.config.schema import ValueHeadConfig


class ValueHead(nn.Module):
    """A critic that gives a chunk one value per action (`level="action"`) or one in all (`"chunk"`)."""

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
        """Draw normal weights of variance 1 / fan-in; the last layer, and so every value, starts at zero."""
        linear = [layer for layer in self.layers if isinstance(layer, nn.Linear)]
        for layer in linear:
            layer.weight.normal_(0.0, layer.in_features**-0.5, generator=generator)
            layer.bias.zero_()
        linear[-1].weight.zero_()

    def forward(self, hidden: Tensor) -> Tensor:
        """Compute values, float32 [B, C] or [B, 1], from hidden states [B, positions, D], in action order."""
        if self.config.detach:
            hidden = hidden.detach()
        pooled = hidden[:, 0] if self.config.source == "first" else hidden.mean(dim=1)
        with torch.autocast(hidden.device.type, enabled=False):  # returns are learned to more than 8 bits
            return self.layers(pooled.float())
