"""Initial states drawn anew: the stock sampler's, from the same random numbers; as the published ones are."""

from __future__ import annotations

import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from types import SimpleNamespace

import mujoco
import numpy as np
import pytest
import torch

from rove.config.schema import LiberoConfig
from rove.envs import registry
from rove.envs.libero import package, placement, wide
from rove.envs.libero.scenes import TaskModel, load_task
from rove.envs.libero.suite import GENERATED, WIDE, LiberoSuite, perturbed
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


BOWL = "goal/put_the_bowl_on_the_plate"


def spread(task: TaskModel, states: np.ndarray) -> dict[str, np.ndarray]:
    """Things that lie anywhere -> where wide initial states [n, ...] have them, [n, 2]."""
    found = {}
    for thing in task.placement["things"]:
        if thing["name"] in wide.rules(task).radii:
            start = 1 + int(task.model.joint(thing["joint"]).qposadr[0])
            found[thing["name"]] = states[:, start : start + 2]
    return found


def penetration(task: TaskModel, initial_state: int) -> float:
    """How deep things are in fixtures or in each other, metres, in an initial state."""
    state, poses = task.start(initial_state)
    scene = wide.Scene(task.model)
    scene.arrange(task.fixtures, poses, state[1 : 1 + task.model.nq])
    mujoco.mj_forward(scene.model, scene.data)
    owners = scene.model.body_rootid[scene.model.geom_bodyid[scene.data.contact.geom]]
    roots = [scene.model.body(thing["body"]).id for thing in task.placement["things"]]
    between = np.isin(owners, roots).all(1) & (owners[:, 0] != owners[:, 1])
    return float(-scene.data.contact.dist[between].min(initial=0.0))


@pytest.mark.parametrize("name", [SOUP, pytest.param(BOWL, marks=pytest.mark.libero_full)])
def test_wide_states_have_things_anywhere_in_reach_and_clear_of_each_other(name: str) -> None:
    task = load_task(name)
    starts = [task.start(GENERATED + i) for i in range(80)]
    states, poses = (np.stack(parts) for parts in zip(*starts, strict=True))
    places, by = spread(task, states), wide.rules(task)
    assert len(places) >= 3
    for thing, xy in places.items():
        start = 1 + int(task.model.joint(f"{thing}_joint0").qposadr[0])
        published = np.ptp(task.initial_states[:, start : start + 2], axis=0)
        assert (np.ptp(xy, axis=0) > np.maximum(0.25, 2 * published)).all(), "far beyond its region"
        offset = np.linalg.norm(xy - by.base, axis=1)
        assert (wide.REACH[0] < offset).all() and (offset < wide.REACH[1]).all()
        # spread to the left and right, but for where a fixture stands
        quarters = np.histogram(xy[:, 1] - by.base[1], 4, (-wide.ASIDE, wide.ASIDE))[0]
        assert (quarters >= 5).sum() >= 3
    assert max(penetration(task, GENERATED + i) for i in range(5)) < 1e-3
    np.testing.assert_allclose(states[:, 1:8].std(0), wide.ARM_NOISE, rtol=0.3)
    generated = np.stack([task.start(50 + i)[1] for i in range(40)])
    assert np.abs(poses.mean(0) - generated.mean(0)).max(initial=0.0) < 0.01, "fixtures stay"


@pytest.mark.parametrize("name", [SOUP, pytest.param(BOWL, marks=pytest.mark.libero_full)])
def test_wide_states_are_never_those_of_the_shifted_sets(name: str) -> None:
    """Nor near them: what LIBERO-PRO moves lies at none of its places in the perturbed sets."""
    task, moved = load_task(name), 0
    places = spread(task, np.stack([task.start(GENERATED + i)[0] for i in range(40)]))
    for thing in task.placement["things"]:
        if thing["name"] not in places:
            continue
        start = 1 + int(task.model.joint(thing["joint"]).qposadr[0])
        theirs = package.initial_states(perturbed(name, "swap"))[:, start : start + 2]
        own = task.initial_states[:, start : start + 2]
        if np.linalg.norm(theirs.mean(0) - own.mean(0)) > 0.1:
            moved += 1
            apart = np.linalg.norm(places[thing["name"]][:, None] - theirs, axis=-1)
            assert apart.min() > wide.AVOIDED - 1e-3
    assert moved >= 1, "the shifted set shifts something"


def test_wide_states_stay_what_the_instruction_says() -> None:
    """What is told by its place has it, no state is one in which the task is done, and suites that name
    places are refused."""
    book = load_task("90/STUDY_SCENE4_pick_up_the_book_on_the_right_and_place_it_under_the_cabinet_shelf")
    assert not any("book" in name for name in wide.rules(book).radii), "one of several books"
    push = load_task("goal/push_the_plate_to_the_front_of_the_stove")
    assert list(wide.rules(push).radii) == ["plate_1"], "an area of the table is the goal"
    scene = wide.Scene(push.model)
    for i in range(10):
        state, poses = push.start(GENERATED + i)
        scene.arrange(push.fixtures, poses, state[1 : 1 + push.model.nq])
        assert not scene.solved(push.goal)
    config = LiberoConfig(tasks="goal", protocol="generated_wide")
    suite = LiberoSuite(config)
    assert suite.initial_states(BOWL, "held_out") == range(50)
    assert suite.initial_states(BOWL, "train") == range(GENERATED, WIDE)
    for tasks in ("spatial", "goal_swap", "object,spatial"):
        with pytest.raises(RoveError, match=r"generated_wide.*does not allow.*Choose among object, goal"):
            LiberoSuite(replace(config, tasks=tasks))


@pytest.mark.libero_full
def test_every_task_has_initial_states_without_end() -> None:
    """Of 130 tasks with a few dozen coordinates each some may be far apart by chance, and none very far."""
    far = {}
    for name in (task for suite in package.SUITES["130"] for task in package.tasks(suite)):
        worst = max(differences(load_task(name)).values())
        if worst > 0.4:
            far[name] = worst
    assert not far
