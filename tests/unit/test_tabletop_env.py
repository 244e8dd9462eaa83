"""The tabletop simulation: physics, predicates, rewards, the expert. The contract itself: tests/contract."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from rove.config.schema import TabletopConfig
from rove.envs.base import Demonstrator
from rove.envs.tabletop import layout, progress
from rove.envs.tabletop.env import TabletopEnv
from rove.envs.tabletop.tasks import DEMO_TASKS, FAMILIES, TRAIN_TASKS
from rove.envs.tabletop.worlds import setup
from rove.types import ChunkResult, EpisodeRecord, EpisodeSpec

CHUNK = 8


@pytest.fixture(scope="module")
def env() -> TabletopEnv:
    return TabletopEnv(TabletopConfig(tasks="train"), num_envs=24, chunk=CHUNK, autoreset="refill")


def finish(env: TabletopEnv, noise: float, seed: int = 0) -> list[EpisodeRecord]:
    """Let the expert end every episode, queue included."""
    generator, records = np.random.default_rng(seed), []
    while any(spec is not None for spec in env.specs):
        records += env.step_expert_chunk(noise, generator)[1].finished
    return records


def stay(env: TabletopEnv, gripper: float = 1.0) -> torch.Tensor:
    actions = torch.zeros(env.num_envs, CHUNK, env.action_spec.dim)
    actions[..., -1] = gripper
    return actions


def test_expert_solves_every_training_task(env: TabletopEnv) -> None:
    assert isinstance(env, Demonstrator)
    specs = [EpisodeSpec(task, i) for i in range(3) for task in TRAIN_TASKS]
    env.reset(specs[: env.num_envs])
    env.enqueue(specs[env.num_envs :])
    records = finish(env, noise=0.15)
    assert len(records) == len(specs)
    assert np.mean([r.success for r in records]) >= 0.95
    for family in FAMILIES:
        lengths = [r.length for r in records if r.success and r.spec.task.startswith(family)]
        assert np.mean(lengths) <= 20


def test_the_same_actions_fail_elsewhere(env: TabletopEnv) -> None:
    """A policy that does not look, however good its actions are somewhere else."""
    specs = [EpisodeSpec(DEMO_TASKS[i % len(DEMO_TASKS)], 100 + i) for i in range(env.num_envs)]
    env.reset(specs)
    actions = []
    for _ in range(2):
        actions.append(env.step_expert_chunk(0.0, np.random.default_rng(0))[0])
    env.reset([replace(spec, initial_state=spec.initial_state + 1000) for spec in specs])
    records = [r for chunk in actions for r in env.step_chunk(chunk).finished]
    assert sum(r.success for r in records) <= 0.1 * len(specs)


def test_objects_start_at_rest(env: TabletopEnv) -> None:
    env.reset([EpisodeSpec(task, 11) for task in TRAIN_TASKS])
    rows = np.arange(env.num_envs)
    before = env._worlds._qpos[:, env._worlds.scene.object_qpos[:, :3]].copy()
    env.step_chunk(stay(env))
    moved = np.abs(env._worlds._qpos[:, env._worlds.scene.object_qpos[:, :3]] - before)
    assert moved.max() < 2e-4
    assert not env._worlds.situation(rows).touched.any()


def test_colors_can_be_told_apart(env: TabletopEnv) -> None:
    """The target's colour is in the picture, the gripper's too."""
    observation = env.reset([EpisodeSpec("pick/red_cube", i) for i in range(8)])
    red, green, blue = observation.images[:8, 0].int().unbind(-1)
    assert (((red > 120) & (green < 60) & (blue < 60)).sum((1, 2)) >= 15).all()
    dark = (red < 80) & (green < 80) & (blue < 90)
    assert (dark.sum((1, 2)) >= 30).all()


def test_displaced_target_is_moved_once(env: TabletopEnv) -> None:
    env.reset([EpisodeSpec("pick/blue_brick", 5, "displaced"), EpisodeSpec("pick/blue_brick", 5)])
    before = env._worlds.situation(np.arange(2)).target
    env.step_chunk(stay(env))
    moved = np.linalg.norm((env._worlds.situation(np.arange(2)).target - before)[:, :2], axis=-1)
    assert moved[0] > 0.08
    assert moved[1] < 1e-3


def test_divergence_ends_one_episode_and_touches_no_other(
    env: TabletopEnv, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # MuJoCo writes its warnings to a file where it stands
    specs = [EpisodeSpec(task, 2) for task in DEMO_TASKS]

    def play(poison: bool) -> ChunkResult:
        env.reset(specs)
        if poison:
            env._worlds._qpos[3, env._worlds.scene.object_qpos[1, 0]] = np.nan
        return env.step_chunk(stay(env))

    clean, before = play(poison=False), env.diverged
    result = play(poison=True)
    assert env.diverged == before + 1
    assert result.truncated[3, 0]
    assert not result.success[3].any()
    assert result.executed[3].sum() == 1
    assert result.final_slots.tolist() == [3]
    others = [i for i in range(len(specs)) if i != 3]
    assert torch.equal(result.observation.images[others], clean.observation.images[others])


def test_shaped_rewards_telescope() -> None:
    env = TabletopEnv(TabletopConfig(reward="shaped"), num_envs=8, chunk=CHUNK, autoreset="stop")
    env.reset([EpisodeSpec(task, 4) for task in DEMO_TASKS])
    start = progress.potential(env._worlds.situation(np.arange(8)))
    for record in finish(env, noise=0.1):
        assert not record.truncated
        end = 1.0 if record.success else -1.0
        assert record.total_reward == pytest.approx(end - start[record.slot], abs=1e-6)


def test_the_shaped_reward_never_charges_for_what_the_expert_does() -> None:
    env = TabletopEnv(TabletopConfig(reward="shaped"), num_envs=16, chunk=CHUNK, autoreset="stop")
    env.reset([EpisodeSpec(task, state) for task in DEMO_TASKS for state in (4, 5)])
    while any(env.specs):
        _, result = env.step_expert_chunk(0.0, np.random.default_rng(0))
        assert result.reward.min() > -0.03


def test_noise_moves_the_expert_and_leaves_what_it_wanted() -> None:
    """Only the last action of a chunk is pushed, so that the first chunk is asked for alike."""
    chunks, pictures = [], []
    for noise in (0.0, 0.5):
        env = TabletopEnv(TabletopConfig(), num_envs=8, chunk=4, autoreset="stop")
        env.reset([EpisodeSpec(task, 4) for task in DEMO_TASKS])
        actions, result = env.step_expert_chunk(noise, np.random.default_rng(0))
        chunks.append(actions)
        pictures.append(result.observation.images)
    assert torch.equal(*chunks) and not torch.equal(*pictures)


def test_failing_costs_what_was_gained() -> None:
    """Were the end of every episode worth the same, failing would pay for what was left to do."""
    env = TabletopEnv(TabletopConfig(reward="shaped"), num_envs=1, chunk=CHUNK, autoreset="stop")
    env.reset([EpisodeSpec("pick/red_cube", 4)])
    env._worlds._qpos[0, env._worlds.scene.object_qpos[0, 0]] = 0.5  # the target is beyond reach
    actions = torch.zeros(1, CHUNK, env.action_spec.dim)
    assert env.step_chunk(actions).reward[0, 0] < -0.3


# --- predicates -----------------------------------------------------------------------------------


def situation(family: str, **changes: object) -> progress.Situation:
    """One slot in which the goal of a family is reached."""
    base = progress.Situation(
        family=np.array([FAMILIES.index(family)]),
        gripper=np.array([[0.0, 0.0, 0.1, 0.0]]),
        target=np.array([[0.0, 0.0, {"pick": 0.1, "put": 0.031, "stack": 0.069, "push": 0.023}[family]]]),
        half_height=np.array([0.023]),
        destination=np.array([[0.0, 0.0, {"put": 0.008, "stack": 0.046}.get(family, 0.0)]]),
        touched=np.array([[family == "pick"] * 2]),
        supported=np.array([family in ("put", "stack")]),
        open=np.array([family != "pick"]),
    )
    return replace(base, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("family", FAMILIES)
def test_goals(family: str) -> None:
    reached = situation(family)
    assert progress.achieved(reached).all()
    assert not progress.failed(reached).any()
    assert -1 <= progress.potential(reached)[0] <= 0


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("pick", {"touched": np.array([[True, False]])}),
        ("pick", {"target": np.array([[0.0, 0.0, 0.06]])}),
        ("put", {"open": np.array([False])}),
        ("put", {"touched": np.array([[True, False]])}),
        ("put", {"supported": np.array([False])}),
        ("put", {"target": np.array([[0.06, 0.0, 0.031]])}),
        ("stack", {"target": np.array([[0.03, 0.0, 0.069]])}),
        ("stack", {"target": np.array([[0.0, 0.0, 0.1]])}),
        ("push", {"target": np.array([[0.06, 0.0, 0.023]])}),
        ("push", {"touched": np.array([[True, True]])}),
    ],
)
def test_near_misses(family: str, changes: dict) -> None:
    assert not progress.achieved(situation(family, **changes)).any()


def test_failures() -> None:
    assert progress.failed(situation("push", target=np.array([[0.0, 0.0, 0.08]]))).all()
    assert not progress.failed(situation("put", target=np.array([[0.0, 0.0, 0.08]]))).any()
    assert progress.failed(situation("put", target=np.array([[0.31, 0.0, 0.023]]))).all()


def test_a_picture_to_point_in_lays_its_scene_out_once(env, monkeypatch):
    """What is shown and what is asked for are of one layout; seeds, which episodes have, change no scene."""
    laid, objects = [], layout._objects
    setup.cache_clear()
    monkeypatch.setattr(layout, "_objects", lambda *given: laid.append(given) or objects(*given))
    episodes = [EpisodeSpec(TRAIN_TASKS[i], 4000 + i, seed=17 + i) for i in range(4)]
    assert len(env.ground(episodes).images) == len(laid) == len(episodes)
