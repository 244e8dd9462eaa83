"""ManiSkill as it is used today, and as Rove steps it: python benchmarks/maniskill.py [--repeats 5]

Prints JSON. Both sides of each pair carry out the same actions in the same episodes, in this process, by
turns, and have to end in the same state with the same picture. "Bound" is what rendering once a chunk would
give if it cost nothing to leave the other frames out and nothing else were changed.
Tries: 8 chunks tried from where each world of the recipes' three-object set stands, each in a copy of the
process, beside the same worlds stepped in place without pictures, and beside PhysX alone. A step is one
action executed in one world.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rove.config.schema import ManiSkillConfig, PutOnPlateConfig
from rove.envs.maniskill import simulator, tasks
from rove.envs.maniskill.env import PutOnPlateEnv
from rove.envs.maniskill.world import World
from rove.recipes.maniskill import REDUCED
from rove.runtime.fork import in_copy
from rove.types import EpisodeSpec

CHUNK = 8
BAR = 4.0
BRANCHES = 8
"""Chunks tried from each state."""
OF_STEPPING = 0.85


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
    }


class Side:
    """One way to step a world: action by action with a frame each, or a chunk at a time with one frame."""

    def __init__(self, world: World, spec: EpisodeSpec, everything: Callable[[World], Any] | None) -> None:
        self.world, self.spec, self.everything = world, spec, everything

    def run(self, actions: np.ndarray) -> tuple[float, torch.Tensor, torch.Tensor]:
        """Seconds, final joint positions and last picture of one episode; the start is not timed."""
        world = self.world
        world.start([0], [self.spec], [torch.zeros(0, actions.shape[-1])])
        world.frames([0])
        began = time.perf_counter()
        picture = torch.zeros(0)
        for chunk in actions.reshape(-1, CHUNK, actions.shape[-1]):
            if self.everything is None:
                world.play([0], CHUNK, lambda row, c, chunk=chunk: chunk[c])
                picture = world.frames([0])
            else:
                for action in chunk:
                    world.play([0], 1, lambda row, c, action=action: action)
                    picture = self.everything(world)
        seconds = time.perf_counter() - began
        return seconds, world.env.agent.robot.get_qpos().clone(), picture


def compare(
    name: str,
    today: Side,
    rove: Side,
    actions: np.ndarray,
    repeats: int,
    frame: Callable[[World], Any],
    same_bodies: Side | None = None,
) -> dict[str, Any]:
    """Medians over repeats, by turns; the first repeat warms caches up.

    How PhysX rounds depends on which bodies a scene has. `same_bodies` steps as Rove does, in a scene with
    those of today's: it, and not `rove`, has to end in the same bits.
    """
    seconds: dict[str, list[float]] = {"today": [], "rove": []}
    ends: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for repeat in range(repeats + 1):
        for side, stepped in (("today", today), ("rove", rove)):
            took, joints, picture = stepped.run(actions)
            ends[side] = joints, picture
            if repeat:
                seconds[side].append(took)
    if same_bodies is not None:
        ends["rove"] = same_bodies.run(actions)[1:]
    began = time.perf_counter()
    for _ in range(10):
        frame(today.world)
    picture_cost = (time.perf_counter() - began) / 10
    steps = len(actions)
    medians = {side: statistics.median(times) for side, times in seconds.items()}
    left = medians["today"] - picture_cost * (steps - steps // CHUNK)
    ratio = medians["today"] / medians["rove"]
    same = all(torch.equal(a, b) for a, b in zip(ends["today"], ends["rove"], strict=True))
    return {
        "pair": name,
        "steps_per_second": {side: round(steps / median, 1) for side, median in medians.items()},
        "repeats": {side: [round(steps / t, 1) for t in times] for side, times in seconds.items()},
        "milliseconds_a_frame_today": round(1e3 * picture_cost, 2),
        "ratio": round(ratio, 2),
        "bound": round(medians["today"] / left, 2),
        "same_final_state_and_picture": same,
        "bar": BAR,
        "passed": bool(ratio >= BAR and same),
    }


def stock(chunks: int, repeats: int) -> dict[str, Any]:
    """PickCube at 128²: `env.step` renders every camera and computes reward and observation each time."""
    config = ManiSkillConfig(tasks="PickCube-v1", image_size=128, horizon=10**6, workers=1)
    world, other = (tasks.world(config, config.tasks, 1, None) for _ in range(2))
    spec = EpisodeSpec("PickCube-v1", 7)
    generator = np.random.default_rng(0)
    actions = generator.uniform(-1, 1, (chunks * CHUNK, 7)).astype(np.float32)

    def frame(world: World) -> torch.Tensor:
        """The observation that ManiSkill makes of a step in its "rgb" mode."""
        env = world.env
        env._obs_mode = "rgb"
        seen = env.get_obs(env.get_info(), unflattened=True)["sensor_data"]
        env._obs_mode = "none"
        return seen["base_camera"]["rgb"][:, None]

    return compare(
        "PickCube-v1, 128 × 128", Side(other, spec, frame), Side(world, spec, None), actions, repeats, frame
    )


def put_on_plate(chunks: int, repeats: int) -> dict[str, Any]:
    """The published form: all 25 objects in the scene, and after each action a frame of 640 × 480 with its
    overlay, and for every object whether it is grasped, each by queries of its own."""
    config = PutOnPlateConfig(full_frame=True, horizon=10**6, workers=1, terminate=False)
    task = "PutOnPlateInScene25Main-v3"
    rove, today, crowded = (tasks.world(config, task, 1, None) for _ in range(3))
    today.env.everything = crowded.env.everything = True
    spec = EpisodeSpec(task, 3)
    generator = np.random.default_rng(0)
    scale = np.array([0.03, 0.03, 0.03, 0.2, 0.2, 0.2, 1.0])
    actions = (generator.uniform(-1, 1, (chunks * CHUNK, 7)) * scale).astype(np.float32)

    def frame(world: World) -> torch.Tensor:
        for thing in world.env._built["more_carrot"].values():
            world.env.agent.is_grasping(thing)
        return world.frames([0])

    result = compare(
        "put on plate, 640 × 480", Side(today, spec, frame), Side(rove, spec, None), actions, repeats, frame,
        same_bodies=Side(crowded, spec, None),
    )  # fmt: skip
    _, ours, picture = Side(rove, spec, None).run(actions)
    _, theirs, other = Side(today, spec, frame).run(actions)
    return result | {
        "without_the_unused_bodies": {
            "largest_difference_of_a_joint": float((ours - theirs).abs().max()),
            "pixels_that_differ": float((picture != other).any(-1).float().mean()),
        }
    }


def tries(num_envs: int, repeats: int) -> dict[str, Any]:
    """Steps a second of tries, of stepping in place, and of PhysX alone, by turns in one process; medians."""
    config = replace(REDUCED, reward="dense", horizon=10**6, terminate=False, workers=1)
    env = PutOnPlateEnv(config, num_envs, CHUNK, "stop")
    env.reset([EpisodeSpec(env.suite.tasks[0], state) for state in range(num_envs)])
    generator = np.random.default_rng(0)
    for _ in range(2):  # hands down at the objects
        env.step_expert_chunk(0.0, generator)
    fleet = env._members[0].worker  # type: ignore[attr-defined]
    worlds = [world for world, _ in fleet._at.values()]
    scale = np.array([0.03, 0.03, 0.03, 0.2, 0.2, 0.2, 1.0])
    shape = (num_envs, BRANCHES, CHUNK, 7)
    chosen = torch.from_numpy((generator.uniform(-1, 1, shape) * scale).astype(np.float32))
    env.try_chunks(chosen)
    seconds: dict[str, list[float]] = {"tries": [], "in place": [], "physics": [], "a copy": []}
    for repeat in range(repeats):  # by turns, so that a busy moment of the machine hits all
        began = time.perf_counter()
        env.try_chunks(chosen)
        seconds["tries"].append((time.perf_counter() - began) / BRANCHES)
        began = time.perf_counter()
        in_copy("nothing", int)
        seconds["a copy"].append(time.perf_counter() - began)
        began = time.perf_counter()
        actions = chosen[:, repeat % BRANCHES].numpy()
        for world, own in zip(worlds, actions, strict=True):
            world.play([0], CHUNK, lambda row, c, own=own: own[c])
        seconds["in place"].append(time.perf_counter() - began)
        began = time.perf_counter()
        for world in worlds:
            for _ in range(CHUNK * world.env._sim_steps_per_control):
                world.env.scene.step()
        seconds["physics"].append(time.perf_counter() - began)
    env.close()
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    rates = {name: round(num_envs * CHUNK / medians[name], 1) for name in ("tries", "in place", "physics")}
    pairs = zip(seconds["in place"], seconds["tries"], strict=True)
    of_stepping = statistics.median(stepped / tried for stepped, tried in pairs)
    return {
        "num_envs": num_envs,
        "branches": BRANCHES,
        "physics_steps_an_action": worlds[0].env._sim_steps_per_control,
        "steps_per_second": rates,
        "tried_chunks_per_second": round(num_envs / medians["tries"], 1),
        "milliseconds_a_copy": round(1e3 * medians["a copy"], 2),
        "of_stepping_in_place": round(of_stepping, 3),
        "bar": OF_STEPPING,
        "passed": of_stepping >= OF_STEPPING,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--chunks", type=int, default=8, help="chunks of 8 actions an episode")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--num-envs", type=int, default=16, help="worlds in which chunks are tried")
    parser.add_argument("--only-tries", action="store_true", help="nothing beside the tries")
    args = parser.parse_args()
    torch.set_num_threads(1)
    before = machine()
    simulator.load()
    import mani_skill
    import sapien

    before |= {"mani_skill": mani_skill.__version__, "sapien": sapien.__version__, "torch": torch.__version__}
    report: dict[str, Any] = {"benchmark": "ManiSkill steps", "chunk": CHUNK, "machine": before}
    if not args.only_tries:
        report["pairs"] = [stock(args.chunks, args.repeats), put_on_plate(args.chunks, args.repeats)]
    report["tries"] = tries(args.num_envs, args.repeats)
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
