"""What Rove adds to published networks: the pointer of policies from scratch, and Flow-Noise's deviations."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor, nn

from rove.config.schema import FlowSampling
from rove.policies.pointers import point


class Pointer(nn.Module):
    """Points at what an instruction names, by the hidden states of a picture's tokens.

    A published VLA starts from a vision-language model that finds what a sentence names; a policy from
    scratch learns it from pictures to point in.
    """

    def __init__(self, count: int, pictures: int, each: int, width: int) -> None:
        """`count` is the number of points in each of the first `pictures`, which have `each` tokens."""
        super().__init__()
        self.pictures, self.each = pictures, each
        self.queries = nn.Parameter(torch.empty(pictures * count, width))

    @torch.no_grad()
    def initialize(self, generator: torch.Generator) -> None:
        """Draw normal queries of variance 1 / width."""
        self.queries.normal_(0.0, self.queries.shape[1] ** -0.5, generator=generator)

    def forward(self, hidden: Tensor) -> Tensor:
        """Compute logits, float32 [B, K, P], from the hidden states of a prefix, pictures first; see
        `pointers.point`."""
        return point(self.queries, hidden, self.pictures, self.each)


class NoiseNetwork(nn.Module):
    """Standard deviations of Flow-Noise (πRL, Chen et al. 2025; ReinFlow, Zhang et al. 2025): a small MLP."""

    def __init__(self, width: int, dim: int, sampling: FlowSampling) -> None:
        """`width` is that of the expert, `dim` the number of padded action dimensions, D."""
        super().__init__()
        sizes = (width, *sampling.hidden, dim)
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(sizes))
        self.low, self.high = (2 * math.log(bound) for bound in (sampling.low, sampling.high))

    @torch.no_grad()
    def initialize(self, generator: torch.Generator) -> None:
        """Draw normal weights of variance 1 / fan-in; the last layer starts at zero, between the bounds."""
        for layer in self.layers:
            assert isinstance(layer, nn.Linear)
            layer.weight.normal_(0.0, layer.in_features**-0.5, generator=generator)
            layer.bias.zero_()
        self.layers[-1].weight.zero_()  # pyright: ignore[reportCallIssue]

    def forward(self, hidden: Tensor) -> Tensor:
        """Compute deviations [..., D] of the expert's hidden states [..., W]."""
        with torch.autocast(hidden.device.type, enabled=False):
            x = hidden.float()
            for layer in self.layers[:-1]:
                x = layer(x).tanh()
            share = (self.layers[-1](x).tanh() + 1) / 2
            return (0.5 * (self.low + (self.high - self.low) * share)).exp()
