"""Flow policies from scratch: config.json of tiny sizes, a tokenizer of the suite's words, random weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from rove.config.schema import FlowPolicyConfig, FlowSizes, PolicyConfig
from rove.errors import RoveError
from rove.policies.flow import config as configs
from rove.policies.flow import statistics as stats
from rove.policies.flow.config import FAMILIES, Family
from rove.policies.flow.core import FlowModel, Settings
from rove.policies.flow.layers import AdaptiveNorm, RMSNorm, Tower
from rove.policies.flow.loading import prompts_of
from rove.policies.flow.prompts import word_tokenizer
from rove.policies.pointers import place_evenly
from rove.policies.reading import Table
from rove.types import ActionSpec


def describe(
    sizes: FlowSizes,
    family: Family,
    *,
    words: int,
    image_size: int,
    cameras: int,
    state: int | None,
    actions: int,
    horizon: int,
    chunk: int,
    methods: tuple[stats.Method, stats.Method],
) -> dict[str, Any]:
    """Make config.json of a new policy, in LeRobot's layout; `words` is the size of its tokenizer."""
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
        | ({"observation.state": {"type": "STATE", "shape": [state]}} if state else {}),
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
    policy: PolicyConfig,
    *,
    chunk: int,
    action_spec: ActionSpec,
    image_size: int,
    vocabulary: Sequence[str],
    statistics: Mapping[str, Any] | None,
) -> Settings:
    """Return what a new policy is made from; see `FlowVLA.build`. Raises RoveError where sizes do not fit."""
    flow = policy.flow or FlowPolicyConfig()
    family = configs.family_named(policy.kind)
    if family is None:
        raise RoveError(f"policy.kind = {policy.kind!r}: a new flow policy is one of {', '.join(FAMILIES)}.")
    tokenizer = word_tokenizer(vocabulary)
    bounds = {"bounds": {"action": {"q01": list(action_spec.low), "q99": list(action_spec.high)}}}
    found = stats.from_suite(bounds if statistics is None else statistics, None, None)
    state = max((len(numbers) for numbers in found.state.values()), default=None)
    content = describe(
        flow.sizes,
        family,
        words=tokenizer.get_vocab_size(),
        image_size=image_size,
        cameras=flow.cameras or 1,
        state=state,
        actions=action_spec.dim,
        horizon=flow.horizon or chunk,
        chunk=chunk,
        methods=found.methods,
    )
    config = configs.read(Table(content, "policy.flow.sizes"), family, openpi=False)
    config = replace(
        config,
        resizer=flow.resizer or config.resizer,
        prompt=flow.prompt or config.prompt,
        delta=flow.delta or 0,
    )
    made = Settings(
        config=config,
        statistics=found,
        chunk=chunk,
        action_spec=action_spec,
        sampling=flow.sampling,
        freeze=flow.freeze or "none",
        value_head=policy.value_head,
        pointers=policy.pointers,
        pointed=policy.pointed,
        prompts=prompts_of(tokenizer, config),
    )
    if statistics is not None and state is None and made.reads_state:
        raise RoveError(
            f"A {family} reads the robot's state, which the suite or its demonstrations lack: use pi05 with "
            "--policy.flow.prompt openpi, or another suite."
        )
    return made


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
    state = getattr(model, "state_proj", None)
    if state is not None:  # norms take away its length: without a constant a state would lose its size
        state.bias.normal_(generator=generator)
    for head in (policy.value_head, policy.noise_network, policy.pointer):
        if head is not None:
            head.to_empty(device="cpu").initialize(generator)
