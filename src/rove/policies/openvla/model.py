"""OpenVLA (Kim et al. 2024) and OpenVLA-OFT with discrete tokens (Kim et al. 2025) as one policy.

Tiny models and the published 7B ones are configurations of this class.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, Self, overload

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from rove.config.schema import PolicyConfig, ValueHeadConfig
from rove.errors import RoveError
from rove.policies.base import SamplingNoise
from rove.policies.critic import ValueHead
from rove.policies.openvla import bins, decoding, images
from rove.policies.openvla.bins import BINS, Normalizer
from rove.policies.openvla.config import Checkpoint, describe
from rove.policies.openvla.decoding import Decoding
from rove.policies.openvla.language import Attention
from rove.policies.openvla.tokenizer import PromptTokenizer, read_tokenizer, word_tokenizer
from rove.policies.openvla.vlm import Prefix, PrismaticVLM, initialize
from rove.policies.openvla.weights import check_weights, from_reference, read_weights, to_reference
from rove.types import ActionChunk, ActionSpec, Mode, Observation, PolicyOutput

Placeholders = Literal["zero", "learned"]


class OpenVLA(nn.Module):
    """A policy in the sense of `policies.base.Policy`; made by `build` or `from_pretrained`."""

    mean: Tensor
    std: Tensor
    low: Tensor
    high: Tensor

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        decoding: Decoding,
        attention: Attention,
        chunk: int,
        temperature: float,
        placeholders: Placeholders,
        film: bool,
        proprio: bool,
        pointers: int,
        action_spec: ActionSpec,
        statistics: Mapping[str, Any],
        unnorm_key: str | None,
        value_head: ValueHeadConfig | None,
        tokenizer: PromptTokenizer | None,
    ) -> None:
        """The weights are left on the meta device, for `build` or `from_pretrained` to fill.

        Raises RoveError where the settings do not fit each other.
        """
        super().__init__()
        if decoding == "autoregressive" and attention == "bidirectional":
            raise RoveError(
                "Autoregressive decoding needs attention='causal', or a token would see itself; "
                "bidirectional attention goes with decoding='parallel'."
            )
        self.checkpoint = checkpoint
        self.decoding: Decoding = decoding
        self.attention: Attention = attention
        self.chunk = chunk
        self.temperature = temperature
        self.action_spec = action_spec
        self.statistics = dict(statistics)
        self.unnorm_key = bins.choose_key(statistics, unnorm_key)
        self.tokenizer = tokenizer
        self.normalizer = Normalizer(statistics[self.unnorm_key]["action"])
        if self.normalizer.dim != action_spec.dim:
            raise RoveError(
                f"The statistics {self.unnorm_key!r} have {self.normalizer.dim} action dimensions, "
                f"the action spec has {action_spec.dim} ({', '.join(action_spec.names)})."
            )
        self.state_normalizer = self._read_state(statistics[self.unnorm_key]) if proprio else None
        with torch.device("meta"):
            self.vlm = PrismaticVLM(
                checkpoint.towers,
                checkpoint.llama,
                image_size=checkpoint.image_size,
                vocab_size=checkpoint.vocab_size,
                placeholders=chunk * action_spec.dim if placeholders == "learned" else 0,
                film=film,
                proprio=self.state_normalizer.dim if self.state_normalizer else 0,
                pointers=pointers,
            )
            width = checkpoint.llama.hidden_size
            self.value_head = None if value_head is None else ValueHead(value_head, width=width, chunk=chunk)
        mean, std = zip(*checkpoint.normalization, strict=True)
        for name, values in (
            ("mean", 255 * torch.tensor(mean).flatten()),
            ("std", 255 * torch.tensor(std).flatten()),
            ("low", torch.tensor(action_spec.low)),
            ("high", torch.tensor(action_spec.high)),
        ):
            self.register_buffer(name, values, persistent=False)

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
    ) -> Self:
        """A new policy with random float32 weights; the same seed gives the same weights.

        `vocabulary` lists the words that instructions use; `statistics` is like `dataset_statistics.json`,
        and None maps [-1, 1] onto the bounds of `action_spec`. Raises RoveError where sizes do not fit.
        """
        tokenizer = word_tokenizer(vocabulary)
        checkpoint = describe(config, image_size=image_size, words=tokenizer.get_vocab_size())
        policy = cls(
            checkpoint,
            decoding=config.decoding,
            attention=config.attention,
            chunk=chunk,
            temperature=config.temperature,
            placeholders=config.placeholders,
            film=config.film,
            proprio=config.proprio,
            pointers=config.pointers,
            action_spec=action_spec,
            statistics=bins.statistics_of_bounds(action_spec) if statistics is None else statistics,
            unnorm_key=None,
            value_head=config.value_head,
            tokenizer=PromptTokenizer(tokenizer, checkpoint),
        )
        generator = torch.Generator().manual_seed(seed)
        initialize(policy.vlm.to_empty(device="cpu"), generator)
        if policy.value_head is not None:
            policy.value_head.to_empty(device="cpu").initialize(generator)
        return policy

    @classmethod
    def from_pretrained(
        cls,
        path: Path | str,
        *,
        decoding: Decoding | None = None,
        attention: Attention | None = None,
        unnorm_key: str | None = None,
        value_head: ValueHeadConfig | Literal["saved"] | None = "saved",
        temperature: float | None = None,
        chunk: int | None = None,
        action_spec: ActionSpec | None = None,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Self:
        """Read a checkpoint directory. What is None is as saved, or as published for others' checkpoints.

        A `value_head` other than the saved one starts anew, from `seed`. Raises RoveError, naming the
        key, where weights are missing, left over, misshapen or unreadable.
        """
        directory = Path(path)
        checkpoint = Checkpoint.read(directory)
        settings = checkpoint.settings(decoding)
        head = checkpoint.value_head if value_head == "saved" else value_head
        statistics = bins.read_statistics(directory, checkpoint.norm_stats)
        key = bins.choose_key(statistics, unnorm_key or settings["unnorm_key"])
        tokenizer = read_tokenizer(directory)
        policy = cls(
            checkpoint,
            decoding=settings["decoding"],
            attention=attention or settings["attention"],
            chunk=chunk or settings["chunk"],
            temperature=temperature or settings["temperature"],
            placeholders=settings["placeholders"],
            film=settings["film"],
            proprio=settings["proprio"],
            pointers=settings["pointers"],
            action_spec=action_spec or checkpoint.action_spec,
            statistics=statistics,
            unnorm_key=key,
            value_head=head,
            tokenizer=None if tokenizer is None else PromptTokenizer(tokenizer, checkpoint),
        )
        state = read_weights(directory)
        if head != checkpoint.value_head:
            state = {name: value for name, value in state.items() if not name.startswith("value_head.")}
            if policy.value_head is not None:
                policy.value_head.to_empty(device="cpu").initialize(torch.Generator().manual_seed(seed))
                state |= policy.value_head.state_dict(prefix="value_head.")
        policy.load_reference(state, dtype, source=str(directory))
        return policy.to(device)

    def load_reference(self, state: Mapping[str, Tensor], dtype: torch.dtype, *, source: str) -> None:
        """Take over weights in the published key layout; `source` is named where they do not fit."""
        towers = self.checkpoint.towers
        check_weights(state, to_reference(self.state_dict(), towers), source)
        trainable = {name: parameter.requires_grad for name, parameter in self.named_parameters()}
        ours = {name: value.to(dtype) for name, value in from_reference(state, towers).items()}
        self.load_state_dict(ours, assign=True)
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(trainable[name])

    def save_pretrained(self, directory: Path | str) -> None:
        """Write config, weights (published key layout), tokenizer, statistics and image settings."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        settings = {
            "decoding": self.decoding,
            "attention": self.attention,
            "chunk": self.chunk,
            "temperature": self.temperature,
            "film": self.vlm.film is not None,
            "proprio": self.state_normalizer is not None,
            "pointers": 0 if self.vlm.pointer is None else len(self.vlm.pointer.queries),
            "placeholders": "zero" if self.vlm.placeholders is None else "learned",
            "action_spec": asdict(self.action_spec),
            "unnorm_key": self.unnorm_key,
            "value_head": None if self.value_head is None else asdict(self.value_head.config),
        }
        self.checkpoint.with_settings(settings).write(directory)
        state = to_reference(self.state_dict(), self.checkpoint.towers)
        save_file(
            {key: value.cpu().contiguous() for key, value in state.items()},
            directory / "model.safetensors",
            metadata={"format": "pt"},
        )
        (directory / "dataset_statistics.json").write_text(json.dumps(self.statistics, indent=1) + "\n")
        if self.tokenizer is not None:
            self.tokenizer.save(directory)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.vlm.lm_head.weight.device

    # --- the Policy contract ----------------------------------------------------------------------

    def act(
        self,
        observation: Observation,
        mode: Mode,
        noise: SamplingNoise | None = None,
        samples: int | None = None,
    ) -> ActionChunk:
        """See `Policy.act`. Raises RoveError where `mode` is "sample" and there is no noise."""
        uniform = None
        if mode == "sample":
            if noise is None:
                raise RoveError("act(mode='sample') needs noise; pass a SamplingNoise, or mode='greedy'.")
            uniform = noise.uniform((samples or 1) * self._count, self.device).unflatten(1, (-1, self._count))
        with torch.inference_mode():
            prefix = self._prefix(observation)
            if self.decoding == "parallel":
                hidden = self._parallel(prefix)
                logits = self.vlm.action_logits(hidden)
                column = decoding.choose(logits, self.temperature, None if uniform is None else uniform.mT)
            else:
                column, logits, hidden = decoding.one_by_one(
                    self.vlm,
                    prefix.repeat(samples) if samples else prefix,
                    self._count,
                    self.temperature,
                    None if uniform is None else uniform.flatten(0, 1),
                )
                column = column[..., None]
            logp = (logits / self.temperature).log_softmax(dim=-1)
            value = None if self.value_head is None else self._value(hidden)
            if value is not None:
                value = value[:: len(value) // len(observation)]  # the samples of a row have one value
            tokens = self._chunked(column + self.vlm.vocab_size - BINS, samples)
            actions = self.unnormalize(self.detokenize(tokens)).float()
            # Percentiles of the data may lie outside of what the environment accepts, by rounding at least.
            actions = actions.clamp(self.low, self.high)
        # Clones made outside of inference mode may enter a graph, as old log-probabilities do.
        return ActionChunk(
            actions=actions.clone(),
            tokens=tokens.clone(),
            logprob=self._chunked(logp.gather(-1, column), samples).clone(),
            value=None if value is None else value.clone(),
        )

    def evaluate(
        self,
        observation: Observation,
        tokens: Tensor,
        temperature: float | None = None,
        smoothing: float = 0.0,
    ) -> PolicyOutput:
        """See `Policy.evaluate`; `tokens` are action tokens."""
        samples = tokens.shape[1] if tokens.ndim == 4 else None
        column = tokens.to(self.device).flatten(-2) - (self.vlm.vocab_size - BINS)  # [B, N] or [B, G, N]
        prefix = self._prefix(observation)
        if self.decoding == "parallel":
            hidden = self._parallel(prefix)
            column = column.view(len(column), -1, self._count).mT
        else:
            column = column.view(-1, self._count)
            given = column + self.vlm.vocab_size - BINS
            hidden = decoding.teacher_forced(self.vlm, prefix.repeat(samples) if samples else prefix, given)
            column = column[..., None]
        logp = (self.vlm.action_logits(hidden) / (temperature or self.temperature)).log_softmax(dim=-1)
        taken = bins.smooth(logp, column, smoothing) if smoothing else logp.gather(-1, column)
        entropy = -(logp.exp() * logp).sum(dim=-1, keepdim=True).expand_as(column)
        value = None if self.value_head is None else self._value(hidden)
        return PolicyOutput(
            logprob=self._chunked(taken, samples),
            entropy=self._chunked(entropy, samples),
            value=None if value is None else value[:: len(value) // len(observation)],
            pointing=prefix.pointing,
        )

    def value(self, observation: Observation) -> Tensor:
        """See `Policy.value`."""
        if self.value_head is None:
            raise RoveError("This policy has no critic; set policy.value_head.")
        prefix = self._prefix(observation)
        first = self.decoding == "autoregressive" or self.value_head.config.source == "first"
        if first and self.attention == "causal":
            return self._value(decoding.prompt_state(self.vlm, prefix, self.attention))
        return self._value(self._parallel(prefix))

    def point(self, observation: Observation) -> Tensor:
        """See `Locator`."""
        ids, mask = self._prompt(observation)
        logits = self.vlm.point(self.vlm.patches(ids, mask, self.process_images(observation.images)))
        if logits is None:
            raise RoveError("This policy does not point; set policy.pointers, or sft.grounding to 0.")
        return logits

    # --- the model apart from text and units ------------------------------------------------------

    def process_images(self, pictures: Tensor, center_crop: bool | None = None) -> Tensor:
        """Pixel values [B, 3·towers·n, size, size] of uint8 [B, n, H, W, 3], on the model's device.

        `center_crop=None` does as the checkpoint's config says.
        """
        crop = self.checkpoint.center_crop if center_crop is None else center_crop
        size = self.checkpoint.image_size
        return images.process(pictures.to(self.device), size, self.mean, self.std, center_crop=crop)

    @overload
    def action_logits(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        pixel_values: Tensor,
        tokens: Tensor | None = None,
        state: Tensor | None = None,
        return_hidden: Literal[False] = False,
    ) -> Tensor: ...

    @overload
    def action_logits(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        pixel_values: Tensor,
        tokens: Tensor | None = None,
        state: Tensor | None = None,
        *,
        return_hidden: Literal[True],
    ) -> tuple[Tensor, Tensor]: ...

    def action_logits(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        pixel_values: Tensor,
        tokens: Tensor | None = None,
        state: Tensor | None = None,
        return_hidden: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """float32 [B, C, A, 256], column j being token id `vocab_size - 256 + j`, at temperature 1.

        `input_ids` [B, L] is padded on the left where `attention_mask` [B, L] is False (None: nowhere).
        Autoregressive decoding is teacher-forced by `tokens` [B, C, A] (any vocabulary ids), or greedy
        over the action tokens where they are None; parallel decoding does not look at them. With
        `return_hidden` also the hidden states [B, C·A, D] that predict each token, after the final norm.
        """
        if attention_mask is not None and bool(attention_mask.all()):
            attention_mask = None
        prefix = self.vlm.prefix(input_ids, attention_mask, pixel_values, state)
        if self.decoding == "autoregressive" and tokens is None:
            _, logits, hidden = decoding.one_by_one(self.vlm, prefix, self._count, 1.0, None)
        else:
            hidden = (
                self._parallel(prefix)
                if tokens is None or self.decoding == "parallel"
                else (decoding.teacher_forced(self.vlm, prefix, tokens.flatten(1)))
            )
            logits = self.vlm.action_logits(hidden)
        logits = logits.unflatten(1, (self.chunk, self.action_spec.dim))
        return (logits, hidden) if return_hidden else logits

    def tokenize(self, actions: Tensor) -> Tensor:
        """int64 [B, C, A] token ids of actions [B, C, A] in the units of the statistics."""
        return bins.tokenize(self.normalizer.normalize(actions.to(self.device)), self.vlm.vocab_size)

    def detokenize(self, tokens: Tensor) -> Tensor:
        """float64 [B, C, A] in (-1, 1)."""
        return bins.detokenize(tokens, self.vlm.vocab_size)

    def unnormalize(self, normalized: Tensor) -> Tensor:
        """float64 [B, C, A] in the units of the statistics."""
        return self.normalizer.unnormalize(normalized)

    # --- inside -----------------------------------------------------------------------------------

    @property
    def _count(self) -> int:
        return self.chunk * self.action_spec.dim

    def _read_state(self, statistics: Mapping[str, Any]) -> Normalizer:
        if "proprio" not in statistics:
            raise RoveError(
                f"The policy reads the robot's state, but the statistics {self.unnorm_key!r} have none "
                "('proprio'): the suite or its demonstrations lack it. Set policy.proprio false."
            )
        return Normalizer(statistics["proprio"])

    def _prompt(self, observation: Observation) -> tuple[Tensor, Tensor | None]:
        if self.tokenizer is None:
            raise RoveError("The checkpoint has no tokenizer.json, so it cannot read instructions.")
        ids, mask = self.tokenizer(observation.instruction)
        return ids.to(self.device), None if mask is None else mask.to(self.device)

    def _prefix(self, observation: Observation) -> Prefix:
        state = None
        if self.state_normalizer is not None:
            if observation.state is None:
                raise RoveError("The policy reads the robot's state, which this suite does not give.")
            seen = self.state_normalizer.normalize(observation.state.to(self.device))
            state = seen.clamp(-1.0, 1.0).to(self.vlm.lm_head.weight.dtype)
        return self.vlm.prefix(*self._prompt(observation), self.process_images(observation.images), state)

    def _parallel(self, prefix: Prefix) -> Tensor:
        return decoding.parallel(self.vlm, prefix, self._count, self.attention, self.checkpoint.stop_token)

    def _value(self, hidden: Tensor) -> Tensor:
        # Of tokens decoded one by one, only the first position has not seen the action it judges.
        assert self.value_head is not None
        return self.value_head(hidden[:, :1] if self.decoding == "autoregressive" else hidden)

    def _chunked(self, x: Tensor, samples: int | None) -> Tensor:
        """[B, C·A, G] or [B·G, C·A, 1] -> [B, G, C, A]; without `samples`, [B, C·A, 1] -> [B, C, A]."""
        rows = x.mT.reshape(-1, samples or 1, self.chunk, self.action_spec.dim)
        return rows if samples else rows.squeeze(1)
