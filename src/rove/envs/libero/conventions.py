"""LIBERO's expectations of a policy.

Sources: its controller, and the reference evaluation of OpenVLA for it (two cameras, centre crop, gripper -1
open).
"""

from __future__ import annotations

from rove.config.schema import LiberoConfig
from rove.envs.conventions import POSE, PROMPT
from rove.types import ActionSpec, Conventions

ACTIONS = ActionSpec(POSE, ("1",) * 7, (-1.0,) * 7, (1.0,) * 7, gripper="open_low")


def conventions(name: str) -> Conventions:
    """Conventions of "libero:TASKS", where each of TASKS is a set, perhaps a perturbed one, or a task of a
    set."""
    tasks = (name.removeprefix("libero").lstrip(":_") or LiberoConfig().tasks).split(",")
    sets = dict.fromkeys(task.partition("/")[0].partition("_")[0] for task in tasks)
    statistics = [
        f"libero{mark}{each}{end}"
        for each in sets
        for mark, end in ((":", ""), ("_", ""), ("_", "_no_noops"))
    ]
    return Conventions(
        suite=name,
        action_spec=ACTIONS,
        images=(1, 2),
        statistics=(name, *statistics, "libero_4_task_suites*", "libero_130*"),
        instructions=("put both the alphabet soup and the tomato sauce in the basket",),
        state=8,
        center_crop=True,
        prompt=PROMPT,
        rate=20.0,
    )
