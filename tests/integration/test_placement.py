"""Placements on this machine: the same results wherever it runs, and nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests import shared_memory
from tests.integration.test_float_samples import RUNS as flow_runs
from tests.integration.test_resume import GRPO_RUN, NO_EVALUATION, PPO_RUN, measured

from rove.config.schema import OptimConfig, PlacementConfig
from rove.errors import RoveError
from rove.policies import registry as policies
from rove.train import train

SHORT = replace(PPO_RUN, training=replace(PPO_RUN.training, iterations=3), evaluation=NO_EVALUATION)


FLOW_SHORT = replace(
    SHORT,
    algorithm=flow_runs["smolvla ppo"].algorithm,
    policy=flow_runs["smolvla ppo"].policy,
    training=replace(SHORT.training, iterations=2, optim=OptimConfig(lr=1e-3)),
)
APART = "learner: 0, env: 1, policy: 1"
"""Policy and learner in processes of their own."""


@pytest.fixture(scope="module")
def started(tmp_path_factory) -> Path:
    """A policy to start from, made once."""
    run = replace(
        SHORT, training=replace(SHORT.training, iterations=1, optim=replace(SHORT.training.optim, warmup=0))
    )
    return train(run, tmp_path_factory.mktemp("start") / "run") / "sft"


def run_of(started: Path, run=SHORT, **placement):
    policy = replace(run.policy, checkpoint=str(started))
    return replace(run, sft=None, policy=policy, placement=PlacementConfig(**placement))


def same(a: list[dict], b: list[dict]) -> bool:
    """Equal but for rounding that another order of sums brings."""
    return all(
        x.keys() == y.keys() and all(abs(x[k] - y[k]) <= 1e-4 * max(1, abs(x[k])) for k in x)
        for x, y in zip(a, b, strict=True)
    )


@pytest.fixture(scope="module")
def started_flow(tmp_path_factory) -> Path:
    """A flow policy to start from, made once."""
    run = replace(FLOW_SHORT, training=replace(FLOW_SHORT.training, iterations=1))
    return train(run, tmp_path_factory.mktemp("start") / "run") / "sft"


@pytest.mark.parametrize(
    ("short", "start", "names"),
    [(SHORT, "started", ("hybrid", "disaggregated")), (FLOW_SHORT, "started_flow", ("hybrid",))],
    ids=["tokens", "flow"],
)
def test_hybrid_and_disaggregated_train_as_colocated_does(short, start, names, tmp_path, request):
    started = request.getfixturevalue(start)
    here = measured(train(run_of(started, short, stages=2), tmp_path / "colocated"))
    for name in names:
        run = run_of(started, short, map=name, deterministic=True)
        directory = train(run, tmp_path / name, profile=True)
        assert same(here, measured(directory)), name
        assert (directory / "trace.json").stat().st_size > 1000


def test_a_hybrid_run_is_resumed_bit_for_bit(started, tmp_path):
    import shutil

    run = run_of(started, map="hybrid", deterministic=True)
    whole = train(run, tmp_path / "whole")
    shutil.copytree(whole, tmp_path / "stopped")
    for path in (tmp_path / "stopped" / "checkpoints").iterdir():
        if path.name > "iteration_000001":
            shutil.rmtree(path)
    assert measured(train(run, tmp_path / "stopped", resume=True)) == measured(whole)


def test_asynchronous_rollouts_are_behind_by_no_more_than_the_bound(started, tmp_path):
    metrics = measured(train(run_of(started, map="disaggregated", ahead=1), tmp_path / "run"))
    assert [line["train/behind"] for line in metrics] == [0, 1, 1]
    assert all(line["train/rows"] > 0 for line in metrics)


@pytest.mark.parametrize(
    ("call", "ahead"),
    [("collect", 0), ("state_dict", 1)],
    ids=["while it collects", "before a checkpoint, asynchronous"],
)
def test_a_rollout_worker_that_is_killed_is_replaced(call, ahead, started, tmp_path, monkeypatch):
    """The process that holds the policy dies in the second iteration, before it is asked for something."""
    from rove.cluster.executor import Executor

    asked = getattr(Executor, call)
    killed = []

    def kill_and_ask(self, *args, **kwargs):
        if self.version == 1 and not killed:
            worker = next(worker for worker in self._workers if hasattr(worker, "child"))
            os.kill(worker.child.process.pid, signal.SIGKILL)
            killed.append(worker)
        return asked(self, *args, **kwargs)

    monkeypatch.setattr(Executor, call, kill_and_ask)
    run = run_of(started, map=APART, env_workers=1, ahead=ahead)
    run = replace(run, logging=replace(run.logging, save_every=1))
    lines = measured(train(run, tmp_path / "run"))
    # What a checkpoint finds is told with the next iteration.
    assert [line["rollout/restarts"] for line in lines] == ([0, 0, 1] if call == "state_dict" else [0, 1, 0])
    assert all(line["train/rows"] > 0 for line in lines)


def test_weights_are_broadcast_from_device_to_device(started, tmp_path, monkeypatch):
    """As between GPUs, here over gloo: the same results as through the host, and the bytes of what is
    trained."""
    from rove.placement.plan import Plan
    from rove.workers.policy import PolicyWorker

    run = run_of(started, map=APART, deterministic=True)
    run = replace(run, evaluation=replace(run.evaluation, every=2, episodes=4, variant_episodes=0))
    through_host = measured(train(run, tmp_path / "host"))
    sent, send = [], PolicyWorker.send_weights

    def counted(self, layout):
        sent.append(send(self, layout))
        return sent[-1]

    monkeypatch.setattr(Plan, "broadcasts", property(lambda self: bool(self.apart)))
    monkeypatch.setattr(PolicyWorker, "send_weights", counted)
    assert measured(train(run, tmp_path / "broadcast")) == through_host
    policy = policies.load(started)
    assert isinstance(policy, torch.nn.Module)
    assert set(sent) == {sum(p.nbytes for p in policy.parameters() if p.requires_grad)}
    assert len(sent) >= run.training.iterations


def test_a_rollout_worker_that_dies_leaves_the_broadcast_and_weights_go_through_the_host(
    started, tmp_path, monkeypatch
):
    from rove.cluster.executor import Executor
    from rove.placement.plan import Plan

    monkeypatch.setattr(Plan, "broadcasts", property(lambda self: bool(self.apart)))
    collect, killed, members = Executor.collect, [], []

    def kill_and_collect(self, on_chunk):
        if self.version == 1 and not killed:
            killed.append(worker := self._workers[self.plan.apart[0]])
            os.kill(worker.child.process.pid, signal.SIGKILL)
        members.append(len(self._members))
        return collect(self, on_chunk)

    monkeypatch.setattr(Executor, "collect", kill_and_collect)
    lines = measured(train(run_of(started, map=APART), tmp_path / "run"))
    assert [line["rollout/restarts"] for line in lines] == [0, 1, 0]
    assert members == [2, 2, 0] and all(line["train/rows"] > 0 for line in lines)


@pytest.fixture(scope="module")
def alone(started, tmp_path_factory) -> Path:
    """A run with one learner."""
    return train(run_of(started), tmp_path_factory.mktemp("alone") / "run")


@pytest.mark.parametrize(
    ("parallel", "where"),
    [("ddp", "colocated"), ("fsdp", "colocated"), ("fsdp", "learner: 1, env: 0, policy: 0")],
)
def test_two_learners_through_the_loop(parallel, where, started, alone, tmp_path):
    run = run_of(started, learners=2, map=where)
    two = train(replace(run, training=replace(run.training, parallel=parallel)), tmp_path / "two")
    assert same(measured(alone), measured(two))
    saved, expected = (policies.load(d / "checkpoints" / "iteration_000003" / "policy") for d in (two, alone))
    for (name, weight), (_, other) in zip(saved.named_parameters(), expected.named_parameters(), strict=True):
        if not name.endswith("k_proj.bias"):  # its gradient is zero but for rounding, which Adam blows up
            torch.testing.assert_close(weight, other, atol=1e-4, rtol=0, msg=name)


def descendants(pid: int) -> set[int]:
    """Processes below `pid`, itself included."""
    found, new = {pid}, {pid}
    while new:
        listed = subprocess.run(
            ["ps", "-o", "pid=", "--ppid", ",".join(map(str, new))],
            capture_output=True,
            text=True,
            check=False,
        ).stdout.split()
        new = {int(child) for child in listed} - found
        found |= new
    return found


def alive(pids: set[int]) -> set[int]:
    def zombie(pid: int) -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
        except OSError:
            return True

    return {pid for pid in pids if not zombie(pid)}


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT], ids=["kill -9", "Ctrl-C twice"])
def test_nothing_is_left_behind(how, started, tmp_path):
    from rove.config import load

    run = run_of(started, map="disaggregated", ahead=1)
    run = replace(run, training=replace(run.training, iterations=10_000))
    load.save(run, tmp_path / "run.json")
    code = (
        "import sys; from pathlib import Path; from rove.config import load; from rove.train import train; "
        f"train(load.load(Path({str(tmp_path / 'run.json')!r})), Path({str(tmp_path / 'run')!r}))"
    )
    segments = shared_memory.listed()
    driver = subprocess.Popen(
        [sys.executable, "-c", code], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    log = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (log.exists() and log.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.2)
    family = descendants(driver.pid)
    assert len(family) >= 3, "a driver, a rollout worker, an environment worker"
    driver.send_signal(how)
    if how == signal.SIGINT:
        time.sleep(0.5)
        driver.send_signal(how)
    driver.wait(30)
    deadline = time.monotonic() + 20
    while alive(family) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not alive(family)
    assert not shared_memory.left_behind(segments)


def test_a_learner_that_fails_ends_the_run_and_leaves_its_checkpoint(started, tmp_path, monkeypatch):
    from rove.workers.policy import PolicyWorker

    update = PolicyWorker.update

    def fails(self, batch, iteration, *hooks):
        if iteration == 1:
            raise FloatingPointError("the learner is ill")
        return update(self, batch, iteration, *hooks)

    monkeypatch.setattr(PolicyWorker, "update", fails)
    run = run_of(started)
    with pytest.raises((FloatingPointError, RoveError), match="the learner is ill"):
        train(run, tmp_path / "run")
    monkeypatch.undo()
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["iteration_000001"]
    assert len(measured(train(run, tmp_path / "run", resume=True))) == 3


def test_groups_train_the_same_in_stages(started, tmp_path):
    policy = replace(GRPO_RUN.policy, checkpoint=str(started))
    run = replace(GRPO_RUN, sft=None, policy=policy, evaluation=NO_EVALUATION)
    run = replace(
        run, training=replace(run.training, iterations=2, optim=replace(run.training.optim, warmup=0))
    )
    whole = measured(train(run, tmp_path / "whole"))
    cut = replace(run, placement=PlacementConfig(map="hybrid", deterministic=True))
    assert same(whole, measured(train(cut, tmp_path / "cut")))
