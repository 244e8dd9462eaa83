"""The LIBERO environment around its physics: suites, resets, faults, the cache."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from rove.config.schema import EvaluationConfig, LiberoConfig
from rove.envs import registry
from rove.envs.libero import package, scenes
from rove.envs.libero.env import LiberoEnv
from rove.envs.libero.suite import LiberoSuite
from rove.errors import RoveError
from rove.evaluation import report
from rove.evaluation.checkpoint import evaluate_checkpoint
from rove.types import EpisodeSpec

STOVE = "goal/turn_on_the_stove"
SOUP = "object/pick_up_the_alphabet_soup_and_place_it_in_the_basket"
CONFIG = LiberoConfig(tasks=f"{STOVE},{SOUP}", renderer="none", horizon=16, wait=2, threads=2)


@contextmanager
def environment(config: LiberoConfig = CONFIG, num_envs: int = 2) -> Iterator[LiberoEnv]:
    env = registry.make(config, num_envs=num_envs, chunk=4, autoreset="refill")
    assert isinstance(env, LiberoEnv)
    try:
        yield env
    finally:
        env.close()


@pytest.mark.parametrize(
    ("tasks", "count", "variants"),
    [("spatial", 10, 4), ("object", 10, 4), ("goal", 10, 4), ("10", 10, 4), ("90", 90, 0), ("130", 130, 0)],
)
def test_suites(tasks: str, count: int, variants: int) -> None:
    suite = LiberoSuite(LiberoConfig(tasks=tasks))
    assert len(set(suite.tasks)) == count
    assert len(suite.variants) == variants
    assert all(
        set(suite.instruction(EpisodeSpec(task, 0)).split()) <= set(suite.vocabulary) for task in suite.tasks
    )


def test_instructions_are_the_published_ones() -> None:
    suite = LiberoSuite(LiberoConfig(tasks="goal,90"))
    drawer = "90/KITCHEN_SCENE10_close_the_top_drawer_of_the_cabinet"
    assert suite.instruction(EpisodeSpec(drawer, 0)) == "close the top drawer of the cabinet"
    reworded = LiberoSuite(LiberoConfig(tasks="goal")).instruction(EpisodeSpec(STOVE, 0, "lan"))
    assert reworded == "switch on the stove"


def test_protocols_split_the_initial_states() -> None:
    suite = LiberoSuite(CONFIG)
    assert suite.initial_states(STOVE, "train") == range(40)
    assert suite.initial_states(STOVE, "held_out") == range(40, 50)
    published = LiberoSuite(replace(CONFIG, protocol="published"))
    assert (
        published.initial_states(STOVE, "train") == published.initial_states(STOVE, "held_out") == range(50)
    )


@pytest.mark.parametrize(
    ("tasks", "expected"),
    [("spacial", "spatial"), ("goal/turn_of_the_stove", "goal/turn_on_the_stove"), ("goall/x", "goal")],
)
def test_what_does_not_exist_is_refused_with_the_nearest(tasks: str, expected: str) -> None:
    with pytest.raises(RoveError, match=expected):
        registry.suite(LiberoConfig(tasks=tasks))


def test_an_initial_state_out_of_range_is_refused() -> None:
    with environment() as env, pytest.raises(RoveError, match="0 to 49, not 50"):
        env.reset([EpisodeSpec(STOVE, 50)])


def test_a_missing_package_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    package.root.cache_clear()
    try:
        with pytest.raises(RoveError, match=r"pip install 'rove\[libero\]'") as raised:
            package.root()
    finally:
        package.root.cache_clear()
    assert isinstance(raised.value.__cause__, ModuleNotFoundError)


def test_a_world_that_diverges_ends_its_episode_alone() -> None:
    actions = torch.zeros(2, 4, 7)
    with environment() as env:
        env.reset([EpisodeSpec(STOVE, 0), EpisodeSpec(STOVE, 1)])
        calm = env.step_chunk(actions)
        env.reset([EpisodeSpec(STOVE, 0), EpisodeSpec(STOVE, 1)])
        env.enqueue([EpisodeSpec(STOVE, 0)])
        place = env.worlds.places[0]
        assert place is not None
        place.group.data["qvel"][place.row] = np.nan
        result = env.step_chunk(actions)
        assert env.diverged == 1
        assert result.truncated[0].tolist() == [True, False, False, False]
        assert not result.success.any()
        assert env.specs == (EpisodeSpec(STOVE, 0), EpisodeSpec(STOVE, 1))
        assert torch.isfinite(result.observation.state).all()
        assert torch.equal(result.observation.state[1], calm.observation.state[1])
        after = env.step_chunk(actions)
        assert torch.equal(after.observation.state[0], calm.observation.state[0])


def test_scenes_leave_memory_when_others_come() -> None:
    with environment(replace(CONFIG, scenes=1)) as env:
        first = env.reset([EpisodeSpec(STOVE, 0), EpisodeSpec(STOVE, 1)])
        env.reset([EpisodeSpec(SOUP, 0), EpisodeSpec(SOUP, 1)])
        assert len(env.worlds.scenes) == 1
        with pytest.warns(match="set --env.scenes 2"):
            again = env.reset([EpisodeSpec(STOVE, 0), EpisodeSpec(STOVE, 1)])
        assert torch.equal(first.state, again.state)


def test_a_scene_has_as_many_worlds_as_its_slots_need() -> None:
    """A group that grows goes on to the bit as one that does not."""
    config, actions = replace(CONFIG, threads=1), torch.rand(5, 4, 7) * 2 - 1

    def sizes(env: LiberoEnv) -> list[int]:
        return [group.size for groups in env.worlds._groups.values() for group in groups]

    with environment(config, num_envs=5) as env, environment(config, num_envs=5) as other:
        env.reset([EpisodeSpec(STOVE, 0)])
        assert sizes(env) == [1]
        env.step_chunk(actions)
        env.reset([EpisodeSpec(STOVE, i) for i in (1, 2, 2)], where=[1, 2, 3])
        assert sizes(env) == [4]
        other.reset([EpisodeSpec(STOVE, 0)])
        other.step_chunk(actions)
        alone, among = other.step_chunk(actions).observation.state, env.step_chunk(actions).observation.state
        assert alone is not None and among is not None
        assert torch.equal(alone[0], among[0]) and not torch.equal(among[2], among[3])
        env.reset([EpisodeSpec(SOUP, 0), EpisodeSpec(SOUP, 1)], where=[3, 4])
        assert sizes(env) == [4, 2]
    with environment(replace(CONFIG, threads=2), num_envs=5) as env:
        env.reset([EpisodeSpec(STOVE, i) for i in range(5)])
        assert sizes(env) == [3, 2], "both threads have something to do"


def test_the_end_of_an_action_can_be_observed() -> None:
    """At the end the observation is of the very positions; the stock one is two substeps behind."""
    actions = torch.rand(2, 4, 7, generator=torch.Generator().manual_seed(0)) * 2 - 1
    fingers = {}
    for phase in ("stock", "end"):
        with environment(replace(CONFIG, phase=phase)) as env:
            env.reset([EpisodeSpec(STOVE, 0), EpisodeSpec(STOVE, 1)])
            env.step_chunk(actions)
            place = env.worlds.places[1]
            assert place is not None
            group, row = place.group, place.row
            now = group.data["qpos"][row, group.arm.fingers]
            fingers[phase] = (group.fingers[row].copy(), now.copy())
    assert np.array_equal(*fingers["end"])
    assert not np.array_equal(*fingers["stock"])
    assert np.array_equal(fingers["end"][1], fingers["stock"][1])


def test_the_cache_mends_what_was_cut_short(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    key = scenes.load_task(SOUP).scene.key
    source = scenes.cache_folder()
    assert all(version in source.name for version in package.versions().values())
    monkeypatch.setenv("ROVE_CACHE", str(tmp_path))
    folder = scenes.cache_folder()
    folder.mkdir(parents=True)
    task, *both = (folder / file for file in (scenes.task_file(SOUP), *scenes.scene_files(key)))
    scene = both[0]
    for file in (task, *both):
        shutil.copy(source / file.name, file)
    content = scene.read_bytes()
    scene.write_bytes(content[: len(content) // 2])
    built: list[str] = []
    scenes.prepare([SOUP], built.append)
    assert built == [SOUP]
    assert scene.stat().st_size == len(content)
    task.write_bytes(b"PK")
    scenes.prepare([SOUP], built.append)
    assert built == [SOUP, SOUP]
    scenes.prepare([SOUP], built.append)
    assert built == [SOUP, SOUP]


def test_an_evaluation_of_several_tasks(tmp_path: Path) -> None:
    """By the command's own path: the result says what decided it."""
    out = tmp_path / "eval.json"
    settings = "--env.renderer none --env.horizon 8 --env.wait 1 --env.protocol published"
    judged = evaluate_checkpoint(
        Path("random"),
        "libero",
        f"{STOVE},{SOUP}",
        "none",
        EvaluationConfig(episodes=6, decoding="sample", num_envs=4),
        seed=1,
        settings=settings.split(),
        out=out,
    )
    assert report.load(out) == judged
    assert [record.length for record in judged.records] == [8] * 6
    env = judged.about["env"]
    assert (env["protocol"], env["renderer"], env["wait"], env["horizon"]) == ("published", "none", 1, 8)
    assert judged.about["versions"]["robosuite"] == "1.4.0"
    assert "mean of families" in report.task_table(judged)
    with pytest.raises(RoveError, match="only --env"):
        evaluate_checkpoint(
            Path("random"), "libero", STOVE, "none", EvaluationConfig(), seed=1, settings=["--seed", "3"]
        )


@pytest.mark.parametrize("tasks", ["goal_lan", "object_task"])
def test_a_perturbed_set_that_is_the_suite_is_told_its_own_instructions(tasks: str) -> None:
    suite = LiberoSuite(LiberoConfig(tasks=tasks))
    for task in suite.tasks:
        told = suite.instruction(EpisodeSpec(task, suite.initial_states(task, "held_out")[0]))
        assert told == package.written_instruction(task).lower()
    told = [suite.instruction(EpisodeSpec(task, 0)) for task in suite.tasks]
    assert told != [package.published_instruction(task) for task in suite.tasks]
