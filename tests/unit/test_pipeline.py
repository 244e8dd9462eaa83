"""Overlapped rollouts: the same trajectories however they are cut, and what happens when a worker fails."""

from __future__ import annotations

import dataclasses
import os
import signal
from contextlib import closing
from functools import partial

import pytest
import torch
from tests.faulty_env import FaultyConfig, FaultyEnv
from tests.point_env import PointEnv
from torch import nn

from rove.algorithms import ppo
from rove.config.schema import GRPO, PPO, PlacementConfig, RolloutConfig, Run
from rove.envs import registry
from rove.errors import RoveError
from rove.rollout.stage import StagePlan
from rove.runtime.actor import Lost, Supervisor
from rove.runtime.local import InChild, InProcess
from rove.timing import Stopwatch
from rove.types import ActionChunk, Trajectory
from rove.workers.environment import Environments, EnvironmentWorker, Slots
from rove.workers.pipeline import Pipeline, Service

B, C, T = 8, 5, 6


class Pusher(nn.Module):
    """Pushes by a number that depends on the sampling noise and on what is seen, and on nothing else."""

    chunk = C
    sample_shape, sample_dtype = (C, 2), torch.int64
    value_head = nn.Identity()
    action_spec = PointEnv(1, "stop").action_spec

    def act(self, observation, mode, noise):
        u = noise.uniform(C * 2).reshape(-1, C, 2).float()
        shift = observation.images.float().mean((1, 2, 3, 4))[:, None, None] / 2550
        actions = (2 * u - 1 + shift).clamp(-1, 1)
        return ActionChunk(actions, (u * 255).long(), -u, self.value(observation))

    def value(self, observation):
        return observation.images.float().mean((1, 2, 3, 4))[:, None].repeat(1, C)


@pytest.fixture(autouse=True)
def _registered():
    registry.register(FaultyConfig, "tests.faulty_env")


def run_of(algorithm=PPO(), **fault) -> Run:
    return Run(
        "test",
        algorithm,
        env=FaultyConfig(**fault),  # pyright: ignore[reportArgumentType]
        rollout=RolloutConfig(num_envs=B, chunk=C, chunks=T),
    )


def hosts_of(run: Run, workers: int, stages: int, inside: bool, deadline: float = 60) -> list[Environments]:
    count, hosts = workers * stages, []
    b = B // count
    for w in range(workers):
        plans = [StagePlan(run, w * stages + i, count, b) for i in range(stages)]
        slots = [Slots((w * stages + i) * b, (w * stages + i + 1) * b) for i in range(stages)]
        make = partial(EnvironmentWorker, plans)
        kind = InProcess if inside else partial(InChild, deadline=deadline)
        hosts.append(Environments(partial(kind, f"worker {w}", make), slots))
    return hosts


def collect(
    run: Run, workers=1, stages=1, inside=False, rollouts=2, service: Service = "fixed", **options
) -> tuple[list[Trajectory], list[str]]:
    supervisor = Supervisor(options.pop("max_restarts", 3))
    deadline = options.pop("deadline", 60)
    pipeline = Pipeline(
        hosts_of(run, workers, stages, inside, deadline),
        Pusher(),
        chunks=T,
        seed=3,
        critic=isinstance(run.algorithm, PPO),
        service=service,
        supervisor=supervisor,
        **options,
    )
    with closing(pipeline):
        trajectories = [pipeline.collect(version, Stopwatch()) for version in range(rollouts)]
    return trajectories, supervisor.take_faults()


def assert_equal(a: Trajectory, b: Trajectory) -> None:
    for field in dataclasses.fields(Trajectory):
        x, y = getattr(a, field.name), getattr(b, field.name)
        if isinstance(x, torch.Tensor):
            assert torch.equal(x, y), field.name
    assert torch.equal(a.observation.images, b.observation.images)
    assert a.observation.instruction == b.observation.instruction
    assert (a.finished, a.version) == (b.finished, b.version)


@pytest.mark.parametrize(
    ("workers", "stages", "service"), [(1, 2, "fixed"), (2, 2, "fixed"), (2, 2, "first_ready")]
)
def test_worker_processes_collect_what_this_process_does(workers, stages, service):
    here, _ = collect(run_of(), 1, workers * stages, inside=True)
    there, faults = collect(run_of(), workers, stages, service=service)
    assert not faults
    assert any(t.finished for t in here) and any(bool(t.final_value.any()) for t in here)
    for a, b in zip(here, there, strict=True):
        assert_equal(a, b)


def test_values_that_no_action_needs_fill_the_policys_pauses():
    """While both stages are simulated, a few rows at a time; `fixed` leaves all to the end."""

    class Counting(Pusher):
        def value(self, observation):
            rows.append(len(observation))
            return super().value(observation)

    def counted(service: Service) -> tuple[Trajectory, list[int]]:
        rows.clear()
        hosts = hosts_of(run_of(fault="slow"), 1, 2, False)
        with closing(Pipeline(hosts, Counting(), chunks=T, seed=3, critic=True, service=service)) as pipeline:
            return pipeline.collect(0, Stopwatch()), list(rows)

    rows: list[int] = []
    (paused, pieces), (late, whole) = counted("first_ready"), counted("fixed")
    assert_equal(paused, late)
    assert pieces.count(1) >= B // 2 and whole.count(1) == 0
    assert sum(pieces) == sum(whole) and pieces[-1] <= whole[-1] - B // 2


def test_without_refill_a_slot_waits_for_the_next_rollout():
    """Every rollout begins B new episodes, and a slot whose episode has ended does nothing more."""
    refilled, _ = collect(run_of(), inside=True)
    waiting, _ = collect(run_of(PPO(refill=False)), inside=True)
    assert len(refilled[0].finished) > B
    for trajectory in waiting:
        assert sorted(record.slot for record in trajectory.finished) == list(range(B))
        lengths = torch.tensor(
            [record.length for record in sorted(trajectory.finished, key=lambda r: r.slot)]
        )
        assert torch.equal(trajectory.executed.sum((0, 2)), lengths)
    first, second = ({r.spec.seed for r in trajectory.finished} for trajectory in waiting)
    assert not first & second
    batch, _ = ppo.prepare([waiting[0]], PPO(refill=False))
    assert int(batch.mask.sum()) == int(waiting[0].executed.sum())


def test_groups_are_the_same_however_slots_are_cut_into_stages():
    run = run_of(GRPO(group_size=2))
    (whole, _), _ = collect(run, 1, 1, inside=True)
    (cut, _), _ = collect(run, 2, 2)
    assert_equal(whole, cut)


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("die", "exited with code 11"),
        ("raise", "ArithmeticError: the physics is broken"),
        ("nan", "gave one of nan as reward"),
        ("shape", "as reward, expected float32 [4, 5]"),
        ("hang", "did not answer"),
    ],
)
def test_a_worker_that_fails_is_replaced_and_its_episodes_are_run_again(fault, said, tmp_path):
    expected, _ = collect(run_of(), 2, 1)
    faulty = run_of(fault=fault, marker=str(tmp_path / "struck"))
    got, faults = collect(faulty, 2, 1, deadline=3 if fault == "hang" else 60)
    assert len(faults) == 1 and said in faults[0], faults
    for a, b in zip(expected, got, strict=True):
        assert_equal(a, b)


def test_episodes_under_way_begin_again_and_no_slot_is_lost(tmp_path):
    """Struck in the second rollout: episodes that had begun in the first one start over."""
    faulty = run_of(fault="die", chunk_number=T + 2, marker=str(tmp_path / "struck"))
    (first, second), faults = collect(faulty, 2, 1)
    (_, undisturbed), _ = collect(run_of(), 2, 1)
    assert len(faults) == 1 and bool(first.executed.any())
    assert bool(second.executed[:, : B // 2].any(2).all()), "a slot idled"
    clean = (
        slice(B // 2, B) if torch.equal(second.sample[:, B // 2 :], undisturbed.sample[:, B // 2 :]) else None
    )
    clean = clean or slice(0, B // 2)
    assert torch.equal(second.reward[:, clean], undisturbed.reward[:, clean]), (
        "the other worker was disturbed"
    )


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_worker_that_is_lost_between_rollouts_is_replaced_before_it_is_saved(how):
    """Its state is that of its episodes begun again, and the other worker's what it was."""
    supervisor = Supervisor(3)
    hosts = hosts_of(run_of(), 2, 1, False, deadline=1.5 if how == signal.SIGSTOP else 60)
    pipeline = Pipeline(hosts, Pusher(), chunks=T, seed=3, critic=True, supervisor=supervisor)
    with closing(pipeline):
        pipeline.collect(0, Stopwatch())
        whole = pipeline.state_dict()
        actor = hosts[0].actor
        assert isinstance(actor, InChild)
        os.kill(actor.child.process.pid, how)
        (again,), other = pipeline.state_dict()
        assert len(supervisor.take_faults()) == 1
        assert other[0]["env"] == whole[1][0]["env"]
        assert again["env"]["spec"] == whole[0][0]["env"]["spec"], "other episodes than it had"
        assert again["env"]["steps"] == [0] * (B // 2)
        assert bool(pipeline.collect(1, Stopwatch()).executed.any(2).any(0).all()), "a slot idled"


@pytest.mark.parametrize("inside", [True, False], ids=["in this process", "in a worker's"])
def test_processes_that_an_environment_replaces_itself_are_counted(inside, tmp_path):
    """As ManiSkill's, of which each simulates some of a worker's slots."""
    expected, _ = collect(run_of(), 2, 1)
    faulty = run_of(fault="replaces", marker=str(tmp_path / "struck"))
    got, faults = collect(faulty, 2, 1, inside=inside)
    assert faults == ["simulator 0 was killed by signal 9 (process 1)"]
    for a, b in zip(expected, got, strict=True):
        assert_equal(a, b)


def test_an_environment_replaces_its_processes_as_often_as_the_run_says():
    run = dataclasses.replace(run_of(), placement=PlacementConfig(max_restarts=1))
    with closing(StagePlan(run, 0, 1, B).build(0)) as stage:
        assert isinstance(stage.env, FaultyEnv)
        lost = Lost("simulator 0", "is gone")
        stage.env.supervisor.note(lost)
        with pytest.raises(RoveError, match=r"simulator 0 failed 2 times in a row.*placement\.max_restarts"):
            stage.env.supervisor.note(lost)


def test_a_worker_that_goes_on_failing_ends_the_run_with_its_own_error():
    with pytest.raises(
        RoveError, match=r"(?s)failed 2 times.*ArithmeticError: the physics is broken for good"
    ):
        collect(run_of(fault="always"), max_restarts=1)


def test_a_timeline_shows_simulation_and_inference_on_their_own_tracks(tmp_path):
    from rove.timing import write_trace

    watch = Stopwatch("policy", spans=True)
    pipeline = Pipeline(hosts_of(run_of(), 1, 2, False), Pusher(), chunks=T, seed=3, critic=True)
    with closing(pipeline):
        pipeline.collect(0, watch)
    spans = watch.take_spans()
    assert {(s.track, s.name) for s in spans} == {("worker 0", "simulation"), ("policy", "inference")}
    assert all(s.start <= s.end for s in spans)
    import json

    write_trace(tmp_path / "trace.json", spans)
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert sum(e["ph"] == "X" for e in events) == len(spans)
    assert {e["args"]["name"] for e in events if e["ph"] == "M"} == {"worker 0", "policy"}
