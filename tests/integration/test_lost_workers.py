"""Workers that are killed, or stopped and so hung, before each kind of call: replaced, or the run ends with
their name and its newest checkpoint.

Each case waits for processes to start and for deadlines to pass: `make test-faults` runs them.
"""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from tests.integration.test_placement import APART, SHORT, measured, run_of, started
from tests.integration.test_resume import EvaluationConfig, LoggingConfig

from rove.cluster.executor import Executor
from rove.errors import RoveError
from rove.runtime.local import InChild, InProcess
from rove.runtime.ray import InActor
from rove.train import train
from rove.workers.policy import PolicyWorker

pytestmark = pytest.mark.slow
__all__ = ["started"]

full = pytest.mark.skipif("FAULTS_FULL" not in os.environ, reason="long: make test-faults runs it")
KILL, STOP = signal.SIGKILL, signal.SIGSTOP
CALLS = ("sync", "collect", "update", "evaluate", "state_dict", "save_policy")
ON_RAY = ("collect", "evaluate", "save_policy")
"""Of which another process is asked over Ray; what else of Ray's there is does not depend on the call."""
DEADLINE = 10.0
"""Seconds: a busy machine needs some for a chunk, or for a beat of a process that is well."""


Strike = tuple[str, signal.Signals]
"""A call, and what a worker's process is sent before it."""


def in_turn(calls: Sequence[str], first: signal.Signals, second: signal.Signals) -> list[Strike]:
    """One of the two before each call. A run takes half a minute for each, most of it to start a process."""
    return list(zip(calls, itertools.cycle((first, second)), strict=False))


def strike(monkeypatch: pytest.MonkeyPatch, when: dict[int, Strike], victim) -> list[str]:
    """Have a worker's process signalled once before the call `when[i]` in iteration i, from 0; `victim`
    finds its process. Returns the calls, as they come."""
    struck: list[str] = []

    def wrap(owner: type[Executor], call: str) -> None:
        asked = getattr(owner, call)

        def struck_first(self, *args, **kwargs):
            iteration = args[0] if call == "sync" else self.version
            wanted, how = when.get(iteration, (None, None))
            if wanted == call and how is not None and call not in struck:
                struck.append(call)
                os.kill(victim(self), how)
            return asked(self, *args, **kwargs)

        monkeypatch.setattr(owner, call, struck_first)

    calls = [call for call, _ in when.values()]
    for owner, call in itertools.product((Executor, *Executor.__subclasses__()), calls):
        if call in vars(owner):
            wrap(owner, call)
    return struck


def policy_apart(executor: Executor) -> int:
    worker = next(worker for worker in executor._workers if isinstance(worker, InChild))
    return worker.child.process.pid


def policy_on_ray(executor: Executor) -> int:
    import ray

    worker = executor._workers[executor.plan.apart[0]]
    assert isinstance(worker, InActor)
    return ray.get(worker._actor.__ray_call__.remote(lambda served: os.getpid()))


def environments(executor: Executor) -> int:
    """Of a policy that is in this process."""
    (holder,) = executor._workers
    assert isinstance(holder, InProcess)
    policy = holder.worker
    assert isinstance(policy, PolicyWorker) and policy.pipeline is not None
    actor = policy.pipeline.workers[0].actor
    assert isinstance(actor, InChild)
    return actor.child.process.pid


def second_learner(executor: Executor) -> int:
    learner = executor._workers[1]
    assert isinstance(learner, InChild)
    return learner.child.process.pid


def watched(run, iterations: int, *, evaluate: bool = True):
    """As short as it can be, with every kind of call in each iteration."""
    evaluation = EvaluationConfig(every=1, episodes=4, variant_episodes=0, num_envs=4)
    return replace(
        run,
        training=replace(run.training, iterations=iterations),
        evaluation=evaluation if evaluate else run.evaluation,
        logging=LoggingConfig(tensorboard=False, save_every=1, keep=20),
    )


@full
@pytest.mark.parametrize(
    ("victim", "strikes", "placement"),
    [
        (policy_apart, in_turn(CALLS, KILL, STOP), {"map": APART, "env_workers": 1, "deadline": DEADLINE}),
        (policy_apart, in_turn(CALLS, STOP, KILL), {"map": APART, "env_workers": 1, "deadline": DEADLINE}),
        (
            policy_on_ray,
            in_turn(ON_RAY, KILL, STOP),
            {"map": APART, "env_workers": 1, "deadline": 20.0, "executor": "ray"},
        ),
        (environments, in_turn(CALLS, STOP, KILL), {"map": "hybrid", "deadline": DEADLINE}),
    ],
    ids=["policy, killed first", "policy, stopped first", "policy on Ray", "environments"],
)
def test_a_worker_that_can_be_replaced_is_at_every_call(
    victim, strikes, placement, started, tmp_path, monkeypatch
):
    """Once in each iteration but the first and the last: what is found at its end is told with the next."""
    if victim is policy_on_ray:
        pytest.importorskip("rove.cluster.ray")
    calls = [call for call, _ in strikes]
    struck = strike(monkeypatch, dict(enumerate(strikes, start=1)), victim)
    run = watched(run_of(started, **placement), len(calls) + 2)
    lines = measured(train(run, tmp_path / "run"))
    assert struck == calls
    assert [line["step"] for line in lines] == list(range(1, len(calls) + 3))
    assert sum(line["rollout/restarts"] for line in lines) == len(calls), lines
    whole = SHORT.rollout.num_envs * SHORT.rollout.chunks
    assert all(0 < line["train/rows"] <= whole and "eval/success" in line for line in lines)


LEARNER_CASES = [
    pytest.param(call, how, id=f"{'killed' if how == KILL else 'stopped'} before {call}")
    for call, how in in_turn(CALLS, KILL, STOP)
]


@full
@pytest.mark.parametrize(("call", "how"), LEARNER_CASES)
def test_a_learner_that_is_lost_ends_the_run_with_its_name(call, how, started, tmp_path, monkeypatch):
    """One of two, in the second iteration; the checkpoint of the first is there, to go on from."""
    struck = strike(monkeypatch, {1: (call, how)}, second_learner)
    run = watched(run_of(started, learners=2, deadline=DEADLINE), 2, evaluate=call == "evaluate")
    said = "was killed by signal 9" if how == KILL else f"no sign of life for {DEADLINE:g} s"
    with pytest.raises(RoveError, match=f"learner 1 .*{said}"):
        train(run, tmp_path / "run")
    assert struck == [call]
    assert kept(tmp_path / "run") == ["iteration_000001"]
    if call == "update":
        monkeypatch.undo()
        assert len(measured(train(run, tmp_path / "run", resume=True))) == 2


def kept(directory: Path) -> list[str]:
    return sorted(path.name for path in (directory / "checkpoints").iterdir() if path.is_dir())
