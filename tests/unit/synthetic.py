"""A run directory made of invented numbers, for tests of what reads one."""

from __future__ import annotations

import json
import math
import random
from dataclasses import asdict
from pathlib import Path

import torch

from rove.config.schema import GRPO, Run
from rove.evaluation import report as evaluation
from rove.reporting import video
from rove.reporting.log import Logger
from rove.types import EpisodeRecord, EpisodeSpec, EvalReport

TASKS = (
    "put/red_cube/blue_plate",
    "put/green_cylinder/white_bowl",
    "stack/red_cube/yellow_brick",
    "push/yellow_brick/white_zone",
    "pick/blue_cylinder",
)
AXES = {
    "table_texture": "vision",
    "light": "vision",
    "unseen_shape": "semantics",
    "unseen_phrasing": "semantics",
    "unseen_position": "execution",
}


def records(rate: float, episodes: int, variant: str = "none", seed: int = 0) -> tuple[EpisodeRecord, ...]:
    """`episodes` episodes spread over `TASKS`, each a success with probability `rate`."""
    draw = random.Random(f"{seed}/{variant}/{rate}")
    return tuple(
        EpisodeRecord(
            EpisodeSpec(TASKS[i % len(TASKS)], 1000 + i // len(TASKS), variant, seed=i),
            slot=i % 8,
            success=(success := draw.random() < rate),
            length=draw.randint(12, 30) if success else 32,
            total_reward=float(success),
            truncated=not success,
        )
        for i in range(episodes)
    )


def report(rate: float, shift: float = 0.15) -> EvalReport:
    """An evaluation in distribution at `rate`, and on every variant `shift` below it."""
    everything = records(rate, 200)
    for variant in AXES:
        everything += records(max(rate - shift, 0.0), 60, variant)
    return EvalReport("tabletop", "held_out", "greedy", everything, 61.0, "policy", {"axes": AXES})


def frames(seed: int, count: int = 24) -> torch.Tensor:
    """uint8 [count, 64, 64, 3]: a square that crosses a table."""
    picture = torch.full((count, 64, 64, 3), 180, dtype=torch.uint8)
    picture[:, 20:] = torch.tensor([150, 120, 90], dtype=torch.uint8)
    for i in range(count):
        left = 5 + (2 * i + 7 * seed) % 46
        picture[i, 34:44, left : left + 10] = torch.tensor([200, 40, 40], dtype=torch.uint8)
    return picture


def run_directory(path: Path, iterations: int = 40) -> Path:
    """Fill `path` with everything that a finished run leaves behind."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "run.json").write_text(json.dumps(asdict(Run("demo", GRPO()))))
    about = {
        "command": "rove demo --seed 1",
        "seed": 1,
        "commit": "0123456789abcdef0123456789abcdef01234567",
        "machine": {"cpu": "A processor <with brackets>", "cores": 2, "gpu": []},
        "versions": {"python": "3.11.9", "torch": "2.13.0"},
    }
    (path / "about.json").write_text(json.dumps(about))
    _log(path, iterations)
    for name, rate in (("before", 0.47), ("after", 0.94)):
        evaluation.save(report(rate), path / "eval" / f"{name}.json")
    entries = []
    for phase, outcomes in (("before", (False, False, True)), ("after", (True, True, True))):
        (path / "videos" / phase).mkdir(parents=True, exist_ok=True)
        for i, (task, success) in enumerate(zip(TASKS, outcomes, strict=False)):
            instruction = f"{task.split('/')[0]} the {task.split('/')[1].replace('_', ' ')} where it belongs"
            file = f"{phase}/{i}.webp"
            video.write_webp(path / "videos" / file, frames(i), instruction, success)
            entries.append(asdict(video.Video(phase, task, instruction, success, file)))
    (path / "videos" / "index.json").write_text(json.dumps(entries))
    return path


def _log(path: Path, iterations: int) -> None:
    draw = random.Random(0)
    with Logger(path, tensorboard=False, wandb=False) as logger:
        for step in range(1, 301):
            logger.log_sft(step, {"pointing/loss": 4.0 * math.exp(-step / 80) + 0.9 + draw.gauss(0, 0.05)})
            logger.log_sft(step, {"sft/loss": 4.0 * math.exp(-step / 80) + 0.9 + draw.gauss(0, 0.05)})
        for i in range(1, iterations + 1):
            success = round(64 * min(0.4 + 0.55 * (1 - math.exp(-i / 12)) + draw.gauss(0, 0.03), 1.0)) / 64
            line = {
                "rollout/success": success,
                "rollout/episodes": 64,
                "rollout/episode_length": 30 - 10 * success,
                "train/policy_loss": draw.gauss(0, 0.01),
                "train/entropy": 2.0 - 0.02 * i,
                "train/grad_norm": abs(draw.gauss(1, 0.2)),
                "time/simulation": (simulation := 3.0 + draw.gauss(0, 0.1)),
                "time/inference": 2.0,
                "time/training": 2.6,
                "time/sync": 0.02,
                "time/iteration": simulation + 4.8,
                "speed/env_steps_per_second": 1900 + draw.gauss(0, 40),
            }
            if i % 10 == 0:
                line |= {"eval/success": success, "eval/episodes": 128, "time/evaluation": 1.5}
                line["time/iteration"] += 1.5
            logger.log(i, line)
