"""Runs a Plan on Ray: every policy worker is an actor.

Ray reserves what the plan needs, all or nothing, starts actors on the nodes that the plan names, watches over
them, and moves rollouts, batches and weights through its object store. Frames between environments and policy
do not pass through Ray: an actor's environment workers are its own children, over shared memory, as
everywhere.
"""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from rove.cluster.executor import Executor, V
from rove.config.schema import Run
from rove.errors import RoveError
from rove.placement.inventory import Inventory, Node
from rove.placement.plan import Plan
from rove.policies import registry as policies
from rove.policies.base import Policy
from rove.runtime import ray
from rove.runtime.actor import Actor, Shared
from rove.training import parallel
from rove.workers import weights
from rove.workers.policy import Assignment, PolicyWorker

_PATIENCE = 60.0
"""Seconds that a placement group may take; nodes have been waited for before."""


def inventory(address: str | None, nodes: int) -> Inventory:
    """Return the devices of the cluster, this machine's first, once `nodes` nodes (0: any number) have
    joined."""
    ray.connect(address)
    until = time.monotonic() + _PATIENCE * 10
    while len(found := ray.nodes()) < nodes:
        if time.monotonic() > until:
            raise RoveError(
                f"placement.nodes = {nodes}, but only {len(found)} joined the Ray cluster in "
                f"{_PATIENCE * 10:.0f} s: run `ray start --address HOST:6379` on the others, or lower it."
            )
        time.sleep(0.2)
    return Inventory(
        tuple(
            Node(
                node["NodeID"],
                tuple(range(int(node["Resources"].get("GPU", 0)))),
                tuple(range(int(node["Resources"].get("CPU", 0)))),
            )
            for node in found
        )
    )


class RayExecutor(Executor):
    """See `Executor`."""

    def __init__(self, run: Run, plan: Plan, start: Path, profile: bool = False) -> None:
        super().__init__(run, plan, start.resolve(), profile)
        self._copy: Policy | None = None
        ray.connect(run.placement.ray_address)
        self._nodes = [node.name for node in plan.inventory.nodes]
        bundles = bundle(plan)
        self._reserved = [
            ray.Reservation(
                [one.resources for one in bundles], [self._nodes[one.node] for one in bundles], _PATIENCE
            )
        ]
        self._places = {
            worker: _Place(self._nodes[one.node], self._reserved[0], number)
            for number, one in enumerate(bundles)
            for worker in one.workers
        }
        try:
            self.plan = plan.renumbered(assigned(bundles, self._reserved[0]))
            self._start_all()
        except BaseException:  # an interrupt too: actors hold their devices until they are told
            self.close()
            raise

    def _meeting_point(self) -> str:
        rank0 = next(worker for worker in self.plan.workers if worker.rank == 0)
        return ray.run_on(self._nodes[rank0.node], parallel.free_address)

    def _put(self, assignment: Assignment) -> Actor[PolicyWorker]:
        own, place = self.plan.workers[assignment.number], self._places[assignment.number]
        options: dict[str, Any] = {
            "num_cpus": own.cores,
            "num_gpus": own.gpu_share if own.gpu is not None else 0,
            "scheduling_strategy": place.reserved.inside(place.bundle),
        }
        make = partial(PolicyWorker, assignment)
        deadline = self.run.placement.deadline
        return ray.InActor(assignment.name, make, options, deadline=deadline, node=place.node)

    def _replace(self, number: int) -> None:
        """See `Executor`. Where its node has gone away, another one that has room takes the worker."""
        if not ray.answers(self._places[number].node):
            self._move(number)
        super()._replace(number)

    def _move(self, number: int) -> None:
        """Find another node for a worker. Raises RoveError where none has room."""
        bundles, name = bundle(self.plan, number), self._assignment(number).name
        try:
            reserved = ray.Reservation([one.resources for one in bundles], None, _PATIENCE)
        except RoveError as error:
            raise RoveError(
                f"{name} was on a node of the Ray cluster that has gone away ({self._places[number].node}), "
                f"and no other has room for it ({bundles[0].resources}). The newest checkpoint is kept: add "
                "a node, and go on with rove train --resume."
            ) from error
        self._reserved.append(reserved)
        own = next(i for i, one in enumerate(bundles) if number in one.workers)
        self._places[number] = _Place(reserved.node(), reserved, own)
        self.plan = self.plan.renumbered(assigned(bundles, reserved), number)

    def _share(self, value: V) -> Shared[V]:
        return ray.Stored(value)

    def save_policy(self, directory: Path) -> None:
        """Written here, from a copy: the first rank may be on a node that cannot reach the directory."""
        if self._copy is None:
            self._copy = policies.restore(self.run, self.start, self.action_spec, torch.device("cpu"))
        weights.load(self._copy, self._pull())
        self._copy.save_pretrained(directory)

    def close(self) -> None:
        super().close()
        for reserved in self._reserved:
            reserved.release()
        ray.leave()


class _Place(NamedTuple):
    """Where a policy worker is."""

    node: str
    """Ray's name of it."""
    reserved: ray.Reservation
    bundle: int
    """Of the reservation."""


class Bundle(NamedTuple):
    """Resources that Ray reserves together, on one node: a GPU for whoever computes on it, or the cores of a
    worker."""

    node: int
    gpu: int | None
    """As the plan counts them."""
    workers: tuple[int, ...]
    """Numbers of the policy workers that run in it."""
    resources: dict[str, float]


def bundle(plan: Plan, only: int | None = None) -> list[Bundle]:
    """List the reservations of a plan; its environment workers' GPUs too, on which no policy may be. With
    `only`, those of this worker."""
    workers = [(n, worker) for n, worker in enumerate(plan.workers) if only is None or n == only]
    alone = [
        Bundle(worker.node, None, (number,), {"CPU": float(worker.cores)})
        for number, worker in workers
        if worker.gpu is None
    ]
    sharing: dict[tuple[int, int], list[int]] = {}
    for number, worker in workers:
        if worker.gpu is not None:
            sharing.setdefault((worker.node, worker.gpu), []).append(number)
        for env in () if worker.rollout is None else plan.rollouts[worker.rollout].environments:
            if env.gpu is not None:
                sharing.setdefault((worker.node, env.gpu), [])
    for (node, gpu), on in sharing.items():
        cores = float(sum(plan.workers[number].cores for number in on))
        alone.append(Bundle(node, gpu, tuple(on), {"GPU": 1.0} | ({"CPU": cores} if cores else {})))
    return alone


def assigned(bundles: list[Bundle], reserved: ray.Reservation) -> dict[tuple[int, int], int]:
    """(node, GPU as the plan counts them) -> CUDA index, on that node, of the one reserved for it."""
    places = {(one.node, one.gpu): n for n, one in enumerate(bundles) if one.gpu is not None}
    return dict(zip(places, reserved.gpus(list(places.values())), strict=True))
