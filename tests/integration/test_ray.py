"""Ray: the same trajectories as without it, and two nodes, one of which joins late."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from tests.integration.test_placement import SHORT, run_of, started
from tests.integration.test_resume import measured
from tests.unit.test_watch import Sleeper

from rove.config.schema import PPO, ManiSkillConfig, Run
from rove.placement.inventory import Inventory
from rove.placement.plan import make_plan
from rove.runtime.actor import Lost, as_ready
from rove.runtime.ray import InActor
from rove.train import train

pytest.importorskip("ray")
pytestmark = pytest.mark.slow
__all__ = ["started"]


def test_ray_trains_as_local_does_bit_for_bit(started, tmp_path):
    run = run_of(started, map="hybrid", deterministic=True)
    local = measured(train(run, tmp_path / "local"))
    placement = replace(run.placement, executor="ray")
    assert measured(train(replace(run, placement=placement), tmp_path / "ray")) == local


def test_an_address_where_no_cluster_is_ends_soon():
    """Nothing listens there; something does, and is no Ray; sockets whose path would be too long."""
    code = (
        "import socket, sys; from rove.runtime import ray; ray._JOINED = 3; s = socket.socket()\n"
        "s.bind(('127.0.0.1', 0)); sys.argv[1] == 'silent' and s.listen(); port = s.getsockname()[1]\n"
        "try: ray.connect(None if sys.argv[1] == 'deep' else f'127.0.0.1:{port}')\n"
        "except ray.RoveError as error: print(error)"
    )
    for how, said in (
        ("closed", "Connection refused"),
        ("silent", "was not joined in 3 s"),
        ("deep", "RAY_TMPDIR"),
    ):
        folder = f"/tmp/{'x' * 120}" if how == "deep" else "/tmp"
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "RAY_TMPDIR": folder,
        }
        done = subprocess.run(
            [sys.executable, "-c", code, how], capture_output=True, text=True, env=environment, timeout=60
        )
        assert said in done.stdout, f"{how}: {done.stdout} {done.stderr[-500:]}"


def test_an_actor_that_is_stopped_is_told_from_a_busy_one():
    import ray

    ray.init("local", num_cpus=2, object_store_memory=150 * 2**20, include_dashboard=False)
    try:
        stopped, busy = (InActor(n, Sleeper, {"num_cpus": 0}, deadline=1.5) for n in ("stopped", "busy"))
        assert stopped.call(Sleeper.sleep, 0.0).result() == 0.0
        process = ray.get(stopped._actor.__ray_call__.remote(lambda served: os.getpid()))
        calls = [busy.call(Sleeper.sleep, 4.0), stopped.call(Sleeper.sleep, 60.0)]
        os.kill(process, signal.SIGSTOP)
        assert [place for place in as_ready(calls) if place >= 0] == [1, 0]
        with pytest.raises(Lost, match=r"stopped has shown no sign of life for 1\.5 s"):
            calls[1].result()
        stopped.close()
    finally:
        ray.shutdown()


def test_two_jobs_on_one_machine_do_not_share_a_gpu():
    """Ray need not have seen the GPUs that it hands out."""
    import ray

    from rove.cluster.ray import assigned, bundle
    from rove.runtime.ray import Reservation

    run = Run("t", PPO(), env=ManiSkillConfig(backend="physx_cuda"))
    run = replace(run, placement=replace(run.placement, executor="ray", map="hybrid"))
    bundles = bundle(make_plan(run, Inventory.of(gpus=2, cores=2)))
    ray.init("local", num_cpus=4, num_gpus=4, object_store_memory=150 * 2**20, include_dashboard=False)
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
