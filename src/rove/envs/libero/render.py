"""RGB pictures of one model from MuJoCo Warp's ray tracer."""

# pyright: reportAttributeAccessIssue=false, reportArgumentType=false
from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import mujoco
import mujoco_warp
import numpy as np
import warp as wp

from rove.envs.libero.frame import Frame


class Renderer:
    """Draws up to `capacity` worlds of one model."""

    def __init__(
        self,
        model: mujoco.MjModel,
        capacity: int,
        *,
        cameras: Sequence[str],
        size: int,
        backend: Literal["warp", "gl"] = "warp",
        device: str = "cpu",
        threads: int = 1,
    ) -> None:
        self.size, self.device = size, device
        self._cameras = [model.camera(name).id for name in cameras]
        with wp.ScopedDevice(device):
            self._model = mujoco_warp.put_model(model)
            self._data = mujoco_warp.make_data(model, nworld=capacity)
            self._context = mujoco_warp.create_render_context(
                model,
                nworld=capacity,
                cam_res=(size, size),
                cam_active=[i in self._cameras for i in range(model.ncam)],
                render_rgb=True,
                render_depth=False,
                use_shadows=False,
                enabled_geom_groups=[1, 2],
            )

    def render(self, frame: Frame) -> np.ndarray:
        """uint8 [n, cameras, size, size, 3], top row first."""
        n = len(frame)
        with wp.ScopedDevice(self.device):
            for name in ("geom_xpos", "geom_xmat", "cam_xpos", "cam_xmat", "light_xpos", "light_xdir"):
                target = getattr(self._data, name)
                values = np.ascontiguousarray(getattr(frame, name), np.float32)
                wp.copy(target, wp.array(values, dtype=target.dtype, device="cpu"), count=n * target[0].size)
            self._data.nworld = n
            mujoco_warp.refit_bvh(self._model, self._data, self._context)
            mujoco_warp.render(self._model, self._data, self._context)
            packed = self._context.rgb_data.numpy()[:n]
        pixels = packed.view(np.uint8).reshape(n, len(self._cameras), self.size, self.size, 4)
        order = np.argsort(np.argsort(self._cameras))  # the context draws them by number
        return pixels[:, order][..., 2::-1]

    def close(self) -> None:
        """Nothing outlives the object."""
