"""Makes a configuration's suite and its worlds: the one place that tells the two kinds apart."""

from __future__ import annotations

from rove.config.schema import EnvConfig, ManiSkillConfig, PutOnPlateConfig
from rove.envs.base import TaskSuite
from rove.envs.maniskill.put_on_plate.suite import PutOnPlateSuite
from rove.envs.maniskill.stock import StockSuite, StockTask, action_spec
from rove.envs.maniskill.world import World

Config = ManiSkillConfig | PutOnPlateConfig


def suite(config: EnvConfig) -> TaskSuite:
    """The tasks that the configuration names."""
    if isinstance(config, PutOnPlateConfig):
        return PutOnPlateSuite.from_config(config)
    assert isinstance(config, ManiSkillConfig)
    return StockSuite.from_config(config)


def world(config: EnvConfig, task: str, num_envs: int, gpu: int | None) -> World:
    """A world of `num_envs` rows for a task, whose scenes all put-on-plate tasks share.

    `gpu` is the CUDA index of the one that it runs on, if it does.
    """
    if isinstance(config, PutOnPlateConfig):
        from rove.envs.maniskill.put_on_plate.plate_task import ACTION_SPEC, PlateTask

        return World(PlateTask(config, gpu), num_envs, config.horizon, lambda env: ACTION_SPEC)
    assert isinstance(config, ManiSkillConfig)
    return World(StockTask(config, task, gpu), num_envs, config.horizon, lambda env: action_spec(config, env))


def shares(config: EnvConfig) -> bool:
    """Tell whether one world serves every task."""
    return isinstance(config, PutOnPlateConfig)


def one_world(config: EnvConfig) -> bool:
    """Tell whether a world has one row, as with PhysX on a CPU."""
    assert isinstance(config, ManiSkillConfig | PutOnPlateConfig)
    return config.backend != "physx_cuda"
