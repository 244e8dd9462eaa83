"""Success of a policy in process and through server, network and runner, on the same initial states:
python benchmarks/robot.py CHECKPOINT [--task TASK] [--image-size 64] [--speed 0.5] [--episodes 10]

Prints JSON: for `rove eval` in this process, for the runner with chunks that overlap and for one that holds
still while the policy thinks (`--ahead 0`), the successes by initial state, with Wilson's 95 % intervals and
the difference of each pair from the first (Newcombe's interval of paired proportions).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

# A file beside this one is called as the package is that it would be taken for.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]

from rove.api import evaluate  # noqa: E402
from rove.evaluation.statistics import Rate, paired_difference  # noqa: E402
from rove.robots import session  # noqa: E402
from rove.robots.demo import TASK, episode  # noqa: E402
from rove.robots.runner import Pace  # noqa: E402
from rove.types import EpisodeRecord  # noqa: E402

ROVE = (sys.executable, "-c", "import sys; from rove.cli import main; sys.exit(main())")
RATE = 20
"""Actions a second of the arm's time."""


@contextmanager
def process(*words: str) -> Iterator[str]:
    """A `rove` command in a process of its own, and the address that it prints."""
    started = subprocess.Popen(
        [*ROVE, *words], stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    try:
        assert started.stdout is not None
        said = next(line for line in started.stdout if "://" in line)
        yield next(word for word in said.replace(";", " ").split() if "://" in word).rstrip(".")
    finally:
        started.terminate()
        started.wait(30)


def result(records: Sequence[EpisodeRecord], first: Sequence[EpisodeRecord]) -> dict[str, object]:
    rate, difference = Rate.of(records), paired_difference(records, first)
    return {
        "successes": [int(record.success) for record in records],
        "rate": rate.rate,
        "interval": [round(bound, 3) for bound in rate.interval],
        "difference": [round(bound, 3) for bound in (difference.value, difference.low, difference.high)],
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--task", default=TASK)
    parser.add_argument("--image-size", default=64, type=int)
    parser.add_argument("--speed", default=0.5, type=float)
    parser.add_argument("--episodes", default=10, type=int, help="at most the 10 held-out initial states")
    parser.add_argument("--horizon", default=160, type=int)
    args = parser.parse_args()
    suite = f"libero:{args.task}"
    settings = {"env.wrist": "false", "env.image_size": args.image_size, "env.horizon": args.horizon}
    report = evaluate(args.checkpoint, suite, episodes=args.episodes, num_envs=5, settings=settings)
    here = sorted(report.records, key=lambda record: record.spec.initial_state)
    states = [record.spec.initial_state for record in here]
    found: dict[str, object] = {"initial_states": states, "in_process": result(here, here)}
    size = ("--image-size", str(args.image_size), "--one-camera", "--speed", str(args.speed))
    with (
        process(
            "serve", str(args.checkpoint), "--suite", suite, "--port", "0", "--images", "observation/image"
        ) as policy,
        process("simulate", args.task, "--port", "0", *size) as arm,
    ):
        for name, ahead in (("overlapping", None), ("holding", 0)):
            asked = session.Session(policy, arm, pace=Pace(RATE * args.speed, args.horizon, ahead))
            outcomes = [
                # Episode n of the arm begins in the n-th held-out state; one that limits stop has failed.
                episode(asked, state - states[0], lambda text: print(text, file=sys.stderr))
                for state in states
            ]
            found[name] = {
                **result(
                    [
                        replace(record, success=bool(one.success))
                        for record, one in zip(here, outcomes, strict=True)
                    ],
                    here,
                ),
                "actions": [one.actions for one in outcomes],
                "held": [one.held for one in outcomes],
                "dropped": [one.dropped for one in outcomes],
            }
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
