"""Memory that a run needs on the device that holds its policy, counted before anything is loaded.

Weights are counted exactly, on the meta device. The activations that a layer keeps for its backward pass are
a sum over its widths whose factors were measured with autograd's saved tensors; a test compares the two.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch

from rove.config.schema import Run
from rove.errors import RoveError
from rove.policies import hub
from rove.policies.memory import Memory
from rove.policies.openvla import bins, loading
from rove.policies.openvla.config import Checkpoint, describe
from rove.policies.openvla.core import ActionModel
from rove.policies.openvla.loading import DTYPES
from rove.policies.openvla.settings import Settings
from rove.types import ActionSpec

PROMPT_TOKENS = 40
"""Number of tokens of a long instruction in its template."""
VOCABULARY = 64
"""Number of words assumed for a vocabulary from scratch; their share of memory is negligible."""


def estimate(run: Run, action_dim: int = 7) -> Memory:
    """Estimate the memory of the policy of `run`. A hub checkpoint that is not here yet is assumed to be of
    the published size."""
    policy = skeleton(run, action_dim)
    half = run.training.precision == "bfloat16" or run.policy.dtype == "bfloat16"
    sample = ChunkMemory(policy, views=1, half=half)
    return Memory.of(
        policy,
        run,
        training=run.training.micro_batch * sample.training(run.training.gradient_checkpointing),
        rollout=run.rollout.num_envs * sample.acting() + policy.lowered_bytes,
    )


Model = TypeVar("Model", bound=ActionModel)


def skeleton(run: Run, action_dim: int = 7, kind: type[Model] = ActionModel) -> Model:
    """Make the policy of `run` on the meta device, with every shape and dtype and no memory."""
    config = run.policy
    names = tuple(f"joint_{i}" for i in range(action_dim))
    spec = ActionSpec(names, ("1",) * action_dim, (-1.0,) * action_dim, (1.0,) * action_dim)
    statistics: dict[str, Any] = bins.statistics_of_bounds(spec)
    statistics["bounds"]["proprio"] = {"q01": [0.0] * 8, "q99": [1.0] * 8}
    settings = Settings.from_scratch(
        replace(config, temperature=1.0, center_crop=None, compile=False),
        _checkpoint(run),
        chunk=run.rollout.chunk,
        action_spec=spec,
        statistics=statistics,
    )
    if config.checkpoint is not None:
        settings = replace(settings, placeholders="zero", film=False, proprio=False, pointers=0)
    policy = kind(settings)
    policy.vlm.to(DTYPES[config.dtype])
    if config.lora is not None:
        policy.adapt(config.lora, torch.Generator())
    return policy


def _checkpoint(run: Run) -> Checkpoint:
    name = run.policy.checkpoint
    if name is None:
        return describe(run.policy, image_size=run.env.image_size, words=VOCABULARY + bins.BINS)
    try:
        return loading.describe(name, download=False)
    except RoveError:
        if not hub.is_hub_name(name):
            raise
        return Checkpoint({"model_type": "openvla"}, {})


@dataclass(frozen=True, slots=True)
class ChunkMemory:
    """Memory, in bytes, of the activations of one chunk."""

    policy: ActionModel
    views: int
    """Number of images, n."""
    half: bool
    """True where arithmetic is in bfloat16."""

    def training(self, recompute: bool) -> float:
        """Return the bytes that are kept for the backward pass."""
        text, towers = self.layers()
        if recompute:  # the input of every layer, and the inside of the largest one
            size = 2 if self.half else 4
            inputs = [size * tokens * width * depth for tokens, width, _, depth in (text, *towers)]
            inside = [self._kept(layer is text, layer) / layer[3] for layer in (text, *towers)]
            return sum(inputs) + max(inside)
        return sum(self._kept(layer is text, layer) for layer in (text, *towers))

    def acting(self) -> float:
        """Return the bytes of the largest layer's activations; plus all keys and values if autoregressive."""
        text, towers = self.layers()
        size = 2 if self.half else 4
        transient = max(size * tokens * (5 * width + 4 * mlp) for tokens, width, mlp, _ in (text, *towers))
        tokens, width, _, depth = text
        cached = 2 * size * tokens * width * depth if self.policy.decoding == "autoregressive" else 0
        return transient + cached

    def layers(self) -> tuple[tuple[int, int, int, int], list[tuple[int, int, int, int]]]:
        """Return (tokens, width, MLP width, layers) of language model and of each tower's computed part."""
        checkpoint = self.policy.checkpoint
        llama, side = checkpoint.llama, checkpoint.image_size // checkpoint.towers[0].patch
        patches = self.views * side**2
        tokens = patches + PROMPT_TOKENS + self.policy.chunk * self.policy.action_spec.dim
        text = (tokens, llama.hidden_size, llama.intermediate_size, llama.num_hidden_layers)
        return text, [(patches, t.width, t.mlp, t.depth - 1) for t in checkpoint.towers]

    def _kept(self, text: bool, layer: tuple[int, int, int, int]) -> float:
        tokens, width, mlp, depth = layer
        # In widths: what comes into both halves of a block, and both normed; query, key and value; what
        # attention gives, and the same as one row; in MLPs: what goes into the activation, what comes out.
        elements = 9 * width + (4 if text else 2) * mlp
        return float((2 if self.half else 4) * tokens * elements * depth)
