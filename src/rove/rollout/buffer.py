"""Storage for one rollout: every frame is copied once, from the environment into its row.

The part that environments write and policies read may lie in memory that processes share; see `Layout`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rove.errors import RoveError
from rove.runtime.channel import Segment, aligned
from rove.types import ActionChunk, Branches, EpisodeRecord, Observation, Trajectory


@dataclass(frozen=True, slots=True)
class Layout:
    """Sizes of a rollout."""

    chunks: int
    """T."""
    num_envs: int
    """B."""
    chunk: int
    """C."""
    action_dim: int
    """A."""
    image: tuple[int, ...]
    """(n, H, W, 3)."""
    state: int | None
    """P; None where the suite has no proprioception."""
    branches: int = 1
    """G, chunks tried from each state; the first of them is carried on."""

    def fields(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and type of what environments and policy exchange. Row t of `images` and `state` is what is
        seen before chunk t; row T, after the last one."""
        t, b, c, a, g = self.chunks, self.num_envs, self.chunk, self.action_dim, self.branches
        return {
            "images": ((t + 1, b, *self.image), torch.uint8),
            "state": ((t + 1, b, self.state or 0), torch.float32),
            "actions": ((b, g, c, a), torch.float32),
            "reward": ((t, b, c), torch.float32),
            "terminated": ((t, b, c), torch.bool),
            "truncated": ((t, b, c), torch.bool),
            "executed": ((t, b, c), torch.bool),
            "tried_reward": ((t, b, g - 1, c), torch.float32),
            "tried_executed": ((t, b, g - 1, c), torch.bool),
        }

    def allocate(self) -> Exchange:
        """Zeroed memory of this process's own."""
        return Exchange(**{n: torch.zeros(shape, dtype=kind) for n, (shape, kind) in self.fields().items()})

    @property
    def size(self) -> int:
        """Bytes that `map` needs."""
        return sum(aligned(_bytes(*field)) for field in self.fields().values())

    def map(self, segment: Segment) -> Exchange:
        """Views of a segment of `size` bytes, in any process that has it."""
        views, offset = {}, 0
        for name, (shape, kind) in self.fields().items():
            views[name] = segment.tensor(offset, shape, kind)
            offset += aligned(_bytes(shape, kind))
        return Exchange(**views)


def _bytes(shape: tuple[int, ...], kind: torch.dtype) -> int:
    return torch.Size(shape).numel() * kind.itemsize


@dataclass(frozen=True, slots=True, eq=False)
class Exchange:
    """Memory that environments write and the policy reads, and the other way about; see `Layout.fields`."""

    images: Tensor
    state: Tensor
    actions: Tensor
    reward: Tensor
    terminated: Tensor
    truncated: Tensor
    executed: Tensor
    tried_reward: Tensor
    tried_executed: Tensor

    def slots(self, first: int, last: int) -> Exchange:
        """Views of the slots from `first` up to `last`."""
        return Exchange(
            images=self.images[:, first:last],
            state=self.state[:, first:last],
            actions=self.actions[first:last],
            reward=self.reward[:, first:last],
            terminated=self.terminated[:, first:last],
            truncated=self.truncated[:, first:last],
            executed=self.executed[:, first:last],
            tried_reward=self.tried_reward[:, first:last],
            tried_executed=self.tried_executed[:, first:last],
        )


class Memory:
    """The part of a rollout that environments write. Sent to another process it is the same memory there."""

    def __init__(self, layout: Layout, segment: Segment | None) -> None:
        """Without a segment it is this process's own, and cannot be sent."""
        self.layout, self._segment = layout, segment
        self.exchange = layout.allocate() if segment is None else layout.map(segment)

    def __reduce__(self) -> tuple[type[Memory], tuple[Layout, Segment]]:
        assert self._segment is not None, "memory of this process's own cannot be sent"
        return Memory, (self.layout, self._segment)


class RolloutBuffer:
    """Holds T chunks of B slots; rows of idle slots stay zero and count as not executed."""

    def __init__(
        self, layout: Layout, exchange: Exchange, sample_shape: tuple[int, ...], sample_dtype: torch.dtype
    ) -> None:
        """Samples are kept as the policy declares them; see `Policy.sample_shape`."""
        t, b, c, a, g = layout.chunks, layout.num_envs, layout.chunk, layout.action_dim, layout.branches
        self.layout, self.exchange = layout, exchange
        self._texts = [[""] * b for _ in range(t + 1)]
        self._value: Tensor | None = None
        self.sample = torch.zeros(t, b, g, *sample_shape, dtype=sample_dtype)
        self.logprob = torch.zeros(t, b, g, c, a)
        self.final_value = torch.zeros(t, b, 1)

    def put_texts(self, t: int, first: int, texts: Sequence[str]) -> None:
        """Store the instructions of row t, from slot `first` on."""
        self._texts[t][first : first + len(texts)] = texts

    def observation(self, t: int, first: int, last: int) -> Observation:
        """Views of the observations of the slots from `first` up to `last` before chunk t."""
        x = self.exchange
        state = None if self.layout.state is None else x.state[t, first:last]
        return Observation(x.images[t, first:last], tuple(self._texts[t][first:last]), state)

    def put_action(self, t: int, slots: Tensor, chunk: ActionChunk) -> None:
        """Store what was chosen for `slots` (int64 [R]), one chunk or G of each, and hand it to the
        environments."""
        shape = (len(slots), *self.logprob.shape[2:])
        self.sample[t, slots] = self._sample(chunk.sample, len(slots))
        self.logprob[t, slots] = chunk.logprob.view(shape)
        self.exchange.actions[slots] = chunk.actions.view(*shape[:-1], -1)
        if chunk.value is not None:
            if self._value is None:
                shape = (self.layout.chunks + 1, self.layout.num_envs, chunk.value.shape[1])
                self._value = torch.zeros(shape)
            self._value[t, slots] = chunk.value

    def _sample(self, given: Tensor, rows: int) -> Tensor:
        """Return a chunk's sample as [R, G, *sample_shape]. RoveError where it is not what was declared."""
        branches, *shape = self.sample.shape[2:]
        dtype = self.sample.dtype
        if given.dtype != dtype or given.shape not in ((rows, *shape), (rows, branches, *shape)):
            raise RoveError(
                f"The policy declares samples of shape {shape} and {dtype} (sample_shape, "
                f"sample_dtype), but act returned {list(given.shape[1:])} and {given.dtype} for a row: let "
                "the two agree."
            )
        return given.view(rows, branches, *shape)

    def put_value(self, t: int | None, slots: Tensor, value: Tensor) -> None:
        """Store bootstrap values [R, C or 1] of `slots` (int64 [R]): of the final observations of episodes
        that ended in chunk t, or, where t is None, of the observations after the last chunk."""
        assert self._value is not None
        if t is None:
            self._value[self.layout.chunks, slots] = value
        else:
            # The first action's value is the state's: nothing has been executed after a final observation.
            self.final_value[t, slots, 0] = value[:, 0]

    def clear(self, first: int, last: int) -> None:
        """Forget what the slots from `first` up to `last` did: their part of the rollout begins anew."""
        for tensor in (self.sample, self.logprob, self.final_value, self._value):
            if tensor is not None:
                tensor[:, first:last] = 0
        x = self.exchange.slots(first, last)
        for tensor in (x.reward, x.terminated, x.truncated, x.executed, x.tried_reward, x.tried_executed):
            tensor.zero_()

    def trajectory(self, version: int, finished: Sequence[EpisodeRecord]) -> Trajectory:
        """The rollout as it stands; rows of chunks that were never reached count nothing."""
        t, x = self.layout.chunks, self.exchange
        return Trajectory(
            observation=Observation(
                x.images[:t].flatten(0, 1),
                tuple(text for row in self._texts[:t] for text in row),
                None if self.layout.state is None else x.state[:t].flatten(0, 1),
            ),
            sample=self.sample[:, :, 0],
            logprob=self.logprob[:, :, 0],
            value=self._value,
            final_value=None if self._value is None else self.final_value,
            reward=x.reward,
            terminated=x.terminated,
            truncated=x.truncated,
            executed=x.executed,
            finished=tuple(finished),
            version=version,
            branches=self._branches() if self.layout.branches > 1 else None,
        )

    def _branches(self) -> Branches:
        x = self.exchange
        reward, executed = (
            torch.cat((first[:, :, None], others), dim=2)
            for first, others in ((x.reward, x.tried_reward), (x.executed, x.tried_executed))
        )
        return Branches(self.sample, self.logprob, reward, executed)
