"""The tests of `tests/gpu_pretended`, which need a process of their own: their device has to be there before
PyTorch. Two run side by side, each on a core."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HERE = ROOT / "tests" / "gpu_pretended"
FILES = sorted((path.relative_to(ROOT).as_posix() for path in HERE.glob("test_*.py")), reverse=True)
"""The longest first, so that both cores end at about the same time."""


def run(file: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--durations=3", file]
    limits = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=os.environ | limits, capture_output=True, text=True)


@pytest.fixture(scope="module")
def done() -> dict[str, subprocess.CompletedProcess[str]]:
    if shutil.which("g++") is None:
        pytest.skip("no C++ compiler: apt install g++")
    from tests import maniskill

    maniskill.lacking()  # unpacks, once, the assets that one of them looks for
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(FILES, pool.map(run, FILES), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES)
def test_on_a_pretended_gpu(file: str, done: dict[str, subprocess.CompletedProcess[str]]) -> None:
    answer = done[file]
    assert answer.returncode == 0, f"{answer.stdout[-12000:]}\n{answer.stderr[-4000:]}"
    last = answer.stdout.strip().splitlines()[-1]
    print(file, last)
    assert " passed" in last
