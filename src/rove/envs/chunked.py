"""The machinery that environments have alike, so that a suite adds its worlds and nothing else.

`ChunkedEnv` keeps the contract of `rove.envs.base`: which episode runs in which slot, the queue, autoreset,
the ends of episodes and their records, final observations, recording, saving. An environment derives from it
and supplies `start`, `act` and `observe`, and `save` and `load` for what its worlds hold.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rove.envs.base import TaskSuite, VectorEnv
from rove.errors import RoveError
from rove.types import (
    ActionSpec,
    Autoreset,
    ChunkResult,
    Demonstrations,
    EpisodeRecord,
    EpisodeSpec,
    Finals,
    Observation,
)

Actions = Callable[[int, np.ndarray], np.ndarray]
"""Function of (index in the chunk, rows [n]) that returns actions [n, A] for rows that still run."""
Frames = dict[int, Tensor]
"""Slot -> uint8 [actions, H, W, 3]: see `ChunkResult.frames`."""


class Outcome(NamedTuple):
    """The outcome of one action in n rows, [n] each."""

    reward: np.ndarray
    success: np.ndarray
    terminated: np.ndarray
    """Success that ends the episode, or a failure that cannot be undone."""
    diverged: np.ndarray | None = None
    """Rows whose simulation broke down, which truncates the episode; None: no row."""


class Played(NamedTuple):
    """The outcome of a chunk in n rows, [n, C] each; see `ChunkResult`."""

    reward: Tensor
    """Reward of each action, float64."""
    terminated: Tensor
    truncated: Tensor
    success: Tensor
    executed: Tensor
    diverged: Tensor

    @classmethod
    def nothing(cls, rows: int, chunk: int) -> Played:
        """The outcome where nothing has been executed yet."""
        flags = (torch.zeros(rows, chunk, dtype=torch.bool) for _ in cls._fields[1:])
        return cls(torch.zeros(rows, chunk, dtype=torch.float64), *flags)


def carry_out(
    rows: np.ndarray, chunk: int, act: Callable[[int, np.ndarray], Outcome], elapsed: np.ndarray, horizon: int
) -> Played:
    """Play a chunk action by action; a row whose episode ends is not acted in any more.

    `act` is given the index in the chunk and the rows that still run; `elapsed`, int64 [B], is advanced.
    """
    played = Played.nothing(len(rows), chunk)
    reward, terminated, truncated, success, executed, diverged = (column.numpy() for column in played)
    going = np.arange(len(rows))
    for c in range(chunk):
        if not len(going):
            break
        executed[going, c] = True
        outcome = act(c, now := rows[going])
        elapsed[now] += 1
        reward[going, c], success[going, c], terminated[going, c] = outcome[:3]
        if outcome.diverged is not None:
            diverged[going, c] = outcome.diverged
        over = (elapsed[now] >= horizon) | diverged[going, c]
        truncated[going, c] = over & ~terminated[going, c]
        going = going[~(terminated[going, c] | truncated[going, c])]
    return played


class ChunkedEnv(VectorEnv):
    """B slots, the episodes in them, and everything about a chunk that does not depend on the simulator."""

    action_spec: ActionSpec
    image_shape: tuple[int, ...]
    """Shape of an observation: (cameras, H, W, 3)."""
    state_size: int = 0
    """P, the size of the robot's own state; 0: there is none."""
    outlives_success: ClassVar[bool] = False
    """Episodes can go on after a success, so that their records also say how they ended."""

    def __init__(
        self, suite: TaskSuite, *, num_envs: int, chunk: int, horizon: int, autoreset: Autoreset
    ) -> None:
        self.suite, self.num_envs, self.chunk, self.horizon = suite, num_envs, chunk, horizon
        self.autoreset = autoreset
        self.finals: Finals = "truncated"
        self.diverged = 0
        """Episodes so far that ended because their simulation diverged."""
        self._specs: list[EpisodeSpec | None] = [None] * num_envs
        self._queue: deque[EpisodeSpec] = deque()
        self._recorded: tuple[int, ...] = ()
        self._elapsed = np.zeros(num_envs, np.int64)
        self._total_reward = np.zeros(num_envs)
        self._won = np.zeros(num_envs, bool)
        """Whether each slot's episode has been a success at any time."""
        self._watched, self._given = np.zeros(num_envs, bool), np.zeros((num_envs, chunk, 1))
        """Slots that carry out the actions given [B, C, A] in the coming expert chunk, not the expert's."""

    # --- supplied by the suite --------------------------------------------------------------------

    @abstractmethod
    def start(self, rows: Sequence[int], episodes: Sequence[EpisodeSpec]) -> None:
        """Put worlds into the initial states of these episodes, whatever the rows held before."""

    def act(self, rows: np.ndarray, actions: np.ndarray) -> Outcome:
        """Execute one action, float64 [n, A], in each of `rows`; not needed where `play` is replaced."""
        raise NotImplementedError(f"{type(self).__name__} defines neither act nor play.")

    @abstractmethod
    def observe(self, rows: np.ndarray) -> tuple[Tensor, Tensor | None]:
        """Draw running rows: images uint8 [n, cameras, H, W, 3], and state float32 [n, P] or None."""

    def release(self, rows: Sequence[int]) -> None:
        """Free the worlds of rows that idle from now on; nothing to do for most simulators."""

    @abstractmethod
    def save(self) -> Mapping[Any, Any]:
        """Return what the episodes do not say about the running worlds; tensors and plain values."""

    @abstractmethod
    def load(self, state: Mapping[Any, Any]) -> None:
        """Put the worlds of the running rows, whose `specs` are set, into the state that `save` gave."""

    def play(self, rows: np.ndarray, actions: Actions) -> tuple[Played, Frames]:
        """Execute a chunk in running rows, and film those that are recorded.

        This goes action by action through `act`. A simulator that is driven otherwise replaces it, and counts
        `_elapsed` on.
        """
        films: dict[int, list[Tensor]] = {slot: [] for slot in self._recorded}

        def act(c: int, rows: np.ndarray) -> Outcome:
            outcome = self.act(rows, actions(c, rows))
            filmed = rows[np.isin(rows, self._recorded)]
            if len(filmed):
                for slot, images in zip(filmed.tolist(), self.observe(filmed)[0], strict=True):
                    films[slot].append(images[0])
            return outcome

        played = carry_out(rows, self.chunk, act, self._elapsed, self.horizon)
        return played, {slot: torch.stack(film) for slot, film in films.items() if film}

    def close(self) -> None:
        """Free threads and device memory; calling it twice is harmless."""

    # --- the slots --------------------------------------------------------------------------------

    @property
    def specs(self) -> tuple[EpisodeSpec | None, ...]:
        return tuple(self._specs)

    @property
    def elapsed(self) -> Tensor:
        return torch.from_numpy(self._elapsed.copy())

    @property
    def queued(self) -> int:
        return len(self._queue)

    def enqueue(self, episodes: Sequence[EpisodeSpec]) -> None:
        self._check_episodes(episodes)
        self._queue.extend(episodes)

    def record(self, slots: Sequence[int]) -> None:
        if not all(0 <= slot < self.num_envs for slot in slots):
            raise RoveError(f"record needs slots in 0..{self.num_envs - 1}, got {list(slots)}.")
        self._recorded = tuple(sorted(set(slots)))

    def reset(self, episodes: Sequence[EpisodeSpec], where: Sequence[int] | None = None) -> Observation:
        self._reset(episodes, where)
        return self._observe_all()

    def _reset(self, episodes: Sequence[EpisodeSpec], where: Sequence[int] | None = None) -> None:
        """Reset without looking; everything is checked before anything has changed."""
        slots = list(range(len(episodes))) if where is None else list(where)
        if len(slots) != len(episodes):
            raise RoveError(f"reset got {len(episodes)} episodes for {len(slots)} slots.")
        if len(set(slots)) != len(slots) or not all(0 <= slot < self.num_envs for slot in slots):
            raise RoveError(f"reset needs distinct slots in 0..{self.num_envs - 1}, got {slots}.")
        self._check_episodes(episodes)
        if where is None:
            self._queue.clear()
            self._vacate([slot for slot in self._running().tolist() if slot not in slots])
        self._begin(slots, episodes)

    def _running(self) -> np.ndarray:
        """Return the slots that run an episode, int [n]."""
        return np.flatnonzero([spec is not None for spec in self._specs])

    def _check_episodes(self, episodes: Sequence[EpisodeSpec]) -> None:
        """Refuse an episode that does not exist."""
        for episode in episodes:
            self.suite.instruction(episode)

    def _begin(self, slots: Sequence[int], episodes: Sequence[EpisodeSpec]) -> None:
        for slot, episode in zip(slots, episodes, strict=True):
            self._specs[slot] = episode
            self._elapsed[slot], self._total_reward[slot], self._won[slot] = 0, 0.0, False
        if slots:
            self.start(slots, episodes)

    def _vacate(self, slots: Sequence[int]) -> None:
        """Leave these slots idle."""
        for slot in slots:
            self._specs[slot] = None
        if slots:
            self.release(slots)

    # --- stepping ---------------------------------------------------------------------------------

    def step_chunk(self, actions: Tensor) -> ChunkResult:
        values = self._checked(actions)
        return self._execute(lambda c, rows: values[rows, c])

    def _checked(self, actions: Tensor) -> np.ndarray:
        """Convert `step_chunk`'s actions to float64 [B, C, A]. Raises RoveError on what a running slot cannot
        do."""
        expected = (self.num_envs, self.chunk, self.action_spec.dim)
        if tuple(actions.shape) != expected:
            raise RoveError(
                f"step_chunk needs actions of shape {expected} [B, C, A], got {tuple(actions.shape)}."
            )
        values = actions.detach().cpu().numpy().astype(np.float64)
        running, spec = self._running(), self.action_spec
        finite = np.isfinite(values[running]).all((1, 2))
        if not finite.all():
            raise RoveError(f"step_chunk got a non-finite action in slot {running[~finite][0]}.")
        low, high = np.array(spec.low), np.array(spec.high)
        # float32 actions may round past a bound that is not a binary fraction
        outside = ((values[running] < low - 1e-6) | (values[running] > high + 1e-6)).any((0, 1))
        if outside.any():
            dim = int(outside.argmax())
            raise RoveError(
                f"step_chunk got an out-of-range {spec.names[dim]!r} action; expected {low[dim]:g} to "
                f"{high[dim]:g} {spec.units[dim]}."
            )
        return values

    def _execute(self, actions: Actions) -> ChunkResult:
        """Execute a chunk of actions that may depend on how things stand when each is due."""
        rows = self._running()
        return self._result(rows, *self.play(rows, actions))

    def watch(self, slots: np.ndarray, actions: Tensor) -> None:
        """See `rove.envs.base.Corrector`."""
        self._watched, self._given = slots.copy(), self._checked(actions)

    def _demonstrate(
        self,
        expert: Callable[[np.ndarray, bool], tuple[np.ndarray, np.ndarray]],
        gripper: np.ndarray | float | None = None,
    ) -> tuple[Tensor, ChunkResult]:
        """Let an expert act for one chunk, closed loop; the answer of `Demonstrator.step_expert_chunk`.

        `expert(rows, last)` returns the actions that it wants [n, A] and those to execute instead, which
        differ by the noise on the chunk's last one. A row is padded with "stay": no motion, and the last
        dimension as it was; in idle slots that is `gripper`, [B] or one for all. None: there is no gripper.
        """
        spec = self.action_spec
        wanted = np.zeros((self.num_envs, self.chunk, spec.dim))
        if gripper is not None:
            wanted[..., -1] = np.broadcast_to(gripper, self.num_envs)[:, None]

        def choose(c: int, rows: np.ndarray) -> np.ndarray:
            action, executed = expert(rows, c == self.chunk - 1)
            executed = np.where(self._watched[rows, None], self._given[rows, c], executed)
            wanted[rows, c] = action
            # An episode that ends here is padded with "stay": what the policy should do when it is done.
            if gripper is not None:
                wanted[rows, c + 1 :, -1] = action[:, -1:]
            return np.clip(executed, spec.low, spec.high)

        result = self._execute(choose)
        self._watched[:] = False
        return torch.from_numpy(wanted.astype(np.float32)), result

    def _result(self, rows: np.ndarray, played: Played, frames: Frames) -> ChunkResult:
        """Count a chunk that was played in `rows`, write down the ends, refill, and look at all slots."""
        full = Played(*(self._spread(rows, column) for column in played))
        for reward in full.reward.numpy().T:
            self._total_reward += reward
        self._won |= full.success.numpy().any(1)
        self.diverged += int(full.diverged.sum())
        ends = {"none": full.executed & False, "truncated": full.truncated}
        ends["ended"] = full.truncated | full.terminated
        final_slots = ends[self.finals].any(1).nonzero().flatten()
        final = self._observation(final_slots.numpy()) if len(final_slots) else None
        finished = self._finish(ends["ended"].any(1).nonzero().flatten().tolist(), full)
        return ChunkResult(
            observation=self._observe_all(),
            reward=full.reward.float(),
            terminated=full.terminated,
            truncated=full.truncated,
            success=full.success,
            executed=full.executed,
            final_slots=final_slots,
            final_observation=final,
            finished=finished,
            frames=frames,
        )

    def _spread(self, rows: np.ndarray, column: Tensor) -> Tensor:
        """Spread [n, ...] over all slots, [B, ...]: zero or False in the other rows."""
        full = torch.zeros(self.num_envs, *column.shape[1:], dtype=column.dtype)
        full[rows] = column
        return full

    def _finish(self, ended: Sequence[int], played: Played) -> tuple[EpisodeRecord, ...]:
        """Record the episodes that ended, and start the next ones in their slots."""
        records = []
        for slot in ended:
            spec = self._specs[slot]
            assert spec is not None
            last = int(played.executed[slot].sum()) - 1
            records.append(
                EpisodeRecord(
                    spec=spec,
                    slot=slot,
                    success=bool(self._won[slot]),
                    length=int(self._elapsed[slot]),
                    total_reward=float(self._total_reward[slot]),
                    truncated=bool(played.truncated[slot].any()),
                    success_at_end=bool(played.success[slot, last]) if self.outlives_success else None,
                )
            )
        count = min(len(ended), len(self._queue)) if self.autoreset == "refill" else 0
        self._vacate(ended[count:])  # the others are started anew as they are
        self._begin(ended[:count], [self._queue.popleft() for _ in range(count)])
        return tuple(records)

    # --- pictures ---------------------------------------------------------------------------------

    def _observation(self, rows: np.ndarray) -> Observation:
        """Observe the rows named, which must be running."""
        specs = [self._specs[row] for row in rows.tolist()]
        text = tuple(self.suite.instruction(spec) for spec in specs if spec is not None)
        images, state = self.observe(rows)
        return Observation(images, text, state)

    def _observe_all(self) -> Observation:
        """Observe all B slots; one that idles is black and has no instruction."""
        rows = self._running()
        if len(rows) == self.num_envs:
            return self._observation(rows)
        text = tuple("" if spec is None else self.suite.instruction(spec) for spec in self._specs)
        images = torch.zeros(self.num_envs, *self.image_shape, dtype=torch.uint8)
        state = torch.zeros(self.num_envs, self.state_size) if self.state_size else None
        if len(rows):
            images[rows], seen = self.observe(rows)
            if state is not None and seen is not None:
                state[rows] = seen
        return Observation(images, text, state)

    def _grounding(
        self, images: Tensor, frame: Sequence[int], instruction: Sequence[str], points: Tensor
    ) -> Demonstrations:
        """The answer of `Grounder.ground`: F images [F, n, H, W, 3], and N times where things are in one."""
        actions = torch.zeros(len(frame), self.chunk, self.action_spec.dim)
        mask = torch.zeros(len(frame), self.chunk, dtype=torch.bool)
        return Demonstrations(images, torch.tensor(frame), tuple(instruction), actions, mask, points)

    # --- saving -----------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        return {
            "specs": [None if spec is None else astuple(spec) for spec in self._specs],
            "queue": [astuple(spec) for spec in self._queue],
            "elapsed": self.elapsed,
            "total_reward": torch.from_numpy(self._total_reward.copy()),
            "won": torch.from_numpy(self._won.copy()),
            "diverged": self.diverged,
            "worlds": self.save(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> Observation:
        if len(state["specs"]) != self.num_envs:
            raise RoveError(
                f"The saved state has {len(state['specs'])} slots; this environment has {self.num_envs}."
            )
        self._vacate(self._running().tolist())
        self._specs = [None if spec is None else EpisodeSpec(*spec) for spec in state["specs"]]
        self._queue = deque(EpisodeSpec(*spec) for spec in state["queue"])
        self._elapsed[...] = state["elapsed"].numpy()
        self._total_reward[...] = state["total_reward"].numpy()
        self._won[...] = state["won"].numpy()
        self.diverged = state["diverged"]
        self.load(state["worlds"])
        return self._observe_all()
