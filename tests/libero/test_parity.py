"""Our physics, controller, observation and predicates beside the stock environment, live.

With robosuite's own matrix products (`ExactController`) everything must agree to the last bit. With ours,
which round otherwise, it agrees to 1e-9 until things touch and then grow apart, as two stock environments do
with and without numba.
"""

from __future__ import annotations

from collections.abc import Iterator

import mujoco
import numpy as np
import pytest

from rove.envs.libero import package, scenes
from rove.envs.libero.controller import Controller
from rove.envs.libero.scenes import TaskModel
from rove.envs.libero.worlds import WAIT_ACTION, Group
from rove.envs.rotations import axis_angle

STATE = 1
"""The initial state that is played: the second, so that the fixtures of the second reset are needed."""

QUICK = (
    "goal/turn_on_the_stove",
    "object/pick_up_the_alphabet_soup_and_place_it_in_the_basket",
)
SLOW = (
    "spatial/pick_up_the_black_bowl_from_table_center_and_place_it_on_the_plate",
    "spatial/pick_up_the_black_bowl_in_the_top_drawer_of_the_wooden_cabinet_and_place_it_on_the_plate",
    "object/pick_up_the_milk_and_place_it_in_the_basket",
    "goal/open_the_middle_drawer_of_the_cabinet",
    "goal/put_the_bowl_on_the_stove",
    "goal/push_the_plate_to_the_front_of_the_stove",
    "10/KITCHEN_SCENE4_put_the_black_bowl_in_the_bottom_drawer_of_the_cabinet_and_close_it",
    "10/LIVING_ROOM_SCENE6_put_the_white_mug_on_the_plate_and_put_the_chocolate_pudding_to_the_right_of_the_plate",
    "10/STUDY_SCENE1_pick_up_the_book_and_place_it_in_the_back_compartment_of_the_caddy",
    "90/KITCHEN_SCENE8_turn_off_the_stove",
    "90/KITCHEN_SCENE7_open_the_microwave",
    "90/KITCHEN_SCENE6_close_the_microwave",
    "90/LIVING_ROOM_SCENE3_pick_up_the_butter_and_put_it_in_the_tray",
    "90/STUDY_SCENE4_pick_up_the_book_on_the_left_and_place_it_on_top_of_the_shelf",
)
TASKS = [*QUICK, *(pytest.param(task, marks=pytest.mark.libero_full) for task in SLOW)]


def actions(seed: int, steps: int) -> Iterator[np.ndarray]:
    """Waiting, then full-range translations and rotations; the gripper changes its mind every ten actions,
    and one action in four does not rotate."""
    yield from [WAIT_ACTION] * 5
    rng = np.random.default_rng(seed)
    for i in range(steps):
        action = rng.uniform(-1, 1, 7)
        action[6] = 1.0 if (i // 10) % 2 else -1.0
        if i % 4 == 3:
            action[3:6] = 0.0
        yield action


def observed(group: Group, row: int) -> np.ndarray:
    quaternion = group.hand_quaternion[row]
    return np.concatenate([group.hand_position[row], axis_angle(quaternion), group.fingers[row]])


def touches_robot(group: Group, row: int) -> bool:
    """Whether the robot touches anything."""
    model, data = group.scene.model, group.batch.get_data(row)
    names = {model.body(model.geom_bodyid[geom]).name for pair in data.contact.geom for geom in pair}
    return any(name.startswith(("robot0", "gripper0")) for name in names)


@pytest.mark.parametrize("task", TASKS)
def test_trajectories(task: str) -> None:
    """60 random actions: everything is equal to the bit with robosuite's products, to 1e-9 with ours."""
    from tests.libero.stock import ExactController, Stock

    model, stock = scenes.load_task(task), Stock(task)
    fast, exact = (Group(model.scene, 3, "stock", make) for make in (Controller, ExactController))
    row = 2
    seen = stock.reset(model.initial_states[STATE], STATE)
    for group in (fast, exact):
        group.start(row, model, STATE)
        assert np.array_equal(observed(group, row), seen.state)
    rows, touched, disagreement = np.array([row]), False, 0
    for i, action in enumerate(actions(seed=3, steps=60)):
        seen = stock.step(action)
        holds, diverged = exact.act(rows, action[None])
        assert not diverged.any()
        assert np.array_equal(exact.data["qpos"][row], seen.qpos), f"qpos differs after action {i}"
        assert np.array_equal(exact.data["qvel"][row], seen.qvel), f"qvel differs after action {i}"
        assert np.array_equal(observed(exact, row), seen.state), f"the observation differs after action {i}"
        assert bool(holds[0]) == seen.success, f"success differs after action {i}"
        holds, _ = fast.act(rows, action[None])
        disagreement += bool(holds[0]) != seen.success
        touched = touched or touches_robot(fast, row)
        if not touched:
            np.testing.assert_allclose(fast.data["qpos"][row], seen.qpos, rtol=0, atol=1e-9)
            np.testing.assert_allclose(observed(fast, row), seen.state, rtol=0, atol=1e-9)
    assert disagreement == 0
    assert i > 60


def constructed(group: Group, model: TaskModel, rng: np.random.Generator) -> np.ndarray:
    """An initial state, changed so that the goal may hold, or just not."""
    state = model.initial_states[STATE].copy()
    qpos = state[1 : 1 + model.model.nq]
    for predicate in model.goal:
        if predicate["kind"] == "joint":
            offset = rng.choice([-0.05, -1e-9, 0.0, 1e-9, 0.05], size=len(predicate["joints"]))
            for joint, off in zip(predicate["joints"], offset, strict=True):
                qpos[model.model.joint(joint).qposadr[0]] = predicate["limit"] + off
            continue
        put(group, model, state)
        xpos, xmat = group.data["xpos"][0], group.data["xmat"][0].reshape(-1, 3, 3)
        if predicate["kind"] == "on_object":
            other = model.model.body(predicate["other"]).id
            centre = xpos[other] + rng.uniform([-0.04, -0.04, 0], [0.04, 0.04, 0.06])
        else:
            region, rotation = predicate["region"], np.zeros(9)
            body = model.model.body(region["body"]).id
            mujoco.mju_quat2Mat(rotation, np.array(region["quaternion"]))
            position = xpos[body] + xmat[body] @ region["position"]
            size = np.abs(xmat[body] @ rotation.reshape(3, 3) @ np.array(region["size"]))
            centre = position + rng.uniform(-1.2, 1.2, 3) * size
            if predicate["kind"] == "on_region":
                centre[2] = position[2] + size[2] + rng.uniform(-0.01, 0.11)
        joint = model.model.body_jntadr[model.model.body(predicate["body"]).id]
        qpos[model.model.jnt_qposadr[joint] :][:3] = centre
    return state


def put(group: Group, model: TaskModel, state: np.ndarray) -> None:
    """Start row 0 from a state of one's own."""
    group.start(0, model, STATE)
    group.data["qpos"][0] = state[1 : 1 + model.model.nq]
    group.batch.forward([0])


@pytest.mark.parametrize("task", TASKS)
def test_predicates(task: str) -> None:
    """Constructed states in which each predicate of the goal holds, or just fails: both judge alike, at once,
    and, from a few in which it holds, after each of three actions."""
    from tests.libero.stock import ExactController, Stock

    model, stock = scenes.load_task(task), Stock(task)
    group = Group(model.scene, 1, "stock", ExactController)
    stock.reset(model.initial_states[STATE], STATE)
    rng, rows, successes = np.random.default_rng(7), np.array([0]), []
    for _ in range(150):
        state = constructed(group, model, rng)
        put(group, model, state)
        verdict = stock.judge(state)
        assert bool(group.judge(rows)[0]) == verdict
        if verdict:
            successes.append(state)
    assert 0 < len(successes) < 150, "the states do not tell the two verdicts apart"
    for state in successes[:2]:
        # a new one: where a reset puts the fixtures depends on how many there were before it
        stock = Stock(task)
        stock.reset(state, STATE)
        put(group, model, state)
        for _ in range(3):
            holds, _ = group.act(rows, WAIT_ACTION[None])
            assert bool(holds[0]) == stock.step(WAIT_ACTION).success


@pytest.mark.libero_full
@pytest.mark.parametrize(
    "task",
    [
        "90/KITCHEN_SCENE10_close_the_top_drawer_of_the_cabinet",
        "spatial/pick_up_the_black_bowl_in_the_top_drawer_of_the_wooden_cabinet_and_place_it_on_the_plate",
        "goal_swap/put_the_bowl_on_the_stove",
    ],
)
def test_fixtures(task: str) -> None:
    """Fixtures stand where the stock environment's first resets after seed 0 put them."""
    from tests.libero.stock import Stock

    model, stock = scenes.load_task(task), Stock(task)
    bodies = list(model.fixtures)
    stock.env.seed(0)
    for expected in model.fixture_poses[:3]:
        stock.env.reset()
        live = stock.env.sim.model
        found = np.concatenate([live.body_pos[bodies], live.body_quat[bodies]], axis=1)
        assert np.array_equal(found, expected)


def test_every_kind_of_goal_is_among_the_tasks() -> None:
    """The parity tasks have every predicate that the 130 tasks have."""
    texts = [package.bddl(task).read_text().lower() for task in (*QUICK, *SLOW)]
    goals = [text[text.index("(:goal") :] for text in texts]
    for predicate in ("in", "on", "open", "close", "turnon", "turnoff"):
        assert any(f"({predicate} " in goal for goal in goals), predicate
