"""Each suite's expectations of a policy, as data: known before, and without, its simulator.

Sources: LIBERO's controller and the reference evaluation of OpenVLA for it (two cameras, centre crop, gripper
-1 open); the 25-object ManiSkill suite of RL4VLA and RLinf (one camera, no crop, gripper +1 open).
"""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatch

from rove.errors import RoveError, nearest
from rove.types import ActionSpec, Conventions

PROMPT = "In: What action should the robot take to {instruction}?\nOut:"
_POSE = ("x", "y", "z", "roll", "pitch", "yaw", "gripper")

LIBERO_ACTIONS = ActionSpec(_POSE, ("1",) * 7, (-1.0,) * 7, (1.0,) * 7, gripper="open_low")
_MANISKILL_ACTIONS = ActionSpec(
    _POSE,
    (*["m"] * 3, *["rad"] * 3, "1"),
    (*[-1.0] * 3, *[-1.5707964] * 3, -1.0),
    (*[1.0] * 3, *[1.5707964] * 3, 1.0),
)


def _libero(name: str) -> Conventions:
    """Conventions of "libero:TASKS", where each of TASKS is a set, perhaps a perturbed one, or a task of a
    set."""
    tasks = name.removeprefix("libero").lstrip(":_").split(",")
    sets = dict.fromkeys(task.partition("/")[0].partition("_")[0] for task in tasks)
    statistics = [
        f"libero{mark}{each}{end}"
        for each in sets
        for mark, end in ((":", ""), ("_", ""), ("_", "_no_noops"))
    ]
    return Conventions(
        suite=name,
        action_spec=LIBERO_ACTIONS,
        images=(1, 2),
        statistics=(name, *statistics, "libero_4_task_suites*", "libero_130*"),
        instructions=("put both the alphabet soup and the tomato sauce in the basket",),
        state=8,
        center_crop=True,
        prompt=PROMPT,
    )


def _maniskill(name: str) -> Conventions:
    return Conventions(
        suite=name,
        action_spec=_MANISKILL_ACTIONS,
        images=(1,),
        statistics=("bridge_orig*", "bridge*", "*maniskill*", "*25ood*"),
        instructions=("put carrot on plate",),
        state=8,
        center_crop=False,
        prompt=PROMPT,
    )


def _tabletop(name: str) -> Conventions:
    from rove.envs.tabletop.robot import ACTION_SPEC, STATE_DIM

    return Conventions(
        suite=name,
        action_spec=ACTION_SPEC,
        images=(1,),
        statistics=("tabletop", "bounds"),
        instructions=("put the red cube on the blue plate", "pick up the green cylinder"),
        state=STATE_DIM,
    )


_KNOWN: dict[str, Callable[[str], Conventions]] = {
    "tabletop": _tabletop,
    "libero_*": _libero,
    "libero:*": _libero,
    "maniskill_*": _maniskill,
}
"""Suite name, with `*`, to its conventions."""


def find(suite: str) -> Conventions | None:
    """The conventions of a suite; None where they are not on record."""
    return next((make(suite) for pattern, make in _KNOWN.items() if fnmatch(suite, pattern)), None)


def of(suite: str) -> Conventions:
    """The conventions of a suite. Raises RoveError where they are not on record."""
    found = find(suite)
    if found is None:
        raise RoveError(f"No conventions are on record for the suite {suite!r}. {nearest(suite, _KNOWN)}")
    return found
