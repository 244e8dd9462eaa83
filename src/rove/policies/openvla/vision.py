"""Vision towers: patch features of the second-to-last block, no final norm, prefix tokens dropped.

The last block, the final norm and the pooling head are never computed; their weights are kept, frozen, so
that a published checkpoint survives a round trip.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from rove.config.schema import TowerConfig
from rove.policies.base import through


class FiLM(nn.Module):
    """Feature-wise linear modulation (Perez et al. 2018): features · (1 + scale(text)) + shift(text).

    Where OpenVLA-OFT+ puts it (Kim et al. 2025, appendix): in every block, between attention and MLP, from
    the embeddings of the prompt. A patch can so be told apart by what the instruction asks for before
    the language model has to look for it.
    """

    def __init__(self, text_width: int, width: int) -> None:
        super().__init__()
        self.scale = nn.Linear(text_width, width)
        self.shift = nn.Linear(text_width, width)

    def forward(self, features: Tensor, text: Tensor) -> Tensor:
        """[B, patches, width] and [B, text_width] -> [B, patches, width]."""
        return features * (1 + self.scale(text))[:, None] + self.shift(text)[:, None]


def make_film(config: TowerConfig, text_width: int) -> nn.ModuleList:
    """One for every block of the tower that is computed."""
    return nn.ModuleList(FiLM(text_width, config.width) for _ in range(config.depth - 1))


def _dino_block(block: Any, x: Tensor, film: nn.Module | None, text: Tensor | None) -> Tensor:
    x = x + block.layer_scale1(block.attention(block.norm1(x))[0])
    if film is not None:
        x = film(x, text)
    return x + block.layer_scale2(block.mlp(block.norm2(x)))


def _siglip_block(block: Any, x: Tensor, film: nn.Module | None, text: Tensor | None) -> Tensor:
    x = x + block.self_attn(block.layer_norm1(x))[0]
    if film is not None:
        x = film(x, text)
    return x + block.mlp(block.layer_norm2(x))


class DinoTower(Dinov2WithRegistersModel):
    """DINOv2 with four registers."""

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
        self.encoder.layer[-1].requires_grad_(False)
        self.layernorm.requires_grad_(False)
        self.embeddings.mask_token.requires_grad_(False)

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
        """[B, 3, H, W] -> [B, patches, width]; with `film`, modulated by `text` [B, text width]."""
        parts = self.embeddings
        x = parts.patch_embeddings(pixels) + parts.position_embeddings[:, 1:]
        cls = parts.cls_token + parts.position_embeddings[:, :1]
        prefix = torch.cat((cls, parts.register_tokens), dim=1)
        x = torch.cat((prefix.expand(len(x), -1, -1), x), dim=1)
        for index, block in enumerate(self.encoder.layer[:-1]):
            x = through(block, _dino_block, block, x, None if film is None else film[index], text)
        return x[:, prefix.shape[1] :]


class SiglipTower(SiglipVisionModel):
    """SigLIP, with the exact GELU that the checkpoints were trained with."""

    def __init__(self, config: TowerConfig, image_size: int) -> None:
        super().__init__(
            SiglipVisionConfig(
                hidden_size=config.width,
                intermediate_size=config.mlp,
                num_hidden_layers=config.depth,
                num_attention_heads=config.heads,
                image_size=image_size,
                patch_size=config.patch,
                hidden_act="gelu",
            )
        )
        del self.embeddings.position_ids
        for unused in (self.encoder.layers[-1], self.post_layernorm, self.head):
            unused.requires_grad_(False)

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
        """[B, 3, H, W] -> [B, patches, width]; with `film`, modulated by `text` [B, text width]."""
        parts = self.embeddings
        x = parts.patch_embedding(pixels).flatten(2).transpose(1, 2) + parts.position_embedding.weight
        for index, block in enumerate(self.encoder.layers[:-1]):
            x = through(block, _siglip_block, block, x, None if film is None else film[index], text)
        return x


TOWERS: dict[str, type[nn.Module]] = {"dinov2": DinoTower, "siglip": SiglipTower}
