"""What all tests share: a cache of compiled scenes, the order in which files run, and signals given back."""

from __future__ import annotations

import os
import signal
from collections.abc import Generator
from pathlib import Path

import pytest

import rove  # noqa: F401 - before torch, whose threads are told by it how to wait

os.environ.setdefault("ROVE_CACHE", str(Path(__file__).resolve().parents[1] / "build" / "cache"))
# Ray makes its processes nicer than any other: beside tests of other files they would wait for minutes.
os.environ.setdefault("RAY_worker_niceness", "0")

LONGEST_FIRST = (
    "tests/learning/test_tabletop.py",
    "tests/integration/test_gpu_pretended.py",
    "tests/integration/test_placement.py",
    "tests/integration/test_commands.py",
    "tests/integration/test_maniskill.py",
    "tests/integration/test_ray.py",
    "tests/contract/test_contract.py",
    "tests/unit/test_pipeline.py",
    "tests/unit/test_flow_policy.py",
    "tests/unit/test_openvla_rollouts.py",
    "tests/unit/test_parallel.py",
    "tests/libero/test_pictures.py",
)
"""Files of minutes. A process that takes one of them last is waited for by all others."""


def pytest_configure() -> None:
    """Hear Ctrl-C also where a shell has started the tests in the background, which has it ignored."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    order = {config.rootpath / name: i for i, name in enumerate(LONGEST_FIRST)}
    assert all(path.is_file() for path in order), "LONGEST_FIRST names a file that is not there"
    items.sort(key=lambda item: order.get(item.path, len(order)))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown() -> Generator[None, None, None]:
    """Fail a test after which Ctrl-C does something else than before."""
    yield
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        left = signal.signal(signal.SIGINT, signal.default_int_handler)
        pytest.fail(f"The test has left {left!r} in the place of Python's own handler of Ctrl-C.")
