"""Records → metrics: what a rollout and an evaluation say, under the names declared in `metrics.py`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rove.evaluation.statistics import wilson
from rove.types import EvalReport, Trajectory


def rollout_metrics(
    rounds: Sequence[Trajectory], seconds: Mapping[str, float], total: float
) -> dict[str, float]:
    """Success, lengths and speed of an iteration's rollouts; `seconds` by phase, `total` of all of it."""
    records = [record for trajectory in rounds for record in trajectory.finished]
    steps = sum(int(trajectory.executed.sum()) for trajectory in rounds)
    metrics = {
        "rollout/episodes": len(records),
        "rollout/env_steps": steps,
        "speed/env_steps_per_second": steps / total,
        "time/iteration": total,
    }
    metrics |= {f"time/{name}": spent for name, spent in seconds.items()}
    if records:
        count = len(records)
        metrics |= {
            "rollout/success": sum(r.success for r in records) / count,
            "rollout/episode_length": sum(r.length for r in records) / count,
            "rollout/return": sum(r.total_reward for r in records) / count,
        }
    return metrics


def evaluation_metrics(report: EvalReport) -> dict[str, float]:
    """Success over all episodes, with its 95 % Wilson interval."""
    wins, count = sum(r.success for r in report.records), len(report.records)
    low, high = wilson(wins, count)
    return {
        "eval/success": wins / count,
        "eval/success_low": low,
        "eval/success_high": high,
        "eval/episodes": count,
    }
