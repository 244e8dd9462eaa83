"""Flow policies from scratch: config.json of tiny sizes, a tokenizer of the suite's words, random weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from rove.config.ranges import Layers, Pixels, PositiveFloat, Size
from rove.config.schema import ValueHeadConfig
from rove.policies.flow import config as configs
from rove.policies.flow import statistics as stats
from rove.policies.flow.config import Family
from rove.policies.flow.core import FlowModel, Settings
from rove.policies.flow.layers import AdaptiveNorm, RMSNorm, Tower
from rove.policies.flow.loading import prompts_of
from rove.policies.flow.prompts import word_tokenizer
from rove.policies.flow.settings import FlowSampling
from rove.policies.openvla.vlm import place_evenly
from rove.policies.reading import Table
from rove.types import ActionSpec


@dataclass(frozen=True, slots=True)
class FlowSizes:
    """Sizes of a flow policy from scratch."""

    family: Family = "smolvla"
    vision_width: Size = 64
    vision_layers: Layers = 3
    vision_heads: Size = 2
    vision_mlp: Size = 256
    patch: Pixels = 8
    """Pixels along an edge of a patch."""
    shuffle: Size = 2
    """SmolVLA: edge of a square of patches that become one token."""
    width: Size = 128
    layers: Layers = 2
    heads: Size = 4
    kv_heads: Size = 2
    """Heads of keys and values; π has one."""
    mlp: Size = 256
    expert_width: PositiveFloat = 0.75
    """Width of the expert, as a part of the language model's."""
    expert_mlp: Size = 256
    """π: width of the expert's MLP; SmolVLA's follows from its width."""
    max_dim: Size = 32
    """Size to which states and actions are padded, D."""


TINY = {family: FlowSizes(family=family) for family in configs.FAMILIES}
"""Tiny policies of each family, of about half a million weights."""


def describe(
    sizes: FlowSizes,
    *,
    words: int,
    image_size: int,
    cameras: int,
    state: int,
    actions: int,
    horizon: int,
    chunk: int,
    methods: tuple[stats.Method, stats.Method],
) -> dict[str, Any]:
    """Make config.json of a new policy, in LeRobot's layout; `words` is the size of its tokenizer."""
    family = sizes.family
    names = ["observation.images.image", *(f"observation.images.image{i}" for i in range(2, cameras + 1))]
    visual = {"type": "VISUAL", "shape": [3, image_size, image_size]}
    text = {
        "hidden_size": sizes.width,
        "intermediate_size": sizes.mlp,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.kv_heads if family == "smolvla" else 1,
        "head_dim": sizes.width // sizes.heads,
        "vocab_size": words,
    }
    vision = {
        "hidden_size": sizes.vision_width,
        "intermediate_size": sizes.vision_mlp,
        "num_hidden_layers": sizes.vision_layers,
        "num_attention_heads": sizes.vision_heads,
        "patch_size": sizes.patch,
        "image_size": image_size,
    }
    content: dict[str, Any] = {
        "type": family,
        "input_features": dict.fromkeys(names, visual)
        | {"observation.state": {"type": "STATE", "shape": [state]}},
        "output_features": {"action": {"type": "ACTION", "shape": [actions]}},
        "chunk_size": horizon,
        "n_action_steps": chunk,
        "max_state_dim": sizes.max_dim,
        "max_action_dim": sizes.max_dim,
        "normalization_mapping": {"VISUAL": "IDENTITY", "STATE": methods[0], "ACTION": methods[1]},
        "empty_cameras": 0,
        "vlm_config": {"text_config": text, "vision_config": vision},
    }
    if family == "smolvla":
        content["vlm_config"]["scale_factor"] = sizes.shuffle
        return content | {
            "resize_imgs_with_padding": [image_size, image_size],
            "num_vlm_layers": 0,
            "expert_width_multiplier": sizes.expert_width,
        }
    width = int(sizes.expert_width * sizes.width)
    expert = text | {"hidden_size": width, "intermediate_size": sizes.expert_mlp}
    return content | {"image_resolution": [image_size, image_size], "dit_config": expert}


def settings(
    sizes: FlowSizes,
    *,
    chunk: int,
    horizon: int,
    action_spec: ActionSpec,
    image_size: int,
    cameras: int,
    state: int,
    vocabulary: Sequence[str],
    statistics: Mapping[str, Any] | None,
    sampling: FlowSampling,
    value_head: ValueHeadConfig | None,
) -> Settings:
    """Return what a new policy is made from; see `FlowVLA.build`."""
    tokenizer = word_tokenizer(vocabulary)
    bounds = {"bounds": {"action": {"q01": list(action_spec.low), "q99": list(action_spec.high)}}}
    found = stats.from_suite(bounds if statistics is None else statistics, None, None)
    content = describe(
        sizes,
        words=tokenizer.get_vocab_size(),
        image_size=image_size,
        cameras=cameras,
        state=state,
        actions=action_spec.dim,
        horizon=horizon,
        chunk=chunk,
        methods=found.methods,
    )
    config = configs.read(Table(content, "policy.sizes"), sizes.family, openpi=False)
    return Settings(
        config=config,
        statistics=found,
        chunk=chunk,
        action_spec=action_spec,
        sampling=sampling,
        value_head=value_head,
        prompts=prompts_of(tokenizer, config),
    )


@torch.no_grad()
def initialize(policy: FlowModel, generator: torch.Generator) -> None:
    """Draw random weights for training from scratch, in module order, on the host.

    Matrices are normal with variance 1 / fan-in. What the model multiplies by the root of its width, words
    and in SmolVLA pictures, starts smaller by that much. The gates of π0.5's adaptive norms start near one.
    """
    model = policy.model.to_empty(device="cpu")
    for part in model.modules():
        if isinstance(part, RMSNorm):
            part.weight.fill_(1.0 - part.one)
        elif isinstance(part, nn.LayerNorm):
            part.weight.fill_(1.0)
            part.bias.zero_()
        elif isinstance(part, nn.Linear | nn.Conv2d | nn.Embedding):
            std = (
                part.weight.shape[1] ** -0.5
                if isinstance(part, nn.Embedding)
                else part.weight[0].numel() ** -0.5
            )
            part.weight.normal_(0.0, std, generator=generator)
            if getattr(part, "bias", None) is not None:
                part.bias.zero_()  # pyright: ignore
    for part in model.modules():
        if isinstance(part, AdaptiveNorm):
            part.dense.weight.mul_(0.1)
            part.dense.bias[-part.dense.in_features :] = 1.0
    assert isinstance(model.tower, Tower)
    place_evenly(model.tower.embeddings.position_embedding.weight)
    if policy.config.family == "smolvla":
        connector = model.get_submodule("vlm_with_expert.vlm.model.connector.modality_projection.proj")
        connector.weight.mul_(policy.config.text.width**-0.5)  # pyright: ignore
    for head in (policy.value_head, policy.noise_network):
        if head is not None:
            head.to_empty(device="cpu").initialize(generator)
