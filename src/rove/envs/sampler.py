"""Which episodes a run trains on: an endless, resumable list drawn from the train split."""

from __future__ import annotations

import numpy as np

from rove.envs.base import TaskSuite
from rove.types import EpisodeSpec


class EpisodeSampler:
    """Episode number k is a function of (seed, stream, k) alone; the cursor is the whole state.

    Every pass over the tasks is a fresh permutation, so tasks are seen equally often; the initial state
    is uniform over the train split. Groups of `group_size` consecutive episodes share task and initial
    state and differ in the seed of their sampling noise. What a run draws for different ends comes from
    different streams, so that RL does not start on the very episodes of the demonstrations.
    """

    def __init__(self, suite: TaskSuite, seed: int, group_size: int = 1, stream: int = 0) -> None:
        self.suite = suite
        self.key = (seed, stream)
        self.group_size = group_size
        self.cursor = 0

    def take(self, count: int) -> list[EpisodeSpec]:
        """The next `count` episodes."""
        taken = [self._episode(number) for number in range(self.cursor, self.cursor + count)]
        self.cursor += count
        return taken

    def _episode(self, number: int) -> EpisodeSpec:
        group = number // self.group_size
        lap, place = divmod(group, len(self.suite.tasks))
        order = np.random.default_rng((*self.key, lap)).permutation(len(self.suite.tasks))
        task = self.suite.tasks[order[place]]
        states = self.suite.initial_states(task, "train")
        draw = np.random.default_rng((*self.key, lap, place)).integers(len(states))
        return EpisodeSpec(task, states[int(draw)], seed=number)
