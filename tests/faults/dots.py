"""The dot of examples/environment.py, which says where it is as well, and misbehaves as its settings say.

A run of it takes a second, and has every phase that a run can have.
"""

from __future__ import annotations

import ctypes
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from tests.unit.test_answers import DONE, SEEN
from torch import Tensor

from rove import recipes
from rove.config.schema import (
    PPO,
    EvaluationConfig,
    LlamaConfig,
    LoggingConfig,
    OptimConfig,
    PlacementConfig,
    PolicyConfig,
    RolloutConfig,
    Run,
    SFTConfig,
    TowerConfig,
    TrainingConfig,
    ValueHeadConfig,
)
from rove.envs import registry
from rove.types import Autoreset, ChunkResult, Demonstrations, EpisodeSpec, Observation

recipes.import_file(Path(__file__).resolve().parents[2] / "examples" / "environment.py")
from environment import GOAL, ReachEnv, ReachSuite  # noqa: E402  # pyright: ignore[reportMissingImports]


@dataclass(frozen=True, slots=True)
class DotsConfig:
    kind: Literal["dots"] = "dots"
    tasks: str = "all"
    image_size: int = 16
    horizon: int = 6
    fault: str = "none"
    """A key of `FAULTS`."""
    chunk_number: int = 4
    """The fault strikes when an environment has stepped so many chunks."""
    marker: str = ""
    """A file that is made when the fault strikes; where it is there, nothing happens any more. "": again and
    again."""


def dies() -> None:
    os._exit(11)


def is_killed() -> None:
    ctypes.string_at(0)


def hangs() -> None:
    time.sleep(3600)


def raises() -> None:
    raise ArithmeticError("the physics is broken")


def raises_what_cannot_be_pickled() -> None:
    class Odd(Exception):
        def __init__(self, a: int, b: int) -> None:
            super().__init__("the physics is odd")

    raise Odd(1, 2)


def raises_keyboard_interrupt() -> None:
    raise KeyboardInterrupt


def raises_without_words() -> None:
    raise StopIteration


def exits() -> None:
    sys.exit(3)


def exits_as_if_all_were_well() -> None:
    sys.exit(0)


def forks() -> None:
    """As a simulator may that starts a program of its own."""
    if not (pid := os.fork()):
        os._exit(0)
    os.waitpid(pid, 0)


def prints() -> None:
    print("x" * 100_000)
    os.write(1, b"\0\xff\1\2")


def wants_memory() -> None:
    torch.empty(1 << 60, dtype=torch.uint8)


def changes_seeds() -> None:
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002 - which is what it is about


ACTS: dict[str, Callable[[], None]] = {
    act.__name__.replace("_", " "): act
    for act in (
        *(dies, is_killed, hangs, raises, raises_what_cannot_be_pickled, raises_keyboard_interrupt),
        *(raises_without_words, exits, exits_as_if_all_were_well, forks, prints, wants_memory, changes_seeds),
    )
}  # fmt: skip
"""What an environment may do instead of stepping, or besides."""


class DotsEnv(ReachEnv):
    state_size = 1

    def __init__(self, config: DotsConfig, num_envs: int, chunk: int, autoreset: Autoreset) -> None:
        super().__init__(config, num_envs, chunk, autoreset)
        self.config, self.count = config, 0

    def points(self) -> Tensor:
        """float32 [B, 3, 2]: the dot, the side that it has to go to, and no hand."""
        size, slots = self.image_shape[1], np.arange(self.num_envs)
        where = torch.full((self.num_envs, 3, 2), torch.nan)
        for place, x in enumerate((self._x, GOAL * self._side(slots))):
            where[:, place, 0] = torch.from_numpy(size * ((x / GOAL + 1.5) / 3).clip(0, 0.99))
            where[:, place, 1] = size / 2
        return where

    def ground(self, episodes: Sequence[EpisodeSpec]) -> Demonstrations:
        seen = self.reset(episodes)
        rows = list(range(len(episodes)))
        return self._grounding(
            seen.images[: len(rows)], rows, list(seen.instruction[: len(rows)]), self.points()[: len(rows)]
        )

    def reset(self, episodes: Sequence[EpisodeSpec], where: Sequence[int] | None = None) -> Observation:
        observation = super().reset(episodes, where)
        kind, _, how = self.config.fault.partition(": ")
        return SEEN[how][0](observation) if kind == "reset" and self._strikes() else observation

    def observe(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """As the dot of the example, with its position as the robot's state."""
        return super().observe(rows)[0], torch.from_numpy(self._x[rows, None]).float()

    def step_chunk(self, actions: Tensor) -> ChunkResult:
        return self._bent(super().step_chunk(actions))

    def step_expert_chunk(self, noise: float, generator: np.random.Generator) -> tuple[Tensor, ChunkResult]:
        actions, result = super().step_expert_chunk(noise, generator)
        return actions, self._bent(result)

    def _bent(self, result: ChunkResult) -> Any:
        self.count += 1
        kind, _, how = self.config.fault.partition(": ")
        if kind in ("none", "reset") or self.count < self.config.chunk_number or not self._strikes():
            return result
        if kind == "act":
            ACTS[how]()
            return result
        if kind == "seen":
            return replace(result, observation=SEEN[how][0](result.observation))
        return DONE[how][0](result)

    def _strikes(self) -> bool:
        """Whether it is time: once, where there is a marker to be made."""
        try:
            if self.config.marker:
                Path(self.config.marker).touch(exist_ok=False)  # of several workers at once, one
        except FileExistsError:
            return False
        return True


FAULTS = (
    *(f"act: {how}" for how in ACTS),
    *(f"seen: {how}" for how in SEEN),
    *(f"reset: {how}" for how in SEEN if how not in ("another size", "another device", "doubles")),
    *(f"done: {how}" for how in DONE),
)
"""What can be wrong with an environment; nothing that only a comparison with an earlier answer shows is of a
reset."""


def make(config: DotsConfig, num_envs: int, chunk: int, autoreset: Autoreset) -> DotsEnv:
    return DotsEnv(config, num_envs, chunk, autoreset)


def suite(config: DotsConfig) -> ReachSuite:
    return ReachSuite(config.tasks)


registry.register(DotsConfig, __name__)


@recipes.recipe
def dots() -> Run:
    """PPO on the dots: a second on a CPU."""
    quick: dict[str, Any] = {"batch": 8, "micro_batch": 8, "optim": OptimConfig(lr=1e-3)}
    return Run(
        name="dots",
        algorithm=PPO(),
        env=DotsConfig(),  # type: ignore[arg-type]
        policy=PolicyConfig(
            towers=(TowerConfig(width=16, depth=2, heads=2, mlp=32),),
            llama=LlamaConfig(width=16, depth=2, heads=2, mlp=32),
            value_head=ValueHeadConfig(hidden=(8,)),
            pointers=3,
        ),
        rollout=RolloutConfig(num_envs=8, chunk=3, chunks=2),
        sft=SFTConfig(episodes=8, steps=3, grounding=8, grounding_steps=3, color_jitter=0.2, **quick),
        training=TrainingConfig(iterations=3, **quick),
        evaluation=EvaluationConfig(every=1, episodes=4, variant_episodes=2, num_envs=4),
        logging=LoggingConfig(tensorboard=False, save_every=1, keep=2),
        placement=PlacementConfig(threads=1),
    )
