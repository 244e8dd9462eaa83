"""Environments. Importing any of them makes sure that MuJoCo can be imported, whatever MUJOCO_GL says.

MuJoCo starts the OpenGL that MUJOCO_GL names as soon as it is imported, and where that is not there it cannot
be. Most of Rove draws without OpenGL, and the rest says itself what it lacks.
"""

from __future__ import annotations

import importlib
import importlib.util
import os


def _import_mujoco() -> None:
    """Import MuJoCo as MUJOCO_GL says, or without any OpenGL where what it names is not there."""
    asked = os.environ.get("MUJOCO_GL")
    if not asked or importlib.util.find_spec("mujoco") is None:
        return  # MuJoCo's own default does without
    try:
        importlib.import_module("mujoco")
    except (ImportError, AttributeError, RuntimeError, OSError):
        os.environ["MUJOCO_GL"] = "disable"
        try:
            importlib.import_module("mujoco")
        finally:
            os.environ["MUJOCO_GL"] = asked


_import_mujoco()
