"""Meshes with fewer faces that a picture cannot tell from the original.

Positions are simplified by quadric error metrics (Garland and Heckbert 1997, in the `fast-simplification`
package). Texture coordinates and normals of a face that is left are those of the original corner nearest to
where its corner came to lie, so that the texture does not slide.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rove.errors import RoveError

_CAUTION = 4.0
"""The package's `agg`; its default of 7 is quicker, and twice as far from the original."""
_TRIED = 0.7
"""A mesh is left alone when more than this share of its faces would stay."""


@dataclass(frozen=True, slots=True)
class Corners:
    """Triangles as corners in a row, three to a triangle."""

    position: np.ndarray
    """float [3 F, 3], metres, in the geom's frame."""
    normal: np.ndarray
    """float [3 F, 3], unit vectors."""
    uv: np.ndarray
    """float [3 F, 2]; zero where there is no texture."""

    def __len__(self) -> int:
        return len(self.position) // 3


def simplify(corners: Corners, faces: int) -> Corners:
    """Simplify to about `faces` triangles; returns `corners` itself where that would spare little."""
    if faces > _TRIED * len(corners):
        return corners
    try:
        import fast_simplification as fast
    except ImportError as error:
        raise RoveError(
            "Drawing LIBERO needs fast-simplification, which is not installed. Install it: pip install "
            "'rove[libero]'"
        ) from error
    # Where the texture is cut, a corner is two: the border of each piece stays as it is.
    textured = bool(corners.uv.any())
    rows, index = distinct(np.concatenate([corners.position, corners.uv], axis=1))
    points = rows[:, :3]
    triangles = index.reshape(-1, 3).astype(np.int32)
    solid = _solid(triangles)
    if faces > _TRIED * solid.sum():
        return corners
    collapses = fast.simplify(
        points,
        triangles[solid],
        target_count=faces,
        agg=_CAUTION,
        return_collapses=True,
        preserve_border=textured,
    )[-1]
    new_points, _, moved = fast.replay_simplification(points, triangles[solid], collapses)
    new = moved[triangles]
    kept = solid & _solid(new)
    return _dress(corners, index, moved, new_points, new, kept)


def _solid(triangles: np.ndarray) -> np.ndarray:
    """Tell which triangles have three corners that differ, bool [F]."""
    a, b, c = triangles.T
    return (a != b) & (b != c) & (a != c)


def _dress(
    corners: Corners,
    index: np.ndarray,
    moved: np.ndarray,
    points: np.ndarray,
    new: np.ndarray,
    kept: np.ndarray,
) -> Corners:
    """Find normals and texture coordinates for the triangles that are left."""
    group = moved[index]
    order = np.argsort(group, kind="stable")
    ordered = group[order]
    # For each corner that is left, all original corners that came to lie there.
    wanted = np.flatnonzero(np.repeat(kept, 3))
    start = np.searchsorted(ordered, group[wanted], "left")
    count = np.searchsorted(ordered, group[wanted], "right") - start
    owner = np.repeat(np.arange(len(wanted)), count)
    member = order[np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count) + start[owner]]
    place = points[new[kept].ravel()]
    a, b, c = place.reshape(-1, 3, 3).transpose(1, 0, 2)
    face = np.cross(b - a, c - a)
    edge = np.sqrt(np.maximum(np.linalg.norm(face, axis=1, keepdims=True), 1e-20))
    face, edge = np.repeat(face / edge**2, 3, axis=0), np.repeat(edge, 3)
    far = np.linalg.norm(corners.position[member] - place[owner], axis=1) / edge[owner]
    turned = 1 - (corners.normal[member] * face[owner]).sum(1)
    best = np.lexsort((far + turned, owner))[np.cumsum(count) - count]
    chosen = member[best]
    return Corners(place, corners.normal[chosen], corners.uv[chosen])


def distinct(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the distinct rows, and the index of each row among them."""
    exact = np.ascontiguousarray(rows.astype(np.float32) + 0.0)
    void = exact.view(np.dtype((np.void, exact.itemsize * exact.shape[1]))).ravel()
    _, first, index = np.unique(void, return_index=True, return_inverse=True)
    return rows[first], index.ravel()
