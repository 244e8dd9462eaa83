"""Preallocated storage for one rollout: every frame is copied once, from the environment into its row."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rove.types import ActionChunk, Branches, ChunkResult, EpisodeRecord, Observation, Trajectory


class RolloutBuffer:
    """Holds T chunks of B slots; rows of idle slots stay zero and count as not executed."""

    def __init__(self, chunks: int, num_envs: int, chunk: int, action_dim: int) -> None:
        t, b, c, a = chunks, num_envs, chunk, action_dim
        self.size = chunks
        self._images: Tensor | None = None
        self._states: Tensor | None = None
        self._texts: list[tuple[str, ...]] = []
        self._value: Tensor | None = None
        self._branches: Branches | None = None
        self.tokens = torch.zeros(t, b, c, a, dtype=torch.long)
        self.logprob = torch.zeros(t, b, c, a)
        self.reward = torch.zeros(t, b, c)
        self.terminated = torch.zeros(t, b, c, dtype=torch.bool)
        self.truncated = torch.zeros_like(self.terminated)
        self.executed = torch.zeros_like(self.terminated)
        self.final_value = torch.zeros(t, b, 1)
        self._finished: list[EpisodeRecord] = []

    def put_action(self, t: int, observation: Observation, rows: Tensor, chunk: ActionChunk) -> None:
        """Store what was seen by all slots and what was chosen for `rows` (int64 [R])."""
        if self._images is None:
            self._images = torch.empty(self.size, *observation.images.shape, dtype=torch.uint8)
            if observation.state is not None:
                self._states = torch.empty(self.size, *observation.state.shape)
        self._images[t] = observation.images
        if self._states is not None and observation.state is not None:
            self._states[t] = observation.state
        self._texts.append(observation.instruction)
        self.tokens[t, rows] = chunk.tokens.cpu()
        self.logprob[t, rows] = chunk.logprob.cpu()
        if chunk.value is not None:
            if self._value is None:
                self._value = torch.zeros(self.size + 1, self.reward.shape[1], chunk.value.shape[1])
            self._value[t, rows] = chunk.value.cpu()

    def put_branches(
        self, t: int, rows: Tensor, chunk: ActionChunk, reward: Tensor, executed: Tensor
    ) -> None:
        """Store all that was tried at chunk t: tokens and log-probs of `rows` [R, G, C, A], and what came of
        each in all slots [B, G, C]."""
        g = reward.shape[1]
        if self._branches is None:
            t_, b, c, a = self.tokens.shape
            self._branches = Branches(
                tokens=torch.zeros(t_, b, g, c, a, dtype=torch.long),
                logprob=torch.zeros(t_, b, g, c, a),
                reward=torch.zeros(t_, b, g, c),
                executed=torch.zeros(t_, b, g, c, dtype=torch.bool),
            )
        self._branches.tokens[t, rows] = chunk.tokens.cpu()
        self._branches.logprob[t, rows] = chunk.logprob.cpu()
        self._branches.reward[t], self._branches.executed[t] = reward, executed

    def put_result(self, t: int, result: ChunkResult) -> None:
        """Store what came of chunk t."""
        self.reward[t] = result.reward
        self.terminated[t] = result.terminated
        self.truncated[t] = result.truncated
        self.executed[t] = result.executed
        self._finished += result.finished

    def put_values(self, rows: Tensor, finals: Sequence[tuple[int, Tensor]], value: Tensor) -> None:
        """Store bootstrap values [R + F, C or 1]: of the observation after the last chunk for the slots
        `rows` (int64 [R]), then of the final observations, given as (t, slots)."""
        assert self._value is not None
        value = value.cpu()
        self._value[self.size, rows] = value[: len(rows)]
        start = len(rows)
        for t, slots in finals:
            # The first action's value is the state's: nothing has been executed after a final observation.
            self.final_value[t, slots, 0] = value[start : start + len(slots), 0]
            start += len(slots)

    def trajectory(self, version: int) -> Trajectory:
        """The rollout as it stands; rows of chunks that were never reached count nothing."""
        assert self._images is not None
        blank = ("",) * self.reward.shape[1]
        texts = self._texts + [blank] * (self.size - len(self._texts))
        return Trajectory(
            observation=Observation(
                self._images.flatten(0, 1),
                tuple(text for row in texts for text in row),
                None if self._states is None else self._states.flatten(0, 1),
            ),
            tokens=self.tokens,
            logprob=self.logprob,
            value=self._value,
            final_value=None if self._value is None else self.final_value,
            reward=self.reward,
            terminated=self.terminated,
            truncated=self.truncated,
            executed=self.executed,
            finished=tuple(self._finished),
            version=version,
            branches=self._branches,
        )
