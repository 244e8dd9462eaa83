"""ManiSkill's worlds: start states, success and reward on recorded states, faults, resets, experts, pictures.

One environment of 3 slots is shared by all tests that need one: making the first takes seconds.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest
import torch
from tests import maniskill

from rove import recipes
from rove.config import load
from rove.config.schema import ManiSkillConfig, PutOnPlateConfig
from rove.envs import registry
from rove.envs.maniskill.env import ManiSkillEnv, PutOnPlateEnv
from rove.envs.maniskill.fleet import Fleet
from rove.envs.maniskill.put_on_plate import families, progress
from rove.envs.maniskill.put_on_plate.families import FAMILIES, PREFIX
from rove.envs.maniskill.put_on_plate.suite import VARIANTS
from rove.envs.rotations import tensor_matrix, yaw_quaternion
from rove.errors import RoveError
from rove.runtime.local import InChild
from rove.testing import check_env
from rove.train import train
from rove.types import ChunkResult, EpisodeSpec

MAIN = PREFIX + "Main-v3"
SPLITS = [(family, split) for family in FAMILIES.values() for split in family.parts]
EVERYTHING = ",".join(f"{family.id}:{split}" for family, split in SPLITS)
PLATE = PutOnPlateConfig(tasks=EVERYTHING, image_size=64, horizon=40, workers=1)


@pytest.fixture(autouse=True, scope="module")
def _needs_maniskill() -> None:
    maniskill.require()


@pytest.fixture(scope="module")
def env() -> Iterator[ManiSkillEnv]:
    made = ManiSkillEnv(PLATE, 3, 4, "stop")
    yield made
    made.close()


def world(env: ManiSkillEnv, slot: int):
    return env._members[0].worker._at[slot][0].env  # type: ignore[attr-defined]


# --- the contract ---------------------------------------------------------------------------------


LONG = pytest.mark.skipif(not os.environ.get("MANISKILL_FULL"), reason="long: make test-maniskill runs it")


@LONG
@pytest.mark.parametrize("task", ["StackCube-v1", "PushCube-v1"])
def test_contract_in_worker_processes(task):
    """`tests/contract` holds PickCube and the put-on-plate task to it, in one process."""
    config = ManiSkillConfig(tasks=task, image_size=48, horizon=6, workers=2)
    results = check_env(
        lambda num_envs, autoreset: registry.make(config, num_envs=num_envs, chunk=4, autoreset=autoreset)
    )
    assert [f"{result.name}: {result.detail}" for result in results if not result.ok] == []


@LONG
@pytest.mark.parametrize("task", [f"{family.id}:{split}" for family, split in SPLITS])
def test_contract_on_every_put_on_plate_id(task):
    config = PutOnPlateConfig(tasks=task, image_size=48, horizon=6, workers=1)
    results = check_env(
        lambda num_envs, autoreset: registry.make(config, num_envs=num_envs, chunk=4, autoreset=autoreset)
    )
    assert [f"{result.name}: {result.detail}" for result in results if not result.ok] == []


def test_physics_steps_are_as_many_as_asked_for():
    with closing(registry.make(replace(PLATE, sim_freq=100), num_envs=1, chunk=1, autoreset="stop")) as env:
        env.reset([EpisodeSpec(env.suite.tasks[0], 0)])
        assert world(env, 0)._sim_steps_per_control == 20 and world(
            env, 0
        ).scene.px.timestep == pytest.approx(0.01)


# --- start states ---------------------------------------------------------------------------------


def test_things_start_where_every_environment_says(env):
    """Ten resets of each environment and split, of single worlds."""
    for (family, split), task in zip(SPLITS, env.suite.tasks, strict=True):
        for i in range(10):
            slot, spec = i % 3, EpisodeSpec(task, i * 7)
            seen = env.reset([spec], where=[slot])
            there = world(env, slot)
            scene = families.decode(family, split, env.suite.space(spec).episode(i * 7))
            wanted = {
                ("more_carrot", scene.object): (0, scene.yaw),
                ("more_plate", scene.receptacle): (1, 0.0),
            }
            if scene.distractor is not None:
                wanted["more_carrot", scene.distractor] = (2, scene.yaw)
            if scene.second_receptacle is not None:
                wanted["more_plate", scene.second_receptacle] = (2, 0.0)
            for (group, number), (place, yaw) in wanted.items():
                pose = there._built[group][number].pose.raw_pose[0].numpy()
                expected = [*scene.places[place], scene.heights[place], *yaw_quaternion(yaw)]
                np.testing.assert_allclose(pose, expected, atol=1e-5, err_msg=f"{spec} {group}")
            assert sum(map(len, there._built.values())) == len(wanted)
            assert seen.instruction[slot] == scene.instruction


def test_settled_things_lie_still():
    made = ManiSkillEnv(replace(PLATE, settle=True), 1, 4, "stop")
    made.reset([EpisodeSpec(MAIN, 10)])  # bread, which does not roll
    there = world(made, 0)
    bodies = there._used(0)
    assert [float(body.linear_velocity.norm()) < 0.02 for body in bodies] == [True, True]
    assert [0.86 < float(body.pose.p[0, 2]) < 0.92 for body in bodies] == [True, True]
    made.close()


def test_the_object_is_moved_after_five_actions(env):
    spec = EpisodeSpec(MAIN, 11, "object_moved")
    env.reset([spec], where=[0])
    scene, there = env.suite.scene(spec), world(env, 0)
    stay = torch.zeros(3, 4, 7)
    env.step_chunk(stay)
    before = there.positions("more_carrot")[0, :2].numpy()
    assert np.linalg.norm(before - scene.places[0]) < 0.06
    there.step(torch.zeros(1, 7))
    np.testing.assert_allclose(there.positions("more_carrot")[0, :2], scene.places[2], atol=1e-4)


# --- success, reward, demonstrations --------------------------------------------------------------


def test_an_expert_episode_earns_exactly_one_point_two_and_agrees_with_the_definition(env):
    """Every state along it is judged a second time, in numpy, from positions and contact forces."""
    env.reset([EpisodeSpec(MAIN, 0)], where=[0])
    there, total, held = world(env, 0), 0.0, 0
    seen: list[float] = [0.0]
    grasped_once = held_once = False
    for _ in range(10):
        running = env.specs[0] is not None
        if not running:
            break
        recorded = _record(there)
        _, result = env.step_expert_chunk(0.0, np.random.default_rng(0))
        for state, success, reward in zip(recorded, result.success[0], result.reward[0], strict=False):
            grasped, on_target = _judge(*state)
            held = held + 1 if grasped else 0
            grasped_once, held_once = grasped_once or grasped, held_once or held >= 5
            seen.append(0.1 * grasped_once + 0.1 * held_once + 1.0 * (on_target and grasped_once))
            assert bool(success) == on_target
            assert float(reward) == pytest.approx(seen[-1] - seen[-2], abs=1e-6)
        total += float(result.reward[0].sum())
    assert round(total, 6) == 1.2
    assert result.finished[0].success and result.finished[0].total_reward == pytest.approx(1.2)


def _record(there) -> list[tuple]:
    """What the next steps of a world look like, filled as they are taken."""
    rows: list[tuple] = []
    count = type(there).count

    def recording(info):
        links = [there.agent.finger1_link.pose, there.agent.finger2_link.pose]
        axes = [tensor_matrix(link.q)[0, :, 1].numpy() for link in links]
        positions = [there.positions(group)[0].numpy() for group in ("more_carrot", "more_plate")]
        sizes = [there.source_extents[0].numpy(), there.receptacle_extents[0].numpy()]
        rows.append((there.forces()[0].numpy(), axes, positions, sizes))
        return count(there, info)

    there.count = recording
    return rows


def _judge(forces, axes, positions, sizes) -> tuple[bool, bool]:
    """Grasped, on target: the published definition."""
    presses = []
    for force, axis in ((forces[0], axes[0]), (forces[1], -axes[1])):
        size = np.linalg.norm(force)
        angle = np.degrees(np.arccos(np.clip(force @ axis / max(size * np.linalg.norm(axis), 1e-12), -1, 1)))
        presses.append(size >= 0.5 and angle <= 85)
    d = positions[0] - positions[1]
    near = np.hypot(d[0], d[1]) <= sizes[1].max() / 2 + 0.01
    low = d[2] > 0 and d[2] - sizes[1][2] / 2 - sizes[0][2] / 2 <= 0.05
    return all(presses), bool(near and low and np.linalg.norm(forces[2]) > 0.03)


@pytest.mark.parametrize("task", ["PickCube-v1", "StackCube-v1", "PushCube-v1"])
def test_stock_tasks_have_experts(task):
    made = registry.make(
        ManiSkillConfig(tasks=task, image_size=48, workers=1), num_envs=2, chunk=8, autoreset="stop"
    )
    made.reset([EpisodeSpec(task, 0), EpisodeSpec(task, 1)])
    records = []
    while any(made.specs):
        records += made.step_expert_chunk(0.0, np.random.default_rng(0))[1].finished
    made.close()
    assert [record.success for record in records] == [True, True]


def test_success_at_any_time_and_at_the_end():
    made = ManiSkillEnv(replace(PLATE, terminate=False, horizon=24), 1, 8, "stop")
    made.reset([EpisodeSpec(MAIN, 0)])
    finished = ()
    while not finished:
        finished = made.step_expert_chunk(0.0, np.random.default_rng(0))[1].finished
    made.close()
    (record,) = finished
    assert record.length == 24 and record.truncated and record.success
    assert record.success_at_end is not None


def test_the_dense_reward_pays_the_expert_on_its_way():
    """An episode earns 1 for its success, and all of the way that it began with."""
    with closing(ManiSkillEnv(replace(PLATE, reward="dense"), 2, 8, "stop")) as made:
        made.reset([EpisodeSpec(MAIN, 0), EpisodeSpec(MAIN, 1)])
        nothing = torch.zeros(1, dtype=torch.bool)
        ways = [float(world(made, slot).way_left(nothing)) for slot in range(2)]
        rewards: list[list[float]] = [[], []]
        while any(made.specs):
            result = made.step_expert_chunk(0.0, np.random.default_rng(0))[1]
            for slot in range(2):
                rewards[slot] += result.reward[slot][result.executed[slot]].tolist()
            assert all(record.success for record in result.finished)
    for way, earned in zip(ways, rewards, strict=True):
        assert 0.2 < way < 0.8 and sum(earned) == pytest.approx(1 + way / progress.FULL_WAY, abs=1e-5)
        assert np.mean([reward > 0 for reward in earned]) > 0.8 and earned[-1] > 0.9


# --- tries ----------------------------------------------------------------------------------------


THREE = replace(PLATE, tasks=MAIN, objects=(2, 5, 13), tables=(0,), sim_freq=100, reward="dense")
"""The reduced set of the recipes for two cores."""


def _same(one: ChunkResult, other: ChunkResult) -> bool:
    names = ("reward", "terminated", "truncated", "success", "executed")
    seen = [(result.observation.images, result.observation.state) for result in (one, other)]
    return (
        all(torch.equal(getattr(one, name), getattr(other, name)) for name in names)
        and all(torch.equal(a, b) for a, b in zip(*seen, strict=True))
        and one.finished == other.finished
    )


def test_tries_leave_no_trace_and_tell_what_a_step_would_bring():
    """Through approach, grasp and success, in whose chunk an episode ends and the next one begins."""
    noise = torch.Generator().manual_seed(0)
    with (
        closing(ManiSkillEnv(THREE, 3, 8, "refill")) as env,
        closing(ManiSkillEnv(THREE, 3, 8, "refill")) as twin,
    ):
        for made in (env, twin):
            made.reset([EpisodeSpec(MAIN, i) for i in range(2)])  # one slot idles
            made.enqueue([EpisodeSpec(MAIN, i) for i in range(2, 4)])
        finished = []
        for t in range(6):
            wanted, expected = twin.step_expert_chunk(0.0, np.random.default_rng(0))
            others = wanted[:, None].repeat(1, 2, 1, 1)
            others[..., :3] += 0.01 * torch.randn(3, 2, 8, 3, generator=noise)
            reward, executed = env.try_chunks(torch.cat([others, wanted[:, None]], dim=1).clamp(-1.0, 1.0))
            assert torch.equal(reward[:, 2], expected.reward)
            assert torch.equal(executed[:, 2], expected.executed)
            assert not executed[2].any() and not reward[2].any(), "a slot that idles tries nothing"
            assert t or (reward[:2].sum(-1).std(1) > 0).all(), "other actions, other rewards"
            assert _same(env.step_chunk(wanted), expected)
            finished += expected.finished
    assert any(record.success and record.length % 8 for record in finished), "an end within a chunk"


def test_a_try_whose_copy_is_killed_is_named_and_harms_nothing(monkeypatch):
    chosen = torch.zeros(1, 1, 8, 7)
    with closing(ManiSkillEnv(THREE, 1, 8, "stop")) as env:
        env.reset([EpisodeSpec(MAIN, 0)])
        before, _ = env.try_chunks(chosen)
        with monkeypatch.context() as patch:
            patch.setattr(Fleet, "_attempt", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
            with pytest.raises(RoveError, match=r"simulation goes on, but a try was killed by signal 9"):
                env.try_chunks(chosen)
        assert torch.equal(env.try_chunks(chosen)[0], before)
        assert torch.equal(env.step_chunk(chosen[:, 0]).reward, before[:, 0])


def test_a_gpu_simulation_cannot_try(monkeypatch):
    with closing(ManiSkillEnv(THREE, 1, 8, "stop")) as env:
        monkeypatch.setattr(env, "_config", replace(THREE, backend="physx_cuda"))
        with pytest.raises(RoveError, match="cannot be tried under env.backend = 'physx_cuda'"):
            env.try_chunks(torch.zeros(1, 1, 8, 7))


@LONG
def test_vine_sampling_trains_on_tries(tmp_path):
    words = """
        --sft.episodes 12 --sft.steps 60 --sft.grounding 60 --sft.grounding_steps 51 --rollout.num_envs 8
        --rollout.chunks 2 --training.iterations 3 --training.batch 8 --training.micro_batch 8
        --training.optim.warmup 0 --evaluation.every 0 --evaluation.episodes 0 --evaluation.variant_episodes 0
    """
    run = load.apply(recipes.build("put_on_plate_tiny_vine"), words.split())
    directory = train(run, tmp_path / "run")
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    spread = [line["train/branch_spread"] for line in lines if "train/branch_spread" in line]
    assert len(spread) == 3 and min(spread) > 0


# --- pictures -------------------------------------------------------------------------------------


def test_every_variant_is_a_picture_of_its_own(env):
    pictures = {}
    for variant in ("none", *VARIANTS):
        pictures[variant] = env.reset([EpisodeSpec(MAIN, 3, variant)], where=[1]).images[1, 0]
    assert all(picture.float().std() > 10 for picture in pictures.values())
    assert len({picture.numpy().tobytes() for picture in pictures.values()}) == len(pictures)


@pytest.mark.parametrize("full_frame", [False, True])
def test_points_are_where_things_are_seen(full_frame):
    made = PutOnPlateEnv(replace(PLATE, full_frame=full_frame, tasks=MAIN), 3, 4, "stop")
    told = made.ground([EpisodeSpec(MAIN, state) for state in range(3)])
    assert told.points is not None
    height, width = told.images.shape[2:4]
    pixels = (told.points * torch.tensor([1.0, height / width])).long()
    made.reset([EpisodeSpec(MAIN, state) for state in range(3)])
    assert torch.equal(told.points[:3], made.points())
    for slot in range(3):
        sim, scene = world(made, slot), made.suite.scene(EpisodeSpec(MAIN, slot))
        ids = sim._get_obs_sensor_data()["3rd_view_camera"]["segmentation"][0, ..., 0].long()
        named = [sim.segmentation_id_map[int(ids[y, x])].name for x, y in pixels[slot, :2].tolist()]
        assert named == [f"more_carrot/{scene.object}", f"more_plate/{scene.receptacle}"]
    assert len(told) == len(told.images) == 6 and not told.mask.any()
    assert (told.points[3:] - told.points[:3])[:, 2].norm(dim=-1).min() > 1, "the hand has moved"
    made.close()


def test_a_small_picture_is_the_large_one_squashed(env):
    spec = EpisodeSpec(MAIN, 3)
    small = env.reset([spec], where=[0]).images[0, 0].float()
    made = ManiSkillEnv(replace(PLATE, full_frame=True), 1, 4, "stop")
    large = made.reset([spec]).images[0, 0].float()
    made.close()
    assert large.shape == (480, 640, 3)
    squashed = torch.nn.functional.interpolate(large.permute(2, 0, 1)[None], (64, 64), mode="area")
    assert (squashed[0].permute(1, 2, 0) - small).abs().mean() < 8


# --- faults ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_worker_that_dies_is_replaced_and_nothing_is_lost():
    config = replace(PLATE, workers=2, image_size=48)
    specs = [EpisodeSpec(MAIN, i) for i in range(2)]
    actions = 0.02 * torch.randn(3, 2, 4, 7, generator=torch.Generator().manual_seed(0))
    outcomes = []
    for kill in (False, True):
        made = ManiSkillEnv(config, 2, 4, "stop")
        made.reset(specs)
        for t, chunk in enumerate(actions):
            if kill and t == 2:
                member = made._members[1]
                assert isinstance(member, InChild)
                os.kill(member.child.process.pid, signal.SIGKILL)
                tried, _ = made.try_chunks(chunk[:, None])
            result = made.step_chunk(chunk)
            assert not kill or t < 2 or torch.equal(tried[:, 0], result.reward)
        outcomes.append((result.observation.images, result.observation.state, result.reward))
        faults = made.supervisor.take_faults()
        assert len(faults) == kill and all("simulator 1 was killed by signal 9" in one for one in faults)
        made.close()
    assert all(torch.equal(a, b) for a, b in zip(*outcomes, strict=True))


def test_missing_assets_name_the_fix(monkeypatch, tmp_path):
    from rove.envs.maniskill import assets

    monkeypatch.setattr(assets, "root", lambda: tmp_path)
    with pytest.raises(RoveError, match=r"No robot, scene, objects.*rove assets maniskill downloads them"):
        ManiSkillEnv(PLATE, 1, 4, "stop")


def test_missing_vulkan_names_the_fix(monkeypatch):
    from rove.envs.maniskill import simulator, vulkan
    from rove.findings import Finding

    monkeypatch.setattr(vulkan, "finding", lambda: Finding("Vulkan", "missing", "no device", vulkan.FIX))

    def broken(**_):
        raise RuntimeError("vk::createInstanceUnique: ErrorIncompatibleDriver")

    with pytest.raises(RoveError, match=r"cannot render: vk::.*no device.*apt-get install -t bookworm"):
        simulator.make(broken)  # type: ignore[arg-type]


def test_wrong_names_are_refused():
    with pytest.raises(
        RoveError, match="env.control_mode = 'pd_ee_pose_typo' is none of PickCube-v1's robot"
    ):
        registry.make(
            ManiSkillConfig(control_mode="pd_ee_pose_typo", image_size=48, workers=1),
            num_envs=1,
            chunk=4,
            autoreset="stop",
        )
    with pytest.raises(RoveError, match="ManiSkill has no task 'PickCub-v1'. Did you mean 'PickCube-v1'"):
        registry.make(ManiSkillConfig(tasks="PickCub-v1", workers=1), num_envs=1, chunk=4, autoreset="stop")
    with pytest.raises(RoveError, match="PickCube-v1 has no camera 'wrist'"):
        registry.make(ManiSkillConfig(cameras=("wrist",), workers=1), num_envs=1, chunk=4, autoreset="stop")
