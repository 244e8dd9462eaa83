"""A watch on the success of training episodes, which nothing else tells when it falls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from rove.evaluation.statistics import Rate, wilson
from rove.types import EpisodeRecord


@dataclass
class Trend:
    """Success of training episodes in windows of `WINDOW`, watched for a fall that is more than chance."""

    WINDOW: ClassVar[int] = 400
    best: tuple[int, int] = (0, 0)
    """Successes and episodes of the best window."""
    successes: int = 0
    """Of the window under way."""
    episodes: int = 0
    told: bool = False

    def count(self, finished: Sequence[EpisodeRecord]) -> str | None:
        """Count a rollout's episodes; a warning where success has fallen, once in a run.

        That is where 99.9 % intervals of the best and of the newest window are apart: the best of a hundred
        is high by chance, with which those of 95 % would often be.
        """
        self.successes += sum(record.success for record in finished)
        self.episodes += len(finished)
        if self.episodes < self.WINDOW:
            return None
        newest, before = (self.successes, self.episodes), self.best
        self.successes = self.episodes = 0
        if not before[1] or newest[0] / newest[1] > before[0] / before[1]:
            self.best = newest
        elif not self.told and wilson(*newest, confidence=0.999)[1] < wilson(*before, confidence=0.999)[0]:
            self.told = True
            return (
                f"Success of training episodes has fallen from {Rate(*before)} to {Rate(*newest)}, by more "
                "than chance. Most often the learning rate is too high for a policy that has learned: begin "
                "again from best/ or the warm-up with a lower --training.optim.lr."
            )
        return None
