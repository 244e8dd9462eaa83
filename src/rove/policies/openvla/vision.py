"""Vision towers: patch features of the second-to-last block, no final norm, prefix tokens dropped.

The last block, the final norm and the pooling head are never computed; their weights are kept, frozen, so
that a published checkpoint survives a round trip.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import (
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from rove.config.schema import TowerConfig


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

    def forward(self, pixels: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, patches, width]."""
        parts = self.embeddings
        x = parts.patch_embeddings(pixels) + parts.position_embeddings[:, 1:]
        cls = parts.cls_token + parts.position_embeddings[:, :1]
        prefix = torch.cat((cls, parts.register_tokens), dim=1)
        x = torch.cat((prefix.expand(len(x), -1, -1), x), dim=1)
        for block in self.encoder.layer[:-1]:
            x = block(x)
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

    def forward(self, pixels: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, patches, width]."""
        parts = self.embeddings
        x = parts.patch_embedding(pixels).flatten(2).transpose(1, 2) + parts.position_embedding.weight
        for block in self.encoder.layers[:-1]:
            x = block(x, None)
        return x


TOWERS: dict[str, type[nn.Module]] = {"dinov2": DinoTower, "siglip": SiglipTower}
