"""The LIBERO suites behind the `VectorEnv` contract: see `rove.envs.base` for the rules."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from rove import host
from rove.config.schema import LiberoConfig
from rove.envs.chunked import Actions, ChunkedEnv, Frames, Outcome, Played, carry_out
from rove.envs.libero import expert, grounding, scenes
from rove.envs.libero.conventions import ACTIONS
from rove.envs.libero.progress import FULL_WAY, Sight
from rove.envs.libero.suite import LiberoSuite, perturbed
from rove.envs.libero.worlds import STATE_DIM, Group, LiberoWorlds, Place
from rove.types import ActionSpec, Autoreset, ChunkResult, Demonstrations, EpisodeSpec

UNDER_WAY = 12
"""Chunks after which pictures to point in are taken, beside those of starts: as long as most tasks take."""


class LiberoEnv(ChunkedEnv):
    """B LIBERO worlds of any tasks of a suite, stepped by MuJoCo on threads."""

    action_spec: ActionSpec = ACTIONS
    state_size = STATE_DIM

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
        self._shaped = config.reward == "shaped"
        threads = config.threads or host.core_count()
        self._cameras = scenes.CAMERAS if config.wrist else scenes.CAMERAS[:1]
        self.image_shape = (len(self._cameras), config.image_size, config.image_size, 3)
        self._pictures = None
        if config.renderer != "none":
            from rove.envs.libero.pictures import Pictures

            self._pictures = Pictures(config, self._cameras, num_envs, threads, gpu)
        scenes.prepare(self.suite.tasks, lambda task: print(f"Compiled {task}.", file=sys.stderr))
        self.worlds = LiberoWorlds(
            num_envs,
            threads,
            wait=config.wait,
            phase=config.phase,
            scenes=config.scenes,
            guided=self._shaped,
            on_drop=self._pictures.drop if self._pictures else lambda scene: None,
        )
        self._expert = expert.Expert(num_envs)
        self._led: list[EpisodeSpec | None] = [None] * num_envs
        """The episode that the expert leads in each slot."""

    # --- stepping ---------------------------------------------------------------------------------

    def start(self, rows: Sequence[int], episodes: Sequence[EpisodeSpec]) -> None:
        tasks = [perturbed(episode.task, episode.variant) for episode in episodes]
        self.worlds.start(rows, tasks, [episode.initial_state for episode in episodes])
        for row in rows:
            self._led[row] = None

    def release(self, rows: Sequence[int]) -> None:
        self.worlds.release(rows)

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
        shoves = noise * generator.normal(size=(self.num_envs, 3))

        def act(rows: np.ndarray, last: bool) -> tuple[np.ndarray, np.ndarray]:
            places = [self._place(row) for row in rows.tolist()]
            wanted, freedom = self._expert.act(rows, places, self._watched[rows])
            pushed = wanted.copy()
            if last:
                pushed[:, :3] += freedom[:, None] * shoves[rows]
            return wanted, pushed

        return self._demonstrate(act, -1.0)

    def points(self) -> Tensor:
        """Locate object, destination and hand in the pictures: see `rove.envs.base.Grounder`."""
        where = torch.full((self.num_envs, 3 * len(self._cameras), 2), torch.nan)
        for slot in self._running().tolist():
            place = self._place(slot)
            place.group.refresh(np.array([place.row]))
            step = self._expert.step(slot) if self._led[slot] else None
            goal = place.task.goal[0] if step is None else step.spec
            where[slot] = grounding.pixels(place, goal, self._cameras, self.image_shape[1])
        return where

    def ground(self, episodes: Sequence[EpisodeSpec]) -> Demonstrations:
        """Locate in the image what could be asked for: at each start, and after each chunk of the
        expert's, which a push ends. What has only seen starts does not find a hand that has left, nor what it
        carries.

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
                    points.append(grounding.pixels(place, goal, self._cameras, self.image_shape[1]))
                images.append(observation.images[slot].clone())
        return self._grounding(torch.stack(images), frame, instruction, torch.stack(points))

    def play(self, rows: np.ndarray, actions: Actions) -> tuple[Played, Frames]:
        """Play a chunk in each of `rows`, group by group on threads, which call `actions` side by side."""
        place = np.zeros(self.num_envs, np.int64)
        place[rows] = np.arange(len(rows))
        columns = Played.nothing(len(rows), self.chunk)
        poses: dict[int, list[np.ndarray]] = {slot: [] for slot in self._recorded}

        def work(group: Group, slots: np.ndarray, worlds: np.ndarray) -> None:
            def film(rows: np.ndarray, acted: np.ndarray) -> None:
                for row, world in zip(rows.tolist(), acted, strict=True):
                    if row in poses:
                        poses[row].append(group.pose[world].copy())

            played = self._carry_out(group, slots, worlds, actions, self._elapsed, film)
            for whole, part in zip(columns, played, strict=True):
                whole[place[slots]] = part

        self.worlds.run(rows, work)
        return columns, self._film(poses)

    def _carry_out(
        self,
        group: Group,
        slots: np.ndarray,
        worlds: np.ndarray,
        actions: Actions,
        elapsed: np.ndarray,
        watch: Callable[[np.ndarray, np.ndarray], None] = lambda slots, worlds: None,
    ) -> Played:
        """Play a chunk in rows of a group, the worlds of `slots`; `watch` is called after each action with
        those that it was executed in."""
        index = np.zeros(slots.max() + 1, np.int64)
        index[slots] = np.arange(len(slots))
        seen = [(np.arange(len(slots)), group.sight(worlds))] if self._shaped else []

        def act(c: int, rows: np.ndarray) -> Outcome:
            own = worlds[index[rows]]
            success, diverged = group.act(own, actions(c, rows))
            watch(rows, own)
            if self._shaped:
                seen.append((index[rows], group.sight(own)))
            return Outcome(success.astype(np.float64), success, success, diverged)

        played = carry_out(slots, self.chunk, act, elapsed, self.horizon)
        if self._shaped:
            _shape(played, seen, lambda rows, sight: group.left(worlds[rows], sight))
        return played

    def try_chunks(self, actions: Tensor) -> tuple[Tensor, Tensor]:
        """Try chunks in spare worlds, which are made equal to those that run; see `rove.envs.base.Brancher`.

        All tries of a group's worlds are stepped together, so that what a batch costs beside its physics is
        shared by many, however few worlds there are of a scene.
        """
        values = np.stack([self._checked(actions[:, g]) for g in range(actions.shape[1])], axis=1)
        reward = torch.zeros(values.shape[:3])
        executed = torch.zeros(values.shape[:3], dtype=torch.bool)

        def work(group: Group, slots: np.ndarray, worlds: np.ndarray) -> None:
            tries = values.shape[1]
            spare = group.spare(len(slots) * tries)
            for first in range(0, len(slots) * tries, spare.size):
                which = np.arange(first, min(first + spare.size, len(slots) * tries))
                slot, g = slots[which // tries], which % tries
                own = np.arange(len(which))
                spare.copy(own, group, worlds[which // tries])
                chosen = values[slot, g]
                played = self._carry_out(
                    spare, own, own, lambda c, rows, chosen=chosen: chosen[rows, c], self._elapsed[slot]
                )
                reward[slot, g], executed[slot, g] = played.reward.float(), played.executed

        self.worlds.run(self._running(), work)
        return reward, executed

    # --- what is seen -----------------------------------------------------------------------------

    def _draw(self, slots: Sequence[int]) -> np.ndarray:
        """Draw running slots, uint8 [n, cameras, H, W, 3]."""
        if self._pictures is None:
            return np.zeros((len(slots), *self.image_shape), np.uint8)
        return self._pictures.draw([self._place(slot) for slot in slots])

    def _place(self, slot: int) -> Place:
        place = self.worlds.places[slot]
        assert place is not None
        return place

    def observe(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        state = torch.from_numpy(self.worlds.observed(rows.tolist()))
        return torch.from_numpy(self._draw(rows.tolist())), state

    def _film(self, filmed: Mapping[int, Sequence[np.ndarray]]) -> dict[int, Tensor]:
        """Draw what the first camera saw in recorded slots, uint8 [n, H, W, 3] each."""
        frames = {}
        for slot, poses in filmed.items():
            if poses:
                size = self.image_shape[1:]
                images = np.zeros((len(poses), *size), np.uint8)
                if self._pictures is not None:
                    images = self._pictures.film(self._place(slot), poses)
                frames[slot] = torch.from_numpy(images)
        return frames

    # --- saving -----------------------------------------------------------------------------------

    def save(self) -> dict[int, dict[str, Tensor]]:
        saved = {int(slot): self.worlds.save(int(slot)) for slot in self._running()}
        return {
            slot: {name: torch.from_numpy(np.asarray(value)) for name, value in world.items()}
            for slot, world in saved.items()
        }

    def load(self, state: Mapping[int, Mapping[str, Tensor]]) -> None:
        for slot, spec in enumerate(self._specs):
            if spec is not None:
                world = {name: value.numpy() for name, value in state[slot].items()}
                self.worlds.restore(slot, perturbed(spec.task, spec.variant), spec.initial_state, world)

    def close(self) -> None:
        self.worlds.close()
        if self._pictures is not None:
            self._pictures.close()


def _shape(
    played: Played,
    seen: Sequence[tuple[np.ndarray, Sight]],
    left: Callable[[np.ndarray, Sight], np.ndarray],
) -> None:
    """Add what each action took off the way that is left to the rewards of a chunk.

    `seen` has rows and how things stood in them, before the chunk and after each action; all are measured in
    one go, since what a call costs hardly depends on how many worlds it is about.
    """
    rows = np.concatenate([rows for rows, _ in seen])
    ways = left(rows, Sight(*map(np.concatenate, zip(*(sight for _, sight in seen), strict=True))))
    parts = np.split(ways, np.cumsum([len(rows) for rows, _ in seen])[:-1])
    before, reward = parts[0], played.reward.numpy()
    success, diverged = played.success.numpy(), played.diverged.numpy()
    for c, ((acted, _), way) in enumerate(zip(seen[1:], parts[1:], strict=True)):
        now = np.where(success[acted, c], 0.0, np.where(diverged[acted, c], before[acted], way))
        reward[acted, c] += (before[acted] - now) / FULL_WAY
        before[acted] = now
