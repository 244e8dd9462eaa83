"""How often LIBERO's scripted experts succeed: python benchmarks/libero_experts.py [TASKS] [--episodes 20]

Plays each task of TASKS (a suite, or suites and task ids separated by commas; all 130 unless given) on states
of the train split, those that are refused elsewhere for want of an expert included, and prints JSON: task ->
episodes, successes and the median number of a success's actions. With `--out FILE` the tasks that were played
replace their own numbers in a file of that form, one task at a time. `--table FILE` plays nothing and prints
such a file as the tables of docs/libero_experts.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from contextlib import closing
from pathlib import Path
from typing import Literal, get_args

# This file's folder comes first, and another script in it is called as a package that is needed.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]

import numpy as np  # noqa: E402

from rove.config.schema import LiberoConfig  # noqa: E402
from rove.envs.libero import expert, package  # noqa: E402
from rove.envs.libero.env import LiberoEnv  # noqa: E402
from rove.envs.libero.suite import chosen, horizon  # noqa: E402
from rove.evaluation.statistics import wilson  # noqa: E402
from rove.types import EpisodeSpec  # noqa: E402

ROWS = 8
"""Worlds side by side."""
Protocol = Literal["split", "published", "generated", "generated_wide"]
Rates = dict[str, dict[str, float | None]]


def play(task: str, episodes: int, noise: float, protocol: Protocol) -> dict[str, float | None]:
    """Play one task: episodes, successes, and the median number of a success's actions."""
    config = LiberoConfig(
        tasks=task, renderer="none", protocol=protocol, horizon=horizon(task), threads=1, wrist=False
    )
    with closing(LiberoEnv(config, num_envs=min(ROWS, episodes), chunk=8, autoreset="refill")) as env:
        states = env.suite.initial_states(task, "train")
        specs = [EpisodeSpec(task, states[i % len(states)]) for i in range(episodes)]
        generator, records = np.random.default_rng(0), []
        env.reset(specs[: env.num_envs])
        env.enqueue(specs[env.num_envs :])
        while any(env.specs):
            records += env.step_expert_chunk(noise, generator)[1].finished
    lengths = [record.length for record in records if record.success]
    median = statistics.median(lengths) if lengths else None
    return {"episodes": len(records), "successes": len(lengths), "actions": median}


def table(rates: Rates) -> str:
    """Write both tables of the documentation: by suite, and by task."""
    lines = ["| suite | tasks | success of the expert | tasks at 90 % or more |", "|---|---|---|---|"]
    for folder in package.SUITES["130"]:
        own = [rate for task, rate in rates.items() if task.startswith(f"{folder}/")]
        if own:
            n, k = (int(sum(rate[key] or 0 for rate in own)) for key in ("episodes", "successes"))
            low, high = wilson(k, n)
            able = sum((rate["successes"] or 0) >= 0.9 * (rate["episodes"] or 0) for rate in own)
            share = f"{k} of {n}, {100 * k / n:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"
            lines.append(f"| {folder} | {len(own)} | {share} | {able} |")
    lines += ["", "| task | success | actions (median) |", "|---|---|---|"]
    for task in (task for folder in package.SUITES["130"] for task in package.tasks(folder)):
        if rate := rates.get(task):
            actions = "" if rate["actions"] is None else f"{rate['actions']:.0f}"
            name = task.replace("_", " ")
            lines.append(f"| {name} | {rate['successes']}/{rate['episodes']} | {actions} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("tasks", nargs="?", default="130")
    parser.add_argument("--episodes", type=int, default=20)
    parser.add_argument("--noise", type=float, default=0.0)
    parser.add_argument("--protocol", choices=get_args(Protocol), default="split")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--table", type=Path)
    args = parser.parse_args()
    if args.table:
        print(table(json.loads(args.table.read_text())))
        return
    expert.UNREACHED = frozenset()  # what is refused elsewhere is counted here
    rates: Rates = {}
    for task in chosen(args.tasks):
        rates[task] = play(task, args.episodes, args.noise, args.protocol)
        print(task, rates[task], file=sys.stderr, flush=True)
        if args.out:
            known = json.loads(args.out.read_text()) if args.out.exists() else {}
            args.out.write_text(json.dumps(known | {task: rates[task]}, indent=1, sort_keys=True) + "\n")
    print(json.dumps(rates, indent=1))


if __name__ == "__main__":
    main()
