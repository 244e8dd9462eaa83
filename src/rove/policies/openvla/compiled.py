"""Rollouts through torch.compile, and on a GPU through CUDA graphs: what is launched a thousand times is
launched once.

A graph is of one shape, so batches are padded to a power of two: environments that end do not each cost
another compilation.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rove.policies.base import SamplingNoise
from rove.policies.openvla.language import KVCache, Llama
from rove.types import Observation


class Compiled:
    """The three functions that a rollout spends its time in."""

    def __init__(self, model: Llama, device: torch.device) -> None:
        mode = "reduce-overhead" if device.type == "cuda" else "default"
        self.forward: Any = torch.compile(model.forward, mode=mode, fullgraph=True)
        self.step: Any = torch.compile(model.step, mode=mode, fullgraph=True)
        self.tower: Any = torch.compile(_tower, mode=mode, fullgraph=True)
        self._caches: dict[tuple[int, int], KVCache] = {}

    def cache(self, model: Llama, batch: int, capacity: int, like: Tensor) -> KVCache:
        """One per shape, kept: a captured graph writes to the addresses that it has seen."""
        if (batch, capacity) not in self._caches:
            made = KVCache(model, batch, capacity, like)
            for buffers in made.layers:
                for buffer in buffers:
                    torch._dynamo.mark_static_address(buffer)
            self._caches[batch, capacity] = made
        return self._caches[batch, capacity]


def _tower(tower: Any, pixels: Tensor, film: Any, text: Tensor | None) -> Tensor:
    return tower(pixels, film, text)


def padded(observation: Observation, noise: SamplingNoise | None) -> tuple[Observation, SamplingNoise | None]:
    """The same rows, the last one repeated until their number is a power of two."""
    rows = len(observation)
    index = torch.arange(1 << (rows - 1).bit_length()).clamp_max(rows - 1)
    if noise is not None:
        noise = replace(noise, episode=noise.episode[index], chunk=noise.chunk[index])
    return observation.select(index), noise
