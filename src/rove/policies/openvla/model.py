"""OpenVLA (Kim et al. 2024) and OpenVLA-OFT (Kim et al. 2025) as one policy.

Tiny models and the published 7B ones are configurations of this class.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import torch
from torch import Tensor

from rove import transfer
from rove.config.schema import LoraConfig, PolicyConfig, Run, ValueHeadConfig
from rove.errors import RoveError
from rove.findings import Finding
from rove.policies import lora
from rove.policies.base import Locator, Regressor, SamplingNoise, TokenPolicy, Work
from rove.policies.openvla import bins, decoding, loading, preflight
from rove.policies.openvla.config import BINS, describe
from rove.policies.openvla.core import ActionModel
from rove.policies.openvla.decoding import Decoding
from rove.policies.openvla.graphs import PROMPT_MULTIPLE, Graphs, padded
from rove.policies.openvla.heads import refuse_rl
from rove.policies.openvla.language import Attention
from rove.policies.openvla.memory import estimate
from rove.policies.openvla.settings import Head, Settings
from rove.policies.openvla.tokenizer import NO_TOKENIZER, PromptTokenizer, word_tokenizer
from rove.policies.openvla.vlm import Prefix, initialize
from rove.policies.openvla.work import count_work
from rove.policies.words import unknown_word
from rove.types import ActionChunk, ActionSpec, Conventions, Mode, Observation, PolicyOutput


class Inputs(NamedTuple):
    """The inputs that the model reads from an observation."""

    images: Tensor
    """Images, uint8 [B, n, H, W, 3]."""
    ids: Tensor
    """Token ids of the prompts, int64 [B, L]."""
    mask: Tensor | None
    """Mask of the prompts, bool [B, L], False where one is padded; None: no prompt is padded."""
    state: Tensor | None
    """The robot's state, float32 [B, P]; None where it is not read."""


NO_POINTERS = "This policy does not point; set policy.pointers, or sft.grounding to 0."

ChunkFields = tuple[Tensor, Tensor, Tensor, Tensor | None]
"""The fields of an `ActionChunk`: actions, tokens, log-probabilities, values."""


class OpenVLA(ActionModel, Locator, Regressor, TokenPolicy):
    """A policy of the OpenVLA family, made by `build` or `from_pretrained`."""

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
        device: torch.device | str = "cpu",
    ) -> Self:
        """Make a policy as `config` says: read from its checkpoint, or new, with random float32 weights.

        The same seed gives the same weights. `vocabulary` lists the words that instructions use; `statistics`
        is like `dataset_statistics.json`, and None maps [-1, 1] onto the bounds of `action_spec`. A
        checkpoint keeps its own vocabulary, and its statistics and action spec unless `statistics`, those of
        the data that it is to be trained on, are given. Raises RoveError where sizes do not fit.
        """
        if config.checkpoint is not None:
            return cls.from_pretrained(
                config.checkpoint,
                decoding=config.decoding,
                attention=config.attention,
                unnorm_key=config.unnorm_key if statistics is None else None,
                value_head=config.value_head,
                lora=config.lora,
                head=config.head,
                temperature=config.temperature,
                chunk=chunk,
                action_spec=None if statistics is None else action_spec,
                statistics=statistics,
                center_crop=config.center_crop,
                compiled=config.compile,
                seed=seed,
                dtype=loading.DTYPES[config.dtype],
                device=device,
            )
        tokenizer = word_tokenizer(vocabulary)
        checkpoint = describe(config, image_size=image_size, words=tokenizer.get_vocab_size())
        settings = Settings.from_scratch(
            config,
            checkpoint,
            chunk=chunk,
            action_spec=action_spec,
            statistics=bins.statistics_of_bounds(action_spec) if statistics is None else statistics,
            tokenizer=PromptTokenizer(tokenizer, checkpoint),
        )
        policy = cls(settings)
        generator = torch.Generator().manual_seed(seed)
        initialize(policy.vlm.to_empty(device="cpu"), generator)
        for head in (policy.value_head, policy.action_head):
            if head is not None:
                head.to_empty(device="cpu").initialize(generator)
        return policy.to(device)

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
        compiled: bool = False,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Self:
        """Read a checkpoint: a directory, or a name on the Hugging Face hub.

        Parameters that are None are as saved, or as published for others' checkpoints. A `value_head` other
        than the saved one starts anew, from `seed`. `lora` puts adapters beside the weights; saved adapters
        are continued where their configuration is the same, and are merged into the weights otherwise.
        `statistics` replace those of the checkpoint, together with `action_spec`: see `build`. Weights are
        converted to `dtype` and moved to `device` one by one. Raises RoveError, naming the key or the file,
        where weights are missing, left over, misshapen, unreadable, or would execute code.
        """
        parts = loading.read(
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
            compiled=compiled,
        )
        policy = cls(parts.settings)
        loading.complete(policy, parts, seed=seed, dtype=dtype, device=torch.device(device))
        return policy.to(device)

    def save_pretrained(self, directory: Path | str, *, max_shard_bytes: int = 5 * 10**9) -> None:
        """Write a checkpoint directory: config, weights in the published layout, tokenizer, statistics.

        With adapters whose base is a checkpoint, it holds only adapters, heads and the base's location; see
        `merge`.
        """
        loading.save(self, Path(directory), max_shard_bytes)

    @classmethod
    def check(cls, run: Run) -> None:
        """Check that the policy can do what `run` asks, and that the files of a checkpoint that is here are
        whole; a new one is grounded by its pointers only."""
        super().check(run)
        if run.policy.flow is not None:
            raise RoveError(
                "policy.flow is set, but OpenVLA does not read it: set --policy.flow none, or --policy.kind "
                "smolvla, pi0 or pi05."
            )
        if run.policy.checkpoint is not None and Path(run.policy.checkpoint).is_dir():
            loading.check(run.policy.checkpoint)
        grounding = run.sft is not None and run.sft.grounding
        if grounding and run.policy.checkpoint is None and not run.policy.pointers:
            raise RoveError(NO_POINTERS)

    def unreadable(self, instruction: str, /) -> str | None:
        """Return the first word that is not in the vocabulary; see `Policy.unreadable`."""
        return None if self.tokenizer is None else self.tokenizer.unknown(instruction)

    @staticmethod
    def unknown_word(vocabulary: Sequence[str], instructions: Sequence[str]) -> str | None:
        """Return the first word that a new policy's tokenizer lacks; see `Policy.unknown_word`."""
        tokenizer = word_tokenizer(vocabulary)
        words = (unknown_word(tokenizer, text.strip().lower()) for text in instructions)
        return next((word for word in words if word is not None), None)

    @staticmethod
    def memory(run: Run) -> str:
        """Describe what a run needs on the device that holds its policy, before anything is loaded."""
        return str(estimate(run))

    @staticmethod
    def work(run: Run) -> Work:
        """Count what acting and training cost a device, before anything is loaded."""
        return count_work(run)

    # --- the Policy contract ----------------------------------------------------------------------

    def act(
        self,
        observation: Observation,
        mode: Mode,
        noise: SamplingNoise | None = None,
        samples: int | None = None,
    ) -> ActionChunk:
        """Choose a chunk of actions; see `Policy.act`. Raises RoveError where "sample" has no noise."""
        if mode == "sample":
            refuse_rl(self.action_head)
            if noise is None:
                raise RoveError("act(mode='sample') needs noise; pass a SamplingNoise, or mode='greedy'.")
        else:
            noise = None
        rows = len(observation)
        if self.compiled:
            observation, noise = padded(observation, noise)
        uniform = None
        if noise is not None:
            uniform = noise.uniform((samples or 1) * self._count).unflatten(1, (-1, self._count))
        with torch.inference_mode(), lora.lowered(self.adapters):
            inputs, uniform = self._inputs(observation, uniform, PROMPT_MULTIPLE if self.compiled else 1)
            if self.compiled and self.device.type == "cuda":
                self._graphs = self._graphs or Graphs(self._choose, self.vlm.lm_head.weight)
                chosen = self._graphs(inputs, uniform, samples)
            else:
                chosen = self._choose(inputs, uniform, samples)
        # Clones made outside of inference mode may enter a graph, as old log-probabilities do.
        actions, tokens, logprob, value = chosen
        return ActionChunk(
            actions=actions[:rows].clone(),
            sample=tokens[:rows].clone(),
            logprob=logprob[:rows].clone(),
            value=None if value is None else value[:rows].clone(),
        )

    def _choose(self, inputs: Inputs, uniform: Tensor | None, samples: int | None) -> ChunkFields:
        """Choose actions without reading numbers on the host, so that a CUDA graph can capture it.

        `uniform` is [B, G, C·A]; without it the likeliest tokens are chosen.
        """
        prefix = self._prefix(inputs)
        if self.action_head is not None:
            normalized = self.action_head(self._parallel(prefix))
            actions = self._in_units(normalized)
            tokens = bins.tokenize(normalized, self.vlm.vocab_size)
            return actions, tokens, torch.zeros_like(actions), None
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
        tokens = self._sampled(column + self.vlm.vocab_size - BINS, samples)
        actions = self._in_units(self.detokenize(tokens))
        # Values of the hidden states that chose the actions: prompt and pictures are seen once for both.
        value = self._row_value(hidden, len(prefix.embeddings))
        return actions, tokens, self._sampled(logp.gather(-1, column), samples), value

    def evaluate(
        self,
        observation: Observation,
        tokens: Tensor,
        /,
        temperature: float | None = None,
        smoothing: float = 0.0,
    ) -> PolicyOutput:
        """Evaluate given action tokens; see `TokenPolicy.evaluate`. Raises RoveError with an L1 head."""
        refuse_rl(self.action_head)
        samples = tokens.shape[1] if tokens.ndim == 4 else None
        inputs, given = self._inputs(observation, tokens)
        column = given.flatten(-2) - (self.vlm.vocab_size - BINS)  # [B, N] or [B, G, N]
        prefix = self._prefix(inputs)
        if self.decoding == "parallel":
            hidden = self._parallel(prefix)
            column = column.view(len(column), -1, self._count).mT
        else:
            column = column.view(-1, self._count)
            given = column + self.vlm.vocab_size - BINS
            hidden = self._hidden(prefix.repeat(samples) if samples else prefix, given)
            column = column[..., None]
        logp = (self.vlm.action_logits(hidden) / (temperature or self.temperature)).log_softmax(dim=-1)
        entropy = -(logp.exp() * logp).sum(dim=-1, keepdim=True).expand_as(column)
        taken = self._spread(logp, column, smoothing) if smoothing else logp.gather(-1, column)
        return PolicyOutput(
            logprob=self._sampled(taken, samples),
            entropy=self._sampled(entropy, samples),
            value=self._row_value(hidden, len(prefix.embeddings)),
            pointing=prefix.pointing,
        )

    def value(self, observation: Observation) -> Tensor:
        """Compute values alone; see `Policy.value`."""
        if self.value_head is None:
            raise RoveError("This policy has no critic; set policy.value_head.")
        first = self.decoding == "autoregressive" or self.value_head.config.source == "first"
        prefix = self._prefix(self._inputs(observation)[0])
        if first and self.attention == "causal":
            return self._value(decoding.prompt_state(self.vlm, prefix, self.attention))
        return self._value(self._parallel(prefix))

    def point(self, observation: Observation) -> Tensor:
        """Compute pointing logits alone; see `Locator.point`."""
        seen, _ = self._inputs(replace(observation, state=None))
        logits = self.vlm.point(self.vlm.patches(seen.ids, seen.mask, self.process_images(seen.images)))
        if logits is None:
            raise RoveError(NO_POINTERS)
        return logits

    def preflight(self, conventions: Conventions, *, rl: bool) -> list[Finding]:
        """Check whether this policy fits a suite; see `Policy.preflight`."""
        return preflight.examine(self, conventions, rl=rl)

    @property
    def regresses(self) -> bool:
        """True where actions come from the L1 head; see `Regressor.regresses`."""
        return self.action_head is not None

    def regress(self, observation: Observation) -> Tensor:
        """Predict normalised actions; see `Regressor.regress`."""
        if self.action_head is None:
            raise RoveError("This policy has no regression head; set policy.head to l1.")
        return self.action_head(self._parallel(self._prefix(self._inputs(observation)[0])))

    def normalize(self, actions: Tensor) -> Tensor:
        """Normalise actions; see `Regressor.normalize`."""
        # As OpenVLA-OFT's data are: beyond the percentiles, where a dimension hardly moves, lie huge numbers.
        return self._statistics().normalize(transfer.to(actions, self.device)).clamp(-1.0, 1.0).float()

    # --- inside -----------------------------------------------------------------------------------

    def _spread(self, logp: Tensor, column: Tensor, width: float) -> Tensor:
        """Average log-probabilities [B, C·A, 256] around columns [B, C·A, G], but for actions at rest."""
        rests = self._statistics().centred.repeat(self.chunk)[:, None]
        return bins.smooth(logp, column, width, rests & (column == bins.ZERO))

    def _in_units(self, normalized: Tensor) -> Tensor:
        # Percentiles of the data may lie outside of what the environment accepts, by rounding at least.
        return self.unnormalize(normalized).float().clamp(self.low, self.high)

    def _prompt(self, observation: Observation, multiple: int = 1) -> tuple[Tensor, Tensor | None]:
        """Return the prompts' token ids and mask, on the host; see `PromptTokenizer`."""
        if self.tokenizer is None:
            raise RoveError(NO_TOKENIZER)
        return self.tokenizer(observation.instruction, multiple)

    def _inputs(
        self, observation: Observation, more: Tensor | None = None, multiple: int = 1
    ) -> tuple[Inputs, Any]:
        """Return the model's inputs, and `more`, on its device, moved from the host in one transfer."""
        ids, mask = self._prompt(observation, multiple)
        state = observation.state if self.state_normalizer is not None else None
        return transfer.to((Inputs(observation.images, ids, mask, state), more), self.device)

    def _prefix(self, seen: Inputs) -> Prefix:
        state = None
        if self.state_normalizer is not None:
            given = 0 if seen.state is None else seen.state.shape[-1]
            if seen.state is None or given != self.state_size:
                raise RoveError(
                    f"The policy reads {self.state_size} numbers of the robot's state, and the observation "
                    f"has {given or 'none'}."
                )
            state = self.state_normalizer.normalize(seen.state).clamp(-1.0, 1.0).float()
        return self.vlm.prefix(seen.ids, seen.mask, self.process_images(seen.images), state)

    def _row_value(self, hidden: Tensor, rows: int) -> Tensor | None:
        """Compute values of B rows; samples of a row that have hidden states of their own share one value."""
        if self.value_head is None:
            return None
        value = self._value(hidden)
        return value[:: len(value) // rows]

    def _sampled(self, x: Tensor, samples: int | None) -> Tensor:
        """Reshape [B, C·A, G] or [B·G, C·A, 1] to [B, G, C, A]; without `samples`, to [B, C, A]."""
        rows = x.mT.reshape(-1, samples or 1, self.chunk, self.action_spec.dim)
        return rows if samples else rows.squeeze(1)
