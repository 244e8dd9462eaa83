"""Each suite's expectations of a policy, as data: known before, and without, its simulator.

They stand in the suite's folder; its entry point offers them as `conventions(name)`.
"""

from __future__ import annotations

from rove.envs import registry
from rove.errors import RoveError, nearest
from rove.types import Conventions

PROMPT = "In: What action should the robot take to {instruction}?\nOut:"
"""OpenVLA's prompt."""
POSE = ("x", "y", "z", "roll", "pitch", "yaw", "gripper")
"""Names of an action that moves and turns a hand."""


def find(suite: str) -> Conventions | None:
    """The conventions of a suite; None where they are not on record."""
    kind = registry.kind_of(suite)
    say = registry.offered(kind, "conventions") if kind else None
    return say(suite) if say else None


def of(suite: str) -> Conventions:
    """The conventions of a suite. Raises RoveError where they are not on record."""
    found = find(suite)
    if found is None:
        known = [kind for kind in registry.kinds() if find(kind)]
        raise RoveError(f"No conventions are on record for the suite {suite!r}. {nearest(suite, known)}")
    return found
