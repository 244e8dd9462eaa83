"""Poses of everything that an image shows: what physics hands to a renderer."""

# pyright: reportAttributeAccessIssue=false
from __future__ import annotations

from dataclasses import dataclass, fields

import mujoco
import numpy as np


@dataclass(frozen=True, slots=True)
class LiberoFrame:
    """`n` worlds of one model, as MuJoCo's kinematics leave them; arrays with a leading world axis."""

    geom_xpos: np.ndarray
    """[n, ngeom, 3], metres."""
    geom_xmat: np.ndarray
    """[n, ngeom, 3, 3]."""
    cam_xpos: np.ndarray
    """[n, ncam, 3]."""
    cam_xmat: np.ndarray
    """[n, ncam, 3, 3]."""
    light_xpos: np.ndarray
    """[n, nlight, 3]."""
    light_xdir: np.ndarray
    """[n, nlight, 3], unit vectors."""
    burner_xpos: np.ndarray
    """Positions [n, b, 3] of the sites that the renderer was made with as burners."""
    burner_xmat: np.ndarray
    """[n, b, 3, 3]."""
    lit: np.ndarray
    """Burners that are on, bool [n, b]."""

    def __len__(self) -> int:
        return len(self.geom_xpos)

    @classmethod
    def of(cls, data: mujoco.MjData, sites: np.ndarray, lit: np.ndarray) -> LiberoFrame:
        """Make a frame of one world from an MjData whose positions are up to date."""

        def rotation(flat: np.ndarray) -> np.ndarray:
            return flat.reshape(1, -1, 3, 3).copy()

        return cls(
            geom_xpos=data.geom_xpos[None].copy(),
            geom_xmat=rotation(data.geom_xmat),
            cam_xpos=data.cam_xpos[None].copy(),
            cam_xmat=rotation(data.cam_xmat),
            light_xpos=data.light_xpos[None].copy(),
            light_xdir=data.light_xdir[None].copy(),
            burner_xpos=data.site_xpos[sites][None].copy(),
            burner_xmat=rotation(data.site_xmat[sites]),
            lit=np.asarray(lit, bool)[None],
        )

    @classmethod
    def stack(cls, frames: list[LiberoFrame]) -> LiberoFrame:
        """Join the worlds of several frames in one."""
        return cls(*(np.concatenate([getattr(frame, f.name) for frame in frames]) for f in fields(cls)))
