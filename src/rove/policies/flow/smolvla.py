"""SmolVLA (Shukor et al. 2025): SmolVLM2 cut to its first layers, and an expert of the Llama kind."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rove.policies.flow.config import FlowConfig
from rove.policies.flow.layers import Block, Connector, CrossBlock, Tower, embed_time, make_norm
from rove.policies.flow.network import Embedded, FlowNetwork


class SmolVLA(FlowNetwork):
    """SmolVLA's network; the state is the prefix's last token, and actions see those before them only."""

    def __init__(self, config: FlowConfig) -> None:
        super().__init__(config)
        text, expert = config.text, config.expert
        language = nn.ModuleDict(
            {
                "embed_tokens": nn.Embedding(text.vocab, text.width),
                "layers": nn.ModuleList(Block(text, gemma=False) for _ in range(text.layers)),
                "norm": make_norm(text, gemma=False),
            }
        )
        model = {
            "vision_model": Tower(config.vision),
            "connector": Connector(config.vision.width, text.width, config.scale_factor),
            "text_model": language,
        }
        every, keys = config.self_attention_every, text.kv_heads * text.head_dim

        def layer(index: int) -> Block:
            if every and index % every == 0:
                return Block(expert, gemma=False)
            return CrossBlock(expert, gemma=False, key_inputs=keys)

        lm_expert = {
            "layers": nn.ModuleList(layer(index) for index in range(expert.layers)),
            "norm": make_norm(expert, gemma=False),
        }
        self.vlm_with_expert = nn.ModuleDict(
            {"vlm": nn.ModuleDict({"model": nn.ModuleDict(model)}), "lm_expert": nn.ModuleDict(lm_expert)}
        )
        self.state_proj = nn.Linear(config.max_state, text.width)
        self.action_in_proj = nn.Linear(config.max_action, expert.width)
        self.action_out_proj = nn.Linear(expert.width, config.max_action)
        self.action_time_mlp_in = nn.Linear(2 * expert.width, expert.width)
        self.action_time_mlp_out = nn.Linear(expert.width, expert.width)

    @property
    def tower(self) -> nn.Module:
        """The vision tower."""
        return self.vlm.get_submodule("model.vision_model")

    @property
    def towers(self) -> nn.Module:
        """The VLM and the expert."""
        return self.vlm_with_expert

    @property
    def vlm(self) -> nn.ModuleDict:  # pyright: ignore[reportIncompatibleMethodOverride]
        """SmolVLM2."""
        return self.vlm_with_expert["vlm"]  # pyright: ignore[reportReturnType]

    @property
    def language(self) -> tuple[nn.Module, Sequence[nn.Module], nn.Module]:
        """The language model's embedding, blocks and norm."""
        text = self.vlm.get_submodule("model.text_model")
        return text["embed_tokens"], text["layers"], text["norm"]  # pyright: ignore

    @property
    def expert(self) -> tuple[Sequence[nn.Module], nn.Module]:
        """The expert's blocks and norm."""
        expert = self.towers.get_submodule("lm_expert")
        return expert["layers"], expert["norm"]  # pyright: ignore

    def embed_images(self, pixels: Tensor) -> Tensor:
        """Compute a picture's tokens by tower, pixel shuffle and connector."""
        return self.vlm.get_submodule("model.connector")(self.tower(pixels))

    def embed_prefix(
        self,
        pixel_values: Sequence[Tensor],
        image_masks: Tensor,
        lang_tokens: Tensor,
        lang_masks: Tensor,
        state: Tensor | None,
    ) -> Embedded:
        """Embed pictures, prompt and state; pictures and prompt are scaled by the root of the width."""
        assert state is not None
        embed, rows = self.language[0], len(lang_tokens)
        scale = self.config.text.width**0.5
        parts, there = [], []

        def put(tokens: Tensor, mask: Tensor) -> None:
            parts.append(tokens)
            there.append(mask.expand(rows, tokens.shape[1]))

        always = image_masks.new_ones(rows, 1)
        for index, pixels in enumerate(pixel_values):
            before, after = self._special(lang_tokens.device)
            if before is not None:
                put(embed(before).expand(rows, -1, -1), always)
            put(self.embed_images(pixels) * scale, image_masks[:, index, None])
            if after is not None:
                put(embed(after).expand(rows, -1, -1), always)
        put(embed(lang_tokens) * scale, lang_masks)
        put(self.embed_state(state).to(parts[0].dtype), always)
        embeddings, pad_mask = torch.cat(parts, dim=1), torch.cat(there, dim=1)
        starts = torch.zeros(pad_mask.shape[1], dtype=torch.bool, device=pad_mask.device)
        starts[-1] = True
        return Embedded(embeddings, pad_mask, starts)

    def embed_state(self, state: Tensor) -> Tensor:
        """Embed the state as the prefix's last token."""
        return self.state_proj(state.float())[:, None]

    def embed_suffix(
        self, state: Tensor | None, x_t: Tensor, time: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Embed noisy actions, joined with their time; each begins a block of its own."""
        embedded = embed_actions(self, x_t, time)
        return embedded, None, torch.ones(embedded.shape[1], dtype=torch.bool, device=embedded.device)

    def _special(self, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
        """Return the tokens before and after a picture, int64 [1, n]; None: none are put there."""
        if self.config.special_tokens is None:
            return None, None
        fake, whole = self.config.special_tokens
        both = torch.tensor([[fake, whole]], device=device)
        return both, both[:, :1]


def embed_actions(network: FlowNetwork, x_t: Tensor, time: Tensor) -> Tensor:
    """Embed noisy actions [B, H, D] at times [B] by an MLP on both, as SmolVLA and π0 do: [B, H, W]."""
    actions = network.action_in_proj(x_t.float())
    at = embed_time(time, actions.shape[-1], network.config.periods)[:, None].expand_as(actions)
    both = torch.cat((actions, at), dim=-1)
    return network.action_time_mlp_out(F.silu(network.action_time_mlp_in(both)))  # pyright: ignore
