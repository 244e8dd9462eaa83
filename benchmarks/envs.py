"""How fast the tabletop suite steps: python benchmarks/envs.py [--num-envs 64] [--chunk 8] [--repeats 5]

Prints JSON. A step is one executed action in one environment; one frame is drawn per environment and chunk.
Two workloads: "random" (uniform actions, episodes run to the horizon) and "expert" (the scripted expert,
whose episodes are short and full of contact, so that resets and collisions weigh more).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections import Counter
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import mujoco
import mujoco_warp
import numpy as np
import torch

from rove.config.schema import TabletopConfig
from rove.envs.tabletop.env import TabletopEnv
from rove.types import EpisodeSpec

LABELS = ("physics", "render")
BAR = 2000
"""Steps a second that the suite must reach on 2 cores with 64 environments and chunks of 8."""


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load_before": os.getloadavg()[0],
        "python": platform.python_version(),
        "mujoco": mujoco.__version__,
        "mujoco_warp": mujoco_warp.__version__,
    }


def timed(owner: Any, name: str, label: str, seconds: Counter[str]) -> None:
    """Add the wall time of a method to `seconds[label]` whenever it is called."""
    call = getattr(owner, name)

    def wrapper(*args: Any) -> Any:
        start = time.perf_counter()
        try:
            return call(*args)
        finally:
            seconds[label] += time.perf_counter() - start

    setattr(owner, name, wrapper)


def measure(env: TabletopEnv, act: Callable[[], Any], chunks: int, repeats: int) -> dict[str, Any]:
    """Medians over repeats of `chunks` chunks each, in a refill environment that never runs dry."""
    tasks = env.suite.tasks
    episodes = (EpisodeSpec(tasks[i % len(tasks)], (i // len(tasks)) % 4096) for i in count())
    env.reset([next(episodes) for _ in range(env.num_envs)])
    seconds: Counter[str] = Counter()
    timed(env._worlds, "act", "physics", seconds)
    timed(env, "_draw", "render", seconds)
    rates, shares = [], []
    for repeat in range(repeats + 1):
        seconds.clear()
        start, steps = time.perf_counter(), 0
        for _ in range(chunks):
            env.enqueue([next(episodes) for _ in range(env.num_envs - env.queued)])
            steps += int(act().executed.sum())
        wall = time.perf_counter() - start
        if repeat > 0:  # the first one warms caches up
            rates.append(steps / wall)
            shares.append({label: seconds[label] / wall for label in LABELS})
    split = {label: statistics.median(share[label] for share in shares) for label in LABELS}
    return {
        "steps_per_second": round(statistics.median(rates), 1),
        "repeats": [round(rate, 1) for rate in rates],
        "split": {**{k: round(v, 3) for k, v in split.items()}, "other": round(1 - sum(split.values()), 3)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--num-envs", type=int, default=64)
    parser.add_argument("--chunk", type=int, default=8)
    parser.add_argument("--chunks", type=int, default=12, help="chunks a repeat")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    before = machine()
    config = TabletopConfig()
    generator = np.random.default_rng(0)
    workloads = {}
    for name in ("random", "expert"):
        env = TabletopEnv(config, args.num_envs, args.chunk, "refill")
        low, high = np.array(env.action_spec.low), np.array(env.action_spec.high)

        def random(env: TabletopEnv = env, low: np.ndarray = low, high: np.ndarray = high) -> Any:
            shape = (args.num_envs, args.chunk, env.action_spec.dim)
            return env.step_chunk(torch.from_numpy(generator.uniform(low, high, shape)))

        def expert(env: TabletopEnv = env) -> Any:
            return env.step_expert_chunk(0.3, generator)[1]

        workloads[name] = measure(env, random if name == "random" else expert, args.chunks, args.repeats)
        env.close()
    report = {
        "benchmark": "tabletop environment steps",
        "num_envs": args.num_envs,
        "chunk": args.chunk,
        "image_size": config.image_size,
        "machine": before,
        "workloads": workloads,
        "bar": BAR,
        "passed": workloads["random"]["steps_per_second"] >= BAR,
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
