"""The public API: what `import rove` gives, and that it costs nothing until it is used."""

from __future__ import annotations

import subprocess
import sys

import pytest

import rove
from rove.errors import RoveError


def test_importing_the_package_imports_nothing_else():
    code = "import sys, rove; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_train_can_be_called_whatever_was_imported_first():
    for first in ("pass", "import rove.train", "from rove.train import train"):
        code = f"{first}\nimport rove\nassert callable(rove.train), rove.train\nfrom rove import train"
        subprocess.run([sys.executable, "-c", code], check=True)


def test_every_public_name_is_there():
    assert all(getattr(rove, name) is not None for name in rove.__all__)
    assert rove.__version__.count(".") == 2
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        rove.trian  # noqa: B018


def test_environments_and_evaluations():
    env = rove.make_env("tabletop", num_envs=2, chunk=4, image_size=32, horizon=4)
    assert (env.num_envs, env.chunk, env.horizon) == (2, 4, 4)
    env.close()
    report = rove.evaluate(
        "random", "tabletop", episodes=2, num_envs=2, decoding="sample",
        settings={"env.horizon": 4, "env.image_size": 32},
    )  # fmt: skip
    assert [record.length for record in report.records] == [4, 4]
    with pytest.raises(RoveError, match="tabletop"):
        rove.make_env("tabeltop")
