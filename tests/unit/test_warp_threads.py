"""Drawing on threads, in a process whose default Warp device is another one, as on a machine with a GPU."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import mujoco
import numpy as np
import pytest
import warp as wp

from rove.envs.libero.frame import LiberoFrame
from rove.envs.libero.render import LiberoRenderer
from rove.envs.libero.warp_renderer import Lane
from rove.envs.tabletop.render import RenderPool, TabletopFrame, TabletopRenderer

SCENE = """
<mujoco><worldbody>
  <light pos="0 0 2"/><geom type="box" size=".3 .3 .1" rgba="1 0 0 1" group="1"/>
  <camera name="above" pos="0 0 2" xyaxes="1 0 0 0 1 0"/>
</worldbody></mujoco>
"""


def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The devices on which kernels will be launched; the default one stands in for a GPU."""
    runtime = wp.get_device("cpu").runtime
    other = copy.copy(wp.get_device("cpu"))
    other.alias = "gpu"
    monkeypatch.setattr(runtime, "default_device", other)
    names: list[str] = []
    launch = wp.launch

    def noted(*args: Any, device: Any = None, **options: Any) -> None:
        names.append(runtime.get_device(device).alias)
        launch(*args, device="cpu", **options)

    monkeypatch.setattr(wp, "launch", noted)
    return names


def interleave(monkeypatch: pytest.MonkeyPatch, drawer: type, method: str) -> None:
    """Have one thread begin to draw, then a second, which launches only after the first has finished."""
    order: list[int] = []
    first_launches, second_launches, first_is_done = (threading.Event() for _ in range(3))
    launch, draw = wp.launch, getattr(drawer, method)

    def launching(*args: Any, **options: Any) -> None:
        if threading.get_ident() == order[0]:
            first_launches.set()
            assert second_launches.wait(30)
        else:
            second_launches.set()
            assert first_is_done.wait(30)
        launch(*args, **options)

    def drawing(*args: Any) -> Any:
        order.append(threading.get_ident())
        if order[0] != threading.get_ident():
            assert first_launches.wait(30)
        drawn = draw(*args)
        first_is_done.set()
        return drawn

    monkeypatch.setattr(wp, "launch", launching)
    monkeypatch.setattr(drawer, method, drawing)


def libero() -> tuple[type, str, Callable[[], np.ndarray]]:
    model = mujoco.MjModel.from_xml_string(SCENE)
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    one = LiberoFrame.of(data, np.array([], int), np.array([], bool))
    renderer = LiberoRenderer(model, 2, cameras=("above",), size=16, threads=2)
    return Lane, "draw", lambda: renderer.render(LiberoFrame.stack([one, one]))


def tabletop() -> tuple[type, str, Callable[[], np.ndarray]]:
    model = mujoco.MjModel.from_xml_string(SCENE)
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    xmat = data.geom_xmat.reshape(1, -1, 3, 3)
    one = (
        *(data.geom_xpos[None], xmat, model.geom_size[None], model.geom_rgba[None]),
        np.full((1, model.ngeom), -1),
        *(data.cam_xpos[None], data.cam_xmat.reshape(1, 1, 3, 3), data.light_xdir[None]),
        *(model.light_diffuse[None], model.light_ambient[None]),
    )
    frame = TabletopFrame(*(np.concatenate([array, array]) for array in one))
    pool = RenderPool(model, 2, 16, (0.0, 0.0, 0.0), threads=2)
    return TabletopRenderer, "render", lambda: pool.render(frame)


@pytest.mark.parametrize("suite", [libero, tabletop])
def test_a_thread_that_has_drawn_does_not_change_where_others_draw(monkeypatch, suite) -> None:
    drawer, method, draw = suite()
    expected = draw()
    assert len(np.unique(expected)) > 1
    launched = launches(monkeypatch)
    interleave(monkeypatch, drawer, method)
    assert (draw() == expected).all()
    assert set(launched) == {"cpu"}
