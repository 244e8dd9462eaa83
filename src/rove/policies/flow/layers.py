"""The layers of flow policies: one block for every language model and expert, the vision tower, time.

Parameters have the names of the published checkpoints, those of `transformers`.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import SiglipVisionConfig, SiglipVisionModel

from rove.policies import lora
from rove.policies.base import maybe_checkpoint
from rove.policies.flow.config import TextSizes, VisionSizes

ROPE_THETA = 10000.0
"""Base of the rotary embedding's wavelengths, in SmolVLA too, whose VLM alone has 100000."""

Angles = tuple[Tensor, Tensor]
"""Cosine and sine of the rotary embedding, float32 [B, 1, L, head channels / 2] each."""


def rotary(positions: Tensor, head_dim: int) -> Angles:
    """Return the angles of positions [B, L]."""
    half = torch.arange(head_dim // 2, device=positions.device, dtype=torch.float32) / (head_dim // 2)
    angle = positions[:, None, :, None].float() / ROPE_THETA**half
    return angle.cos(), angle.sin()


def rotate(x: Tensor, angles: Angles) -> Tensor:
    """Rotate heads [B, heads, L, channels] by their positions, half against half."""
    (a, b), (cos, sin) = x.float().chunk(2, dim=-1), angles
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Return attention of q [B, heads, Q, channels] to keys [B, fewer heads, K, channels], [B, Q, width].

    `mask` is bool [B, 1, Q, K], True where a query sees a key.
    """
    if k.shape[1] == 1 or k.shape[1] == q.shape[1]:
        k, v = (x.expand(-1, q.shape[1], -1, -1) for x in (k, v))
    else:
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


class RMSNorm(nn.Module):
    """Root-mean-square norm in float32; `centred` weights are those of Gemma, which add to one."""

    def __init__(self, width: int, eps: float, *, centred: bool) -> None:
        super().__init__()
        self.eps, self.one = eps, float(centred)
        self.weight = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor, condition: Tensor | None = None) -> tuple[Tensor, None]:
        """Normalise [..., width]; the second answer is a gate, which there is none of."""
        y = _normed(x, self.eps) * (self.one + self.weight.float())
        return y.to(x.dtype), None


class AdaptiveNorm(nn.Module):
    """Root-mean-square norm whose scale, shift and gate are read from a condition: π0.5's adaRMS."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.dense = nn.Linear(width, 3 * width)

    def forward(self, x: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        """Normalise x [B, L, width] by the condition [B, width]; returns the gate [B, 1, width] as well."""
        modulation = self.dense(condition.to(self.dense.weight.dtype))
        scale, shift, gate = modulation[:, None].chunk(3, dim=-1)
        y = _normed(x, self.eps) * (1 + scale.float()) + shift.float()
        return y.to(x.dtype), gate.to(x.dtype)


def _normed(x: Tensor, eps: float) -> Tensor:
    y = x.float()
    return y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps)


class Attention(nn.Module):
    """The projections of an attention layer."""

    def __init__(self, sizes: TextSizes, key_inputs: int | None = None) -> None:
        super().__init__()
        inner, keys = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
        self.head_dim = sizes.head_dim
        self.q_proj = nn.Linear(sizes.width, inner, bias=False)
        self.k_proj = nn.Linear(key_inputs or sizes.width, keys, bias=False)
        self.v_proj = nn.Linear(key_inputs or sizes.width, keys, bias=False)
        self.o_proj = nn.Linear(inner, sizes.width, bias=False)

    def heads(self, x: Tensor) -> Tensor:
        """Split [B, L, heads · channels] into [B, heads, L, channels]."""
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


class GatedMLP(nn.Module):
    """The MLP of a layer, gated by GELU in the Gemma kind and by SiLU in the Llama kind."""

    def __init__(self, width: int, inner: int, *, gemma: bool) -> None:
        super().__init__()
        self.gemma = gemma
        self.gate_proj, self.up_proj = (nn.Linear(width, inner, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the MLP to [..., width]."""
        gate, up = lora.linear(x, self.gate_proj, self.up_proj)
        gate = F.gelu(gate, approximate="tanh") if self.gemma else F.silu(gate)
        return self.down_proj(gate * up)


class Block(nn.Module):
    """A layer of a language model or of an expert, which attends to the prefix's keys and values too."""

    cross = False
    """True where the layer attends to the prefix alone."""

    def __init__(
        self, sizes: TextSizes, *, gemma: bool, adaptive: bool = False, key_inputs: int | None = None
    ) -> None:
        super().__init__()
        self.self_attn = Attention(sizes, key_inputs)
        self.mlp = GatedMLP(sizes.width, sizes.mlp, gemma=gemma)
        self.input_layernorm = make_norm(sizes, gemma=gemma, adaptive=adaptive)
        self.post_attention_layernorm = make_norm(sizes, gemma=gemma, adaptive=adaptive)

    def forward(
        self,
        x: Tensor,
        angles: Angles,
        mask: Tensor,
        past: tuple[Tensor, Tensor] | None = None,
        condition: Tensor | None = None,
        keys_only: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Apply the layer to x [B, L, width]; returns its own keys and values as well, after rotation.

        `past` are keys and values that precede its own; `mask` is [B, 1, L, past + L]. With `keys_only` the
        rest of the layer is not computed, and x comes back as it is.
        """
        own = self.self_attn
        y, gate = self.input_layernorm(x, condition)
        if keys_only:
            k, v = map(own.heads, lora.linear(y, own.k_proj, own.v_proj))
            return x, rotate(k, angles), v
        q, k, v = map(own.heads, lora.linear(y, own.q_proj, own.k_proj, own.v_proj))
        q, k = rotate(q, angles), rotate(k, angles)
        keys, values = k, v
        if past is not None:
            keys, values = torch.cat((past[0], k), dim=2), torch.cat((past[1], v), dim=2)
        return self._finish(x, attend(q, keys, values, mask), gate, condition), k, v

    def _finish(self, x: Tensor, seen: Tensor, gate: Tensor | None, condition: Tensor | None) -> Tensor:
        x = _add(x, gate, self.self_attn.o_proj(seen))
        y, gate = self.post_attention_layernorm(x, condition)
        return _add(x, gate, self.mlp(y))


class CrossBlock(Block):
    """A layer of SmolVLA's expert that attends to the prefix alone, whose keys and values it projects."""

    cross = True

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        x: Tensor,
        angles: Angles,
        mask: Tensor,
        past: tuple[Tensor, Tensor],
        condition: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Apply the layer; `mask` is [B, 1, L, past]. Keys of the prefix are rotated already."""
        own = self.self_attn
        y, gate = self.input_layernorm(x, condition)
        q = rotate(own.heads(own.q_proj(y)), angles)
        flat = (part.transpose(1, 2).flatten(2) for part in past)
        k, v = (own.heads(proj(part)) for proj, part in zip((own.k_proj, own.v_proj), flat, strict=True))
        return self._finish(x, attend(q, k, v, mask), gate, condition), k, v


def make_norm(sizes: TextSizes, *, gemma: bool, adaptive: bool = False) -> nn.Module:
    """Make a norm of a language model, or an `adaptive` one of an expert."""
    if adaptive:
        return AdaptiveNorm(sizes.width, sizes.eps)
    return RMSNorm(sizes.width, sizes.eps, centred=gemma)


def _add(x: Tensor, gate: Tensor | None, update: Tensor) -> Tensor:
    return x + update if gate is None else x + gate * update


class Tower(SiglipVisionModel):
    """A SigLIP vision tower, as both families have it: all its blocks and the norm after them, no pooling."""

    def __init__(self, sizes: VisionSizes) -> None:
        super().__init__(
            SiglipVisionConfig(
                hidden_size=sizes.width,
                intermediate_size=sizes.mlp,
                num_hidden_layers=sizes.layers,
                num_attention_heads=sizes.heads,
                image_size=sizes.image,
                patch_size=sizes.patch,
                vision_use_head=False,  # pyright: ignore[reportCallIssue]
            )
        )
        del self.embeddings.position_ids

    def forward(self, pixels: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Compute patch features, [B, 3, S, S] -> [B, patches, width]."""
        parts = self.embeddings
        x = parts.patch_embedding(pixels.to(parts.patch_embedding.weight.dtype)).flatten(2).transpose(1, 2)
        x = x + parts.position_embedding.weight
        for block in self.encoder.layers:
            x = maybe_checkpoint(block, x, None)
        return self.post_layernorm(x)


class Connector(nn.Module):
    """SmolVLM's connector: squares of patches become one token each, by pixel shuffle and a projection."""

    def __init__(self, vision_width: int, width: int, edge: int) -> None:
        super().__init__()
        self.edge = edge
        proj = nn.Linear(vision_width * edge**2, width, bias=False)
        self.modality_projection = nn.ModuleDict({"proj": proj})

    def forward(self, features: Tensor) -> Tensor:
        """Convert patch features [B, patches, vision width] to tokens [B, patches / edge², width]."""
        side, edge = math.isqrt(features.shape[1]), self.edge
        squares = features.unflatten(1, (side // edge, edge, side // edge, edge)).transpose(2, 3)
        return self.modality_projection["proj"](squares.flatten(3).flatten(1, 2))


def embed_time(time: Tensor, width: int, periods: tuple[float, float]) -> Tensor:
    """Return sines and cosines of times [B] in (0, 1], float32 [B, width], computed in float64.

    float32 would change velocities by 1e-4.
    """
    shortest, longest = periods
    place = torch.linspace(0, 1, width // 2, dtype=torch.float64, device=time.device)
    period = shortest * (longest / shortest) ** place
    angle = 2 * math.pi / period * time[:, None].double()
    return torch.cat((angle.sin(), angle.cos()), dim=1).float()
