"""A few episodes as animated pictures, every action a frame."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from rove.envs.base import TaskSuite
from rove.evaluation.evaluate import episodes
from rove.reporting.video import write_webp
from rove.types import EpisodeSpec, EvalReport


class Evaluator(Protocol):
    """The part of an executor that `record` calls."""

    suite: TaskSuite

    def evaluate(self, specs, name, about, on_episode=..., on_frames=...) -> EvalReport:
        """Run the episodes given."""
        ...


def record(executor: Evaluator, directory: Path, phase: str, count: int = 8) -> None:
    """Run the first `count` held-out episodes; write them to `directory/phase`, listed in index.json."""
    frames: dict[EpisodeSpec, list[Tensor]] = defaultdict(list)
    specs = episodes(executor.suite, count)
    report = executor.evaluate(specs, phase, {}, on_frames=lambda spec, part: frames[spec].append(part))
    index_file = directory / "index.json"
    index = json.loads(index_file.read_text()) if index_file.exists() else []
    index = [entry for entry in index if entry["phase"] != phase]
    (directory / phase).mkdir(parents=True, exist_ok=True)
    for number, (spec, outcome) in enumerate(zip(specs, report.records, strict=True)):
        instruction = executor.suite.instruction(spec)
        file = f"{phase}/{number}.webp"
        write_webp(directory / file, torch.cat(frames[spec]), instruction, outcome.success)
        index.append(
            {
                "phase": phase,
                "task": spec.task,
                "instruction": instruction,
                "success": outcome.success,
                "file": file,
            }
        )
    index_file.write_text(json.dumps(index, indent=1))
