"""LIBERO's 130 tasks, and LIBERO-PRO's perturbed ones, on the C engine in batch; no stock environment."""

from __future__ import annotations

from rove.config.schema import LiberoConfig
from rove.envs.base import Resources, TaskSuite, VectorEnv
from rove.envs.libero import package
from rove.envs.libero.conventions import conventions
from rove.envs.libero.suite import LiberoSuite, horizon
from rove.findings import Finding, optional_package
from rove.types import Autoreset

__all__ = ["conventions", "examine", "make", "published_settings", "resources", "suite"]


def make(
    config: LiberoConfig, num_envs: int, chunk: int, autoreset: Autoreset, gpu: int | None = None
) -> VectorEnv:
    """The entry point of `rove.envs.registry.make`."""
    package.root()  # says what to install, where an import would not
    from rove.envs.libero.env import LiberoEnv

    return LiberoEnv(config, num_envs, chunk, autoreset, gpu)


def resources(config: LiberoConfig, gpus: bool) -> Resources:
    """The entry point of `rove.envs.registry.resources`."""
    on_gpu = config.render == "cuda" or (config.renderer == "gl" and gpus)
    return Resources(rendering="gpu" if on_gpu else "core")


def suite(config: LiberoConfig) -> TaskSuite:
    """The entry point of `rove.envs.registry.suite`; imports no simulator."""
    return LiberoSuite(config)


def published_settings(tasks: str | None) -> dict[str, int]:
    """Settings that published results of these tasks were obtained with: see `envs.registry.configure`."""
    return {"horizon": horizon(tasks or LiberoConfig().tasks)}


def examine() -> list[Finding]:
    """Tell whether the package that holds LIBERO's tasks and scenes is installed."""
    return [optional_package("LIBERO", "libero", "libero", "the LIBERO suites")]
