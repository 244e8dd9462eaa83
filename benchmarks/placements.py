"""One recipe under every placement: python benchmarks/placements.py [--recipe tabletop_ppo] [--start DIR]

Prints JSON: steps/s, where the time went, how much of the rollout environment workers and policy idled, and
success on held-out states before and after, for colocated, hybrid, disaggregated and asynchronous runs on
each executor. All start from one policy: `--start`, a checkpoint directory, or the recipe's own warm-up, done
once. On a machine with a GPU the same command measures it there; the report names the devices that were used.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import statistics
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from rove.config import load
from rove.config.schema import Run
from rove.errors import RoveError
from rove.evaluation.statistics import wilson
from rove.recipes import get
from rove.train import train

PLACEMENTS: dict[str, dict[str, Any]] = {
    "colocated": {"map": "colocated"},
    "hybrid": {"map": "hybrid"},
    "disaggregated": {"map": "disaggregated"},
    "asynchronous": {"map": "disaggregated", "ahead": 1},
}
SPLIT = ("simulation", "inference", "training", "sync", "wait", "env_idle", "policy_idle")


def lines(directory: Path) -> list[dict[str, float]]:
    """The metrics of every iteration of a run."""
    found = map(json.loads, (directory / "metrics.jsonl").read_text().splitlines())
    return [line for line in found if "sft_step" not in line]


def trained(run: Run, directory: Path) -> Path:
    """The directory of a run; what it says of itself goes to stderr, so that stdout is JSON alone."""
    with contextlib.redirect_stdout(sys.stderr):
        return train(run, directory)


def measure(run: Run, directory: Path) -> dict[str, Any]:
    """Train `run`, and say how it went; the first iteration, which warms caches up, is left out."""
    logged = lines(trained(run, directory))
    timed = logged[1:] or logged

    def median(name: str) -> float:
        return statistics.median(line.get(name, 0.0) for line in timed)

    # An iteration that also evaluates has that in its time: it is taken out again.
    seconds = statistics.median(line["time/iteration"] - line.get("time/evaluation", 0.0) for line in timed)
    return {
        "steps_per_second": round(median("rollout/env_steps") / seconds, 1),
        "iteration_s": round(seconds, 3),
        "split_s": {name: round(median(f"time/{name}"), 3) for name in SPLIT},
        "behind": max(line["train/behind"] for line in logged),
        "success_before": _success(directory / "eval" / "before.json"),
        "success": _success(directory / "eval" / "after.json"),
    }


def _success(path: Path) -> dict[str, Any] | None:
    """In distribution, with its 95 % Wilson interval; None where nothing was evaluated."""
    if not path.exists():
        return None
    report = json.loads(path.read_text())
    won = [bool(r["success"]) for r in report["records"] if r["spec"]["variant"] == "none"]
    low, high = wilson(sum(won), len(won))
    rate = sum(won) / len(won)
    return {"rate": round(rate, 3), "interval": [round(low, 3), round(high, 3)], "episodes": len(won)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", default="tabletop_ppo")
    parser.add_argument("--start", type=Path, help="checkpoint directory that every run starts from")
    parser.add_argument("--iterations", type=int, default=150, help="fewer hardly show learning")
    parser.add_argument("--executors", default="local,ray")
    parser.add_argument("--only", help="names of placements, separated by commas")
    args, settings = parser.parse_known_args()
    recipe = get(args.recipe).build()
    # Nothing is evaluated on the way, and only in distribution, unless the command line asks for it.
    recipe = replace(recipe, evaluation=replace(recipe.evaluation, every=0, variant_episodes=0))
    recipe = load.apply(recipe, settings)
    recipe = replace(recipe, training=replace(recipe.training, iterations=args.iterations, max_minutes=None))
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        start = args.start
        if start is None:
            training = replace(recipe.training, iterations=1, optim=replace(recipe.training.optim, warmup=0))
            once = replace(recipe, training=training, evaluation=replace(recipe.evaluation, episodes=0))
            start = trained(once, Path(scratch) / "start") / "sft"
        policy = replace(recipe.policy, checkpoint=str(start.resolve()))
        for executor in args.executors.split(","):
            if executor == "ray" and importlib.util.find_spec("ray") is None:
                results["ray"] = "not run: pip install 'rove[ray]'"
                continue
            for name in (args.only or ",".join(PLACEMENTS)).split(","):
                placement = replace(recipe.placement, executor=executor, **PLACEMENTS[name])
                run = replace(recipe, sft=None, policy=policy, placement=placement)
                try:
                    results[f"{name} {executor}"] = measure(run, Path(scratch) / f"{name}_{executor}")
                except RoveError as error:
                    results[f"{name} {executor}"] = f"does not fit here: {error}"
                # At once as well: the whole takes an hour.
                print(name, executor, json.dumps(results[f"{name} {executor}"]), file=sys.stderr)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    machine = {"cores": len(os.sched_getaffinity(0)), "load_after": os.getloadavg()[0], "gpu": gpu}
    if gpu is None:
        machine["note"] = "no GPU here: placements on a GPU were not run"
    print(json.dumps({"benchmark": "placements", "machine": machine, "results": results}, indent=2))


if __name__ == "__main__":
    main()
