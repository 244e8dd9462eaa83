"""Every metric that is declared is logged by some run, for every algorithm the ones that it can have."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from tests.integration.test_resume import BASE, GRPO_RUN, TINY

from rove.config.schema import PPO, OptimConfig, PlacementConfig, Run, SFTConfig, Vine
from rove.reporting.metrics import METRICS
from rove.train import train

SFT = SFTConfig(episodes=8, steps=50, batch=16, micro_batch=16, optim=OptimConfig())
SHORT = replace(BASE, training=replace(BASE.training, iterations=2), sft=SFT)
ASYNCHRONOUS = PlacementConfig(ahead=1, threads=1)
"""On old weights, with environment workers of its own: both sides wait at times."""
RUNS = {
    "ppo": replace(
        SHORT,
        algorithm=PPO(dual_clip=3.0),
        policy=replace(BASE.policy, pointers=3),
        sft=replace(SFT, grounding=8, grounding_steps=50),
        placement=ASYNCHRONOUS,
    ),
    "grpo": replace(SHORT, algorithm=GRPO_RUN.algorithm, policy=TINY, rollout=GRPO_RUN.rollout),
    "vine": replace(SHORT, algorithm=Vine(branches=2), policy=TINY),
}
ONLY = {
    "ppo": {
        "rollout/value", "train/value_loss", "train/value_clip_fraction", "train/explained_variance",
        "train/advantage_mean", "train/advantage_std", "train/return_mean", "train/dual_clip_fraction",
        "train/behavior_weight", "pointing/loss", "pointing/grad_norm", "pointing/lr",
    },
    "grpo": {
        "rollout/rounds", "rollout/groups", "rollout/kept_groups", "rollout/kept_fraction",
        "train/kl_reference",
    },
    "vine": {"train/branch_spread"},
}  # fmt: skip
"""Metrics that only one of the runs has."""


@pytest.mark.parametrize("name", RUNS)
def test_what_is_declared_is_logged(name: str, tmp_path: Path) -> None:
    run: Run = RUNS[name]
    directory = train(run, tmp_path / name)
    lines = map(json.loads, (directory / "metrics.jsonl").read_text().splitlines())
    logged = {key for line in lines for key in line} - {"step", "sft_step"}
    others = {metric for other, own in ONLY.items() if other != name for metric in own}
    assert logged == set(METRICS) - others
