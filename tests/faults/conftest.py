"""What the sweep of faults shares: a process to fork from, and a table of what held and what did not."""

from __future__ import annotations

import json
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


class Count(NamedTuple):
    """Of faults of one kind."""

    held: int
    not_held: int
    seconds: float


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
