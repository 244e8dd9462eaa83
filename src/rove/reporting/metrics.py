"""Declarations of every metric: name, unit, meaning. A metric that is not declared here cannot be logged.

Names are `group/name`. `python -m rove.reporting.metrics > docs/metrics.md` writes the reference page.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rove.errors import RoveError, nearest

Better = Literal["higher", "lower", "none"]


@dataclass(frozen=True, slots=True)
class Metric:
    """A number that a run reports over time."""

    name: str
    unit: str
    """Unit of the metric: "1" for a dimensionless number, "fraction" for one in [0, 1]."""
    meaning: str
    better: Better = "none"

    @property
    def group(self) -> str:
        """The part of the metric's name before the slash."""
        return self.name.partition("/")[0]


WARM_UP = ("pointing", "sft")
"""Groups whose step is the optimizer step of the warm-up, `sft_step` in `metrics.jsonl`."""
GROUPS = {
    "rollout": "What the policy did while collecting, with sampled actions on training states",
    "train": "The update: means over the optimizer steps of an iteration",
    "eval": "Held-out states, no learning",
    "pointing": "Learning to point, the first part of the warm-up; the step is the optimizer step",
    "sft": "Supervised warm-up; the step is the optimizer step",
    "time": "Wall-clock seconds of one iteration",
    "speed": "Throughput of one iteration",
}

_DECLARED = (
    Metric("rollout/success", "fraction", "Episodes that ended in success", "higher"),
    Metric("rollout/episodes", "episodes", "Episodes that ended in this iteration"),
    Metric("rollout/episode_length", "actions", "Mean executed actions of the episodes that ended"),
    Metric(
        "rollout/return", "reward", "Mean undiscounted sum of rewards of the episodes that ended", "higher"
    ),
    Metric("rollout/truncated", "fraction", "Episodes that the horizon ended", "lower"),
    Metric("rollout/env_steps", "actions", "Actions executed over all environments"),
    Metric(
        "rollout/simulated_steps",
        "actions",
        "Actions simulated, those that vine sampling only tries included",
    ),
    Metric("rollout/rounds", "rounds", "Rollouts it took to fill the batch (dynamic sampling)"),
    Metric("rollout/groups", "groups", "Groups sampled"),
    Metric("rollout/kept_groups", "groups", "Groups that the success-rate filter kept"),
    Metric("rollout/kept_fraction", "fraction", "Kept groups over sampled groups"),
    Metric("rollout/restarts", "workers", "Workers that failed and were replaced", "lower"),
    Metric("rollout/value", "reward", "Mean value that the critic gave to executed actions"),
    Metric("train/policy_loss", "1", "Clipped surrogate loss"),
    Metric("train/value_loss", "reward²", "Huber loss of the critic, clipped", "lower"),
    Metric("train/entropy", "nats", "Mean entropy of a number of an action"),
    Metric("train/approx_kl", "nats", "KL from the policy that collected, estimated on its samples (k3)"),
    Metric("train/kl_reference", "nats", "KL from the policy that the run started from (k3)"),
    Metric("train/ratio", "1", "Mean probability ratio, new over old"),
    Metric("train/behind", "versions", "How much older the weights were that collected", "lower"),
    Metric("train/behavior_weight", "1", "Mean weight of a sample that older weights collected, capped"),
    Metric("train/clip_fraction", "fraction", "Ratios outside the clip range that the loss clipped"),
    Metric("train/dual_clip_fraction", "fraction", "Ratios that the dual clip held"),
    Metric("train/value_clip_fraction", "fraction", "Values that left the value clip range"),
    Metric("train/explained_variance", "1", "1 − Var(returns − value) / Var(returns)", "higher"),
    Metric("train/advantage_mean", "reward", "Mean advantage before normalisation"),
    Metric("train/advantage_std", "reward", "Standard deviation of the advantage before normalisation"),
    Metric(
        "train/branch_spread", "reward", "Standard deviation of the returns of chunks tried from one state"
    ),
    Metric("train/return_mean", "reward", "Mean target of the critic"),
    Metric("train/grad_norm", "1", "Global gradient norm before clipping"),
    Metric("train/lr", "1", "Learning rate of the last optimizer step"),
    Metric("train/steps", "steps", "Optimizer steps taken"),
    Metric(
        "train/skipped_steps", "steps", "Optimizer steps skipped for a non-finite loss or gradient", "lower"
    ),
    Metric("train/rows", "chunks", "Chunks trained on"),
    Metric("eval/success", "fraction", "Held-out episodes that ended in success", "higher"),
    Metric("eval/success_low", "fraction", "Lower end of its 95 % Wilson interval", "higher"),
    Metric("eval/success_high", "fraction", "Upper end of its 95 % Wilson interval", "higher"),
    Metric("eval/episodes", "episodes", "Held-out episodes"),
    Metric("eval/episode_length", "actions", "Mean executed actions of a held-out episode", "lower"),
    Metric("pointing/loss", "nats", "Cross-entropy of where the things named are in the picture", "lower"),
    Metric("pointing/grad_norm", "1", "Global gradient norm before clipping"),
    Metric("pointing/lr", "1", "Learning rate"),
    Metric("sft/loss", "1", "Imitation loss by number of an expert action: for token policies nats", "lower"),
    Metric("sft/token_probability", "fraction", "Mean probability of an expert action token", "higher"),
    Metric("sft/grad_norm", "1", "Global gradient norm before clipping"),
    Metric("sft/lr", "1", "Learning rate"),
    Metric("time/simulation", "s", "Physics and rendering", "lower"),
    Metric("time/inference", "s", "The policy choosing actions and values", "lower"),
    Metric("time/env_idle", "s", "Environment workers waiting while a rollout ran, mean over them", "lower"),
    Metric("time/policy_idle", "s", "The policy waiting while a rollout ran, mean over policies", "lower"),
    Metric("time/training", "s", "Advantages, losses, gradients, optimizer", "lower"),
    Metric("time/sync", "s", "Moving weights from the learner to the rollout", "lower"),
    Metric("time/wait", "s", "The learner waiting for rollouts of other processes", "lower"),
    Metric("time/evaluation", "s", "Held-out evaluation", "lower"),
    Metric("time/checkpoint", "s", "Writing checkpoints, those of the iteration before included", "lower"),
    Metric(
        "time/iteration",
        "s",
        "The whole iteration; less than the sum of its parts where they overlap",
        "lower",
    ),
    Metric("time/minutes", "min", "Training time so far, over resumptions"),
    Metric(
        "speed/env_steps_per_second",
        "actions/s",
        "Executed actions over the whole iteration's time",
        "higher",
    ),
    Metric(
        "speed/simulation_steps_per_second", "actions/s", "Executed actions over simulation time", "higher"
    ),
    Metric(
        "speed/train_rows_per_second",
        "chunks/s",
        "Chunks trained on, epochs counted, over training time",
        "higher",
    ),
)

METRICS: dict[str, Metric] = {metric.name: metric for metric in _DECLARED}
"""Every declared metric by its name, in the order of groups."""

assert len(METRICS) == len(_DECLARED), "a metric is declared twice"


def declaration(name: str) -> Metric:
    """Return the declaration of `name`; RoveError with the nearest declared name when there is none."""
    if name not in METRICS:
        raise RoveError(
            f"metric {name!r} is not declared in rove/reporting/metrics.py. {nearest(name, METRICS)}"
        )
    return METRICS[name]


def markdown() -> str:
    """Format the reference page, docs/metrics.md."""
    lines = [
        "# Metrics",
        "",
        "Written by `python -m rove.reporting.metrics`. A run logs these to `metrics.jsonl`, TensorBoard",
        "and, if asked, Weights & Biases. The step is the iteration, counted from 1;",
        "of `sft/` and `pointing/` metrics it is the optimizer step.",
    ]
    for group, title in GROUPS.items():
        lines += [
            "",
            f"## {group}/",
            "",
            f"{title}.",
            "",
            "| name | unit | better | meaning |",
            "|---|---|---|---|",
        ]
        lines += [
            f"| `{m.name}` | {m.unit} | {'' if m.better == 'none' else m.better} | {m.meaning} |"
            for m in METRICS.values()
            if m.group == group
        ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(markdown(), end="")
