"""ManiSkill's tasks: its own, and the 25-object put-on-plate benchmark (`put_on_plate`).

Needs `pip install "rove[maniskill]"` and a Vulkan device, which may be a CPU (`rove doctor`).
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from rove.config.schema import EnvConfig, ManiSkillConfig, PutOnPlateConfig
from rove.envs.base import Resources, TaskSuite, VectorEnv
from rove.envs.downloads import Archive
from rove.envs.maniskill.conventions import conventions
from rove.findings import Finding, optional_package
from rove.types import Autoreset

__all__ = ["conventions", "downloads", "examine", "make", "resources", "suite"]


def make(
    config: ManiSkillConfig | PutOnPlateConfig,
    num_envs: int,
    chunk: int,
    autoreset: Autoreset,
    gpu: int | None = None,
) -> VectorEnv:
    """The entry point of `rove.envs.registry.make`."""
    from rove.envs.maniskill.env import ManiSkillEnv, PutOnPlateEnv

    kind = PutOnPlateEnv if isinstance(config, PutOnPlateConfig) else ManiSkillEnv
    return kind(config, num_envs, chunk, autoreset, gpu)


def resources(config: ManiSkillConfig | PutOnPlateConfig, gpus: bool) -> Resources:
    """The entry point of `rove.envs.registry.resources`."""
    draws = config.render == "cuda" or (config.render == "auto" and gpus)
    return Resources(
        simulation="gpu" if config.backend == "physx_cuda" else "core", rendering="gpu" if draws else "core"
    )


def suite(config: EnvConfig) -> TaskSuite:
    """The entry point of `rove.envs.registry.suite`; imports no simulator."""
    from rove.envs.maniskill import tasks

    return tasks.suite(config)


def downloads() -> tuple[Path, tuple[Archive, ...]]:
    """The folder of the put-on-plate suite's data, and their public sources."""
    from rove.envs.maniskill import assets, sources

    return assets.root(), sources.archives()


def examine() -> list[Finding]:
    """Tell whether ManiSkill is installed; where it is, also what renders and which data are there."""
    package = optional_package("ManiSkill", "mani_skill", "maniskill", "the ManiSkill suites")
    if importlib.util.find_spec("mani_skill") is None:
        return [package]
    from rove.envs.maniskill import assets, vulkan

    return [package, vulkan.finding(), assets.finding()]
