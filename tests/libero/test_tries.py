"""Trying chunks and putting everything back, and the dense reward that the tries are compared by."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from rove import recipes
from rove.checkpoint import save_policy
from rove.config import load as config
from rove.config.schema import LiberoConfig
from rove.envs import registry
from rove.envs.base import Brancher
from rove.envs.libero import package, worlds
from rove.envs.libero.env import LiberoEnv
from rove.envs.libero.grasps import UP
from rove.envs.libero.progress import FULL_WAY, Sight
from rove.envs.libero.scenes import load_task
from rove.envs.libero.suite import LiberoSuite
from rove.envs.libero.worlds import Group
from rove.policies import registry as registry_of_policies
from rove.train import train
from rove.types import ChunkResult, EpisodeSpec

STOVE = "goal/turn_on_the_stove"
SOUP = "object/pick_up_the_alphabet_soup_and_place_it_in_the_basket"
CHEESE = "object/pick_up_the_cream_cheese_and_place_it_in_the_basket"
DRAWER = "goal/open_the_top_drawer_and_put_the_bowl_inside"
PLATE = "goal/push_the_plate_to_the_front_of_the_stove"
SUITES = (
    "spatial/pick_up_the_black_bowl_in_the_top_drawer_of_the_wooden_cabinet_and_place_it_on_the_plate",
    "spatial/pick_up_the_black_bowl_on_the_stove_and_place_it_on_the_plate",
    "object/pick_up_the_milk_and_place_it_in_the_basket",
    "object/pick_up_the_butter_and_place_it_in_the_basket",
    "goal/open_the_middle_drawer_of_the_cabinet",
    PLATE,
    "10/KITCHEN_SCENE4_put_the_black_bowl_in_the_bottom_drawer_of_the_cabinet_and_close_it",
    "10/LIVING_ROOM_SCENE5_put_the_white_mug_on_the_left_plate_and_put_the_yellow_and_white_mug_on_the_right_plate",
    "90/KITCHEN_SCENE8_turn_off_the_stove",
    "90/KITCHEN_SCENE6_close_the_microwave",
)
"""Two tasks of every suite, each predicate among them."""


def make(tasks: str, num_envs: int = 3, **settings) -> LiberoEnv:
    settings = {"renderer": "none", "horizon": 40, "wait": 5, "reward": "shaped", "threads": 2} | settings
    env = registry.make(LiberoConfig(tasks=tasks, **settings), num_envs=num_envs, chunk=4, autoreset="refill")
    assert isinstance(env, LiberoEnv) and isinstance(env, Brancher)
    return env


def chunks(env: LiberoEnv, tries: int, seed: int) -> Tensor:
    """Large random actions, float32 [B, tries, C, 7]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(env.num_envs, tries, env.chunk, 7, generator=generator) * 1.98 - 0.99


def arrays(env: LiberoEnv) -> Iterator[np.ndarray]:
    """Everything that is known of the worlds."""
    for place in env.worlds.places:
        if place is not None:
            group = place.group
            yield from (group.batch.state, *group.data.values(), *group._fields().values())
            yield from group.body_poses(place.row)


def way(group: Group, row: int) -> float:
    """The metres that are left in a world."""
    rows = np.array([row])
    return float(group.left(rows, group.sight(rows))[0])


def same(one: ChunkResult, other: ChunkResult) -> bool:
    names = ("reward", "terminated", "truncated", "success", "executed")
    seen = one.observation.images, one.observation.state
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in names) and all(
        a is not None and b is not None and torch.equal(a, b)
        for a, b in zip(seen, (other.observation.images, other.observation.state), strict=True)
    )


@pytest.mark.parametrize(
    "tasks", [(STOVE, SOUP), *(pytest.param((task,), marks=pytest.mark.libero_full) for task in SUITES)]
)
def test_tries_leave_no_trace_and_tell_what_a_step_would_bring(tasks: tuple[str, ...]) -> None:
    episodes = [EpisodeSpec(tasks[i % len(tasks)], 40 + i) for i in range(2)]  # one slot idles
    with (
        closing(make(",".join(tasks), renderer="warp", image_size=32)) as env,
        closing(make(",".join(tasks), renderer="warp", image_size=32)) as untouched,
    ):
        env.reset(episodes)
        untouched.reset(episodes)
        for t in range(3):
            chosen = chunks(env, tries=4, seed=t)
            before, state = [array.copy() for array in arrays(env)], env.state_dict()
            reward, executed = env.try_chunks(chosen)
            assert all(map(np.array_equal, before, arrays(env)))
            assert torch.equal(env.elapsed, state["elapsed"])
            assert not executed[2].any() and not reward[2].any(), "a slot that idles tries nothing"
            assert (reward[:2].sum(-1).std(1) > 0).all(), "other actions, other rewards"
            result = env.step_chunk(chosen[:, 3])
            assert torch.equal(result.reward, reward[:, 3]) and torch.equal(result.executed, executed[:, 3])
            assert same(result, untouched.step_chunk(chosen[:, 3]))


def test_a_try_that_changes_nothing_brings_exactly_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    with closing(make(f"{STOVE},{SOUP}")) as env:
        env.reset([EpisodeSpec(STOVE, 40), EpisodeSpec(SOUP, 40)])
        env.step_chunk(chunks(env, 1, seed=0)[:, 0])
        monkeypatch.setattr(worlds, "SUBSTEPS", 0)
        reward, executed = env.try_chunks(chunks(env, 3, seed=1))
    assert executed[:2].all() and not reward.any()


def test_a_try_that_diverges_harms_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    act = Group.act

    def explode(group: Group, rows: np.ndarray, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        group.data["qvel"][rows[actions[:, 6] == -1.0]] = np.nan
        return act(group, rows, actions)

    with closing(make(STOVE)) as env:
        env.reset([EpisodeSpec(STOVE, 40), EpisodeSpec(STOVE, 41)])
        chosen = chunks(env, 2, seed=0)
        expected, _ = env.try_chunks(chosen)
        before = [array.copy() for array in arrays(env)]
        bad = chosen.clone()
        bad[:, 0, 1, 6] = -1.0
        with monkeypatch.context() as patch:
            patch.setattr(Group, "act", explode)
            reward, executed = env.try_chunks(bad)
        assert executed[:2, 0].sum(-1).tolist() == [2, 2], "the second action ends it"
        assert torch.equal(reward[:, 1], expected[:, 1]) and torch.isfinite(reward).all()
        assert all(map(np.array_equal, before, arrays(env)))
        assert env.diverged == 0
        assert torch.equal(env.try_chunks(chosen)[0], expected), "nothing is left of it in the spare worlds"


def test_an_episode_that_ends_in_a_try_executes_no_more_of_it() -> None:
    with closing(make(STOVE, horizon=6)) as env:
        env.reset([EpisodeSpec(STOVE, 40)])
        env.step_chunk(chunks(env, 1, seed=0)[:, 0])
        reward, executed = env.try_chunks(chunks(env, 2, seed=1))
    assert executed[0].tolist() == [[True, True, False, False]] * 2
    assert not reward[0, :, 2:].any()


@pytest.mark.parametrize("task", [SOUP, PLATE, DRAWER])
def test_the_way_that_is_left_falls_along_the_experts(task: str) -> None:
    """And an episode's rewards add up to success and all of the way."""
    with closing(make(task, horizon=300)) as env:
        env.reset([EpisodeSpec(task, 43), EpisodeSpec(task, 47)])
        places, generator = env.worlds.places[:2], np.random.default_rng(0)
        left = np.array([way(place.group, place.row) for place in places if place])
        path, total = [left], torch.zeros(2, dtype=torch.float64)
        while any(env.specs):
            result = env.step_expert_chunk(0.0, generator)[1]
            total += result.reward[:2].double().sum(1)
            path.append(path[-1] - FULL_WAY * result.reward[:2].double().sum(1).numpy())
        assert all(record.success for record in result.finished)
    np.testing.assert_allclose(total, 1 + left / FULL_WAY, atol=1e-5)
    assert (0.8 < left).all() and (left < 1.0 + FULL_WAY).all()
    steps = np.diff(np.array(path[:-3]), axis=0)  # four actions each, until it lets go
    assert (steps < 0.03).all() and (steps < 0).mean() > 0.8


def at_its_grasp(task: str) -> tuple[Group, Sight]:
    """A world at its beginning, but for the hand, which is at the grasp of what the goal names."""
    model = load_task(task)
    group = Group(model.scene, 1, "stock", guided=True)
    group.start(0, model, 0)
    for _ in range(15):  # things fall to where they lie
        group.act(np.array([0]), worlds.WAIT_ACTION[None])
    group.begin(0)
    assert group._guide is not None
    sight = group.sight(np.array([0]))
    grasp = sight.where[:, 0] + sight.frame[:, 0].reshape(3, 3) @ group._guide.grasp[0, 0, :3]
    return group, sight._replace(hand=grasp)


@pytest.mark.parametrize(("over", "holds"), [(0.002, True), (0.025, False)])
def test_fingers_that_close_where_they_hold_nothing_have_a_longer_way(over: float, holds: bool) -> None:
    """Over the top of a box 18 mm high: vine sampling would teach them to."""
    group, sight = at_its_grasp(CHEESE)
    at = sight._replace(hand=sight.hand + over * UP)
    opened, closed = (
        group.left(np.array([0]), at._replace(gripper=np.full((1, 2), grip)))[0] for grip in (-1.0, 1.0)
    )
    assert (closed < opened) == holds


@pytest.mark.parametrize(("task", "lifted"), [(CHEESE, True), (PLATE, False)])
def test_what_is_drawn_along_need_not_be_lifted(task: str, lifted: bool) -> None:
    group, sight = at_its_grasp(task)
    held = sight._replace(gripper=np.ones((1, 2)))
    up = held._replace(hand=held.hand + 0.03 * UP, where=held.where + 0.03 * UP)
    before, after = (group.left(np.array([0]), one)[0] for one in (held, up))
    assert (after < before) == lifted


@pytest.mark.parametrize(
    ("task", "lever"),
    [
        (STOVE, (0.03, 0.08)),
        pytest.param("goal/open_the_middle_drawer_of_the_cabinet", (1, 1), marks=pytest.mark.libero_full),
        pytest.param("90/KITCHEN_SCENE6_close_the_microwave", (0.2, 0.3), marks=pytest.mark.libero_full),
        pytest.param("90/KITCHEN_SCENE8_turn_off_the_stove", (0.03, 0.08), marks=pytest.mark.libero_full),
    ],
)
def test_a_joint_is_followed_to_its_limit(task: str, lever: tuple[float, float]) -> None:
    """Nothing is left of the way where the goal holds, and before that each bit of the joint's way counts."""
    model = load_task(task)
    group = Group(model.scene, 1, "stock", guided=True)
    group.start(0, model, 40)
    group.begin(0)
    rows, spec = np.array([0]), model.goal[0]
    joint = model.model.jnt_qposadr[model.model.joint(spec["joints"][0]).id]
    towards = 1.0 if ">" in spec["comparison"] else -1.0

    def left(beyond: float) -> float:
        group.data["qpos"][0, joint] = spec["limit"] + towards * beyond
        group.refresh(rows)
        assert bool(group.judge(rows)[0]) == (way(group, 0) == 0.0)
        return way(group, 0)

    near, far = left(-1e-6), left(-0.02)
    assert left(1e-6) == 0.0
    # the handle moves with its joint, so the hand's way to it counts besides
    assert abs(far - near) < 0.02 * (2 * lever[1] + 0.05)
    assert near > 0.05, "the hand is not there yet"


@pytest.mark.libero_full
def test_every_task_has_a_way() -> None:
    for name in (task for suite in package.SUITES["130"] for task in package.tasks(suite)):
        task = load_task(name)
        group = Group(task.scene, 1, "stock", guided=True)
        group.start(0, task, 0)
        group.begin(0)
        left = way(group, 0)
        assert 0.1 < left < 0.1 + 2.5 * (len(task.goal) + 1), name


def test_vine_sampling_trains_on_it(tmp_path: Path) -> None:
    """By overrides of a recipe alone, from a policy that has seen nothing."""
    base = recipes.build("libero_object_grpo")
    policy = registry_of_policies.build(
        replace(base.policy, proprio=False),
        chunk=4,
        action_spec=LiberoEnv.action_spec,
        image_size=32,
        vocabulary=LiberoSuite(LiberoConfig(tasks=SOUP)).vocabulary,
        statistics={f"libero:{SOUP}": {"action": {"q01": [-1.0] * 7, "q99": [1.0] * 7, "mask": [True] * 7}}},
        seed=0,
    )
    words = f"""
        --algorithm.kind vine --algorithm.branches 3 --env.reward shaped --env.tasks {SOUP}
        --env.image_size 32 --env.horizon 24 --env.wait 2 --rollout.num_envs 2 --rollout.chunk 4
        --rollout.chunks 2 --sft none --policy.checkpoint {save_policy(tmp_path / "policy", policy)}
        --training.iterations 2 --training.batch 4 --training.micro_batch 4 --training.optim.warmup 0
        --evaluation.every 0 --evaluation.episodes 0
    """
    directory = train(config.apply(base, words.split()), tmp_path / "run")
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    spread = [line["train/branch_spread"] for line in lines if "train/branch_spread" in line]
    assert len(spread) == 2 and min(spread) > 0
