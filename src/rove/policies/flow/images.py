"""Conversion of camera pictures to pixel values in [−1, 1], batched, as in a checkpoint's training.

All three keep the picture's aspect and pad the rest, and all three differ: by 0.009 on average between
256 and 224 pixels, and by 0.2 at edges.
"""

from __future__ import annotations

from functools import cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from rove import transfer
from rove.errors import RoveError

Resizer = Literal["smolvla", "lerobot", "openpi"]
"""SmolVLA's (bilinear, padding on the left and on top), LeRobot's of π0 and π0.5 (bilinear, centred), or
openpi's (antialiased bilinear on 8 bits as PIL has it, centred)."""


def process(images: Tensor, size: tuple[int, int], resizer: Resizer) -> Tensor:
    """Compute pixel values, float32 [B, 3, *size], of uint8 pictures [B, h, w, 3]; `size` is (height, width).

    Raises RoveError on another dtype or shape.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise RoveError(
            f"Pictures of a camera are {images.dtype} {tuple(images.shape)}, expected uint8 [B, h, w, 3]."
        )
    pictures = images.permute(0, 3, 1, 2)
    height, width = pictures.shape[-2:]
    ratio = max(width / size[1], height / size[0])
    inner = (int(height / ratio), int(width / ratio))
    rows, columns = size[0] - inner[0], size[1] - inner[1]
    top, left = (rows, columns) if resizer == "smolvla" else (rows // 2, columns // 2)
    margins = (left, columns - left, top, rows - top)
    if resizer == "openpi":
        pixels = F.pad(_antialiased(pictures, inner), margins).float() / 255
    else:
        pixels = F.interpolate(pictures.float() / 255, size=inner, mode="bilinear", align_corners=False)
        # Rounding may leave [0, 1] by the last bit.
        pixels = F.pad(pixels if resizer == "smolvla" else pixels.clamp(0, 1), margins)
    return pixels * 2 - 1


_BITS = 22
"""Binary places of PIL's weights."""


def _antialiased(pictures: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize uint8 pictures [B, 3, h, w] by PIL's bilinear filter, to the last bit: columns, then rows."""
    for axis, after in ((-1, size[1]), (-2, size[0])):
        before = pictures.shape[axis]
        if before != after:
            lines = pictures.double().movedim(axis, -1)
            # Whole numbers below 2^53, so that double precision sums them exactly in any order.
            sums = lines @ _weights(before, after, pictures.device).T + 2 ** (_BITS - 1)
            pictures = (sums / 2**_BITS).floor().clamp(0, 255).to(torch.uint8).movedim(-1, axis)
    return pictures


@cache
def _weights(before: int, after: int, device: torch.device) -> Tensor:
    """Return the weights of the pixels of one line in units of 2^-22, whole, float64 [after, before].

    A triangle around each pixel's centre, as wide as the scale where the line shrinks.
    """
    scale = before / after
    centre = (torch.arange(after, dtype=torch.float64) + 0.5) * scale
    place = torch.arange(before, dtype=torch.float64) + 0.5
    weight = (1 - (place - centre[:, None]).abs() / max(scale, 1.0)).clamp_min(0)
    weight = weight / weight.sum(1, keepdim=True)
    return transfer.to((weight * 2**_BITS + 0.5).floor(), device)
