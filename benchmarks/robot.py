"""Success of a policy in process and through server, network and runner, on the same initial states:
python benchmarks/robot.py CHECKPOINT [--task TASK] [--image-size 64] [--speed 0.5] [--episodes 10]

Prints JSON: for `rove eval` in this process, for the simulated arm without sockets and real time, for the
runner, and for one that asks when half of a chunk is left (`--ahead 4`), the successes by initial state, with
Wilson's 95 % intervals and the difference of each pair from the first (Newcombe's interval of paired
proportions). Where the second is as good as the first and the others are not, it is time that is lost on the
way, not meaning.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

# A file beside this one is called as the package is that it would be taken for.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]

import numpy as np  # noqa: E402
import torch  # noqa: E402

from rove.api import evaluate  # noqa: E402
from rove.evaluation.statistics import Rate, paired_difference  # noqa: E402
from rove.policies import registry as policies  # noqa: E402
from rove.robots import session  # noqa: E402
from rove.robots.demo import TASK, episode  # noqa: E402
from rove.robots.franka import Franka, limits  # noqa: E402
from rove.robots.runner import Pace  # noqa: E402
from rove.robots.simulated import BOX, TICK, SimulatedArm  # noqa: E402
from rove.types import EpisodeRecord, Observation  # noqa: E402

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


class Direct(Franka):
    """The simulated arm in this process, whose time passes when it is told to."""

    speed = 0.0

    def __init__(self, arm: SimulatedArm) -> None:
        super().__init__("http://127.0.0.1:1", {}, limits(*BOX), rate=RATE, origin=arm.task()["origin"])
        self.arm = arm

    def _state(self) -> Mapping[str, Any]:
        return self.arm.state()

    def _ask(self, path: str, body: Any = None, timeout: float = 2.0) -> None:
        if path == "/pose":
            self.arm.go(np.array(body["arr"]))
        else:
            self.arm.grip(1.0 - body["gripper_pos"] / 255)


def without_time(args: argparse.Namespace, numbers: Sequence[int]) -> Iterator[bool]:
    """Play the episodes of the arm by its own calls, one action after the other, and tell which succeeded."""
    policy = policies.load(args.checkpoint)
    arm = SimulatedArm(args.task, image_size=args.image_size, wrist=False)
    for number in numbers:
        arm.reset(number)
        robot = Direct(arm)
        previous, actions, begun = None, [], 0
        while begun < args.horizon and not arm.state()["success"]:
            seen = robot.observe()
            if not actions:
                image = torch.from_numpy(np.ascontiguousarray(arm.picture(arm.cameras[0])[0]))
                state = torch.from_numpy(seen.state)[None]
                observation = Observation(image[None, None], (str(arm.task()["instruction"]),), state)
                actions = list(policy.act(observation, "greedy").actions[0].numpy().astype(float))
            previous = robot.aim(seen, actions.pop(0), seen.position if previous is None else previous)
            robot.act(previous)
            arm.advance(round(1 / RATE / (TICK * 0.002)))
            begun += 1
        yield bool(arm.state()["success"])
    arm.close()


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
    played = list(without_time(args, [state - states[0] for state in states]))
    found["without_time"] = result(
        [replace(record, success=success) for record, success in zip(here, played, strict=True)], here
    )
    size = ("--image-size", str(args.image_size), "--one-camera", "--speed", str(args.speed))
    with (
        process(
            "serve", str(args.checkpoint), "--suite", suite, "--port", "0", "--images", "observation/image"
        ) as policy,
        process("simulate", args.task, "--port", "0", *size) as arm,
    ):
        for name, ahead in (("runner", None), ("overlapping", 4)):
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
