"""The tabletop suite behind the `VectorEnv` contract: see `rove.envs.base` for the rules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rove import host
from rove.config.schema import TabletopConfig
from rove.envs.chunked import Actions, ChunkedEnv, Frames, Outcome, Played, carry_out
from rove.envs.tabletop import progress, robot
from rove.envs.tabletop.expert import SLIP, expert_action, mistaken
from rove.envs.tabletop.layout import DISPLACED_AFTER
from rove.envs.tabletop.render import RenderPool
from rove.envs.tabletop.suite import TabletopSuite
from rove.envs.tabletop.worlds import TabletopWorlds, background, setup
from rove.types import ActionSpec, Autoreset, ChunkResult, Demonstrations, EpisodeSpec

REQUESTS = 6
"""Number of instructions that a picture is asked about."""
UNDER_WAY = 0.75
"""Share of those pictures in which the hand has left its start."""

_COUNTS = ("streak", "held_for", "potential")
"""State of each slot's episode beside its world."""


class TabletopEnv(ChunkedEnv):
    """B tabletop worlds, stepped by MuJoCo on threads and drawn by MuJoCo Warp."""

    action_spec: ActionSpec = robot.ACTION_SPEC
    state_size = robot.STATE_DIM

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
        threads = config.threads or host.core_count()
        self._worlds = TabletopWorlds(num_envs, threads)
        device = f"cuda:{gpu or 0}" if config.render == "cuda" else "cpu"
        self._renderer = RenderPool(
            self._worlds.scene.model, num_envs, config.image_size, background(), threads, device
        )
        self.image_shape = (1, config.image_size, config.image_size, 3)
        self._streak = np.zeros(num_envs, np.int64)
        self._held_for = np.zeros(num_envs, np.int64)
        self._astray = np.zeros((num_envs, 2, 2))
        self._potential = np.zeros(num_envs)

    # --- stepping ---------------------------------------------------------------------------------

    def start(self, rows: Sequence[int], episodes: Sequence[EpisodeSpec]) -> None:
        for row, episode in zip(rows, episodes, strict=True):
            self._worlds.start(row, episode)
            self._streak[row] = self._held_for[row] = 0
            self._potential[row] = progress.potential(self._worlds.situation(np.array([row])))[0]

    def act(self, rows: np.ndarray, actions: np.ndarray) -> Outcome:
        self._worlds.displace(rows[self._elapsed[rows] == DISPLACED_AFTER])
        diverged = self._worlds.act(rows, actions)
        situation = self._worlds.situation(rows)
        self._held_for[rows] = np.where(situation.held & ~situation.open, self._held_for[rows] + 1, 0)
        self._streak[rows] = np.where(progress.achieved(situation) & ~diverged, self._streak[rows] + 1, 0)
        success = self._streak[rows] >= progress.HELD_FOR
        terminated = (success | progress.failed(situation)) & ~diverged
        reward = success.astype(np.float64)
        if self._shaped:
            potential = np.where(terminated & ~success, -1.0, progress.potential(situation))
            potential = np.where(success, 0.0, np.where(diverged, self._potential[rows], potential))
            reward += potential - self._potential[rows]
            self._potential[rows] = potential
        return Outcome(reward, success, terminated, diverged)

    def play(self, rows: np.ndarray, actions: Actions) -> tuple[Played, Frames]:
        played = super().play(rows, actions)
        self._worlds.wake(rows)
        return played

    def try_chunks(self, actions: Tensor) -> tuple[Tensor, Tensor]:
        """Try chunks and put everything back: see `rove.envs.base.Brancher`."""
        before, worlds = self._counts() | {"elapsed": self.elapsed}, self._worlds.state_dict()
        rows, tried = self._running(), []
        for g in range(actions.shape[1]):
            values = self._checked(actions[:, g])

            def act(c: int, rows: np.ndarray, values: np.ndarray = values) -> Outcome:
                return self.act(rows, values[rows, c])

            played = carry_out(rows, self.chunk, act, self._elapsed, self.horizon)
            tried.append((self._spread(rows, played.reward.float()), self._spread(rows, played.executed)))
            self._worlds.restore(worlds)
            self._set_counts(before)
            self._elapsed[...] = before["elapsed"].numpy()
        reward, executed = (torch.stack(column, dim=1) for column in zip(*tried, strict=True))
        return reward, executed

    def step_expert_chunk(self, noise: float, generator: np.random.Generator) -> tuple[Tensor, ChunkResult]:
        """Let the scripted expert act for one chunk, closed loop; see `rove.envs.base.Demonstrator`."""
        worlds, high = self._worlds, np.array(self.action_spec.high)

        def act(rows: np.ndarray, last: bool) -> tuple[np.ndarray, np.ndarray]:
            action, freedom = expert_action(
                mistaken(worlds.situation(rows), self._astray[rows]),
                worlds.pose[rows],
                worlds.target_yaw(rows),
                worlds.symmetry[rows],
                self._elapsed[rows],
                self._held_for[rows],
            )
            wanted = np.clip(action, self.action_spec.low, high)
            pushed = wanted.copy()
            if last:
                pushed[:, :3] += freedom[:, None] * noise * high[:3] * generator.normal(size=(len(rows), 3))
            return wanted, pushed

        shown = self._demonstrate(act, np.where(worlds.open, 1.0, -1.0))
        self._astray[:] = 0.0
        return shown

    def slip(self, slots: np.ndarray, generator: np.random.Generator) -> None:
        """Displace the target and its destination, each in a direction of its own; see `Fallible.slip`."""
        way = generator.uniform(0.0, 2 * np.pi, (self.num_envs, 2))
        self._astray[:] = SLIP * slots[:, None, None] * np.stack([np.cos(way), np.sin(way)], axis=-1)

    def points(self) -> Tensor:
        """Locate object, destination (none for a pick) and hand: see `rove.envs.base.Grounder`."""
        where = torch.full((self.num_envs, 3, 2), torch.nan)
        rows = self._running()
        situation = self._worlds.situation(rows)
        places = np.stack([situation.target, situation.destination, situation.gripper[:, :3]], axis=1)
        places[situation.family == progress.PICK, 1] = np.nan
        where[rows] = self._pixels(rows, places)
        return where

    def _pixels(self, rows: np.ndarray, places: np.ndarray) -> Tensor:
        """Return the pixels, float32 [n, k, 2], of places [n, k, 3]."""
        size = self.image_shape[1]
        return torch.from_numpy((size * self._worlds.project(rows, places)).astype(np.float32))

    def ground(self, episodes: Sequence[EpisodeSpec]) -> Demonstrations:
        """Locate in the image what could be asked for; see `rove.envs.base.Grounder`."""
        self._reset(episodes)
        frame, instruction, places = [], [], []
        for slot, episode in enumerate(episodes):
            rng = np.random.default_rng((episode.seed, slot))
            under_way = rng.random() < UNDER_WAY
            carried = self._worlds.catch_in_the_act(slot, rng) if under_way else None
            objects = self._worlds.object_places(slot)
            shown = setup(episode.task, episode.initial_state, episode.variant).layout
            for text, where in self._tasks.requests(shown, objects, REQUESTS, rng, carried):
                frame.append(slot)
                instruction.append(text)
                places.append([*where, self._worlds.pose[slot][:3]])
        images = self._observe_all().images[: len(episodes)]
        points = self._pixels(np.array(frame), np.array(places))
        return self._grounding(images, frame, instruction, points)

    # --- pictures ---------------------------------------------------------------------------------

    def _draw(self, rows: np.ndarray) -> np.ndarray:
        return self._renderer.render(self._worlds.frame(rows))

    def observe(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        state = torch.from_numpy(self._worlds.proprioception(rows))
        return torch.from_numpy(self._draw(rows)[:, None]), state

    # --- saving -----------------------------------------------------------------------------------

    def save(self) -> dict[str, Any]:
        worlds = {name: torch.from_numpy(v) for name, v in self._worlds.state_dict().items()}
        return worlds | self._counts()

    def load(self, state: Mapping[str, Any]) -> None:
        running = {slot: spec for slot, spec in enumerate(self._specs) if spec is not None}
        self._worlds.load_state_dict({name: value.numpy() for name, value in state.items()}, running)
        self._set_counts(state)

    def _counts(self) -> dict[str, Tensor]:
        return {name: torch.from_numpy(getattr(self, f"_{name}").copy()) for name in _COUNTS}

    def _set_counts(self, counts: Mapping[str, Tensor]) -> None:
        for name in _COUNTS:
            getattr(self, f"_{name}")[...] = counts[name].numpy()

    def close(self) -> None:
        self._renderer.close()
