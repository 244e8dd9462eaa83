"""Config + inventory → Plan: the processes that a map (`maps.py`) makes. Pure and printable."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from rove.config.needs import needs
from rove.config.schema import Run
from rove.errors import RoveError
from rove.placement import maps
from rove.placement.inventory import Device, Inventory, Kind
from rove.placement.maps import Map, by_node


@dataclass(frozen=True, slots=True)
class EnvironmentPlan:
    """An environment worker: a process that owns `stages` stages of `slots` slots each."""

    simulates: Kind
    """Kind of the devices that the map gives it."""
    cores: tuple[int, ...]
    """Cores of its node that it is pinned to; empty: not pinned."""
    gpu: int | None
    """CUDA index of the one that it simulates or renders on; None: it does both on cores."""
    stages: int
    slots: int


@dataclass(frozen=True, slots=True)
class RolloutPlan:
    """A rollout worker: a policy and the environment workers that it serves, all on one node."""

    environments: tuple[EnvironmentPlan, ...]
    in_process: bool
    """Environments and policy take turns on the same devices: no worker processes."""
    cores: tuple[int, ...]
    """Cores that the policy is pinned to; empty: not pinned."""
    threads: int

    @property
    def slots(self) -> int:
        """Number of slots of all its environment workers."""
        return sum(env.stages * env.slots for env in self.environments)


@dataclass(frozen=True, slots=True)
class WorkerPlan:
    """A policy worker: a process that holds weights, as a rollout worker, a learner rank, or both, which then
    share them."""

    node: int
    gpu: int | None
    cores: int
    """Number of cores that a cluster sets aside for it; no other worker has reserved them."""
    gpu_share: float
    """Share of the GPU, which several workers may use."""
    rollout: int | None
    """Index in `Plan.rollouts` of what it collects with; None where it only trains."""
    rank: int | None
    """Rank among the learners; None where it only acts."""
    threads: int
    """Threads of the learner's tensor work on the CPU."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Who runs where, down to processes."""

    name: str
    map: str
    inventory: Inventory
    rollouts: tuple[RolloutPlan, ...]
    workers: tuple[WorkerPlan, ...]
    staleness: int
    """How many versions old weights can be when what they collected is trained on; see `staleness`."""
    deterministic: bool

    @property
    def apart(self) -> tuple[int, ...]:
        """Numbers of the workers that collect on weights which they are sent."""
        return tuple(n for n, worker in enumerate(self.workers) if worker.rank is None)

    @property
    def broadcasts(self) -> bool:
        """Whether the learner's first rank sends its weights from GPU to GPU: only while no rollout is under
        way, which a broadcast would have to wait for."""
        ends = [worker for worker in self.workers if not worker.rank]
        return bool(self.apart) and not self.staleness and all(worker.gpu is not None for worker in ends)

    @property
    def ranks(self) -> int:
        """Processes that train together."""
        return sum(worker.rank is not None for worker in self.workers)

    @property
    def threads(self) -> int:
        """For tensor work on the CPU, in this process."""
        return max(worker.threads for worker in self.workers)

    @property
    def device(self) -> str:
        """Device of this process's tensors."""
        return _device(self.workers[0])

    def renumbered(self, indices: Mapping[tuple[int, int], int], only: int | None = None) -> Plan:
        """The plan on other GPUs: (node, CUDA index) -> CUDA index there. With `only`, the others of this
        worker alone."""
        workers, rollouts = list(self.workers), list(self.rollouts)

        def moved(node: int, gpu: int | None) -> int | None:
            return None if gpu is None else indices[node, gpu]

        for number, worker in enumerate(self.workers):
            if only is not None and number != only:
                continue
            workers[number] = replace(worker, gpu=moved(worker.node, worker.gpu))
            if worker.rollout is not None:
                own = rollouts[worker.rollout]
                environments = tuple(replace(e, gpu=moved(worker.node, e.gpu)) for e in own.environments)
                rollouts[worker.rollout] = replace(own, environments=environments)
        return replace(self, rollouts=tuple(rollouts), workers=tuple(workers))

    def __str__(self) -> str:
        first = self.rollouts[0]
        where = "in turn" if first.in_process else f"{first.environments[0].stages} stages a worker"
        workers = sum(len(rollout.environments) for rollout in self.rollouts)
        processes = "" if first.in_process else f", {_count(workers, 'environment worker')}"
        lag = f" · asynchronous, at most {_count(self.staleness, 'version')} behind" if self.staleness else ""
        policies = _count(len(self.rollouts), "policy", "policies")
        return (
            f"{self.name} ({self.map}) on {self.inventory} · {policies}{processes}, {where} · "
            f"{_count(self.ranks, 'learner')} · tensors: {self.device}, {_count(self.threads, 'thread')}{lag}"
        )


def _count(number: int, one: str, many: str | None = None) -> str:
    return f"{number} {one if number == 1 else many or one + 's'}"


def _device(worker: WorkerPlan) -> str:
    return "cpu" if worker.gpu is None else f"cuda:{worker.gpu}"


def make_plan(run: Run, inventory: Inventory) -> Plan:
    """Place a run on an inventory. Raises RoveError naming the device that cannot serve, and the fix."""
    inventory = _restrict(run, inventory)
    placement = run.placement
    roles = maps.read(run, inventory)
    policies = _processes(roles["policy"])
    workers = _workers(roles, policies, run)
    launching = _launching(roles, [worker for worker, _ in workers], inventory)
    rollouts = _rollouts(roles, policies, launching, run, inventory)
    if placement.executor == "local" and len(inventory.nodes) > 1:
        raise RoveError(
            f"placement.executor = 'local' runs on one machine, the inventory has {inventory}: "
            "set --placement.executor ray."
        )
    return Plan(
        name=placement.map if placement.map in maps.NAMES else "map",
        map=maps.describe(roles, inventory),
        inventory=inventory,
        rollouts=tuple(rollouts),
        workers=tuple(_reserve(workers, rollouts, launching)),
        staleness=staleness(placement.ahead),
        deterministic=placement.deterministic,
    )


def staleness(ahead: int) -> int:
    """Versions by which weights can be behind when the rollout that they collected is trained on.

    Version i is published when iteration i begins, before it takes its rollouts; every iteration takes at
    least one, the oldest. A rollout worker begins rollout j only while fewer than `ahead` are begun and not
    yet taken, so not before rollout j - ahead has been taken, in some iteration i, and acts on version i or a
    newer one.
    Of the rollouts j - ahead, …, j each iteration takes at least one, so rollout j is taken in iteration
    i + ahead or before: at most `ahead` versions later. With `ahead = 0` a rollout is begun when it is asked
    for, on the version just published: nothing is ever behind.
    """
    return ahead


def _restrict(run: Run, inventory: Inventory) -> Inventory:
    """Without what `placement.device` rules out."""
    wanted, _, index = run.placement.device.partition(":")
    gpus = inventory.devices("gpu")
    if wanted == "cuda" and not gpus:
        raise RoveError("placement.device is 'cuda', but no CUDA device is visible. Use 'auto' or 'cpu'.")
    if index and int(index) not in inventory.nodes[0].gpus:
        raise RoveError(
            f"placement.device is 'cuda:{index}', but this machine has GPUs "
            f"{', '.join(map(str, inventory.nodes[0].gpus))}. Name one of them, or use 'auto'."
        )
    if index:
        return inventory.only_gpu(int(index))
    return inventory.without_gpus() if wanted == "cpu" else inventory


def _processes(devices: Sequence[Device]) -> list[list[Device]]:
    """The devices of each process that a role has: a GPU, or all its cores of a node."""
    return [[d] for d in devices] if devices[0].kind == "gpu" else by_node(devices)


Launching = dict[int, tuple[int, ...]]
"""Node -> cores."""


def _launching(roles: Map, workers: Sequence[WorkerPlan], inventory: Inventory) -> Launching:
    """The cores from which processes launch their GPU's kernels, one each, where there are enough.

    Launching is the work of one thread that must not wait its turn: a 7B policy's chunk is thousands of
    kernels. First come cores that no role has; then some that would simulate, as long as every policy keeps
    two that do.
    """
    computing = {(d.node, d.index) for role in roles.values() for d in role if d.kind == "core"}
    on_gpus = Counter(worker.node for worker in workers if worker.gpu is not None)
    policies = Counter(w.node for w in workers if w.gpu is not None and w.rollout is not None)
    simulating: dict[int, list[int]] = defaultdict(list)
    for device in roles["env"]:
        if device.kind == "core":
            simulating[device.node].append(device.index)
    found: Launching = {}
    for number, node in enumerate(inventory.nodes):
        idle = [core for core in node.cores if (number, core) not in computing]
        spare = len(simulating[number]) - 2 * policies[number] if policies[number] else 0
        found[number] = tuple(idle + simulating[number][: max(0, spare)])[: on_gpus[number]]
    return found


def _rollouts(
    roles: Map, policies: list[list[Device]], launching: Launching, run: Run, inventory: Inventory
) -> list[RolloutPlan]:
    """The rollout workers, in the order of `policies`, the devices of each."""
    simulating: dict[int, list[Device]] = defaultdict(list)
    for device in roles["env"]:
        if device.kind == "gpu" or device.index not in launching[device.node]:
            simulating[device.node].append(device)
    counts = Counter(devices[0].node for devices in policies)
    renders = maps.resources(run, inventory).rendering == "gpu"
    dealt: list[tuple[list[Device], bool]] = []
    for node, count in counts.items():
        shares = _deal(simulating[node], count, inventory)
        dealt += [(share, count == 1) for share in shares]
    rollouts = []
    for number, (policy, (env, sole)) in enumerate(zip(policies, dealt, strict=True)):
        gpus, together = policy[0].kind == "gpu", {*env} == {*policy}
        # Where there are more rollout workers, worker processes keep each to its own cores.
        in_turn = together or (sole and gpus != (env[0].kind == "gpu"))
        parts = _split(env, run.placement.env_workers)
        stages = _stages(run, together, len(policies) * len(parts))
        # Unbound where the policy has the same cores: they take turns, or the system shares them out.
        alone = env[0].kind == "core" and not {*env} & {*policy}
        drawn = _draws_on(number, policy, inventory) if renders else None
        slots = _slots(run, len(policies), len(parts), stages)
        rollouts.append(
            RolloutPlan(
                environments=tuple(
                    EnvironmentPlan(
                        simulates=mine[0].kind,
                        cores=tuple(d.index for d in mine) if alone else (),
                        gpu=mine[0].index if mine[0].kind == "gpu" else drawn,
                        stages=stages,
                        slots=slots,
                    )
                    for mine in parts
                ),
                in_process=in_turn and stages == 1 and len(parts) == 1 and run.placement.env_workers == 0,
                cores=tuple(d.index for d in policy) if alone and not gpus else (),
                threads=_threads(run, policy, inventory),
            )
        )
    return rollouts


def _stages(run: Run, together: bool, workers: int) -> int:
    """Return the number of stages of each worker: what is asked for; else one where environments and policy
    are `together` on their devices, and two where they are not, if two can share the slots, and no group is
    cut."""
    if run.placement.stages or together:
        return run.placement.stages or 1
    whole = needs(run.algorithm).group_size or 1
    return 1 if run.rollout.num_envs % (2 * workers * whole) else 2


def _draws_on(rollout: int, policy: Sequence[Device], inventory: Inventory) -> int | None:
    """The GPU that renders what a rollout worker simulates on cores: its policy's, or one of its node's in
    turn."""
    if policy[0].kind == "gpu":
        return policy[0].index
    there = inventory.nodes[policy[0].node].gpus
    return there[rollout % len(there)] if there else None


def _deal(env: list[Device], count: int, inventory: Inventory) -> list[list[Device]]:
    """A node's environment devices among its `count` policies."""
    number = len(env)
    if number % count == 0:
        share = number // count
        return [env[i * share : (i + 1) * share] for i in range(count)]
    if env[0].kind == "core":
        return [list(part) for i in range(count) if (part := env[i::count] or [env[i % number]])]
    if count % number == 0:
        return [[env[i % number]] for i in range(count)]
    raise RoveError(
        f"placement.map has {number} env devices for {count} policy devices on "
        f"{inventory.nodes[env[0].node].name}: one number has to divide the other; take {env[-1]} from env."
    )


def _split(env: list[Device], workers: int) -> list[list[Device]]:
    """The devices of each worker: a GPU each; of cores all, or an even share of them."""
    if env[0].kind == "gpu":
        return [[device] for device in env for _ in range(workers or 1)]
    count = workers or 1
    if count > len(env):
        return [[env[i % len(env)]] for i in range(count)]
    return [env[i * len(env) // count : (i + 1) * len(env) // count] for i in range(count)]


def _slots(run: Run, policies: int, workers: int, stages: int) -> int:
    """b, of every stage."""
    total, parts = run.rollout.num_envs, policies * workers * stages
    if total % parts:
        raise RoveError(
            f"rollout.num_envs = {total} cannot be split evenly over {policies} policies × {workers} "
            f"environment workers × {stages} stages: set --rollout.num_envs {-(-total // parts) * parts}."
        )
    slots = total // parts
    group = needs(run.algorithm).group_size or 1
    if slots % group:
        size = group * parts
        raise RoveError(
            f"A stage of {slots} slots would cut a group of algorithm.group_size = "
            f"{group} in two: set --rollout.num_envs {-(-total // size) * size}, or fewer "
            "stages."
        )
    return slots


def _threads(run: Run, devices: Sequence[Device], inventory: Inventory) -> int:
    """For tensor work: as many as asked for, at most the cores that a role has."""
    cores = len(devices) if devices[0].kind == "core" else len(inventory.nodes[devices[0].node].cores)
    return min(run.placement.threads or cores, cores)


def _workers(roles: Map, policies: list[list[Device]], run: Run) -> list[tuple[WorkerPlan, list[Device]]]:
    """The processes that hold weights, with the devices of each. A policy and a learner rank on one device
    share theirs, unless the run is asynchronous: then the policy acts on old ones while the learner makes new
    ones."""
    learners = _processes(roles["learner"])
    if run.placement.learners > 1 and roles["learner"][0].kind == "gpu":
        raise RoveError(
            f"placement.learners = {run.placement.learners}, but the learner is on GPUs, and NCCL refuses "
            "two ranks on one: set --placement.learners 0."
        )
    if run.placement.learners:
        learners = _per_learner(learners, run.placement.learners)
    workers, left = [], dict(enumerate(policies))
    for rank, devices in enumerate(learners):
        shared, own = None, {*devices}
        if not run.placement.ahead:
            shared = next((u for u, policy in left.items() if own.issuperset(policy)), None)
            if shared is not None:
                del left[shared]
        workers.append((_worker(devices, run, shared, rank), devices))
    return workers + [(_worker(policy, run, number, None), policy) for number, policy in left.items()]


def _reserve(
    workers: list[tuple[WorkerPlan, list[Device]]], rollouts: list[RolloutPlan], launching: Launching
) -> list[WorkerPlan]:
    """The workers with their cores and GPU shares. A core is reserved once, by the first worker that computes
    on it or launches from it; a GPU's workers share it evenly."""
    taken: set[tuple[int, int]] = set()
    free = {node: list(cores) for node, cores in launching.items()}
    sharing = Counter((worker.node, worker.gpu) for worker, _ in workers if worker.gpu is not None)
    reserved = []
    for worker, own in workers:
        wanted = {(d.node, d.index) for d in own if d.kind == "core"}
        if worker.rollout is not None:
            environments = rollouts[worker.rollout].environments
            wanted |= {(worker.node, core) for e in environments for core in e.cores}
        if worker.gpu is not None and free[worker.node]:
            wanted.add((worker.node, free[worker.node].pop(0)))
        new = wanted - taken
        taken |= new
        share = 0.0 if worker.gpu is None else 1 / sharing[worker.node, worker.gpu]
        reserved.append(replace(worker, cores=len(new), gpu_share=share))
    return reserved


def _per_learner(learners: list[list[Device]], count: int) -> list[list[Device]]:
    """`count` learner processes for every GPU, or for every node's cores."""
    return [
        devices[i * len(devices) // count : (i + 1) * len(devices) // count] or devices[:1]
        for devices in learners
        for i in range(count)
    ]


def _worker(devices: Sequence[Device], run: Run, rollout: int | None, rank: int | None) -> WorkerPlan:
    first = devices[0]
    threads = min(run.placement.threads or len(devices), len(devices)) if first.kind == "core" else 1
    gpu = first.index if first.kind == "gpu" else None
    return WorkerPlan(first.node, gpu, 0, 0.0, rollout, rank, threads)
