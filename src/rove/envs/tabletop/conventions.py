"""The built-in suite's expectations of a policy."""

from __future__ import annotations

from rove.envs.tabletop.robot import ACTION_SPEC, STATE_DIM
from rove.envs.tabletop.scene import SUBSTEPS, TIMESTEP
from rove.types import Conventions


def conventions(name: str) -> Conventions:
    """Conventions of "tabletop", with or without tasks."""
    return Conventions(
        suite=name,
        action_spec=ACTION_SPEC,
        images=(1,),
        statistics=("tabletop", "bounds"),
        instructions=("put the red cube on the blue plate", "pick up the green cylinder"),
        state=STATE_DIM,
        rate=1 / (SUBSTEPS * TIMESTEP),
    )
