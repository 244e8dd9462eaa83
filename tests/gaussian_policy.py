"""The smallest policy that draws no tokens: one step of a Gaussian from a random point, as flows take it.

It predicts H = 6 actions, of which C are executed. Its sample, float32 [2·H·A + 1], is the point it came
from, the point it drew, and which of two standard deviations it drew by.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rove.config.schema import PolicyConfig, Run, SFTConfig
from rove.policies.base import Imitation, Policy, SamplingNoise
from rove.types import ActionChunk, ActionSpec, Mode, Observation, PolicyOutput

H = 6
STD = torch.tensor([0.5, 0.2])


class GaussianPolicy(Policy):
    """Shrunk pictures and state in; the mean of a Gaussian over H actions in [-1, 1] out."""

    sample_dtype = torch.float32
    horizon = H  # pyright: ignore[reportAssignmentType]

    def __init__(self, chunk: int, action_spec: ActionSpec, critic: bool) -> None:
        super().__init__()
        self.chunk, self.action_spec = chunk, action_spec
        self.sample_shape = (2 * H * action_spec.dim + 1,)
        self.head = nn.Linear(3 * 8 * 8, H * action_spec.dim)
        self.pull = nn.Parameter(torch.tensor(0.3))
        self.value_head = nn.Linear(3 * 8 * 8, 1) if critic else None
        self.register_buffer("low", torch.tensor(action_spec.low), persistent=False)
        self.register_buffer("high", torch.tensor(action_spec.high), persistent=False)

    @staticmethod
    def horizon_of(run: Run) -> int:
        return H

    @classmethod
    def build(
        cls,
        config: PolicyConfig,
        *,
        chunk: int,
        action_spec: ActionSpec,
        image_size: int,
        vocabulary: Sequence[str],
        statistics: Mapping[str, Any] | None,
        seed: int,
        device: torch.device,
    ) -> GaussianPolicy:
        if config.checkpoint is not None:
            return cls.from_pretrained(config.checkpoint, device=device)
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(seed)
            return cls(chunk, action_spec, config.value_head is not None).to(device)

    def _seen(self, observation: Observation) -> Tensor:
        pixels = observation.images[:, 0].movedim(-1, 1).float() / 127.5 - 1
        return nn.functional.adaptive_avg_pool2d(pixels, 8).flatten(1)

    def _mean(self, observation: Observation, start: Tensor) -> Tensor:
        """[B, H, A] → [B, G, H, A], from points [B, G, H, A]."""
        shape = (-1, 1, H, self.action_spec.dim)
        return self.head(self._seen(observation)).view(shape) + self.pull * start

    def _logprob(self, mean: Tensor, drawn: Tensor, std: Tensor) -> Tensor:
        away = (drawn - mean) / std
        return (-0.5 * away**2 - std.log() - 0.5 * math.log(2 * math.pi))[..., : self.chunk, :]

    def act(
        self,
        observation: Observation,
        mode: Mode,
        noise: SamplingNoise | None = None,
        samples: int | None = None,
    ) -> ActionChunk:
        rows, count, dim = len(observation), samples or 1, self.action_spec.dim
        assert noise is not None
        normal = noise.normal(count * 2 * H * dim).float().view(rows, count, 2, H, dim)
        which = (noise.uniform(count) * len(STD)).floor().float()
        if mode == "greedy":  # from a random point, straight on
            normal[:, :, 1] = 0
        start, std = normal[:, :, 0], STD[which.long()][..., None, None]
        mean = self._mean(observation, start)
        drawn = mean + std * normal[:, :, 1]
        sample = torch.cat([start.flatten(2), drawn.flatten(2), which[..., None]], -1)
        unit = drawn[:, :, : self.chunk].clamp(-1, 1)
        actions = (self.low + (unit + 1) / 2 * (self.high - self.low)).clamp(self.low, self.high)
        logprob = self._logprob(mean, drawn, std)
        value = None if self.value_head is None else self.value(observation)
        if samples is None:
            actions, sample, logprob = actions[:, 0], sample[:, 0], logprob[:, 0]
        return ActionChunk(actions, sample, logprob, value)

    def evaluate(self, observation: Observation, sample: Tensor, /) -> PolicyOutput:
        several = sample if sample.ndim == 3 else sample[:, None]
        points, which = several[..., :-1], several[..., -1].long()
        start, drawn = points.unflatten(-1, (2, H, self.action_spec.dim)).unbind(2)
        std = STD[which][..., None, None]
        logprob = self._logprob(self._mean(observation, start), drawn, std)
        entropy = (std.log() + 0.5 * math.log(2 * math.pi * math.e)).expand_as(logprob)
        value = None if self.value_head is None else self.value(observation)
        if sample.ndim == 2:
            logprob, entropy = logprob[:, 0], entropy[:, 0]
        return PolicyOutput(logprob, entropy, value)

    def value(self, observation: Observation) -> Tensor:
        assert self.value_head is not None
        return self.value_head(self._seen(observation))

    def imitation_loss(
        self,
        observation: Observation,
        actions: Tensor,
        mask: Tensor,
        /,
        config: SFTConfig,
        noise: SamplingNoise,
    ) -> Imitation:
        start = noise.normal(H * self.action_spec.dim).float().view(actions.shape)
        wanted = (actions - self.low) / (self.high - self.low) * 2 - 1
        error = self._mean(observation, start[:, None])[:, 0] - wanted
        return Imitation((error**2 * mask[..., None]).sum())

    def save_pretrained(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        about = {
            "model_type": "gaussian",
            "chunk": self.chunk,
            "action_spec": asdict(self.action_spec),
            "critic": self.value_head is not None,
        }
        (directory / "config.json").write_text(json.dumps(about))
        save_file(self.state_dict(), directory / "model.safetensors")

    @classmethod
    def from_pretrained(cls, path: Path | str, *, device: torch.device | str = "cpu") -> GaussianPolicy:
        about = json.loads((Path(path) / "config.json").read_text())
        spec = {k: tuple(v) if isinstance(v, list) else v for k, v in about["action_spec"].items()}
        policy = cls(about["chunk"], ActionSpec(**spec), about["critic"])
        policy.load_state_dict(load_file(Path(path) / "model.safetensors"))
        return policy.to(device)
