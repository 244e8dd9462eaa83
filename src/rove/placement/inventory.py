"""Devices to place a run on: nodes with GPUs and CPU cores. Pure but for `here`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rove import host

Kind = Literal["gpu", "core"]


@dataclass(frozen=True, slots=True)
class Device:
    """A GPU, or a CPU core."""

    kind: Kind
    number: int
    """Over all nodes: what a map calls it."""
    node: int
    index: int
    """On its node: the CUDA index, or the core's number."""

    def __str__(self) -> str:
        return f"{self.kind} {self.number}"


@dataclass(frozen=True, slots=True)
class Node:
    """One machine."""

    name: str
    gpus: tuple[int, ...]
    """CUDA indices."""
    cores: tuple[int, ...]
    """Numbers of the cores that this process may use."""


@dataclass(frozen=True, slots=True)
class Inventory:
    """All machines of a run, the driver's first. Devices are numbered node by node."""

    nodes: tuple[Node, ...]

    @staticmethod
    def here() -> Inventory:
        """This machine."""
        import torch

        cores = host.cores() or tuple(range(host.core_count()))
        return Inventory((Node("this machine", tuple(range(torch.cuda.device_count())), cores),))

    @staticmethod
    def of(nodes: int = 1, *, gpus: int = 0, cores: int = 1) -> Inventory:
        """`nodes` equal machines that need not exist: what a plan can be made for ahead of time."""
        return Inventory(
            tuple(Node(f"node {i}", tuple(range(gpus)), tuple(range(cores))) for i in range(nodes))
        )

    def devices(self, kind: Kind) -> tuple[Device, ...]:
        """All GPUs or all cores, by number."""
        there = [
            (n, index)
            for n, node in enumerate(self.nodes)
            for index in (node.gpus if kind == "gpu" else node.cores)
        ]
        return tuple(Device(kind, number, *place) for number, place in enumerate(there))

    @property
    def kind(self) -> Kind:
        """Kind of device that a plain number in a map means: a GPU where there are any, else a core."""
        return "gpu" if any(node.gpus for node in self.nodes) else "core"

    def without_gpus(self) -> Inventory:
        """The cores alone."""
        return Inventory(tuple(Node(node.name, (), node.cores) for node in self.nodes))

    def only_gpu(self, index: int) -> Inventory:
        """The driver's machine with one GPU."""
        node = self.nodes[0]
        return Inventory((Node(node.name, (index,), node.cores),))

    def __str__(self) -> str:
        def count(number: int, what: str) -> str:
            return f"{number} {what}{'' if number == 1 else 's'}"

        kinds = ("gpu", "core") if self.kind == "gpu" else ("core",)
        parts = [count(len(self.devices(kind)), {"gpu": "GPU", "core": "core"}[kind]) for kind in kinds]
        return f"{' and '.join(parts)} on {count(len(self.nodes), 'node')}"
