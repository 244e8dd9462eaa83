"""Runs a Plan on Ray: a seat is an actor. The only file that imports Ray.

Ray reserves what the plan needs (one placement group, all or nothing), starts actors on the nodes that the
plan names, watches over them, and moves rollouts, batches and weights through its object store, where every
reader on a node maps one copy. Frames between environments and policy do not pass through Ray: an actor's
environment workers are its own children, over shared memory, as everywhere.
"""

# Ray makes its names at import, where a type checker cannot see them.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false

from __future__ import annotations

import os
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from rove.config.schema import Run
from rove.errors import RoveError
from rove.ipc import Crash, crash, pack, unpack
from rove.placement import gpus, weights
from rove.placement.executor import Answer, Executor, Seated, SeatLost
from rove.placement.inventory import Inventory, Node
from rove.placement.plan import Plan
from rove.placement.seat import SeatPlan, SeatWorker
from rove.policies import registry as policies
from rove.policies.base import Policy
from rove.training import parallel

_NODE = "ray.io/node-id"
_PATIENCE = 60.0
"""Seconds that a placement group may take; nodes have been waited for before."""

_RENUMBERS_NOTHING = {
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1",
}
"""Variables by which every process of a node counts its GPUs alike: an actor's environments may run on
another one than its policy."""

Packed = tuple[bytes, list[np.ndarray]]
"""A value as Ray moves it: arrays are mapped by readers, not copied."""


def connect(address: str | None) -> None:
    """Join the cluster at `address`, or start one here. Raises RoveError without Ray, or where none is."""
    try:
        import ray
    except ModuleNotFoundError as error:
        raise RoveError(
            "placement.executor = 'ray' needs the package 'ray', which is not installed. Install it: "
            "pip install 'rove[ray]'"
        ) from error
    if ray.is_initialized():
        return
    try:
        # Without an address a cluster of its own is started, never one that happens to run here joined.
        ray.init(
            address=address or "local", include_dashboard=None if address else False, log_to_driver=False
        )
    except ConnectionError as error:
        raise RoveError(
            f"No Ray cluster at placement.ray_address = {address!r}: {error}. Start one with "
            "`ray start --head`, or set --placement.ray_address none."
        ) from error


def inventory(address: str | None, nodes: int) -> Inventory:
    """What the cluster has, this machine first, once `nodes` nodes (0: any number) have joined."""
    import ray

    connect(address)
    until = time.monotonic() + _PATIENCE * 10
    while len(_alive()) < nodes:
        if time.monotonic() > until:
            raise RoveError(
                f"placement.nodes = {nodes}, but only {len(_alive())} joined the Ray cluster in "
                f"{_PATIENCE * 10:.0f} s: run `ray start --address HOST:6379` on the others, or lower it."
            )
        time.sleep(0.2)
    here = ray.get_runtime_context().get_node_id()
    found = sorted(_alive(), key=lambda node: (node["NodeID"] != here, node["NodeID"]))
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


def _alive() -> list[dict[str, Any]]:
    import ray

    return [node for node in ray.nodes() if node["Alive"]]


class RayExecutor(Executor):
    """See `Executor`."""

    def __init__(self, run: Run, plan: Plan, start: Path, profile: bool = False) -> None:
        super().__init__(run, plan, start.resolve(), profile)
        self._copy: Policy | None = None
        import ray
        from ray.util import placement_group
        from ray.util.placement_group import remove_placement_group

        connect(run.placement.ray_address)
        self._nodes = [node.name for node in plan.inventory.nodes]
        bundles = bundle(plan)
        self._bundles = {seat: number for number, one in enumerate(bundles) for seat in one.seats}
        wanted = [one.resources for one in bundles]
        where = [{_NODE: self._nodes[one.node]} for one in bundles]
        self._group = placement_group(wanted, strategy="PACK", bundle_label_selector=where)
        try:
            ray.get(self._group.ready(), timeout=_PATIENCE)
        except ray.exceptions.GetTimeoutError as error:
            remove_placement_group(self._group)
            raise RoveError(
                f"The Ray cluster did not give the plan its devices within {_PATIENCE:.0f} s ({wanted}): "
                "something else holds them. `ray status` shows what."
            ) from error
        try:
            self.plan = plan.renumbered(assigned(bundles, self._group))
            self._seat_all()
        except BaseException:  # an interrupt too: actors hold their devices until they are told
            self.close()
            raise

    def _meeting_point(self) -> str:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        rank0 = next(seat for seat in self.plan.seats if seat.rank == 0)
        there = NodeAffinitySchedulingStrategy(self._nodes[rank0.node], soft=False)
        find = ray.remote(num_cpus=0, scheduling_strategy=there)(parallel.free_address)
        return ray.get(find.remote())

    def _put(self, seat: SeatPlan) -> Seated:
        return InActor(seat, self._group, self._bundles[seat.number])

    def _share(self, value: Any) -> Any:
        import ray

        # One object for all readers; what is given here is not packed again by `call`.
        return ray.put(_packed(value))

    def save_policy(self, directory: Path) -> None:
        """Written here, from a copy: the first rank may be on a node that cannot reach the directory."""
        if self._copy is None:
            self._copy = policies.restore(self.run, self.start, self.action_spec, torch.device("cpu"))
        weights.load(self._copy, self._pull())
        self._copy.save_pretrained(directory)

    def close(self) -> None:
        import ray
        from ray.util.placement_group import remove_placement_group

        super().close()
        remove_placement_group(self._group)
        ray.shutdown()


class Bundle(NamedTuple):
    """What Ray reserves together, on one node: a GPU for whoever computes on it, or the cores of a seat."""

    node: int
    gpu: int | None
    """As the plan counts them."""
    seats: tuple[int, ...]
    """Numbers of the seats that run in it."""
    resources: dict[str, float]


def bundle(plan: Plan) -> list[Bundle]:
    """What a plan needs reserved; its environment workers' GPUs too, which may be no seat's."""
    alone = [
        Bundle(seat.node, None, (number,), {"CPU": float(seat.cores)})
        for number, seat in enumerate(plan.seats)
        if seat.gpu is None
    ]
    sharing: dict[tuple[int, int], list[int]] = {}
    for number, seat in enumerate(plan.seats):
        if seat.gpu is not None:
            sharing.setdefault((seat.node, seat.gpu), []).append(number)
        for worker in () if seat.unit is None else plan.units[seat.unit].workers:
            if worker.gpu is not None:
                sharing.setdefault((seat.node, worker.gpu), [])
    for (node, gpu), seats in sharing.items():
        cores = float(sum(plan.seats[number].cores for number in seats))
        alone.append(Bundle(node, gpu, tuple(seats), {"GPU": 1.0} | ({"CPU": cores} if cores else {})))
    return alone


def assigned(bundles: list[Bundle], group: Any) -> dict[tuple[int, int], int]:
    """(node, GPU as the plan counts them) -> CUDA index, on that node, of the one that Ray reserved for it.

    Other jobs may have the first ones, so a plan's own count says nothing.
    """
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    environment = {"env_vars": _RENUMBERS_NOTHING | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}}
    asked = {}
    for number, one in enumerate(bundles):
        if one.gpu is not None:
            there = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=number)
            ask = ray.remote(num_cpus=0, num_gpus=1, scheduling_strategy=there, runtime_env=environment)
            asked[one.node, one.gpu] = ask(_own_gpu).remote()
    return dict(zip(asked, ray.get(list(asked.values())), strict=True))


def _own_gpu() -> int:
    """CUDA index of the GPU that this task was given."""
    import ray

    (name,) = ray.get_gpu_ids()
    return gpus.index_of(name, os.environ.get(gpus.VISIBLE))


class InActor:
    """A seat in an actor; Ray carries out an actor's calls in order."""

    gone = False
    """Ray says so with the next answer."""

    def __init__(self, seat: SeatPlan, group: Any, number: int) -> None:
        """`number` is that of its bundle in the group."""
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        own = seat.plan.seats[seat.number]
        self.name = f"policy {own.unit}" if own.rank is None else f"learner {own.rank}"
        strategy = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=number)
        path = os.pathsep.join(filter(None, seat.setup.path))
        options: dict[str, Any] = {
            "num_cpus": own.cores,
            "num_gpus": own.gpu_share if own.gpu is not None else 0,
            "scheduling_strategy": strategy,
            "runtime_env": {"env_vars": _RENUMBERS_NOTHING | {"PYTHONPATH": path}},
        }
        self._actor = ray.remote(_Actor).options(**options).remote(_packed(seat))

    def call(self, method: str, *args: Any) -> Answer:
        import ray

        given = [arg if isinstance(arg, ray.ObjectRef) else _packed(arg) for arg in args]
        return _Ref(self.name, self._actor.call.remote(method, *given))

    def close(self) -> None:
        import ray

        # If it is gone, or busy, it is ended all the same.
        with suppress(ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError):
            ray.get(self._actor.call.remote("close"), timeout=10)
        ray.kill(self._actor)


class _Ref:
    """A call of an actor."""

    def __init__(self, name: str, ref: Any) -> None:
        self._name, self._ref = name, ref

    def result(self) -> Any:
        import ray

        try:
            answer = unpack(*ray.get(self._ref))
        except ray.exceptions.RayActorError as error:
            raise SeatLost(f"{self._name} is gone: {error}") from error
        if isinstance(answer, Crash):
            if isinstance(answer.error, RoveError):
                raise answer.error
            raise SeatLost(f"{self._name} failed:\n{answer.trace.rstrip()}") from answer.error
        return answer[0]


class _Actor:
    """A SeatWorker behind Ray; every value is packed on its way."""

    def __init__(self, seat: Packed) -> None:
        plan: SeatPlan = unpack(*seat)
        plan.setup.apply()
        self._failed: Crash | None = None
        try:
            self._worker = SeatWorker(plan)
        except Exception as error:  # noqa: BLE001 - whatever it was, the first call hands it on
            self._failed = crash(error)

    def call(self, method: str, *args: Packed) -> Packed:
        """What the method returned, in a tuple; or why it, or an earlier call, did not."""
        if self._failed is not None:
            return _packed(self._failed)
        try:
            return _packed((getattr(self._worker, method)(*(unpack(*arg) for arg in args)),))
        except Exception as error:  # noqa: BLE001 - likewise
            self._failed = crash(error)
            return _packed(self._failed)


def _packed(value: Any) -> Packed:
    data, buffers = pack(value)
    return data, [np.frombuffer(buffer, np.uint8) for buffer in buffers]
