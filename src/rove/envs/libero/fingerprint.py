"""Checks that a renderer still draws what it drew: two reference pictures, compared by a small descriptor.

A policy depends on the pictures that it was trained on. They drift with a driver, a version of MuJoCo or of
Warp; a comparison at start-up tells. The scene is made here, so that it takes milliseconds and no package:
textured, lit, shaded shapes, seen by two cameras.
"""

# pyright: reportAttributeAccessIssue=false
from __future__ import annotations

import base64
import functools
import warnings
from typing import Literal

import mujoco
import numpy as np

from rove.envs.libero.frame import LiberoFrame
from rove.envs.libero.render import LiberoRenderer

GRID = 8
"""A picture is described by the mean colours of this many by this many fields."""
TOLERANCE = 1.0
"""Difference that is called drift, grey levels, mean over fields. Machines differ by less than 0.1."""
_SIZE = 64

_SCENE = """
<mujoco>
  <visual><headlight ambient=".1 .1 .1" diffuse=".4 .4 .4" specular=".5 .5 .5"/></visual>
  <asset>
    <texture name="checks" type="2d" builtin="checker" width="64" height="64"
      rgb1=".9 .8 .7" rgb2=".3 .2 .1"/>
    <texture name="fade" type="cube" builtin="gradient" width="32" height="32"
      rgb1=".2 .6 .9" rgb2=".9 .3 .2"/>
    <material name="floor" texture="checks" texrepeat="6 6" texuniform="true" specular=".3" shininess="0"/>
    <material name="box" texture="fade" specular=".5" shininess=".5"/>
    <material name="plain" rgba=".6 .6 .65 1" specular=".8" shininess=".3"/>
  </asset>
  <worldbody>
    <light pos="1 1 3" dir="-.3 -.3 -1" diffuse=".8 .8 .8" specular=".3 .3 .3" castshadow="false"/>
    <geom name="floor" type="plane" size="2 2 .1" material="floor" group="1"/>
    <geom type="box" pos=".3 .2 .2" euler="0 0 30" size=".2 .15 .2" material="box" group="1"/>
    <geom type="cylinder" pos="-.3 .1 .2" size=".15 .2" material="plain" group="1"/>
    <geom type="sphere" pos="0 -.3 .15" size=".15" material="plain" group="1"/>
    <camera name="front" pos="0 -1.6 1.2" xyaxes="1 0 0 0 .6 .8" fovy="45"/>
    <camera name="above" pos=".1 0 1.4" xyaxes="0 1 0 -1 0 0" fovy="75"/>
  </worldbody>
</mujoco>
"""

REFERENCE: dict[str, str] = {
    "warp": (
        "ExANFBENFREOFhIOFhIOFRIOFBEOExANbVtJdmRSfnBlhXBbeGpjfGtzf2JXb11KjXZefGtbWFhghnNhRjo5XS8uZkE3lHxj"
        "oYhvh3JcPDxBal9ZW1JVTychgmRSj3ZciG9VpYxyhG5XYV1cY15fn4dtjHNZqZB2r5Z8gWhOspl/clxEq5R9f2ZMsJd9gmlP"
        "gmlPrZR6hGtRq5J4hm1TrZR6hGtRrpV7noZsi3NZp450hm1TqpF3iXBWpItxjnVbl35kmYBmmYBmmYBmmH9lmH9lmH9lmYBm"
        "lHthmYBmnYRqo414xL/FmoRwmH9lnYRqlHthmYBmmoFomYRwtLK5oIp0mH9lnYRqnYRqmH9llpKXinhpjndgloBrmYBmlHth"
        "nYRqmH9ljXdil31liGFteH+SmYBmlHthmYBmmH9lmH9lmH9lsXlxhHqVlX9qmH9llHthmYBmnYRqnYRqlXlhlHlhmH9lnYRq"
        "kHhemYBmnYRqnYRqlHthlHthmH9lm4Jp"
    ),
    "gl": (
        "ExANFBENFREOFhIOFhIOFRIOFBEOExANbFtIdmRSfnBlhXBbdmtlemx1gGFWb11KjHVde2pbWFhghnNhRTo5YS4raEI2lXxj"
        "oYhuh3JcPDxBamBZW1JVUScgg2RRj3ZciG9VpYxyhG5XYl1dY15foIdtjHNZqZB2r5Z8gWhOspl/clxEq5R9f2ZMsJd9gmlP"
        "gmlPrpV7hGtRrJN5hWxSrZR6g2pQrpV7noVsi3NZp450hW1TqpF3iHBWo4txjXRbmH9lmYBmmYBmmYBmmH9lmH9lmH9lmH9l"
        "lHthmYBmnYRqpI54xL/FmoRwmH9lnYRqlHthmYBmmoFomYRwtLK5oIp0mH9lnYRqnYRqmH9llpKXinhpjnhhlYBrmYBmlHth"
        "nYRqmH9ljXdhl31kiWFtdoCVmYBmlHthmYBmmH9lmH9lmH9ls3hug3qVlIBrmH9lk3pgmYBmnYRqnYRqlnlglXlhmH9lnYRq"
        "j3demH9lnYRqnYRqlHthlHthmH9lnINp"
    ),
}
"""Descriptors of the reference pictures, uint8 in base64;
`python -m rove.envs.libero.fingerprint` prints them."""


def pictures(backend: Literal["warp", "gl"], device: str = "cpu", gpu: int | None = None) -> np.ndarray:
    """Draw the reference pictures, uint8 [2, H, W, 3], as `backend` does now."""
    model = mujoco.MjModel.from_xml_string(_SCENE)
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    cameras = ("front", "above")
    renderer = LiberoRenderer(model, 1, cameras=cameras, size=_SIZE, backend=backend, device=device, gpu=gpu)
    try:
        return renderer.render(LiberoFrame.of(data, np.array([], int), np.array([], bool)))[0]
    finally:
        renderer.close()


def describe(images: np.ndarray) -> np.ndarray:
    """Return the mean colours, float [2, GRID, GRID, 3], of the fields of pictures uint8 [2, H, W, 3]."""
    n, h, w, _ = images.shape
    return images.reshape(n, GRID, h // GRID, GRID, w // GRID, 3).mean((2, 4))


def drift(images: np.ndarray, backend: Literal["warp", "gl"]) -> float:
    """Return the grey levels by which pictures differ from the reference; mean over fields."""
    reference = np.frombuffer(base64.b64decode(REFERENCE[backend]), np.uint8)
    now = describe(images)
    return float(np.abs(now - reference.reshape(now.shape)).mean())


@functools.lru_cache
def check(backend: Literal["warp", "gl"], device: str = "cpu", gpu: int | None = None) -> float:
    """Warn if `backend` does not draw as it did when Rove was released; returns the drift, grey levels.

    `device` and `gpu`: see `LiberoRenderer`.
    """
    found = drift(pictures(backend, device, gpu), backend)
    if found > TOLERANCE:
        warnings.warn(
            f"The {backend} renderer's pictures differ by {found:.1f} grey levels from the reference "
            f"(tolerated: {TOLERANCE}). A policy trained on other pictures may fail on these: compare the "
            f"versions of mujoco and warp-lang, or the OpenGL driver, with those it was trained with.",
            stacklevel=2,
        )
    return found


def _print_references() -> None:
    """Print descriptors of what is drawn now, to become the reference when a change is meant."""
    for backend in ("warp", "gl"):
        fields = np.round(describe(pictures(backend))).astype(np.uint8)
        print(backend, base64.b64encode(fields.tobytes()).decode())


if __name__ == "__main__":
    _print_references()
