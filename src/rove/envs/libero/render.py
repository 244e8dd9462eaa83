"""RGB pictures of one model, by either of two renderers."""

# pyright: reportAttributeAccessIssue=false
from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import mujoco
import numpy as np

from rove.envs.libero.frame import LiberoFrame
from rove.errors import RoveError

Backend = Literal["warp", "gl"]


class LiberoRenderer:
    """Draws up to `capacity` worlds of one model.

    "warp" is a rasteriser of our own on Warp, on CPU or CUDA, that shades as MuJoCo's OpenGL renderer does;
    "gl" is that renderer, for pictures exactly as published checkpoints were trained on.
    """

    def __init__(
        self,
        model: mujoco.MjModel,
        capacity: int,
        *,
        cameras: Sequence[str],
        size: int,
        burners: Sequence[int] = (),
        backend: Backend = "warp",
        device: str = "cpu",
        gpu: int | None = None,
        threads: int = 1,
    ) -> None:
        """`burners` are the sites that `LiberoFrame.lit` speaks of; `threads` are used on CPU by "warp".

        "warp" draws on `device`; "gl" on the GPU with the CUDA index `gpu` if it can, or on the first device
        that EGL has.
        """
        self._shape = (len(cameras), size, size, 3)
        self._capacity = capacity
        threads = max(1, min(threads, capacity)) if device == "cpu" else 1
        self._pool = None
        if backend == "gl":
            from rove.envs.libero.gl_renderer import GLRenderer

            self._drawer = GLRenderer(model, cameras=cameras, size=size, burners=burners, gpu=gpu)
            return
        from rove.envs.libero.warp_renderer import WarpRenderer

        self._drawer = WarpRenderer(
            model,
            cameras=cameras,
            size=size,
            burners=burners,
            capacity=capacity,
            lanes=threads,
            device=device,
        )
        if threads > 1:
            self._pool = ThreadPoolExecutor(threads, thread_name_prefix="render")

    def render(self, frame: LiberoFrame) -> np.ndarray:
        """Draw into a fresh array, uint8 [n, cameras, size, size, 3]: top row first, not mirrored."""
        if len(frame) > self._capacity:
            raise RoveError(f"render got {len(frame)} worlds; this renderer draws up to {self._capacity}.")
        image = np.empty((len(frame), *self._shape), np.uint8)
        self._drawer.draw(frame, image, self._pool)
        return image

    def close(self) -> None:
        """Stop the threads and free the context; harmless when called twice."""
        if self._pool is not None:
            self._pool.shutdown()
        self._drawer.close()
