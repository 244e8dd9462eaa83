"""The point environment, which dies, hangs, raises or answers nonsense once, in a chunk that is set.

Once: the file named by `marker` is made first, and where it is there, nothing happens any more.
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from tests.point_env import PointEnv, PointSuite
from torch import Tensor

from rove.runtime.actor import Lost, Supervisor
from rove.types import Autoreset, ChunkResult


@dataclass(frozen=True, slots=True)
class FaultyConfig:
    kind: Literal["faulty"] = "faulty"
    horizon: int = 12
    image_size: int = 8
    fault: str = "none"
    """"none", "die", "hang", "spin", "raise", "exit", "interrupt", "nan", "shape"; "always" raises every
    time, "slow" takes its time, "replaces" has replaced a process of its own."""
    chunk_number: int = 3
    """The fault strikes when an environment has stepped so many chunks."""
    marker: str = ""


class FaultyEnv(PointEnv):
    def __init__(self, config: FaultyConfig, num_envs: int, chunk: int, autoreset: Autoreset) -> None:
        super().__init__(num_envs, autoreset, chunk=chunk, horizon=config.horizon)
        self.config, self.count = config, 0
        self.supervisor = Supervisor(3)

    def step_chunk(self, actions: Tensor) -> ChunkResult:
        self.count += 1
        fault, marker = self.config.fault, Path(self.config.marker)
        if fault == "always":
            raise ArithmeticError("the physics is broken for good")
        if fault == "slow":
            time.sleep(0.05)
            return super().step_chunk(actions)
        if fault == "none" or self.count != self.config.chunk_number:
            return super().step_chunk(actions)
        try:
            marker.touch(exist_ok=False)  # of several workers at once, one
        except FileExistsError:
            return super().step_chunk(actions)
        match fault:
            case "die":
                os._exit(11)
            case "replaces":
                self.supervisor.note(Lost("simulator 0", "was killed by signal 9 (process 1)"))
                return super().step_chunk(actions)
            case "hang":
                time.sleep(3600)
            case "spin":
                while True:
                    pass
            case "exit":
                sys.exit(7)
            case "interrupt":
                raise KeyboardInterrupt
            case "raise":
                raise ArithmeticError("the physics is broken")
            case "nan":
                result = super().step_chunk(actions)
                return replace(result, reward=torch.full_like(result.reward, torch.nan))
            case "shape":
                result = super().step_chunk(actions)
                return replace(result, reward=result.reward[:, :1].repeat(2, 7))
        raise AssertionError(fault)


def make(config: FaultyConfig, num_envs: int, chunk: int, autoreset: Autoreset) -> FaultyEnv:
    return FaultyEnv(config, num_envs, chunk, autoreset)


def suite(config: FaultyConfig) -> PointSuite:
    return PointSuite()
