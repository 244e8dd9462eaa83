"""Environments that hang, end their process or pretend Ctrl-C, in the policy's process and in their own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from tests.faulty_env import FaultyConfig
from tests.integration.test_resume import NO_EVALUATION, TINY
from tests.point_env import PointEnv, PointSuite

from rove.config import load
from rove.config.schema import (
    PPO,
    LoggingConfig,
    OptimConfig,
    PlacementConfig,
    RolloutConfig,
    Run,
    TrainingConfig,
    ValueHeadConfig,
)
from rove.envs import registry
from rove.policies import registry as policies
from rove.train import train

pytestmark = pytest.mark.slow

POLICY = replace(
    TINY,
    towers=(replace(TINY.towers[0], patch=4, width=16, mlp=16),),
    llama=replace(TINY.llama, width=16, mlp=16),
    value_head=ValueHeadConfig(hidden=(8,)),
)
CHUNK = 5
IN_THE_SECOND = 7
"""A chunk of the second iteration: an iteration has four."""


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    """A policy with random weights."""
    policy = policies.build(
        POLICY,
        chunk=CHUNK,
        action_spec=PointEnv(1, "stop").action_spec,
        image_size=4,
        vocabulary=PointSuite.vocabulary,
        statistics=None,
        seed=0,
    )
    directory = tmp_path_factory.mktemp("start") / "policy"
    policy.save_pretrained(directory)
    return directory


def run_of(start: Path, directory: Path, fault: str, **placement) -> Run:
    registry.register(FaultyConfig, "tests.faulty_env")
    marker = str(directory / "struck")
    return Run(
        "faulty",
        PPO(),
        env=FaultyConfig(  # pyright: ignore[reportArgumentType]
            horizon=15, image_size=4, fault=fault, chunk_number=IN_THE_SECOND, marker=marker
        ),
        policy=replace(POLICY, checkpoint=str(start)),
        sft=None,
        rollout=RolloutConfig(num_envs=4, chunk=CHUNK, chunks=4),
        training=TrainingConfig(iterations=3, batch=16, micro_batch=16, optim=OptimConfig(lr=1e-4, warmup=0)),
        evaluation=NO_EVALUATION,
        logging=LoggingConfig(tensorboard=False, save_every=1),
        placement=PlacementConfig(**placement),
    )


CODE = """
import sys
from rove import cli
from rove.envs import registry
from tests.faulty_env import FaultyConfig
registry.register(FaultyConfig, "tests.faulty_env")
sys.exit(cli.main(["train", "--resume", sys.argv[1]]))
"""


def begun(run: Run, directory: Path) -> subprocess.Popen[str]:
    """`rove train`, in a process of its own."""
    directory.mkdir(exist_ok=True)
    load.save(run, directory / "run.json")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return subprocess.Popen(
        [sys.executable, "-c", CODE, str(directory)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


def ended(process: subprocess.Popen[str]) -> tuple[int, list[str]]:
    """The exit status, and the lines of errors."""
    try:
        _, printed = process.communicate(timeout=240)
    finally:
        process.kill()
    return process.returncode, [line for line in printed.splitlines() if line]


def kept(directory: Path) -> list[str]:
    return sorted(path.name for path in (directory / "checkpoints").iterdir())


SAID = {
    "hang": "Environment 'point' has not come back from step_chunk for 3 s (placement.deadline = 3)",
    "spin": "Environment 'point' has not come back from step_chunk for 3 s (placement.deadline = 3)",
    "exit": "Environment 'point' called sys.exit(7) in step_chunk",
    "interrupt": "Environment 'point' raised KeyboardInterrupt in step_chunk, though nobody pressed Ctrl-C",
}


@pytest.mark.parametrize("fault", SAID)
def test_in_the_policys_process_it_ends_the_run_with_one_line_and_its_checkpoint(fault, start, tmp_path):
    """And the run goes on from there."""
    deadline = 3.0 if fault in ("hang", "spin") else 600.0
    run, directory = run_of(start, tmp_path, fault, deadline=deadline), tmp_path / "run"
    code, printed = ended(begun(run, directory))
    assert (code, len(printed)) == (2, 1), printed
    assert printed[0].startswith(f"rove: error: {SAID[fault]}")
    assert kept(directory) == ["iteration_000001"]
    train(replace(run, placement=PlacementConfig()), directory, resume=True)
    assert kept(directory)[-1] == "iteration_000003"


@pytest.mark.parametrize("fault", ["exit", "interrupt"])
def test_in_a_process_of_its_own_it_is_replaced(fault, start, tmp_path, capfd):
    run = run_of(start, tmp_path, fault, map="learner: 0, env: 1, policy: 1", env_workers=1)
    directory = train(run, tmp_path / "run")
    assert kept(directory)[-1] == "iteration_000003"
    assert SAID[fault] in capfd.readouterr().out


def test_the_users_own_ctrl_c_is_still_heard_in_an_environment(start, tmp_path):
    """The first one waits for the iteration; the second does not, and is not taken for the environment's."""
    run = run_of(start, tmp_path, "hang")
    process = begun(run, tmp_path / "run")
    until = time.monotonic() + 120
    while not (tmp_path / "struck").exists() and time.monotonic() < until:
        time.sleep(0.1)
    for _ in range(2):
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
    code, printed = ended(process)
    assert code == 130 and not any("rove: error" in line for line in printed), printed
