"""A policy of your own, in one file: a small convolutional network and a bag of words.

    rove train examples/policy.py:tabletop_small

A policy derives from `rove.policies.base.Policy`, which is a torch module, and has its
abstract methods; one that draws action tokens, as this one, from `TokenPolicy`. It must answer
`act` and `evaluate` from one distribution: here both call `_logprob`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rove.config.schema import OptimConfig, PolicyConfig, Run, SFTConfig
from rove.policies import registry
from rove.policies.base import SamplingNoise, TokenPolicy
from rove.recipes import recipe
from rove.recipes.tabletop import tabletop_grpo
from rove.types import ActionChunk, ActionSpec, Mode, Observation, PolicyOutput

BINS = 32
"""Per action dimension, evenly over its bounds."""


class SmallPolicy(TokenPolicy):
    """Image and words in, a categorical distribution over bins for every action dimension out. No critic."""

    def __init__(
        self, chunk: int, action_spec: ActionSpec, vocabulary: Sequence[str], temperature: float
    ) -> None:
        super().__init__()
        self.chunk, self.action_spec, self.temperature = chunk, action_spec, temperature
        self.vocabulary = tuple(vocabulary)
        self.words = nn.EmbeddingBag(len(self.vocabulary) + 1, 64)  # the last one: any other word
        self.eyes = nn.Sequential(
            nn.Conv2d(3, 32, 4, 4),
            nn.GELU(),
            nn.Conv2d(32, 64, 2, 2),
            nn.GELU(),
            nn.AdaptiveAvgPool2d(4),
            nn.Flatten(),
        )
        self.head = nn.Sequential(
            nn.Linear(64 * 16 + 64, 256), nn.GELU(), nn.Linear(256, chunk * action_spec.dim * BINS)
        )

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
    ) -> SmallPolicy:
        """A new one, or the checkpoint's; bins cover the bounds, whatever the `statistics`."""
        if config.checkpoint is not None:
            policy = cls.from_pretrained(config.checkpoint)
            policy.temperature = config.temperature
            return policy.to(device)
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(seed)
            return cls(chunk, action_spec, vocabulary, config.temperature).to(device)

    def _logprob(self, observation: Observation, temperature: float | None = None) -> Tensor:
        """float32 [B, 1, C, A, BINS]; the second dimension is that of several samples for a row."""
        device = self.head[0].weight.device
        pixels = observation.images[:, 0].to(device).movedim(-1, 1).float() / 127.5 - 1
        number = {word: index for index, word in enumerate(self.vocabulary)}
        texts = [text.lower().split() or [""] for text in observation.instruction]
        flat = torch.tensor([number.get(word, len(number)) for text in texts for word in text])
        starts = torch.tensor([0, *map(len, texts[:-1])]).cumsum(0)
        words = self.words(flat.to(device), starts.to(device))
        logits = self.head(torch.cat([self.eyes(pixels), words], 1)) / (temperature or self.temperature)
        return logits.view(-1, 1, self.chunk, self.action_spec.dim, BINS).log_softmax(-1)

    def act(
        self,
        observation: Observation,
        mode: Mode,
        noise: SamplingNoise | None = None,
        samples: int | None = None,
    ) -> ActionChunk:
        count = samples or 1
        logprob = self._logprob(observation).expand(-1, count, -1, -1, -1)
        if mode == "greedy":
            tokens = logprob.argmax(-1)
        else:
            assert noise is not None
            uniform = noise.uniform(count * self.chunk * self.action_spec.dim).to(logprob.device)
            cumulative = logprob.double().exp().cumsum(-1)
            threshold = uniform.view(*logprob.shape[:-1], 1) * cumulative[..., -1:]
            tokens = (cumulative < threshold).sum(-1).clamp(max=BINS - 1)
        taken = logprob.gather(-1, tokens[..., None]).squeeze(-1)
        if samples is None:
            tokens, taken = tokens.squeeze(1), taken.squeeze(1)
        return ActionChunk(self._detokenize(tokens), tokens, taken, None)

    def evaluate(
        self,
        observation: Observation,
        tokens: Tensor,
        /,
        temperature: float | None = None,
        smoothing: float = 0.0,
    ) -> PolicyOutput:
        logprob = self._logprob(observation, temperature)
        if tokens.ndim == 3:
            logprob = logprob.squeeze(1)
        column = tokens.to(logprob.device)[..., None]
        logprob = logprob.expand(*column.shape[:-1], BINS)
        entropy = -(logprob.exp() * logprob).sum(-1)
        if smoothing:
            distance = torch.arange(BINS, device=logprob.device) - column
            weight = (-0.5 * (distance / smoothing) ** 2).softmax(-1)
            return PolicyOutput((weight * logprob).sum(-1), entropy, None)
        return PolicyOutput(logprob.gather(-1, column).squeeze(-1), entropy, None)

    def tokenize(self, actions: Tensor) -> Tensor:
        """int64 [N, C, A]: the bin of each action."""
        low, high = self._bounds()
        return ((actions.cpu() - low) / (high - low) * BINS).long().clamp(0, BINS - 1)

    def _detokenize(self, tokens: Tensor) -> Tensor:
        low, high = self._bounds()
        return low + (tokens.cpu() + 0.5) / BINS * (high - low)

    def _bounds(self) -> tuple[Tensor, Tensor]:
        return torch.tensor(self.action_spec.low), torch.tensor(self.action_spec.high)

    def save_pretrained(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        about = {
            "model_type": "small",  # how the registry knows the class
            "chunk": self.chunk,
            "action_spec": asdict(self.action_spec),
            "vocabulary": self.vocabulary,
            "temperature": self.temperature,
        }
        (directory / "config.json").write_text(json.dumps(about))
        save_file(
            {name: t.contiguous() for name, t in self.state_dict().items()}, directory / "model.safetensors"
        )

    @classmethod
    def from_pretrained(cls, directory: Path | str, *, device: torch.device | str = "cpu") -> SmallPolicy:
        """Read what `save_pretrained` wrote."""
        directory = Path(directory)
        about = json.loads((directory / "config.json").read_text())
        spec = {k: tuple(v) if isinstance(v, list) else v for k, v in about["action_spec"].items()}
        policy = cls(about["chunk"], ActionSpec(**spec), about["vocabulary"], about["temperature"])
        policy.load_state_dict(load_file(directory / "model.safetensors"))
        return policy.to(device)


registry.register("small", f"{__name__}:SmallPolicy")


@recipe
def tabletop_small() -> Run:
    """GRPO on the eight demo tasks with the small convolutional policy."""
    base = tabletop_grpo()
    return replace(
        base,
        name="tabletop_small",
        policy=PolicyConfig(kind="small"),
        # It has nothing that points in images, and no parameters to freeze once it has learned to.
        sft=SFTConfig(
            episodes=1000,
            noise=0.3,
            smoothing=1.0,
            color_jitter=0.3,
            steps=3000,
            optim=OptimConfig(lr=1e-3, warmup=50, schedule="cosine", weight_decay=0.01),
        ),
        training=replace(base.training, freeze=()),
    )
