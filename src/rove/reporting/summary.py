"""Metrics of a rollout and of an evaluation, computed from records, by the names declared in `metrics.py`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from rove.evaluation.statistics import wilson
from rove.types import EvalReport, Trajectory


def rollout_metrics(
    rounds: Sequence[Trajectory], trained: int, seconds: Mapping[str, float], total: float
) -> dict[str, float]:
    """Compute success, lengths, values and speed of an iteration, of which `trained` chunks were trained on.

    `seconds` are the seconds of each phase, `total` those of the whole iteration.
    """
    records = [record for trajectory in rounds for record in trajectory.finished]
    steps = sum(int(trajectory.executed.sum()) for trajectory in rounds)
    tried = [each.executed if each.branches is None else each.branches.executed for each in rounds]
    metrics = {
        "rollout/episodes": len(records),
        "rollout/env_steps": steps,
        "rollout/simulated_steps": sum(int(executed.sum()) for executed in tried),
        "speed/env_steps_per_second": steps / total,
        "time/iteration": total,
    }
    metrics |= {f"time/{name}": spent for name, spent in seconds.items()}
    if simulation := seconds.get("simulation"):
        metrics["speed/simulation_steps_per_second"] = steps / simulation
    if training := seconds.get("training"):
        metrics["speed/train_rows_per_second"] = trained / training
    values = [
        trajectory.value[:-1].expand_as(trajectory.executed)[trajectory.executed]
        for trajectory in rounds
        if trajectory.value is not None
    ]
    if values and steps:
        metrics["rollout/value"] = float(torch.cat(values).mean())
    if records:
        count = len(records)
        metrics |= {
            "rollout/success": sum(r.success for r in records) / count,
            "rollout/episode_length": sum(r.length for r in records) / count,
            "rollout/return": sum(r.total_reward for r in records) / count,
            "rollout/truncated": sum(r.truncated for r in records) / count,
        }
    return metrics


def evaluation_metrics(report: EvalReport) -> dict[str, float]:
    """Compute success over all episodes, with its 95 % Wilson interval, and their mean length."""
    wins, count = sum(r.success for r in report.records), len(report.records)
    low, high = wilson(wins, count)
    return {
        "eval/success": wins / count,
        "eval/success_low": low,
        "eval/success_high": high,
        "eval/episodes": count,
        "eval/episode_length": sum(r.length for r in report.records) / count,
    }
