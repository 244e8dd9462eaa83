"""Initial states drawn anew: the stock sampler's, from the same random numbers; as the published ones are."""

from __future__ import annotations

import subprocess
import sys
from contextlib import closing
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from rove.config.schema import LiberoConfig
from rove.envs import registry
from rove.envs.libero import package, placement
from rove.envs.libero.scenes import TaskModel, load_task
from rove.envs.libero.suite import GENERATED, LiberoSuite
from rove.errors import RoveError
from rove.types import EpisodeSpec

STOVE = "goal/turn_on_the_stove"
SOUP = "object/pick_up_the_alphabet_soup_and_place_it_in_the_basket"
OTHERS = (
    # in a drawer; on a stove; drawers that stand open; things on things; every class of scene
    "spatial/pick_up_the_black_bowl_in_the_top_drawer_of_the_wooden_cabinet_and_place_it_on_the_plate",
    "spatial/pick_up_the_black_bowl_on_the_ramekin_and_place_it_on_the_plate",
    "10/KITCHEN_SCENE4_put_the_black_bowl_in_the_bottom_drawer_of_the_cabinet_and_close_it",
    "90/KITCHEN_SCENE7_open_the_microwave",
    "90/LIVING_ROOM_SCENE3_pick_up_the_butter_and_put_it_in_the_tray",
    "90/STUDY_SCENE4_pick_up_the_book_on_the_left_and_place_it_on_top_of_the_shelf",
)
TASKS = [STOVE, *(pytest.param(task, marks=pytest.mark.libero_full) for task in (SOUP, *OTHERS))]


def legacy(seed: int) -> np.random.Generator:
    """NumPy's older generator, which the stock environment draws from, under the newer one's names."""
    old = np.random.RandomState(seed)
    names = {"random": old.random_sample, "standard_normal": old.standard_normal, "integers": old.randint}
    return SimpleNamespace(**names)  # type: ignore[return-value]


@pytest.mark.parametrize("task", TASKS)
def test_the_same_random_numbers_give_the_stock_initial_state(
    task: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.libero.stock import Stock

    model, env = load_task(task), Stock(task).env.env
    monkeypatch.setattr(placement, "ARM_NOISE", 0.0)  # of which the stock evaluation has none
    drawn, compiled = list(env.object_property_initializers), env.sim.model
    bodies = list(model.fixtures)
    for seed in range(5):
        env.object_property_initializers = list(drawn)
        compiled.body_pos[:], compiled.body_quat[:] = model.model.body_pos, model.model.body_quat
        env.sim.reset()
        np.random.seed(seed)  # noqa: NPY002 (the generator that robosuite draws from)
        env._reset_internal()
        state, poses = placement.draw(model.model, model.placement, model.fixtures, legacy(seed))
        np.testing.assert_allclose(state[1 : 1 + model.model.nq], env.sim.data.qpos, rtol=0, atol=1e-6)
        found = np.concatenate([compiled.body_pos[bodies], compiled.body_quat[bodies]], axis=1)
        np.testing.assert_allclose(poses, found, rtol=0, atol=1e-6)


def distance(one: np.ndarray, other: np.ndarray) -> float:
    """The largest difference of two empirical distributions (Kolmogorov, Smirnov)."""
    at = np.concatenate([one, other])
    below = [np.searchsorted(np.sort(sample), at, side="right") / len(sample) for sample in (one, other)]
    return float(np.abs(below[0] - below[1]).max())


def differences(model: TaskModel, count: int = 200) -> dict[int, float]:
    """Coordinates of an initial state that vary -> how far published and generated ones are apart."""
    published = model.initial_states
    drawn = np.stack([model.start(len(published) + i)[0] for i in range(count)])
    assert drawn.shape[1] == published.shape[1]
    varying = np.flatnonzero(np.ptp(published, axis=0) > 1e-5)
    still = np.setdiff1d(np.arange(published.shape[1]), varying)
    np.testing.assert_allclose(
        drawn[:, still], published[:count, still].mean(0)[None].repeat(count, 0), atol=2e-3
    )
    return {i: distance(published[:, i], drawn[:, i]) for i in varying}


@pytest.mark.parametrize("task", TASKS)
def test_generated_states_are_distributed_as_the_published_ones(task: str) -> None:
    """At a distance that two samples of one distribution exceed once in 10,000 coordinates."""
    found = differences(load_task(task))
    assert len(found) >= 9, "the arm, and where a thing lies"
    limit = np.sqrt(-np.log(1e-4 / 2) / 2 * (50 + 200) / (50 * 200))
    assert max(found.values()) < limit, found


def test_a_generated_state_is_the_same_in_every_process() -> None:
    numbers = (50, 51, GENERATED - 1)
    code = (
        "import sys; from rove.envs.libero.scenes import load_task; task = load_task(sys.argv[1]);"
        f"print(*(float(x).hex() for i in {numbers} for part in task.start(i) for x in part.ravel()))"
    )
    said = subprocess.run(
        [sys.executable, "-c", code, SOUP], capture_output=True, text=True, check=True
    ).stdout.split()
    task = load_task(SOUP)
    here = [float(x).hex() for i in numbers for part in task.start(i) for x in part.ravel()]
    assert said == here
    assert not np.array_equal(task.start(50)[0], task.start(51)[0])
    assert np.array_equal(task.start(3)[0], task.initial_states[3]), "published ones stay as they are"


def test_generated_states_are_trained_on_and_all_published_ones_kept() -> None:
    config = LiberoConfig(tasks=SOUP, protocol="generated", renderer="none", wait=3, threads=1)
    suite = LiberoSuite(config)
    assert suite.initial_states(SOUP, "held_out") == range(50)
    assert suite.initial_states(SOUP, "train") == range(50, GENERATED)
    with closing(registry.make(config, num_envs=2, chunk=4, autoreset="stop")) as env:
        one = env.reset([EpisodeSpec(SOUP, 50), EpisodeSpec(SOUP, GENERATED - 1)])
        again = env.reset([EpisodeSpec(SOUP, GENERATED - 1), EpisodeSpec(SOUP, 50)])
        assert one.state is not None and again.state is not None
        assert torch.equal(one.state, again.state.flip(0))
        with pytest.raises(RoveError, match=f"0 to {GENERATED - 1}, not {GENERATED}"):
            env.reset([EpisodeSpec(SOUP, GENERATED)])


@pytest.mark.libero_full
def test_every_task_has_initial_states_without_end() -> None:
    """Of 130 tasks with a few dozen coordinates each some may be far apart by chance, and none very far."""
    far = {}
    for name in (task for suite in package.SUITES["130"] for task in package.tasks(suite)):
        worst = max(differences(load_task(name)).values())
        if worst > 0.4:
            far[name] = worst
    assert not far
