"""The built-in suite: language-conditioned manipulation on a table, in MuJoCo.

It needs no GPU, no display and no download; a GPU can draw its pictures.
"""

from __future__ import annotations

from rove.config.schema import TabletopConfig
from rove.envs.base import Resources, TaskSuite, VectorEnv
from rove.envs.tabletop.conventions import conventions
from rove.envs.tabletop.suite import TabletopSuite
from rove.types import Autoreset

__all__ = ["conventions", "make", "resources", "suite"]


def make(
    config: TabletopConfig, num_envs: int, chunk: int, autoreset: Autoreset, gpu: int | None = None
) -> VectorEnv:
    """The entry point of `rove.envs.registry.make`."""
    from rove.envs.tabletop.env import TabletopEnv

    return TabletopEnv(config, num_envs, chunk, autoreset, gpu)


def resources(config: TabletopConfig, gpus: bool) -> Resources:
    """The entry point of `rove.envs.registry.resources`."""
    return Resources(rendering="gpu" if config.render == "cuda" else "core")


def suite(config: TabletopConfig) -> TaskSuite:
    """The entry point of `rove.envs.registry.suite`; imports no simulator."""
    return TabletopSuite.from_config(config)
