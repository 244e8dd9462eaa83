"""Memory that a run needs on the device that holds its policy, counted before anything is loaded.

Weights are counted exactly, on the meta device. The activations that a layer keeps for its backward pass are
a sum over its widths, as in `openvla.memory`; those of the prefix are kept only where something in it is
trained, otherwise its keys and values alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from rove.config.schema import FlowPolicyConfig, Run
from rove.policies.flow import loading, scratch
from rove.policies.flow.core import FlowModel, Settings
from rove.policies.flow.statistics import Statistics
from rove.policies.memory import Memory
from rove.types import ActionSpec

PROMPT_TOKENS = 20
"""Number of tokens of a long instruction; a state in the prompt adds three for each number."""
_DIM, _STATE = 7, 8
"""Sizes of actions and state that are assumed; their share of memory is negligible."""


def skeleton(run: Run) -> FlowModel:
    """Make the policy of `run` on the meta device, with every shape and dtype and no memory.

    A hub checkpoint that is not here yet is assumed to be of the published size. Raises RoveError where sizes
    do not fit.
    """
    config, flow = run.policy, run.policy.flow or FlowPolicyConfig()
    names = tuple(f"joint_{i}" for i in range(_DIM))
    spec = ActionSpec(names, ("1",) * _DIM, (-1.0,) * _DIM, (1.0,) * _DIM)
    if config.checkpoint is None:
        one = {"q01": [-1.0], "q99": [1.0]}
        parts = {"action": {k: v * _DIM for k, v in one.items()}}
        parts["proprio"] = {k: v * _STATE for k, v in one.items()}
        settings = scratch.settings(
            config,
            chunk=run.rollout.chunk,
            action_spec=spec,
            image_size=run.env.image_size,
            vocabulary=(),
            statistics={run.env.kind: parts},
        )
    else:
        about = loading.describe(config.checkpoint, config.kind)
        about = replace(about, cameras=flow.cameras or about.cameras, horizon=flow.horizon or about.horizon)
        nothing = Statistics({}, {}, ("IDENTITY", "IDENTITY"))
        settings = Settings(
            config=about,
            statistics=nothing,
            chunk=min(run.rollout.chunk, about.horizon),
            action_spec=spec,
            sampling=flow.sampling,
            freeze=flow.freeze or "none",
            value_head=config.value_head,
        )
    policy = FlowModel(settings)
    low = loading.low_names(policy, adapted=config.lora is not None)
    for name, parameter in policy.named_parameters():
        if name in low:
            parameter.data = parameter.data.to(loading.DTYPES[config.dtype])
    if config.lora is not None:
        policy.adapt(config.lora, torch.Generator())
    return policy


def estimate(run: Run) -> Memory:
    """Estimate the memory of the policy of `run`."""
    policy = skeleton(run)
    half = run.training.precision == "bfloat16" or run.policy.dtype == "bfloat16"
    row = Row(policy, half=half, expert_half=half and _half_expert(policy, run))
    return Memory.of(
        policy,
        run,
        training=run.training.micro_batch * row.training(run.training.gradient_checkpointing),
        rollout=run.rollout.num_envs * row.acting(),
    )


def _half_expert(policy: FlowModel, run: Run) -> bool:
    """Return whether the expert computes in bfloat16; trained beside a frozen VLM it may not."""
    weight = next(policy.model.expert[1].parameters())
    return run.training.precision == "bfloat16" or weight.dtype == torch.bfloat16


@dataclass(frozen=True, slots=True)
class Stack:
    """A stack of equal layers, and what they are run over."""

    tokens: int
    width: int
    mlp: int
    layers: int
    gated: bool
    """True where the MLP has a gate beside its input, as language models have it."""
    attended: int
    """Tokens that each one sees."""
    keys: int
    """Width of the keys, and of the values."""

    def kept(self, size: int) -> float:
        """Return the bytes of activations, of `size` bytes a number, that are kept for the backward pass."""
        # In widths: what comes into both halves of a block, and both normed; query, key and value; what
        # attention gives, and the same as one row; in MLPs: what goes into the activation, what comes out.
        return float(
            size * self.tokens * (9 * self.width + (4 if self.gated else 2) * self.mlp) * self.layers
        )

    @property
    def flops(self) -> float:
        """Floating-point operations of a forward pass."""
        weights = (2 * self.width + 2 * self.keys + (3 if self.gated else 2) * self.mlp) * self.width
        return 2.0 * self.layers * self.tokens * (weights + 2 * self.attended * self.width)


@dataclass(frozen=True, slots=True)
class Row:
    """Activations of one row: one observation, and one chunk of actions."""

    policy: FlowModel
    half: bool
    """True where arithmetic is in bfloat16."""
    expert_half: bool
    """True where the expert's is too."""

    @property
    def stacks(self) -> tuple[Stack, Stack, Stack]:
        """The vision tower, the language model and the expert (one pass)."""
        config, text, expert = self.policy.config, self.policy.config.text, self.policy.config.expert
        cameras = config.cameras or 1
        patches = (config.vision.image // config.vision.patch) ** 2
        prompt = PROMPT_TOKENS + (3 * _STATE if config.prompt in ("state", "padded_state") else 0)
        prefix, suffix = cameras * config.image_tokens + prompt + 1, config.horizon + 1
        vision, keys = config.vision, text.kv_heads * text.head_dim
        return (
            Stack(cameras * patches, vision.width, vision.mlp, vision.layers, False, patches, vision.width),
            Stack(prefix, text.width, text.mlp, text.layers, True, prefix, keys),
            Stack(suffix, expert.width, expert.mlp, expert.layers, True, prefix + suffix, keys),
        )

    @property
    def passes(self) -> int:
        """Passes of the expert that a training sample takes."""
        return self.policy.sampling.steps if self.policy.sampling.joint else 1

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Bytes of a number in each of the stacks."""
        vlm = 2 if self.half else 4
        return vlm, vlm, 2 if self.expert_half else 4

    @property
    def cached(self) -> float:
        """Bytes of the prefix's keys and values."""
        prefix, size = self.stacks[1], self.sizes[1]
        return 2.0 * size * prefix.tokens * prefix.keys * prefix.layers

    def trained(self) -> tuple[bool, bool]:
        """Return whether a gradient flows through the vision tower, and through the language model."""
        model = self.policy.model
        tower = any(p.requires_grad for p in model.tower.parameters())
        return tower, tower or any(p.requires_grad for p in model.vlm.parameters())

    def training(self, recompute: bool) -> float:
        """Return the bytes that are kept for the backward pass."""
        vision, text, expert = self.stacks
        tower, language = self.trained()
        expert = replace(expert, tokens=expert.tokens * self.passes)
        stacks = zip((vision, text, expert), self.sizes, (tower, language, True), strict=True)
        grown = [(part, size) for part, size, on in stacks if on]
        # Each layer of the expert joins the prefix's keys and values to its own.
        kept = self.cached * (1 + self.passes * self.sizes[2] / self.sizes[1])
        if recompute:
            inputs = sum(size * part.tokens * part.width * part.layers for part, size in grown)
            return kept + inputs + max(part.kept(size) / part.layers for part, size in grown)
        return kept + sum(part.kept(size) for part, size in grown)

    def acting(self) -> float:
        """Return the bytes of keys and values, and of the largest layer's activations."""
        stacks = zip(self.stacks, self.sizes, strict=True)
        return self.cached + max(s * p.tokens * (5 * p.width + 4 * p.mlp) for p, s in stacks)
