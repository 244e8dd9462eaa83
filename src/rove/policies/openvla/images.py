"""Conversion of camera images to pixel values, batched, on the model's device."""

from __future__ import annotations

import math
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from rove import transfer
from rove.errors import RoveError

CROP_AREA = 0.9
"""Fraction of an image's area that a centre crop keeps, OpenVLA's augmentation at test time."""


def process(
    images: Tensor,
    size: int,
    mean: Tensor,
    std: Tensor,
    *,
    center_crop: bool,
    interpolation: str = "bicubic",
) -> Tensor:
    """Compute pixel values [B, 3·k·n, size, size] of n images for k towers.

    `images` is uint8 [B, n, H, W, 3]; `mean` and `std` are [3·k], of pixels in [0, 255]. Channels are ordered
    by image, then tower, then colour. Images are resized by `interpolation` ("bicubic" or "lanczos"),
    antialiased, without regard to their aspect, and then cropped: the order that published checkpoints were
    evaluated in. Raises RoveError on another dtype or shape.
    """
    if images.dtype != torch.uint8 or images.ndim != 5 or images.shape[-1] != 3:
        raise RoveError(
            f"Images are {images.dtype} {tuple(images.shape)}, expected torch.uint8 [B, n, H, W, 3]."
        )
    batch, views = images.shape[:2]
    pictures = images.flatten(0, 1).permute(0, 3, 1, 2)
    if pictures.shape[-2:] != (size, size):
        pictures = _resize(pictures, size, interpolation)
    if center_crop:
        pictures = _center_crop(pictures, size)
    towers = len(mean) // 3
    pixels = pictures.to(mean.dtype).repeat(1, towers, 1, 1)
    pixels = (pixels - mean[:, None, None]) / std[:, None, None]
    return pixels.view(batch, views * len(mean), size, size)


def _resize(pictures: Tensor, size: int, interpolation: str) -> Tensor:
    """Resize with antialiasing, as PIL does: columns, then rows, each rounded to 8 bits."""
    if pictures.device.type == "cpu":
        return F.interpolate(pictures, size=(size, size), mode=interpolation, antialias=True)
    return resize_by_matrix(pictures, size, interpolation)


def resize_by_matrix(pictures: Tensor, size: int, interpolation: str) -> Tensor:
    """Resize like `_resize`, within a level or two, by two matrix products, where no 8-bit kernel exists."""
    x = pictures.float()
    x = (x @ _kernel(x.shape[-1], size, interpolation, x.device).T).round().clamp(0, 255)
    return (_kernel(x.shape[-2], size, interpolation, x.device) @ x).round().clamp(0, 255)


@cache
def _kernel(before: int, after: int, interpolation: str, device: torch.device) -> Tensor:
    """Return the weights of the pixels of one line, float32 [after, before], stretched where it shrinks."""
    scale = before / after
    stretch = max(scale, 1.0)
    centre = (torch.arange(after, dtype=torch.float64) + 0.5) * scale
    x = ((torch.arange(before, dtype=torch.float64) + 0.5) - centre[:, None]).abs() / stretch
    if interpolation == "lanczos":
        weight = torch.where(x < 3, torch.sinc(x) * torch.sinc(x / 3), 0.0)
    else:  # Keys 1981 with a = -1/2, as in PIL
        near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
        weight = torch.where(x < 1, near, torch.where(x < 2, far, 0.0))
    return transfer.to((weight / weight.sum(1, keepdim=True)).float(), device)


def _center_crop(pictures: Tensor, size: int) -> Tensor:
    """Sample the central `CROP_AREA` of each image bilinearly at size x size, corners aligned."""
    side = math.sqrt(CROP_AREA)
    grid = torch.linspace(-side, side, size, device=pictures.device)
    y, x = torch.meshgrid(grid, grid, indexing="ij")
    where = torch.stack((x, y), dim=-1).expand(len(pictures), -1, -1, -1)
    cropped = F.grid_sample(pictures.float(), where, mode="bilinear", align_corners=True)
    return cropped.round().clamp(0, 255).to(torch.uint8)
