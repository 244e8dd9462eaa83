"""The put-on-plate benchmark's expectations of a policy.

They are those of RL4VLA and RLinf: one camera, no crop, gripper +1 open.
"""

from __future__ import annotations

from rove.envs.conventions import POSE, PROMPT
from rove.types import ActionSpec, Conventions

_ACTIONS = ActionSpec(
    POSE,
    (*["m"] * 3, *["rad"] * 3, "1"),
    (*[-1.0] * 3, *[-1.5707964] * 3, -1.0),
    (*[1.0] * 3, *[1.5707964] * 3, 1.0),
)


def conventions(name: str) -> Conventions | None:
    """Conventions of "maniskill_put_on_plate"; None for ManiSkill's own tasks, whose control mode decides."""
    if not name.startswith("maniskill_"):
        return None
    return Conventions(
        suite=name,
        action_spec=_ACTIONS,
        images=(1,),
        statistics=("bridge_orig*", "bridge*", "*maniskill*", "*25ood*"),
        instructions=("put carrot on plate",),
        state=8,
        center_crop=False,
        prompt=PROMPT,
        rate=5.0,
    )
