"""Task ids, instructions and initial states of the tabletop suite."""

from __future__ import annotations

import numpy as np
import pytest

from rove.config.schema import TabletopConfig
from rove.envs import registry
from rove.envs.tabletop import layout, robot
from rove.envs.tabletop.scene import ZONE_HALF
from rove.envs.tabletop.suite import TabletopSuite
from rove.envs.tabletop.tasks import (
    DEMO_TASKS,
    FAMILIES,
    INITIAL_STATES,
    TEMPLATES,
    TRAIN_TASKS,
    UNSEEN_SHAPE_OF,
    UNSEEN_TASKS,
    UNSEEN_TEMPLATES,
    VARIANTS,
    parse,
)
from rove.envs.tabletop.worlds import HELD_ABOVE, TabletopWorlds
from rove.types import EpisodeSpec

SUITE = TabletopSuite(TRAIN_TASKS + UNSEEN_TASKS)
STATES = (*range(6), *range(1_000_000, 1_000_003))


def test_task_sets() -> None:
    assert len(set(TRAIN_TASKS)) >= 24
    assert len(set(UNSEEN_TASKS)) >= 6
    assert not set(TRAIN_TASKS) & set(UNSEEN_TASKS)
    assert {parse(task).family for task in DEMO_TASKS} == set(FAMILIES) and 6 <= len(DEMO_TASKS) <= 8
    assert all(registry.suite(TabletopConfig(tasks=name)).tasks for name in ("demo", "train", "unseen"))


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ("demos", "Did you mean 'demo'"),
        ("pik/red_cube", "Did you mean 'pick'"),
        ("pick/red_cub", "Did you mean 'red_cube'"),
        ("put/red_cube", "expected put/OBJECT/DESTINATION"),
        ("put/red_cube/white_zone", "Did you mean"),
        ("stack/red_cube/red_cylinder", "its own colour"),
    ],
)
def test_bad_tasks_are_refused(tasks: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TabletopSuite.from_config(TabletopConfig(tasks=tasks))


def test_bad_episodes_are_refused() -> None:
    with pytest.raises(ValueError, match="Did you mean 'light'"):
        SUITE.instruction(EpisodeSpec("pick/red_cube", 0, "ligth"))
    with pytest.raises(ValueError, match="does not exist"):
        SUITE.instruction(EpisodeSpec("pick/red_cube", 5000))


def test_splits_are_disjoint() -> None:
    assert not set(INITIAL_STATES["train"]) & set(INITIAL_STATES["held_out"])


@pytest.mark.parametrize("variant", ["none", *VARIANTS])
def test_instructions_stay_in_the_vocabulary(variant: str) -> None:
    texts = {SUITE.instruction(EpisodeSpec(task, i, variant)) for task in SUITE.tasks for i in range(30)}
    assert {word for text in texts for word in text.split()} <= set(SUITE.vocabulary)


def test_unseen_phrasings_are_new_sentences_of_known_words() -> None:
    known = {word for family in TEMPLATES.values() for text in family for word in text.split()}
    for family in FAMILIES:
        assert not set(UNSEEN_TEMPLATES[family]) & set(TEMPLATES[family])
        assert {word for text in UNSEEN_TEMPLATES[family] for word in text.split()} <= known


def test_an_instruction_names_one_object_of_the_scene() -> None:
    for task in SUITE.tasks:
        for variant in ("none", "unseen_shape", "unseen_pair", "distractors"):
            scene = layout.layout(EpisodeSpec(task, 3, variant))
            colors = [thing.color for thing in (*scene.objects, *scene.extras)]
            assert colors.count(scene.objects[0].color) == 1
            named = parse(task).destination
            if named is not None:
                assert [*scene.objects, *scene.receptacles].count(named) == 1


def test_training_scenes_hold_no_unseen_pair() -> None:
    for task in TRAIN_TASKS:
        for i in range(10):
            objects = layout.layout(EpisodeSpec(task, i)).objects
            assert all(UNSEEN_SHAPE_OF[thing.color] != thing.kind for thing in objects)
        target = layout.layout(EpisodeSpec(task, 0, "unseen_pair")).objects[0]
        assert UNSEEN_SHAPE_OF[target.color] == target.kind


def test_everything_stands_clear() -> None:
    for task in SUITE.tasks:
        for i in STATES:
            scene = layout.layout(EpisodeSpec(task, i))
            gaps = np.abs(scene.object_xy[:, None] - scene.object_xy)[np.triu_indices(4, 1)]
            assert ((gaps[:, 0] >= 0.095) | (gaps[:, 1] >= 0.07)).all()
            gaps = np.abs(scene.object_xy[:, None] - scene.receptacle_xy).max(-1)
            if task.startswith("push"):  # the target starts nearer to its own zone, yet outside
                assert gaps[0, 0] > ZONE_HALF + 0.02
                gaps[0, 0] = np.inf
            assert (gaps >= 0.1).all()


def test_unseen_positions_are_never_trained() -> None:
    low, high = layout.UNSEEN_REGION
    for task in TRAIN_TASKS:
        for i in range(8):
            trained = layout.layout(EpisodeSpec(task, i)).object_xy[0]
            assert not ((trained >= low) & (trained <= high)).all()
            shifted = layout.layout(EpisodeSpec(task, i, "unseen_position")).object_xy[0]
            assert ((shifted >= low) & (shifted <= high)).all()


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v not in layout.ARRANGING_VARIANTS])
def test_a_variant_leaves_the_rest_in_place(variant: str) -> None:
    base = layout.layout(EpisodeSpec("stack/purple_cube/yellow_cylinder", 7))
    shifted = layout.layout(EpisodeSpec("stack/purple_cube/yellow_cylinder", 7, variant))
    np.testing.assert_array_equal(base.object_xy, shifted.object_xy)
    np.testing.assert_array_equal(base.receptacle_xy, shifted.receptacle_xy)
    changed = {
        "vision": base.look != shifted.look,
        "semantics": base.objects != shifted.objects or variant == "unseen_phrasing",
        "execution": bool((base.start != shifted.start).any()),
    }
    assert [axis for axis, differs in changed.items() if differs] == [VARIANTS[variant]]


def test_displaced_targets_move_out_of_reach() -> None:
    for task in DEMO_TASKS:
        scene = layout.layout(EpisodeSpec(task, 1_000_000, "displaced"))
        assert scene.displaced_xy is not None
        assert np.linalg.norm(scene.displaced_xy - scene.object_xy[0]) >= layout.DISPLACEMENT[0]


def test_pictures_of_what_is_carried_ask_for_it_to_be_put_there() -> None:
    scene = layout.layout(EpisodeSpec("stack/green_cylinder/red_cube", 3))
    places = np.arange(3.0 * len(scene.objects)).reshape(-1, 3)

    def share(carried: tuple[int, int] | None) -> float:
        asked = SUITE.requests(scene, places, 300, np.random.default_rng(0), carried)
        assert len(asked) == 300
        on = places[1, :2]
        return float(np.mean([(at == places[0]).all() and (to[:2] == on).all() for _, (at, to) in asked]))

    assert share(None) < 0.1
    assert 0.4 < share((0, 1)) < 0.75


def test_what_is_caught_in_the_act_is_in_the_hand() -> None:
    worlds, rng = TabletopWorlds(1, 1), np.random.default_rng(0)
    over = 0
    for _ in range(200):
        worlds.start(0, EpisodeSpec("stack/green_cylinder/red_cube", 3))
        at_rest = worlds.object_places(0).copy()
        carried = worlds.catch_in_the_act(0, rng)
        moved = (worlds.object_places(0) != at_rest).any(axis=1)
        if carried is None:
            continue
        over += 1
        held, below = carried
        assert moved.tolist() == [i == held for i in range(len(moved))]
        assert held != below and not worlds.open[0]
        place = worlds.object_places(0)[held]
        np.testing.assert_allclose(place - worlds.pose[0, :3], [0, 0, HELD_ABOVE], atol=1e-9)
        if below < len(at_rest):
            assert np.linalg.norm(place[:2] - at_rest[below, :2]) < 0.15
    assert 0.25 < over / 200 < 0.45


def test_inverse_kinematics() -> None:
    poses = np.random.default_rng(0).uniform(robot.WORKSPACE_LOW, robot.WORKSPACE_HIGH, size=(500, 4))
    joints = robot.inverse(poses, robot.opening(np.ones(500)))
    np.testing.assert_allclose(robot.forward(joints), poses, atol=1e-9)
