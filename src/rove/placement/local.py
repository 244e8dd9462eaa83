"""Runs a Plan on this machine: one learner in this process, everything else in children of it."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from rove.config.schema import Run
from rove.placement.executor import Executor, V
from rove.placement.plan import Plan
from rove.placement.seat import SeatPlan, SeatWorker
from rove.runtime.actor import Actor, Shared
from rove.runtime.local import InChild, InProcess, Packed


class LocalExecutor(Executor):
    """See `Executor`."""

    def __init__(self, run: Run, plan: Plan, start: Path, profile: bool = False) -> None:
        super().__init__(run, plan, start, profile)
        self._seat_all()

    def _put(self, seat: SeatPlan) -> Actor[SeatWorker]:
        alone = self.plan.seats[seat.number].rank is not None and self.plan.ranks == 1
        make = partial(SeatWorker, seat)
        return InProcess(seat.name, make) if alone else InChild(seat.name, make)

    def _share(self, value: V) -> Shared[V]:
        return Packed(value)
