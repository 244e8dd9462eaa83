"""Loads the pretended device before torch. In a process that has torch already these tests are not collected:
`tests/integration/test_gpu_pretended.py` runs them in one of their own."""

from __future__ import annotations

import sys

import pytest

collect_ignore_glob: list[str] = []

if "torch" in sys.modules:
    collect_ignore_glob = ["test_*.py"]
else:
    from tests.gpu_pretended import pretend

    @pytest.fixture
    def cuda():
        """A pretended device for one test."""
        with pretend.Cuda() as device:
            yield device
