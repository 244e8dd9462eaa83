"""Closed-form kinematics of the arm: a SCARA with a vertical quill, so that the hand always points down."""

from __future__ import annotations

import numpy as np

from rove.envs.tabletop.scene import BASE, FINGER_TRAVEL, FOREARM, UPPER_ARM
from rove.types import ActionSpec

WORKSPACE_LOW = np.array([-0.20, -0.16, 0.006, -1.8])
WORKSPACE_HIGH = np.array([0.20, 0.16, 0.20, 1.8])
"""Components of the commanded gripper pose: x, y, z of the point between the fingertips [m], yaw [rad]."""

ACTION_SPEC = ActionSpec(
    names=("x", "y", "z", "yaw", "gripper"),
    units=("m", "m", "m", "rad", "1"),
    low=(-0.07, -0.07, -0.07, -0.5, -1.0),
    high=(0.07, 0.07, 0.07, 0.5, 1.0),
)
"""Deltas of the commanded pose; a gripper value above zero opens, any other closes."""


STATE_DIM = 5
"""Width of `TabletopWorlds.proprioception`."""


def inverse(pose: np.ndarray, opening: np.ndarray) -> np.ndarray:
    """Return joint targets [n, 6] for gripper poses [n, 4] and finger positions [n], elbow to the right.

    The law of cosines gives the elbow; every pose of the workspace is within reach.
    """
    x, y = pose[:, 0] - BASE[0], pose[:, 1] - BASE[1]
    cosine = (x * x + y * y - UPPER_ARM**2 - FOREARM**2) / (2 * UPPER_ARM * FOREARM)
    elbow = np.arccos(np.clip(cosine, -1.0, 1.0))
    shoulder = np.arctan2(y, x) - np.arctan2(FOREARM * np.sin(elbow), UPPER_ARM + FOREARM * np.cos(elbow))
    wrist = pose[:, 3] - shoulder - elbow
    return np.stack([shoulder, elbow, pose[:, 2], wrist, opening, opening], axis=-1)


def forward(joints: np.ndarray) -> np.ndarray:
    """Return gripper poses [n, 4] of joint positions [n, 6]."""
    shoulder, bend = joints[:, 0], joints[:, 0] + joints[:, 1]
    x = BASE[0] + UPPER_ARM * np.cos(shoulder) + FOREARM * np.cos(bend)
    y = BASE[1] + UPPER_ARM * np.sin(shoulder) + FOREARM * np.sin(bend)
    return np.stack([x, y, joints[:, 2], bend + joints[:, 3]], axis=-1)


def opening(gripper: np.ndarray) -> np.ndarray:
    """Return the finger position [n], metres, that a gripper command [n] asks for."""
    return np.where(gripper > 0, FINGER_TRAVEL, 0.0)
