"""Vine sampling: what is compared, what is trained, and that trying leaves no trace."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from tests.faulty_env import FaultyConfig
from tests.unit.test_policy_openvla import CONFIG

from rove.algorithms import vine
from rove.algorithms.advantages import branch_relative
from rove.config.schema import RolloutConfig, Run, TabletopConfig, Vine
from rove.envs import registry
from rove.envs.sampler import EpisodeSampler
from rove.envs.tabletop.env import TabletopEnv
from rove.envs.tabletop.suite import TabletopSuite
from rove.errors import RoveError
from rove.policies.openvla import OpenVLA
from rove.reporting.summary import rollout_metrics
from rove.rollout.stage import StagePlan
from rove.runtime.local import InChild, InProcess
from rove.timing import Stopwatch
from rove.types import ActionSpec, PolicyOutput, Trajectory
from rove.workers.environment import Environments, EnvironmentWorker, Slots
from rove.workers.pipeline import Pipeline

RUN = Run(
    name="vine",
    algorithm=Vine(branches=4),
    env=TabletopConfig(reward="shaped"),
    rollout=RolloutConfig(num_envs=6, chunk=4, chunks=9),
)


def host_of(run: Run) -> Environments:
    """All slots of a run in this process."""
    slots = run.rollout.num_envs
    make = partial(EnvironmentWorker, [StagePlan(run, 0, 1, slots)])
    return Environments(partial(InProcess, "environments", make), [Slots(0, slots)])


GENERATOR = torch.Generator().manual_seed(0)


def test_a_try_is_compared_with_those_from_the_same_state() -> None:
    reward = torch.tensor([[[0.0, 1.0], [0.0, 3.0]], [[5.0, 0.0], [5.0, 0.0]]])  # [2 states, G = 2, C = 2]
    advantage, spread = branch_relative(reward, torch.ones_like(reward) > 0, gamma=0.5, floor=0.0)
    # Discounted: 0.5 and 1.5 to go from the first action of the first state, 1 and 3 from its second.
    torch.testing.assert_close(spread, torch.tensor([0.5**0.5, 0.0]))
    torch.testing.assert_close(advantage[0], torch.tensor([[-1.0, -1.0], [1.0, 1.0]]) / 2**0.5)
    assert torch.isnan(advantage[1]).all()  # what no floor would make of tries that bring the same
    advantage, _ = branch_relative(reward, torch.ones_like(reward) > 0, gamma=0.5, floor=0.1)
    assert (advantage[1] == 0).all()


def test_what_was_not_executed_takes_no_part() -> None:
    reward, executed = torch.rand(3, 4, 5, generator=GENERATOR), torch.ones(3, 4, 5, dtype=torch.bool)
    executed[:, 0, 3:] = False
    reward = reward * executed
    advantage, _ = branch_relative(reward, executed, gamma=0.9, floor=0.1)
    others, _ = branch_relative(reward[:, 1:], executed[:, 1:], gamma=0.9, floor=0.1)
    assert (advantage[:, 0, 3:] == 0).all()
    torch.testing.assert_close(advantage[:, 1:, 3:], others[..., 3:])
    assert not torch.allclose(advantage[:, 1:, :3], others[..., :3])


@pytest.fixture(scope="module")
def rollouts() -> dict[int, tuple[Trajectory, dict]]:
    """With 1 and with 4 branches: the rollout, and how the environment stands afterwards."""
    made = {}
    for branches in (1, 4):
        host = host_of(RUN)
        env = host.actor.worker.stages[0].env  # type: ignore[attr-defined]
        made[branches] = collect(host, env.action_spec, env.suite.vocabulary, branches), env.state_dict()
    return made


def collect(host: Environments, spec: ActionSpec, vocabulary: Sequence[str], branches: int) -> Trajectory:
    policy = OpenVLA.build(
        replace(CONFIG, value_head=None),
        chunk=4,
        action_spec=spec,
        image_size=64,
        vocabulary=vocabulary,
        statistics=None,
        seed=0,
    )
    with closing(Pipeline([host], policy, chunks=9, seed=1, critic=False, branches=branches)) as pipeline:
        return pipeline.collect(0, Stopwatch())


def test_a_worker_process_tries_as_this_one_does(rollouts) -> None:
    suite = TabletopSuite.from_config(TabletopConfig())
    make = partial(EnvironmentWorker, [StagePlan(RUN, 0, 1, 6)])
    worker = Environments(partial(InChild, "worker", make, deadline=60), [Slots(0, 6)])
    there, (here, _) = collect(worker, TabletopEnv.action_spec, suite.vocabulary, 4), rollouts[4]
    for name in ("sample", "logprob", "reward", "executed"):
        assert torch.equal(getattr(there.branches, name), getattr(here.branches, name)), name
    assert there.finished == here.finished


def test_branches_go_with_their_slots(rollouts) -> None:
    trajectory, _ = rollouts[4]
    left, right = (trajectory.slots(torch.tensor(index)) for index in ([0, 1, 2], [3, 4, 5]))
    both = Trajectory.cat([left, right])
    for name in ("sample", "logprob", "reward", "executed"):
        assert torch.equal(getattr(both.branches, name), getattr(trajectory.branches, name)), name


def test_trying_leaves_no_trace(rollouts) -> None:
    """With and without the other tries the same episodes run, to the last bit of the physics."""
    (plain, before), (tried, after) = rollouts[1], rollouts[4]
    assert plain.branches is None
    for name in ("sample", "logprob", "reward", "terminated", "truncated", "executed"):
        assert torch.equal(getattr(plain, name), getattr(tried, name)), name
    assert torch.equal(plain.observation.images, tried.observation.images)
    assert plain.finished == tried.finished and len(plain.finished) > 0
    assert before["specs"] == after["specs"] and before["queue"] == after["queue"]
    assert torch.equal(before["worlds"]["physics"], after["worlds"]["physics"])


def test_the_first_try_is_the_one_carried_on(rollouts) -> None:
    trajectory, _ = rollouts[4]
    branches = trajectory.branches
    for name in ("sample", "logprob", "reward", "executed"):
        assert torch.equal(getattr(branches, name)[:, :, 0], getattr(trajectory, name)), name
    assert (branches.sample[:, :, 1:] != branches.sample[:, :, :1]).any(-1).any(-1).all()
    assert branches.reward.std(2).max() > 0


def test_tries_count_as_simulated(rollouts) -> None:
    one, four = (rollout_metrics([rollouts[branches][0]], 1, {}, 1.0) for branches in (1, 4))
    assert one["rollout/simulated_steps"] == one["rollout/env_steps"] == four["rollout/env_steps"]
    tried = rollouts[4][0].branches.executed
    assert four["rollout/simulated_steps"] == int(tried.sum()) > 3 * four["rollout/env_steps"]


def test_a_try_answers_what_a_step_would() -> None:
    env = TabletopEnv(TabletopConfig(reward="shaped"), num_envs=5, chunk=8, autoreset="stop")
    sampler, generator = EpisodeSampler(env.suite, seed=2), np.random.default_rng(0)
    env.reset(sampler.take(4))  # one slot idles
    wanted, _ = env.step_expert_chunk(0.0, generator)
    actions = torch.stack([wanted, torch.zeros_like(wanted), wanted.flip(0)], dim=1)
    reward, executed = env.try_chunks(actions)
    saved = env.state_dict()
    for g in range(3):
        env.load_state_dict(saved)
        result = env.step_chunk(actions[:, g])
        assert torch.equal(result.reward, reward[:, g]) and torch.equal(result.executed, executed[:, g])
    assert not executed[4].any()
    with pytest.raises(RoveError, match="non-finite"):
        env.try_chunks(actions * torch.nan)
    env.close()


def test_rows_are_states_and_learn_from_all_tries(rollouts) -> None:
    trajectory, _ = rollouts[4]
    config = Vine(branches=4)
    batch, metrics = vine.prepare([trajectory], config)
    n = int(trajectory.executed.any(-1).sum())
    assert batch.sample.shape == (n, 4, 4, 5) and batch.advantage.shape == batch.mask.shape == (n, 4, 4)
    assert metrics["train/branch_spread"] > 0
    logprob = batch.logprob.clone().requires_grad_()
    output = PolicyOutput(logprob, torch.zeros_like(logprob), None)
    loss, _ = vine.loss(output, batch, config, denominator=float(batch.mask.sum()))
    loss.backward()
    # At a ratio of 1 the gradient is minus the advantage, over what counts.
    expected = -(batch.advantage * batch.mask)[..., None].expand_as(logprob) / batch.mask.sum()
    torch.testing.assert_close(logprob.grad, expected)


def test_a_chunk_can_have_one_ratio(rollouts) -> None:
    """It counts where anything of it was executed, by its return from the first action on."""
    trajectory, _ = rollouts[4]
    (by_action, _), (batch, _) = (
        vine.prepare([trajectory], Vine(branches=4, ratio_level=level)) for level in ("action", "chunk")
    )
    assert torch.equal(batch.advantage, by_action.advantage[..., :1])
    assert torch.equal(batch.mask, by_action.mask.any(-1, keepdim=True))
    logprob = batch.logprob.clone().requires_grad_()
    output = PolicyOutput(logprob, torch.zeros_like(logprob), None)
    loss, _ = vine.loss(
        output, batch, Vine(branches=4, ratio_level="chunk"), denominator=float(batch.mask.sum())
    )
    loss.backward()
    expected = -(batch.advantage * batch.mask)[..., None].expand_as(logprob) / batch.mask.sum()
    torch.testing.assert_close(logprob.grad, expected)


def test_a_rollout_without_branches_is_refused(rollouts) -> None:
    with pytest.raises(ValueError, match="branches"):
        vine.prepare([rollouts[1][0]], Vine())


def test_an_environment_that_cannot_try_is_refused() -> None:
    registry.register(FaultyConfig, "tests.faulty_env")
    run = replace(RUN, env=FaultyConfig())
    with pytest.raises(RoveError, match="choose --algorithm"):
        host_of(run)
