"""OpenVLA (Kim et al. 2024) and OpenVLA-OFT (Kim et al. 2025) as one policy.

Tiny models and the published 7B ones are configurations of this class.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal, Self, overload

import torch
from torch import Tensor, nn

from rove.config.schema import LoraConfig, PolicyConfig, Run, ValueHeadConfig
from rove.errors import RoveError
from rove.findings import Finding
from rove.policies.base import SamplingNoise
from rove.policies.critic import ValueHead
from rove.policies.openvla import bins, decoding, images, loading, preflight
from rove.policies.openvla.bins import Normalizer
from rove.policies.openvla.compiled import Compiled, padded
from rove.policies.openvla.config import BINS, Checkpoint, describe
from rove.policies.openvla.decoding import Decoding
from rove.policies.openvla.heads import L1Head, refuse_rl
from rove.policies.openvla.language import Attention
from rove.policies.openvla.tokenizer import PromptTokenizer, word_tokenizer
from rove.policies.openvla.vlm import Prefix, PrismaticVLM, initialize
from rove.types import ActionChunk, ActionSpec, Conventions, Mode, Observation, PolicyOutput

Placeholders = Literal["zero", "learned"]
Head = Literal["discrete", "l1"]


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
        head: Head,
        chunk: int,
        temperature: float,
        placeholders: Placeholders,
        film: bool,
        proprio: bool,
        pointers: int,
        num_images: int | None,
        center_crop: bool | None,
        action_spec: ActionSpec,
        statistics: Mapping[str, Any],
        unnorm_key: str | None,
        value_head: ValueHeadConfig | None,
        tokenizer: PromptTokenizer | None,
        gradient_checkpointing: bool = False,
        compile_rollouts: bool = False,
    ) -> None:
        """The weights are left on the meta device, for `build` or `from_pretrained` to fill.

        Raises RoveError where the settings do not fit each other.
        """
        super().__init__()
        _check_modes(decoding, attention, head, value_head)
        self.checkpoint = checkpoint
        self.decoding: Decoding = decoding
        self.attention: Attention = attention
        self.chunk = chunk
        self.temperature = temperature
        self.num_images = num_images
        self.center_crop = checkpoint.center_crop if center_crop is None else center_crop
        self.action_spec = action_spec
        self.statistics = dict(statistics)
        self.unnorm_key = bins.choose_key(statistics, unnorm_key)
        self.tokenizer = tokenizer
        self.lora: LoraConfig | None = None
        self.base: str | None = None
        """The checkpoint that holds the weights which adapters are beside; None: they are only here."""
        self.trainable: frozenset[str] = frozenset()
        """Parameters of `vlm` that are trained where there are no adapters."""
        chosen = {} if self.unnorm_key is None else statistics[self.unnorm_key]
        self.normalizer = Normalizer(chosen["action"]) if chosen else None
        if self.normalizer is not None and self.normalizer.dim != action_spec.dim:
            raise RoveError(
                f"The statistics {self.unnorm_key!r} have {self.normalizer.dim} action dimensions, "
                f"the action spec has {action_spec.dim} ({', '.join(action_spec.names)})."
            )
        self.state_normalizer = self._read_state(chosen) if proprio else None
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
            self.action_head = L1Head(width, action_spec.dim) if head == "l1" else None
        self.vlm.gradient_checkpointing = gradient_checkpointing
        self.compile_rollouts = compile_rollouts
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
        """A policy as `config` says: read from its checkpoint, or new, with random float32 weights.

        The same seed gives the same weights. `vocabulary` lists the words that instructions use;
        `statistics` is like `dataset_statistics.json`, and None maps [-1, 1] onto the bounds of
        `action_spec`. A checkpoint keeps its own vocabulary, and its statistics and action spec unless
        `statistics` are given, those of data that it is to be trained on. Raises RoveError where sizes do not
        fit.
        """
        if config.checkpoint is not None:
            return loading.from_config(cls, config, chunk, action_spec, statistics, seed)
        tokenizer = word_tokenizer(vocabulary)
        checkpoint = describe(config, image_size=image_size, words=tokenizer.get_vocab_size())
        policy = cls(
            checkpoint,
            decoding=config.decoding,
            attention=config.attention,
            head=config.head,
            chunk=chunk,
            temperature=config.temperature,
            placeholders=config.placeholders,
            film=config.film,
            proprio=config.proprio,
            pointers=config.pointers,
            num_images=None,
            center_crop=config.center_crop,
            action_spec=action_spec,
            statistics=bins.statistics_of_bounds(action_spec) if statistics is None else statistics,
            unnorm_key=None,
            value_head=config.value_head,
            tokenizer=PromptTokenizer(tokenizer, checkpoint),
            gradient_checkpointing=config.gradient_checkpointing,
            compile_rollouts=config.compile,
        )
        generator = torch.Generator().manual_seed(seed)
        initialize(policy.vlm.to_empty(device="cpu"), generator)
        for head in (policy.value_head, policy.action_head):
            if head is not None:
                head.to_empty(device="cpu").initialize(generator)
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
        lora: LoraConfig | Literal["saved"] | None = "saved",
        head: Head | None = None,
        temperature: float | None = None,
        chunk: int | None = None,
        action_spec: ActionSpec | None = None,
        statistics: Mapping[str, Any] | None = None,
        center_crop: bool | None = None,
        gradient_checkpointing: bool = False,
        compile_rollouts: bool = False,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Self:
        """Read a checkpoint: a directory, or a name on the Hugging Face hub.

        What is None is as saved, or as published for others' checkpoints. A `value_head` other than the saved
        one starts anew, from `seed`. `lora` puts adapters beside the weights; saved ones go on where they
        are the same, and are merged into the weights otherwise. `statistics` replace those of the
        checkpoint, together with `action_spec`: see `build`. Weights are converted to `dtype` and moved to
        `device` one by one. Raises RoveError, naming the key or the file, where weights are missing, left
        over, misshapen, unreadable, or would execute code.
        """
        return loading.load(
            cls,
            path,
            decoding=decoding,
            attention=attention,
            unnorm_key=unnorm_key,
            value_head=value_head,
            lora=lora,
            head=head,
            temperature=temperature,
            chunk=chunk,
            action_spec=action_spec,
            statistics=statistics,
            center_crop=center_crop,
            gradient_checkpointing=gradient_checkpointing,
            compile_rollouts=compile_rollouts,
            seed=seed,
            dtype=dtype,
            device=torch.device(device),
        )

    def save_pretrained(self, directory: Path | str, *, max_shard_bytes: int = 5 * 10**9) -> None:
        """Write a checkpoint directory: config, weights in the published layout, tokenizer, statistics.

        With adapters whose base is a checkpoint, those and the heads alone, and where it is: see `merge`.
        """
        loading.save(self, Path(directory), max_shard_bytes)

    @staticmethod
    def memory(run: Run) -> str:
        """What a run of this policy needs on the device that holds it, before anything is loaded."""
        from rove.policies.openvla.memory import estimate

        return str(estimate(run))

    def merge(self) -> Self:
        """Add the adapters to the weights, as a checkpoint that stands by itself needs it; returns self."""
        loading.merge(self)
        return self

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.vlm.lm_head.weight.device

    # --- the Policy contract ----------------------------------------------------------------------

    def act(self, observation: Observation, mode: Mode, noise: SamplingNoise | None = None) -> ActionChunk:
        """See `Policy.act`. Raises RoveError where `mode` is "sample" and there is no noise."""
        if mode == "sample":
            refuse_rl(self.action_head)
            if noise is None:
                raise RoveError("act(mode='sample') needs noise; pass a SamplingNoise, or mode='greedy'.")
        else:
            noise = None
        rows = len(observation)
        if self.compile_rollouts:
            if self.vlm.compiled is None:
                self.vlm.compiled = Compiled(self.device)
            observation, noise = padded(observation, noise)
        uniform = None if noise is None else noise.uniform(self._count, self.device)
        with torch.inference_mode(), self._precision():
            chunk = self._act(self._prefix(observation), uniform)
        # Clones made outside of inference mode may enter a graph, as old log-probabilities do.
        return ActionChunk(
            actions=chunk.actions[:rows].clone(),
            tokens=chunk.tokens[:rows].clone(),
            logprob=chunk.logprob[:rows].clone(),
            value=None if chunk.value is None else chunk.value[:rows].clone(),
        )

    def _act(self, prefix: Prefix, uniform: Tensor | None) -> ActionChunk:
        if self.action_head is not None:
            normalized = self.action_head(self._parallel(prefix))
            actions = self._in_units(normalized)
            tokens = bins.tokenize(normalized, self.vlm.vocab_size)
            return ActionChunk(actions, tokens, torch.zeros_like(actions), None)
        if self.decoding == "parallel":
            hidden = self._parallel(prefix)
            logits = self.vlm.action_logits(hidden)
            column = decoding.choose(logits, self.temperature, uniform)
        else:
            column, logits, hidden = decoding.one_by_one(
                self.vlm, prefix, self._count, self.temperature, uniform
            )
        logp = (logits / self.temperature).log_softmax(dim=-1)
        tokens = self._chunked(column + self.vlm.vocab_size - BINS)
        return ActionChunk(
            actions=self._in_units(self.detokenize(tokens)),
            tokens=tokens,
            logprob=self._chunked(logp.gather(-1, column[..., None]).squeeze(-1)),
            # Of the hidden states that chose the actions: prompt and pictures are seen once for both.
            value=None if self.value_head is None else self._value(hidden),
        )

    def evaluate(
        self, observation: Observation, tokens: Tensor, temperature: float | None = None
    ) -> PolicyOutput:
        """See `Policy.evaluate`; `tokens` are action tokens. Raises RoveError with an L1 head."""
        refuse_rl(self.action_head)
        tokens = tokens.to(self.device).flatten(1)
        with self._precision():
            prefix = self._prefix(observation)
            hidden = self._hidden(prefix, tokens)
            logp = (self.vlm.action_logits(hidden) / (temperature or self.temperature)).log_softmax(dim=-1)
            column = tokens - (self.vlm.vocab_size - BINS)
            return PolicyOutput(
                logprob=self._chunked(logp.gather(-1, column[..., None]).squeeze(-1)),
                entropy=self._chunked(-(logp.exp() * logp).sum(dim=-1)),
                value=None if self.value_head is None else self._value(hidden),
                pointing=prefix.pointing,
            )

    def value(self, observation: Observation) -> Tensor:
        """See `Policy.value`."""
        if self.value_head is None:
            raise RoveError("This policy has no critic; set policy.value_head.")
        first = self.decoding == "autoregressive" or self.value_head.config.source == "first"
        with self._precision():
            prefix = self._prefix(observation)
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

    def preflight(self, conventions: Conventions, *, rl: bool) -> list[Finding]:
        """See `Preflighted`."""
        return preflight.examine(self, conventions, rl=rl)

    @property
    def regresses(self) -> bool:
        """See `Regressor`: whether actions come from the L1 head."""
        return self.action_head is not None

    def regress(self, observation: Observation) -> Tensor:
        """See `Regressor`."""
        if self.action_head is None:
            raise RoveError("This policy has no regression head; set policy.head to l1.")
        with self._precision():
            return self.action_head(self._parallel(self._prefix(observation)))

    def normalize(self, actions: Tensor) -> Tensor:
        """See `Regressor`."""
        return self._statistics().normalize(actions.to(self.device)).float()

    # --- the model apart from text and units ------------------------------------------------------

    def process_images(self, pictures: Tensor, center_crop: bool | None = None) -> Tensor:
        """Pixel values [B, 3·towers·n, size, size] of uint8 [B, n, H, W, 3], on the model's device.

        `center_crop=None` does as the checkpoint's config says.
        """
        crop = bool(self.center_crop if center_crop is None else center_crop)
        size = self.checkpoint.image_size
        how = self.checkpoint.interpolation
        return images.process(
            pictures.to(self.device), size, self.mean, self.std, center_crop=crop, interpolation=how
        )

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
        with self._precision():
            prefix = self.vlm.prefix(input_ids, attention_mask, pixel_values, state)
            if self.decoding == "autoregressive" and tokens is None:
                _, logits, hidden = decoding.one_by_one(self.vlm, prefix, self._count, 1.0, None)
            else:
                hidden = self._hidden(prefix, None if tokens is None else tokens.flatten(1))
                logits = self.vlm.action_logits(hidden)
        return (self._chunked(logits), hidden) if return_hidden else self._chunked(logits)

    def tokenize(self, actions: Tensor) -> Tensor:
        """int64 [B, C, A] token ids of actions [B, C, A] in the units of the statistics."""
        return bins.tokenize(self._statistics().normalize(actions.to(self.device)), self.vlm.vocab_size)

    def detokenize(self, tokens: Tensor) -> Tensor:
        """float64 [B, C, A] in (-1, 1)."""
        return bins.detokenize(tokens, self.vlm.vocab_size)

    def unnormalize(self, normalized: Tensor) -> Tensor:
        """float64 [B, C, A] in the units of the statistics; raises RoveError where none are chosen."""
        return self._statistics().unnormalize(normalized)

    # --- inside -----------------------------------------------------------------------------------

    @property
    def _count(self) -> int:
        return self.chunk * self.action_spec.dim

    def _statistics(self) -> Normalizer:
        if self.normalizer is None:
            raise bins.no_key(self.statistics)
        return self.normalizer

    def _precision(self) -> AbstractContextManager:
        # Adapters are float32 for the optimizer's sake; their arithmetic is the weights'.
        if self.lora is not None and self.vlm.lm_head.weight.dtype == torch.bfloat16:
            return torch.autocast(self.device.type, torch.bfloat16)
        return nullcontext()

    def _in_units(self, normalized: Tensor) -> Tensor:
        # Percentiles of the data may lie outside of what the environment accepts, by rounding at least.
        return self.unnormalize(normalized).float().clamp(self.low, self.high)

    def _read_state(self, statistics: Mapping[str, Any]) -> Normalizer:
        if "proprio" not in statistics:
            raise RoveError(
                f"The policy reads the robot's state, but the statistics {self.unnorm_key!r} have none "
                "('proprio'): the suite or its demonstrations lack it. Set policy.proprio false."
            )
        return Normalizer(statistics["proprio"])

    def _prompt(self, observation: Observation) -> tuple[Tensor, Tensor | None]:
        if self.tokenizer is None:
            raise RoveError(
                "The checkpoint has no tokenizer.json, so it cannot read instructions. Where it has a "
                "tokenizer.model, transformers.AutoTokenizer.from_pretrained(directory).save_pretrained("
                "directory) converts it."
            )
        lazy = self.vlm.compiled is not None and torch.is_inference_mode_enabled()
        ids, mask = self.tokenizer(observation.instruction, multiple=16 if lazy else 1)
        return ids.to(self.device), None if mask is None else mask.to(self.device)

    def _prefix(self, observation: Observation) -> Prefix:
        state = None
        if self.state_normalizer is not None:
            if observation.state is None:
                raise RoveError("The policy reads the robot's state, which this suite does not give.")
            seen = self.state_normalizer.normalize(observation.state.to(self.device))
            state = seen.clamp(-1.0, 1.0).float()
        return self.vlm.prefix(*self._prompt(observation), self.process_images(observation.images), state)

    def _parallel(self, prefix: Prefix) -> Tensor:
        return decoding.parallel(self.vlm, prefix, self._count, self.attention, self.checkpoint.stop_token)

    def _hidden(self, prefix: Prefix, tokens: Tensor | None) -> Tensor:
        """Hidden states [B, C·A, D] that predict each token, given `tokens` [B, C·A]."""
        if self.decoding == "parallel":
            return self._parallel(prefix)
        assert tokens is not None
        return decoding.teacher_forced(self.vlm, prefix, tokens)

    def _value(self, hidden: Tensor) -> Tensor:
        # Of tokens decoded one by one, only the first position has not seen the action it judges.
        assert self.value_head is not None
        return self.value_head(hidden[:, :1] if self.decoding == "autoregressive" else hidden)

    def _chunked(self, x: Tensor) -> Tensor:
        """[B, C·A, ...] -> [B, C, A, ...]."""
        return x.unflatten(1, (self.chunk, self.action_spec.dim))


def _check_modes(
    decoding: Decoding, attention: Attention, head: Head, value_head: ValueHeadConfig | None
) -> None:
    if decoding == "autoregressive" and attention == "bidirectional":
        raise RoveError(
            "Autoregressive decoding needs attention='causal', or a token would see itself; "
            "bidirectional attention goes with decoding='parallel'."
        )
    if head == "l1" and decoding == "autoregressive":
        raise RoveError("The L1 head reads all actions at once: it goes with decoding='parallel'.")
    if head == "l1" and value_head is not None:
        refuse_rl(nn.Identity())
