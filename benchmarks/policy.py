"""How fast a policy acts and learns: python benchmarks/policy.py [--size tiny|7b] [--device auto] [--batch 8]

Prints JSON: chunk inferences and training samples a second, each fast path on and off by turns, and the
floating-point rate achieved against that of one large matrix product. Weights are random. The 7B needs a GPU
of 40 GiB; where there is none, this measures a tiny one and says so. Flow policies (SmolVLA, and tiny π0.5)
follow: one prefix for all denoising steps, and one stochastic step for a training sample instead of all.

With --pretend h100 nothing is measured: launches, floating-point operations, bytes and memory of the 7B are
counted on a pretended card, and with its rates give the least time that each part can take.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import _flow
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from rove.config.schema import LoraConfig, OptimConfig, ValueHeadConfig
from rove.policies.base import SamplingNoise
from rove.policies.openvla import OpenVLA, bins, decoding
from rove.policies.openvla.config import Checkpoint
from rove.policies.openvla.settings import Settings
from rove.policies.openvla.tokenizer import PromptTokenizer, word_tokenizer
from rove.training.optim import make_optimizer
from rove.training.parallel import recompute
from rove.types import ActionSpec, Observation

BARS = {"inference": 0.60, "training": 0.45}
"""Share of the card's measured matrix rate: parallel decoding in a batch, and a LoRA training step."""
TINY = {
    "timm_kwargs": [
        {"embed_dim": 48, "depth": 4, "num_heads": 3},
        {"embed_dim": 32, "depth": 4, "num_heads": 2},
    ],
    "text_config": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
    },
}
"""The size of the golden checkpoints, with the published vocabulary and 224 x 224 pictures."""
INSTRUCTION = " ".join(f"word{i}" for i in range(28))
SPEC = ActionSpec(tuple("abcdefg"), ("1",) * 7, (-1.0,) * 7, (1.0,) * 7)


def make(
    size: str, decode: decoding.Decoding, device: torch.device, dtype: torch.dtype, **settings: Any
) -> OpenVLA:
    """A policy with random weights and a critic; the prompt is as long as a published one."""
    rove = {"prompt": "{instruction}", "prompt_end": 29871}
    checkpoint = Checkpoint({"model_type": "openvla", "rove": rove} | (TINY if size == "tiny" else {}), {})
    made = Settings(
        checkpoint=checkpoint,
        decoding=decode,
        chunk=8 if decode == "parallel" else 1,
        num_images=1,
        center_crop=False,
        action_spec=SPEC,
        statistics=bins.statistics_of_bounds(SPEC),
        value_head=ValueHeadConfig(source="first", hidden=(512, 128)),
        tokenizer=PromptTokenizer(word_tokenizer(INSTRUCTION.split()), checkpoint),
        **settings,
    )
    policy = OpenVLA(made)
    policy.vlm.to(dtype)
    for part in (policy.vlm, policy.value_head):
        assert part is not None
        part.to_empty(device=device)
        for module in part.modules():
            norm = "Norm" in type(module).__name__
            for parameter in module.parameters(recurse=False):
                nn.init.ones_(parameter) if norm else nn.init.normal_(parameter, std=0.02)
    return policy.to(device).eval()


def adapt(policy: OpenVLA) -> OpenVLA:
    """With LoRA beside every linear layer."""
    policy.adapt(LoraConfig(rank=32), torch.Generator().manual_seed(0))
    return policy


def observe(rows: int) -> Observation:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (rows, 1, 256, 256, 3), dtype=torch.uint8, generator=generator)
    return Observation(images, (INSTRUCTION,) * rows)


def noise(rows: int) -> SamplingNoise:
    return SamplingNoise(0, torch.arange(rows), torch.zeros(rows, dtype=torch.int64))


class Clock:
    """Medians over repeats, after warming up."""

    def __init__(self, device: torch.device, repeats: int) -> None:
        self.device, self.repeats = device, repeats

    def seconds(self, *runs: Callable[[], Any]) -> list[float]:
        """Of each, taken by turns, so that what else the machine does falls on all alike."""
        times: list[list[float]] = [[] for _ in runs]
        for repeat in range(self.repeats + 2):
            for run, taken in zip(runs, times, strict=True):
                self._wait()
                began = time.perf_counter()
                run()
                self._wait()
                if repeat > 1:
                    taken.append(time.perf_counter() - began)
        return [statistics.median(taken) for taken in times]

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def flops(run: Callable[[], Any]) -> int:
    """Of the matrix products and attention of one call."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def matrix_rate(clock: Clock, dtype: torch.dtype) -> float:
    """FLOP/s of a product of two square matrices that fill the device."""
    side = 8192 if clock.device.type == "cuda" else 1024
    a, b = (torch.randn(side, side, device=clock.device, dtype=dtype) for _ in range(2))
    return 2 * side**3 / clock.seconds(lambda: a @ b)[0]


# --- what the fast paths are measured against -----------------------------------------------------


@contextmanager
def whole_head(policy: OpenVLA) -> Iterator[None]:
    """Every row of the LM head, at every position."""
    vlm, hidden = policy.vlm, policy.vlm.hidden

    def everything(embeddings: torch.Tensor, *args: Any, outputs: int, **settings: Any) -> torch.Tensor:
        states = hidden(embeddings, *args, outputs=embeddings.shape[1], **settings)
        F.linear(states, vlm.lm_head.weight)
        return states[:, -outputs:]

    vlm.hidden = everything
    try:
        yield
    finally:
        del vlm.hidden


@contextmanager
def whole_towers(policy: OpenVLA) -> Iterator[None]:
    """The last block of each tower as well, and the final norm."""
    originals = [tower.forward for tower in policy.vlm.towers]

    def extended(tower: Any, run: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        layers = tower.encoder.layer if hasattr(tower.encoder, "layer") else tower.encoder.layers
        last = layers[-1]
        final = tower.layernorm if hasattr(tower, "layernorm") else tower.post_layernorm

        def forward(*args: Any) -> torch.Tensor:
            features = run(*args)
            final(last(features) if hasattr(tower, "layernorm") else last(features, None))
            return features

        return forward

    for tower, run in zip(policy.vlm.towers, originals, strict=True):
        tower.forward = extended(tower, run)  # pyright: ignore
    try:
        yield
    finally:
        for tower in policy.vlm.towers:
            del tower.forward


def without_cache(policy: OpenVLA, observation: Observation) -> None:
    """Greedy decoding that runs everything again for every token."""
    with torch.inference_mode():
        prefix = policy._prefix(policy._inputs(observation)[0])
        tokens = torch.zeros(len(observation), 0, dtype=torch.int64, device=policy.device)
        for _ in range(policy.chunk * SPEC.dim):
            padded = F.pad(tokens, (0, 1))
            hidden = decoding.teacher_forced(policy.vlm, prefix, padded)[:, -1:]
            column = policy.vlm.action_logits(hidden).argmax(-1)
            tokens = torch.cat((tokens, column + policy.vlm.vocab_size - bins.BINS), 1)


# --- measurements ---------------------------------------------------------------------------------


def inference(args: Any, clock: Clock, dtype: torch.dtype, compiled: bool) -> dict[str, Any]:
    """Chunks a second, and the fast paths of acting."""
    kinds: tuple[decoding.Decoding, ...] = ("parallel", "autoregressive")
    report, paths = {}, {}
    for kind in kinds:
        policy = make(args.size, kind, clock.device, dtype)
        measured = parallel_paths if kind == "parallel" else autoregressive_paths
        report[kind], found = measured(policy, args.batch, clock)
        if compiled:
            fast = acting(make(args.size, kind, clock.device, dtype, compiled=True), args.batch)
            found[f"policy.compile, {kind}"] = pair(args.batch, clock, fast, acting(policy, args.batch))
        paths |= found
        del policy
    return report | {"fast_paths": paths}


def parallel_paths(policy: OpenVLA, batch: int, clock: Clock) -> tuple[dict[str, Any], dict[str, Any]]:
    """Rates of parallel decoding, and what it is fast by."""
    act, seen = acting(policy, batch), observe(batch)
    value = torch.inference_mode()(policy.value)
    paths = {
        "action rows of the LM head only": pair(batch, clock, act, within(whole_head, policy, act)),
        "towers stop at the second-to-last block": pair(batch, clock, act, within(whole_towers, policy, act)),
        "one pass for policy and value": pair(batch, clock, act, lambda: (act(), value(seen))),
    }
    return rates(act, batch, clock), paths


def autoregressive_paths(policy: OpenVLA, batch: int, clock: Clock) -> tuple[dict[str, Any], dict[str, Any]]:
    """Rates of decoding token by token, and what it is fast by."""
    act, seen = acting(policy, batch), observe(batch)
    single = acting(policy, 1)
    paths = {
        "decoding in a batch": pair(batch, clock, act, lambda: [single() for _ in range(batch)]),
        "key-value cache": pair(batch, clock, act, lambda: without_cache(policy, seen)),
    }
    return rates(act, batch, clock), paths


def acting(policy: OpenVLA, batch: int) -> Callable[[], Any]:
    seen, some = observe(batch), noise(batch)
    return lambda: policy.act(seen, "sample", some)


def within(
    change: Callable[[OpenVLA], AbstractContextManager], policy: OpenVLA, act: Callable[[], Any]
) -> Callable[[], Any]:
    def run() -> None:
        with change(policy):
            act()

    return run


def rates(act: Callable[[], Any], batch: int, clock: Clock) -> dict[str, float]:
    return {"chunks_per_second": batch / clock.seconds(act)[0], "flop_per_chunk": flops(act) / batch}


def training(args: Any, clock: Clock, dtype: torch.dtype) -> dict[str, Any]:
    """Chunks a second through forward, backward and AdamW, with the memory that a step adds."""
    report: dict[str, Any] = {}
    kinds = ("lora", "all weights") if args.size == "tiny" else ("lora",)  # 7B with Adam needs 90 GiB
    for kind in kinds:
        steps, kept = [], []
        for frugal in (True, False):
            policy = make(args.size, "parallel", clock.device, dtype)
            policy = adapt(policy) if kind == "lora" else policy
            if frugal:
                recompute(policy)
            kept.append(round(kept_bytes(policy, args.batch) / args.batch / 2**20, 2))
            steps.append(training_step(policy, args.batch))
            if args.size != "tiny" and frugal:
                break  # two of them would not fit the card
        seconds = clock.seconds(*steps)
        samples = [round(args.batch / taken, 2) for taken in seconds]
        report[kind] = {
            "samples_per_second": args.batch / min(seconds),
            "flop_per_sample": flops(steps[-1]) / args.batch,
            "gradient checkpointing": {
                name: {"samples_per_second": rate, "kept_mib_per_sample": size}
                for name, rate, size in zip(("on", "off"), samples, kept, strict=False)
            },
        }
    return report


def training_step(policy: OpenVLA, batch: int) -> Callable[[], None]:
    seen = observe(batch)
    tokens = policy.act(seen, "sample", noise(batch)).sample
    optimizer = make_optimizer(policy, OptimConfig(lr=1e-5), policy.value_head)

    def step() -> None:
        output = policy.evaluate(seen, tokens)
        assert output.value is not None
        (output.value.square().mean() - output.logprob.mean()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def kept_bytes(policy: OpenVLA, batch: int) -> int:
    """What one forward pass keeps for its backward pass, weights apart."""
    seen = observe(batch)
    tokens = policy.act(seen, "greedy").sample
    if policy.device.type == "cuda":
        before = torch.cuda.memory_allocated()
        output = policy.evaluate(seen, tokens)
        kept = torch.cuda.memory_allocated() - before
        del output
        return kept
    weights = {p.untyped_storage().data_ptr() for p in policy.parameters()}
    kept_by: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept_by[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = policy.evaluate(seen, tokens)
    del output
    return sum(size for place, size in kept_by.items() if place not in weights)


def pair(batch: int, clock: Clock, on: Callable[[], Any], off: Callable[[], Any]) -> dict[str, float]:
    """Chunks a second on both sides."""
    fast, slow = clock.seconds(on, off)
    return {"on": round(batch / fast, 2), "off": round(batch / slow, 2), "speedup": round(slow / fast, 2)}


def machine(device: torch.device) -> dict[str, Any]:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "cpu": models[0] if models else platform.processor(),
        "threads": torch.get_num_threads(),
        "load_before": os.getloadavg()[0],
        "torch": torch.__version__,
    }


def judge(part: dict[str, Any], rate: str, work: str, matrices: float, bar: float, card: bool) -> None:
    """Add the share of the matrix rate, and on a card whether it reaches the bar."""
    part["flop_per_second"] = part[rate] * part[work]
    part["share_of_matrix_rate"] = round(part["flop_per_second"] / matrices, 3)
    part["bar"] = bar
    part["passed"] = part["share_of_matrix_rate"] >= bar if card else "not judged: no GPU with the 7B here"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=("tiny", "7b"), help="default: 7b on a GPU, tiny elsewhere")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--batch", type=int, default=8, help="chunks at a time")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0, help="of the CPU; 0: as torch chooses")
    parser.add_argument(
        "--compile", choices=("true", "false"), default="true", help="measure compiled rollouts"
    )
    parser.add_argument(
        "--pretend", choices=("h100",), help="count the 7B on this card, which need not be here"
    )
    args = parser.parse_args()
    if args.pretend:  # in a process of its own: the pretended device has to be there before torch
        root = Path(__file__).resolve().parents[1]
        command = [sys.executable, "-m", "tests.gpu_pretended.seven", args.pretend]
        raise SystemExit(subprocess.run(command, cwd=root).returncode)
    name = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if args.threads:
        torch.set_num_threads(args.threads)
    args.size = args.size or ("7b" if device.type == "cuda" else "tiny")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    before, clock = machine(device), Clock(device, args.repeats)
    matrices = matrix_rate(clock, dtype)
    report = {
        "benchmark": "policy inference and training",
        "size": args.size,
        "batch": args.batch,
        "dtype": str(dtype).removeprefix("torch."),
        "machine": before,
        "matrix_flop_per_second": matrices,
        "inference": inference(args, clock, dtype, args.compile == "true"),
        "training": training(args, clock, dtype),
        "flow": _flow.report(args.size, args.batch, clock, dtype, flops),
    }
    card = device.type == "cuda" and args.size == "7b"
    rate, work = "chunks_per_second", "flop_per_chunk"
    judge(report["inference"]["parallel"], rate, work, matrices, BARS["inference"], card)
    rate, work = "samples_per_second", "flop_per_sample"
    judge(report["training"]["lora"], rate, work, matrices, BARS["training"], card)
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
