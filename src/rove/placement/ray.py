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
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Concatenate, NamedTuple

import numpy as np
import torch

from rove.config.schema import Run
from rove.errors import RoveError
from rove.placement import gpus, weights
from rove.placement.executor import Executor, V
from rove.placement.inventory import Inventory, Node
from rove.placement.plan import Plan
from rove.placement.seat import SeatPlan, SeatWorker
from rove.policies import registry as policies
from rove.policies.base import Policy
from rove.runtime.actor import Actor, Future, Given, Lost, P, R, Shared, T, V_co
from rove.runtime.channel import pack, unpack
from rove.runtime.process import Crash, crash
from rove.runtime.setup import Setup
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
    """Return the devices of the cluster, this machine's first, once `nodes` nodes (0: any number) have
    joined."""
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

    def _put(self, seat: SeatPlan) -> Actor[SeatWorker]:
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        own, bundle = self.plan.seats[seat.number], self._bundles[seat.number]
        options: dict[str, Any] = {
            "num_cpus": own.cores,
            "num_gpus": own.gpu_share if own.gpu is not None else 0,
            "scheduling_strategy": PlacementGroupSchedulingStrategy(
                self._group, placement_group_bundle_index=bundle
            ),
        }
        return InActor(seat.name, partial(SeatWorker, seat), options)

    def _share(self, value: V) -> Shared[V]:
        return Stored(value)

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
    """Resources that Ray reserves together, on one node: a GPU for whoever computes on it, or the cores of a
    seat."""

    node: int
    gpu: int | None
    """As the plan counts them."""
    seats: tuple[int, ...]
    """Numbers of the seats that run in it."""
    resources: dict[str, float]


def bundle(plan: Plan) -> list[Bundle]:
    """List the reservations of a plan; its environment workers' GPUs too, which may be no seat's."""
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


class InActor(Actor[T]):
    """A worker in a Ray actor, which carries out its calls in order."""

    here = False

    def __init__(self, name: str, make: Callable[[], T], options: dict[str, Any]) -> None:
        """`make` has to be picklable; `options` are Ray's."""
        import ray

        self.name, setup = name, Setup.here()
        path = os.pathsep.join(filter(None, setup.path))
        variables = {"env_vars": _RENUMBERS_NOTHING | {"PYTHONPATH": path}}
        remote = ray.remote(_Served).options(**options, runtime_env=variables)
        self._actor = remote.remote(_packed(setup), _packed(make))

    def call(self, method: Callable[Concatenate[T, P], R], *args: P.args, **kwargs: P.kwargs) -> Future[R]:
        given = [arg.ref if isinstance(arg, Stored) else _packed(arg) for arg in args]
        return _Call(self.name, self._actor.call.remote(_packed((method, kwargs)), *given))

    def close(self) -> None:
        import ray

        # If it is gone, or busy, it is ended all the same.
        with suppress(ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError):
            ray.get(self._actor.close.remote(), timeout=10)
        self.kill()

    def kill(self) -> None:
        import ray

        ray.kill(self._actor)


class Stored(Shared[V_co]):
    """A shared argument in Ray's object store: one object for all readers of a node."""

    def __init__(self, value: V_co) -> None:
        import ray

        self.ref = ray.put(_packed(Given(value)))

    @property
    def value(self) -> V_co:
        import ray

        return unpack(*ray.get(self.ref)).value


class _Call(Future[R]):
    """A call of an actor."""

    def __init__(self, name: str, ref: Any) -> None:
        self._name, self._ref = name, ref

    def result(self) -> R:
        import ray

        try:
            answer = unpack(*ray.get(self._ref))
        except ray.exceptions.RayActorError as error:
            raise Lost(self._name, f"is gone: {error}") from error
        if isinstance(answer, Crash):
            raise Lost(self._name, f"failed:\n{answer.trace.rstrip()}", answer.error)
        return answer[0]

    def ready(self) -> bool:
        import ray

        return bool(ray.wait([self._ref], timeout=0)[0])

    def fileno(self) -> int:
        raise AssertionError("Ray's answers do not come through a descriptor")


class _Served:
    """A worker behind Ray; every value is packed on its way."""

    def __init__(self, setup: Packed, make: Packed) -> None:
        self._failed: Crash | None = None
        try:
            unpack(*setup).apply()
            self._worker = unpack(*make)()
        except Exception as error:  # noqa: BLE001 - whatever it was, the first call hands it on
            self._failed = crash(error)

    def call(self, what: Packed, *args: Packed) -> Packed:
        """Return the method's result in a tuple, or raise why it, or an earlier call, has none."""
        if self._failed is None:
            try:
                method, kwargs = unpack(*what)
                return _packed((method(self._worker, *(unpack(*arg) for arg in args), **kwargs),))
            except Exception as error:  # noqa: BLE001 - likewise
                self._failed = crash(error)
        return _packed(self._failed)

    def close(self) -> None:
        if self._failed is None:
            self._worker.close()


def _packed(value: Any) -> Packed:
    data, buffers = pack(value)
    return data, [np.frombuffer(buffer, np.uint8) for buffer in buffers]
