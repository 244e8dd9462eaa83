"""Carries a plan out: puts its workers into processes, and makes the calls of the training loop."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rove.config.schema import Run

if TYPE_CHECKING:
    from rove.cluster.executor import Executor
    from rove.placement.inventory import Inventory
    from rove.placement.plan import Plan


def inventory_of(run: Run) -> Inventory:
    """Return the devices that this run's executor can use: this machine's, or a Ray cluster's."""
    from rove.placement.inventory import Inventory

    if run.placement.executor == "ray":
        from rove.cluster.ray import inventory

        return inventory(run.placement.ray_address, run.placement.nodes)
    return Inventory.here()


def settle(run: Run, inventory: Inventory, directory: Path, start: Path) -> Run:
    """With `placement.map = "auto"`, the run under the placement that is predicted to be fastest.

    The measurements are kept in `directory/profile.json`, so that a resumed run is placed as it was.
    """
    if run.placement.map != "auto":
        return run
    from rove.cluster import measure
    from rove.placement import planner
    from rove.placement.profile import Profile

    file = directory / "profile.json"
    if not file.exists():
        measure.measure(run, start).save(file)
    return planner.choose(run, inventory, Profile.load(file))


def execute(run: Run, plan: Plan, start: Path, profile: bool = False) -> Executor:
    """The workers of a run, in their places, with the policy of the checkpoint directory `start`."""
    if run.placement.executor == "ray":
        from rove.cluster.ray import RayExecutor

        return RayExecutor(run, plan, start, profile)
    from rove.cluster.local import LocalExecutor

    return LocalExecutor(run, plan, start, profile)
