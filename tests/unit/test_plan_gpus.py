"""Plans for machines with GPUs: which card, and which cores, every process of every recipe has."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any, Literal

import pytest
import torch

from rove import recipes
from rove.cluster import ray
from rove.config.schema import (
    PPO,
    EnvConfig,
    LiberoConfig,
    ManiSkillConfig,
    PlacementConfig,
    PutOnPlateConfig,
    RolloutConfig,
    Run,
    TabletopConfig,
)
from rove.envs import registry
from rove.envs.base import Resources
from rove.errors import RoveError
from rove.placement.inventory import Inventory
from rove.placement.plan import Plan, make_plan
from rove.runtime import gpus
from rove.training import parallel
from rove.workers import environment

# Not those that another file of tests, in the same process, has registered.
RUNS = [each.build() for each in recipes.all() if each.build.__module__.startswith("rove.recipes.")]
TOO_SMALL = {
    "libero_milk",
    "libero_multitask_grpo",
    "libero_object_grpo",
    "libero_spatial_grpo",
    "libero_goal_grpo",
    "libero_10_grpo",
    "libero_object_pi05_grpo",
    "libero_object_smolvla_grpo",
    "put_on_plate_tiny_grpo",
}
"""Recipes for two cores, with fewer groups than eight policies need."""


def node(count: int) -> Inventory:
    return Inventory.of(gpus=count, cores=8 * count)


def run_of(env: EnvConfig, **placement: Any) -> Run:
    return Run(
        "test",
        PPO(),
        env=env,
        rollout=RolloutConfig(num_envs=64),
        placement=PlacementConfig(**{"executor": "ray", **placement}),
    )


def simulating(plan: Plan) -> list[int | None]:
    """The GPU of each worker, unit by unit."""
    return [env.gpu for rollout in plan.rollouts for env in rollout.environments]


@pytest.mark.parametrize("count", [1, 2, 8])
@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_every_recipe_uses_every_gpu_once(run: Run, count: int) -> None:
    if count == 8 and run.name in TOO_SMALL:
        with pytest.raises(RoveError, match=r"would cut a group.*set --rollout\.num_envs 64"):
            make_plan(run, node(count))
        run = replace(run, rollout=replace(run.rollout, num_envs=64))
    plan = make_plan(run, node(count))
    assert [(s.gpu, s.rollout, s.rank, s.gpu_share) for s in plan.workers] == [
        (k, k, k, 1.0) for k in range(count)
    ]
    assert len(plan.rollouts) == plan.ranks == count
    assert (len(plan.workers) == 1) == (count == 1)
    assert sum(rollout.slots for rollout in plan.rollouts) == run.rollout.num_envs
    # Everything simulates on cores; what renders on a GPU does so on that of its policy.
    renders = registry.resources(run.env, gpus=True).rendering == "gpu"
    assert simulating(plan) == [k if renders else None for k in range(count)]
    assert not any(rollout.in_process for rollout in plan.rollouts)
    cores = [core for rollout in plan.rollouts for env in rollout.environments for core in env.cores]
    assert len(set(cores)) == len(cores) == 7 * count, "one core a GPU is left to launch its kernels"
    assert [s.cores for s in plan.workers] == [8] * count


@pytest.mark.parametrize(
    ("inventory", "backend"),
    [(node(2), "cpu:gloo,cuda:nccl"), (node(8), "cpu:gloo,cuda:nccl"), (Inventory.of(2, cores=8), "gloo")],
)
def test_ranks_meet_over_nccl_on_gpus_and_over_gloo_on_cores(monkeypatch, inventory, backend) -> None:
    met: list[str] = []
    monkeypatch.setattr(parallel.distributed, "init_process_group", lambda name, **_: met.append(name))
    plan = make_plan(run_of(TabletopConfig()), inventory)
    for own in plan.workers:
        assert own.rank is not None
        device = torch.device("cpu" if own.gpu is None else f"cuda:{own.gpu}")
        assert parallel.join(own.rank, plan.ranks, "localhost:1", device).world == len(plan.workers)
    assert met == [backend] * len(plan.workers)


def test_recipes_of_both_kinds_are_among_them() -> None:
    kinds = {registry.resources(run.env, gpus=True) for run in RUNS}
    assert kinds == {Resources("core", "core"), Resources("core", "gpu")}
    assert {run.name for run in RUNS} >= TOO_SMALL


PHYSX = ManiSkillConfig(backend="physx_cuda")


@pytest.mark.parametrize(
    ("placement", "count", "policies", "learners", "simulators", "in_process"),
    [
        ({"map": "colocated"}, 1, [0], [0], [0], True),
        ({"map": "colocated"}, 2, [0, 1], [0, 1], [0, 1], True),
        ({"map": "colocated"}, 8, range(8), range(8), range(8), True),
        ({"map": "hybrid"}, 2, [1], [0, 1], [0], False),
        ({"map": "hybrid"}, 8, range(4, 8), range(8), range(4), False),
        ({"map": "disaggregated"}, 2, [1], [1], [0], False),
        ({"map": "disaggregated"}, 8, [2, 3], range(4, 8), [0, 1], False),
        ({"map": "colocated", "env_workers": 2}, 2, [0, 1], [0, 1], [0, 0, 1, 1], False),
        ({"map": "learner: 0-7, env: 0-1, policy: 4-7"}, 8, range(4, 8), range(8), [0, 1, 0, 1], False),
    ],
)
@pytest.mark.parametrize("env", [PHYSX, PutOnPlateConfig(backend="physx_cuda")], ids=["stock", "plate"])
def test_simulation_on_gpus_is_spread_over_them(
    env, placement, count, policies, learners, simulators, in_process
) -> None:
    plan = make_plan(run_of(env, **placement), node(count))
    assert [s.gpu for s in sorted(plan.workers, key=lambda s: s.rollout or 0) if s.rollout is not None] == [
        *policies
    ]
    assert [s.gpu for s in plan.workers if s.rank is not None] == [*learners]
    assert simulating(plan) == [*simulators]
    assert {rollout.in_process for rollout in plan.rollouts} == {in_process}
    assert {env.simulates for rollout in plan.rollouts for env in rollout.environments} == {"gpu"}


@pytest.mark.parametrize(
    ("env", "gpus", "expected"),
    [
        (TabletopConfig(), True, ("core", "core")),
        (TabletopConfig(render="cuda"), True, ("core", "gpu")),
        (LiberoConfig(), True, ("core", "core")),
        (LiberoConfig(render="cuda"), True, ("core", "gpu")),
        (LiberoConfig(renderer="gl"), True, ("core", "gpu")),
        (LiberoConfig(renderer="gl"), False, ("core", "core")),
        (ManiSkillConfig(), True, ("core", "gpu")),
        (ManiSkillConfig(), False, ("core", "core")),
        (ManiSkillConfig(render="cpu"), True, ("core", "core")),
        (ManiSkillConfig(render="cuda"), False, ("core", "gpu")),
        (PHYSX, True, ("gpu", "gpu")),
        (PutOnPlateConfig(backend="physx_cuda", render="cpu"), True, ("gpu", "core")),
    ],
)
def test_suites_say_what_they_run_on(env, gpus, expected) -> None:
    assert registry.resources(env, gpus=gpus) == expected


@pytest.mark.parametrize(
    ("env", "placement", "said"),
    [
        (PHYSX, {"device": "cpu"}, r"'maniskill' is set to use a GPU.*16 cores on 1 node\) has none"),
        (TabletopConfig(render="cuda"), {"device": "cpu"}, "'tabletop' is set to use a GPU"),
        (
            PHYSX,
            {"map": "learner: 0-1, env: core 0-7, policy: 0-1"},
            r"env on core 0, but .*simulate on a GPU: set 'env: 0-1'",
        ),
    ],
)
def test_what_needs_a_gpu_is_refused_where_it_has_none(env, placement, said) -> None:
    with pytest.raises(RoveError, match=said):
        make_plan(run_of(env, **placement), node(2))


# --- a user's own suite -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class OwnConfig:
    kind: Literal["own"] = "own"
    horizon: int = 32
    image_size: int = 64


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A suite that is registered from outside, and simulates on a GPU; what it was made with."""
    made: list[Any] = []
    module: Any = ModuleType("own_suite")
    module.resources = lambda config, gpus: Resources(simulation="gpu", rendering="gpu")
    module.make = lambda config, num_envs, chunk, autoreset, gpu=None: made.append((num_envs, gpu))
    monkeypatch.setitem(sys.modules, "own_suite", module)
    monkeypatch.setattr(registry, "_ENTRY_POINTS", {**registry._ENTRY_POINTS, "own": "own_suite"})
    return made


def test_a_suite_of_the_users_says_so_without_touching_rove(own) -> None:
    run = run_of(OwnConfig())  # type: ignore[arg-type]
    assert simulating(make_plan(run, node(8))) == [*range(8)]
    registry.make(run.env, num_envs=3, chunk=8, autoreset="stop", gpu=5)
    registry.make(run.env, num_envs=3, chunk=8, autoreset="stop")
    assert own == [(3, 5), (3, None)]


def test_a_suite_that_says_nothing_is_given_no_gpu(own) -> None:
    module = sys.modules["own_suite"]
    del module.resources
    module.make = lambda config, num_envs, chunk, autoreset: own.append(num_envs)  # type: ignore[attr-defined]
    run = run_of(OwnConfig())  # type: ignore[arg-type]
    assert simulating(make_plan(run, node(2))) == [None, None]
    registry.make(run.env, num_envs=3, chunk=8, autoreset="stop", gpu=1)
    assert own == [3]


# --- what a process is told ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gpu", "own", "expected"),
    [
        (None, None, ""),
        (None, "4,5", ""),
        (3, None, "3"),
        (0, "4,5", "4"),
        (1, "4, 5", "5"),
        (1, "GPU-8932f937,GPU-1b2c", "GPU-1b2c"),
        (0, "MIG-GPU-8932f937/1/0,MIG-GPU-8932f937/2/0", "MIG-GPU-8932f937/1/0"),
    ],
)
def test_a_child_sees_one_of_its_parents_gpus(gpu, own, expected) -> None:
    assert gpus.visible(gpu, own) == expected
    if gpu is not None:
        assert gpus.index_of(expected, own) == gpu, "and back"


def test_a_gpu_that_is_not_visible_is_named() -> None:
    with pytest.raises(RoveError, match="GPU 2 was asked for, but CUDA_VISIBLE_DEVICES='4,5' lists 2"):
        gpus.visible(2, "4,5")
    with pytest.raises(RoveError, match="GPU 6 was assigned, but CUDA_VISIBLE_DEVICES='4,5' does not list"):
        gpus.index_of("6", "4,5")


class Started:
    """Stands in for an environment worker, or for stages in this process."""

    def __init__(self, name: str, make: Any, environment: dict[str, str] | None = None, **_: Any) -> None:
        self.environment = environment
        (plans,) = make.args
        self.gpus = [plan.gpu for plan in plans]


def started(run: Run, count: int, monkeypatch: pytest.MonkeyPatch) -> list[Started]:
    """What the workers of a run would start on a machine with so many GPUs."""
    monkeypatch.setattr(environment, "InChild", Started)
    monkeypatch.setattr(environment, "InProcess", Started)
    plan = make_plan(run, node(count))
    return [
        environments.actor  # type: ignore[misc]
        for number in range(len(plan.rollouts))
        for environments in environment.start_environments(run, plan, number)
    ]


def test_workers_see_their_own_gpu_and_no_other(monkeypatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    for env, expected in (
        (LiberoConfig(renderer="gl"), [("4", [0, 0]), ("5", [0, 0])]),
        (TabletopConfig(), [("", [None, None])] * 2),
    ):
        hosts = started(run_of(env), 2, monkeypatch)
        assert [((host.environment or {})["CUDA_VISIBLE_DEVICES"], host.gpus) for host in hosts] == expected
    hybrid = started(run_of(PHYSX, map="hybrid"), 2, monkeypatch)
    assert [((host.environment or {})["CUDA_VISIBLE_DEVICES"], host.gpus) for host in hybrid] == [
        ("4", [0, 0])
    ]


def test_environments_in_a_policys_process_run_on_its_gpu(monkeypatch) -> None:
    hosts = started(run_of(PHYSX), 2, monkeypatch)
    assert [(host.environment, host.gpus) for host in hosts] == [(None, [0]), (None, [1])]


# --- a cluster ----------------------------------------------------------------------------------------


def test_gpus_are_those_that_the_cluster_reserved() -> None:
    """Another job has the first ones of both nodes: a plan's own count is moved to what is free."""
    plan = make_plan(run_of(PHYSX, map="hybrid"), Inventory.of(2, gpus=2, cores=8))
    there = {(0, 0): 2, (0, 1): 3, (1, 0): 5, (1, 1): 4}
    moved = plan.renumbered(there)
    assert [(worker.node, worker.gpu) for worker in plan.workers] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert [(worker.node, worker.gpu) for worker in moved.workers] == [(0, 2), (0, 3), (1, 5), (1, 4)]
    assert simulating(plan) == [0, 0] and simulating(moved) == [2, 5]
    assert moved.renumbered({(n, new): old for (n, old), new in there.items()}) == plan
    on_cores = make_plan(run_of(TabletopConfig()), Inventory.of(cores=8))
    assert on_cores.renumbered({}) == on_cores
    # A worker whose node has gone away is given others elsewhere; the others keep theirs.
    alone = plan.renumbered({(1, 0): 6, (1, 1): 7}, only=3)
    assert [worker.gpu for worker in alone.workers] == [0, 1, 0, 7] and simulating(alone) == [0, 6]
    assert [(one.gpu, one.workers) for one in ray.bundle(plan, only=3)] == [(1, (3,)), (0, ())]


@pytest.mark.parametrize(
    ("env", "placement", "inventory", "expected"),
    [
        # A policy and a learner that share a GPU share its bundle, and so get the same one.
        (
            TabletopConfig(),
            {"map": "learner: 0, env: core all, policy: 0", "ahead": 1},
            node(1),
            [(0, 0, (0, 1), {"GPU": 1.0, "CPU": 8.0})],
        ),
        # GPU 0 is no seat's: environments alone run on it.
        (
            PHYSX,
            {"map": "learner: 1, env: 0, policy: 1"},
            node(2),
            [(0, 1, (0,), {"GPU": 1.0, "CPU": 1.0}), (0, 0, (), {"GPU": 1.0})],
        ),
        (TabletopConfig(), {}, Inventory.of(cores=4), [(0, None, (0,), {"CPU": 4.0})]),
    ],
)
def test_a_cluster_reserves_each_gpu_once(env, placement, inventory, expected) -> None:
    assert ray.bundle(make_plan(run_of(env, **placement), inventory)) == expected
