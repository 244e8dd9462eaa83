"""The smallest environment that keeps the VectorEnv contract: a point on a line that has to reach +0.35.

Deterministic, instant, and plain Python: it tests what is around an environment, and shows how to write one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import astuple
from typing import Any

import torch
from torch import Tensor

from rove.envs.base import TaskSuite
from rove.types import (
    ActionSpec,
    Autoreset,
    ChunkResult,
    EpisodeRecord,
    EpisodeSpec,
    Finals,
    Observation,
    Split,
)

GOAL, CLIFF, STEP = 0.35, -0.6, 0.1


class PointSuite(TaskSuite):
    """Two tasks, which differ in the direction that an action pushes."""

    name = "point"
    tasks: tuple[str, ...] = ("forwards", "backwards")
    vocabulary: tuple[str, ...] = ("move", "forwards", "backwards")
    variants: Mapping[str, str] = {"inverted": "vision"}

    def instruction(self, episode: EpisodeSpec) -> str:
        return f"move {episode.task}"

    def initial_states(self, task: str, split: Split) -> range:
        if task not in self.tasks:
            raise ValueError(f"no task {task!r}: choose one of {', '.join(self.tasks)}")
        return range(100) if split == "train" else range(1000, 1020)


class PointEnv:
    """Reward 1 and success at GOAL, failure at CLIFF, truncation at the horizon."""

    def __init__(self, num_envs: int, autoreset: Autoreset, *, chunk: int = 5, horizon: int = 12) -> None:
        self.num_envs, self.autoreset, self.chunk, self.horizon = num_envs, autoreset, chunk, horizon
        self.suite = PointSuite()
        self.finals: Finals = "truncated"
        self.action_spec = ActionSpec(("push", "unused"), ("m", "1"), (-1.0, -1.0), (1.0, 1.0))
        self.spec: list[EpisodeSpec | None] = [None] * num_envs
        self.x = [0.0] * num_envs
        self.steps = [0] * num_envs
        self.total = [0.0] * num_envs
        self.waiting: list[EpisodeSpec] = []
        self.recorded: tuple[int, ...] = ()

    @property
    def specs(self) -> tuple[EpisodeSpec | None, ...]:
        return tuple(self.spec)

    @property
    def elapsed(self) -> Tensor:
        return torch.tensor(self.steps)

    @property
    def queued(self) -> int:
        return len(self.waiting)

    def reset(self, episodes: Sequence[EpisodeSpec], where: Sequence[int] | None = None) -> Observation:
        self.check_episodes(episodes)
        slots = list(range(len(episodes))) if where is None else list(where)
        if (
            len(slots) != len(episodes)
            or len(set(slots)) < len(slots)
            or not set(slots) <= set(range(self.num_envs))
        ):
            raise ValueError(f"{len(episodes)} episodes do not fit slots {slots} of {self.num_envs}")
        if where is None:
            self.waiting, self.spec = [], [None] * self.num_envs
        for slot, episode in zip(slots, episodes, strict=True):
            self.start(slot, episode)
        return self.observe(range(self.num_envs))

    def enqueue(self, episodes: Sequence[EpisodeSpec]) -> None:
        self.check_episodes(episodes)
        self.waiting += episodes

    def check_episodes(self, episodes: Sequence[EpisodeSpec]) -> None:
        for e in episodes:
            states = [s for split in ("train", "held_out") for s in self.suite.initial_states(e.task, split)]
            if e.initial_state not in states or e.variant not in ("none", *self.suite.variants):
                raise ValueError(f"no such episode: {e}")

    def start(self, slot: int, episode: EpisodeSpec) -> None:
        self.spec[slot] = episode
        self.x[slot] = 0.2 * math.sin(episode.initial_state + 1)
        self.steps[slot], self.total[slot] = 0, 0.0

    def check_actions(self, actions: Tensor) -> None:
        shape = (self.num_envs, self.chunk, self.action_spec.dim)
        if actions.shape != shape:
            raise ValueError(f"actions must have shape {shape}, not {tuple(actions.shape)}")
        running = actions[[spec is not None for spec in self.spec]]
        if not ((running >= -1) & (running <= 1)).all():
            raise ValueError("actions must be finite and in [-1, 1]")

    def step_chunk(self, actions: Tensor) -> ChunkResult:
        self.check_actions(actions)
        b, c = self.num_envs, self.chunk
        reward = torch.zeros(b, c)
        terminated, truncated, success, executed = (torch.zeros(b, c, dtype=torch.bool) for _ in range(4))
        frames: dict[int, list[Tensor]] = {slot: [] for slot in self.recorded if self.spec[slot]}
        finished: list[EpisodeRecord] = []
        ended: list[int] = []
        for slot, spec in enumerate(self.spec):
            for t in range(c if spec else 0):
                reward[slot, t], success[slot, t], failure = self.execute(slot, float(actions[slot, t, 0]))
                executed[slot, t] = True
                terminated[slot, t] = success[slot, t] | failure
                truncated[slot, t] = self.over(slot, bool(terminated[slot, t]))
                if slot in frames:
                    frames[slot].append(self.picture(slot))
                if terminated[slot, t] or truncated[slot, t]:
                    finished.append(self.conclude(slot, bool(success[slot, t]), bool(truncated[slot, t])))
                    ended.append(slot)
                    break
        wanted = {"none": executed & False, "truncated": truncated, "ended": truncated | terminated}
        cut = wanted[self.finals].any(1).nonzero().flatten()
        final = self.observe(cut.tolist()) if len(cut) else None
        for slot in ended:
            self.follow(slot)
        return ChunkResult(
            self.observe(range(b)),
            reward,
            terminated,
            truncated,
            success,
            executed,
            cut,
            final,
            tuple(finished),
            {slot: torch.stack(pictures) for slot, pictures in frames.items()},
        )

    def execute(self, slot: int, push: float) -> tuple[float, bool, bool]:
        """Reward, success and failure of one action."""
        spec = self.spec[slot]
        assert spec is not None
        self.x[slot] += STEP * push * (1 if spec.task == "forwards" else -1)
        self.steps[slot] += 1
        success, failure = self.x[slot] > GOAL, self.x[slot] < CLIFF
        self.total[slot] += float(success)
        return float(success), success, failure

    def over(self, slot: int, terminated: bool) -> bool:
        return self.steps[slot] >= self.horizon and not terminated

    def conclude(self, slot: int, success: bool, truncated: bool) -> EpisodeRecord:
        spec = self.spec[slot]
        assert spec is not None
        return EpisodeRecord(spec, slot, success, self.steps[slot], self.total[slot], truncated)

    def follow(self, slot: int) -> None:
        """What comes after an episode's end."""
        self.spec[slot] = None
        if self.autoreset == "refill" and self.waiting:
            self.start(slot, self.waiting.pop(0))

    def picture(self, slot: int) -> Tensor:
        """uint8 [4, 4, 3]: the bytes of the position, inverted in the variant of that name."""
        spec = self.spec[slot]
        bits = torch.tensor([self.x[slot]] * 6, dtype=torch.float64).view(torch.uint8).view(4, 4, 3)
        return 255 - bits if spec and spec.variant == "inverted" else bits

    def observe(self, slots: Sequence[int]) -> Observation:
        texts = ("" if (spec := self.spec[s]) is None else self.suite.instruction(spec) for s in slots)
        images = torch.stack([self.picture(s) for s in slots])[:, None]
        return Observation(images, tuple(texts), torch.tensor([[self.x[s]] for s in slots]))

    def record(self, slots: Sequence[int]) -> None:
        self.recorded = tuple(slots)

    def state_dict(self) -> dict[str, Any]:
        return {
            "spec": [spec and astuple(spec) for spec in self.spec],
            "waiting": [astuple(spec) for spec in self.waiting],
            "x": list(self.x),
            "steps": list(self.steps),
            "total": list(self.total),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> Observation:
        self.spec = [spec and EpisodeSpec(*spec) for spec in state["spec"]]
        self.waiting = [EpisodeSpec(*spec) for spec in state["waiting"]]
        self.x, self.steps, self.total = (list(state[key]) for key in ("x", "steps", "total"))
        return self.observe(range(self.num_envs))

    def close(self) -> None:
        pass
