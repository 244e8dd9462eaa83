"""Compositing of a rendered frame: the photo of a table behind robot and objects, and blended textures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from rove.envs.maniskill.put_on_plate.families import PlateScene

HEIGHT, WIDTH = 480, 640
"""Pixels of the published camera."""


@cache
def _table_files(folder: Path) -> list[tuple[Path, Path]]:
    """List photo and texture of each table."""
    tables = json.loads((folder / "model_db.json").read_text())
    return [
        (folder / "imgs" / name, folder / "textures" / about["texture"]) for name, about in tables.items()
    ]


@cache
def _picture(path: Path, height: int, width: int) -> Tensor:
    """Read a picture, uint8 [height, width, 3]."""
    image = Image.open(path).convert("RGB")
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image))


@cache
def _texture(path: Path) -> Tensor:
    """Read a texture, float32 [3, 480, 640], 0 to 255."""
    return _picture(path, HEIGHT, WIDTH).permute(2, 0, 1).float()


def compose(rgb: Tensor, keep: Tensor, scenes: Sequence[PlateScene], folder: Path) -> Tensor:
    """Compose the observation of n worlds, uint8 [n, H, W, 3].

    `rgb` uint8 [n, H, W, 3] is what was rendered, `keep` bool [n, H, W] where it shows robot or objects:
    there it stays; elsewhere the photo of the scene's table shows. `folder` holds photos and textures.
    """
    height, width = rgb.shape[1:3]
    files = _table_files(folder)
    photos = torch.stack([_picture(files[s.table][0], height, width) for s in scenes]).to(rgb.device)
    images = torch.where(keep[..., None], rgb, photos)
    for row, scene in enumerate(scenes):
        if scene.effect == "none" or scene.strength == 0.0 or not keep[row].any():
            continue
        texture = _texture(files[scene.texture][1]).to(rgb.device)
        blend = _whole if scene.effect == "whole" else _foreground
        images[row] = blend(images[row], keep[row], texture, scene.strength)
    return images


def _box(keep: Tensor) -> tuple[int, int, int, int]:
    """Return first and last row, first and last column in which anything is kept."""
    rows, columns = keep.any(1).nonzero().flatten(), keep.any(0).nonzero().flatten()
    return int(rows[0]), int(rows[-1]), int(columns[0]), int(columns[-1])


def _resized(texture: Tensor, height: int, width: int) -> Tensor:
    """Resize bilinearly to float32 [height, width, 3]."""
    resized = F.interpolate(texture[None], (height, width), mode="bilinear", align_corners=False)
    return resized[0].permute(1, 2, 0)


def _mixed(image: Tensor, texture: Tensor, strength: float) -> Tensor:
    return (strength * texture + (1 - strength) * image.float()).clamp(0, 255).to(torch.uint8)


def _foreground(image: Tensor, keep: Tensor, texture: Tensor, strength: float) -> Tensor:
    """Blend the texture, stretched over the box of what is kept, into that alone."""
    top, bottom, left, right = _box(keep)
    inside = (slice(top, bottom + 1), slice(left, right + 1))
    patch = _resized(texture, bottom - top + 1, right - left + 1)
    image = image.clone()
    image[inside] = torch.where(
        keep[inside][..., None], _mixed(image[inside], patch, strength), image[inside]
    )
    return image


def _whole(image: Tensor, keep: Tensor, texture: Tensor, strength: float) -> Tensor:
    """Blend a window of the texture at twice the frame's size, which moves with the box, into all."""
    height, width = image.shape[:2]
    top, bottom, left, right = _box(keep)
    v, u = min(max((top + bottom) // 2, 1), height - 1), min(max((left + right) // 2, 1), width - 1)
    window = _resized(texture, 2 * height, 2 * width)[v : v + height, u : u + width]
    return _mixed(image, window, strength)
