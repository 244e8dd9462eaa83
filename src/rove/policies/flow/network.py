"""What the networks of SmolVLA, π0 and π0.5 share: the prefix, seen once, and the expert that reads it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from rove.policies.base import maybe_checkpoint
from rove.policies.flow.config import FlowConfig
from rove.policies.flow.layers import rotary
from rove.policies.pointers import read_points


@dataclass(frozen=True, slots=True, eq=False)
class Embedded:
    """What enters the language model, before it does."""

    embeddings: Tensor
    """[B, P, D]."""
    pad_mask: Tensor
    """bool [B, P], True where a token is there."""
    starts: Tensor
    """bool [P], True where a token begins a new block: tokens see their own block and those before."""


@dataclass(frozen=True, slots=True, eq=False)
class Prefix:
    """Pictures and prompt as the expert reads them; one serves all steps, all samples and the critic."""

    output: Tensor | None
    """Hidden states after the language model's final norm, [B, P, D]; None where they were not asked for."""
    pad_mask: Tensor
    """bool [B, P], True where a token is there."""
    keys: tuple[Tensor, ...]
    """Keys of each layer, after rotation, [B, kv heads, P, channels]."""
    values: tuple[Tensor, ...]
    state: Tensor | None
    """The normalised state, [B, 32], where the expert reads it itself, as π0's does."""
    pointing: Tensor | None = None
    """Pointing logits; see `PolicyOutput.pointing`."""

    def repeat(self, times: int) -> Prefix:
        """Return every row `times` times, one after the other."""

        def again(x: Tensor) -> Tensor:
            return x.repeat_interleave(times, dim=0)

        return replace(
            self,
            output=None if self.output is None else again(self.output),
            pad_mask=again(self.pad_mask),
            keys=tuple(map(again, self.keys)),
            values=tuple(map(again, self.values)),
            state=None if self.state is None else again(self.state),
            pointing=None if self.pointing is None else again(self.pointing),
        )


class FlowNetwork(nn.Module, ABC):
    """A vision-language model and its action expert, made on the meta device or filled by the caller."""

    action_in_proj: nn.Linear
    action_out_proj: nn.Linear

    def __init__(self, config: FlowConfig) -> None:
        super().__init__()
        self.config = config

    # --- what a family has ------------------------------------------------------------------------

    @property
    @abstractmethod
    def tower(self) -> nn.Module:
        """The vision tower."""

    @property
    @abstractmethod
    def towers(self) -> nn.Module:
        """The VLM and the expert: what adapters are put into."""

    @property
    @abstractmethod
    def vlm(self) -> nn.Module:
        """The VLM: all that the prefix is made by, apart from a projection of the state."""

    @property
    @abstractmethod
    def language(self) -> tuple[nn.Module, Sequence[nn.Module], nn.Module]:
        """The language model's embedding, its blocks, and its final norm."""

    @property
    @abstractmethod
    def expert(self) -> tuple[Sequence[nn.Module], nn.Module]:
        """The expert's blocks and its final norm."""

    @abstractmethod
    def embed_images(self, pixels: Tensor) -> Tensor:
        """Compute a picture's tokens, [B, 3, S, S] -> [B, tokens, D], before any scaling."""

    @abstractmethod
    def embed_prefix(
        self,
        pixel_values: Sequence[Tensor],
        image_masks: Tensor,
        lang_tokens: Tensor,
        lang_masks: Tensor,
        state: Tensor | None,
    ) -> Embedded:
        """Embed what precedes the actions; see `FlowVLA.prefix`."""

    @abstractmethod
    def embed_suffix(
        self, state: Tensor | None, x_t: Tensor, time: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Embed noisy actions [B, H, D] at times [B].

        Returns what enters the expert, float32 [B, S, W], the condition of its norms, [B, W] or None, and
        where blocks begin, bool [S].
        """

    @property
    def suffix_state(self) -> bool:
        """True where the expert reads the state itself."""
        return False

    def embed_state(self, state: Tensor) -> Tensor | None:
        """Embed a normalised state [B, 32] as the prefix's last token, [B, 1, D]; None where it has none."""
        return None

    # --- what they share ----------------------------------------------------------------------------

    def prefix(
        self,
        embedded: Embedded,
        state: Tensor | None,
        *,
        output: bool = True,
        pointer: Callable[[Tensor], Tensor] | None = None,
    ) -> Prefix:
        """Run the language model over the prefix; `output` False leaves out what only a critic reads.

        With a `pointer`, which gives logits over tokens of the pictures, the points that it reads follow
        the numbers of the state. It looks at what enters the last block: of that the expert's last layer sees
        keys and values.
        """
        positions = embedded.pad_mask.cumsum(1) - 1
        mask = _visible(embedded.starts)[None, None] & embedded.pad_mask[:, None, None]
        whole = embedded.embeddings.shape[1]
        late = pointer is not None and state is not None and self.embed_state(state) is not None
        n = whole - 1 if late else whole
        first = embedded.embeddings[:, :n]
        x, entered, keys, values = self._read(first, positions[:, :n], mask[..., :n, :n], None, output)
        pointing = None
        if pointer is not None:
            pointing = pointer(entered)
            state = self._with_points(state, pointing)
        if late:
            assert state is not None
            token, past = self.embed_state(state), list(zip(keys, values, strict=True))
            assert token is not None
            parts = self._read(token.to(first.dtype), positions[:, n:], mask[..., n:, :], past, output)
            x = torch.cat((x, parts[0]), dim=1)
            keys = [torch.cat(both, dim=2) for both in zip(keys, parts[2], strict=True)]
            values = [torch.cat(both, dim=2) for both in zip(values, parts[3], strict=True)]
        hidden = self.language[2](x)[0] if output else None
        kept = state if self.suffix_state else None
        return Prefix(hidden, embedded.pad_mask, tuple(keys), tuple(values), kept, pointing)

    def _read(
        self,
        x: Tensor,
        positions: Tensor,
        mask: Tensor,
        past: Sequence[tuple[Tensor, Tensor]] | None,
        output: bool,
    ) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
        """Run the language model's blocks over tokens [B, L, D] after those with keys and values `past`.

        Returns the hidden states, what entered the last block, and the keys and values of each block.
        """
        blocks = self.language[1]
        angles = rotary(positions, self.config.text.head_dim)
        entered, keys, values = x, [], []
        for index, block in enumerate(blocks):
            entered, last = x, index == len(blocks) - 1 and not output
            before = None if past is None else past[index]
            x, k, v = maybe_checkpoint(block, x, angles, mask, before, None, last)
            keys.append(k)
            values.append(v)
        return x, entered, keys, values

    def _with_points(self, state: Tensor | None, pointing: Tensor) -> Tensor | None:
        """Put the points that logits [B, K, P] read behind the real numbers of a state [B, 32]."""
        size = self.config.state
        if state is None or size is None or not (self.suffix_state or self.embed_state(state) is not None):
            return state
        points = read_points(pointing).flatten(1).to(state.dtype)
        return torch.cat((state[:, :size], points, state[:, size + points.shape[1] :]), dim=1)

    def suffix(self, prefix: Prefix, x_t: Tensor, time: Tensor) -> Tensor:
        """Compute the expert's hidden states of the H actions after its norm, float32 [B, H, W]."""
        embedded, condition, starts = self.embed_suffix(prefix.state, x_t, time)
        blocks, norm = self.expert
        rows, length = embedded.shape[:2]
        # The VLM may be in lower precision than an expert that is trained.
        dtype = next(blocks[0].parameters()).dtype
        x = embedded.to(dtype)
        place = torch.arange(length, device=x.device)
        before = prefix.pad_mask.sum(1, keepdim=True)
        angles = rotary(before + place, self.config.expert.head_dim)
        past_mask = prefix.pad_mask[:, None, None].expand(-1, -1, length, -1)
        own = _visible(starts)[None, None].expand(rows, -1, -1, -1)
        mask = torch.cat((past_mask, own), dim=-1)
        # Layers without keys of the actions count positions from zero.
        cross = rotary(place[None], self.config.expert.head_dim)
        for block, *past in zip(blocks, prefix.keys, prefix.values, strict=True):
            seen = (cross, past_mask) if block.cross else (angles, mask)
            x = maybe_checkpoint(block, x, *seen, tuple(part.to(dtype) for part in past), condition)[0]
        return norm(x, condition)[0][:, -self.config.horizon :].float()

    def velocity_of(self, hidden: Tensor) -> Tensor:
        """Compute velocities, float32 [B, H, D], of the expert's hidden states."""
        with torch.autocast(hidden.device.type, enabled=False):
            return self.action_out_proj(hidden.float()).float()


def _visible(starts: Tensor) -> Tensor:
    """Return which token sees which by their blocks, bool [L, L]."""
    block = starts.cumsum(0)
    return block[None, :] <= block[:, None]
