"""Which devices each role has: `placement.map`, as a line of text or as a name that stands for one.

A map, `learner: 0-7, env: 0-3, policy: 4-7`, gives three roles devices of the inventory. Plain numbers are
GPUs where there are any, else CPU cores; `core 0-15` are cores, `all` is every device. Names stand for maps:

- `colocated`: all three on everything, taking turns;
- `hybrid`: environments and policy on halves of their own while they collect, overlapped; the learner on all;
- `disaggregated`: three disjoint sets; with two devices, policy and learner share one.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

from rove.config.schema import Run
from rove.envs import registry as envs
from rove.envs.base import Resources
from rove.errors import RoveError, nearest
from rove.placement.inventory import Device, Inventory

Role = Literal["learner", "env", "policy"]
ROLES: tuple[Role, ...] = ("learner", "env", "policy")
NAMES = ("colocated", "hybrid", "disaggregated", "auto")
Map = dict[Role, tuple[Device, ...]]


def read(run: Run, inventory: Inventory) -> Map:
    """The map of a run. Raises RoveError naming the device that cannot serve, and the fix."""
    text, used = run.placement.map, resources(run, inventory)
    if used.gpu and inventory.kind != "gpu":
        raise RoveError(
            f"env.kind = {run.env.kind!r} is set to use a GPU, and the inventory ({inventory}) has none: "
            "have it simulate and render on the CPU, or set --placement.device auto where that hides one."
        )
    roles = _named(text, used, inventory) if text in NAMES else parse(text, inventory)
    _check(roles, inventory)
    if used.simulation == "gpu" and any(device.kind == "core" for device in roles["env"]):
        there = _ranges(inventory.devices("gpu"), inventory)
        raise RoveError(
            f"placement.map puts env on {roles['env'][0]}, but env.kind = {run.env.kind!r} is set to "
            f"simulate on a GPU: set 'env: {there}', or have it simulate on the CPU."
        )
    return roles


def resources(run: Run, inventory: Inventory) -> Resources:
    """Devices that the environments of a run simulate and render on."""
    return envs.resources(run.env, gpus=inventory.kind == "gpu")


def describe(roles: Map, inventory: Inventory) -> str:
    """A map as `parse` reads it."""
    return ", ".join(f"{role}: {_ranges(roles[role], inventory)}" for role in ROLES)


def parse(text: str, inventory: Inventory) -> Map:
    """Read a map. Raises RoveError on an unknown role, a missing one, or a device that is not there."""
    parts = re.split(r"(?:^|,)\s*([A-Za-z_]+)\s*:", text)
    if parts[0].strip() or len(parts) < 3:
        raise RoveError(
            f"placement.map = {text!r}: expected {', '.join(NAMES)}, or roles with their devices, "
            "e.g. 'learner: 0-7, env: 0-3, policy: 4-7'."
        )
    roles: Map = {}
    for name, devices in zip(parts[1::2], parts[2::2], strict=True):
        if name not in ROLES:
            raise RoveError(f"placement.map names a role {name!r}. {nearest(name, ROLES)}")
        roles[name] = _devices(name, devices, inventory)
    for role in ROLES:
        if role not in roles:
            raise RoveError(f"placement.map = {text!r} says nothing of {role!r}: add '{role}: all'.")
    return roles


def _devices(role: str, text: str, inventory: Inventory) -> tuple[Device, ...]:
    kind, items = inventory.kind, text.strip()
    if word := re.match(r"(gpu|core)s?\s+", items):
        kind, items = ("gpu" if word[1] == "gpu" else "core"), items[word.end() :]
    there = inventory.devices(kind)
    if items == "all":
        return there
    chosen: list[Device] = []
    for item in items.split(","):
        numbers = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", item)
        if numbers is None:
            raise RoveError(
                f"placement.map: {role} has {item.strip()!r} for a device; expected 3, 0-3 or all."
            )
        first, last = int(numbers[1]), int(numbers[2] or numbers[1])
        if last >= len(there):
            has = f"{kind} 0-{len(there) - 1}" if there else f"no {kind}"
            raise RoveError(
                f"placement.map puts {role} on {kind} {last}, but the inventory ({inventory}) has {has}: "
                f"set '{role}: {f'0-{len(there) - 1}' if there else 'core all'}'."
            )
        if last < first:
            raise RoveError(f"placement.map: {role} has {item.strip()!r}; write the smaller number first.")
        chosen += there[first : last + 1]
    return tuple(dict.fromkeys(chosen))


def _named(name: str, used: Resources, inventory: Inventory) -> Map:
    """The map that a name stands for; "auto", before it is settled, is the one that fits everywhere."""
    tensors = inventory.devices(inventory.kind)
    if used.simulation == "core" and inventory.kind == "gpu":
        # Simulation has the cores to itself: only policy and learner can be in each other's way.
        env = inventory.devices("core")
        if name != "disaggregated":
            return {"learner": tensors, "env": env, "policy": tensors}
        return _disjoint(tensors, inventory, env)
    if name in ("colocated", "auto"):
        return dict.fromkeys(ROLES, tensors)
    if name == "disaggregated":
        return _disjoint(tensors, inventory, None)
    if len(tensors) < 2 * len(inventory.nodes):
        raise _too_few(name, inventory)
    env = [d for mine in by_node(tensors) for d in mine[: len(mine) // 2]]
    policy = [d for mine in by_node(tensors) for d in mine[len(mine) // 2 :]]
    return {"learner": tensors, "env": tuple(env), "policy": tuple(policy)}


def _disjoint(tensors: tuple[Device, ...], inventory: Inventory, env: tuple[Device, ...] | None) -> Map:
    """A quarter of each node simulates (unless `env` does), a quarter infers, the rest learns."""
    roles: dict[Role, list[Device]] = {role: [] for role in ROLES}
    for mine in by_node(tensors):
        share = max(1, len(mine) // 4)
        if len(mine) < 2:
            raise _too_few("disaggregated", inventory)
        if env is None:
            roles["env"] += mine[:share]
            mine = mine[share:]
        roles["policy"] += mine[:share]
        roles["learner"] += mine[share:] or mine
    return {role: env if role == "env" and env else tuple(roles[role]) for role in ROLES}


def _too_few(name: str, inventory: Inventory) -> RoveError:
    return RoveError(
        f"placement.map = {name!r} needs two devices on every node, and the inventory is {inventory}: "
        "set --placement.map colocated."
    )


def by_node(devices: Sequence[Device]) -> list[list[Device]]:
    """Devices in the order given, a list for every node that has any."""
    nodes: dict[int, list[Device]] = {}
    for device in devices:
        nodes.setdefault(device.node, []).append(device)
    return list(nodes.values())


def _ranges(devices: Sequence[Device], inventory: Inventory) -> str:
    """As a map says it."""
    numbers = sorted(device.number for device in devices)
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    text = ", ".join(f"{r[0]}-{r[-1]}" if len(r) > 1 else str(r[0]) for r in runs)
    return text if devices[0].kind == inventory.kind else f"{devices[0].kind} {text}"


def _check(roles: Map, inventory: Inventory) -> None:
    nodes = {role: {device.node for device in roles[role]} for role in ROLES}
    pairs: tuple[tuple[Role, Role], ...] = (("env", "policy"), ("policy", "env"))
    for role, other in pairs:
        for device in roles[role]:
            if device.node not in nodes[other]:
                here = [d for d in inventory.devices(inventory.kind) if d.node == device.node]
                raise RoveError(
                    f"placement.map puts {role} on {device} of {inventory.nodes[device.node].name}, where no "
                    f"{other} is: frames do not leave a node. Add one of its devices "
                    f"({_ranges(here, inventory)}) to {other}, or take {device} from {role}."
                )
    tensors: tuple[Role, ...] = ("learner", "policy")
    for role in tensors:
        if len({device.kind for device in roles[role]}) > 1:
            raise RoveError(f"placement.map mixes GPUs and cores for {role}: name one kind.")
