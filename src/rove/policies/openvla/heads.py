"""OpenVLA-OFT's regression head (Kim et al. 2025, section 4): hidden states to actions, without tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rove.errors import RoveError

NO_LIKELIHOOD = (
    "The L1 head is deterministic: it gives actions no likelihood, so there is nothing to sample and no "
    "ratio for RL to weigh. Use it for inference and SFT, or train by RL from a checkpoint with discrete "
    "tokens (policy.head discrete)."
)


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.ffn = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return x + self.ffn(x)


class _ResidualMLP(nn.Module):
    def __init__(self, inputs: int, width: int, outputs: int) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(inputs)
        self.fc1 = nn.Linear(inputs, width)
        self.mlp_resnet_blocks = nn.ModuleList(_Block(width) for _ in range(2))
        self.layer_norm2 = nn.LayerNorm(width)
        self.fc2 = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(self.layer_norm1(x)).relu()
        for block in self.mlp_resnet_blocks:
            x = block(x)
        return self.fc2(self.layer_norm2(x))


class L1Head(nn.Module):
    """A regression head: all hidden states of one action through a residual MLP of the model's width."""

    def __init__(self, width: int, action_dim: int) -> None:
        super().__init__()
        self.action_dim = action_dim
        self.model = _ResidualMLP(width * action_dim, width, action_dim)

    @torch.no_grad()
    def initialize(self, generator: torch.Generator) -> None:
        """Draw normal weights of variance 1 / fan-in; normalisation layers start as the identity."""
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                layer.weight.normal_(0.0, layer.in_features**-0.5, generator=generator)
                layer.bias.zero_()
            elif isinstance(layer, nn.LayerNorm):
                layer.weight.fill_(1.0)
                layer.bias.zero_()

    def forward(self, hidden: Tensor) -> Tensor:
        """Compute normalised actions, float32 [B, C, A], from hidden states [B, C·A, D]."""
        grouped = hidden.unflatten(1, (-1, self.action_dim)).flatten(2)
        return self.model(grouped.to(self.model.fc1.weight.dtype)).float()


def refuse_rl(head: nn.Module | None) -> None:
    """Raise RoveError where actions come from a head that has no likelihood."""
    if head is not None:
        raise RoveError(NO_LIKELIHOOD)
