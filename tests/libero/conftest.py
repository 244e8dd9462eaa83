"""What the LIBERO tests share: the package, or a reason to skip."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    from rove.envs.libero import package
    from rove.errors import RoveError

    missing = None
    try:
        package.root()
    except RoveError as error:
        missing = str(error)
    for item in items:
        if Path(__file__).parent not in item.path.parents:
            continue
        if missing:
            item.add_marker(pytest.mark.skip(reason=missing))
        elif item.get_closest_marker("libero_full") and not os.environ.get("LIBERO_FULL"):
            item.add_marker(pytest.mark.skip(reason="long: make test-libero runs it"))
