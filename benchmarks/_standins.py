"""An environment and a policy that take a given time and do nothing else, as if a GPU did the work."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rove.envs import registry
from rove.policies.base import SamplingNoise
from rove.types import (
    ActionChunk,
    ActionSpec,
    Autoreset,
    ChunkResult,
    EpisodeRecord,
    EpisodeSpec,
    Mode,
    Observation,
)

SPEC = ActionSpec(("x", "gripper"), ("m", "1"), (-1.0, -1.0), (1.0, 1.0))
IMAGE = (1, 64, 64, 3)


def take(seconds: float, since: float) -> None:
    """Return `seconds` after `since`, to some microseconds."""
    end = since + seconds
    if (left := end - time.perf_counter() - 3e-4) > 0:
        time.sleep(left)
    while time.perf_counter() < end:
        pass


@dataclass(frozen=True, slots=True)
class StandInConfig:
    kind: Literal["stand_in"] = "stand_in"
    horizon: int = 64
    image_size: int = 64
    per_slot: float = 1e-4
    """Seconds of simulation a slot and chunk."""


class _Suite:
    name = "stand_in"
    tasks: tuple[str, ...] = ("wait",)
    vocabulary: tuple[str, ...] = ("wait",)
    variants: Mapping[str, str] = {}

    def instruction(self, episode: EpisodeSpec) -> str:
        return "wait"

    def initial_states(self, task: str, split: str) -> range:
        return range(1000)


class StandInEnv:
    """Episodes run to the horizon; every chunk takes the time that was set."""

    def __init__(self, config: StandInConfig, num_envs: int, chunk: int, autoreset: Autoreset) -> None:
        self.config, self.num_envs, self.chunk, self.autoreset = config, num_envs, chunk, autoreset
        self.horizon, self.suite, self.action_spec, self.finals = config.horizon, _Suite(), SPEC, "truncated"
        self.spec: list[EpisodeSpec | None] = [None] * num_envs
        self.steps = [0] * num_envs
        self.waiting: list[EpisodeSpec] = []
        self.images = torch.zeros(num_envs, *IMAGE, dtype=torch.uint8)

    @property
    def specs(self) -> tuple[EpisodeSpec | None, ...]:
        return tuple(self.spec)

    @property
    def elapsed(self) -> Tensor:
        return torch.tensor(self.steps)

    @property
    def queued(self) -> int:
        return len(self.waiting)

    def enqueue(self, episodes: Sequence[EpisodeSpec]) -> None:
        self.waiting += episodes

    def reset(self, episodes: Sequence[EpisodeSpec], where: Sequence[int] | None = None) -> Observation:
        for slot, episode in zip(where or range(len(episodes)), episodes, strict=True):
            self.spec[slot], self.steps[slot] = episode, 0
        return self._observation()

    def _observation(self) -> Observation:
        return Observation(self.images, ("wait",) * self.num_envs)

    def step_chunk(self, actions: Tensor) -> ChunkResult:
        began = time.perf_counter()
        shape = (self.num_envs, self.chunk)
        truncated = torch.zeros(shape, dtype=torch.bool)
        finished = []
        for slot, spec in enumerate(self.spec):
            assert spec is not None
            self.steps[slot] += self.chunk
            if self.steps[slot] >= self.horizon:
                truncated[slot, -1] = True
                finished.append(EpisodeRecord(spec, slot, False, self.steps[slot], 0.0, True))
                self.spec[slot], self.steps[slot] = self.waiting.pop(0), 0
        nothing = torch.zeros(shape, dtype=torch.bool)
        result = ChunkResult(
            observation=self._observation(),
            reward=torch.zeros(shape),
            terminated=nothing,
            truncated=truncated,
            success=nothing,
            executed=torch.ones(shape, dtype=torch.bool),
            final_slots=torch.zeros(0, dtype=torch.long),
            final_observation=None,
            finished=tuple(finished),
        )
        take(self.config.per_slot * self.num_envs, began)
        return result

    def state_dict(self) -> dict[str, Any]:
        return {"specs": [astuple(spec) for spec in self.spec if spec], "steps": self.steps}

    def close(self) -> None:
        pass


def make(config: StandInConfig, num_envs: int, chunk: int, autoreset: Autoreset) -> StandInEnv:
    return StandInEnv(config, num_envs, chunk, autoreset)


def suite(config: StandInConfig) -> _Suite:
    return _Suite()


class StandInPolicy(nn.Module):
    """Answers zeros, after the time that was set."""

    value_head = None
    action_spec = SPEC
    sample_dtype = torch.long

    def __init__(self, chunk: int, per_row: float) -> None:
        super().__init__()
        self.chunk, self.per_row = chunk, per_row
        self.sample_shape = (chunk, SPEC.dim)

    def act(
        self,
        observation: Observation,
        mode: Mode,
        noise: SamplingNoise | None = None,
        samples: int | None = None,
    ) -> ActionChunk:
        began = time.perf_counter()
        shape = (len(observation), self.chunk, SPEC.dim)
        answer = ActionChunk(
            torch.zeros(shape), torch.zeros(shape, dtype=torch.long), torch.zeros(shape), None
        )
        take(self.per_row * len(observation), began)
        return answer


registry.register(StandInConfig, "_standins")
