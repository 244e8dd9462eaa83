"""What policies from scratch share: points read off pictures, and positions that can be read off linearly."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from rove.errors import RoveError


def point(queries: Tensor, patches: Tensor, pictures: int, each: int) -> Tensor:
    """Compute logits, float32 [B, K, P], of queries [K, D] over the P = `each` patches of a picture.

    `patches` are embeddings [B, n · P, D] of n pictures, whose directions count. The first `pictures` are
    pointed in, each by as many queries. Raises RoveError where there are fewer.
    """
    seen = patches[:, : pictures * each].unflatten(1, (-1, each))
    if seen.shape[1] < pictures:
        raise too_few(pictures, seen.shape[1])
    unit = F.rms_norm(seen, seen.shape[-1:])
    by_picture = queries.unflatten(0, (pictures, -1))
    return torch.einsum("nkd,bnpd->bnkp", by_picture, unit).flatten(1, 2).float()


def too_few(pointed: int, pictures: int) -> RoveError:
    """Say that there are fewer pictures than a policy points in."""
    return RoveError(
        f"The policy points in {pointed} pictures, the observation has {pictures}: set policy.pointed to "
        f"{pictures}, or give it the cameras that it was trained with (--env.wrist true in LIBERO)."
    )


def read_points(logits: Tensor) -> Tensor:
    """Read points, float32 [B, K, 2] from -1 (left, upper border) to 1, off logits [B, K, P] over patches.

    A point is the mean of patch centres under softmax weights, over the 3 x 3 patches around the likeliest:
    with two candidates it is on one of them, not between.
    """
    side = math.isqrt(logits.shape[-1])
    line = (torch.arange(side, device=logits.device) + 0.5) * 2 / side - 1
    centres = torch.stack(torch.meshgrid(line, line, indexing="xy"), dim=-1).flatten(0, 1)
    near = (centres[logits.argmax(-1)][:, :, None] - centres).abs().amax(-1) < 3 / side
    return logits.masked_fill(~near, -torch.inf).softmax(-1) @ centres


@torch.no_grad()
def place_evenly(positions: Tensor) -> None:
    """Fill [patches, D] with waves over the image's height and width, standard deviation near 1.

    A position can then be read off linearly, instead of being learned patch by patch.
    """
    side = math.isqrt(len(positions))
    frequency = torch.arange(1, positions.shape[1] // 4 + 1) / 2
    angle = torch.pi * torch.linspace(0, 1, side)[:, None] * frequency
    waves = torch.cat((angle.sin(), angle.cos()), dim=1)
    rows = waves[:, None].expand(-1, side, -1)
    columns = waves[None].expand(side, -1, -1)
    both = torch.cat((rows, columns), dim=-1).flatten(0, 1)
    positions[:, : both.shape[1]] = math.sqrt(2) * both
