"""Ray: the same trajectories as without it, and two nodes, one of which joins late."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.integration.test_placement import SHORT, run_of, started
from tests.integration.test_resume import measured
from tests.unit.test_watch import Sleeper

from rove import checkpoint, recipes
from rove.config import load
from rove.config.schema import PPO, ManiSkillConfig, Run
from rove.placement.inventory import Inventory
from rove.placement.plan import make_plan
from rove.runtime import setup
from rove.runtime.actor import Lost, as_ready
from rove.runtime.local import InChild
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


RECIPES = """
import helper
from rove.envs.answers import ends_no_process

class Asked:
    def look(self):
        return helper.WORD, __file__

    def ctrl_c(self):
        with ends_no_process("mine", "reset"):
            raise KeyboardInterrupt

    def close(self):
        pass
"""


def test_children_are_what_their_parent_is_on_ray_as_locally(tmp_path, monkeypatch):
    """They have its module path and the recipe files that it imported; and Ctrl-C is the parent's to hear."""
    import ray

    folder, mine = tmp_path / "modules", tmp_path / "recipes_of_mine.py"
    folder.mkdir()
    (folder / "helper.py").write_text("WORD = 'found'")
    mine.write_text(RECIPES)
    monkeypatch.syspath_prepend(str(folder))
    calls = dict(setup._calls)
    recipes.import_file(mine)
    asked = sys.modules[mine.stem].Asked
    ray.init("local", num_cpus=2, object_store_memory=150 * 2**20, include_dashboard=False)
    try:
        for actor in (InChild("asked", asked), InActor("asked", asked, {"num_cpus": 0})):
            assert actor.call(asked.look).result() == ("found", str(mine))
            with pytest.raises(Lost) as lost:
                actor.call(asked.ctrl_c).result()
            assert "'mine' raised KeyboardInterrupt in reset, though nobody" in str(lost.value.reason())
            actor.kill()
    finally:
        ray.shutdown()
        setup._calls.clear()
        setup._calls.update(calls)
        del sys.modules[mine.stem], sys.modules["helper"]


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


full = pytest.mark.skipif("FAULTS_FULL" not in os.environ, reason="long: make test-faults runs it")
SIZE = {"num_cpus": 2, "object_store_memory": 150 * 2**20}
"""Of a node. The default would take a third of the machine's memory for each."""


@contextmanager
def cluster_of(nodes: int) -> Iterator[tuple[Any, list[Any]]]:
    """A cluster on this machine; and its nodes besides the head, in the order in which a plan has them."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args=SIZE)
    try:
        others = [cluster.add_node(**SIZE) for _ in range(nodes - 1)]
        yield cluster, sorted(others, key=lambda node: node.node_id)
    finally:
        cluster.shutdown()


def lines_of(directory: Path) -> int:
    log = directory / "metrics.jsonl"
    return len(log.read_text().splitlines()) if log.exists() else 0


def struck(run: Run, directory: Path, strike: Callable[[], object], lines: int = 0) -> tuple[int, str, float]:
    """`rove train`, in a process of its own, and what is done to its cluster once it has a checkpoint.

    Returns exit status, what was printed, and seconds from then to the end; with `lines`, the run is stopped
    when a worker has been replaced, and so many iterations more are logged.
    """
    directory.mkdir()
    run = replace(
        run,
        training=replace(run.training, iterations=100_000),
        logging=replace(run.logging, save_every=1, keep=2),
    )
    load.save(run, directory / "run.json")
    words = ["train", "--resume", str(directory)]
    process = subprocess.Popen(
        [sys.executable, "-c", f"import sys; from rove.cli import main; sys.exit(main({words!r}))"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    with ThreadPoolExecutor(1) as pool:
        printed = pool.submit(lambda: process.communicate()[0])  # a pipe that is full would stop it
        try:
            until = time.monotonic() + 300
            while lines_of(directory) < 2 and process.poll() is None and time.monotonic() < until:
                time.sleep(0.2)
            began, before = time.monotonic(), lines_of(directory)
            strike()
            while process.poll() is None and time.monotonic() < began + 240:
                time.sleep(0.2)
                if lines and restarts(directory) and lines_of(directory) >= before + lines:
                    process.send_signal(signal.SIGINT)
                    lines = 0
            seconds = time.monotonic() - began
        finally:
            process.kill()
        return process.returncode, printed.result(), seconds


def restarts(directory: Path) -> float:
    """Workers that have been replaced."""
    log = (directory / "metrics.jsonl").read_text().splitlines()
    return sum(json.loads(line).get("rollout/restarts", 0) for line in log)


def errors(printed: str) -> list[str]:
    return [line for line in printed.splitlines() if line.startswith("rove: error: ")]


@full
@pytest.mark.parametrize("how", ["killed", "stopped"])
def test_a_head_that_goes_away_ends_the_run_with_a_line(how, started, tmp_path):
    """Its processes are killed; and it is stopped, as a machine that is frozen."""
    with cluster_of(2) as (cluster, _):
        address, head = cluster.address, cluster.head_node
        run = run_of(started, map="hybrid", executor="ray", ray_address=address, nodes=2)

        def strike() -> None:
            if how == "killed":
                head.kill_all_processes(check_alive=False, allow_graceful=False)
            else:
                os.kill(head.all_processes["gcs_server"][0].process.pid, signal.SIGSTOP)

        code, printed, seconds = struck(run, tmp_path / "run", strike)
        if how == "stopped":
            os.kill(head.all_processes["gcs_server"][0].process.pid, signal.SIGCONT)
    assert len(errors(printed)) == 1, f"{code} after {seconds:.0f} s: {printed}"
    (line,) = errors(printed)
    if how == "killed" and code == 1:  # Ray ends who uses its object store before the 30 s are over
        assert "with the Ray processes of this machine" in line, line
    else:
        assert code == 2 and "head of the Ray cluster" in line and address in line, line
        assert "has not answered for 30 s" in line and seconds < 60, "Ray's own 60 s were waited for"
    assert checkpoint.load_trainer(checkpoint.latest(tmp_path / "run" / "checkpoints"))[0] >= 1


ELSEWHERE = "learner: 0, env: 2, policy: 3"
"""The policy, with its environments, on the second node of two cores."""


@full
def test_a_policy_whose_node_goes_away_is_replaced_on_another(started, tmp_path):
    with cluster_of(3) as (cluster, others):
        run = run_of(started, map=ELSEWHERE, executor="ray", ray_address=cluster.address, nodes=3)
        code, printed, _ = struck(
            run, tmp_path / "run", lambda: cluster.remove_node(others[0], allow_graceful=False), lines=3
        )
    assert code == 130 and not errors(printed), printed
    assert "A worker was replaced" in printed and "has gone away" in printed, printed


@full
@pytest.mark.parametrize("placement", [ELSEWHERE, "hybrid"], ids=["a policy", "a learner"])
def test_a_node_that_nothing_can_replace_ends_the_run_with_a_line(placement, started, tmp_path):
    """The other node's cores are taken: by the learner, and by somebody else."""
    with cluster_of(2) as (cluster, others):
        mapped = placement.replace("learner: 0", "learner: 0-1")
        run = run_of(started, map=mapped, executor="ray", ray_address=cluster.address, nodes=2, stages=1)
        code, printed, seconds = struck(
            run, tmp_path / "run", lambda: cluster.remove_node(others[0], allow_graceful=False)
        )
    (line,) = errors(printed)
    assert code == 2 and "node of the Ray cluster that has gone away" in line, printed
    assert others[0].node_id in line and seconds < 180
    assert checkpoint.load_trainer(checkpoint.latest(tmp_path / "run" / "checkpoints"))[0] >= 1


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


@full
def test_two_nodes_of_which_one_joins_late(started, tmp_path):
    """Each node has a policy with its environments, and a learner."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args=SIZE)
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
            cluster.add_node(**SIZE)
            lines = measured(trained.result())
    finally:
        cluster.shutdown()
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert all(line["train/rows"] == SHORT.rollout.num_envs * SHORT.rollout.chunks for line in lines)
