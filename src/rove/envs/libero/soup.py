"""Makes of a MuJoCo model what the rasteriser draws: triangles, textures, materials.

Shapes are cut into the triangles that MuJoCo's OpenGL renderer cuts them into, because light is computed at
their corners. Meshes have far more faces than a picture can show: each is simplified to as many as fit its
surface at the size of a pixel where a camera sees it best. Textures are halved to what can be shown.
"""

# pyright: reportAttributeAccessIssue=false
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mujoco
import numpy as np
from PIL import Image

from rove.envs.libero.simplify import Corners, distinct, simplify
from rove.errors import RoveError

GROUPS = (1, 2)
"""Geom groups in the stock picture; group 0 holds collision shapes."""
DETAIL = 0.1
"""Faces that a mesh keeps for each pixel's worth of its surface; 0: all that it has."""
_COVER = 2.0
"""A mesh shows no more of its surface than fills this many pictures."""
_FEWEST = 200
"""Faces that a mesh keeps however small it is."""
TEXTURE_SCALE = 4
"""A texture is halved until it is at most this many times as wide as the picture."""
_CLOSEST = 0.12
"""Metres to which the wrist camera comes near to things."""
_REACH = 0.9
"""Radius of the space around the robot's base in which the wrist camera moves, metres."""
_INFINITE = 20.0
"""Half size at which an infinite plane is cut off, metres."""

Box = mujoco.mjtGeom.mjGEOM_BOX.value
Plane = mujoco.mjtGeom.mjGEOM_PLANE.value
Mesh = mujoco.mjtGeom.mjGEOM_MESH.value
Cylinder = mujoco.mjtGeom.mjGEOM_CYLINDER.value
Sphere = mujoco.mjtGeom.mjGEOM_SPHERE.value
Ellipsoid = mujoco.mjtGeom.mjGEOM_ELLIPSOID.value
Capsule = mujoco.mjtGeom.mjGEOM_CAPSULE.value


@dataclass(frozen=True, slots=True)
class Soup:
    """The drawn part of a model. V corners, F triangles, G things: geoms, then sites."""

    geoms: np.ndarray
    """Ids of the geoms, int, the first of the G."""
    sites: np.ndarray
    """Ids of the sites, int, the rest of the G."""
    position: np.ndarray
    """Positions float32 [V, 3], in the frame of the thing."""
    normal: np.ndarray
    uv: np.ndarray
    thing: np.ndarray
    """Index among the G of each corner, int32 [V]."""
    triangles: np.ndarray
    """int32 [F, 3]."""
    rgba: np.ndarray
    """float32 [G, 4]."""
    material: np.ndarray
    """float32 [G, 3]: emission, specular, OpenGL's shininess exponent."""
    texture: np.ndarray
    """int32 [G]: id of the model's texture, -1 for none."""
    faces: int
    """Triangles before meshes were simplified."""

    @property
    def things(self) -> range:
        """G, the number of things."""
        return range(len(self.geoms) + len(self.sites))


def soup(
    model: mujoco.MjModel,
    pixels: int,
    cameras: Sequence[str],
    burners: Sequence[int] = (),
    detail: float = DETAIL,
) -> Soup:
    """Collect everything of `model` that pictures of `pixels` rows show."""
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    geoms = np.flatnonzero(np.isin(model.geom_group, GROUPS))
    geoms = geoms[[_rgba(model, int(g))[3] > 0 for g in geoms]]
    sites = np.array(burners, np.int64)
    parts, counts, faces = [], [], 0
    for index in geoms:
        corners = _corners(model, index)
        faces += len(corners)
        if detail and model.geom_type[index] == Mesh:
            pixel = _pixel(model, data, index, pixels, cameras)
            budget = detail * min(_area(corners) / max(pixel, 1e-9) ** 2, _COVER * pixels**2)
            corners = simplify(corners, max(int(budget), _FEWEST))
        parts.append(_indexed(corners))
        counts.append(len(parts[-1][0]))
    for site in sites:
        shape = _solid(int(model.site_type[site]), model.site_size[site], model)
        parts.append(_indexed(Corners(*shape, uv=np.zeros((len(shape[0]), 2)))))
        counts.append(len(parts[-1][0]))
    starts = np.cumsum([0, *counts])[:-1]
    materials = [int(model.geom_matid[g]) for g in geoms] + [int(model.site_matid[s]) for s in sites]
    rgba = [_rgba(model, g) for g in geoms] + [model.site_rgba[s] for s in sites]
    return Soup(
        geoms=geoms,
        sites=sites,
        position=np.concatenate([p[0] for p in parts]).astype(np.float32),
        normal=np.concatenate([p[1] for p in parts]).astype(np.float32),
        uv=np.concatenate([p[2] for p in parts]).astype(np.float32),
        thing=np.repeat(np.arange(len(parts)), counts).astype(np.int32),
        triangles=np.concatenate([p[3] + s for p, s in zip(parts, starts, strict=True)]).astype(np.int32),
        rgba=np.array(rgba, np.float32),
        material=np.array([_material(model, m) for m in materials], np.float32),
        texture=np.array([_texture(model, m) for m in materials], np.int32),
        faces=faces,
    )


def _rgba(model: mujoco.MjModel, geom: int) -> np.ndarray:
    """Return a geom's colour, or its material's where its own was not set."""
    own, material = model.geom_rgba[geom], model.geom_matid[geom]
    if material >= 0 and (own == np.array([0.5, 0.5, 0.5, 1.0], np.float32)).all():
        return model.mat_rgba[material]
    return own


def _material(model: mujoco.MjModel, material: int) -> tuple[float, float, float]:
    if material < 0:
        return 0.0, 0.5, 64.0
    m = model.mat(material)
    return float(m.emission[0]), float(m.specular[0]), 128 * float(m.shininess[0])


def _texture(model: mujoco.MjModel, material: int) -> int:
    return -1 if material < 0 else int(model.mat_texid[material, mujoco.mjtTextureRole.mjTEXROLE_RGB.value])


# --- shapes -------------------------------------------------------------------------------------------


def _corners(model: mujoco.MjModel, geom: int) -> Corners:
    kind, size = int(model.geom_type[geom]), model.geom_size[geom]
    texture = _texture(model, int(model.geom_matid[geom]))
    if kind == Mesh:
        position, normal, uv = _mesh(model, int(model.geom_dataid[geom]))
        if uv is not None:
            return Corners(position, normal, uv if texture >= 0 else np.zeros_like(uv))
        unit = position
    else:
        position, normal = _solid(kind, size, model)
        unit = position if kind == Plane else position / np.where(size > 0, size, 1.0)
    if texture < 0:
        return Corners(position, normal, np.zeros((len(position), 2)))
    material = int(model.geom_matid[geom])
    repeat, uniform = model.mat_texrepeat[material], bool(model.mat_texuniform[material])
    if model.tex_type[texture] == mujoco.mjtTexture.mjTEXTURE_2D.value:
        scale = np.array(repeat, float)
        positive = np.where(size[:2] > 0, size[:2], 1.0)
        if kind in (Mesh, Plane):
            scale /= positive
        if uniform:
            scale *= positive
        return Corners(position, normal, unit[:, :2] * [0.5, -0.5] * scale - 0.5)
    return Corners(position, normal, _cube(unit * (size if uniform else 1.0), _stacked(model, texture)))


def _mesh(model: mujoco.MjModel, mesh: int) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Positions, normals, and texture coordinates if it has any; [3 F, ...]."""
    faces = slice(model.mesh_faceadr[mesh], model.mesh_faceadr[mesh] + model.mesh_facenum[mesh])
    position = model.mesh_vert[model.mesh_vertadr[mesh] + model.mesh_face[faces].ravel()]
    normal = model.mesh_normal[model.mesh_normaladr[mesh] + model.mesh_facenormal[faces].ravel()]
    if model.mesh_texcoordadr[mesh] >= 0:
        where = model.mesh_texcoordadr[mesh] + model.mesh_facetexcoord[faces].ravel()
        return position, normal, model.mesh_texcoord[where]
    # MuJoCo's renderer does not trust a normal that is far off the face, on meshes without texture.
    a, b, c = position.reshape(-1, 3, 3).transpose(1, 0, 2)
    face = np.cross(b - a, c - a)
    face = np.repeat(face / np.maximum(np.linalg.norm(face, axis=1, keepdims=True), 1e-12), 3, axis=0)
    return position, np.where((normal * face).sum(1, keepdims=True) < 0.8, face, normal), None


def _solid(kind: int, size: np.ndarray, model: mujoco.MjModel) -> tuple[np.ndarray, np.ndarray]:
    """Positions and normals [3 F, 3] of a shape that is not a mesh."""
    quality = model.vis.quality
    if kind == Box:
        return _box(quality.numquads, size)
    if kind == Plane:
        return _plane(size)
    slices, stacks = quality.numslices, quality.numstacks
    if kind == Cylinder:
        h = np.linspace(-1, 1, stacks + 1)
        r = np.linspace(0, 1, stacks // 2 + 1)
        z, one = np.zeros_like, np.ones_like
        parts = [
            _revolve(r[::-1], -one(r), z(r), -one(r), slices, size[[0, 0, 1]], flip=True),
            _revolve(one(h), h, one(h), z(h), slices, size[[0, 0, 1]]),
            _revolve(r[::-1], one(r), z(r), one(r), slices, size[[0, 0, 1]]),
        ]
        return np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])
    if kind in (Sphere, Ellipsoid):
        e = np.linspace(-np.pi / 2, np.pi / 2, stacks + 1)
        radii = size if kind == Ellipsoid else size[[0, 0, 0]]
        return _revolve(np.cos(e), np.sin(e), np.cos(e), np.sin(e), slices, radii)
    if kind == Capsule:
        e = np.linspace(-np.pi / 2, np.pi / 2, 2 * (stacks // 2) + 2)
        e[len(e) // 2 - 1 : len(e) // 2 + 1] = 0.0
        shift = np.where(np.arange(len(e)) < len(e) // 2, -1, 1) * size[1] / size[0]
        return _revolve(np.cos(e), np.sin(e) + shift, np.cos(e), np.sin(e), slices, size[[0, 0, 0]])
    raise RoveError(f"The warp renderer cannot draw a geom of type {mujoco.mjtGeom(kind).name}. Use gl.")


def _grid(rows: int, columns: int) -> np.ndarray:
    """Corners [3 F] of the triangles of a grid of points, numbered row by row."""
    a = (np.arange(rows - 1)[:, None] * columns + np.arange(columns - 1)).ravel()
    b, c, d = a + 1, a + columns + 1, a + columns
    return np.stack([a, b, c, a, c, d], axis=1).ravel()


def _revolve(
    radius: np.ndarray, height: np.ndarray, out: np.ndarray, up: np.ndarray,
    slices: int, scale: np.ndarray, flip: bool = False,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """A profile (radius, height), with normals (out, up), turned around z."""
    angle = np.linspace(0, 2 * np.pi, slices + 1)
    x, y = np.cos(angle), np.sin(angle)

    def turn(r: np.ndarray, z: np.ndarray) -> np.ndarray:
        flat = np.broadcast_to(z[:, None], (len(z), len(angle)))
        return np.stack([r[:, None] * x, r[:, None] * y, flat], axis=-1).reshape(-1, 3)

    index = _grid(len(radius), len(angle))
    if flip:
        index = index.reshape(-1, 3)[:, ::-1].ravel()
    normal = turn(out, up) / scale
    return (turn(radius, height) * scale)[index], normal[index]


def _box(quads: int, size: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    u, v = np.meshgrid(np.linspace(-1, 1, quads + 1), np.linspace(-1, 1, quads + 1), indexing="ij")
    face = np.stack([v.ravel(), u.ravel(), np.ones(u.size)], axis=1)[_grid(quads + 1, quads + 1)]
    position, normal = [], []
    for axis in range(3):
        for sign in (1.0, -1.0):
            order = np.roll([0, 1, 2], axis + 1)  # the face's x, y and outward direction
            side = np.empty_like(face)
            side[:, order] = face * [1.0, sign, sign]
            position.append(side)
            normal.append(np.tile(np.eye(3)[order[2]] * sign, (len(face), 1)))
    return np.concatenate(position) * size, np.concatenate(normal)


def _plane(size: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A grid as fine as the plane's third size asks for, with a margin on both sides."""
    lines = []
    for half in size[:2]:
        if half <= 0:
            lines.append(np.linspace(-_INFINITE, _INFINITE, 41))
            continue
        cell = max(float(size[2]), half / 199)
        count = int(half / max(cell, 1e-9))
        count -= count % 2
        inner = cell * (np.arange(count + 1) * 2 - count)
        lines.append(np.unique(np.concatenate([[-half], inner, [half]])))
    y, x = np.meshgrid(lines[1], lines[0], indexing="ij")
    points = np.stack([x.ravel(), y.ravel(), np.zeros(x.size)], axis=1)
    position = points[_grid(len(lines[1]), len(lines[0]))]
    return position, np.tile([0.0, 0.0, 1.0], (len(position), 1))


def _stacked(model: mujoco.MjModel, texture: int) -> bool:
    """Tell whether a cube texture holds six faces, one below the other; otherwise all six are the same."""
    return bool(model.tex_height[texture] != model.tex_width[texture])


def _cube(direction: np.ndarray, stacked: bool) -> np.ndarray:
    """Texture coordinates [3 F, 2] on a cube map: each triangle on the side that its middle points to."""
    middle = direction.reshape(-1, 3, 3).mean(1)
    axis = np.repeat(np.abs(middle).argmax(1), 3)
    negative = np.repeat(np.take_along_axis(middle, np.abs(middle).argmax(1)[:, None], 1)[:, 0] < 0, 3)
    x, y, z = direction.T
    across = np.choose(axis, [np.where(negative, z, -z), x, np.where(negative, -x, x)])
    down = np.choose(axis, [-y, np.where(negative, -z, z), -y])
    along = np.maximum(np.abs(np.take_along_axis(direction, axis[:, None], 1)[:, 0]), 1e-6)
    u, v = 0.5 + 0.5 * across / along, 0.5 + 0.5 * down / along
    # Half a texel from the border the faces of a strip would run into one another.
    return np.stack([u, (2 * axis + negative + np.clip(v, 2e-3, 1 - 2e-3)) / 6 if stacked else v], axis=1)


# --- detail -------------------------------------------------------------------------------------------


def _pixel(
    model: mujoco.MjModel, data: mujoco.MjData, geom: int, pixels: int, cameras: Sequence[str]
) -> float:
    """Return the size that the finest pixel showing a geom covers there, metres; 0: a camera may be
    inside."""
    body = int(model.geom_bodyid[geom])
    bound = float(model.geom_rbound[geom])
    finest = np.inf
    for name in cameras:
        camera = model.camera(name).id
        angle = 2 * np.tan(np.deg2rad(model.cam_fovy[camera]) / 2) / pixels
        if model.body_weldid[model.cam_bodyid[camera]] == 0:
            distance = np.linalg.norm(data.geom_xpos[geom] - data.cam_xpos[camera]) - bound
            if model.body_weldid[body] != 0:
                distance -= 0.3  # it moves
        elif _arm(model, body):
            continue  # behind the camera at the wrist
        elif model.body_weldid[body] == 0:
            base = data.xpos[model.body("robot0_base").id]
            distance = np.linalg.norm(data.geom_xpos[geom] - base) - bound - _REACH
        else:
            distance = 0.0
        finest = min(finest, angle * max(float(distance), _CLOSEST))
    return finest if np.isfinite(finest) else 0.0


def _arm(model: mujoco.MjModel, body: int) -> bool:
    return model.body(body).name.startswith(("robot0_link", "mount0_", "robot0_base"))


def _area(corners: Corners) -> float:
    """Compute the area of triangles, square metres."""
    a, b, c = corners.position.reshape(-1, 3, 3).transpose(1, 0, 2)
    return float(np.linalg.norm(np.cross(b - a, c - a), axis=1).sum() / 2)


def _indexed(corners: Corners) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Distinct corners (positions, normals, texture coordinates), and the triangles [F, 3] over them."""
    rows = np.concatenate([corners.position, corners.normal, corners.uv], axis=1)
    rows, index = distinct(rows)
    return rows[:, :3], rows[:, 3:6], rows[:, 6:], index.reshape(-1, 3)


# --- textures -----------------------------------------------------------------------------------------


def levels(model: mujoco.MjModel, texture: int, pixels: int) -> list[np.ndarray]:
    """A texture and its halvings down to one texel, as uint32 [h, w] 0x00BBGGRR.

    Colours are taken as they are stored, as MuJoCo did before it knew of colour spaces (3.2.3).
    """
    adr, channels = int(model.tex_adr[texture]), int(model.tex_nchannel[texture])
    height, width = int(model.tex_height[texture]), int(model.tex_width[texture])
    texels = model.tex_data[adr : adr + height * width * channels].reshape(height, width, channels)
    if channels not in (3, 4):
        raise RoveError(f"Texture {model.tex(texture).name!r} has {channels} channels; expected 3 or 4.")
    image = Image.fromarray(np.ascontiguousarray(texels[..., :3]))
    result = []
    while True:
        if min(image.size) <= TEXTURE_SCALE * pixels:
            rgb = np.asarray(image).astype(np.uint32)
            result.append(rgb[..., 0] | rgb[..., 1] << 8 | rgb[..., 2] << 16)
        if max(image.size) == 1:
            return result
        w, h = image.size
        image = image.resize((max(w // 2, 1), max(h // 2, 1)), Image.Resampling.BOX)
