"""The tabletop suite behind the `VectorEnv` contract: see `rove.envs.base` for the rules."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rove.config.schema import TabletopConfig
from rove.envs.slots import EpisodeSlots
from rove.envs.tabletop import progress, robot
from rove.envs.tabletop.expert import SLIP, expert_action, mistaken
from rove.envs.tabletop.layout import DISPLACED_AFTER, layout
from rove.envs.tabletop.render import RenderPool
from rove.envs.tabletop.tasks import TabletopSuite
from rove.envs.tabletop.worlds import Worlds, background
from rove.types import (
    ActionSpec,
    Autoreset,
    ChunkResult,
    Demonstrations,
    EpisodeRecord,
    EpisodeSpec,
    Observation,
)

REQUESTS = 6
"""Instructions a picture is asked about."""
UNDER_WAY = 0.75
"""Share of those pictures in which the hand has left its start."""

ActionSource = Callable[[int, np.ndarray], np.ndarray]
"""(index in the chunk, rows [n]) -> actions [n, A]."""


class Played(NamedTuple):
    """What happened in a chunk, [B, C] each; see `ChunkResult`."""

    reward: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    success: np.ndarray
    executed: np.ndarray


_COUNTS = ("elapsed", "streak", "held_for", "potential", "total_reward")
"""What is kept of each slot's episode beside its world."""


class TabletopEnv(EpisodeSlots):
    """B tabletop worlds, stepped by MuJoCo on threads and drawn by MuJoCo Warp."""

    action_spec: ActionSpec = robot.ACTION_SPEC

    def __init__(
        self,
        config: TabletopConfig,
        num_envs: int,
        chunk: int,
        autoreset: Autoreset,
        gpu: int | None = None,
    ) -> None:
        """`gpu` is the CUDA index of the one that draws, with `config.render = "cuda"`; None: the first."""
        self._tasks = TabletopSuite.from_config(config)
        super().__init__(
            self._tasks, num_envs=num_envs, chunk=chunk, horizon=config.horizon, autoreset=autoreset
        )
        self._shaped = config.reward == "shaped"
        threads = config.threads or len(os.sched_getaffinity(0))
        self._worlds = Worlds(num_envs, threads)
        device = f"cuda:{gpu or 0}" if config.render == "cuda" else "cpu"
        self._renderer = RenderPool(
            self._worlds.scene.model, num_envs, config.image_size, background(), threads, device
        )
        self._image_shape = (1, config.image_size, config.image_size, 3)
        self._elapsed = np.zeros(num_envs, np.int64)
        self._streak = np.zeros(num_envs, np.int64)
        self._held_for = np.zeros(num_envs, np.int64)
        self._astray = np.zeros((num_envs, 2, 2))
        self._potential = np.zeros(num_envs)
        self._total_reward = np.zeros(num_envs)
        self.diverged = 0
        """Episodes so far that ended because their simulation diverged."""

    # --- the slots --------------------------------------------------------------------------------

    @property
    def elapsed(self) -> Tensor:
        return torch.from_numpy(self._elapsed.copy())

    def reset(self, episodes: Sequence[EpisodeSpec], where: Sequence[int] | None = None) -> Observation:
        self._start_all(episodes, where)
        return self._observe()

    def _start_all(self, episodes: Sequence[EpisodeSpec], where: Sequence[int] | None) -> None:
        slots = self._named(episodes, where)
        if where is None:
            self._specs = [None] * self.num_envs
        for slot, episode in zip(slots, episodes, strict=True):
            self._start(slot, episode)

    def _start(self, slot: int, episode: EpisodeSpec) -> None:
        self._worlds.start(slot, episode)
        self._specs[slot] = episode
        self._elapsed[slot] = self._streak[slot] = self._held_for[slot] = 0
        self._total_reward[slot] = 0.0
        self._potential[slot] = progress.potential(self._worlds.situation(np.array([slot])))[0]

    # --- stepping ---------------------------------------------------------------------------------

    def step_chunk(self, actions: Tensor) -> ChunkResult:
        values = self._checked(actions)
        return self._run(lambda c, rows: values[rows, c])

    def try_chunks(self, actions: Tensor) -> tuple[Tensor, Tensor]:
        """See `rove.envs.base.Brancher`."""
        before, worlds = self._counts(), self._worlds.state_dict()
        tried = []
        for g in range(actions.shape[1]):
            values = self._checked(actions[:, g])
            tried.append(self._play(lambda c, rows, values=values: values[rows, c]))
            self._worlds.restore(worlds)
            self._set_counts(before)
        reward, executed = (
            np.stack([getattr(played, name) for played in tried], axis=1) for name in ("reward", "executed")
        )
        return torch.from_numpy(reward), torch.from_numpy(executed)

    def step_expert_chunk(self, noise: float, generator: np.random.Generator) -> tuple[Tensor, ChunkResult]:
        """Let the scripted expert act for one chunk, closed loop; see `rove.envs.base.Demonstrator`."""
        spec = self.action_spec
        low, high = np.array(spec.low), np.array(spec.high)
        actions = np.zeros((self.num_envs, self.chunk, spec.dim))
        actions[..., -1] = np.where(self._worlds.open, 1.0, -1.0)[:, None]

        def choose(c: int, rows: np.ndarray) -> np.ndarray:
            worlds = self._worlds
            action, freedom = expert_action(
                mistaken(worlds.situation(rows), self._astray[rows]),
                worlds.pose[rows],
                worlds.target_yaw(rows),
                worlds.symmetry[rows],
                self._elapsed[rows],
                self._held_for[rows],
            )
            actions[rows, c] = action = np.clip(action, low, high)
            # An episode that ends here is padded with "stay": what the policy should do when it is done.
            actions[rows, c + 1 :, -1] = action[:, -1:]
            if c == self.chunk - 1:
                action[:, :3] += freedom[:, None] * noise * high[:3] * generator.normal(size=(len(rows), 3))
            return np.clip(action, low, high)

        result = self._run(choose)
        self._astray[:] = 0.0
        return torch.from_numpy(actions.astype(np.float32)), result

    def slip(self, slots: np.ndarray, generator: np.random.Generator) -> None:
        """Of the target and of its destination, each in a direction of its own; see `Fallible.slip`."""
        way = generator.uniform(0.0, 2 * np.pi, (self.num_envs, 2))
        self._astray[:] = SLIP * slots[:, None, None] * np.stack([np.cos(way), np.sin(way)], axis=-1)

    def points(self) -> Tensor:
        """Object, destination (none for a pick) and hand: see `rove.envs.base.Grounder`."""
        where = torch.full((self.num_envs, 3, 2), torch.nan)
        rows = self._running()
        situation = self._worlds.situation(rows)
        places = np.stack([situation.target, situation.destination, situation.gripper[:, :3]], axis=1)
        places[situation.family == progress.PICK, 1] = np.nan
        where[rows] = self._pixels(rows, places)
        return where

    def _pixels(self, rows: np.ndarray, places: np.ndarray) -> Tensor:
        """float32 [n, k, 2] of places [n, k, 3]."""
        size = self._image_shape[1]
        return torch.from_numpy((size * self._worlds.project(rows, places)).astype(np.float32))

    def ground(self, episodes: Sequence[EpisodeSpec]) -> Demonstrations:
        """Where what could be asked for is; see `rove.envs.base.Grounder`."""
        self._start_all(episodes, None)
        frame, instruction, places = [], [], []
        for slot, episode in enumerate(episodes):
            rng = np.random.default_rng((episode.seed, slot))
            under_way = rng.random() < UNDER_WAY
            carried = self._worlds.catch_in_the_act(slot, rng) if under_way else None
            objects = self._worlds.object_places(slot)
            for text, where in self._tasks.requests(layout(episode), objects, REQUESTS, rng, carried):
                frame.append(slot)
                instruction.append(text)
                places.append([*where, self._worlds.pose[slot][:3]])
        images = self._observe().images[: len(episodes)]
        points = self._pixels(np.array(frame), np.array(places))
        return self._pointed(images, frame, instruction, points)

    def _run(self, choose: ActionSource) -> ChunkResult:
        frames: dict[int, list[np.ndarray]] = {slot: [] for slot in self._recorded}
        played = self._play(choose, lambda rows: self._film(rows, frames))
        self._worlds.wake(self._running())
        terminated, truncated = played.terminated, played.truncated
        final_slots = self._final_slots(terminated, truncated)
        final = self._observation(final_slots) if len(final_slots) else None
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
            frames={slot: torch.from_numpy(np.stack(f)) for slot, f in frames.items() if f},
        )

    def _play(
        self, choose: ActionSource, on_action: Callable[[np.ndarray], None] = lambda rows: None
    ) -> Played:
        """One chunk in every running slot, physics alone; a slot whose episode ends stays as it ended."""
        shape = (self.num_envs, self.chunk)
        reward = np.zeros(shape, np.float32)
        terminated, truncated, success, executed = (np.zeros(shape, bool) for _ in range(4))
        rows = self._running()
        for c in range(self.chunk):
            if not len(rows):
                break
            executed[rows, c] = True
            reward[rows, c], success[rows, c], terminated[rows, c], truncated[rows, c] = self._step(
                rows, choose(c, rows)
            )
            on_action(rows)
            rows = rows[~(terminated[rows, c] | truncated[rows, c])]
        return Played(reward, terminated, truncated, success, executed)

    def _step(
        self, rows: np.ndarray, actions: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """One action in each of `rows`: reward, success, terminated, truncated, each [n]."""
        self._worlds.displace(rows[self._elapsed[rows] == DISPLACED_AFTER])
        diverged = self._worlds.act(rows, actions)
        self._elapsed[rows] += 1
        situation = self._worlds.situation(rows)
        self._held_for[rows] = np.where(situation.held & ~situation.open, self._held_for[rows] + 1, 0)
        self._streak[rows] = np.where(progress.achieved(situation) & ~diverged, self._streak[rows] + 1, 0)
        success = self._streak[rows] >= progress.HELD_FOR
        terminated = (success | progress.failed(situation)) & ~diverged
        truncated = ((self._elapsed[rows] >= self.horizon) | diverged) & ~terminated
        self.diverged += int(diverged.sum())
        reward = success.astype(np.float64)
        if self._shaped:
            potential = np.where(terminated & ~success, -1.0, progress.potential(situation))
            potential = np.where(success, 0.0, np.where(diverged, self._potential[rows], potential))
            reward += potential - self._potential[rows]
            self._potential[rows] = potential
        self._total_reward[rows] += reward
        return reward, success, terminated, truncated

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
        for slot, episode in self._successors(ended).items():
            self._start(slot, episode)
        return tuple(records)

    # --- pictures ---------------------------------------------------------------------------------

    def _draw(self, rows: np.ndarray) -> np.ndarray:
        return self._renderer.render(self._worlds.frame(rows))

    def _observation(self, rows: np.ndarray) -> Observation:
        """The rows named, which must be running."""
        specs = [self._specs[row] for row in rows]
        text = tuple(self.suite.instruction(spec) for spec in specs if spec is not None)
        state = torch.from_numpy(self._worlds.proprioception(rows))
        return Observation(torch.from_numpy(self._draw(rows)[:, None]), text, state)

    def _observe(self) -> Observation:
        """All B slots; black and without an instruction where one idles."""
        images = np.zeros((self.num_envs, *self._image_shape), np.uint8)
        state = np.zeros((self.num_envs, robot.STATE_DIM), np.float32)
        running = self._running()
        if len(running):
            images[running, 0] = self._draw(running)
            state[running] = self._worlds.proprioception(running)
        text = tuple("" if spec is None else self.suite.instruction(spec) for spec in self._specs)
        return Observation(torch.from_numpy(images), text, torch.from_numpy(state))

    def _film(self, rows: np.ndarray, frames: dict[int, list[np.ndarray]]) -> None:
        filmed = rows[np.isin(rows, self._recorded)]
        if len(filmed):
            for slot, image in zip(filmed.tolist(), self._draw(filmed), strict=True):
                frames[slot].append(image)

    # --- saving -----------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        return {
            **self._saved_slots(),
            "worlds": {name: torch.from_numpy(v) for name, v in self._worlds.state_dict().items()},
            **self._counts(),
        }

    def _counts(self) -> dict[str, Any]:
        counts = {name: torch.from_numpy(getattr(self, f"_{name}").copy()) for name in _COUNTS}
        return counts | {"diverged": self.diverged}

    def _set_counts(self, counts: Mapping[str, Any]) -> None:
        for name in _COUNTS:
            getattr(self, f"_{name}")[...] = counts[name].numpy()
        self.diverged = counts["diverged"]

    def load_state_dict(self, state: Mapping[str, Any]) -> Observation:
        self._load_slots(state)
        running = {slot: spec for slot, spec in enumerate(self._specs) if spec is not None}
        self._worlds.load_state_dict({name: v.numpy() for name, v in state["worlds"].items()}, running)
        self._set_counts(state)
        return self._observe()

    def close(self) -> None:
        self._renderer.close()
