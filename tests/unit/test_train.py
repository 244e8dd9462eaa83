"""The loop around the loop: what is done before the workers start."""

from __future__ import annotations

import random
import weakref
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from tests.unit.test_plan import LAPTOP

from rove import train as training
from rove.config.schema import PPO, LoggingConfig, PolicyConfig, Run, TrainingConfig, ValueHeadConfig
from rove.evaluation.trend import Trend
from rove.train import Spent
from rove.types import EpisodeRecord, EpisodeSpec


class Stop(Exception):
    """The workers would start now."""


def test_the_memory_of_a_warm_up_is_free_before_the_workers_start(tmp_path: Path, monkeypatch):
    """The warm-up's GPU is rank 0's, which may be another process: what is kept here is lacking there."""
    freed = []

    class Policy:
        def __init__(self) -> None:
            self.itself = self

    def warm_up(*_) -> Path:
        reference = weakref.ref(Policy())
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: freed.append(reference() is None))
        return tmp_path

    def execute(*_) -> None:
        raise Stop

    monkeypatch.setattr(training, "warm_up", warm_up)
    monkeypatch.setattr(training, "inventory_of", lambda run: LAPTOP)
    monkeypatch.setattr(training, "execute", execute)
    policy = PolicyConfig(value_head=ValueHeadConfig())
    run = Run("t", PPO(), policy=policy, logging=LoggingConfig(tensorboard=False))
    with pytest.raises(Stop):
        training.train(run, tmp_path / "run")
    assert freed == [True]


@pytest.mark.parametrize(
    ("minutes", "steps", "over"), [(1.9, 99, False), (2.0, 0, True), (0.0, 100, True), (0.0, 0, False)]
)
def test_a_run_ends_when_its_minutes_or_its_actions_are_spent(minutes, steps, over):
    assert Spent(minutes, steps).all_of(TrainingConfig(max_minutes=2.0, max_simulated_steps=100)) == over
    assert not Spent(minutes, steps).all_of(TrainingConfig())


LOST, WON = (
    EpisodeRecord(EpisodeSpec("t", 0), slot=0, success=won, length=1, total_reward=0.0, truncated=False)
    for won in (False, True)
)


def _rollouts(*rates: float, seed: int) -> list[list[EpisodeRecord]]:
    """A rollout of 100 episodes for each rate of success."""
    draw = random.Random(seed)
    return [[WON if draw.random() < rate else LOST for _ in range(100)] for rate in rates]


@pytest.mark.parametrize("seed", range(5))
def test_a_fall_of_success_is_told_once(seed):
    trend, told = Trend(), []
    for finished in _rollouts(*[0.85] * 40, *[0.6] * 20, *[0.1] * 20, seed=seed):
        told.append(trend.count(finished))
        trend = Trend(**asdict(trend))  # as a run that is resumed has it
    assert told[:40] == [None] * 40
    (message,) = [text for text in told[40:] if text]
    assert "has fallen" in message and "--training.optim.lr" in message


def test_chance_is_no_fall():
    alarms = 0
    for seed in range(20):
        trend = Trend()
        alarms += any(trend.count(finished) for finished in _rollouts(*[0.8] * 400, seed=seed))
    assert not alarms
