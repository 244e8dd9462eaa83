"""What the suites have alike: which episode runs in which slot, the queue, and checks of what comes in.

An environment derives from `EpisodeSlots` and adds its worlds; `rove.envs.base` has the rules.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import astuple
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rove.envs.base import TaskSuite
from rove.errors import RoveError
from rove.types import ActionSpec, Autoreset, Demonstrations, EpisodeSpec, Finals


class EpisodeSlots:
    """B slots and the episodes in them."""

    action_spec: ActionSpec

    def __init__(
        self, suite: TaskSuite, *, num_envs: int, chunk: int, horizon: int, autoreset: Autoreset
    ) -> None:
        self.suite, self.num_envs, self.chunk, self.horizon = suite, num_envs, chunk, horizon
        self.autoreset: Autoreset = autoreset
        self.finals: Finals = "truncated"
        self._specs: list[EpisodeSpec | None] = [None] * num_envs
        self._queue: deque[EpisodeSpec] = deque()
        self._recorded: tuple[int, ...] = ()

    @property
    def specs(self) -> tuple[EpisodeSpec | None, ...]:
        return tuple(self._specs)

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

    # --- for the environment ----------------------------------------------------------------------

    def _running(self) -> np.ndarray:
        """int [n]: slots that run an episode."""
        return np.flatnonzero([spec is not None for spec in self._specs])

    def _check_episodes(self, episodes: Sequence[EpisodeSpec]) -> None:
        """Refuse what does not exist, before anything has changed."""
        for episode in episodes:
            self.suite.instruction(episode)

    def _named(self, episodes: Sequence[EpisodeSpec], where: Sequence[int] | None) -> list[int]:
        """The slots of `reset`'s episodes, all of it checked; clears the queue where `where` is None."""
        slots = list(range(len(episodes))) if where is None else list(where)
        if len(slots) != len(episodes):
            raise RoveError(f"reset got {len(episodes)} episodes for {len(slots)} slots.")
        if len(set(slots)) != len(slots) or not all(0 <= slot < self.num_envs for slot in slots):
            raise RoveError(f"reset needs distinct slots in 0..{self.num_envs - 1}, got {slots}.")
        self._check_episodes(episodes)
        if where is None:
            self._queue.clear()
        return slots

    def _checked(self, actions: Tensor) -> np.ndarray:
        """float64 [B, C, A] of `step_chunk`'s actions. Raises RoveError on what a running slot cannot do."""
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

    def _final_slots(self, terminated: np.ndarray, truncated: np.ndarray) -> np.ndarray:
        """int [n]: slots whose final observation `finals` asks for, of ends [B, C]."""
        wanted = {"none": terminated & False, "truncated": truncated, "ended": truncated | terminated}
        return np.flatnonzero(wanted[self.finals].any(1))

    def _successors(self, ended: Sequence[int]) -> dict[int, EpisodeSpec]:
        """Empties slots; the episode that refills each, as far as the queue reaches."""
        successors = {}
        for slot in ended:
            self._specs[slot] = None
            if self.autoreset == "refill" and self._queue:
                successors[slot] = self._queue.popleft()
        return successors

    def _pointed(
        self, images: Tensor, frame: Sequence[int], instruction: Sequence[str], points: Tensor
    ) -> Demonstrations:
        """What `ground` answers: pictures [F, n, H, W, 3], and N times where things are in one of them."""
        actions = torch.zeros(len(frame), self.chunk, self.action_spec.dim)
        mask = torch.zeros(len(frame), self.chunk, dtype=torch.bool)
        return Demonstrations(images, torch.tensor(frame), tuple(instruction), actions, mask, points)

    def _saved_slots(self) -> dict[str, Any]:
        return {
            "specs": [None if spec is None else astuple(spec) for spec in self._specs],
            "queue": [astuple(spec) for spec in self._queue],
        }

    def _load_slots(self, state: Mapping[str, Any]) -> None:
        self._check_saved(state)
        self._specs = [None if spec is None else EpisodeSpec(*spec) for spec in state["specs"]]
        self._queue = deque(EpisodeSpec(*spec) for spec in state["queue"])

    def _check_saved(self, state: Mapping[str, Any]) -> None:
        if len(state["specs"]) != self.num_envs:
            raise RoveError(
                f"The saved state has {len(state['specs'])} slots; this environment has {self.num_envs}."
            )
