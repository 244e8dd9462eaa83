"""How drawers, doors and knobs move: which joint a body slides along, and which way is open."""

# pyright: reportAttributeAccessIssue=false
from __future__ import annotations

import mujoco
import numpy as np


def slide_of(model: mujoco.MjModel, body: int) -> int | None:
    """The joint along which a body slides; None where it does not."""
    joint = int(model.body_jntadr[body])
    return joint if joint >= 0 and model.jnt_type[joint] == mujoco.mjtJoint.mjJNT_SLIDE else None


def opens(model: mujoco.MjModel, joint: int) -> float:
    """Whether a joint opens towards its upper end, 1, or its lower one, -1: that which is further from zero,
    at which what it moves is shut."""
    low, high = np.abs(model.jnt_range[joint])
    return 1.0 if high > low else -1.0


def way_out(model: mujoco.MjModel, joint: int) -> np.ndarray:
    """A joint's axis [3] in its body's frame, in the direction in which it opens: a drawer slides along it, a
    door turns about it."""
    return opens(model, joint) * model.jnt_axis[joint]
