"""A Llama reduced to the needs of a policy.

Modules, weights' names and configuration are those of `transformers`; the forward pass is ours. The last
layer's output is computed at the positions that are read, the rotary table is made once, and causal attention
never needs a mask: entries that are not attended come last in their row, where nothing that is read looks at
them. So a GPU serves it by its fastest kernel, whatever the lengths of the prompts.
"""

from __future__ import annotations

from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from rove.policies import lora
from rove.policies.base import maybe_checkpoint

Attention = Literal["causal", "bidirectional"]
Rope = tuple[Tensor, Tensor]
"""Cosine and signed sine of every channel; see `rotary`."""
Buffers = tuple[Tensor, Tensor]
"""Keys and values of one layer, [B, heads, capacity, d] each."""
Cache = list[Buffers]
"""Keys and values of every layer."""


def make_cache(model: LlamaModel, batch: int, capacity: int, like: Tensor) -> Cache:
    """Make a zeroed cache whose buffers keep one size from the first token to the last.

    A step attends over a whole buffer, and a mask leaves out the entries that are not filled yet: its shapes
    never change, so that it can be compiled, or captured, once.
    """
    config = model.config
    dim = config.hidden_size // config.num_attention_heads
    shape = (batch, config.num_key_value_heads or config.num_attention_heads, capacity, dim)
    return [(like.new_zeros(shape), like.new_zeros(shape)) for _ in model.layers]


def first_come(valid: Tensor, capacity: int) -> Tensor:
    """Return which cache entries are filled, bool [B, capacity]: the first n of each row, n counted in
    `valid` [B, L]."""
    return torch.arange(capacity, device=valid.device) < valid.sum(1, keepdim=True)


def bidirectional_mask(valid: Tensor) -> Tensor:
    """Return the attention mask, bool [B, 1, L, L], True where a position may look; `valid` is bool [B, L].

    A position that is not valid still attends to itself, so that no softmax is empty.
    """
    itself = torch.eye(valid.shape[1], dtype=torch.bool, device=valid.device)
    return valid[:, None, None, :] | itself


def rotary(model: LlamaModel, position: Tensor, dtype: torch.dtype) -> Rope:
    """Return cosine and sine [..., 1, L, d] of rotary embedding for `position` int64 [L] or [B, L].

    Su et al. 2021, RoFormer, section 3.2.2, with the half-split layout of Llama checkpoints: channel i turns
    with channel i + d/2, and the sine of the lower half is negated, so that a head turns by `x·cos +
    roll(x)·sin`.
    """
    dim = model.config.hidden_size // model.config.num_attention_heads
    theta = cast(dict[str, float], model.config.rope_parameters)["rope_theta"]
    exponent = torch.arange(0, dim, 2, dtype=torch.float32, device=position.device) / dim
    angle = (position[..., None].float() / theta**exponent).unsqueeze(-3)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat((cos, cos), -1).to(dtype), torch.cat((-sin, sin), -1).to(dtype)


class _Rotate(torch.autograd.Function):
    """Rotation `x·cos + roll(x)·sin` in three passes over memory, and the rotation back as its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # pyright: ignore
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore
        cos, sin = ctx.saved_tensors
        return _turned(gradient, cos, -sin), None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return (x * cos).addcmul_(x.roll(x.shape[-1] // 2, -1), sin)


def _rotate(x: Tensor, rope: Rope) -> Tensor:
    """Rotate heads [B, heads, L, d] by their positions."""
    return _Rotate.apply(x, *rope)  # pyright: ignore[reportReturnType]


class Layer(LlamaDecoderLayer):
    """A transformer layer: attention and MLP, each with its norm, added to the residual stream."""

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        x: Tensor,
        rope: Rope,
        mask: Tensor | None,
        causal: bool,
        read: int | Tensor | None = None,
        buffers: Buffers | None = None,
        slot: Tensor | None = None,
    ) -> Tensor:
        """Apply the layer, [B, L, D] -> [B, L, D]; `read` selects output positions (`select_positions`).

        `buffers` are filled with the first keys and values. Where `slot`, int64 [1], is given, the input is
        one position, which is stored at that entry and attends to all of them.
        """
        attention, mlp = self.self_attn, self.mlp
        normed = rms_norm(self.input_layernorm, x)
        query, key, value = (
            y.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
            for y in lora.linear(normed, attention.q_proj, attention.k_proj, attention.v_proj)
        )
        query, key = _rotate(query, rope), _rotate(key, rope)
        for buffer, new in zip(buffers or (), (key, value), strict=False):
            if slot is None:
                buffer[:, :, : new.shape[2]] = new
            else:
                buffer.index_copy_(2, slot, new.to(buffer.dtype))
        if buffers is not None and slot is not None:
            key, value = buffers
        mixed = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            is_causal=causal,
            scale=attention.scaling,
            enable_gqa=attention.num_key_value_groups > 1,
        )
        mixed = mixed.transpose(1, 2).flatten(2)
        if read is not None:
            mixed, x = select_positions(mixed, read), select_positions(x, read)
        (x,) = lora.linear(mixed, attention.o_proj, plus=x)
        gate, up = lora.linear(rms_norm(self.post_attention_layernorm, x), mlp.gate_proj, mlp.up_proj)
        (x,) = lora.linear(F.silu(gate) * up, mlp.down_proj, plus=x)
        return x


def rms_norm(norm: nn.Module, x: Tensor) -> Tensor:
    """Apply a Llama's root-mean-square norm as one operation."""
    weight = cast(Tensor, norm.weight)
    return F.rms_norm(x, x.shape[-1:], weight, cast(float, norm.variance_epsilon))


def select_positions(x: Tensor, read: int | Tensor) -> Tensor:
    """Select from [B, L, D] the last `read` positions, or those that `read` names, int64 [B, n]."""
    if isinstance(read, int):
        return x[:, -read:]
    return x.gather(1, read[..., None].expand(-1, -1, x.shape[2]))


class Llama(LlamaModel):
    """The language model: `transformers`' Llama with a forward pass of its own; see the module."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.layers = nn.ModuleList(Layer(config, index) for index in range(config.num_hidden_layers))
        del self.rotary_emb

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        embeddings: Tensor,
        *,
        outputs: int,
        valid: Tensor | None = None,
        attention: Attention = "causal",
        cache: Cache | None = None,
    ) -> Tensor:
        """Compute hidden states after the final norm at the last `outputs` positions, [B, outputs, D].

        `embeddings` is [B, S, D]; `valid`, bool [B, S], marks the attended entries (None: all), among them
        the last `outputs`. Position ids count them. A `cache` is filled for the steps that follow, in each
        row with the attended entries first: see `first_come`.
        """
        length = embeddings.shape[1]
        position = torch.arange(length, device=embeddings.device)
        mask, read = None, outputs if outputs < length else None
        if valid is not None and attention == "causal":
            order = valid.long().argsort(dim=1, descending=True, stable=True)
            embeddings = select_positions(embeddings, order)
            read = valid.sum(1, keepdim=True) - outputs + position[:outputs]
        elif valid is not None:
            mask = bidirectional_mask(valid)
            position = (valid.long().cumsum(1) - 1).clamp_min(0)
        rope = rotary(self, position, embeddings.dtype)
        x, last = embeddings, len(self.layers) - 1
        for index, layer in enumerate(self.layers):
            buffers = None if cache is None else cache[index]
            x = maybe_checkpoint(
                layer, x, rope, mask, attention == "causal", read if index == last else None, buffers
            )
        return rms_norm(self.norm, x)

    def step(
        self,
        embedding: Tensor,
        cache: Cache,
        slot: Tensor,
        position: Tensor,
        valid: Tensor,
    ) -> Tensor:
        """Compute the hidden state [B, 1, D] after one more token, [B, 1, D].

        The token is stored at entry `slot`, int64 [1]. `position` is int64 [B, 1]; `valid`, bool [B,
        capacity], marks the attended entries, the new one included.
        """
        rope = rotary(self, position, embedding.dtype)
        mask = valid[:, None, None, :]
        x = embedding
        for layer, buffers in zip(self.layers, cache, strict=True):
            x = layer(x, rope, mask, False, None, buffers, slot)
        return rms_norm(self.norm, x)
