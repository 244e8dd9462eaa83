"""Camera pictures to pixel values, batched, on the model's device."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from rove.errors import RoveError

CROP_AREA = 0.9
"""Share of the picture's area that a centre crop keeps, OpenVLA's augmentation at test time."""


def process(images: Tensor, size: int, mean: Tensor, std: Tensor, *, center_crop: bool) -> Tensor:
    """Pixel values [B, 3·k·n, size, size] of n pictures for k towers.

    `images` is uint8 [B, n, H, W, 3]; `mean` and `std` are [3·k], of pixels in [0, 255]. Channels go by
    picture, then tower, then colour. Raises RoveError on another dtype or shape.
    """
    if images.dtype != torch.uint8 or images.ndim != 5 or images.shape[-1] != 3:
        raise RoveError(
            f"Images are {images.dtype} {tuple(images.shape)}, expected torch.uint8 [B, n, H, W, 3]."
        )
    batch, views = images.shape[:2]
    pictures = images.flatten(0, 1).permute(0, 3, 1, 2)
    if center_crop:
        pictures = _center_crop(pictures, size)
    if pictures.shape[-2:] != (size, size):
        pictures = _resize(pictures, size)
    towers = len(mean) // 3
    pixels = pictures.to(mean.dtype).repeat(1, towers, 1, 1)
    pixels = (pixels - mean[:, None, None]) / std[:, None, None]
    return pixels.view(batch, views * len(mean), size, size)


def _resize(pictures: Tensor, size: int) -> Tensor:
    """Antialiased bicubic as PIL does it: columns, then rows, each rounded to 8 bits."""
    if pictures.device.type == "cpu":
        return F.interpolate(pictures, size=(size, size), mode="bicubic", antialias=True)
    # torch has the 8-bit kernel on the CPU only; two float passes come within one or two levels of it.
    x = pictures.float()
    for shape in ((x.shape[-2], size), (size, size)):
        x = F.interpolate(x, size=shape, mode="bicubic", antialias=True).round().clamp(0, 255)
    return x


def _center_crop(pictures: Tensor, size: int) -> Tensor:
    """The central `CROP_AREA` of each picture, sampled bilinearly at size x size, corners aligned."""
    side = math.sqrt(CROP_AREA)
    grid = torch.linspace(-side, side, size, device=pictures.device)
    y, x = torch.meshgrid(grid, grid, indexing="ij")
    where = torch.stack((x, y), dim=-1).expand(len(pictures), -1, -1, -1)
    cropped = F.grid_sample(pictures.float(), where, mode="bilinear", align_corners=True)
    return cropped.round().clamp(0, 255).to(torch.uint8)
