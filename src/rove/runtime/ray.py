"""Actors on Ray, and what they reserve. The only file that imports Ray.

Ray moves arguments and results through its object store, where every reader on a node maps one copy.
"""

# Ray makes its names at import, where a type checker cannot see them.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Concatenate

import numpy as np

from rove.errors import RoveError
from rove.runtime import gpus
from rove.runtime.actor import Actor, Future, Given, Lost, P, R, Shared, T, V_co
from rove.runtime.channel import pack, unpack
from rove.runtime.process import Crash, crash
from rove.runtime.setup import Setup

_NODE = "ray.io/node-id"
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


def nodes() -> list[dict[str, Any]]:
    """The nodes of the cluster that are alive, as Ray describes them; this machine's first."""
    import ray

    here = ray.get_runtime_context().get_node_id()
    alive = [node for node in ray.nodes() if node["Alive"]]
    return sorted(alive, key=lambda node: (node["NodeID"] != here, node["NodeID"]))


def run_on(node: str, function: Callable[[], R]) -> R:
    """The result of a function on the node of this name."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    there = NodeAffinitySchedulingStrategy(node, soft=False)
    return ray.get(ray.remote(num_cpus=0, scheduling_strategy=there)(function).remote())


def leave() -> None:
    """Leave the cluster, or end the one that was started here."""
    import ray

    ray.shutdown()


class Reservation:
    """Resources of a cluster, set aside together or not at all."""

    def __init__(self, bundles: Sequence[Mapping[str, float]], nodes: Sequence[str], patience: float) -> None:
        """Bundle i is on `nodes[i]`. Raises RoveError where the cluster does not have them all within
        `patience` seconds."""
        import ray
        from ray.util import placement_group

        self._group = placement_group(
            [dict(bundle) for bundle in bundles],
            strategy="PACK",
            bundle_label_selector=[{_NODE: node} for node in nodes],
        )
        try:
            ray.get(self._group.ready(), timeout=patience)
        except ray.exceptions.GetTimeoutError as error:
            self.release()
            raise RoveError(
                f"The Ray cluster did not give the plan its devices within {patience:.0f} s ({bundles}): "
                "something else holds them. `ray status` shows what."
            ) from error

    def inside(self, bundle: int) -> Any:
        """The scheduling strategy of what runs in a bundle."""
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        return PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=bundle)

    def gpus(self, bundles: Sequence[int]) -> list[int]:
        """CUDA index, on its node, of the GPU that was reserved for each of these bundles.

        Other jobs may have the first ones, so that counting says nothing.
        """
        import ray

        path = os.pathsep.join(filter(None, sys.path))
        environment = {"env_vars": _RENUMBERS_NOTHING | {"PYTHONPATH": path}}
        asked = [
            ray.remote(
                num_cpus=0, num_gpus=1, scheduling_strategy=self.inside(bundle), runtime_env=environment
            )(_own_gpu).remote()
            for bundle in bundles
        ]
        return ray.get(asked)

    def release(self) -> None:
        """Give the resources back."""
        from ray.util.placement_group import remove_placement_group

        remove_placement_group(self._group)


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
