"""Masks over actions, and the one mean that every loss is. A mask is True where an entry counts.

Shape letters: `T` chunks in a rollout, `B` slots, `C` actions in a chunk, `A` action dimensions, `N` chunks.
"""

from __future__ import annotations

from torch import Tensor


def episode_mask(done: Tensor) -> tuple[Tensor, Tensor]:
    """Mask everything but the first episode of each slot.

    done: bool [T, B, C]. Returns the mask, bool [T, B, C], true up to and including the action that ends
    the episode, and its length in actions, int64 [B]: T·C where nothing ends.

    Example: one slot, done [[[0, 1]], [[0, 0]]] -> mask [[[1, 1]], [[0, 0]]], length [2].
    """
    t, b, c = done.shape
    steps = done.transpose(1, 2).reshape(t * c, b).long()
    ended_before = steps.cumsum(0) - steps
    mask = (ended_before == 0).reshape(t, c, b).transpose(1, 2)
    return mask, mask.sum((0, 2))


def per_chunk(mask: Tensor) -> Tensor:
    """Reduce a mask over actions, bool [..., C], to one over chunks, [..., 1]: any action that counts makes
    its chunk count."""
    return mask.any(-1, keepdim=True)


def masked_mean(
    x: Tensor,
    mask: Tensor,
    *,
    episode_length: Tensor | None = None,
    horizon: int | None = None,
    denominator: float | Tensor | None = None,
) -> Tensor:
    """Average the entries that count over a denominator; masked entries add neither value nor gradient.

    x: float [N, C, A], [N, C] or [N, 1]; mask: bool [N, C] or [N, 1], x's shape without its token axis.
    Plain form: Σ x·mask / Σ mask. Tokens are summed within an action, so the mean is per action.
    Length-normalised form (`episode_length` int64 [N, 1] and `horizon`, both in actions):
    mean of x·mask·horizon/episode_length over every element of x. Over a batch that misses no executed
    chunk of its episodes, every episode then weighs the same, however long it lasted.
    `denominator` replaces either form's: pass the whole batch's to sum over micro-batches.
    Raises ValueError if `episode_length` and `horizon` do not come together, or on shapes that disagree.
    """
    if (episode_length is None) != (horizon is None):
        raise ValueError("length normalisation needs both episode_length and horizon; only one was given")
    if mask.shape != x.shape[:2]:
        raise ValueError(
            f"mask must have shape {list(x.shape[:2])} for x {list(x.shape)}, not {list(mask.shape)}"
        )
    if denominator is None:
        denominator = mask.sum().clamp(min=1) if episode_length is None else max(x.numel(), 1)
    weight = mask.to(x.dtype)
    if episode_length is not None and horizon is not None:
        weight = weight * (horizon / episode_length)
    if x.dim() == 3:
        mask, weight = mask[..., None], weight[..., None]
    return (x.masked_fill(~mask, 0.0) * weight).sum() / denominator
