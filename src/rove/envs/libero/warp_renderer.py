"""Pictures of one model by the rasteriser in `raster.py`.

On CPU a Warp kernel runs on the thread that launches it and lets go of the interpreter lock: worlds are
dealt to one lane a thread, and a lane draws them one after the other, in buffers that stay in the cache.
On CUDA there is one lane, which draws all worlds at once.
"""

# pyright: reportAttributeAccessIssue=false, reportArgumentType=false
from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from functools import partial
from typing import Any

import mujoco
import numpy as np
import warp as wp

import rove.envs.quiet_warp  # noqa: F401
from rove.envs.libero import raster
from rove.envs.libero.frame import LiberoFrame
from rove.envs.libero.soup import DETAIL, Soup, levels, soup


class Lane:
    """Buffers for up to `capacity` worlds of one model, drawn in one go."""

    def __init__(self, scene: Any, counts: dict[str, int], size: int, capacity: int, device: str) -> None:
        self._scene, self._device, self._counts = scene, device, counts
        self._stamp = 0
        n, c, g, v = capacity, counts["cameras"], counts["things"], counts["corners"]
        lights, pixels = counts["lights"], counts["pixels"]

        def buffer(*shape: int, dtype: Any) -> Any:
            return wp.zeros(shape, dtype=dtype, device=device)

        self._inputs = {
            "geom_position": buffer(n, g, dtype=wp.vec3),
            "geom_rotation": buffer(n, g, dtype=wp.mat33),
            "geom_rgba": buffer(n, g, dtype=wp.vec4),
            "camera_position": buffer(n, c, dtype=wp.vec3),
            "camera_rotation": buffer(n, c, dtype=wp.mat33),
            "light_position": buffer(n, lights, dtype=wp.vec3),
            "light_direction": buffer(n, lights, dtype=wp.vec3),
        }
        self._view = raster.View()
        for name, array in self._inputs.items():
            setattr(self._view, name, array)
        self._view.height = self._view.width = size
        self._seen = buffer(n, c, g, dtype=wp.int32)
        self._placed = buffer(n, c, v, dtype=wp.vec3)
        self._wanted = buffer(n, c, v, dtype=wp.int32)
        self._lit = buffer(n, c, v, dtype=wp.vec3)
        self._visible = buffer(n, c, pixels, raster.SAMPLES, dtype=wp.uint64)
        self._image = buffer(n, c, pixels, 3, dtype=wp.uint8)

    def aim(self, focal: np.ndarray, near: float) -> None:
        """Set what all pictures share: focal lengths [c], pixels; the near plane, metres."""
        self._view.focal = wp.array(focal, dtype=wp.float32, device=self._device)
        self._view.near = near

    def draw(self, inputs: dict[str, np.ndarray], out: np.ndarray) -> None:
        """Draw n worlds; `inputs` have a leading axis n, `out` is uint8 [n, c, H, W, 3]."""
        n = len(out)
        scene, counts = self._scene, self._counts
        for name, array in self._inputs.items():
            values = wp.array(inputs[name], dtype=array.dtype, device="cpu", copy=False)
            wp.copy(array, values, count=n * array.shape[1])
        self._stamp += 1
        self._view.stamp = self._stamp
        view = self._view
        each = (n, counts["cameras"])
        pixels = (*each, counts["pixels"])
        self._visible.fill_(np.uint64(raster.EMPTY))
        self._launch(raster.cull, (*each, counts["things"]), scene, view, self._seen)
        self._launch(raster.place, (*each, counts["corners"]), scene, view, self._seen, self._placed)
        self._launch(
            raster.rasterise,
            (*each, counts["triangles"]),
            scene,
            view,
            self._seen,
            self._placed,
            self._visible,
        )
        self._launch(raster.mark, pixels, scene, view, self._visible, self._wanted)
        self._launch(raster.light, (*each, counts["corners"]), scene, view, self._wanted, self._lit)
        self._launch(raster.shade, pixels, scene, view, self._placed, self._lit, self._visible, self._image)
        out[...] = self._image.numpy()[:n].reshape(out.shape)

    def _launch(self, kernel: Any, size: tuple[int, ...], *inputs: Any) -> None:
        """Launch a kernel on the lane's device: Warp's default belongs to the process, and lanes are threads
        of it."""
        wp.launch(kernel, size, list(inputs), device=self._device)


class WarpRenderer:
    """Draws up to `capacity` worlds of one model."""

    def __init__(
        self,
        model: mujoco.MjModel,
        *,
        cameras: Sequence[str],
        size: int,
        burners: Sequence[int],
        capacity: int,
        lanes: int,
        device: str,
        detail: float = DETAIL,
    ) -> None:
        self.soup = soup(model, size, cameras, burners, detail)
        self._cameras = [model.camera(name).id for name in cameras]
        self._batch = 1 if device == "cpu" else capacity
        scene = _scene(model, self.soup, size, device)
        counts = {
            "cameras": len(cameras),
            "things": len(self.soup.things),
            "corners": len(self.soup.position),
            "triangles": len(self.soup.triangles),
            "lights": model.nlight,
            "pixels": size * size,
        }
        focal = size / (2 * np.tan(np.deg2rad(model.cam_fovy[self._cameras]) / 2))
        near = float(model.vis.map.znear * model.stat.extent)
        self._lanes = [Lane(scene, counts, size, self._batch, device) for _ in range(lanes)]
        for lane in self._lanes:
            lane.aim(focal, near)

    def draw(self, frame: LiberoFrame, out: np.ndarray, pool: Executor | None) -> None:
        """Draw the worlds of `frame` into `out`, uint8 [n, cameras, size, size, 3]."""
        inputs = self._prepare(frame)
        lanes = self._lanes if pool is not None else self._lanes[:1]

        def work(index: int) -> None:
            for start in range(index * self._batch, len(frame), len(lanes) * self._batch):
                rows = slice(start, min(start + self._batch, len(frame)))
                lanes[index].draw({name: value[rows] for name, value in inputs.items()}, out[rows])

        if pool is None:
            work(0)
        else:
            for _ in pool.map(work, range(len(lanes))):
                pass

    def close(self) -> None:
        """Do nothing: no resource outlives the object."""

    def _prepare(self, frame: LiberoFrame) -> dict[str, np.ndarray]:
        """Collect the kernels' inputs, float32 and contiguous."""
        geoms = self.soup.geoms
        rgba = np.tile(self.soup.rgba, (len(frame), 1, 1))
        rgba[:, len(geoms) :, 3] = frame.lit
        inputs = {
            "geom_position": np.concatenate([frame.geom_xpos[:, geoms], frame.burner_xpos], axis=1),
            "geom_rotation": np.concatenate([frame.geom_xmat[:, geoms], frame.burner_xmat], axis=1),
            "geom_rgba": rgba,
            "camera_position": frame.cam_xpos[:, self._cameras],
            "camera_rotation": frame.cam_xmat[:, self._cameras],
            "light_position": frame.light_xpos,
            "light_direction": frame.light_xdir,
        }
        return {name: np.ascontiguousarray(value, np.float32) for name, value in inputs.items()}


def _scene(model: mujoco.MjModel, drawn: Soup, pixels: int, device: str) -> Any:
    """Put the soup, its textures and the model's lights on `device`."""
    array, scene = partial(wp.array, device=device), raster.RasterScene()
    scene.position = array(drawn.position, dtype=wp.vec3)
    scene.normal = array(drawn.normal, dtype=wp.vec3)
    scene.uv = array(drawn.uv, dtype=wp.vec2)
    scene.geom = array(drawn.thing, dtype=wp.int32)
    scene.triangles = array(drawn.triangles, dtype=wp.vec3i)
    low = np.full((len(drawn.things), 3), np.inf)
    high = -low
    np.minimum.at(low, drawn.thing, drawn.position)
    np.maximum.at(high, drawn.thing, drawn.position)
    centre = ((low + high) / 2).astype(np.float32)
    radius = np.zeros(len(centre), np.float32)
    np.maximum.at(radius, drawn.thing, np.linalg.norm(drawn.position - centre[drawn.thing], axis=1))
    scene.centre, scene.radius = array(centre, dtype=wp.vec3), array(radius, dtype=wp.float32)
    scene.material = array(drawn.material, dtype=wp.vec3)
    used = sorted(set(drawn.texture[drawn.texture >= 0].tolist()))
    scene.texture = array([used.index(t) if t >= 0 else -1 for t in drawn.texture], dtype=wp.int32)
    _textures(scene, array, [levels(model, texture, pixels) for texture in used])
    _lights(scene, array, model)
    return scene


def _textures(scene: Any, array: Callable[..., Any], textures: list[list[np.ndarray]]) -> None:
    flat = [level for texture in textures for level in texture]
    offsets = np.cumsum([0, *(level.size for level in flat)])
    table = np.zeros((max(len(textures), 1), max([len(t) for t in textures], default=1), 3), np.int32)
    position = 0
    for t, texture in enumerate(textures):
        for k, level in enumerate(texture):
            table[t, k] = offsets[position], level.shape[1], level.shape[0]
            position += 1
    texels = np.concatenate([level.ravel() for level in flat]) if flat else np.zeros(1, np.uint32)
    scene.texels = array(texels, dtype=wp.uint32)
    scene.levels = array([len(t) for t in textures] or [1], dtype=wp.int32)
    scene.level = array(table, dtype=wp.vec3i)


def _lights(scene: Any, array: Callable[..., Any], model: mujoco.MjModel) -> None:
    on = model.light_active.astype(bool)[:, None]
    scene.light_direct = array(
        model.light_type == mujoco.mjtLightType.mjLIGHT_DIRECTIONAL.value, dtype=wp.int32
    )
    scene.light_diffuse = array(model.light_diffuse * on, dtype=wp.vec3)
    scene.light_ambient = array(model.light_ambient * on, dtype=wp.vec3)
    scene.light_specular = array(model.light_specular * on, dtype=wp.vec3)
    spot = np.stack([np.cos(np.deg2rad(model.light_cutoff)), model.light_exponent], axis=1)
    scene.light_spot = array(spot, dtype=wp.vec2)
    scene.light_attenuation = array(model.light_attenuation, dtype=wp.vec3)
    head = model.vis.headlight
    lamp = np.array([head.ambient, head.diffuse, head.specular]) * bool(head.active)
    scene.head = wp.mat33(lamp.astype(np.float32))
