"""Actors on Ray, and what they reserve. The only file that imports Ray.

Ray moves arguments and results through its object store, where every reader on a node maps one copy.
"""

# Ray makes its names at import, where a type checker cannot see them.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false

from __future__ import annotations

import atexit
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, Concatenate

import numpy as np

from rove.errors import RoveError
from rove.runtime import gpus, pulse
from rove.runtime.actor import Actor, Future, Given, Lost, P, R, Shared, T, V_co
from rove.runtime.channel import pack, unpack
from rove.runtime.guard import Guard
from rove.runtime.process import Crash, crash
from rove.runtime.pulse import WAKE, Patience, Signs, Watch, headway
from rove.runtime.setup import Setup

_NODE = "ray.io/node-id"
_ASIDE = "aside"
"""Name of the group of calls that an actor carries out beside the others."""
_REACHED, _JOINED = 10.0, 60.0
"""Seconds in which a cluster has to answer at its address, and in which it has to be joined."""
_HEAD = 30.0
"""Seconds without an answer of Ray's head after which the cluster is gone. Ray itself would wait 60 s
(`RAY_gcs_rpc_server_reconnect_timeout_s`), and then end the process without saying so."""
_NODE_ANSWERS = 60.0
"""Seconds in which a node that is well runs a function. Of one that is not, Ray knows after 15 s where its
processes are gone, and after 65 s where they are stopped (`RAY_health_check_*` on the head)."""
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
    global _head
    if ray.is_initialized():
        return
    if address is not None:
        _reach(address)
    join = partial(
        ray.init,
        address=address or "local",
        include_dashboard=None if address else False,
        log_to_driver=False,
    )
    try:
        # Without an address a cluster of its own is started, never one that happens to run here joined.
        if address is None:
            join()
        else:
            _within(join, f"The Ray cluster at placement.ray_address = {address!r} was not joined")
    except RoveError:
        raise
    except (ConnectionError, ValueError) as error:
        raise RoveError(_no_cluster(address, error)) from error
    except OSError as error:
        if "AF_UNIX" not in str(error):
            raise
        raise RoveError(
            f"Ray's sockets would have too long a path ({error}): set RAY_TMPDIR, or TMPDIR, to a short one, "
            "such as /tmp."
        ) from error
    _head = _Head(address, _Witness.of_this_machine())
    # Wherever the process ends: a head that is being shut down does not answer either.
    atexit.register(_head.stop)


class _Head:
    """Has this process end once Ray's head no longer answers: calls of Ray's then wait without a deadline,
    until Ray ends the process."""

    def __init__(self, address: str | None, witness: _Witness | None = None) -> None:
        self._address, self._witness = address, witness
        self._answers, self._patience = 0, Patience()
        self._over = threading.Event()
        self._guard = Guard(self._wrong)
        self._asking = threading.Thread(target=self._ask, daemon=True, name="asks Ray's head")
        self._asking.start()

    def _ask(self) -> None:
        import ray

        while ray.is_initialized() and not self._over.wait(WAKE):
            with suppress(Exception):  # to fail, in whatever way, is no answer
                ray.nodes()  # waits for as long as there is none
                self._answers += 1
        self._guard.stop()  # whoever joins a cluster again has it watched anew

    def _wrong(self) -> str | None:
        import ray

        if not ray.is_initialized() or self._patience.look(self._answers) <= _HEAD:
            return None
        self._dismiss()  # one line is enough
        given = self._address
        where = "that this run started" if given is None else f"at placement.ray_address = {given!r}"
        return (
            f"The head of the Ray cluster {where} has not answered for {_HEAD:g} s: it has gone away. The "
            "newest checkpoint is kept: start the cluster again, and go on with rove train --resume."
        )

    def stop(self) -> None:
        """End nothing from now on."""
        self._guard.stop()
        self._over.set()
        self._dismiss()
        self._asking.join(2 * WAKE)

    def _dismiss(self) -> None:
        if self._witness is not None:
            self._witness.dismiss()


_WITNESS = """
import os, signal, socket, sys

for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
    signal.signal(number, signal.SIG_IGN)
if not sys.stdin.buffer.read():
    try:
        socket.socket(socket.AF_UNIX).connect(sys.argv[1])
    except OSError:
        os.write(2, f"\\nrove: error: {sys.argv[2]}\\n".encode())
"""
"""Waits for the end of this process, and says what it was where nobody dismissed it before, and nothing
listens at the socket any more."""


class _Witness:
    """A process that says why this one has ended, where Ray ends it.

    Once the Ray processes of this machine are gone Ray ends whoever next uses its object store, at once, with
    exit status 1, and tells nothing but a log file (`StoreConn::ExitIfErrorStatus`). Nothing of ours runs
    then.
    """

    def __init__(self, store: str) -> None:
        """`store` is the path of the object store's socket."""
        message = (
            "This process has ended with the Ray processes of this machine, which are gone: stopped, killed, "
            "or out of memory. The newest checkpoint is kept: start the cluster again, and go on with rove "
            "train --resume."
        )
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _WITNESS, store, message],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )

    @classmethod
    def of_this_machine(cls) -> _Witness | None:
        """None where this process uses no object store of its machine, as over `ray://`."""
        store = nodes()[0].get("ObjectStoreSocketName")
        return cls(store) if store and os.path.exists(store) else None

    def dismiss(self) -> None:
        """Have it end, and say nothing; twice is harmless."""
        with suppress(OSError, ValueError, subprocess.TimeoutExpired):  # it is gone, or was dismissed
            self._process.communicate(b"dismissed", timeout=10)


_head: _Head | None = None
"""Of the cluster that was joined with `connect`."""


def _reach(address: str) -> None:
    """Raise RoveError where nothing listens at "host:port"; other addresses are Ray's own to look up."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal():
        return
    try:
        socket.create_connection((host, int(port)), _REACHED).close()
    except OSError as error:
        raise RoveError(_no_cluster(address, error)) from error


def _no_cluster(address: str | None, error: object) -> str:
    return (
        f"No Ray cluster at placement.ray_address = {address!r}: {error}. Start one with `ray start --head`, "
        "or set --placement.ray_address none."
    )


def _within(call: Callable[[], object], what: str) -> None:
    """Carry out a call that may never return. Raises RoveError, which begins with `what`, where it takes too
    long, and whatever the call raises."""
    raised: list[BaseException] = []

    def carry_out() -> None:
        try:
            call()
        except BaseException as error:  # noqa: BLE001 - raised again below, in the thread that asked
            raised.append(error)

    thread = threading.Thread(target=carry_out, daemon=True)
    thread.start()
    thread.join(_JOINED)
    if thread.is_alive():
        raise RoveError(f"{what} in {_JOINED:g} s: is it one, and is it well? `ray status` says so.")
    if raised:
        raise raised[0]


def nodes() -> list[dict[str, Any]]:
    """The nodes of the cluster that are alive, as Ray describes them; this machine's first."""
    import ray

    here = ray.get_runtime_context().get_node_id()
    alive = [node for node in ray.nodes() if node["Alive"]]
    return sorted(alive, key=lambda node: (node["NodeID"] != here, node["NodeID"]))


def run_on(node: str, function: Callable[[], R], seconds: float | None = None) -> R:
    """The result of a function on the node of this name, within so many seconds; None: however many."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    there = NodeAffinitySchedulingStrategy(node, soft=False)
    return ray.get(ray.remote(num_cpus=0, scheduling_strategy=there)(function).remote(), timeout=seconds)


def answers(node: str) -> bool:
    """Whether the node of this name still runs what it is asked to."""
    import ray

    try:
        run_on(node, _nothing, _NODE_ANSWERS)
    except ray.exceptions.RayError:  # it is known to be gone, or there was no answer
        return False
    return True


def _nothing() -> None:
    """To be done on a node, to see whether it answers."""


def leave() -> None:
    """Leave the cluster, or end the one that was started here."""
    import ray

    if _head is not None:
        _head.stop()
    ray.shutdown()


class Reservation:
    """Resources of a cluster, set aside together or not at all."""

    def __init__(
        self, bundles: Sequence[Mapping[str, float]], nodes: Sequence[str] | None, patience: float
    ) -> None:
        """Bundle i is on `nodes[i]`; None: all are on one node that has room for them. Raises RoveError where
        the cluster does not have them all within `patience` seconds."""
        import ray
        from ray.util import placement_group

        self._group = placement_group(
            [dict(bundle) for bundle in bundles],
            strategy="PACK" if nodes else "STRICT_PACK",
            bundle_label_selector=[{_NODE: node} for node in nodes] if nodes else None,
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

    def node(self) -> str:
        """The name of the node that has the first bundle."""
        from ray.util.placement_group import placement_group_table

        return placement_group_table(self._group)["bundles_to_node_id"][0]

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

    def __init__(
        self,
        name: str,
        make: Callable[[], T],
        options: dict[str, Any],
        *,
        deadline: float = 600.0,
        node: str | None = None,
    ) -> None:
        """`make` has to be picklable; `options` are Ray's; `deadline` says when it counts as hung, see
        `pulse.Watch`; `node` is the name of the one that it is on, where that is known."""
        import ray

        self.name, self.node, setup = name, node, Setup.here()
        self._watch, self._seen = Watch(deadline, patient=True), Signs(0, 0)
        self._news: Any = None
        """Its signs, on their way."""
        self.lost: Lost | None = None
        path = os.pathsep.join(filter(None, setup.path))
        variables = {"env_vars": _RENUMBERS_NOTHING | {"PYTHONPATH": path}}
        # Its signs are asked for beside its calls, which are carried out one by one, all in one thread.
        remote: Any = ray.remote
        served = remote(concurrency_groups={_ASIDE: 1})(_Served)
        self._actor = served.options(**options, runtime_env=variables).remote()
        self._actor.start.remote(_packed(setup), _packed(make))

    def call(self, method: Callable[Concatenate[T, P], R], *args: P.args, **kwargs: P.kwargs) -> Future[R]:
        given = [arg.ref if isinstance(arg, Stored) else _packed(arg) for arg in args]
        return _Call(self, self._actor.call.remote(_packed((method, kwargs)), *given))

    def answered(self) -> None:
        """One of its calls has a result."""
        self._watch.answered(self._seen)

    def look(self) -> None:
        """Look for signs of it; `lost` is set where it counts as hung. To be called while it is waited
        for."""
        import ray

        if self._news is None:
            self._news = self._actor.signs.options(concurrency_group=_ASIDE).remote()
        elif ray.wait([self._news], timeout=0)[0]:
            with suppress(ray.exceptions.RayError):  # its calls say what became of it
                self._seen = Signs(self._seen.beats + 1, ray.get(self._news))
            self._news = None
        if self.lost is None and (how := self._watch.overdue(self._seen)) is not None:
            self.lost = Lost(self.name, how)

    def fate(self, error: Exception) -> str:
        """How it was lost, by Ray's error, to be said of it."""
        if self.node is not None and not answers(self.node):
            return f"was on a node of the Ray cluster that has gone away ({self.node})"
        return f"is gone: {' '.join(str(error).split())}"

    def close(self) -> None:
        import ray

        # If it is gone, or busy, it is ended all the same.
        with suppress(ray.exceptions.RayError):
            if self.lost is None:
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

    def __init__(self, actor: InActor[Any], ref: Any) -> None:
        self._actor, self._ref = actor, ref
        self._looked = 0.0
        self._came = False

    def result(self) -> R:
        import ray

        while not self._ready(WAKE):
            headway()  # to wait for a process that has a deadline of its own is no standstill
        if not self._came and self._actor.lost is not None:
            raise self._actor.lost
        try:
            answer = unpack(*ray.get(self._ref))
        except ray.exceptions.RayError as error:
            raise Lost(self._actor.name, self._actor.fate(error)) from error
        if isinstance(answer, Crash):
            raise Lost(self._actor.name, f"failed:\n{answer.trace.rstrip()}", answer.error)
        return answer[0]

    def ready(self) -> bool:
        return self._ready(0)

    def _ready(self, seconds: float) -> bool:
        """Whether there is a result within this time, or will be none."""
        import ray

        if not self._came and ray.wait([self._ref], timeout=seconds)[0]:
            self._came = True
            self._actor.answered()
        if not self._came and time.monotonic() - self._looked >= WAKE / 2:
            self._looked = time.monotonic()
            self._actor.look()
        return self._came or self._actor.lost is not None

    def fileno(self) -> None:
        return None


class _Served:
    """A worker behind Ray; every value is packed on its way."""

    def __init__(self) -> None:
        self._failed: Crash | None = None

    def start(self, setup: Packed, make: Packed) -> None:
        """Make the worker, in the thread in which it is called: devices and contexts belong to one."""
        try:
            unpack(*setup).apply()
            self._worker = unpack(*make)()
        except BaseException as error:  # noqa: BLE001 - whatever it was, the first call hands it on
            self._failed = crash(error)

    def signs(self) -> int:
        """Return the worker's headway; that there is an answer is a sign of life."""
        return pulse.own().headway

    def call(self, what: Packed, *args: Packed) -> Packed:
        """Return the method's result in a tuple, or raise why it, or an earlier call, has none."""
        if self._failed is None:
            try:
                method, kwargs = unpack(*what)
                return _packed((method(self._worker, *(unpack(*arg) for arg in args), **kwargs),))
            except BaseException as error:  # noqa: BLE001 - likewise
                self._failed = crash(error)
        return _packed(self._failed)

    def close(self) -> None:
        if self._failed is None:
            self._worker.close()


def _packed(value: Any) -> Packed:
    data, buffers = pack(value)
    return data, [np.frombuffer(buffer, np.uint8) for buffer in buffers]
