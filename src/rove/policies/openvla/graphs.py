"""Acting as one CUDA graph: a thousand kernel launches become one.

A graph has one shape, so batches are padded to a power of two and prompts to a multiple of 16 tokens:
environments that end do not each cost another capture.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from rove.policies.base import SamplingNoise
from rove.types import Observation

PROMPT_MULTIPLE = 16
"""Number of tokens that the length of a prompt is padded to a multiple of."""


class Graphs:
    """A function of tensors on a GPU, captured as a CUDA graph for every combination of input shapes.

    The function must not read numbers on the host. Weights may change in place: a graph reads them at their
    address. All graphs share one memory pool, and results are copied out of it.
    """

    def __init__(self, run: Callable[..., Any], anchor: Tensor) -> None:
        """Wrap `run`; graphs are captured anew when the address of `anchor`, one of the weights, changes."""
        self._run, self._anchor = run, anchor
        self._address = anchor.data_ptr()
        self._pool: Any = None
        self._captured: dict[Any, tuple[list[Tensor], torch.cuda.CUDAGraph, Any]] = {}

    def __call__(self, *inputs: Any) -> Any:
        """Return a clone of the function's result for `inputs`."""
        leaves, layout = tree_flatten(inputs)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        others = tuple(leaf for leaf in leaves if not isinstance(leaf, Tensor))
        key = (tuple((t.shape, t.dtype) for t in tensors), others, str(layout))
        if self._address != self._anchor.data_ptr():
            self._captured.clear()
            self._address = self._anchor.data_ptr()
        if key not in self._captured:
            self._captured[key] = self._capture(leaves, layout)
        static, graph, answer = self._captured[key]
        for old, new in zip(static, tensors, strict=True):
            old.copy_(new)
        graph.replay()
        return tree_map_only(Tensor, torch.clone, answer)

    def _capture(self, leaves: list[Any], layout: Any) -> tuple[list[Tensor], torch.cuda.CUDAGraph, Any]:
        kept = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        inputs = tree_unflatten(kept, layout)
        # What is compiled, or allocated once, has to be before a capture begins.
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                self._run(*inputs)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            answer = self._run(*inputs)
        self._pool = self._pool or graph.pool()
        return [leaf for leaf in kept if isinstance(leaf, Tensor)], graph, answer


def padded(observation: Observation, noise: SamplingNoise | None) -> tuple[Observation, SamplingNoise | None]:
    """Pad a batch to a power of two by repeating its last row."""
    rows = len(observation)
    index = torch.arange(1 << (rows - 1).bit_length()).clamp_max(rows - 1)
    if noise is not None:
        noise = replace(noise, episode=noise.episode[index], chunk=noise.chunk[index])
    return observation.select(index), noise
