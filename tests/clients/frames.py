"""What the tests record, the same in every environment: smooth pictures, which a video keeps well."""

from __future__ import annotations

from typing import Any

import numpy as np

FPS = 10
SIDE = 48
LENGTHS = (7, 5)
TASKS = ("put the red cube on the plate", "öffne die Schublade")
CAMERAS = ("observation.images.front", "observation.images.wrist")
FEATURES: dict[str, dict[str, Any]] = {
    **{
        name: {"dtype": "video", "shape": (SIDE, SIDE, 3), "names": ["height", "width", "channels"]}
        for name in CAMERAS
    },
    "observation.state": {"dtype": "float32", "shape": (4,), "names": ["x", "y", "z", "gripper"]},
    "action": {"dtype": "float32", "shape": (3,), "names": ["x", "y", "gripper"]},
    "pressed": {"dtype": "bool", "shape": (1,), "names": None},
    "ticks": {"dtype": "int64", "shape": (1,), "names": None},
}


def frame(episode: int, number: int) -> dict[str, np.ndarray]:
    """One frame of an episode; no two are alike."""
    ramp = np.linspace(0, 150, SIDE)
    level = 10 * number + 40 * episode
    front = np.stack(
        np.broadcast_arrays(ramp[:, None] + level, ramp[None, :] + 30, np.full(1, 60.0 + level)), -1
    )
    return {
        CAMERAS[0]: front.astype(np.uint8),
        CAMERAS[1]: front[::-1, :, ::-1].astype(np.uint8),
        "observation.state": np.linspace(-1, 1, 4, dtype=np.float32) * (number + 1) + episode,
        "action": np.array([0.01 * number, -0.02 * episode, (-1.0) ** number], np.float32),
        "pressed": np.array([number % 3 == 0]),
        "ticks": np.array([1000 * episode + number]),
    }
