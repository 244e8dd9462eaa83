"""Whether a long run grows: python benchmarks/soak.py RECIPE [--minutes 30] [--every 15] [--key value ...]

Trains a recipe for so many minutes in a new directory, with evaluations and checkpoints as it has them, and
counts what all its processes hold: memory, open descriptors, threads. Then it stops the run by SIGTERM.
Other settings go to `rove train`, as `--sft none --policy.checkpoint PATH` to begin with RL. Prints JSON with
the counts at a sixth, at half and at the end of the time, and with the largest of each before and after half;
`passed` says that no later half held more than the first by over a tenth.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from rove.reporting.log import FILE

SLACK = 1.1
"""How many times what the first half held the second one may hold."""
KINDS = ("memory_mib", "descriptors", "threads", "processes")


def held(process: psutil.Process) -> dict[str, int]:
    """What a process and all its children hold now; memory that they share counts once."""
    members = [process, *process.children(recursive=True)]
    totals = dict.fromkeys(KINDS, 0)
    for member in members:
        try:
            with member.oneshot():
                one = {
                    "memory_mib": member.memory_full_info().pss >> 20,
                    "descriptors": member.num_fds(),
                    "threads": member.num_threads(),
                    "processes": 1,
                }
        except psutil.NoSuchProcess:
            continue  # It ended between being listed and being looked at.
        totals = {kind: totals[kind] + one[kind] for kind in KINDS}
    return totals


def watch(run: subprocess.Popen[str], minutes: float, every: float) -> list[dict[str, Any]]:
    """Counts taken every `every` seconds, until the time is over or the run ends."""
    process, start, series = psutil.Process(run.pid), time.monotonic(), []
    while (passed := time.monotonic() - start) < 60 * minutes and run.poll() is None:
        series.append({"minute": round(passed / 60, 2), **held(process)})
        time.sleep(every)
    return series


def summary(series: list[dict[str, Any]], minutes: float) -> dict[str, Any]:
    """The counts at three moments, and the largest of each half."""
    moments = [
        min(series, key=lambda one: abs(one["minute"] - minutes * share)) for share in (1 / 6, 1 / 2, 1.0)
    ]
    halves = [one["minute"] < minutes / 2 for one in series]
    largest = {
        kind: [
            max(one[kind] for one, first in zip(series, halves, strict=True) if first is half)
            for half in (True, False)
        ]
        for kind in KINDS
    }
    grown = [kind for kind, (first, second) in largest.items() if second > SLACK * first]
    return {"at": moments, "largest_of_halves": largest, "grown": grown, "passed": not grown}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", nargs="?", default="tabletop_ppo")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--every", type=float, default=15, help="seconds between two counts")
    args, settings = parser.parse_known_args()
    with tempfile.TemporaryDirectory(prefix="rove-soak-") as root:
        command = [sys.executable, "-m", "rove.cli", "train", args.recipe, "--name", "soak"]
        command += [f"--training.max_minutes={2 * args.minutes}", "--training.iterations=100000", *settings]
        log = Path(root, "log")
        with log.open("w") as output:
            run = subprocess.Popen(command, cwd=root, stdout=output, stderr=output, text=True)
            try:
                series = watch(run, args.minutes, args.every)
                ended = run.poll()
                run.send_signal(signal.SIGTERM)
                status = run.wait(timeout=300)
            finally:
                run.kill()
        if ended is not None:
            sys.exit(f"The run ended by itself, with {ended}:\n{log.read_text()[-2000:]}")
        iterations = len(Path(root, "runs", "soak", FILE).read_text().splitlines())
        report = {
            "benchmark": "what a long run holds",
            "recipe": args.recipe,
            "settings": settings,
            "minutes": args.minutes,
            "iterations": iterations,
            "exit_status": status,
            **summary(series, args.minutes),
            "series": series,
        }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
