"""Pictures of one task of each scene class beside those of MuJoCo 3.2.3: see `pictures.py`."""

from __future__ import annotations

import pytest
from tests.libero import pictures

from rove.errors import RoveError

GL, WARP = 0.5, 6.0
"""Grey levels, mean absolute difference."""


@pytest.mark.parametrize("kind", pictures.CLASSES)
def test_warp(kind: str) -> None:
    assert pictures.difference(pictures.picture(kind, "warp"), pictures.reference(kind)) < WARP


@pytest.mark.parametrize("kind", pictures.CLASSES)
def test_gl(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    try:
        drawn = pictures.picture(kind, "gl")
    except RoveError as error:
        pytest.skip(str(error))
    assert pictures.difference(drawn, pictures.reference(kind)) < GL
