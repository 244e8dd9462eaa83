"""Config + inventory → Plan: who runs where. Pure and printable."""

from __future__ import annotations

import os
from dataclasses import dataclass

from rove.config.schema import Run
from rove.errors import RoveError


@dataclass(frozen=True, slots=True)
class Inventory:
    """What a machine offers."""

    gpus: int
    cores: int

    @staticmethod
    def here() -> Inventory:
        """This machine."""
        import torch

        return Inventory(gpus=torch.cuda.device_count(), cores=len(os.sched_getaffinity(0)))


@dataclass(frozen=True, slots=True)
class Plan:
    """Colocated in one process: environments on the CPU cores, policy and learner on one set of weights."""

    device: str
    """Of policy and learner: "cpu" or "cuda:0"."""
    threads: int
    """For tensor work on the CPU."""

    def __str__(self) -> str:
        return f"policy, learner, environments: colocated · tensors: {self.device}, {self.threads} threads"


def make_plan(run: Run, inventory: Inventory) -> Plan:
    """Place a run on an inventory. Raises RoveError naming the device that is asked for and not there."""
    wanted = run.placement.device
    if wanted == "cuda" and inventory.gpus == 0:
        raise RoveError("placement.device is 'cuda', but no CUDA device is visible. Use 'auto' or 'cpu'.")
    device = "cuda:0" if inventory.gpus and wanted != "cpu" else "cpu"
    return Plan(device, threads=run.placement.threads or inventory.cores)
