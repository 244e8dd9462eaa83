"""An environment of your own, in one file: a dot that has to go to the side that the instruction names.

    rove train examples/environment.py:reach

Two things make it known to Rove: its settings and this module, which `rove.envs.registry.register` is given,
and a recipe. The expert is optional; without one, bring a checkpoint to start from.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from rove.config.ranges import PositiveInt
from rove.config.schema import (
    GRPO,
    EvaluationConfig,
    LlamaConfig,
    OptimConfig,
    PolicyConfig,
    RolloutConfig,
    Run,
    SFTConfig,
    TowerConfig,
    TrainingConfig,
)
from rove.envs import registry
from rove.envs.base import TaskSuite
from rove.envs.chunked import ChunkedEnv, Outcome
from rove.errors import RoveError, nearest
from rove.recipes import recipe
from rove.types import (
    ActionSpec,
    Autoreset,
    ChunkResult,
    EpisodeSpec,
    Split,
)

GOAL = 1.0
"""Metres from the middle to either side."""


@dataclass(frozen=True, slots=True)
class ReachConfig:
    """What a user may set: `--env.horizon 8`."""

    kind: Literal["reach"] = "reach"
    tasks: str = "all"
    """"all", or task ids separated by commas."""
    image_size: PositiveInt = 16
    horizon: PositiveInt = 6


class ReachSuite(TaskSuite):
    """Two tasks that look alike: only the instruction tells them apart."""

    name = "reach"
    variants: Mapping[str, str] = {"dark": "vision"}
    vocabulary: tuple[str, ...] = ("go", "left", "right")

    def __init__(self, tasks: str) -> None:
        self.tasks: tuple[str, ...] = ("left", "right") if tasks == "all" else tuple(tasks.split(","))
        for task in self.tasks:
            if task not in ("left", "right"):
                raise RoveError(f"Unknown task {task!r}. {nearest(task, ('left', 'right'))}")

    def instruction(self, episode: EpisodeSpec) -> str:
        """What the policy is told. Refuses an episode that does not exist."""
        if not any(
            episode.initial_state in self.initial_states(episode.task, s) for s in ("train", "held_out")
        ):
            raise RoveError(f"Task {episode.task!r} has no initial state {episode.initial_state}.")
        if episode.variant not in ("none", *self.variants):
            raise RoveError(f"Unknown variant {episode.variant!r}. {nearest(episode.variant, self.variants)}")
        return f"go {episode.task}"

    def initial_states(self, task: str, split: Split) -> range:
        if task not in self.tasks:
            raise RoveError(f"Unknown task {task!r}. {nearest(task, self.tasks)}")
        return range(100) if split == "train" else range(1000, 1050)


class ReachEnv(ChunkedEnv):
    """B dots. `ChunkedEnv` keeps the rules of `rove.envs.base`; the worlds are all that is added."""

    action_spec = ActionSpec(("x",), ("m",), (-0.5,), (0.5,))

    def __init__(self, config: ReachConfig, num_envs: int, chunk: int, autoreset: Autoreset) -> None:
        suite = ReachSuite(config.tasks)
        super().__init__(suite, num_envs=num_envs, chunk=chunk, horizon=config.horizon, autoreset=autoreset)
        self.image_shape = (1, config.image_size, config.image_size, 3)
        self._x = np.zeros(num_envs)

    def start(self, rows: Sequence[int], episodes: Sequence[EpisodeSpec]) -> None:
        for row, episode in zip(rows, episodes, strict=True):
            self._x[row] = 0.3 * math.sin(episode.initial_state)

    def act(self, rows: np.ndarray, actions: np.ndarray) -> Outcome:
        """Move the dots of `rows` by `actions` [n, 1]."""
        self._x[rows] += actions[:, 0]
        success = self._x[rows] * self._side(rows) >= GOAL
        return Outcome(reward=success.astype(float), success=success, terminated=success)

    def observe(self, rows: np.ndarray) -> tuple[Tensor, None]:
        """uint8 [n, 1, H, W, 3]: a bright column where the dot is. The robot has no state of its own."""
        position = ((self._x[rows] / GOAL + 1.5) / 3).clip(0, 1)
        column = np.linspace(0, 1, self.image_shape[1])
        bright = 255 * (1 - 8 * np.abs(column - position[:, None])).clip(0, 1)
        dark = [(spec := self.specs[row]) is not None and spec.variant == "dark" for row in rows]
        bright[dark] /= 2
        images = np.broadcast_to(bright[:, None, None, :, None], (len(rows), *self.image_shape))
        return torch.from_numpy(images.astype(np.uint8)), None

    def step_expert_chunk(self, noise: float, generator: np.random.Generator) -> tuple[Tensor, ChunkResult]:
        """Optional: the scripted expert, which goes to the side that the instruction names."""

        def expert(rows: np.ndarray, last: bool) -> tuple[np.ndarray, np.ndarray]:
            wanted = 0.5 * self._side(rows)[:, None]
            disturbance = 0.5 * noise * generator.normal(size=wanted.shape) if last else 0.0
            return wanted, wanted + disturbance

        return self._demonstrate(expert)

    def _side(self, rows: np.ndarray) -> np.ndarray:
        """float64 [n]: the direction of each row's goal."""
        return np.array([-1.0 if (s := self.specs[row]) and s.task == "left" else 1.0 for row in rows])

    def save(self) -> dict[str, Tensor]:
        return {"x": torch.from_numpy(self._x.copy())}

    def load(self, state: Mapping[str, Tensor]) -> None:
        self._x[...] = state["x"].numpy()


def make(config: ReachConfig, num_envs: int, chunk: int, autoreset: Autoreset) -> ReachEnv:
    """The entry point that `rove.envs.registry` calls, with `suite`."""
    return ReachEnv(config, num_envs, chunk, autoreset)


def suite(config: ReachConfig) -> ReachSuite:
    return ReachSuite(config.tasks)


registry.register(ReachConfig, __name__)


@recipe
def reach() -> Run:
    """GRPO on the two-sided dot: a few seconds on a CPU."""
    return Run(
        name="reach",
        algorithm=GRPO(group_size=4),
        env=ReachConfig(),  # type: ignore[arg-type]
        policy=PolicyConfig(
            towers=(TowerConfig(width=32, depth=2, heads=2, mlp=64),),
            llama=LlamaConfig(width=32, depth=2, heads=2, mlp=64),
        ),
        rollout=RolloutConfig(num_envs=16, chunk=3, chunks=2),
        sft=SFTConfig(episodes=32, steps=20, batch=32, micro_batch=32, optim=OptimConfig(lr=1e-3)),
        training=TrainingConfig(iterations=10, batch=32, micro_batch=32, optim=OptimConfig(lr=1e-3)),
        evaluation=EvaluationConfig(episodes=20, variant_episodes=10, num_envs=10),
    )
