"""π0 (Black et al. 2024) and π0.5 (Black et al. 2025): PaliGemma, and an expert of the Gemma kind.

π0 gives its expert the state as a token and the time with each action; π0.5 has the state in the prompt, and
the time scales, shifts and gates the expert's layers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rove.policies.flow.config import FlowConfig
from rove.policies.flow.layers import Block, Tower, embed_time, make_norm
from rove.policies.flow.network import Embedded, FlowNetwork
from rove.policies.flow.smolvla import embed_actions


class Pi(FlowNetwork):
    """The network of π0 and π0.5; the prefix is one block, and so are the actions."""

    def __init__(self, config: FlowConfig) -> None:
        super().__init__(config)
        text, expert = config.text, config.expert
        self.adaptive = config.family == "pi05"
        language = {
            "embed_tokens": nn.Embedding(text.vocab, text.width),
            "layers": nn.ModuleList(Block(text, gemma=True) for _ in range(text.layers)),
            "norm": make_norm(text, gemma=True),
        }
        paligemma = {
            "vision_tower": nn.ModuleDict({"vision_model": Tower(config.vision)}),
            "multi_modal_projector": nn.ModuleDict({"linear": nn.Linear(config.vision.width, text.width)}),
            "language_model": nn.ModuleDict(language),
        }
        blocks = (Block(expert, gemma=True, adaptive=self.adaptive) for _ in range(expert.layers))
        gemma = {
            "layers": nn.ModuleList(blocks),
            "norm": make_norm(expert, gemma=True, adaptive=self.adaptive),
        }
        self.paligemma_with_expert = nn.ModuleDict(
            {
                "paligemma": nn.ModuleDict({"model": nn.ModuleDict(paligemma)}),
                "gemma_expert": nn.ModuleDict({"model": nn.ModuleDict(gemma)}),
            }
        )
        width = expert.width
        self.action_in_proj = nn.Linear(config.max_action, width)
        self.action_out_proj = nn.Linear(width, config.max_action)
        if self.adaptive:
            self.time_mlp_in, self.time_mlp_out = nn.Linear(width, width), nn.Linear(width, width)
        else:
            self.state_proj = nn.Linear(config.max_state, width)
            self.action_time_mlp_in = nn.Linear(2 * width, width)
            self.action_time_mlp_out = nn.Linear(width, width)

    @property
    def tower(self) -> nn.Module:
        """The vision tower."""
        return self.vlm.get_submodule("model.vision_tower.vision_model")

    @property
    def towers(self) -> nn.Module:
        """PaliGemma and the expert."""
        return self.paligemma_with_expert

    @property
    def vlm(self) -> nn.ModuleDict:  # pyright: ignore[reportIncompatibleMethodOverride]
        """PaliGemma."""
        return self.paligemma_with_expert["paligemma"]  # pyright: ignore[reportReturnType]

    @property
    def language(self) -> tuple[nn.Module, Sequence[nn.Module], nn.Module]:
        """The language model's embedding, blocks and norm."""
        text = self.vlm.get_submodule("model.language_model")
        return text["embed_tokens"], text["layers"], text["norm"]  # pyright: ignore

    @property
    def expert(self) -> tuple[Sequence[nn.Module], nn.Module]:
        """The expert's blocks and norm."""
        expert = self.towers.get_submodule("gemma_expert.model")
        return expert["layers"], expert["norm"]  # pyright: ignore

    @property
    def suffix_state(self) -> bool:
        """True for π0."""
        return not self.adaptive

    def embed_images(self, pixels: Tensor) -> Tensor:
        """Compute a picture's tokens by tower and projector."""
        return self.vlm.get_submodule("model.multi_modal_projector.linear")(self.tower(pixels))

    def embed_prefix(
        self,
        pixel_values: Sequence[Tensor],
        image_masks: Tensor,
        lang_tokens: Tensor,
        lang_masks: Tensor,
        state: Tensor | None,
    ) -> Embedded:
        """Embed pictures and prompt; the prompt alone is scaled by the root of the width."""
        parts = [self.embed_images(pixels) for pixels in pixel_values]
        there = [image_masks[:, i, None].expand(-1, part.shape[1]) for i, part in enumerate(parts)]
        parts.append(self.language[0](lang_tokens) * self.config.text.width**0.5)
        pad_mask = torch.cat((*there, lang_masks), dim=1)
        starts = torch.zeros(pad_mask.shape[1], dtype=torch.bool, device=pad_mask.device)
        return Embedded(torch.cat(parts, dim=1), pad_mask, starts)

    def embed_suffix(
        self, state: Tensor | None, x_t: Tensor, time: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Embed noisy actions: a block of their own, after that of the state in π0."""
        starts = torch.zeros(x_t.shape[1], dtype=torch.bool, device=x_t.device)
        starts[0] = True
        if self.adaptive:
            at = embed_time(time, self.config.expert.width, self.config.periods)
            condition = F.silu(self.time_mlp_out(F.silu(self.time_mlp_in(at))))
            return self.action_in_proj(x_t.float()), condition, starts
        assert state is not None
        tokens = (self.state_proj(state.float())[:, None], embed_actions(self, x_t, time))
        return torch.cat(tokens, dim=1), None, torch.cat((starts[:1], starts))
