"""Runs a Plan on this machine: one learner in this process, everything else in children of it."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from rove.cluster.executor import Executor, V
from rove.config.schema import Run
from rove.placement.plan import Plan
from rove.runtime.actor import Actor, Shared
from rove.runtime.local import InChild, InProcess, Packed
from rove.workers.policy import Assignment, PolicyWorker


class LocalExecutor(Executor):
    """See `Executor`."""

    def __init__(self, run: Run, plan: Plan, start: Path, profile: bool = False) -> None:
        super().__init__(run, plan, start, profile)
        self._start_all()

    def _put(self, assignment: Assignment) -> Actor[PolicyWorker]:
        alone = self.plan.workers[assignment.number].rank is not None and self.plan.ranks == 1
        make = partial(PolicyWorker, assignment)
        if alone:
            return InProcess(assignment.name, make)
        return InChild(assignment.name, make, deadline=self.run.placement.deadline, patient=True)

    def _share(self, value: V) -> Shared[V]:
        return Packed(value)
