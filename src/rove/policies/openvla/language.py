"""The forward pass of a Hugging Face Llama, without what a policy does not need.

The modules, and so the weights' names and any adapter wrapped around a projection, are those of
`transformers`; only the pass is ours: the last layer is evaluated at the positions that are read, and the
rotary table and the mask are made once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from rove.policies.base import through

Attention = Literal["causal", "bidirectional"]


class KVCache:
    """Keys and values of every layer, in buffers of one size from the first token to the last.

    A step attends over all of a buffer and a mask leaves out what is not there yet: its shapes never change,
    so that it can be compiled, or captured, once.
    """

    def __init__(self, model: LlamaModel, batch: int, capacity: int, like: Tensor) -> None:
        config = model.config
        dim = config.hidden_size // config.num_attention_heads
        shape = (batch, config.num_key_value_heads or config.num_attention_heads, capacity, dim)
        self.layers = [(like.new_zeros(shape), like.new_zeros(shape)) for _ in model.layers]

    def fill(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store the first entries, [B, heads, S, d], and return them."""
        for buffer, new in zip(self.layers[layer], (key, value), strict=True):
            buffer[:, :, : new.shape[2]] = new
        return key, value


def attention_mask(valid: Tensor, attention: Attention, queries: int) -> Tensor:
    """bool [B, 1, queries, L], True where one of the last `queries` positions may look.

    `valid` is bool [B, L]. A position that is not valid still sees itself, so that no softmax is empty.
    """
    length = valid.shape[1]
    allowed = valid[:, None, None, :].expand(-1, 1, queries, length)
    if attention == "causal":
        ones = torch.ones(queries, length, dtype=torch.bool, device=valid.device)
        allowed = allowed & ones.tril(length - queries)
    itself = torch.eye(length, dtype=torch.bool, device=valid.device)[length - queries :]
    return allowed | itself


def rotary(model: LlamaModel, position: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine [..., 1, L, d/2] of rotary embedding for `position` int64 [L] or [B, L].

    Su et al. 2021, RoFormer, section 3.2.2, with the half-split layout of Llama checkpoints.
    """
    dim = model.config.hidden_size // model.config.num_attention_heads
    theta = cast(dict[str, float], model.config.rope_parameters)["rope_theta"]
    exponent = torch.arange(0, dim, 2, dtype=torch.float32, device=position.device) / dim
    inverse = 1.0 / theta**exponent
    angle = (position[..., None].float() * inverse).unsqueeze(-3)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def _heads(x: Tensor, dim: int) -> Tensor:
    return x.unflatten(-1, (-1, dim)).transpose(1, 2)


Store = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Takes a layer's new keys and values, returns all that are to be attended to."""


def _layer(
    layer: LlamaDecoderLayer,
    x: Tensor,
    rope: tuple[Tensor, Tensor],
    mask: Tensor | None,
    causal: bool,
    outputs: int,
    store: Store | None,
) -> Tensor:
    attention = layer.self_attn
    cos, sin = rope
    normed = layer.input_layernorm(x)
    key = _rotate(_heads(attention.k_proj(normed), attention.head_dim), cos, sin)
    value = _heads(attention.v_proj(normed), attention.head_dim)
    if store is not None:
        key, value = store(key, value)
    if outputs < x.shape[1]:
        x, normed = x[:, -outputs:], normed[:, -outputs:]
        cos, sin = cos[..., -outputs:, :], sin[..., -outputs:, :]
    query = _rotate(_heads(attention.q_proj(normed), attention.head_dim), cos, sin)
    mixed = F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        is_causal=causal and mask is None,
        scale=attention.scaling,
        enable_gqa=attention.num_key_value_groups > 1,
    )
    x = x + attention.o_proj(mixed.transpose(1, 2).flatten(2))
    return x + layer.mlp(layer.post_attention_layernorm(x))


def forward(
    model: LlamaModel,
    embeddings: Tensor,
    *,
    outputs: int,
    valid: Tensor | None = None,
    attention: Attention = "causal",
    cache: KVCache | None = None,
) -> Tensor:
    """Hidden states after the final norm at the last `outputs` positions, [B, outputs, D].

    `embeddings` is [B, S, D]; `valid`, bool [B, S], marks the attended entries (None: all), and position
    ids count them. A `cache` is filled for the steps that follow.
    """
    length = embeddings.shape[1]
    if valid is None:
        position = torch.arange(length, device=embeddings.device)
    else:
        position = (valid.long().cumsum(1) - 1).clamp_min(0)
    causal = attention == "causal" and length > 1
    mask = None if valid is None else attention_mask(valid, attention, length)
    rope = rotary(model, position, embeddings.dtype)
    x = embeddings
    final = len(model.layers) - 1
    for index, layer in enumerate(cast(Iterable[LlamaDecoderLayer], model.layers)):
        count = outputs if index == final else length
        if count < length:
            # A window of queries that ends at the last key is no longer what SDPA calls causal.
            if mask is not None:
                mask = mask[:, :, -count:]
            elif causal:
                everything = torch.ones(1, length, dtype=torch.bool, device=x.device)
                mask = attention_mask(everything, attention, count)
        store = None if cache is None else partial(cache.fill, index)
        x = through(layer, _layer, layer, x, rope, mask, causal, count, store)
    return model.norm(x)


def step(
    model: LlamaModel,
    embedding: Tensor,
    cache: list[tuple[Tensor, Tensor]],
    slot: Tensor,
    position: Tensor,
    valid: Tensor,
) -> Tensor:
    """Hidden state [B, 1, D] after one more token, [B, 1, D], which is stored at `slot`, int64 [1].

    `cache` is that of a `KVCache`; `position` int64 [B, 1]; `valid` bool [B, capacity] marks what is attended
    to, the new entry included.
    """
    rope = rotary(model, position, embedding.dtype)
    mask = valid[:, None, None, :]
    x = embedding
    for layer, buffers in zip(cast(Iterable[LlamaDecoderLayer], model.layers), cache, strict=True):

        def store(
            key: Tensor, value: Tensor, buffers: tuple[Tensor, Tensor] = buffers
        ) -> tuple[Tensor, Tensor]:
            for buffer, new in zip(buffers, (key, value), strict=True):
                buffer.index_copy_(2, slot, new.to(buffer.dtype))
            return buffers

        x = _layer(layer, x, rope, mask, False, 1, store)
    return model.norm(x)
