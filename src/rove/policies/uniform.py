"""A random policy, uniform within the bounds: the baseline that a success rate must be compared with."""

from __future__ import annotations

import torch
from torch import Tensor

from rove.errors import RoveError
from rove.policies.base import SamplingNoise
from rove.types import ActionChunk, ActionSpec, Mode, Observation


class Uniform:
    """A random `ActingPolicy` in an environment's own action spec."""

    def __init__(self, action_spec: ActionSpec, chunk: int) -> None:
        self.action_spec, self.chunk = action_spec, chunk
        low, high = torch.tensor(action_spec.low), torch.tensor(action_spec.high)
        self._low, self._range = low.double(), (high - low).double()

    def act(
        self,
        observation: Observation,
        mode: Mode,
        noise: SamplingNoise | None = None,
        samples: int | None = None,
    ) -> ActionChunk:
        """Draw a chunk of actions. Raises RoveError where it is to be greedy: it has no best action."""
        if mode == "greedy" or noise is None:
            raise RoveError("A random policy has no best action: add --decoding sample.")
        shape = (len(observation), self.chunk, self.action_spec.dim)
        unit = noise.uniform(self.chunk * self.action_spec.dim).reshape(shape)
        actions = (self._low + unit * self._range).float()
        nothing: Tensor = torch.zeros(shape)
        return ActionChunk(actions, nothing.long(), nothing, None)
