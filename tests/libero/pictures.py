"""Reference pictures of MuJoCo 3.2.3, with which published checkpoints were trained, and ours beside them.

`pictures.npz` has, for one task of each scene class, all positions of a world, its fixtures' poses, and
128 x 128 pictures of both cameras that MuJoCo 3.2.3 drew of it through EGL.
`python -m tests.libero.pictures FILE` writes them side by side with ours.
"""

# pyright: reportAttributeAccessIssue=false
from __future__ import annotations

import sys
from pathlib import Path
from typing import Literal

import mujoco
import numpy as np
from PIL import Image

from rove.envs.libero.frame import LiberoFrame
from rove.envs.libero.render import LiberoRenderer
from rove.envs.libero.scenes import CAMERAS, load_task

CLASSES = ("tabletop", "floor", "kitchen", "living room", "study")
_FILE = np.load(Path(__file__).with_name("pictures.npz"))


def reference(kind: str) -> np.ndarray:
    """uint8 [2, 128, 128, 3]."""
    return _FILE[f"{kind}/picture"]


def picture(kind: str, backend: Literal["warp", "gl"], size: int = 128) -> np.ndarray:
    """uint8 [2, H, W, 3]: the same world as `backend` draws it."""
    task = load_task(str(_FILE[f"{kind}/task"]))
    model = task.scene.looks()
    data = mujoco.MjData(model)
    before = model.body_pos.copy(), model.body_quat.copy()
    model.body_pos[:], model.body_quat[:] = _FILE[f"{kind}/body_pos"], _FILE[f"{kind}/body_quat"]
    data.qpos[:] = _FILE[f"{kind}/qpos"]
    mujoco.mj_forward(model, data)
    model.body_pos[:], model.body_quat[:] = before
    sites = np.array([model.site(burner["site"]).id for burner in task.burners], int)
    renderer = LiberoRenderer(model, 1, cameras=CAMERAS, size=size, burners=sites.tolist(), backend=backend)
    try:
        return renderer.render(LiberoFrame.of(data, sites, np.zeros(len(sites), bool)))[0]
    finally:
        renderer.close()


def difference(one: np.ndarray, other: np.ndarray) -> float:
    """Mean absolute difference, grey levels."""
    return float(np.abs(one.astype(int) - other).mean())


def main() -> None:
    rows = []
    for kind in CLASSES:
        drawn = [reference(kind), picture(kind, "gl"), picture(kind, "warp")]
        print(kind, *(f"{difference(image, drawn[0]):.2f}" for image in drawn[1:]))
        rows.append(np.concatenate([np.concatenate([i[c] for i in drawn], 1) for c in (0, 1)], 1))
    Image.fromarray(np.concatenate(rows)).save(sys.argv[1], optimize=True)


if __name__ == "__main__":
    main()
