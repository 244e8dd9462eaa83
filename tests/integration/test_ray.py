"""Ray: the same trajectories as without it, and two nodes, one of which joins late."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from tests.integration.test_placement import SHORT, run_of, started
from tests.integration.test_resume import measured

from rove.config.schema import PPO, ManiSkillConfig, Run
from rove.placement.inventory import Inventory
from rove.placement.plan import make_plan
from rove.train import train

pytest.importorskip("ray")
pytestmark = pytest.mark.slow
__all__ = ["started"]


def test_ray_trains_as_local_does_bit_for_bit(started, tmp_path):
    run = run_of(started, map="hybrid", deterministic=True)
    local = measured(train(run, tmp_path / "local"))
    placement = replace(run.placement, executor="ray")
    assert measured(train(replace(run, placement=placement), tmp_path / "ray")) == local


def test_two_jobs_on_one_machine_do_not_share_a_gpu():
    """Ray need not have seen the GPUs that it hands out."""
    import ray

    from rove.cluster.ray import assigned, bundle
    from rove.runtime.ray import Reservation

    run = Run("t", PPO(), env=ManiSkillConfig(backend="physx_cuda"))
    run = replace(run, placement=replace(run.placement, executor="ray", map="hybrid"))
    bundles = bundle(make_plan(run, Inventory.of(gpus=2, cores=2)))
    ray.init(num_cpus=4, num_gpus=4, object_store_memory=150 * 2**20, include_dashboard=False)
    try:
        jobs = []
        for _ in range(2):
            here = ray.get_runtime_context().get_node_id()
            reserved = Reservation([one.resources for one in bundles], [here] * len(bundles), patience=60)
            jobs.append(assigned(bundles, reserved))
    finally:
        ray.shutdown()
    assert [sorted(job) for job in jobs] == [[(0, 0), (0, 1)]] * 2
    assert sorted(gpu for job in jobs for gpu in job.values()) == [0, 1, 2, 3]


def test_two_nodes_of_which_one_joins_late(started, tmp_path):
    """Each node has a policy with its environments, and a learner."""
    from ray.cluster_utils import Cluster

    # Fixed sizes: the default would take a third of the machine's memory, twice.
    size = {"num_cpus": 2, "object_store_memory": 150 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args=size)
    try:
        run = run_of(
            started,
            map="hybrid",
            deterministic=True,
            stages=1,
            executor="ray",
            ray_address=cluster.address,
            nodes=2,
        )
        with ThreadPoolExecutor(1) as pool:
            trained = pool.submit(train, run, tmp_path / "run")
            time.sleep(5)
            assert not trained.done(), "it did not wait for the second node"
            cluster.add_node(**size)
            lines = measured(trained.result())
    finally:
        cluster.shutdown()
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert all(line["train/rows"] == SHORT.rollout.num_envs * SHORT.rollout.chunks for line in lines)
