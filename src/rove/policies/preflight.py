"""Checks of a policy against a suite that are the same whatever the policy's architecture."""

from __future__ import annotations

from torch import Tensor

from rove.errors import RoveError
from rove.findings import Finding
from rove.policies.actions import ActionConverter
from rove.types import ActionSpec, Conventions


def actions(spec: ActionSpec, conventions: Conventions) -> Finding:
    """Check that the policy gives every action dimension that the suite expects, in a unit that converts."""
    try:
        ActionConverter(spec, conventions.action_spec)
    except RoveError as error:
        fix = "fine-tune on the suite, or give the checkpoint an action_spec (config.json, rove)"
        return Finding("actions", "fail", str(error), fix)
    return Finding("actions", "pass", f"{spec.dim} dimensions onto {conventions.action_spec.dim}")


def gripper(
    spec: ActionSpec,
    low: Tensor | None,
    high: Tensor | None,
    conventions: Conventions,
) -> Finding:
    """Check the gripper's range in the data against the action spec, which says how it is turned.

    `low` and `high` [A] are the ends of each action dimension in the data; None where they are not recorded.
    """
    if "gripper" not in spec.names or "gripper" not in conventions.action_spec.names:
        return Finding("gripper", "warn", "policy or suite names no gripper, so its sign cannot be checked")
    place = spec.names.index("gripper")
    least, most = spec.low[place], spec.high[place]
    if low is not None and high is not None and place < min(len(low), len(high)):
        seen = float(low[place]), float(high[place])
        span = max(most - least, 1e-6)
        if abs(seen[0] - least) > 0.25 * span or abs(seen[1] - most) > 0.25 * span:
            detail = (
                f"its data span [{seen[0]:g}, {seen[1]:g}], the policy's convention [{least:g}, {most:g}]"
            )
            fix = "correct the bounds and the gripper of action_spec (config.json, rove)"
            return Finding("gripper", "fail", detail, fix)
    turned = spec.gripper != conventions.action_spec.gripper
    return Finding("gripper", "pass", f"{spec.gripper}, {'mirrored' if turned else 'as it is'} for the suite")
