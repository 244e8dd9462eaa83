"""Sizes of the vision towers, as a checkpoint's config.json gives them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from rove.config.ranges import Range
from rove.config.schema import TowerConfig
from rove.errors import RoveError
from rove.policies.reading import DEPTH, WIDTH, Table

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
SIGLIP = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))

TIMM_SIZES = {
    "vit_large_patch14_reg4_dinov2.lvd142m": (1024, 24, 16),
    "vit_so400m_patch14_siglip_224": (1152, 27, 16),
}
_MLP_RATIO = {"dinov2": 4.0, "siglip": 3.7362}


_RATIO = Annotated[float, Range("between 0 and 100", lambda x: 0 < x < 100)]


def colours(kind: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation of the three channels that towers of a kind were trained on."""
    return IMAGENET if kind == "dinov2" else SIGLIP


def read_tower(name: str, size: Table) -> TowerConfig:
    """Read the sizes of a tower from its entry of `timm_kwargs`, which may leave out published ones."""
    kinds = [kind for kind in _MLP_RATIO if kind in name]
    if not kinds or (name not in TIMM_SIZES and not size.content):
        raise RoveError(
            f"{size.where}: unknown vision tower {name!r}. Expected one of: {', '.join(TIMM_SIZES)}."
        )
    size.refuse_unknown(("embed_dim", "depth", "num_heads", "patch_size", "mlp_ratio"))
    published = TIMM_SIZES.get(name)
    own = (("embed_dim", WIDTH), ("depth", DEPTH), ("num_heads", WIDTH))
    width, depth, heads = (
        size.get(key, kind, published[i]) if published else size.need(key, kind)
        for i, (key, kind) in enumerate(own)
    )
    return TowerConfig(
        kind=kinds[0],  # pyright: ignore[reportArgumentType]
        width=width,
        depth=depth,
        heads=heads,
        patch=size.get("patch_size", WIDTH, 14),
        mlp=int(width * size.get("mlp_ratio", _RATIO, _MLP_RATIO[kinds[0]]) + 1e-6),
    )


def check_sizes(where: str, towers: Sequence[TowerConfig], image_size: int) -> None:
    """Raise RoveError naming sizes that do not divide one another; names begin with `where`."""
    for tower in towers:
        if image_size % tower.patch:
            fits = [str(patch) for patch in (4, 8, 14, 16, 32) if image_size % patch == 0]
            raise RoveError(
                f"{where}towers: patch {tower.patch} does not divide the image size {image_size}. "
                f"Choose one of: {', '.join(fits)}."
            )
        if tower.kind == "dinov2" and tower.mlp % tower.width:
            raise RoveError(
                f"{where}towers: the mlp of a dinov2 tower must be a multiple of its width {tower.width}, "
                f"not {tower.mlp}."
            )
    if len({tower.patch for tower in towers}) != 1:
        raise RoveError(
            f"{where}towers: all towers need the same patch size, because their features are joined."
        )
    for tower in towers:
        check_heads(f"{where}towers", tower.width, tower.heads)


def check_heads(name: str, width: int, heads: int) -> None:
    """Raise RoveError where attention heads do not divide a width into pairs of channels."""
    if width % (2 * heads):
        raise RoveError(f"{name}: width {width} must be a multiple of 2 x heads = {2 * heads}.")
