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

    With `share=(i, n, b)` the list is cut into blocks of b episodes, of which this sampler deals out every
    n-th, from the i-th on. n environments of b slots that begin together so hold what one environment of
    n·b slots would, slot by slot, and none waits to learn what another has taken.
    """

    def __init__(
        self,
        suite: TaskSuite,
        seed: int,
        group_size: int = 1,
        stream: int = 0,
        share: tuple[int, int, int] = (0, 1, 1),
    ) -> None:
        self.suite = suite
        self.key = (seed, stream)
        self.group_size = group_size
        self.share = share
        self.cursor = 0
        """How many this sampler has dealt out."""

    def take(self, count: int) -> list[EpisodeSpec]:
        """The next `count` episodes."""
        taken = [self._episode(self._number(own)) for own in range(self.cursor, self.cursor + count)]
        self.cursor += count
        return taken

    def _number(self, own: int) -> int:
        """The place in the whole list of the episode that is number `own` here."""
        index, shares, block = self.share
        lap, place = divmod(own, block)
        return (lap * shares + index) * block + place

    def _episode(self, number: int) -> EpisodeSpec:
        group = number // self.group_size
        lap, place = divmod(group, len(self.suite.tasks))
        order = np.random.default_rng((*self.key, lap)).permutation(len(self.suite.tasks))
        task = self.suite.tasks[order[place]]
        states = self.suite.initial_states(task, "train")
        draw = np.random.default_rng((*self.key, lap, place)).integers(len(states))
        return EpisodeSpec(task, states[int(draw)], seed=number)
