"""The Prismatic vision-language model (Karamcheti et al. 2024): towers, projector, Llama, LM head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig

from rove.config.schema import TowerConfig
from rove.policies import lora
from rove.policies.openvla.config import BINS
from rove.policies.openvla.language import Attention, Cache, Llama
from rove.policies.openvla.vision import TOWERS, DinoTower, FiLM, SiglipTower, make_film
from rove.policies.pointers import place_evenly, point, read_points

_EMBEDDINGS = ("placeholders", "cls_token", "mask_token", "register_tokens", "position_embeddings")


class Projector(nn.Module):
    """A projector of features to token embeddings: two layers, for two towers three (4 x as wide)."""

    def __init__(self, width: int, out: int, *, fused: bool, hidden: int | None = None) -> None:
        super().__init__()
        hidden = hidden or (4 * width if fused else out)
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, out)
        self.fc3 = nn.Linear(out, out) if fused else None

    def forward(self, features: Tensor) -> Tensor:
        x = self.fc2(F.gelu(self.fc1(features)))
        return x if self.fc3 is None else self.fc3(F.gelu(x))


class Prefix(NamedTuple):
    """Embeddings that precede the action tokens."""

    embeddings: Tensor
    """Embeddings, [B, P + L, D]."""
    valid: Tensor | None
    """Mask of the embeddings that are attended, bool [B, P + L]; None: all are."""
    pointing: Tensor | None
    """Pointing logits; see `PolicyOutput.pointing`."""

    def repeat(self, count: int) -> Prefix:
        """Repeat every row `count` times, one after the other."""

        def rows(part: Tensor) -> Tensor:
            return part.repeat_interleave(count, dim=0)

        valid = None if self.valid is None else rows(self.valid)
        return Prefix(rows(self.embeddings), valid, None if self.pointing is None else rows(self.pointing))


class Pointer(nn.Module):
    """A module that points at K patches of the first images, as many in each of them, and makes one token of
    the points and the robot's state.

    See `pointers.read_points`. In one token, the offsets from the hand to the points are one layer away; with
    a token for each point attention would have to combine them.
    """

    def __init__(self, count: int, images: int, side: int, proprio: int, width: int) -> None:
        super().__init__()
        self.images, self.side = images, side
        self.queries = nn.Parameter(torch.empty(images * count, width))
        self.projector = Projector(2 * images * count + proprio, width, fused=False, hidden=4 * width)

    def logits(self, patches: Tensor) -> Tensor:
        """Compute logits, float32 [B, K, P], from the patches of all images; see `pointers.point`."""
        return point(self.queries, patches, self.images, self.side**2)

    def forward(self, logits: Tensor, state: Tensor | None) -> Tensor:
        """Make a token [B, 1, D] of the points, from -1 (left, upper border) to 1, and of `state` [B, P]."""
        read = read_points(logits).flatten(1).to(self.queries.dtype)
        seen = read if state is None else torch.cat((read, state.to(read.dtype)), dim=1)
        return self.projector(seen)[:, None]


class PrismaticVLM(nn.Module):
    """The VLM, from pixels and token embeddings to hidden states and action logits; it reads no text."""

    def __init__(
        self,
        towers: Sequence[TowerConfig],
        llama: LlamaConfig,
        *,
        image_size: int,
        vocab_size: int,
        placeholders: int = 0,
        film: bool = False,
        proprio: int = 0,
        pointers: int = 0,
        pointed: int = 1,
    ) -> None:
        """Make the modules; the last 256 of `vocab_size` rows are actions, the table's padding not counted.

        `placeholders` of the action positions have learned embeddings; with 0 all are zero. With `film` the
        prompt modulates the towers. `proprio` is the size of the robot's state, 0 where it is not read;
        `pointers` the number of points that are picked out in each of the first `pointed` images.
        """
        super().__init__()
        self.towers = nn.ModuleList(TOWERS[tower.kind](tower, image_size) for tower in towers)
        width = sum(tower.width for tower in towers)
        self.projector = Projector(width, llama.hidden_size, fused=len(towers) > 1)
        side = image_size // towers[0].patch
        self.pointer = Pointer(pointers, pointed, side, proprio, llama.hidden_size) if pointers else None
        alone = proprio and not pointers
        self.proprio_projector = Projector(proprio, llama.hidden_size, fused=False) if alone else None
        self.film = nn.ModuleList(make_film(tower, llama.hidden_size) for tower in towers) if film else None
        self.language_model = Llama(llama)
        self.lm_head = nn.Linear(llama.hidden_size, llama.vocab_size, bias=False)
        self.vocab_size = vocab_size
        self.placeholders = (
            nn.Parameter(torch.empty(placeholders, llama.hidden_size)) if placeholders else None
        )

    def blocks(self) -> list[nn.Module]:
        """The repeated modules: blocks of the towers that are computed, and the language model's layers."""
        return [
            *(block for tower in self.towers for block in cast(nn.ModuleList, tower.computed)),
            *self.language_model.layers,
        ]

    def vision(self, pixel_values: Tensor, text: Tensor | None = None) -> Tensor:
        """Compute patch features of n images, [B, 3·k·n, H, W] -> [B, n·patches, width of the k towers].

        `text` [B, D] summarises the prompt (see `_summary`); it is read where FiLM modulates the towers.
        """
        channels = 3 * len(self.towers)
        pictures = pixel_values.unflatten(1, (-1, channels)).flatten(0, 1)
        views = pictures.to(self.lm_head.weight.dtype).split(3, dim=1)
        films: Sequence[Any] = [None] * len(self.towers)
        if self.film is not None:
            assert text is not None
            films, text = list(self.film), text.repeat_interleave(len(pictures) // len(text), dim=0)
        parts = [tower(view, film, text) for tower, view, film in zip(self.towers, views, films, strict=True)]
        features = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
        return features.reshape(len(pixel_values), -1, features.shape[-1])

    def project(self, features: Tensor) -> Tensor:
        """Project patch features to embeddings, [B, P, width] -> [B, P, D]."""
        return self.projector(features)

    def patches(self, input_ids: Tensor, attention_mask: Tensor | None, pixel_values: Tensor) -> Tensor:
        """Compute embeddings [B, P, D] of the patches of all images; FiLM modulates them by the prompt."""
        return self.project(self.vision(pixel_values, self._summary(input_ids, attention_mask)))

    def prefix(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        pixel_values: Tensor,
        state: Tensor | None,
    ) -> Prefix:
        """Embed what precedes the action tokens: BOS, patches, points, state and prompt.

        Prompts are padded on the left, before BOS. Here the padding moves behind the patches, still masked,
        so that all rows have one layout; position ids count attended entries and stay the same.
        """
        patches = self.patches(input_ids, attention_mask, pixel_values)
        logits = self.point(patches)
        if self.pointer is not None:
            patches = torch.cat((patches, self.pointer(logits, state)), dim=1)
        if self.proprio_projector is not None:
            assert state is not None
            token = self.proprio_projector(state.to(self.lm_head.weight.dtype))
            patches = torch.cat((patches, token[:, None]), dim=1)
        if attention_mask is None:
            tokens, valid = input_ids, None
        else:
            keep = attention_mask.bool()
            start = (~keep).sum(1, keepdim=True)
            bos = input_ids.gather(1, start)
            rest = keep.scatter(1, start, False)[:, 1:]
            tokens = torch.cat((bos, input_ids[:, 1:]), dim=1)
            valid = torch.cat((keep.new_ones(len(keep), 1 + patches.shape[1]), rest), dim=1)
        embedded = self.language_model.embed_tokens(tokens)
        return Prefix(torch.cat((embedded[:, :1], patches, embedded[:, 1:]), dim=1), valid, logits)

    def point(self, patches: Tensor) -> Tensor | None:
        """Compute pointing logits from the patches of all images; see `PolicyOutput.pointing`."""
        if self.pointer is None:
            return None
        return self.pointer.logits(patches)

    def _summary(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor | None:
        """Compute the embedding that modulates the towers, [B, D]; None where nothing reads it.

        The prompt's embeddings, summed and divided by the root of their number, so that one word weighs the
        same in a long prompt. A second sum, weighted from -1 at the first word to 1 at the last and turned
        by half its channels, says in which order they come: "the red on the blue" is not its converse.
        """
        if self.film is None:
            return None
        embedded = self.language_model.embed_tokens(input_ids)
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        weight = attention_mask.to(embedded.dtype)
        count = weight.sum(1, keepdim=True)
        order = weight * (2 * (weight.cumsum(1) - 1) / (count - 1).clamp_min(1) - 1)
        bag, ordered = (torch.einsum("bl,bld->bd", w, embedded) / count.sqrt() for w in (weight, order))
        return bag + ordered.roll(ordered.shape[1] // 2, dims=1)

    def hidden(
        self,
        embeddings: Tensor,
        valid: Tensor | None,
        *,
        outputs: int,
        attention: Attention,
        cache: Cache | None = None,
    ) -> Tensor:
        """Compute hidden states after the final norm at the last `outputs` positions; see `Llama.forward`."""
        return self.language_model(embeddings, outputs=outputs, valid=valid, attention=attention, cache=cache)

    def action_logits(self, hidden: Tensor) -> Tensor:
        """Compute logits, float32 [..., 256], of hidden states [..., D]: column j is token id `vocab_size -
        256 + j`."""
        return lora.rows(self.lm_head, hidden, slice(self.vocab_size - BINS, self.vocab_size)).float()


@torch.no_grad()
def initialize(vlm: PrismaticVLM, generator: torch.Generator) -> None:
    """Draw random weights for training from scratch, in module order, from `generator`.

    Matrices are normal with variance 1 / fan-in. Embeddings have standard deviation 1, so that words and
    positions start on the scale of image content. The rows of the action tokens vary smoothly from bin to
    bin: what is learned about one bin then generalises to its neighbours. FiLM starts near the identity.
    """
    for part in vlm.modules():
        scale = "Norm" in type(part).__name__ or "LayerScale" in type(part).__name__
        for name, parameter in part.named_parameters(recurse=False):
            if parameter.ndim < 2:
                parameter.fill_(1.0 if scale and name != "bias" else 0.0)
            else:
                embedding = isinstance(part, nn.Embedding) or name in _EMBEDDINGS
                std = 1.0 if embedding else parameter[0].numel() ** -0.5
                parameter.normal_(0.0, std, generator=generator)
    for film in vlm.modules():
        if isinstance(film, FiLM):
            film.scale.weight *= 0.1
            film.shift.weight *= 0.1
    for tower in vlm.towers:
        assert isinstance(tower, DinoTower | SiglipTower)
        place_evenly(tower.positions)
    actions = slice(vlm.vocab_size - BINS, vlm.vocab_size)
    vlm.lm_head.weight[actions] = _smooth_rows(vlm.lm_head.in_features, generator)


def _smooth_rows(width: int, generator: torch.Generator) -> Tensor:
    """Make rows [256, width] of norm 1 on average: random sums of the lower cosines over the bins."""
    place = (torch.arange(BINS) + 0.5) / BINS
    frequency = torch.arange(1, BINS // 8)
    waves = torch.cos(torch.pi * place[:, None] * frequency) / (1 + frequency / 4)
    rows = waves @ torch.randn(len(frequency), width, generator=generator)
    return rows / rows.norm(dim=1).mean()
