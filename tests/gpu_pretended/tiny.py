"""Small policies of every kind on the pretended device, and what they are given."""

from __future__ import annotations

from typing import Any

import torch

from rove.config.schema import LlamaConfig, LoraConfig, PolicyConfig, TowerConfig, ValueHeadConfig
from rove.policies import registry
from rove.policies.base import SamplingNoise
from rove.policies.openvla import OpenVLA
from rove.types import ActionSpec, Demonstrations, Observation, TrainBatch

DEVICE = torch.device("cuda:0")
SPEC = ActionSpec(("x", "y", "gripper"), ("m", "m", "1"), (-1.0,) * 3, (1.0,) * 3)
C, STATE = 4, 4
KINDS: dict[str, dict[str, Any]] = {
    "causal": {"decoding": "parallel"},
    "bidirectional": {"decoding": "parallel", "attention": "bidirectional"},
    "everything": {
        "decoding": "parallel", "placeholders": "learned", "film": True, "proprio": True, "pointers": 2,
    },
    "autoregressive": {"decoding": "autoregressive"},
    "l1": {"decoding": "parallel", "attention": "bidirectional", "head": "l1", "proprio": True},
}  # fmt: skip


def make(kind: str, lora: bool = False, critic: str | None = "action") -> OpenVLA:
    """A policy of this kind on the device; `lora`, adapters beside bfloat16 weights."""
    settings = KINDS[kind]
    regresses = settings.get("head") == "l1"
    config = PolicyConfig(
        towers=(
            TowerConfig(kind="dinov2", width=16, depth=2, heads=2, patch=8, mlp=32),
            TowerConfig(kind="siglip", width=16, depth=2, heads=2, patch=8, mlp=32),
        ),
        llama=LlamaConfig(width=16, depth=2, heads=2, mlp=32),
        value_head=None if regresses or critic is None else ValueHeadConfig(level=critic, hidden=(16,)),  # type: ignore[arg-type] **settings,
    )
    statistics = None
    if settings.get("proprio"):
        action = {"q01": [-1.0] * 3, "q99": [1.0] * 3, "mask": [True] * 3}
        proprio = {"q01": [0.0] * STATE, "q99": [1.0] * STATE}
        statistics = {"x": {"action": action, "proprio": proprio}}
    policy = registry.build(
        config,
        chunk=C,
        action_spec=SPEC,
        image_size=16,
        vocabulary=("go", "left"),
        statistics=statistics,
        seed=0,
    )
    assert isinstance(policy, OpenVLA)
    if lora:
        policy.vlm.to(torch.bfloat16)
        policy.adapt(LoraConfig(rank=4), torch.Generator().manual_seed(0))
    return policy.to(DEVICE).eval()


def observe(rows: int) -> Observation:
    """Pictures, prompts of different lengths and states, on the host."""
    images = torch.randint(0, 255, (rows, 1, 24, 24, 3), dtype=torch.uint8)
    return Observation(images, tuple(("go left", "go")[i % 2] for i in range(rows)), torch.rand(rows, STATE))


def noise(rows: int) -> SamplingNoise:
    return SamplingNoise(0, torch.arange(rows), torch.zeros(rows, dtype=torch.long))


def demonstrations(rows: int) -> Demonstrations:
    seen = observe(rows)
    return Demonstrations(
        images=seen.images,
        frame=torch.arange(rows),
        instruction=seen.instruction,
        actions=torch.rand(rows, C, 3) * 2 - 1,
        mask=torch.ones(rows, C, dtype=torch.bool),
        points=torch.rand(rows, 2, 2) * 20,
        state=seen.state,
    )


def batch(
    rows: int, *, level: str = "action", critic: bool = True, normalized: bool = False, branches: int = 0
) -> TrainBatch:
    """As a rollout hands it over: everything on the host."""
    shape = (rows, branches, C) if branches else (rows, C)
    mask = torch.ones(shape, dtype=torch.bool)
    mask[0, ..., 1:] = False
    if level == "chunk":
        mask = mask.any(-1, keepdim=True)
    value = torch.randn(rows, 1 if level == "chunk" else C) if critic else None
    return TrainBatch(
        observation=observe(rows),
        sample=torch.full((*shape, 3), 100),
        logprob=torch.zeros(*shape, 3),
        advantage=torch.randn(mask.shape),
        mask=mask,
        returns=value,
        value=value,
        episode_length=torch.full((rows, 1), 3) if normalized else None,
        horizon=8 if normalized else None,
        denominator=float(mask.sum()) if normalized else None,
        version=0,
    )
