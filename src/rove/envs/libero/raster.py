"""A rasteriser in Warp kernels that shades as MuJoCo's OpenGL renderer does; CPU or CUDA, no OpenGL.

Four passes over `n` worlds and `c` cameras at once:

    place      vertices into each camera's frame
    rasterise  triangles: the nearest one at each of a pixel's samples (a visibility buffer)
    light      those vertices whose triangles are seen
    shade      pixels: interpolate light and texture coordinates, look the texture up, average the samples

As in OpenGL's fixed pipeline, light is computed at the vertices and clamped before the texture multiplies
it. A ray tracer that lights every pixel and adds the highlight afterwards shows other colours.
Triangles are rasterised in homogeneous coordinates (Olano and Greer 1997), so that none needs clipping.
"""

# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportIndexIssue=false
# pyright: reportOperatorIssue=false, reportCallIssue=false, reportInvalidTypeForm=false
# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false
# (Warp kernels are not Python)
from __future__ import annotations

import warp as wp

SAMPLES = 4
"""Samples a pixel, as in the stock picture."""
EMPTY = 0xFFFFFFFFFFFFFFFF
"""Visibility of a sample where nothing is seen."""

wp.set_module_options({"enable_backward": False, "fast_math": True})

_LOW = wp.constant(wp.uint64(0xFFFFFFFF))
_NOTHING = wp.constant(wp.uint64(EMPTY))
_SLACK = 0.01
"""Pixels outside a triangle at which a sample still counts: rounding must leave no gap between neighbours."""


@wp.struct
class RasterScene:
    """The part of a model that does not move."""

    position: wp.array(dtype=wp.vec3)
    """Positions of vertices [V], in the geom's frame."""
    normal: wp.array(dtype=wp.vec3)
    uv: wp.array(dtype=wp.vec2)
    geom: wp.array(dtype=wp.int32)
    """Index among the drawn geoms of each vertex [V]."""
    triangles: wp.array(dtype=wp.vec3i)
    """Corners of each triangle [F], counter-clockwise from outside."""
    centre: wp.array(dtype=wp.vec3)
    """Centre of a sphere around each geom [G], in its frame."""
    radius: wp.array(dtype=wp.float32)
    material: wp.array(dtype=wp.vec3)
    """Emission, specular and OpenGL's shininess exponent of each geom [G]."""
    texture: wp.array(dtype=wp.int32)
    """Texture of each geom [G], -1 for none."""
    texels: wp.array(dtype=wp.uint32)
    """All levels of all textures, 0x00BBGGRR."""
    levels: wp.array(dtype=wp.int32)
    """Number of levels of each texture [T]."""
    level: wp.array2d(dtype=wp.vec3i)
    """Offset into texels, width and height of each level [T, levels]."""
    light_direct: wp.array(dtype=wp.int32)
    """Lights [L] that are directional."""
    light_diffuse: wp.array(dtype=wp.vec3)
    light_ambient: wp.array(dtype=wp.vec3)
    light_specular: wp.array(dtype=wp.vec3)
    light_spot: wp.array(dtype=wp.vec2)
    """Cosine of the cutoff angle and exponent of each light [L]."""
    light_attenuation: wp.array(dtype=wp.vec3)
    head: wp.mat33
    """Rows: ambient, diffuse and specular light of the headlight; zero without."""


@wp.struct
class View:
    """Poses of everything in n worlds."""

    geom_position: wp.array2d(dtype=wp.vec3)
    """[n, G]."""
    geom_rotation: wp.array2d(dtype=wp.mat33)
    geom_rgba: wp.array2d(dtype=wp.vec4)
    camera_position: wp.array2d(dtype=wp.vec3)
    """[n, c]."""
    camera_rotation: wp.array2d(dtype=wp.mat33)
    """[n, c], columns: right, up, backwards."""
    light_position: wp.array2d(dtype=wp.vec3)
    """[n, L]."""
    light_direction: wp.array2d(dtype=wp.vec3)
    focal: wp.array(dtype=wp.float32)
    """[c]: half the picture's height over the tangent of half the opening angle, pixels."""
    near: wp.float32
    height: wp.int32
    width: wp.int32
    stamp: wp.int32
    """Counts pictures; what carries another stamp is of an earlier one."""


@wp.kernel
def place(scene: RasterScene, view: View, seen: wp.array3d(dtype=wp.int32), out: wp.array3d(dtype=wp.vec3)):
    """Compute camera-frame positions of the vertices of geoms in view; [n, c, V]."""
    n, c, v = wp.tid()
    g = scene.geom[v]
    if seen[n, c, g] == 0:
        return
    world = view.geom_rotation[n, g] * scene.position[v] + view.geom_position[n, g]
    out[n, c, v] = wp.transpose(view.camera_rotation[n, c]) * (world - view.camera_position[n, c])


@wp.kernel
def cull(scene: RasterScene, view: View, seen: wp.array3d(dtype=wp.int32)):
    """Tell which geoms' spheres reach into a camera's frustum; [n, c, G]."""
    n, c, g = wp.tid()
    world = view.geom_rotation[n, g] * scene.centre[g] + view.geom_position[n, g]
    p = wp.transpose(view.camera_rotation[n, c]) * (world - view.camera_position[n, c])
    r = scene.radius[g]
    x = 0.5 * float(view.width) / view.focal[c]
    y = 0.5 * float(view.height) / view.focal[c]
    inside = view.geom_rgba[n, g][3] > 0.0 and -p[2] + r > view.near
    inside = inside and wp.abs(p[0]) + p[2] * x < r * wp.sqrt(1.0 + x * x)
    inside = inside and wp.abs(p[1]) + p[2] * y < r * wp.sqrt(1.0 + y * y)
    seen[n, c, g] = int(inside)


@wp.func
def _reach(p: wp.vec3, q: wp.vec3, near: float, box: wp.vec4) -> wp.vec4:
    """The box around what was in it and the projections of p, and of where pq passes the near plane."""
    if -p[2] >= near:
        x, y = -p[0] / p[2], -p[1] / p[2]
        box = wp.vec4(wp.min(box[0], x), wp.min(box[1], y), wp.max(box[2], x), wp.max(box[3], y))
    if (-p[2] >= near) != (-q[2] >= near):
        t = (-near - p[2]) / (q[2] - p[2])
        x, y = (p[0] + t * (q[0] - p[0])) / near, (p[1] + t * (q[1] - p[1])) / near
        box = wp.vec4(wp.min(box[0], x), wp.min(box[1], y), wp.max(box[2], x), wp.max(box[3], y))
    return box


@wp.func
def _offset(sample: int) -> wp.vec2:
    """Place of a sample in a pixel, from its upper left corner: the usual rotated grid."""
    if sample == 0:
        return wp.vec2(0.375, 0.875)
    if sample == 1:
        return wp.vec2(0.875, 0.625)
    if sample == 2:
        return wp.vec2(0.125, 0.375)
    return wp.vec2(0.625, 0.125)


@wp.kernel
def rasterise(
    scene: RasterScene,
    view: View,
    seen: wp.array3d(dtype=wp.int32),
    placed: wp.array3d(dtype=wp.vec3),
    visible: wp.array4d(dtype=wp.uint64),
):
    """Find the nearest triangle at each sample; visible [n, c, H W, SAMPLES], depth above, triangle below."""
    n, c, f = wp.tid()
    corner = scene.triangles[f]
    if seen[n, c, scene.geom[corner[0]]] == 0:
        return
    p, q, r = placed[n, c, corner[0]], placed[n, c, corner[1]], placed[n, c, corner[2]]
    e0, e1, e2 = wp.cross(r, q), wp.cross(p, r), wp.cross(q, p)
    volume = wp.dot(p, e0)
    if volume <= 0.0:  # seen from behind
        return
    if wp.max(p[2], wp.max(q[2], r[2])) <= -view.near:
        px, py, qx, qy, rx, ry = p[0] / p[2], p[1] / p[2], q[0] / q[2], q[1] / q[2], r[0] / r[2], r[1] / r[2]
        box = wp.vec4(
            -wp.max(px, wp.max(qx, rx)), -wp.max(py, wp.max(qy, ry)),
            -wp.min(px, wp.min(qx, rx)), -wp.min(py, wp.min(qy, ry)),
        )  # fmt: skip
    else:
        box = wp.vec4(1e9, 1e9, -1e9, -1e9)
        box = _reach(p, q, view.near, box)
        box = _reach(q, r, view.near, box)
        box = _reach(r, p, view.near, box)
    focal = view.focal[c]
    cx, cy = 0.5 * float(view.width), 0.5 * float(view.height)
    left = wp.max(int(wp.floor(wp.max(box[0] * focal + cx, -1.0))), 0)
    right = wp.min(int(wp.floor(wp.min(box[2] * focal + cx, 1e6))), view.width - 1)
    top = wp.max(int(wp.floor(wp.max(cy - box[3] * focal, -1.0))), 0)
    bottom = wp.min(int(wp.floor(wp.min(cy - box[1] * focal, 1e6))), view.height - 1)
    if left > right or top > bottom:
        return
    # At (x, y, -1) an edge function is x e[0] + y e[1] - e[2]; in pixels, with y downwards:
    step = 1.0 / focal
    e0 = wp.vec3(e0[0] * step, -e0[1] * step, -e0[2] - cx * step * e0[0] + cy * step * e0[1])
    e1 = wp.vec3(e1[0] * step, -e1[1] * step, -e1[2] - cx * step * e1[0] + cy * step * e1[1])
    e2 = wp.vec3(e2[0] * step, -e2[1] * step, -e2[2] - cx * step * e2[0] + cy * step * e2[1])
    total = e0 + e1 + e2
    s0 = -wp.static(_SLACK) * (wp.abs(e0[0]) + wp.abs(e0[1]))
    s1 = -wp.static(_SLACK) * (wp.abs(e1[0]) + wp.abs(e1[1]))
    s2 = -wp.static(_SLACK) * (wp.abs(e2[0]) + wp.abs(e2[1]))
    key = _LOW - wp.uint64(f)  # of equally near triangles the last one is seen
    for y in range(top, bottom + 1):
        for x in range(left, right + 1):
            for s in range(wp.static(SAMPLES)):
                o = _offset(s)
                sx, sy = float(x) + o[0], float(y) + o[1]
                b0 = e0[0] * sx + e0[1] * sy + e0[2]
                b1 = e1[0] * sx + e1[1] * sy + e1[2]
                b2 = e2[0] * sx + e2[1] * sy + e2[2]
                if b0 >= s0 and b1 >= s1 and b2 >= s2:
                    sum = total[0] * sx + total[1] * sy + total[2]
                    depth = volume / wp.max(sum, 1e-12)
                    if depth >= view.near:
                        bits = wp.uint64(wp.cast(depth, wp.uint32))
                        wp.atomic_min(visible, n, c, y * view.width + x, s, (bits << wp.uint64(32)) | key)


@wp.kernel
def mark(
    scene: RasterScene, view: View, visible: wp.array4d(dtype=wp.uint64), wanted: wp.array3d(dtype=wp.int32)
):
    """Stamp the vertices that pixels need the light of."""
    n, c, i = wp.tid()
    before = -1
    for s in range(wp.static(SAMPLES)):
        key = visible[n, c, i, s]
        if key != _NOTHING:
            f = int(_LOW - (key & _LOW))
            if f != before:
                corner = scene.triangles[f]
                wanted[n, c, corner[0]] = view.stamp
                wanted[n, c, corner[1]] = view.stamp
                wanted[n, c, corner[2]] = view.stamp
                before = f


@wp.func
def _shine(
    scene: RasterScene, material: wp.vec3, rgb: wp.vec3, normal: wp.vec3, to_light: wp.vec3, to_eye: wp.vec3,
    diffuse: wp.vec3, specular: wp.vec3,
) -> wp.vec3:  # fmt: skip
    """Diffuse and specular light of one lamp (OpenGL 2.1 specification, section 2.14.1)."""
    facing = wp.dot(normal, to_light)
    if facing <= 0.0:
        return wp.vec3(0.0)
    result = wp.cw_mul(rgb, diffuse) * facing
    if material[1] > 0.0:
        gloss = wp.max(wp.dot(normal, wp.normalize(to_light + to_eye)), 0.0)
        if material[2] > 0.0:  # noqa: SIM108
            gloss = wp.pow(gloss, material[2])
        else:  # 0 to the power of 0 too
            gloss = 1.0
        result += specular * (material[1] * gloss)
    return result


@wp.kernel
def light(scene: RasterScene, view: View, wanted: wp.array3d(dtype=wp.int32), lit: wp.array3d(dtype=wp.vec3)):
    """Compute the colours of the vertices that are wanted, before their texture; [n, c, V]."""
    n, c, v = wp.tid()
    if wanted[n, c, v] != view.stamp:
        return
    g = scene.geom[v]
    rotation, rgba, material = view.geom_rotation[n, g], view.geom_rgba[n, g], scene.material[g]
    point = rotation * scene.position[v] + view.geom_position[n, g]
    normal = wp.normalize(rotation * scene.normal[v])
    rgb = wp.vec3(rgba[0], rgba[1], rgba[2])
    camera = view.camera_rotation[n, c]
    to_eye = wp.normalize(view.camera_position[n, c] - point)
    backwards = wp.vec3(camera[0, 2], camera[1, 2], camera[2, 2])
    colour = rgb * material[0] + wp.cw_mul(rgb, scene.head[0])
    colour += _shine(scene, material, rgb, normal, backwards, to_eye, scene.head[1], scene.head[2])
    for i in range(scene.light_direct.shape[0]):
        to_light = -view.light_direction[n, i]
        strength = 1.0
        if scene.light_direct[i] == 0:
            path = view.light_position[n, i] - point
            distance = wp.length(path)
            to_light = path / distance
            aim = -wp.dot(to_light, view.light_direction[n, i])
            spot, fade = scene.light_spot[i], scene.light_attenuation[i]
            if aim < spot[0]:
                strength = 0.0
            else:
                strength = wp.pow(aim, spot[1]) / (fade[0] + distance * (fade[1] + distance * fade[2]))
        if strength > 0.0:
            lamp = wp.cw_mul(rgb, scene.light_ambient[i])
            lamp += _shine(
                scene, material, rgb, normal, to_light, to_eye,
                scene.light_diffuse[i], scene.light_specular[i],
            )  # fmt: skip
            colour += strength * lamp
    lit[n, c, v] = wp.min(wp.max(colour, wp.vec3(0.0)), wp.vec3(1.0))


@wp.func
def _texel(scene: RasterScene, at: wp.vec3i, x: int, y: int) -> wp.vec3:
    """One texel, 0 to 1; at most one place outside the texture, which repeats."""
    if x < 0:
        x += at[1]
    elif x >= at[1]:
        x -= at[1]
    if y < 0:
        y += at[2]
    elif y >= at[2]:
        y -= at[2]
    packed = scene.texels[at[0] + y * at[1] + x]
    byte = wp.uint32(255)
    return wp.vec3(
        float(packed & byte), float((packed >> wp.uint32(8)) & byte), float((packed >> wp.uint32(16)) & byte)
    ) * wp.static(1.0 / 255.0)


@wp.func
def _bilinear(scene: RasterScene, at: wp.vec3i, uv: wp.vec2) -> wp.vec3:
    u, v = uv[0] - wp.floor(uv[0]), uv[1] - wp.floor(uv[1])
    x, y = u * float(at[1]) - 0.5, v * float(at[2]) - 0.5
    left, top = wp.floor(x), wp.floor(y)
    a, b, i, j = x - left, y - top, int(left), int(top)
    upper = _texel(scene, at, i, j) * (1.0 - a) + _texel(scene, at, i + 1, j) * a
    lower = _texel(scene, at, i, j + 1) * (1.0 - a) + _texel(scene, at, i + 1, j + 1) * a
    return upper * (1.0 - b) + lower * b


@wp.func
def _trilinear(scene: RasterScene, t: int, uv: wp.vec2, dx: wp.vec2, dy: wp.vec2) -> wp.vec3:
    """The texture around uv, as blurred as a pixel is wide there."""
    base = scene.level[t, 0]
    size = wp.vec2(float(base[1]), float(base[2]))
    a, b = wp.cw_mul(dx, size), wp.cw_mul(dy, size)
    width = wp.sqrt(wp.max(wp.dot(a, a), wp.dot(b, b)))
    last = float(scene.levels[t] - 1)
    detail = wp.clamp(wp.log2(wp.max(width, 1e-6)), 0.0, last)
    k = int(wp.floor(detail))
    part = detail - float(k)
    colour = _bilinear(scene, scene.level[t, k], uv)
    if part > 0.0:
        colour = colour * (1.0 - part) + _bilinear(scene, scene.level[t, k + 1], uv) * part
    return colour


@wp.func
def _weights(e0: wp.vec3, e1: wp.vec3, e2: wp.vec3, x: float, y: float) -> wp.vec3:
    """Barycentric coordinates where a ray (x, y, -1) meets the triangle's plane."""
    b0 = x * e0[0] + y * e0[1] - e0[2]
    b1 = x * e1[0] + y * e1[1] - e1[2]
    b2 = x * e2[0] + y * e2[1] - e2[2]
    sum = b0 + b1 + b2
    if sum <= 0.0:
        sum = 1e-12
    return wp.vec3(b0, b1, b2) / sum


@wp.func
def _colour(
    scene: RasterScene, view: View, placed: wp.array3d(dtype=wp.vec3), lit: wp.array3d(dtype=wp.vec3),
    n: int, c: int, x: int, y: int, f: int,
) -> wp.vec3:  # fmt: skip
    """A triangle's colour in the middle of a pixel."""
    corner = scene.triangles[f]
    i, j, k = corner[0], corner[1], corner[2]
    p, q, r = placed[n, c, i], placed[n, c, j], placed[n, c, k]
    e0, e1, e2 = wp.cross(r, q), wp.cross(p, r), wp.cross(q, p)
    step = 1.0 / view.focal[c]
    sx = (float(x) + 0.5 - 0.5 * float(view.width)) * step
    sy = (0.5 * float(view.height) - float(y) - 0.5) * step
    w = _weights(e0, e1, e2, sx, sy)
    colour = lit[n, c, i] * w[0] + lit[n, c, j] * w[1] + lit[n, c, k] * w[2]
    t = scene.texture[scene.geom[i]]
    if t >= 0:
        a, b, d = scene.uv[i], scene.uv[j], scene.uv[k]
        wx, wy = _weights(e0, e1, e2, sx + step, sy), _weights(e0, e1, e2, sx, sy - step)
        uv = a * w[0] + b * w[1] + d * w[2]
        dx = a * wx[0] + b * wx[1] + d * wx[2] - uv
        dy = a * wy[0] + b * wy[1] + d * wy[2] - uv
        colour = wp.cw_mul(colour, _trilinear(scene, t, uv, dx, dy))
    return wp.min(wp.max(colour, wp.vec3(0.0)), wp.vec3(1.0))


@wp.kernel
def shade(
    scene: RasterScene,
    view: View,
    placed: wp.array3d(dtype=wp.vec3),
    lit: wp.array3d(dtype=wp.vec3),
    visible: wp.array4d(dtype=wp.uint64),
    image: wp.array4d(dtype=wp.uint8),
):
    """Average each pixel's samples into the image [n, c, H W, 3], black where nothing is seen."""
    n, c, i = wp.tid()
    x, y = i % view.width, i // view.width
    total = wp.vec3(0.0)
    colour = wp.vec3(0.0)
    before = _NOTHING
    for s in range(wp.static(SAMPLES)):
        key = visible[n, c, i, s]
        if key != _NOTHING:
            key = key & _LOW
            if key != before:
                colour = _colour(scene, view, placed, lit, n, c, x, y, int(_LOW - key))
                before = key
            total += colour
    total = total * wp.static(255.0 / SAMPLES)
    for k in range(3):
        image[n, c, i, k] = wp.uint8(total[k] + 0.5)
