"""What the sweep of faults shares: a process to fork from, and a table of what held and what did not."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from tests.faults.forks import FULL, Found, Nursery

TABLE = Path(__file__).resolve().parents[2] / "build" / "faults.json"
TESTS = {
    "test_ray.py": "Ray's head, a node or an actor is lost",
    "test_lost_workers.py": "a worker is lost",
}
"""Files of which each test counts as a fault."""
LONGEST_FIRST = (
    "test_a_damaged_file_of_a_run_is_gone_around_or_named",
    "test_a_signal_as_a_file_changes",
    "test_a_worker_that_can_be_replaced_is_at_every_call",
    "test_a_damaged_file_of_its_parts_is_gone_around_or_named",
    "test_a_signal_in_a_phase",
    "test_a_node_that_nothing_can_replace_ends_the_run_with_a_line",
    "test_a_policy_whose_node_goes_away_is_replaced_on_another",
    "test_ray_trains_as_local_does_bit_for_bit",
    "test_a_run_that_is_killed_goes_on",
    "test_a_head_that_goes_away_ends_the_run_with_a_line",
)
"""Tests of minutes. A process that takes one of them last is waited for by all others."""


class Count(NamedTuple):
    """Of faults of one kind."""

    held: int
    not_held: int
    seconds: float


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Deal the tests of the whole sweep to the processes that run them, the longest first to each.

    A process begins with a share of tests that follow each other, and takes from the end of another's later.
    """
    if not FULL:
        return
    order = {name: i for i, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: order.get(getattr(item, "originalname", ""), len(order)))
    processes = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    items[:] = [item for first in range(processes) for item in items[first::processes]]


@pytest.fixture(scope="session")
def nursery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    found = Nursery(tmp_path_factory.mktemp("faults"))
    yield found
    found.close()


@pytest.fixture
def sweep(nursery: Nursery, record_property: Callable[[str, Any], None]) -> Callable[..., None]:
    """Run a function that injects faults, count what came of them, and fail where one was not held."""

    def run(function: Callable[..., Found], *args: Any) -> None:
        found: Found = nursery.call(function, *args)
        record_property("faults", [found.kind, found.held, len(found.broken), found.seconds])
        assert not found.broken, "\n".join(found.broken)
        assert found.held, "nothing was tried"

    return run


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print the table; of the whole sweep, write it to build/faults.json too."""
    kinds: dict[str, Count] = defaultdict(lambda: Count(0, 0, 0.0))
    for outcome in ("passed", "failed"):
        for report in terminalreporter.stats.get(outcome, ()):
            for kind, count in counts(report) if report.when == "call" else ():
                kinds[kind] = Count(*(a + b for a, b in zip(kinds[kind], count, strict=True)))
    if not kinds:
        return
    terminalreporter.section("faults")
    width = max(map(len, kinds))
    terminalreporter.line(f"{'kind':{width}}  injected    held  not held   seconds of a processor")
    for kind, (held, broken, seconds) in sorted(kinds.items()):
        terminalreporter.line(f"{kind:{width}}  {held + broken:8}{held:8}{broken:10}{seconds:10.0f}")
    if FULL:
        rows = [{"kind": kind, **count._asdict()} for kind, count in sorted(kinds.items())]
        TABLE.parent.mkdir(exist_ok=True)
        TABLE.write_text(json.dumps(rows, indent=1) + "\n")


def counts(report: Any) -> Iterator[tuple[str, Count]]:
    """What a test of the sweep tried: one of this folder by itself, or one that `make test-faults` adds."""
    for name, value in report.user_properties:
        if name == "faults":
            yield value[0], Count(*value[1:])
    if "test_config_fuzz.py::test_any_value" in report.nodeid:
        from tests.unit.test_config_fuzz import EXAMPLES

        yield "absurd settings", Count(EXAMPLES * report.passed, int(report.failed), report.duration)
    for file, kind in TESTS.items():
        if f"{file}::" in report.nodeid:
            yield kind, Count(int(report.passed), int(report.failed), report.duration)
