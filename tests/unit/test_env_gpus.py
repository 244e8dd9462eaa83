"""Which GPU an environment simulates and draws on, once it is made: as it tells the libraries beneath."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Sequence
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from rove.config.schema import LiberoConfig, ManiSkillConfig, PutOnPlateConfig, TabletopConfig
from rove.envs import registry
from rove.envs.libero import gl_renderer
from rove.envs.maniskill import simulator
from rove.errors import RoveError


@pytest.mark.parametrize(
    ("config", "gpu", "expected"),
    [
        (ManiSkillConfig(), 3, ("physx_cpu", "sapien_cuda:3")),
        (ManiSkillConfig(), None, ("physx_cpu", "sapien_cuda")),
        (ManiSkillConfig(render="cpu"), None, ("physx_cpu", "sapien_cpu")),
        (PutOnPlateConfig(backend="physx_cuda"), 3, ("physx_cuda:3", "sapien_cuda:3")),
        (PutOnPlateConfig(backend="physx_cuda", render="cpu"), 1, ("physx_cuda:1", "sapien_cpu")),
    ],
)
def test_maniskill_is_told_which_gpu(monkeypatch, config, gpu, expected) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert simulator.backends(config, gpu) == expected


def test_maniskill_needs_a_gpu_only_where_it_is_told_so(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert simulator.backends(ManiSkillConfig(), None) == ("physx_cpu", "sapien_cpu")
    with pytest.raises(RoveError, match=r"env\.backend = 'physx_cuda' needs a CUDA device"):
        simulator.backends(ManiSkillConfig(backend="physx_cuda"), None)


@pytest.mark.parametrize(
    ("config", "gpu", "expected"),
    [
        (TabletopConfig(), 3, "cpu"),
        (TabletopConfig(render="cuda"), 3, "cuda:3"),
        (TabletopConfig(render="cuda"), None, "cuda:0"),
    ],
)
def test_tabletop_draws_where_it_is_told(monkeypatch, config, gpu, expected) -> None:
    from rove.envs.tabletop import env

    drawn_on: list[str] = []
    monkeypatch.setattr(env, "RenderPool", lambda *args: drawn_on.append(args[-1]))
    registry.make(config, num_envs=1, chunk=2, autoreset="stop", gpu=gpu)
    assert drawn_on == [expected]


@pytest.mark.parametrize(
    ("config", "gpu", "expected"),
    [
        (LiberoConfig(), 3, ("warp", "cpu", None)),
        (LiberoConfig(render="cuda"), 3, ("warp", "cuda:3", 3)),
        (LiberoConfig(renderer="gl"), 3, ("gl", "cpu", 3)),
    ],
)
def test_libero_draws_where_it_is_told(monkeypatch, config, gpu, expected) -> None:
    from rove.envs.libero import env, package, pictures

    asked: list[tuple[Any, ...]] = []

    def check(*how: Any) -> None:
        asked.append(how)
        raise InterruptedError

    monkeypatch.setattr(package, "root", lambda: None)
    monkeypatch.setattr(env, "LiberoSuite", lambda config: SimpleNamespace(tasks=()))
    monkeypatch.setattr(pictures.fingerprint, "check", check)
    with pytest.raises(InterruptedError):
        registry.make(config, num_envs=1, chunk=2, autoreset="stop", gpu=gpu)
    assert asked == [expected]


# --- EGL --------------------------------------------------------------------------------------------


class Context:
    """Stands in for MuJoCo's, and opens the device that MuJoCo would."""

    opened: list[str | None] = []

    def __init__(self, width: int, height: int) -> None:
        self.opened.append(os.environ.get("MUJOCO_EGL_DEVICE_ID"))

    def make_current(self) -> None: ...


@pytest.fixture
def egl(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A machine whose EGL devices are, in this order, those that CUDA calls 1 and 0, and a software one.

    Calling it gives a context on a GPU, and answers which EGL device was opened.
    """
    cuda: Sequence[int | None] = (1, 0, None)
    signature = (ctypes.c_uint, ctypes.c_void_p, ctypes.c_int, ctypes.POINTER(ctypes.c_ssize_t))

    @ctypes.CFUNCTYPE(*signature)
    def query(device: int, attribute: int, value: Any) -> int:
        index = cuda[device - 1]
        if index is None or attribute != 0x323A:
            return 0
        value[0] = index
        return 1

    package: Any = ModuleType("mujoco.egl")
    package.GLContext = Context
    package.egl_ext = SimpleNamespace(
        eglQueryDevicesEXT=lambda: [1, 2, 3],
        eglGetProcAddress=lambda name: ctypes.cast(query, ctypes.c_void_p).value,
    )
    monkeypatch.setitem(sys.modules, "mujoco.egl", package)
    monkeypatch.setattr(gl_renderer.ctypes.util, "find_library", lambda name: name)
    monkeypatch.setenv("PYOPENGL_PLATFORM", "egl")
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    monkeypatch.delenv("MUJOCO_EGL_DEVICE_ID", raising=False)

    def opened(gpu: int | None) -> str | None:
        gl_renderer._context(16, gpu)
        return Context.opened.pop()

    return opened


def test_egl_draws_on_the_gpu_of_the_unit(egl) -> None:
    assert egl(0) == "1"
    assert egl(1) == "0"
    assert "MUJOCO_EGL_DEVICE_ID" not in os.environ, "children have GPUs of their own"


def test_egl_draws_on_its_first_device_where_no_gpu_is_meant_or_found(egl) -> None:
    assert egl(None) is None
    assert egl(2) is None


def test_a_device_that_the_user_named_stays(egl, monkeypatch) -> None:
    monkeypatch.setenv("MUJOCO_EGL_DEVICE_ID", "2")
    assert egl(0) == "2"
    assert os.environ["MUJOCO_EGL_DEVICE_ID"] == "2"
