"""Reinforcement learning learns where there is something to learn, and does not where rewards mean nothing.

The task is that of examples/environment.py: a dot goes to the side that the instruction names, so that a
policy which ignores text or picture cannot pass. The warm-up is cut short, before it has the answer.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rove import recipes
from rove import train as train_module
from rove.config.schema import GRPO, PPO, EvaluationConfig, LoggingConfig, OptimConfig, Run, ValueHeadConfig
from rove.train import train

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "environment.py"


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    """A policy that has seen the task, and can do it about half of the time."""
    run = make_run("start", GRPO(group_size=8))
    run = replace(run, training=replace(run.training, iterations=1))
    directory = train(run, tmp_path_factory.mktemp("learning") / "start")
    return directory / "sft"


def make_run(name: str, algorithm: PPO | GRPO) -> Run:
    module = sys.modules.get("environment")
    base = module.reach() if module else recipes.get(f"{EXAMPLE}:reach").build()
    critic = ValueHeadConfig(hidden=(32,)) if isinstance(algorithm, PPO) else None
    assert base.sft is not None
    return replace(
        base,
        name=name,
        algorithm=algorithm,
        policy=replace(base.policy, value_head=critic),
        rollout=replace(base.rollout, num_envs=64),
        sft=replace(base.sft, steps=5),
        training=replace(base.training, iterations=12, batch=64, micro_batch=64, optim=OptimConfig(lr=1e-3)),
        evaluation=EvaluationConfig(episodes=0, variant_episodes=0),
        logging=LoggingConfig(tensorboard=False),
    )


def successes(directory: Path) -> list[float]:
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [line["rollout/success"] for line in lines if "rollout/success" in line]


def learn(algorithm: PPO | GRPO, start: Path, directory: Path) -> tuple[float, float]:
    """Success of sampled rollouts in the first iteration, and in the last three."""
    run = make_run("learn", algorithm)
    run = replace(run, policy=replace(run.policy, checkpoint=str(start)), sft=None)
    curve = successes(train(run, directory))
    return curve[0], sum(curve[-3:]) / 3


@pytest.mark.parametrize("algorithm", [GRPO(group_size=8, epochs=2), PPO(epochs=2)], ids=["grpo", "ppo"])
def test_success_rises(algorithm, start, tmp_path):
    before, after = learn(algorithm, start, tmp_path / "run")
    assert before < 0.75
    assert after > before + 0.2


@pytest.mark.parametrize("algorithm", [GRPO(group_size=8, epochs=2), PPO(epochs=2)], ids=["grpo", "ppo"])
def test_shuffled_rewards_teach_nothing(algorithm, start, tmp_path, monkeypatch):
    collect = train_module.Executor.collect
    generator = torch.Generator().manual_seed(0)

    def shuffled(self, on_chunk):
        trajectory = collect(self, on_chunk)
        order = torch.randperm(trajectory.shape[1], generator=generator)
        return replace(trajectory, reward=trajectory.reward[:, order])

    monkeypatch.setattr(train_module.Executor, "collect", shuffled)
    before, after = learn(algorithm, start, tmp_path / "run")
    assert after < before + 0.1
