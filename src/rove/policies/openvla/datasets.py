"""Action conventions of published data sets, for checkpoints whose files do not describe their actions.

A data set is a name in a checkpoint's statistics, whichever robot or simulator it was recorded with.
"""

from __future__ import annotations

import math
from fnmatch import fnmatch

from rove.types import ActionSpec

_ARM = ("x", "y", "z", "roll", "pitch", "yaw")
_NAMES = (*_ARM, "gripper")
_OPEN_X = ActionSpec(_NAMES, (*["m"] * 3, *["rad"] * 3, "1"), (*[-math.inf] * 6, 0.0), (*[math.inf] * 6, 1.0))
"""Convention of Open X-Embodiment: metres and radians, the gripper from 0 closed to 1 open."""
_PUBLISHED = {"libero*": ActionSpec(_NAMES, ("1",) * 7, (*[-1.0] * 6, 0.0), (1.0,) * 7)}
"""Conventions of other data sets, by pattern of their names: units of the arm's controller."""


def action_spec(dataset: str | None, dim: int) -> ActionSpec:
    """Return the action spec of `dim` dimensions in a data set; None stands for one of Open X-Embodiment."""
    if dim != len(_NAMES):
        names = tuple(f"joint_{i}" for i in range(dim))
        return ActionSpec(names, ("1",) * dim, (-math.inf,) * dim, (math.inf,) * dim)
    known = (spec for pattern, spec in _PUBLISHED.items() if dataset and fnmatch(dataset, pattern))
    return next(known, _OPEN_X)
