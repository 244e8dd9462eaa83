"""Vision towers: patch features of the second-to-last block, no final norm, prefix tokens dropped.

The last block, the final norm and the pooling head are never computed; their weights are kept, frozen, so
that a published checkpoint survives a round trip.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.models.dinov2_with_registers.modeling_dinov2_with_registers import Dinov2WithRegistersLayer
from transformers.models.siglip.modeling_siglip import SiglipEncoderLayer

from rove.config.schema import TowerConfig
from rove.policies import lora
from rove.policies.base import maybe_checkpoint


class FiLM(nn.Module):
    """Feature-wise linear modulation (Perez et al. 2018): features · (1 + scale(text)) + shift(text).

    It is placed where OpenVLA-OFT+ has it (Kim et al. 2025, appendix): in every block, between attention and
    MLP, from the embeddings of the prompt. A patch is thus conditioned on the instruction before the language
    model reads it.
    """

    def __init__(self, text_width: int, width: int) -> None:
        super().__init__()
        self.scale = nn.Linear(text_width, width)
        self.shift = nn.Linear(text_width, width)

    def forward(self, features: Tensor, text: Tensor) -> Tensor:
        """Modulate features [B, patches, width] by text [B, text_width]; the shape stays."""
        return features * (1 + self.scale(text))[:, None] + self.shift(text)[:, None]


def make_film(config: TowerConfig, text_width: int) -> nn.ModuleList:
    """Make a FiLM for every block of the tower that is computed."""
    return nn.ModuleList(FiLM(text_width, config.width) for _ in range(config.depth - 1))


def _attend(x: Tensor, attention: Any) -> Tensor:
    """Compute attention of all positions of [B, L, D] to all, before the output projection."""
    query, key, value = (
        y.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
        for y in lora.linear(x, attention.q_proj, attention.k_proj, attention.v_proj)
    )
    return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)


class DinoBlock(Dinov2WithRegistersLayer):
    """A block of DINOv2; the outputs of attention and MLP are scaled channel by channel."""

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, x: Tensor, film: nn.Module | None, text: Tensor | None
    ) -> Tensor:
        """Apply the block, [B, L, D] -> [B, L, D]."""
        attention, mlp = cast(Any, self.attention), cast(Any, self.mlp)
        x = torch.addcmul(x, attention.o_proj(_attend(self.norm1(x), attention)), self.layer_scale1.lambda1)
        if film is not None:
            x = film(x, text)
        return torch.addcmul(x, mlp.fc2(F.gelu(mlp.fc1(self.norm2(x)))), self.layer_scale2.lambda1)


class SiglipBlock(SiglipEncoderLayer):
    """A block of SigLIP, with the exact GELU that the checkpoints were trained with."""

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, x: Tensor, film: nn.Module | None, text: Tensor | None
    ) -> Tensor:
        """Apply the block, [B, L, D] -> [B, L, D]."""
        attention, mlp = self.self_attn, self.mlp
        (x,) = lora.linear(_attend(self.layer_norm1(x), attention), attention.out_proj, plus=x)
        if film is not None:
            x = film(x, text)
        (x,) = lora.linear(F.gelu(mlp.fc1(self.layer_norm2(x))), mlp.fc2, plus=x)
        return x


class DinoTower(Dinov2WithRegistersModel):
    """The DINOv2 vision tower, with four registers."""

    def __init__(self, config: TowerConfig, image_size: int) -> None:
        super().__init__(
            Dinov2WithRegistersConfig(
                hidden_size=config.width,
                num_hidden_layers=config.depth,
                num_attention_heads=config.heads,
                mlp_ratio=config.mlp // config.width,
                image_size=image_size,
                patch_size=config.patch,
            )
        )
        self.encoder.layer = nn.ModuleList(DinoBlock(self.config) for _ in range(config.depth))
        self.encoder.layer[-1].requires_grad_(False)
        self.layernorm.requires_grad_(False)
        self.embeddings.mask_token.requires_grad_(False)

    @property
    def computed(self) -> nn.ModuleList:
        """The blocks that are computed: all but the last."""
        return self.encoder.layer[:-1]

    @property
    def positions(self) -> Tensor:
        """Position embeddings of the patches, [patches, width], row by row."""
        return self.embeddings.position_embeddings[0, 1:]

    def forward(
        self,
        pixels: Tensor,
        film: nn.ModuleList | None = None,
        text: Tensor | None = None,
    ) -> Tensor:
        """Compute patch features, [B, 3, H, W] -> [B, patches, width].

        With `film` they are modulated by `text` [B, text width].
        """
        parts = self.embeddings
        x = parts.patch_embeddings(pixels) + parts.position_embeddings[:, 1:]
        cls = parts.cls_token + parts.position_embeddings[:, :1]
        prefix = torch.cat((cls, parts.register_tokens), dim=1)
        x = torch.cat((prefix.expand(len(x), -1, -1), x), dim=1)
        for index, block in enumerate(self.computed):
            x = maybe_checkpoint(block, x, None if film is None else film[index], text)
        return x[:, prefix.shape[1] :]


class SiglipTower(SiglipVisionModel):
    """The SigLIP vision tower."""

    def __init__(self, config: TowerConfig, image_size: int) -> None:
        super().__init__(
            SiglipVisionConfig(
                hidden_size=config.width,
                intermediate_size=config.mlp,
                num_hidden_layers=config.depth,
                num_attention_heads=config.heads,
                image_size=image_size,
                patch_size=config.patch,
            )
        )
        self.encoder.layers = nn.ModuleList(SiglipBlock(self.config) for _ in range(config.depth))
        del self.embeddings.position_ids
        for unused in (self.encoder.layers[-1], self.post_layernorm, self.head):
            unused.requires_grad_(False)

    @property
    def computed(self) -> nn.ModuleList:
        """The blocks that are computed: all but the last."""
        return self.encoder.layers[:-1]

    @property
    def positions(self) -> Tensor:
        """Position embeddings of the patches, [patches, width], row by row."""
        return self.embeddings.position_embedding.weight

    def forward(
        self,
        pixels: Tensor,
        film: nn.ModuleList | None = None,
        text: Tensor | None = None,
    ) -> Tensor:
        """Compute patch features, [B, 3, H, W] -> [B, patches, width].

        With `film` they are modulated by `text` [B, text width].
        """
        parts = self.embeddings
        x = parts.patch_embedding(pixels).flatten(2).transpose(1, 2) + parts.position_embedding.weight
        for index, block in enumerate(self.computed):
            x = maybe_checkpoint(block, x, None if film is None else film[index], text)
        return x


TOWERS: dict[str, type[nn.Module]] = {"dinov2": DinoTower, "siglip": SiglipTower}
