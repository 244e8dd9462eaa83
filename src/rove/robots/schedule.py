"""Chunks that overlap, and which action of them a period gets.

A chunk that was asked for while the one before it was being executed begins in the middle of it. Where
actions are places to go to, the arm would jump wherever the two disagree, so all chunks that cover a period
are averaged, by the weights of ACT's temporal ensembling (Zhao et al. 2023, section IV-B): exp(-m i) for the
i-th oldest. Where actions are relative to where the arm is nothing jumps, since the arm goes on from there,
and the newest chunk, which has seen the most, is the one that counts: the average of two ways around
something is neither, and of a hand that is still too high and one that is low enough it is late. Real-time
chunking (Black et al. 2025), the other way, has the policy's denoising begin with what is about to be
executed: it needs a flow policy and a message of its own, and a server of openpi's protocol takes neither.
"""

from __future__ import annotations

import numpy as np

DECAY = 0.01
"""m: how much less each newer chunk counts. ACT's; a larger one keeps the arm on what it has begun."""


class Schedule:
    """The chunks that are being executed. Periods are numbered as the control loop counts them."""

    def __init__(self, *, average: bool) -> None:
        """`average` says whether chunks that overlap are averaged; else the newest counts."""
        self._chunks: list[tuple[int, np.ndarray]] = []
        self._average = average

    def add(self, first: int, actions: np.ndarray, now: int) -> int:
        """Add a chunk [C, A], whose first action is for the period `first`, in the period `now`.

        Return how many of its actions are for periods that have gone: they are never executed.
        """
        self._chunks.append((first, actions))
        return max(0, min(now - first, len(actions)))

    def at(self, now: int) -> np.ndarray | None:
        """Return the action [A] for a period; None where no chunk has one."""
        self._chunks = [(first, actions) for first, actions in self._chunks if now < first + len(actions)]
        own = np.array([actions[now - first] for first, actions in self._chunks])
        if not len(own):
            return None
        if not self._average:
            return own[-1]
        weights = np.exp(-DECAY * np.arange(len(own)))
        return (weights[:, None] * own).sum(0) / weights.sum()

    def left(self, now: int) -> int:
        """Return the number of periods, from `now` on, for which there is an action."""
        return max([0, *(first + len(actions) - now for first, actions in self._chunks)])
