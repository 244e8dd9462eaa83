"""The rasteriser against MuJoCo's own OpenGL pictures and against geometry; no LIBERO package needed."""

from __future__ import annotations

import sys

import mujoco
import numpy as np
import pytest

from rove.envs.libero import fingerprint, gl_renderer
from rove.envs.libero.frame import LiberoFrame
from rove.envs.libero.render import LiberoRenderer
from rove.envs.libero.simplify import Corners, simplify
from rove.envs.libero.soup import levels, soup
from rove.errors import RoveError

SQUARE = """
<mujoco>
  <visual><headlight ambient="1 1 1" diffuse="0 0 0" specular="0 0 0"/></visual>
  <worldbody>
    <geom name="near" type="box" pos=".25 .25 0" size=".25 .25 .01" rgba="1 0 0 1" group="1"/>
    <geom name="hidden" type="box" pos="0 0 .2" size="1 1 .01" rgba="0 1 0 1" group="0"/>
    <geom name="far" type="box" pos="0 0 -.5" size="3 .25 .01" rgba="0 0 1 1" group="2"/>
    <site name="stove_burner" type="cylinder" pos="-.3 -.3 0" size=".1 .01" rgba="1 1 1 0"/>
    <camera name="above" pos="0 0 1.01" xyaxes="1 0 0 0 1 0" fovy="90"/>
    <camera name="below" pos="0 0 -1.5" xyaxes="1 0 0 0 -1 0" fovy="90"/>
  </worldbody>
</mujoco>
"""


def frame(model: mujoco.MjModel, lit: bool = False) -> LiberoFrame:
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    sites = np.arange(model.nsite)
    return LiberoFrame.of(data, sites, np.full(len(sites), lit))


@pytest.fixture(scope="module")
def square() -> mujoco.MjModel:
    return mujoco.MjModel.from_xml_string(SQUARE)


def drawn(model: mujoco.MjModel, *frames: LiberoFrame, threads: int = 1, size: int = 32) -> np.ndarray:
    renderer = LiberoRenderer(
        model, len(frames), cameras=("above", "below"), size=size, burners=range(model.nsite), threads=threads
    )
    try:
        return renderer.render(LiberoFrame.stack(list(frames)))
    finally:
        renderer.close()


def test_things_are_where_they_are(square: mujoco.MjModel) -> None:
    image = drawn(square, frame(square))[0]
    assert image.shape == (2, 32, 32, 3)
    # From 1 m above, 32 pixels show 2 m: red fills a quarter of the upper right quadrant, blue a band.
    red = (image[0] == [255, 0, 0]).all(-1)
    rows, columns = np.nonzero(red)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (8, 15, 16, 23)
    assert (image[0, 16, :16] == [0, 0, 255]).all()  # behind red, where nothing hides it
    assert not (image[0] == [0, 255, 0]).all(-1).any(), "collision geoms are not drawn"
    assert (image[0, 0, 0] == 0).all(), "black where nothing is"
    # From below, blue is in front of red, and what was upper right is lower right.
    assert (image[1, 16] == [0, 0, 255]).all()
    red = (image[1] == [255, 0, 0]).all(-1)
    assert not red[:16].any() and red[20, 18]


def test_a_lit_burner_is_drawn_and_another_is_not(square: mujoco.MjModel) -> None:
    off, on = drawn(square, frame(square, lit=False), frame(square, lit=True))
    changed = np.flatnonzero((off[0] != on[0]).any((1, 2)))
    assert changed.min() >= 18 and changed.max() <= 22
    assert (on[0, 20, 11] == 255).all()


def test_threads_and_company_change_nothing(square: mujoco.MjModel) -> None:
    one, other = frame(square, lit=False), frame(square, lit=True)
    alone = drawn(square, one)
    together = drawn(square, other, one, other, one, one, threads=2)
    assert (together[[1, 3, 4]] == alone).all()
    assert (together[0] == together[2]).all() and (together[0] != alone).any()


def test_a_renderer_says_how_many_it_draws(square: mujoco.MjModel) -> None:
    renderer = LiberoRenderer(square, 1, cameras=("above",), size=16, burners=range(1))
    with pytest.raises(RoveError, match="got 2 worlds; this renderer draws up to 1"):
        renderer.render(LiberoFrame.stack([frame(square), frame(square)]))
    renderer.close()
    renderer.close()


def test_what_crosses_the_near_plane_is_drawn_up_to_it() -> None:
    model = mujoco.MjModel.from_xml_string(
        """<mujoco><visual><headlight ambient="1 1 1" diffuse="0 0 0"/></visual><worldbody>
        <geom type="plane" size="50 50 50" rgba="1 1 1 1" group="1"/>
        <camera name="above" pos="0 0 1" xyaxes="1 0 0 0 0 1" fovy="90"/>
        <camera name="below" pos="0 0 1" xyaxes="1 0 0 0 0 1" fovy="60"/></worldbody></mujoco>"""
    )
    image = drawn(model, frame(model))[0]
    assert (image[:, 18:] == 255).all() and (image[:, :16] == 0).all()


def test_it_shades_as_opengl_does() -> None:
    """The reference of "gl" was drawn by MuJoCo's own renderer."""
    assert fingerprint.drift(fingerprint.pictures("warp"), "gl") < 1.0


def test_the_fingerprint_is_silent_on_the_pictures_of_today(recwarn: pytest.WarningsRecorder) -> None:
    fingerprint.check.cache_clear()
    assert fingerprint.check("warp") < 0.3
    assert not recwarn.list


def test_the_fingerprint_fires_when_pictures_drift(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprint, "_SCENE", fingerprint._SCENE.replace('shininess="0"', 'shininess=".9"'))
    fingerprint.check.cache_clear()
    with pytest.warns(UserWarning, match="differ by .* grey levels from the reference"):
        fingerprint.check("warp")
    fingerprint.check.cache_clear()


def sphere(rings: int) -> Corners:
    """A unit sphere of many small triangles, with texture coordinates that follow longitude and latitude."""
    angle, height = np.meshgrid(np.linspace(0, 2 * np.pi, 2 * rings), np.linspace(-1.5, 1.5, rings))
    point = np.stack([np.cos(height) * np.cos(angle), np.cos(height) * np.sin(angle), np.sin(height)], -1)
    uv = np.stack([angle / (2 * np.pi), height / 3 + 0.5], -1)
    a, b, c, d = (
        np.concatenate([point, uv], -1)[y : y + rings - 1, x : x + 2 * rings - 1].reshape(-1, 5)
        for y, x in ((0, 0), (0, 1), (1, 1), (1, 0))
    )
    rows = np.stack([a, b, c, a, c, d], 1).reshape(-1, 5)
    return Corners(rows[:, :3], rows[:, :3], rows[:, 3:])


def test_a_simplified_mesh_keeps_its_shape_and_texture() -> None:
    before = sphere(60)
    after = simplify(before, 700)
    assert 500 < len(after) < 1000 < len(before)
    assert np.abs(np.linalg.norm(after.position, axis=1) - 1).max() < 0.03
    assert ((after.normal * after.position).sum(1) > 0.98).all()
    angle = np.arctan2(after.position[:, 1], after.position[:, 0]) / (2 * np.pi)
    off = np.abs((after.uv[:, 0] - angle + 0.5) % 1 - 0.5)
    equator = np.abs(after.position[:, 2]) < 0.8
    assert off[equator].max() < 0.02
    # Across the seam, where the texture starts anew, no triangle spans the whole of it.
    across = np.ptp(after.uv[:, 0].reshape(-1, 3), axis=1)
    assert across[equator.reshape(-1, 3).all(1)].max() < 0.5


def test_a_small_mesh_is_left_alone() -> None:
    corners = sphere(6)
    assert simplify(corners, 10_000) is corners


def test_textures_shrink_to_what_a_picture_shows() -> None:
    model = mujoco.MjModel.from_xml_string(
        """<mujoco><asset><texture name="t" type="2d" builtin="flat" width="512" height="256"
        rgb1="1 .5 0"/></asset><worldbody/></mujoco>"""
    )
    sizes = [level.shape for level in levels(model, 0, pixels=16)]
    assert sizes[0] == (64, 128) and sizes[-1] == (1, 1)
    assert all(level[0, 0] == 0x007FFF for level in levels(model, 0, pixels=16))


def test_a_shape_that_cannot_be_drawn_is_named() -> None:
    model = mujoco.MjModel.from_xml_string(
        """<mujoco><asset><hfield name="h" nrow="2" ncol="2" size="1 1 1 1"/></asset>
        <worldbody><geom type="hfield" hfield="h" group="1"/></worldbody></mujoco>"""
    )
    with pytest.raises(RoveError, match="cannot draw a geom of type mjGEOM_HFIELD"):
        soup(model, 16, ())


def test_gl_without_a_library_names_the_fix(square: mujoco.MjModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    monkeypatch.setattr(gl_renderer.ctypes.util, "find_library", lambda name: None)
    with pytest.raises(RoveError, match=r"no EGL or OSMesa library.*apt install.*--env\.renderer warp"):
        LiberoRenderer(square, 1, cameras=("above",), size=16, backend="gl")


def test_gl_refuses_a_platform_with_windows(square: mujoco.MjModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MUJOCO_GL", "glfw")
    with pytest.raises(RoveError, match="MUJOCO_GL is 'glfw'; .*egl or osmesa"):
        LiberoRenderer(square, 1, cameras=("above",), size=16, backend="gl")


def test_simplifying_names_the_package_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fast_simplification", None)
    with pytest.raises(RoveError, match=r"pip install 'rove\[libero\]'"):
        simplify(sphere(60), 700)


def test_gl_draws_the_same_scene(square: mujoco.MjModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    try:
        renderer = LiberoRenderer(
            square, 1, cameras=("above", "below"), size=32, burners=range(1), backend="gl"
        )
    except RoveError as error:
        pytest.skip(str(error))
    image = renderer.render(frame(square, lit=True))
    renderer.close()
    assert np.abs(image.astype(int) - drawn(square, frame(square, lit=True))).mean() < 1.5
