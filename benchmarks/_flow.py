"""Flow policies of `policy.py`: one prefix for all steps and samples, one stochastic step or all."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from rove.config.schema import (
    FlowPolicyConfig,
    FlowSampling,
    OptimConfig,
    PolicyConfig,
    ValueHeadConfig,
)
from rove.policies.base import SamplingNoise
from rove.policies.flow import FlowVLA, chain
from rove.policies.flow import config as configs
from rove.policies.flow.core import Settings
from rove.policies.flow.prompts import Prompts, word_tokenizer
from rove.policies.flow.statistics import Statistics
from rove.policies.reading import Table
from rove.recipes.flow import TINY
from rove.training.optim import make_optimizer
from rove.types import ActionSpec, Observation

if TYPE_CHECKING:
    from policy import Clock

STEPS, CHUNK, SAMPLES = 4, 8, 8
CRITIC = ValueHeadConfig(level="chunk")
SPEC = ActionSpec(tuple("abcdefg"), ("1",) * 7, (-1.0,) * 7, (1.0,) * 7)
INSTRUCTION = "put the red cube on the blue plate"


def report(
    size: str, batch: int, clock: Clock, dtype: torch.dtype, flops: Callable[[Callable[[], Any]], int]
) -> dict[str, Any]:
    """Rates of a tiny SmolVLA and π0.5, or of SmolVLA in the published size, "7b" standing for published."""
    families: tuple[configs.Family, ...] = ("smolvla", "pi05") if size == "tiny" else ("smolvla",)
    return {family: _of_family(family, size, batch, clock, dtype, flops) for family in families}


def _of_family(
    family: configs.Family,
    size: str,
    batch: int,
    clock: Clock,
    dtype: torch.dtype,
    flops: Callable[[Callable[[], Any]], int],
) -> dict[str, Any]:
    one, every = (
        make(family, size, clock.device, dtype, FlowSampling(steps=STEPS, stochastic=how))
        for how in ("one", "all")
    )
    seen, some = observe(one, batch), noise(batch)

    def act() -> None:
        one.act(seen, "sample", some)

    def act_many() -> None:
        one.act(seen, "sample", some, samples=SAMPLES)

    def act_apart() -> None:
        for _ in range(SAMPLES):
            one.act(seen, "sample", some)

    steps = [training_step(policy, batch) for policy in (one, every)]
    again = partial(without_reuse, one, seen, some)
    acting, apart, many, singly = clock.seconds(act, again, act_many, act_apart)
    trained, trained_all = clock.seconds(*steps)
    return {
        "weights": sum(p.numel() for p in one.parameters()),
        "denoising steps": STEPS,
        "chunks_per_second": round(batch / acting, 2),
        "flop_per_chunk": flops(act) / batch,
        "flop_per_second": flops(act) / acting,
        "one prefix for all denoising steps": _pair(batch, acting, apart),
        f"one prefix for {SAMPLES} samples": _pair(batch * SAMPLES, many, singly),
        "training, VLM frozen": {
            "samples_per_second": round(batch / trained, 2),
            "flop_per_second": flops(steps[0]) / trained,
            "one stochastic step, not all": _pair(batch, trained, trained_all),
        },
    }


def make(
    family: configs.Family, size: str, device: torch.device, dtype: torch.dtype, sampling: FlowSampling
) -> FlowVLA:
    """A policy with random weights and a critic, whose VLM is frozen."""
    if size == "tiny":
        # The state is not in the prompt: prompts of both families are as long.
        flow = FlowPolicyConfig(sampling=sampling, freeze="vlm", sizes=TINY, prompt="openpi")
        return FlowVLA.build(
            PolicyConfig(kind=family, flow=flow, value_head=CRITIC),
            chunk=CHUNK,
            action_spec=SPEC,
            image_size=64,
            vocabulary=INSTRUCTION.split(),
            statistics=None,
            seed=0,
            device=device,
        ).eval()
    config = configs.read(Table({"type": family}, family), family, openpi=False)
    tokenizer = word_tokenizer(INSTRUCTION.split())
    prompts = Prompts(tokenizer, style="newline", length=config.prompt_length, bos=None, pad=2)
    policy = FlowVLA(
        Settings(
            config=config,
            statistics=Statistics({}, {}, ("IDENTITY", "IDENTITY")),
            chunk=CHUNK,
            action_spec=SPEC,
            sampling=sampling,
            freeze="vlm",
            value_head=CRITIC,
            prompts=prompts,
        )
    )
    policy.model.towers.to(dtype)
    policy.to_empty(device=device)
    for parameter in policy.parameters():
        nn.init.normal_(parameter, std=0.02)
    for name, values in (("low", SPEC.low), ("high", SPEC.high)):
        policy.get_buffer(name).copy_(torch.tensor(values))
    return policy.eval()


def observe(policy: FlowVLA, rows: int) -> Observation:
    """Two pictures, or for a tiny policy one; a state of eight numbers."""
    side, views = (64, 1) if policy.config.vision.image == 64 else (256, 2)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (rows, views, side, side, 3), dtype=torch.uint8, generator=generator)
    return Observation(images, (INSTRUCTION,) * rows, torch.zeros(rows, 8))


def noise(rows: int) -> SamplingNoise:
    return SamplingNoise(0, torch.arange(rows), torch.zeros(rows, dtype=torch.int64))


def without_reuse(policy: FlowVLA, seen: Observation, some: SamplingNoise) -> None:
    """What `act` does, seeing pictures and prompt again for every denoising step."""
    with torch.inference_mode():
        drawn = policy.noise(some)
        chain.draw_one(
            lambda x, k: policy.step(policy.observe(seen), x, k), drawn.start, drawn.k, drawn.steps, STEPS
        )


def training_step(policy: FlowVLA, batch: int) -> Callable[[], None]:
    """One step of RL on a batch: the expert, its projections and the critic are trained."""
    seen = observe(policy, batch)
    sample = policy.act(seen, "sample", noise(batch)).sample
    optimizer = make_optimizer(policy, OptimConfig(lr=1e-6), policy.value_head)

    def step() -> None:
        output = policy.evaluate(seen, sample)
        assert output.value is not None
        (output.value.square().mean() - output.logprob.mean()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _pair(rows: int, on: float, off: float) -> dict[str, float]:
    return {"on": round(rows / on, 2), "off": round(rows / off, 2), "speedup": round(off / on, 2)}
