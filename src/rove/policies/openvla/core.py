"""The model of a policy apart from text: token ids and pixels in, action logits out, tokens to units."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Self, overload

import torch
from torch import Tensor, nn

from rove import transfer
from rove.config.schema import LoraConfig
from rove.errors import RoveError
from rove.policies import lora
from rove.policies.critic import ValueHead
from rove.policies.lora import LoraLinear
from rove.policies.openvla import bins, decoding
from rove.policies.openvla.bins import Normalizer
from rove.policies.openvla.decoding import Decoding
from rove.policies.openvla.graphs import Graphs
from rove.policies.openvla.heads import L1Head
from rove.policies.openvla.images import process
from rove.policies.openvla.language import Attention
from rove.policies.openvla.settings import Settings
from rove.policies.openvla.vlm import Prefix, PrismaticVLM


class ActionModel(nn.Module):
    """A model that maps token ids and pixels to logits and values of a chunk of actions."""

    value_head: ValueHead | None
    mean: Tensor
    std: Tensor
    low: Tensor
    high: Tensor

    def __init__(self, settings: Settings) -> None:
        """Make the modules on the meta device; `build` or `from_pretrained` fills in the weights."""
        super().__init__()
        checkpoint, spec = settings.checkpoint, settings.action_spec
        self.checkpoint = checkpoint
        self.decoding: Decoding = settings.decoding
        self.attention: Attention = settings.attention
        self.chunk = settings.chunk
        self.temperature = settings.temperature
        self.num_images = settings.num_images
        self.center_crop = checkpoint.center_crop if settings.center_crop is None else settings.center_crop
        self.action_spec = spec
        self.statistics = dict(settings.statistics)
        self.unnorm_key = bins.choose_key(self.statistics, settings.unnorm_key)
        self.tokenizer = settings.tokenizer
        self.lora: LoraConfig | None = None
        self.adapters: tuple[LoraLinear, ...] = ()
        self.base: str | None = None
        """The checkpoint with the weights beneath the adapters; None where only this policy has them."""
        self.trainable: frozenset[str] = frozenset()
        """Names of the parameters of `vlm` that are trained where there are no adapters."""
        self._read_statistics(settings)
        with torch.device("meta"):
            self._make_modules(settings)
        self.compiled = settings.compiled
        self._graphs: Graphs | None = None
        if self.compiled:
            self._compile_blocks()
        mean, std = zip(*checkpoint.normalization, strict=True)
        for name, values in (
            ("mean", 255 * torch.tensor(mean).flatten()),
            ("std", 255 * torch.tensor(std).flatten()),
            ("low", torch.tensor(spec.low)),
            ("high", torch.tensor(spec.high)),
        ):
            self.register_buffer(name, values, persistent=False)

    @property
    def lowered_bytes(self) -> int:
        """Bytes of the low-precision copies of adapters that inference uses; see `lora.lowered`."""
        pairs = [side for layer in self.adapters for side in layer.pair]
        dtype = self.vlm.lm_head.weight.dtype
        return sum(side.numel() * dtype.itemsize for side in pairs if side.dtype != dtype)

    @property
    def device(self) -> torch.device:
        """The device that holds the weights."""
        return self.vlm.lm_head.weight.device

    def process_images(self, images: Tensor, center_crop: bool | None = None) -> Tensor:
        """Convert uint8 images [B, n, H, W, 3] to pixel values [B, 3·towers·n, size, size].

        The result is on the model's device. `center_crop=None` stands for the policy's own setting.
        """
        crop = bool(self.center_crop if center_crop is None else center_crop)
        size = self.checkpoint.image_size
        how = self.checkpoint.interpolation
        images = transfer.to(images, self.device)
        with torch.autocast(self.device.type, enabled=False):  # pictures have eight bits, as many as bfloat16
            return process(images, size, self.mean, self.std, center_crop=crop, interpolation=how)

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
        """Compute logits, float32 [B, C, A, 256], at temperature 1; column j is id `vocab_size - 256 + j`.

        `input_ids` [B, L] is padded on the left where `attention_mask` [B, L] is False (None: nowhere).
        Autoregressive decoding is teacher-forced by `tokens` [B, C, A] (any vocabulary ids), or greedy over
        the action tokens where they are None; parallel decoding does not look at them. With `return_hidden`
        it also returns the hidden states [B, C·A, D] that predict each token, after the final norm.
        """
        given = (input_ids, attention_mask, pixel_values, tokens, state)
        input_ids, attention_mask, pixel_values, tokens, state = transfer.to(given, self.device)
        prefix = self.vlm.prefix(input_ids, attention_mask, pixel_values, state)
        if self.decoding == "autoregressive" and tokens is None:
            _, logits, hidden = decoding.one_by_one(self.vlm, prefix, self._count, 1.0, None)
        else:
            hidden = self._hidden(prefix, None if tokens is None else tokens.flatten(1))
            logits = self.vlm.action_logits(hidden)
        return (self._chunked(logits), hidden) if return_hidden else self._chunked(logits)

    def tokenize(self, actions: Tensor) -> Tensor:
        """Convert actions [B, C, A] in the units of the statistics to int64 token ids [B, C, A]."""
        return bins.tokenize(
            self._statistics().normalize(transfer.to(actions, self.device)), self.vlm.vocab_size
        )

    def detokenize(self, tokens: Tensor) -> Tensor:
        """Convert token ids to normalised actions, float64 [B, C, A] in (-1, 1)."""
        return bins.detokenize(tokens, self.vlm.vocab_size)

    def unnormalize(self, normalized: Tensor) -> Tensor:
        """Convert normalised actions to the statistics' units, float64; RoveError without a data set."""
        return self._statistics().unnormalize(normalized)

    def adapt(self, config: LoraConfig, generator: torch.Generator) -> None:
        """Put new adapters beside the weights, which are frozen; see `lora.inject`."""
        lora.inject(self.vlm, config, generator)
        self.lora, self.adapters = config, tuple(lora.adapted(self.vlm).values())

    def merge(self) -> Self:
        """Add the adapters to the weights, so that a checkpoint stands by itself; returns self."""
        if self.lora is not None:
            lora.merge(self.vlm)
            for name, parameter in self.vlm.named_parameters():
                parameter.requires_grad_(name in self.trainable)
            self.lora, self.adapters, self.base = None, (), None
        return self

    # --- inside -----------------------------------------------------------------------------------

    def _read_statistics(self, settings: Settings) -> None:
        """Make the normalizers of actions and state from the chosen data set's statistics."""
        chosen = {} if self.unnorm_key is None else self.statistics[self.unnorm_key]
        self.normalizer = Normalizer(chosen["action"]) if chosen else None
        if self.normalizer is not None and self.normalizer.dim != self.action_spec.dim:
            raise RoveError(
                f"The statistics {self.unnorm_key!r} have {self.normalizer.dim} action dimensions, "
                f"the action spec has {self.action_spec.dim} ({', '.join(self.action_spec.names)})."
            )
        self.state_normalizer = self._read_state(chosen) if settings.proprio else None
        self.state_size = self.state_normalizer.dim if self.state_normalizer else 0

    def _make_modules(self, settings: Settings) -> None:
        """Make the model and its heads, in the order that a state dict lists them."""
        checkpoint, spec = settings.checkpoint, settings.action_spec
        self.vlm = PrismaticVLM(
            checkpoint.towers,
            checkpoint.llama,
            image_size=checkpoint.image_size,
            vocab_size=checkpoint.vocab_size,
            placeholders=settings.chunk * spec.dim if settings.placeholders == "learned" else 0,
            film=settings.film,
            proprio=self.state_size,
            pointers=settings.pointers,
            pointed=settings.pointed,
        )
        width, head = checkpoint.llama.hidden_size, settings.value_head
        self.value_head = None if head is None else ValueHead(head, width=width, chunk=settings.chunk)
        self.action_head = L1Head(width, spec.dim) if settings.head == "l1" else None

    def _compile_blocks(self) -> None:
        """Compile every block of towers and language model with torch.compile, one piece each. Blocks of one
        kind share what is compiled; the shapes that a policy meets make more kinds than the usual limit."""
        torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
        for block in self.vlm.blocks():
            block.compile(fullgraph=True)

    @property
    def _count(self) -> int:
        return self.chunk * self.action_spec.dim

    def _statistics(self) -> Normalizer:
        if self.normalizer is None:
            raise bins.no_key(self.statistics)
        return self.normalizer

    def _read_state(self, statistics: Mapping[str, Any]) -> Normalizer:
        if "proprio" not in statistics:
            raise RoveError(
                f"The policy reads the robot's state, but the statistics {self.unnorm_key!r} have none "
                "('proprio'): the suite or its demonstrations lack it. Set policy.proprio false."
            )
        return Normalizer(statistics["proprio"])

    def _parallel(self, prefix: Prefix) -> Tensor:
        return decoding.parallel(self.vlm, prefix, self._count, self.attention, self.checkpoint.stop_token)

    def _hidden(self, prefix: Prefix, tokens: Tensor | None) -> Tensor:
        """Compute the hidden states [B, C·A, D] that predict each token, given `tokens` [B, C·A]."""
        if self.decoding == "parallel":
            return self._parallel(prefix)
        assert tokens is not None
        return decoding.teacher_forced(self.vlm, prefix, tokens)

    def _value(self, hidden: Tensor) -> Tensor:
        # Of tokens decoded one by one, only the first position has not seen the action it judges.
        assert self.value_head is not None
        return self.value_head(hidden[:, :1] if self.decoding == "autoregressive" else hidden)

    def _chunked(self, x: Tensor) -> Tensor:
        """Reshape [B, C·A, ...] to [B, C, A, ...]."""
        return x.unflatten(1, (self.chunk, self.action_spec.dim))
