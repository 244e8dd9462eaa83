"""Plans, against inventories that need not exist."""

from __future__ import annotations

from dataclasses import replace

import pytest

from rove.config.schema import GRPO, PPO, ManiSkillConfig, PlacementConfig, RolloutConfig, Run
from rove.config.validate import validate
from rove.errors import RoveError
from rove.placement.inventory import Inventory
from rove.placement.maps import parse
from rove.placement.plan import make_plan, staleness
from rove.recipes import get

LAPTOP = Inventory.of(cores=2)
CORES = Inventory.of(cores=8)
NODE = Inventory.of(gpus=8, cores=64)
CLUSTER = Inventory.of(2, gpus=8, cores=64)


def run_of(num_envs: int = 128, algorithm=PPO(), on_gpu: bool = False, **placement) -> Run:
    run = Run(
        "test",
        algorithm,
        rollout=RolloutConfig(num_envs=num_envs),
        placement=PlacementConfig(**{"executor": "ray", **placement}),
    )
    return replace(run, env=ManiSkillConfig(backend="physx_cuda")) if on_gpu else run


def test_a_laptop_without_a_gpu_takes_turns_in_one_process_unless_told_otherwise():
    plan = make_plan(run_of(threads=0), LAPTOP)
    assert len(plan.workers) == 1 and plan.rollouts[0].in_process
    assert (plan.device, plan.threads, plan.staleness) == ("cpu", 2, 0)
    assert plan.rollouts[0].slots == 128


@pytest.mark.parametrize(
    ("name", "inventory", "expected"),
    [
        ("colocated", NODE, "learner: 0-7, env: 0-7, policy: 0-7"),
        ("hybrid", NODE, "learner: 0-7, env: 0-3, policy: 4-7"),
        ("disaggregated", NODE, "learner: 4-7, env: 0-1, policy: 2-3"),
        ("hybrid", CLUSTER, "learner: 0-15, env: 0-3, 8-11, policy: 4-7, 12-15"),
        ("learner: 0-7, env: 0-3, policy: 4-7", NODE, "learner: 0-7, env: 0-3, policy: 4-7"),
    ],
)
def test_names_stand_for_maps(name, inventory, expected):
    assert make_plan(run_of(map=name, on_gpu=True), inventory).map == expected


def test_simulation_on_cores_leaves_all_gpus_to_policy_and_learner():
    plan = make_plan(run_of(map="colocated"), NODE)
    assert plan.map == "learner: 0-7, env: core 0-63, policy: 0-7"
    assert len(plan.rollouts) == 8 and plan.ranks == 8
    assert all(rollout.environments[0].stages == 2 and not rollout.in_process for rollout in plan.rollouts)
    cores = [core for rollout in plan.rollouts for env in rollout.environments for core in env.cores]
    assert sorted(cores) == list(range(8, 64)), (
        "one core a GPU launches, every other simulates for one policy"
    )


def test_hybrid_shares_weights_and_disaggregated_does_not():
    hybrid = make_plan(run_of(map="hybrid", on_gpu=True), NODE)
    assert [w.rollout for w in hybrid.workers if w.rank is not None] == [None] * 4 + [
        0,
        1,
        2,
        3,
    ]
    apart = make_plan(run_of(map="disaggregated", on_gpu=True), NODE)
    assert not [worker for worker in apart.workers if worker.rank is not None and worker.rollout is not None]
    ahead = make_plan(run_of(map="hybrid", on_gpu=True, ahead=1), NODE)
    assert not [worker for worker in ahead.workers if worker.rank is not None and worker.rollout is not None]
    shared = [worker for worker in ahead.workers if worker.gpu == 4]
    assert [worker.gpu_share for worker in shared] == [0.5, 0.5]


def test_a_core_is_reserved_once():
    plan = make_plan(run_of(map="disaggregated", ahead=1), LAPTOP)
    assert [worker.cores for worker in plan.workers] == [1, 1]
    assert sum(worker.cores for worker in make_plan(run_of(map="hybrid"), CORES).workers) == 8


def test_slots_stages_and_workers_multiply_to_all_environments():
    for name in ("colocated", "hybrid", "disaggregated"):
        for inventory in (LAPTOP, CORES, NODE, CLUSTER):
            plan = make_plan(run_of(map=name, stages=2, env_workers=1), inventory)
            assert sum(rollout.slots for rollout in plan.rollouts) == 128, (name, inventory)
            assert "policy" in str(plan)


@pytest.mark.parametrize(
    ("placement", "inventory", "said"),
    [
        (
            {"map": "learner: 0-8, env: 0, policy: 1"},
            NODE,
            r"learner on gpu 8, .* gpu 0-7: set 'learner: 0-7'",
        ),
        ({"map": "learner: gpu 0, env: 0, policy: 1"}, LAPTOP, "has no gpu: set 'learner: core all'"),
        ({"map": "lerner: 0, env: 0, policy: 1"}, LAPTOP, "role 'lerner'. Did you mean 'learner'"),
        ({"map": "learner: 0, env: 0"}, LAPTOP, "says nothing of 'policy': add 'policy: all'"),
        ({"map": "learner: 0, env: x, policy: 1"}, LAPTOP, "env has 'x' for a device"),
        ({"map": "nonsense"}, LAPTOP, "expected colocated, hybrid, disaggregated, auto, or roles"),
        (
            {"map": "learner: all, env: 0-7, policy: 8-15"},
            CLUSTER,
            "env on gpu 0 of node 0, where no",
        ),
        (
            {"map": "hybrid"},
            Inventory.of(cores=1),
            "two devices on every node.*map colocated",
        ),
        (
            {"map": "learner: all, env: 0-2, policy: 3-4"},
            NODE,
            "3 env devices for 2 policy.*take gpu 2",
        ),
        ({"device": "cuda"}, LAPTOP, "no CUDA device is visible"),
        ({"learners": 2}, NODE, "learners = 2, but the learner is on GPUs.*set --placement.learners 0"),
        ({"device": "cuda:9"}, NODE, "'cuda:9', but this machine has GPUs 0, 1"),
        ({"stages": 3}, LAPTOP, r"num_envs = 128 cannot be split evenly.*set --rollout.num_envs 129"),
        ({"executor": "local"}, CLUSTER, "'local' runs on one machine.*set --placement.executor ray"),
    ],
)
def test_what_cannot_work_is_refused_with_the_device_and_the_fix(placement, inventory, said):
    with pytest.raises(RoveError, match=said):
        make_plan(run_of(**placement), inventory)


def test_a_stage_never_cuts_a_group():
    run = run_of(32, GRPO(group_size=16), map="hybrid", stages=4)
    with pytest.raises(RoveError, match=r"would cut a group.*--rollout.num_envs 64"):
        make_plan(run, LAPTOP)


def test_maps_read_cores_gpus_and_all():
    found = parse("learner: all, env: core 0-3, 8, policy: gpu 2", NODE)
    assert [d.number for d in found["env"]] == [0, 1, 2, 3, 8] and found["env"][0].kind == "core"
    assert [d.number for d in found["learner"]] == list(range(8))
    assert str(found["policy"][0]) == "gpu 2"


def test_staleness_is_as_bounded_as_it_says():
    """The rule by which rollouts are begun, played through: iterations take one rollout or several."""
    for ahead in range(4):
        for takes in ([1] * 20, [1, 3, 1, 2] * 5):
            begun: list[int] = []
            worst = 0
            for version, count in enumerate(takes):
                for _ in range(count):
                    if not begun:
                        begun.append(version)
                    worst = max(worst, version - begun.pop(0))
                    while len(begun) < staleness(ahead):
                        begun.append(version)
            assert worst <= staleness(ahead)
        assert ahead == 0 or worst > 0


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"ahead": 1, "deterministic": True}, "lets the learner and the rollout race"),
        ({"ray_address": "auto"}, "placement.ray_address = 'auto', but placement.executor = 'local'"),
        ({"nodes": 2}, "placement.nodes = 2, but placement.executor = 'local'"),
        ({"stages": 3}, "cannot be split over placement.stages = 3"),
        ({"deadline": 0.0}, "placement.deadline = 0.0: expected a number above 0"),
        ({"ahead": -1}, "placement.ahead = -1: expected a number at least 0"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, said):
    run = get("tabletop_ppo").build()
    with pytest.raises(RoveError, match=said):
        validate(replace(run, placement=replace(run.placement, **settings)))


def test_a_cap_on_behaviour_weights_is_read_only_where_something_is_off_policy():
    run = get("tabletop_ppo").build()
    capped = replace(run, algorithm=replace(run.algorithm, max_behavior_weight=5.0))
    with pytest.raises(RoveError, match="max_behavior_weight is set, but placement.ahead = 0"):
        validate(capped)
    validate(replace(capped, placement=replace(run.placement, map="disaggregated", ahead=1)))
