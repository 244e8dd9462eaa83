"""Rounds of relabelling: policy and expert take turns, and what the expert did is learned from."""

from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest
import torch

from rove import recipes
from rove.config.schema import TabletopConfig
from rove.envs import registry
from rove.errors import RoveError
from rove.policies import registry as policies
from rove.reporting.log import Logger
from rove.reporting.progress import Progress
from rove.training import sft
from rove.training.demonstrations import collect_demonstrations, join, load_demonstrations
from rove.types import EpisodeSpec


@pytest.fixture(scope="module")
def env():
    with closing(
        registry.make(TabletopConfig(tasks="pick/red_cube"), num_envs=8, chunk=4, autoreset="refill")
    ) as made:
        yield made


def test_only_what_the_expert_did_is_shown(env):
    """A policy that goes up and to the side: the expert comes back from there, as it never would alone."""
    away = torch.tensor([0.01, 0.01, 0.01, 0.0, 1.0]).expand(8, 4, 5)
    asked = []

    def drive(seen):
        asked.append(len(seen))
        return away

    records = []
    made = collect_demonstrations(
        env, episodes=12, noise=0.0, seed=3, on_episode=records.append, drive=drive, stream=3
    )
    assert asked and set(asked) == {8}
    executed = sum(record.length for record in records if record.success)
    assert 0.2 * executed < int(made.mask.sum()) < 0.8 * executed, "both acted, and one is shown"
    same = (made.actions == away[0]).all(-1) & made.mask
    assert not same.any()
    alone = collect_demonstrations(env, episodes=12, noise=0.0, seed=3)
    assert made.state is not None and alone.state is not None
    assert made.state[:, 2].max() > alone.state[:, 2].max() + 0.01, "from higher up than the expert goes"


def test_a_policy_that_spoils_everything_is_named():
    """It opens the hand and goes up whenever it acts, in episodes too short to mend that."""
    config = TabletopConfig(tasks="pick/red_cube", horizon=8)
    with closing(registry.make(config, num_envs=8, chunk=4, autoreset="refill")) as short:
        away = torch.tensor([0.04, 0.04, 0.04, 0.0, 1.0]).expand(8, 4, 5)
        with pytest.raises(RoveError, match="taking turns, fail too often .* set sft.relabel to 0"):
            collect_demonstrations(short, episodes=500, noise=0.0, seed=3, drive=lambda seen: away, stream=3)


def test_an_expert_that_looks_on_leaves_the_others_alone(env):
    task = "pick/red_cube"
    episodes = [EpisodeSpec(task, n) for n in range(8)]
    generator = np.random.default_rng(0)
    env.reset(episodes)
    wanted, alone = env.step_expert_chunk(0.0, generator)
    env.reset(episodes)
    odd = np.arange(8) % 2 == 1
    env.watch(odd, torch.zeros(8, 4, 5))
    seen, beside = env.step_expert_chunk(0.0, generator)
    assert torch.equal(wanted[::2], seen[::2])
    assert torch.equal(alone.observation.images[::2], beside.observation.images[::2])
    assert not torch.equal(alone.observation.images[1::2], beside.observation.images[1::2])
    assert torch.equal(wanted[1::2, 0], seen[1::2, 0]), "it stands as it stood"
    _, after = env.step_expert_chunk(0.0, generator)
    env.reset(episodes)
    env.step_expert_chunk(0.0, generator)
    _, again = env.step_expert_chunk(0.0, generator)
    assert torch.equal(after.observation.images[::2], again.observation.images[::2]), "once is for one chunk"


def test_parts_are_joined_with_their_states_and_episodes(env):
    parts = [collect_demonstrations(env, episodes=3, noise=0.0, seed=seed) for seed in (1, 2)]
    joined = join(parts)
    assert joined.state is not None and torch.equal(joined.state, torch.cat([part.state for part in parts]))
    assert joined.episode.tolist() == parts[0].episode.tolist() + [3 + n for n in parts[1].episode.tolist()]
    assert join([parts[0], replace(parts[1], state=None)]).state is None


RUN = recipes.get("tabletop_vine").build()
RUN = replace(
    RUN,
    env=replace(RUN.env, tasks="pick/red_cube"),
    rollout=replace(RUN.rollout, num_envs=8, emphasis=()),
    sft=replace(
        RUN.sft, episodes=8, emphasis=(), slips=0.0, steps=4, grounding=16, grounding_steps=2, relabel=2,
        relabel_episodes=4, relabel_steps=3, batch=8, micro_batch=8, optim=replace(RUN.sft.optim, warmup=1),
    ),
)  # fmt: skip


class Stopped(Exception):
    pass


def warm_up(run, directory, stop_at=None, monkeypatch=None):
    """The weights that a warm-up ends with; `stop_at` is the step, of all of its steps, before which it is
    stopped."""
    steps, own = 0, sft._imitation

    def counted(*given):
        gradient = own(*given)

        def step(rows, number):
            nonlocal steps
            if steps == stop_at:
                raise Stopped
            steps += 1
            return gradient(rows, number)

        return step

    if monkeypatch is not None:
        monkeypatch.setattr(sft, "_imitation", counted)
    directory.mkdir(exist_ok=True)
    with Logger(directory, tensorboard=False, wandb=False) as log, Progress("test", 1) as progress:
        return policies.load(sft.warm_up(run, directory, log, progress)).state_dict()


def test_a_warm_up_that_was_stopped_in_a_round_goes_on_where_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr("rove.training.snapshots.time.monotonic", iter(range(0, 10**9, 1000)).__next__)
    whole = warm_up(RUN, tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        warm_up(RUN, tmp_path / "stopped", 4 + 3 + 2, patch)
    assert not (tmp_path / "stopped" / "sft").exists()
    with monkeypatch.context() as patch:
        taken = phases(patch)
        again = warm_up(RUN, tmp_path / "stopped")
    assert taken == ["relabelled_2"]
    assert whole.keys() == again.keys() and all(torch.equal(whole[name], again[name]) for name in whole)


def phases(monkeypatch):
    """The phases that are trained from here on, as they come."""
    taken, own = [], sft.fit
    monkeypatch.setattr(sft, "fit", lambda *a, **k: taken.append(k.get("phase", "sft")) or own(*a, **k))
    return taken


def test_a_warm_up_that_is_to_have_more_rounds_goes_on_with_those(tmp_path, monkeypatch):
    """It ends as if it had been asked for all of them at once."""
    none, one = (replace(RUN, sft=replace(RUN.sft, relabel=number)) for number in (0, 1))
    plain = warm_up(none, tmp_path / "more")
    taken = phases(monkeypatch)
    first = warm_up(one, tmp_path / "more")
    assert taken == ["relabelled_1"] and any(not torch.equal(plain[name], first[name]) for name in plain)
    made = (tmp_path / "more" / "relabelled_1.npz").read_bytes()
    second = warm_up(RUN, tmp_path / "more")
    assert taken == ["relabelled_1", "relabelled_2"]
    assert (tmp_path / "more" / "relabelled_1.npz").read_bytes() == made
    assert len(load_demonstrations(tmp_path / "more" / "relabelled_2.npz"))
    whole = warm_up(RUN, tmp_path / "whole")
    assert whole.keys() == second.keys() and all(torch.equal(whole[name], second[name]) for name in whole)


def test_a_round_that_is_stopped_after_a_warm_up_goes_on_where_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr("rove.training.snapshots.time.monotonic", iter(range(0, 10**9, 1000)).__next__)
    one = replace(RUN, sft=replace(RUN.sft, relabel=1))
    whole = warm_up(one, tmp_path / "whole")
    warm_up(replace(RUN, sft=replace(RUN.sft, relabel=0)), tmp_path / "stopped")
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        warm_up(one, tmp_path / "stopped", 2, patch)
    taken = phases(monkeypatch)
    again = warm_up(one, tmp_path / "stopped")
    assert taken == ["relabelled_1"]
    assert whole.keys() == again.keys() and all(torch.equal(whole[name], again[name]) for name in whole)


def test_an_expert_that_cannot_look_on_is_refused_before_any_work(monkeypatch, tmp_path):
    monkeypatch.delattr("rove.envs.chunked.ChunkedEnv.watch")
    with pytest.raises(RoveError, match="cannot look on: set --sft.relabel 0"):
        warm_up(RUN, tmp_path)
