"""The built-in suite: language-conditioned manipulation on a table, in MuJoCo.

It needs no GPU, no display and no download.
"""

from __future__ import annotations

from rove.config.schema import TabletopConfig
from rove.envs.base import TaskSuite, VectorEnv
from rove.envs.tabletop.tasks import TabletopSuite
from rove.types import Autoreset


def make(config: TabletopConfig, num_envs: int, chunk: int, autoreset: Autoreset) -> VectorEnv:
    """The entry point of `rove.envs.registry.make`."""
    from rove.envs.tabletop.env import TabletopEnv

    return TabletopEnv(config, num_envs, chunk, autoreset)


def suite(config: TabletopConfig) -> TaskSuite:
    """The entry point of `rove.envs.registry.suite`; imports no simulator."""
    return TabletopSuite.from_config(config)
