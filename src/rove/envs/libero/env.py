"""The LIBERO suites behind the `VectorEnv` contract: see `rove.envs.base` for the rules."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rove.config.schema import LiberoConfig
from rove.envs.conventions import LIBERO_ACTIONS
from rove.envs.libero import expert, grounding, scenes
from rove.envs.libero.suite import LiberoSuite, perturbed
from rove.envs.libero.worlds import STATE_DIM, Group, Place, Worlds
from rove.envs.slots import EpisodeSlots
from rove.types import (
    ActionSpec,
    Autoreset,
    ChunkResult,
    Demonstrations,
    EpisodeRecord,
    EpisodeSpec,
    Observation,
)

ActionSource = Callable[[int, np.ndarray], np.ndarray]
"""(index in the chunk, slots [n]) -> actions [n, A]. Called on several threads at once, each with slots of
its own."""


UNDER_WAY = 12
"""Chunks after which pictures to point in are taken, beside those of starts: as long as most tasks take."""


class Played(NamedTuple):
    """What happened in a chunk, [B, C] each; see `ChunkResult`."""

    reward: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    success: np.ndarray
    executed: np.ndarray


class LiberoEnv(EpisodeSlots):
    """B LIBERO worlds of any tasks of a suite, stepped by MuJoCo on threads."""

    action_spec: ActionSpec = LIBERO_ACTIONS

    def __init__(
        self,
        config: LiberoConfig,
        num_envs: int,
        chunk: int,
        autoreset: Autoreset,
        gpu: int | None = None,
    ) -> None:
        """`gpu` is the CUDA index of the one that draws, where one does; None: the first."""
        suite = LiberoSuite(config)
        super().__init__(suite, num_envs=num_envs, chunk=chunk, horizon=config.horizon, autoreset=autoreset)
        threads = config.threads or len(os.sched_getaffinity(0))
        self._cameras = scenes.CAMERAS if config.wrist else scenes.CAMERAS[:1]
        self._image_shape = (len(self._cameras), config.image_size, config.image_size, 3)
        self._pictures = None
        if config.renderer != "none":
            from rove.envs.libero.pictures import Pictures

            self._pictures = Pictures(config, self._cameras, num_envs, threads, gpu)
        scenes.prepare(self.suite.tasks, lambda task: print(f"Compiled {task}.", file=sys.stderr))
        self.worlds = Worlds(
            num_envs,
            threads,
            wait=config.wait,
            phase=config.phase,
            scenes=config.scenes,
            on_drop=self._pictures.drop if self._pictures else lambda scene: None,
        )
        self._elapsed = np.zeros(num_envs, np.int64)
        self._total_reward = np.zeros(num_envs)
        self._expert = expert.Expert(num_envs)
        self._led: list[EpisodeSpec | None] = [None] * num_envs
        """The episode that the expert leads in each slot."""
        self.diverged = 0
        """Episodes so far that ended because their simulation diverged."""

    # --- the slots --------------------------------------------------------------------------------

    @property
    def elapsed(self) -> Tensor:
        return torch.from_numpy(self._elapsed.copy())

    def reset(self, episodes: Sequence[EpisodeSpec], where: Sequence[int] | None = None) -> Observation:
        slots = self._named(episodes, where)
        if where is None:
            self.worlds.release(range(self.num_envs))
            self._specs = [None] * self.num_envs
        self._start(slots, episodes)
        return self._observe()

    def _start(self, slots: Sequence[int], episodes: Sequence[EpisodeSpec]) -> None:
        tasks = [perturbed(episode.task, episode.variant) for episode in episodes]
        self.worlds.start(slots, tasks, [episode.initial_state for episode in episodes])
        for slot, episode in zip(slots, episodes, strict=True):
            self._specs[slot] = episode
            self._elapsed[slot], self._total_reward[slot] = 0, 0.0
            self._led[slot] = None

    # --- stepping ---------------------------------------------------------------------------------

    def step_chunk(self, actions: Tensor) -> ChunkResult:
        values = self._checked(actions)
        return self.run(lambda c, slots: values[slots, c])

    def step_expert_chunk(self, noise: float, generator: np.random.Generator) -> tuple[Tensor, ChunkResult]:
        """Let the scripted expert act for one chunk, closed loop; see `rove.envs.base.Demonstrator`.

        Raises RoveError where a task of the suite has none.
        """
        expert.check(self.suite.name, self.suite.tasks)
        for slot in self._running().tolist():
            if self._led[slot] != self._specs[slot]:
                place = self._place(slot)
                place.group.refresh(np.array([place.row]))
                self._expert.begin(slot, place, generator)
                self._led[slot] = self._specs[slot]
        actions = np.zeros((self.num_envs, self.chunk, self.action_spec.dim))
        actions[..., -1] = -1.0
        shoves = noise * generator.normal(size=(self.num_envs, 3))

        def choose(c: int, slots: np.ndarray) -> np.ndarray:
            action, freedom = self._expert.act(slots, [self._place(slot) for slot in slots.tolist()])
            actions[slots, c] = action
            # An episode that ends here is padded with "stay": what the policy should do when it is done.
            actions[slots, c + 1 :, -1] = action[:, -1:]
            if c == self.chunk - 1:
                action[:, :3] += freedom[:, None] * shoves[slots]
            return np.clip(action, -1.0, 1.0)

        result = self.run(choose)
        return torch.from_numpy(actions.astype(np.float32)), result

    def points(self) -> Tensor:
        """Object, destination and hand: see `rove.envs.base.Grounder`."""
        where = torch.full((self.num_envs, 3, 2), torch.nan)
        for slot in self._running().tolist():
            place = self._place(slot)
            place.group.refresh(np.array([place.row]))
            goal = place.task.goal[self._expert.about(slot) if self._led[slot] else 0]
            where[slot] = grounding.pixels(place, goal, self._image_shape[1])
        return where

    def ground(self, episodes: Sequence[EpisodeSpec]) -> Demonstrations:
        """Where what could be asked for is: at each start, and after each chunk of the expert's, which
        a push ends. What has only seen starts does not find a hand that has left, nor what it carries.

        See `rove.envs.base.Grounder`.
        """
        astray = np.random.default_rng([episode.seed for episode in episodes])
        observation = self.reset(episodes)
        images, frame, instruction, points = [], [], [], []
        for chunks in range(UNDER_WAY + 1):
            if chunks > 0:
                observation = self.step_expert_chunk(noise=1.0, generator=astray)[1].observation
            for slot in self._running().tolist():
                place = self._place(slot)
                place.group.refresh(np.array([place.row]))
                for text, goal in grounding.requests(place.task, self.suite.tasks):
                    frame.append(len(images))
                    instruction.append(text)
                    points.append(grounding.pixels(place, goal, self._image_shape[1]))
                images.append(observation.images[slot].clone())
        return self._pointed(torch.stack(images), frame, instruction, torch.stack(points))

    def run(self, choose: ActionSource) -> ChunkResult:
        """Execute a chunk of whatever actions `choose` answers as it goes along."""
        played, views = self._play(choose)
        terminated, truncated = played.terminated, played.truncated
        final_slots = self._final_slots(terminated, truncated)
        final = self._observation(final_slots.tolist()) if len(final_slots) else None
        finished = self._finish(terminated, truncated, played.success)
        return ChunkResult(
            observation=self._observe(),
            reward=torch.from_numpy(played.reward),
            terminated=torch.from_numpy(terminated),
            truncated=torch.from_numpy(truncated),
            success=torch.from_numpy(played.success),
            executed=torch.from_numpy(played.executed),
            final_slots=torch.from_numpy(final_slots),
            final_observation=final,
            finished=finished,
            frames=views,
        )

    def _play(self, choose: ActionSource) -> tuple[Played, dict[int, Tensor]]:
        """One chunk in every running slot; a slot whose episode ends stays as it ended."""
        shape = (self.num_envs, self.chunk)
        reward = np.zeros(shape, np.float32)
        terminated, truncated, success, executed, diverged = (np.zeros(shape, bool) for _ in range(5))
        filmed: dict[int, list[np.ndarray]] = {slot: [] for slot in self._recorded}

        def work(group: Group, slots: np.ndarray, rows: np.ndarray) -> None:
            for c in range(self.chunk):
                executed[slots, c] = True
                success[slots, c], diverged[slots, c] = group.act(rows, choose(c, slots))
                self._elapsed[slots] += 1
                terminated[slots, c] = success[slots, c]
                over = (self._elapsed[slots] >= self.horizon) | diverged[slots, c]
                truncated[slots, c] = over & ~terminated[slots, c]
                for slot, row in zip(slots.tolist(), rows, strict=True):
                    if slot in filmed:
                        filmed[slot].append(group.pose[row].copy())
                going = ~(terminated[slots, c] | truncated[slots, c])
                slots, rows = slots[going], rows[going]
                if not len(slots):
                    break

        self.worlds.run(self._running(), work)
        self.diverged += int(diverged.sum())
        reward[...] = success
        self._total_reward += reward.sum(1)
        return Played(reward, terminated, truncated, success, executed), self._frames(filmed)

    def _finish(
        self, terminated: np.ndarray, truncated: np.ndarray, success: np.ndarray
    ) -> tuple[EpisodeRecord, ...]:
        """Records of the episodes that ended, and the next ones in their slots."""
        records = []
        ended = np.flatnonzero((terminated | truncated).any(1)).tolist()
        for slot in ended:
            spec = self._specs[slot]
            assert spec is not None
            records.append(
                EpisodeRecord(
                    spec=spec,
                    slot=slot,
                    success=bool(success[slot].any()),
                    length=int(self._elapsed[slot]),
                    total_reward=float(self._total_reward[slot]),
                    truncated=bool(truncated[slot].any()),
                )
            )
        self.worlds.release(ended)
        if successors := self._successors(ended):
            self._start(list(successors), list(successors.values()))
        return tuple(records)

    # --- what is seen -----------------------------------------------------------------------------

    def _draw(self, slots: Sequence[int]) -> np.ndarray:
        """uint8 [n, cameras, H, W, 3] of running slots."""
        if self._pictures is None:
            return np.zeros((len(slots), *self._image_shape), np.uint8)
        return self._pictures.draw([self._place(slot) for slot in slots])

    def _place(self, slot: int) -> Place:
        place = self.worlds.places[slot]
        assert place is not None
        return place

    def _observation(self, slots: Sequence[int]) -> Observation:
        """The slots named, which must be running."""
        text = tuple(
            self.suite.instruction(spec) for slot in slots if (spec := self._specs[slot]) is not None
        )
        state = torch.from_numpy(self.worlds.observed(slots))
        return Observation(torch.from_numpy(self._draw(slots)), text, state)

    def _observe(self) -> Observation:
        """All B slots; black and without an instruction where one idles."""
        images = np.zeros((self.num_envs, *self._image_shape), np.uint8)
        state = np.zeros((self.num_envs, STATE_DIM), np.float32)
        running = self._running()
        if len(running):
            images[running] = self._draw(running.tolist())
            state[running] = self.worlds.observed(running.tolist())
        text = tuple("" if spec is None else self.suite.instruction(spec) for spec in self._specs)
        return Observation(torch.from_numpy(images), text, torch.from_numpy(state))

    def _frames(self, filmed: Mapping[int, Sequence[np.ndarray]]) -> dict[int, Tensor]:
        """The pictures of the first camera of recorded slots, uint8 [n, H, W, 3] each."""
        frames = {}
        for slot, poses in filmed.items():
            if poses:
                size = self._image_shape[1:]
                images = np.zeros((len(poses), *size), np.uint8)
                if self._pictures is not None:
                    images = self._pictures.film(self._place(slot), poses)
                frames[slot] = torch.from_numpy(images)
        return frames

    # --- saving -----------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        saved = {int(slot): self.worlds.save(int(slot)) for slot in self._running()}
        return {
            **self._saved_slots(),
            "worlds": {
                slot: {name: torch.from_numpy(np.asarray(value)) for name, value in world.items()}
                for slot, world in saved.items()
            },
            "elapsed": torch.from_numpy(self._elapsed.copy()),
            "total_reward": torch.from_numpy(self._total_reward.copy()),
            "diverged": self.diverged,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> Observation:
        self._load_slots(state)
        self.worlds.release(range(self.num_envs))
        for slot, spec in enumerate(self._specs):
            if spec is not None:
                world = {name: value.numpy() for name, value in state["worlds"][slot].items()}
                self.worlds.restore(slot, perturbed(spec.task, spec.variant), spec.initial_state, world)
        self._elapsed[...], self._total_reward[...] = state["elapsed"].numpy(), state["total_reward"].numpy()
        self.diverged = state["diverged"]
        return self._observe()

    def close(self) -> None:
        self.worlds.close()
        if self._pictures is not None:
            self._pictures.close()
