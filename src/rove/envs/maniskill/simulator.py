"""ManiSkill itself: importing it, making one of its environments, and saying why that fails."""

from __future__ import annotations

import gc
import itertools
import logging
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from rove.config.schema import ManiSkillConfig, PutOnPlateConfig
from rove.envs import maniskill
from rove.envs.maniskill import assets, vulkan
from rove.errors import RoveError

INSTALL = 'pip install "rove[maniskill]"'


def load() -> Any:
    """Import `mani_skill` and register its environments. Raises RoveError where it is not installed."""
    folder = assets.root()
    os.environ.setdefault("MS_ASSET_DIR", str(folder))
    try:
        import mani_skill
        import mani_skill.envs.sapien_env  # registers every task
    except ModuleNotFoundError as error:
        raise RoveError(f"ManiSkill needs the package {error.name!r}. Install it: {INSTALL}") from error
    mani_skill.logger.setLevel(logging.ERROR)  # it warns of its own robots
    # It collects garbage whenever it clears a scene, which takes longest of all: `restart` does, sometimes.
    setattr(mani_skill.envs.sapien_env, "gc", SimpleNamespace(collect=lambda: 0))  # noqa: B010
    if Path(mani_skill.ASSET_DIR) != folder / "data":
        raise RoveError(
            f"mani_skill was imported with its data at {mani_skill.ASSET_DIR}, and the suite looks for them "
            f"at {folder / 'data'}: set MS_ASSET_DIR before anything imports mani_skill."
        )
    return mani_skill


def backends(config: ManiSkillConfig | PutOnPlateConfig, gpu: int | None) -> tuple[str, str]:
    """Return ManiSkill's names for what simulates and what renders; `gpu` is the CUDA index of the one to
    use, None leaves it to ManiSkill."""
    import torch

    there = torch.cuda.is_available()
    used = maniskill.resources(config, gpus=there)
    if used.simulation == "gpu" and not there:
        raise RoveError("env.backend = 'physx_cuda' needs a CUDA device, and PyTorch finds none.")
    number = "" if gpu is None else f":{gpu}"
    return (
        f"physx_cuda{number}" if used.simulation == "gpu" else "physx_cpu",
        f"sapien_cuda{number}" if used.rendering == "gpu" else "sapien_cpu",
    )


def make(cls: type, **options: Any) -> Any:
    """Make an environment of ManiSkill's. Raises RoveError where it cannot render, with the fix.

    From then on stepping it renders nothing; `frames` does.
    """
    try:
        env = cls(**options)
    except (RuntimeError, ModuleNotFoundError, FileNotFoundError) as error:
        raise RoveError(_why(cls, error)) from error
    env._obs_mode = "none"
    return env


def _why(cls: type, error: Exception) -> str:
    text = str(error)
    if any(word in text.lower() for word in ("vulkan", "render", "device", "vk::")):
        finding = vulkan.finding()
        return f"{cls.__name__} cannot render: {text}. Vulkan: {finding.detail}. {finding.fix}".strip()
    return (
        f"{cls.__name__} cannot be made: {text}. Assets are looked for below {assets.root()}; {assets.FIX}."
    )


_COLLECT_EVERY = 32
_resets = itertools.count(1)


def restart(env: Any, **options: Any) -> None:
    """Begin an episode in a world of its own, in a scene made anew.

    What PhysX computes depends, in its last bits, on what its scene has been through: contacts are solved in
    an order that earlier ones leave behind. Only in a fresh scene is an episode a function of its start and
    its actions, as a resume has to rely on. Meshes and textures stay loaded.
    """
    env.reset(options={"reconfigure": True, **options.pop("options", {})}, **options)
    if next(_resets) % _COLLECT_EVERY == 0:
        gc.collect()
