"""RGB frames from MuJoCo Warp's ray tracer: no OpenGL, no display; CPU or CUDA.

Warp's CPU kernels run on one thread each, but release the interpreter lock: worlds are dealt to a few
renderers of equal size, one to a thread. A renderer draws only as many worlds as it is given.
"""

# pyright: reportAttributeAccessIssue=false, reportArgumentType=false
# (MuJoCo's compiled modules have no type stubs, and Warp kernels are not Python)
from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields

import mujoco
import numpy as np

from rove.errors import RoveError

try:
    import mujoco_warp
    import warp as wp

    from rove.envs import quiet_warp
except ImportError as error:
    raise RoveError(
        "The tabletop suite needs MuJoCo Warp, which is not installed. Install it: pip install mujoco-warp"
    ) from error


@wp.kernel
def _group_roots(bvh: wp.uint64, roots: wp.array(dtype=wp.int32)):  # type: ignore[valid-type]
    world = wp.tid()
    roots[world] = wp.bvh_get_group_root(bvh, world)


@dataclass(frozen=True, slots=True)
class TabletopFrame:
    """Appearance of `n` worlds; arrays with a leading world axis."""

    geom_xpos: np.ndarray
    """[n, ngeom, 3], metres."""
    geom_xmat: np.ndarray
    """[n, ngeom, 3, 3]."""
    geom_size: np.ndarray
    """[n, ngeom, 3]."""
    geom_rgba: np.ndarray
    """[n, ngeom, 4]."""
    geom_matid: np.ndarray
    """int [n, ngeom], -1 for none."""
    cam_xpos: np.ndarray
    """[n, 1, 3]."""
    cam_xmat: np.ndarray
    """[n, 1, 3, 3]."""
    light_xdir: np.ndarray
    """[n, 1, 3], unit vectors."""
    light_diffuse: np.ndarray
    """[n, 1, 3]."""
    light_ambient: np.ndarray
    """[n, 1, 3]."""

    def __len__(self) -> int:
        return len(self.geom_xpos)

    def part(self, rows: slice) -> TabletopFrame:
        return TabletopFrame(*(getattr(self, f.name)[rows] for f in fields(self)))


class TabletopRenderer:
    """Draws up to `capacity` worlds of one model at `size` x `size` pixels."""

    def __init__(
        self,
        model: mujoco.MjModel,
        capacity: int,
        size: int,
        background: tuple[float, float, float],
        device: str = "cpu",
    ) -> None:
        self.size, self.device = size, device
        quiet_warp.use(device)
        self._model = mujoco_warp.put_model(model)
        self._data = mujoco_warp.make_data(model, nworld=capacity)
        self._context = mujoco_warp.create_render_context(
            model,
            nworld=capacity,
            cam_res=(size, size),
            render_rgb=True,
            render_depth=False,
            render_seg=False,
            use_shadows=False,
            background_color=(*background, 1.0),
            enable_specular=False,
            enable_emission=False,
        )
        ngeom = model.ngeom
        self._arrays = {
            "geom_xpos": self._data.geom_xpos,
            "geom_xmat": self._data.geom_xmat,
            "cam_xpos": self._data.cam_xpos,
            "cam_xmat": self._data.cam_xmat,
            "light_xdir": self._data.light_xdir,
        }
        for name, shape, dtype in (
            ("geom_size", (capacity, ngeom), wp.vec3),
            ("geom_rgba", (capacity, ngeom), wp.vec4),
            ("geom_matid", (capacity, ngeom), wp.int32),
            ("light_diffuse", (capacity, 1), wp.vec3),
            ("light_ambient", (capacity, 1), wp.vec3),
        ):
            self._arrays[name] = wp.zeros(shape, dtype=dtype, device=device)
            setattr(self._model, name, self._arrays[name])
        # Compiles the kernels now: Warp's code generator must not run on two threads at once.
        self._rebuild()
        mujoco_warp.render(self._model, self._data, self._context)

    def render(self, frame: TabletopFrame) -> np.ndarray:
        """Draw a frame, uint8 [len(frame), size, size, 3]."""
        n = len(frame)
        quiet_warp.use(self.device)
        for name, array in self._arrays.items():
            values = np.ascontiguousarray(getattr(frame, name), array.numpy().dtype)
            wp.copy(array, wp.array(values, dtype=array.dtype, device="cpu"), count=n * array[0].size)
        self._data.nworld = n
        self._rebuild()
        mujoco_warp.render(self._model, self._data, self._context)
        packed = self._context.rgb_data.numpy()[:n]
        # One uint32 a pixel, 0xAARRGGBB: in memory B, G, R, A.
        return packed.view(np.uint8).reshape(n, self.size, self.size, 4)[..., 2::-1]

    def _rebuild(self) -> None:
        """Sort the boxes around the geoms anew: on CPU a tree that was only refitted traces 40 % slower."""
        context = self._context
        mujoco_warp.refit_bvh(self._model, self._data, context)
        if self.device == "cpu":
            context.bvh.rebuild(constructor="median")
            inputs = [context.bvh.id, context.group_root]
            wp.launch(_group_roots, dim=context.group_root.shape, inputs=inputs, device=self.device)


class RenderPool:
    """Renderers on threads, together drawing up to `capacity` worlds."""

    def __init__(
        self,
        model: mujoco.MjModel,
        capacity: int,
        size: int,
        background: tuple[float, float, float],
        threads: int,
        device: str = "cpu",
    ) -> None:
        self.size = size
        threads = min(threads, capacity) if device == "cpu" else 1
        self._share = -(-capacity // threads)
        self._renderers = [
            TabletopRenderer(model, self._share, size, background, device) for _ in range(threads)
        ]
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="render") if threads > 1 else None

    def render(self, frame: TabletopFrame) -> np.ndarray:
        """Draw a frame into a fresh array, uint8 [len(frame), size, size, 3]."""
        n = len(frame)
        image = np.empty((n, self.size, self.size, 3), np.uint8)
        share = max(1, -(-n // len(self._renderers)))
        parts = [slice(start, min(start + share, n)) for start in range(0, n, share)]

        def draw(renderer: TabletopRenderer, rows: slice) -> None:
            image[rows] = renderer.render(frame.part(rows))

        if self._pool is None or len(parts) == 1:
            for rows in parts:
                draw(self._renderers[0], rows)
        else:
            for _ in self._pool.map(draw, self._renderers, parts):
                pass
        return image

    def close(self) -> None:
        """Stop the threads; harmless when called twice."""
        if self._pool is not None:
            self._pool.shutdown()
