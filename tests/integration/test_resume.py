"""A resumed run's metrics equal those of a run that was never stopped, bit for bit."""

import json
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from rove import train as train_module
from rove.config.schema import (
    GRPO,
    PPO,
    EvaluationConfig,
    LlamaConfig,
    LoggingConfig,
    OptimConfig,
    PolicyConfig,
    RolloutConfig,
    Run,
    SFTConfig,
    TabletopConfig,
    TowerConfig,
    TrainingConfig,
    ValueHeadConfig,
)
from rove.errors import RoveError
from rove.interrupt import Interrupted
from rove.train import train

TINY = PolicyConfig(
    towers=(TowerConfig(width=32, depth=2, heads=2, mlp=64),),
    llama=LlamaConfig(width=32, depth=2, heads=2, mlp=64),
)
BASE = Run(
    name="resume",
    algorithm=PPO(),
    env=TabletopConfig(tasks="pick/red_cube", horizon=12, reward="shaped"),
    policy=replace(TINY, value_head=ValueHeadConfig(hidden=(16,))),
    rollout=RolloutConfig(num_envs=8, chunk=4, chunks=2),
    training=TrainingConfig(iterations=4, batch=8, micro_batch=8, optim=OptimConfig(lr=1e-3, warmup=3)),
    sft=SFTConfig(episodes=8, steps=5, batch=16, micro_batch=16, optim=OptimConfig()),
    evaluation=EvaluationConfig(every=2, episodes=4, variant_episodes=0, num_envs=4),
    logging=LoggingConfig(tensorboard=False, save_every=1, keep=10),
)
NO_EVALUATION = EvaluationConfig(episodes=0, variant_episodes=0)
PPO_RUN = BASE
GRPO_RUN = replace(
    BASE,
    algorithm=GRPO(group_size=4, kl_coef=0.1),
    policy=TINY,
    rollout=RolloutConfig(num_envs=8, chunk=4, chunks=3),
)


def measured(directory: Path) -> list[dict]:
    """The metrics of every iteration, without what a clock says."""
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [
        {name: value for name, value in line.items() if not name.startswith(("time/", "speed/"))}
        for line in lines
        if "sft_step" not in line
    ]


@pytest.mark.parametrize("run", [PPO_RUN, GRPO_RUN], ids=["ppo", "grpo"])
def test_a_resumed_run_equals_one_that_was_never_stopped(run, tmp_path):
    whole = train(run, tmp_path / "whole")
    expected = measured(whole)
    assert [line["step"] for line in expected] == [1, 2, 3, 4]
    assert any(line["train/rows"] for line in expected[2:]), "nothing was trained after the resume"

    stopped = tmp_path / "stopped"
    shutil.copytree(whole, stopped)
    for path in (stopped / "checkpoints").iterdir():
        if path.name > "iteration_000002":
            shutil.rmtree(path)
    assert measured(train(run, stopped, resume=True)) == expected


def test_another_configuration_is_refused_by_name(tmp_path):
    run = replace(
        PPO_RUN,
        training=replace(PPO_RUN.training, iterations=2),
        evaluation=NO_EVALUATION,
    )
    directory = train(run, tmp_path / "run")
    with pytest.raises(RoveError, match=r"rollout\.num_envs is 16, the run was started with 8"):
        train(replace(run, rollout=replace(run.rollout, num_envs=16)), directory, resume=True)
    with pytest.raises(RoveError, match="already holds a run"):
        train(run, directory)


def test_an_interrupt_saves_and_ends_and_the_run_goes_on(tmp_path, monkeypatch):
    run = replace(
        PPO_RUN,
        evaluation=NO_EVALUATION,
        logging=LoggingConfig(tensorboard=False),
    )
    collect = train_module.Executor.collect

    def interrupted(self, on_chunk):
        if self.version == 1:
            signal.raise_signal(signal.SIGINT)
        return collect(self, on_chunk)

    monkeypatch.setattr(train_module.Executor, "collect", interrupted)
    directory = tmp_path / "run"
    with pytest.raises(Interrupted) as ended:
        train(run, directory)
    assert ended.value.exit_code == 130
    assert [line["step"] for line in measured(directory)] == [1, 2]
    monkeypatch.undo()
    train(run, directory, resume=True)
    assert [line["step"] for line in measured(directory)] == [1, 2, 3, 4]
