"""Train vision-language-action robot policies by reinforcement learning.

    import rove
    from rove.recipes.tabletop import tabletop_ppo

    directory = rove.train(tabletop_ppo())
    report = rove.evaluate(directory / "best", "tabletop", episodes=64)

Names are imported when they are first used, so that `import rove` takes no time.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rove.api import evaluate, make_env, serve
    from rove.config.schema import Run
    from rove.train import train

    __version__: str

__all__ = ["Run", "train", "evaluate", "make_env", "serve", "__version__"]
# Read by OpenMP when PyTorch is imported, here and in child processes. By default threads that wait for each
# other spin: as soon as anything else runs on their cores, they take the time of those that they wait for.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

_FROM = {"Run": "rove.config.schema", "evaluate": "rove.api", "make_env": "rove.api", "serve": "rove.api"}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("rove")
    if name == "train":  # a module that can be called: see its end
        return importlib.import_module("rove.train")
    if name in _FROM:
        return getattr(importlib.import_module(_FROM[name]), name)
    raise AttributeError(f"module 'rove' has no attribute {name!r}")
