"""Who runs where, and the executors that carry it out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rove.config.schema import Run

if TYPE_CHECKING:
    from rove.placement.executor import Executor
    from rove.placement.inventory import Inventory
    from rove.placement.plan import Plan


def inventory_of(run: Run) -> Inventory:
    """Return the devices that this run's executor can use: this machine's, or a Ray cluster's."""
    from rove.placement.inventory import Inventory

    if run.placement.executor == "ray":
        from rove.placement.ray import inventory

        return inventory(run.placement.ray_address, run.placement.nodes)
    return Inventory.here()


def settle(run: Run, inventory: Inventory, directory: Path, start: Path) -> Run:
    """With `placement.map = "auto"`, the run under the placement that is predicted to be fastest.

    The measurements are kept in `directory/profile.json`, so that a resumed run is placed as it was.
    """
    if run.placement.map != "auto":
        return run
    from rove.placement import planner, profiling

    file = directory / "profile.json"
    if not file.exists():
        profiling.measure(run, start).save(file)
    return planner.choose(run, inventory, profiling.Profile.load(file))


def execute(run: Run, plan: Plan, start: Path, profile: bool = False) -> Executor:
    """The workers of a run, in their places, with the policy of the checkpoint directory `start`."""
    if run.placement.executor == "ray":
        from rove.placement.ray import RayExecutor

        return RayExecutor(run, plan, start, profile)
    from rove.placement.local import LocalExecutor

    return LocalExecutor(run, plan, start, profile)
