"""The episodes that a run trains on: an endless, resumable list drawn from the train split."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rove.envs.base import TaskSuite
from rove.errors import RoveError, nearest
from rove.types import EpisodeSpec


class EpisodeSampler:
    """Episode number k is a function of (seed, stream, k) alone; the cursor is the whole state.

    Every pass over the tasks is a fresh permutation, so tasks are seen equally often, or as much more often
    as `emphasis` says (see `RolloutConfig`); the initial state is uniform over the train split. Groups of
    `group_size` consecutive episodes share task and initial state and differ in the seed of their sampling
    noise. What a run draws for different ends comes from different streams, so that RL does not start on the
    very episodes of the demonstrations.

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
        emphasis: Sequence[str] = (),
    ) -> None:
        self.suite = suite
        self.tasks = repeated(suite.tasks, emphasis)
        """One pass."""
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
        """Return the place in the whole list of the episode that is number `own` here."""
        index, shares, block = self.share
        lap, place = divmod(own, block)
        return (lap * shares + index) * block + place

    def _episode(self, number: int) -> EpisodeSpec:
        group = number // self.group_size
        lap, place = divmod(group, len(self.tasks))
        order = np.random.default_rng((*self.key, lap)).permutation(len(self.tasks))
        task = self.tasks[order[place]]
        states = self.suite.initial_states(task, "train")
        if not states:
            raise RoveError(
                f"Task {task!r} of {self.suite.name!r} has no train states: leave it out of env.tasks."
            )
        draw = np.random.default_rng((*self.key, lap, place)).integers(len(states))
        return EpisodeSpec(task, states[int(draw)], seed=number)


def repeated(tasks: Sequence[str], emphasis: Sequence[str]) -> tuple[str, ...]:
    """Repeat each of `tasks` as often as the longest beginning of its name in `emphasis` says, else once.

    Raises RoveError where an entry is not "BEGINNING:TIMES", or no task begins so.
    """
    times: dict[str, int] = {}
    for entry in emphasis:
        beginning, _, count = entry.rpartition(":")
        if not beginning or not count.isdecimal() or not int(count):
            raise RoveError(f"emphasis has {entry!r}; expected a task's beginning and how often, as push:4.")
        if not any(task.startswith(beginning) for task in tasks):
            raise RoveError(
                f"No task begins with {beginning!r}, as emphasis says. {nearest(beginning, tasks)}"
            )
        times[beginning] = int(count)

    def count_of(task: str) -> int:
        return times[max((b for b in times if task.startswith(b)), key=len, default="")]

    times[""] = 1
    return tuple(task for task in tasks for _ in range(count_of(task)))
