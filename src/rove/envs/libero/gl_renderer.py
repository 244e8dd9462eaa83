"""MuJoCo's own OpenGL renderer without a window, as the stock environment uses it."""

# pyright: reportAttributeAccessIssue=false
from __future__ import annotations

import ctypes
import ctypes.util
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager, nullcontext
from typing import Any

import mujoco
import numpy as np

from rove.envs.libero.frame import LiberoFrame
from rove.errors import RoveError

_FIX = (
    "Install one (Debian, Ubuntu: apt install libegl1 libgl1, or libosmesa6), choose with MUJOCO_GL=egl or "
    "MUJOCO_GL=osmesa, or draw without OpenGL: --env.renderer warp."
)


_EGL_DEVICE = "MUJOCO_EGL_DEVICE_ID"
_EGL_CUDA_DEVICE_NV = 0x323A


def _cuda_indices() -> list[int | None]:
    """Index in CUDA, as this process counts, of each EGL device in EGL's order."""
    from mujoco.egl import egl_ext as egl

    query: Any = egl.eglGetProcAddress("eglQueryDeviceAttribEXT")
    if not query:
        return []
    signature = (ctypes.c_uint, ctypes.c_void_p, ctypes.c_int, ctypes.POINTER(ctypes.c_ssize_t))
    ask = ctypes.CFUNCTYPE(*signature)(query)
    found: list[int | None] = []
    for device in egl.eglQueryDevicesEXT():
        index = ctypes.c_ssize_t()
        known = ask(device, _EGL_CUDA_DEVICE_NV, ctypes.byref(index))
        found.append(index.value if known else None)
    return found


@contextmanager
def _egl_on(gpu: int) -> Iterator[None]:
    """Within the block MuJoCo opens EGL on this GPU, unless MUJOCO_EGL_DEVICE_ID is set already.

    EGL has an order of its own, which CUDA_VISIBLE_DEVICES does not change; NVIDIA's driver says which of
    CUDA's devices each is. Where no driver does, EGL's first device draws. The variable does not stay: a
    child that inherited it would draw on this process's GPU, and not on its own.
    """
    indices = [] if _EGL_DEVICE in os.environ else _cuda_indices()
    if gpu not in indices:
        yield
        return
    os.environ[_EGL_DEVICE] = str(indices.index(gpu))
    try:
        yield
    finally:
        del os.environ[_EGL_DEVICE]


def _context(size: int, gpu: int | None) -> Any:
    """Open an OpenGL context and make it current: what MUJOCO_GL names, else EGL, else OSMesa. Raises
    RoveError.

    `gpu` is the CUDA index of the one that EGL is to draw on.
    """
    asked = os.environ.get("MUJOCO_GL", "").lower()
    if asked not in ("", "egl", "osmesa"):
        raise RoveError(f"MUJOCO_GL is {asked!r}; pictures without a window need egl or osmesa. {_FIX}")
    found = [
        name for name, library in (("egl", "EGL"), ("osmesa", "OSMesa")) if ctypes.util.find_library(library)
    ]
    if not (found if not asked else asked in found):
        raise RoveError(f"renderer='gl' found no {asked or 'EGL or OSMesa'} library on this machine. {_FIX}")
    name = asked or found[0]
    # PyOpenGL binds to one platform, when it is first imported.
    bound = os.environ.setdefault("PYOPENGL_PLATFORM", name)
    try:
        if name == "egl":
            from mujoco.egl import GLContext
        else:
            from mujoco.osmesa import GLContext
        with nullcontext() if gpu is None or name != "egl" else _egl_on(gpu):
            context = GLContext(size, size)
        context.make_current()
    except (ImportError, AttributeError, RuntimeError, OSError) as error:
        raise RoveError(
            f"renderer='gl' could not start OpenGL by {name} (PyOpenGL is bound to {bound}): {error}. {_FIX}"
        ) from error
    return context


class GLRenderer:
    """Draws any number of worlds of one model, one by one."""

    def __init__(
        self,
        model: mujoco.MjModel,
        *,
        cameras: Sequence[str],
        size: int,
        burners: Sequence[int],
        gpu: int | None = None,
    ) -> None:
        """`gpu` is the CUDA index of the one that EGL is to draw on; None: the first device that EGL has."""
        self._size, self._burners, self._model = size, list(burners), model
        # Newer MuJoCo converts textures whose file says sRGB; MuJoCo up to 3.2.3, with which published
        # pictures were made, took their numbers as they are.
        srgb, linear = mujoco.mjtColorSpace.mjCOLORSPACE_SRGB, mujoco.mjtColorSpace.mjCOLORSPACE_LINEAR
        model.tex_colorspace[model.tex_colorspace == srgb.value] = linear.value
        model.vis.global_.offwidth = max(model.vis.global_.offwidth, size)
        model.vis.global_.offheight = max(model.vis.global_.offheight, size)
        self._gl = _context(size, gpu)
        self._data = mujoco.MjData(model)
        mujoco.mj_forward(model, self._data)
        self._scene = mujoco.MjvScene(model, maxgeom=1000)
        self._option = mujoco.MjvOption()
        self._option.geomgroup[0] = 0
        self._context = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_150.value)
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN.value, self._context)
        self._views = []
        for name in cameras:
            view = mujoco.MjvCamera()
            view.type, view.fixedcamid = mujoco.mjtCamera.mjCAMERA_FIXED.value, model.camera(name).id
            self._views.append(view)

    def draw(self, frame: LiberoFrame, out: np.ndarray, pool: Executor | None) -> None:
        """Draw the worlds of `frame` into `out`, uint8 [n, cameras, size, size, 3]."""
        self._gl.make_current()
        viewport = mujoco.MjrRect(0, 0, self._size, self._size)
        data, model = self._data, self._model
        for world in range(len(frame)):
            data.geom_xpos[:], data.geom_xmat[:] = (
                frame.geom_xpos[world],
                frame.geom_xmat[world].reshape(-1, 9),
            )
            data.cam_xpos[:], data.cam_xmat[:] = frame.cam_xpos[world], frame.cam_xmat[world].reshape(-1, 9)
            data.light_xpos[:], data.light_xdir[:] = frame.light_xpos[world], frame.light_xdir[world]
            if self._burners:
                data.site_xpos[self._burners] = frame.burner_xpos[world]
                data.site_xmat[self._burners] = frame.burner_xmat[world].reshape(-1, 9)
                model.site_rgba[self._burners, 3] = frame.lit[world]
            for index, view in enumerate(self._views):
                mujoco.mjv_updateScene(
                    model, data, self._option, None, view, mujoco.mjtCatBit.mjCAT_ALL.value, self._scene
                )
                mujoco.mjr_render(viewport, self._scene, self._context)
                mujoco.mjr_readPixels(out[world, index], None, viewport, self._context)
        out[...] = out[:, :, ::-1].copy()  # OpenGL's first row is the lowest

    def close(self) -> None:
        """Free the context; harmless when called twice."""
        if self._context is not None:
            self._gl.make_current()
            self._context.free()
            self._gl.free()
            self._context = None
