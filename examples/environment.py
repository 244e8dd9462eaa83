"""An environment of your own, in one file: a dot that has to go to the side that the instruction names.

    rove train examples/environment.py:reach

Three things make it known to Rove: a config (`register` in `rove.config.load`), an entry point (`register` in
`rove.envs.registry`), and a recipe. The expert is optional; without one, bring a checkpoint to start from.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from rove.config import load
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
from rove.envs.slots import EpisodeSlots
from rove.errors import RoveError, nearest
from rove.recipes import recipe
from rove.types import (
    ActionSpec,
    Autoreset,
    ChunkResult,
    EpisodeRecord,
    EpisodeSpec,
    Observation,
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
    image_size: int = 16
    horizon: int = 6


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


class ReachEnv(EpisodeSlots):
    """B dots. Everything is a tensor over slots; the rules are those of `rove.envs.base`.

    `EpisodeSlots` keeps the queue and checks what comes in; a world of your own is all that is added.
    """

    action_spec = ActionSpec(("x",), ("m",), (-0.5,), (0.5,))

    def __init__(self, config: ReachConfig, num_envs: int, chunk: int, autoreset: Autoreset) -> None:
        suite = ReachSuite(config.tasks)
        super().__init__(suite, num_envs=num_envs, chunk=chunk, horizon=config.horizon, autoreset=autoreset)
        self._pixels = config.image_size
        self._x = torch.zeros(num_envs)
        self._elapsed = torch.zeros(num_envs, dtype=torch.long)

    @property
    def elapsed(self) -> Tensor:
        return self._elapsed.clone()

    def reset(self, episodes: Sequence[EpisodeSpec], where: Sequence[int] | None = None) -> Observation:
        slots = self._named(episodes, where)
        if where is None:
            self._specs = [None] * self.num_envs
        for slot, episode in zip(slots, episodes, strict=True):
            self._start(slot, episode)
        return self._observe(range(self.num_envs))

    def _start(self, slot: int, episode: EpisodeSpec) -> None:
        self._specs[slot] = episode
        self._x[slot] = 0.3 * math.sin(episode.initial_state)
        self._elapsed[slot] = 0

    def step_chunk(self, actions: Tensor) -> ChunkResult:
        values = torch.from_numpy(self._checked(actions)).float()
        return self._run(lambda t: values[:, t, 0])

    def step_expert_chunk(self, noise: float, generator: np.random.Generator) -> tuple[Tensor, ChunkResult]:
        actions = torch.zeros(self.num_envs, self.chunk, 1)

        def choose(t: int) -> Tensor:
            disturbance = 0.5 * noise * torch.from_numpy(generator.normal(size=self.num_envs))
            actions[:, t, 0] = (0.5 * self._side() + disturbance).clamp(-0.5, 0.5)
            return actions[:, t, 0]

        result = self._run(choose)
        return actions * result.executed[..., None], result

    def _side(self) -> Tensor:
        """float32 [B]: the direction of each slot's goal; 0 where the slot idles."""
        return torch.tensor([0.0 if s is None else -1.0 if s.task == "left" else 1.0 for s in self._specs])

    def _run(self, choose: Callable[[int], Tensor]) -> ChunkResult:
        """Execute one chunk; `choose(t)` gives the t-th action, float32 [B]."""
        flags = (self.num_envs, self.chunk)
        terminated, truncated, executed = (torch.zeros(flags, dtype=torch.bool) for _ in range(3))
        live = torch.tensor([spec is not None for spec in self._specs])
        side = self._side()
        frames: dict[int, list[Tensor]] = {slot: [] for slot in self._recorded if live[slot]}
        for t in range(self.chunk):
            self._x += torch.where(live, choose(t), 0.0)
            self._elapsed += live
            executed[:, t] = live
            terminated[:, t] = live & (self._x * side >= GOAL)
            truncated[:, t] = live & ~terminated[:, t] & (self._elapsed >= self.horizon)
            for slot in frames:
                if live[slot]:
                    frames[slot].append(self._draw([slot])[0, 0])
            live = live & ~terminated[:, t] & ~truncated[:, t]
        finished = self._records(terminated.any(1), truncated.any(1))
        cut = torch.from_numpy(self._final_slots(terminated.numpy(), truncated.numpy()))
        final = self._observe(cut.tolist()) if len(cut) else None
        for slot, episode in self._successors([record.slot for record in finished]).items():
            self._start(slot, episode)
        return ChunkResult(
            observation=self._observe(range(self.num_envs)),
            reward=terminated.float(),
            terminated=terminated,
            truncated=truncated,
            success=terminated.clone(),
            executed=executed,
            final_slots=cut,
            final_observation=final,
            finished=finished,
            frames={slot: torch.stack(pictures) for slot, pictures in frames.items()},
        )

    def _records(self, succeeded: Tensor, truncated: Tensor) -> tuple[EpisodeRecord, ...]:
        return tuple(
            EpisodeRecord(
                spec,
                slot,
                bool(succeeded[slot]),
                int(self._elapsed[slot]),
                float(succeeded[slot]),
                bool(truncated[slot]),
            )
            for slot, spec in enumerate(self._specs)
            if spec is not None and (succeeded[slot] or truncated[slot])
        )

    def _observe(self, slots: Sequence[int]) -> Observation:
        texts = ("" if (spec := self._specs[s]) is None else self.suite.instruction(spec) for s in slots)
        return Observation(self._draw(slots), tuple(texts))

    def _draw(self, slots: Sequence[int]) -> Tensor:
        """uint8 [len(slots), 1, H, W, 3]: a bright column where the dot is."""
        position = ((self._x[list(slots)] / GOAL + 1.5) / 3).clamp(0, 1)
        column = torch.arange(self._pixels) / (self._pixels - 1)
        bright = 255 * (1 - 8 * (column - position[:, None]).abs()).clamp(0, 1)
        dark = torch.tensor([(spec := self._specs[s]) is not None and spec.variant == "dark" for s in slots])
        bright = torch.where(dark[:, None], bright / 2, bright).to(torch.uint8)
        return bright[:, None, None, :, None].expand(-1, 1, self._pixels, -1, 3).contiguous()

    def state_dict(self) -> dict[str, Any]:
        return {**self._saved_slots(), "x": self._x.clone(), "elapsed": self._elapsed.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> Observation:
        self._load_slots(state)
        self._x, self._elapsed = state["x"].clone(), state["elapsed"].clone()
        return self._observe(range(self.num_envs))

    def close(self) -> None:
        """Nothing to free."""


def make(config: ReachConfig, num_envs: int, chunk: int, autoreset: Autoreset) -> ReachEnv:
    """The entry point that `rove.envs.registry` calls, with `suite`."""
    return ReachEnv(config, num_envs, chunk, autoreset)


def suite(config: ReachConfig) -> ReachSuite:
    return ReachSuite(config.tasks)


load.register("env", ReachConfig)
registry.register("reach", __name__)


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
