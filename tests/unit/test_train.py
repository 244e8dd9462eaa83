"""The loop around the loop: what is done before the workers start."""

from __future__ import annotations

import weakref
from pathlib import Path

import pytest
import torch
from tests.unit.test_plan import LAPTOP

from rove import train as training
from rove.config.schema import PPO, LoggingConfig, PolicyConfig, Run, TrainingConfig, ValueHeadConfig
from rove.train import Spent


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
