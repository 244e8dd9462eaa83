"""The published 7B on the pretended device: what acting and an optimizer step cost, and the memory that they
take.

`benchmarks/policy.py --pretend h100`, or `python -m tests.gpu_pretended.seven h100`, prints these counts as
JSON; tests hold some of them.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from typing import Any

from tests.gpu_pretended import pretend

import torch  # isort: skip

from rove import algorithms, recipes
from rove.config.schema import GRPO, PPO, Run
from rove.policies.base import SamplingNoise
from rove.policies.openvla import OpenVLA
from rove.policies.openvla.memory import estimate, skeleton
from rove.policies.openvla.tokenizer import PromptTokenizer, word_tokenizer
from rove.rollout.collect import act
from rove.training.learner import Learner
from rove.types import Observation, TrainBatch

DEVICE = torch.device("cuda:0")
PROMPT = "In: What action should the robot take to put the red cube on the blue plate?\nOut:"
TOKENS = 29
"""Tokens of a published prompt, BOS and what ends it included."""


def make(run: Run, *, lora: bool = True, critic: bool = True) -> OpenVLA:
    """The policy of a 7B recipe on the device, with a prompt of usual length."""
    policy = run.policy
    policy = replace(
        policy, lora=policy.lora if lora else None, value_head=policy.value_head if critic else None
    )
    made = skeleton(replace(run, policy=policy), kind=OpenVLA)
    words = [f"word{i}" for i in range(TOKENS - 2)]
    made.checkpoint = made.checkpoint.with_settings({"prompt": "{instruction}", "prompt_end": 29871})
    made.tokenizer = PromptTokenizer(word_tokenizer(words), made.checkpoint)
    trained = {name for name, p in made.named_parameters() if p.requires_grad}
    made = made.to_empty(device=DEVICE)
    for name, parameter in made.named_parameters():
        parameter.requires_grad_(name in trained)
    return made.eval()


def observe(rows: int, *, mixed: bool = False) -> Observation:
    """Pictures of one camera; `mixed`, prompts of two lengths."""
    text = " ".join(f"word{i}" for i in range(TOKENS - 2))
    short = " ".join(text.split()[:20])
    images = torch.zeros(rows, 1, 224, 224, 3, dtype=torch.uint8)
    return Observation(images, tuple(short if mixed and i % 2 else text for i in range(rows)))


def acting(policy: OpenVLA, rows: int, *, mixed: bool = False) -> None:
    """One act as a rollout has it: from the host to the host."""
    noise = SamplingNoise(0, torch.arange(rows), torch.zeros(rows, dtype=torch.int64))
    act(policy, policy.action_spec, observe(rows, mixed=mixed), noise)


def learner(policy: OpenVLA, run: Run, *, checkpointing: bool) -> Learner:
    """A learner of this recipe that takes one micro-batch an optimizer step."""
    rows = run.training.micro_batch
    training = replace(run.training, batch=rows, gradient_checkpointing=checkpointing, iterations=1)
    for module in policy.modules():
        if hasattr(module, "recompute"):
            module.recompute = False
    return Learner(policy, algorithms.get(run.algorithm.kind), replace(run, training=training), DEVICE)


def batch(policy: OpenVLA, run: Run) -> TrainBatch:
    """A micro-batch of rows, as a rollout hands it over."""
    rows, c, a = run.training.micro_batch, policy.chunk, policy.action_spec.dim
    grouped = isinstance(run.algorithm, GRPO) and run.algorithm.length_normalization
    value = torch.zeros(rows, c) if isinstance(run.algorithm, PPO) else None
    return TrainBatch(
        observation=observe(rows),
        sample=torch.full((rows, c, a), policy.vlm.vocab_size - 5),
        logprob=torch.zeros(rows, c, a),
        advantage=torch.zeros(rows, c),
        mask=torch.ones(rows, c, dtype=torch.bool),
        returns=value,
        value=value,
        episode_length=torch.full((rows, 1), c) if grouped else None,
        horizon=c if grouped else None,
        denominator=float(rows * c * a) if grouped else None,
        version=0,
    )


def peak(run: Run, cuda: pretend.Cuda) -> float:
    """Bytes that a run of this recipe takes at its peak: a rollout of all environments, and optimizer
    steps."""
    policy = make(run)
    cuda.reset()
    acting(policy, run.rollout.num_envs)
    trained = learner(policy, run, checkpointing=run.training.gradient_checkpointing)
    for _ in range(2):  # the optimizer's state is made in the first
        trained.update(batch(policy, run), 0)
    return float(cuda.peak[0])


def counts(cuda: pretend.Cuda, rows: int) -> dict[str, Any]:
    """What has been counted since the last reset, for a report; `rows` are chunks."""
    total, card = cuda.total, cuda.card
    matrices = total.flops / card.matrices
    return {
        "rows": rows,
        "launches": total.launches,
        "tflop": round(total.flops / 1e12, 3),
        "gib_moved": round(total.bytes / 2**30, 1),
        "peak_gib": round(cuda.peak[0] / 2**30, 2),
        "matrices_ms": round(1e3 * matrices, 2),
        "floor_ms": round(1e3 * total.seconds, 2),
        "launching_ms": round(1e3 * cuda.launching, 1),
        "share_of_matrix_rate_at_best": round(cuda.share, 3),
        "share_that_is_not_matrices": round(1 - cuda.share, 3),
        "host_waits": sum(cuda.waits.values()),
        "attention": sorted(cuda.kernels()),
        "bytes_to_device": cuda.moved["to device"],
        "bytes_to_host": cuda.moved["to host"],
    }


def memory(run: Run, cuda: pretend.Cuda) -> dict[str, float]:
    """What `rove show` says of the memory of a recipe, and the peak that is counted, in GiB."""
    estimated, counted = estimate(run).total, peak(run, cuda)
    return {
        "estimated_gib": round(estimated / 2**30, 2),
        "counted_gib": round(counted / 2**30, 2),
        "ratio": round(estimated / counted, 3),
    }


def recipes_of_7b() -> dict[str, Run]:
    """Every recipe that starts from a published 7B checkpoint."""
    runs = {recipe.name: recipe.build() for recipe in recipes.all()}
    return {name: run for name, run in runs.items() if run.policy.kind == "openvla" and run.policy.checkpoint}


def roofline(cuda: pretend.Cuda) -> dict[str, Any]:
    """Acting and optimizer steps of OpenVLA-OFT 7B and OpenVLA 7B, counted."""
    report: dict[str, Any] = {}
    for name in ("openvla_oft_ppo", "openvla_ppo"):
        run = recipes.get(name).build()
        part: dict[str, Any] = {}
        for lora in (False, True):
            policy = make(run, lora=lora)
            for rows in (1, 8, 64):
                cuda.reset()
                acting(policy, rows)
                part[f"act, batch {rows}{', adapters' if lora else ''}"] = counts(cuda, rows)
            cuda.reset()
            acting(policy, 8, mixed=True)
            part[f"act, batch 8, prompts of two lengths{', adapters' if lora else ''}"] = counts(cuda, 8)
            if lora:
                for checkpointing in (True, False):
                    trained, rows = learner(policy, run, checkpointing=checkpointing), batch(policy, run)
                    trained.update(rows, 0)
                    cuda.reset()
                    trained.update(rows, 0)
                    kept = "activations computed again" if checkpointing else "activations kept"
                    part[f"LoRA step, micro-batch {len(rows)}, {kept}"] = counts(cuda, len(rows))
                    del trained
            del policy
        report[name] = part
    return report


def main(card: str) -> None:
    report: dict[str, Any] = {
        "benchmark": "OpenVLA 7B, counted on a pretended GPU: nothing here was measured",
        "card": card,
        "rates": asdict(pretend.CARDS[card]),
        "bars": {"act": 0.60, "LoRA step": 0.45},
    }
    with pretend.Cuda(card=pretend.CARDS[card]) as cuda:
        report |= roofline(cuda)
    memories: dict[Any, dict[str, float]] = {}
    report["memory"] = {}
    for name, run in recipes_of_7b().items():
        policy = run.policy
        key = (
            policy.decoding,
            policy.value_head,
            run.rollout.num_envs,
            run.rollout.chunk,
            run.algorithm.kind,
        )
        if key not in memories:
            with pretend.Cuda(card=pretend.CARDS[card]) as cuda:
                memories[key] = memory(run, cuda)
        report["memory"][name] = memories[key]
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
