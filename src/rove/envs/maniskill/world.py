"""Worlds: environments of ManiSkill's stepped a chunk at a time, rendered only when asked.

A `World` holds n rows, one episode each. On a CPU n is 1, and every episode begins in a fresh scene; on a GPU
one simulation holds all rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from rove.envs.chunked import Outcome, Played, carry_out
from rove.envs.maniskill import simulator
from rove.types import ActionSpec, EpisodeSpec


class ManiSkillTask(Protocol):
    """The part that differs between one task of ManiSkill's and another."""

    pointers: int
    """K, the number of points that `points` returns."""

    def make(self, num_envs: int) -> Any:
        """Make an environment of ManiSkill's."""
        ...

    def start(self, env: Any, rows: Sequence[int], episodes: Sequence[EpisodeSpec]) -> None: ...

    def outcome(self, env: Any, action: Tensor, info: dict[str, Any]) -> Outcome:
        """Judge the outcome of an action, of which `info` is ManiSkill's account."""
        ...

    def frames(self, env: Any, rows: Sequence[int]) -> Tensor:
        """Render rows now: uint8 [rows, cameras, H, W, 3]."""
        ...

    def points(self, env: Any, rows: Sequence[int]) -> Tensor:
        """Locate what the instruction is about, pixels float32 [rows, K, 2]; see
        `rove.envs.base.Grounder`."""
        ...

    def expert(self, env: Any, row: int, spec: EpisodeSpec, elapsed: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the scripted expert's next action [A], and how far noise may push it [A], in the same
        units."""
        ...


Choose = Callable[[int, int], np.ndarray]
"""Function of (row, index in the chunk) that returns an action [A]."""


class World:
    """A simulation with n rows of one task; `task` says what it is."""

    def __init__(
        self, task: ManiSkillTask, num_envs: int, horizon: int, action_spec: Callable[[Any], ActionSpec]
    ) -> None:
        self.task, self.num_envs, self.horizon = task, num_envs, horizon
        self.env = task.make(num_envs)
        self.action_spec = action_spec(self.env)
        self.specs: list[EpisodeSpec | None] = [None] * num_envs
        self.elapsed = np.zeros(num_envs, np.int64)

    def start(self, rows: Sequence[int], episodes: Sequence[EpisodeSpec], history: Sequence[Tensor]) -> None:
        """Begin `episodes` in `rows` and carry out each one's `history`, [k, A], unseen.

        Histories end together, so that in a shared simulation no row moves on while another catches up.
        """
        longest = max(map(len, history), default=0)
        begun: list[int] = []
        frozen = self._freeze([r for r, s in enumerate(self.specs) if s is not None and r not in rows])
        for t in range(longest + 1):
            now = [i for i, past in enumerate(history) if longest - len(past) == t]
            if now:
                self.task.start(self.env, [rows[i] for i in now], [episodes[i] for i in now])
                begun += now
                for i in now:
                    self.specs[rows[i]], self.elapsed[rows[i]] = episodes[i], 0
            if t < longest:
                actions = self._idle()
                for i in begun:
                    actions[rows[i]] = history[i][t - longest + len(history[i])]
                self._step(actions)
                self.elapsed[[rows[i] for i in begun]] += 1
        if longest:
            self._thaw(frozen)

    def stop(self, rows: Sequence[int]) -> None:
        """Let these rows idle from now on."""
        for row in rows:
            self.specs[row] = None

    def play(
        self, rows: Sequence[int], chunk: int, choose: Choose, film: Callable[[int], None] = lambda row: None
    ) -> Played:
        """Play one chunk in these rows; one whose episode ends stays as it ended; `film` is told of
        actions."""
        running, frozen = list(rows), []

        def act(c: int, now: np.ndarray) -> Outcome:
            nonlocal running
            frozen.extend(self._freeze([row for row in running if row not in now]))
            running = now.tolist()
            actions = self._idle()
            for row in running:
                actions[row] = torch.from_numpy(np.asarray(choose(row, c), np.float32))
            outcome = self._step(actions)
            for row in running:
                film(row)
            return Outcome(*(column[now] for column in outcome[:3]))

        played = carry_out(np.array(rows, np.int64), chunk, act, self.elapsed, self.horizon)
        self._thaw(frozen)
        return played

    def frames(self, rows: Sequence[int]) -> Tensor:
        """Render rows: uint8 [rows, cameras, H, W, 3]."""
        return self.task.frames(self.env, rows)

    def points(self, rows: Sequence[int]) -> Tensor:
        """Locate what the instruction is about, float32 [rows, K, 2]: see `ManiSkillTask.points`."""
        return self.task.points(self.env, rows)

    def proprioception(self, rows: Sequence[int]) -> Tensor:
        """Return joint positions, float32 [rows, P]."""
        return self.env.agent.robot.get_qpos()[list(rows)].float().cpu()

    def expert(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """Ask the scripted expert for an action: see `ManiSkillTask.expert`."""
        spec = self.specs[row]
        assert spec is not None
        return self.task.expert(self.env, row, spec, int(self.elapsed[row]))

    def close(self) -> None:
        self.env.close()

    # --- stepping -----------------------------------------------------------------------------------

    def _idle(self) -> Tensor:
        return torch.zeros(self.num_envs, self.action_spec.dim)

    def _step(self, actions: Tensor) -> Outcome:
        actions = actions.to(self.env.device)
        info = self.env.step(actions)[-1]
        return self.task.outcome(self.env, actions, info)

    def _freeze(self, rows: Sequence[int]) -> list[tuple[list[int], Any]]:
        """Return the state of rows that a shared simulation goes on with; nothing where a world has one
        row."""
        return [(list(rows), self.env.get_state_dict())] if rows and self.num_envs > 1 else []

    def _thaw(self, frozen: Sequence[tuple[list[int], Any]]) -> None:
        for rows, state in frozen:
            index = torch.tensor(rows, device=self.env.device)
            self.env.set_state_dict(_rows(state, index), index)
            self.env.scene._gpu_apply_all()
            self.env.scene._gpu_fetch_all()


def _rows(state: Any, index: Tensor) -> Any:
    """Return the rows `index` of a nested state."""
    if isinstance(state, dict):
        return {name: _rows(part, index) for name, part in state.items()}
    return state[index]


def begin(env: Any, rows: Sequence[int], seeds: Sequence[int] | None, options: dict[str, Any]) -> None:
    """Reset rows: a world of one row in a fresh scene, rows of a shared simulation where they are.

    With `seeds` what a row starts with is a function of its own; None: `options` say everything.
    """
    if env.num_envs == 1:
        simulator.restart(env, seed=list(seeds or [0]), options=options)
        return
    # ManiSkill draws for all rows of a reset from the first one's seed: one reset a row.
    parts = [(list(rows), 0)] if seeds is None else [([row], s) for row, s in zip(rows, seeds, strict=True)]
    for part, seed in parts:
        index = torch.tensor(part, device=env.device)
        env.reset(seed=[seed] * env.num_envs, options=options | {"env_idx": index})
