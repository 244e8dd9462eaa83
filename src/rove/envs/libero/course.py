"""The course of a task: the steps in which its goal can be done, one after the other.

What has to stand open is opened and what has to be on is turned on, also a drawer that a thing goes into
where the goal does not say so; things are put where they belong; then doors, drawers and knobs are closed and
turned off.
"""

# pyright: reportAttributeAccessIssue=false
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import mujoco

from rove.envs.libero.handles import Handle
from rove.envs.libero.joints import opens, slide_of
from rove.envs.libero.predicates import COMPARISONS
from rove.envs.libero.scenes import TaskModel
from rove.envs.libero.targets import Target

AJAR = 0.45
"""Radians from which on a door is open enough for a hand to come between, and push it from within."""
WIDE = 0.85
"""Share of its way by which a drawer is opened for a thing: half open, the cabinet is over its middle."""
SHARED = 0.65
"""Share of a region's half size by which two things on it lie beside its middle."""


@dataclass(frozen=True, slots=True)
class Step:
    """One thing that is put somewhere, or one joint that is moved."""

    spec: Mapping[str, Any]
    """The predicate that it is for, in the form of `TaskModel.goal`."""
    subject: Target | Handle
    until: int = -1
    """A step that, once done, makes this one needless; -1: none."""
    late: bool = False
    """It counts only when everything before it is done."""


def course(task: TaskModel) -> list[Step]:
    """List the steps of a task's goal, in an order in which they can be done."""
    places = [spec for spec in task.goal if spec["kind"] != "joint"]
    joints = [spec for spec in task.goal if spec["kind"] == "joint"]
    last = [spec for spec in joints if places and spec["all"]]
    steps: list[Step] = []
    for spec in joints:
        if not any(spec is other for other in last):
            steps += _joint_steps(task.model, spec)
    for spec in places:
        if (drawer := _drawer(task.model, spec)) is not None:
            steps.append(replace(drawer, until=len(steps) + 1))
        steps.append(Step(spec, Target(task, spec, _aside(spec, places))))
    for spec in last:
        steps += [replace(step, late=True) for step in _joint_steps(task.model, spec)]
    return steps


def _aside(spec: Mapping[str, Any], places: Sequence[Mapping[str, Any]]) -> float:
    """Return how far beside the middle of its region a thing goes that has to share it: see `Target`."""
    sharing = [other for other in places if other["kind"] == "on_region" == spec["kind"]]
    sharing = [other for other in sharing if other["region"] == spec["region"]]
    if len(sharing) < 2:
        return 0.0
    return SHARED * (1.0 - 2.0 * [other is spec for other in sharing].index(True) / (len(sharing) - 1))


def handle(model: mujoco.MjModel, spec: Mapping[str, Any]) -> Handle:
    """Return the handle that a predicate about a joint, or several, is about: the first."""
    subject = _joint_steps(model, spec)[0].subject
    assert isinstance(subject, Handle)
    return subject


def _joint_steps(model: mujoco.MjModel, spec: Mapping[str, Any]) -> list[Step]:
    """List a step for each joint that a predicate is about: all of them, or one that is enough."""
    towards = 1.0 if COMPARISONS[spec["comparison"]](1.0, 0.0) else -1.0
    at = spec["comparison"] in ("<=", ">=")
    names: Sequence[str] = spec["joints"] if spec["all"] else spec["joints"][:1]
    steps: list[Step] = []
    for name in names:
        joint = int(model.joint(name).id)
        subject = Handle(model, joint, spec["limit"], towards, at, spec["all"])
        if subject.door is not None and not subject.pushed:
            # a hand that follows a door by its handle gets caught between them
            steps.append(Step(spec, Handle(model, joint, towards * AJAR, towards, False, False)))
            subject = Handle(model, joint, spec["limit"], towards, at, True)
        steps.append(Step(spec, subject))
    return steps


def _drawer(model: mujoco.MjModel, spec: Mapping[str, Any]) -> Step | None:
    """Return the step of opening the drawer that a thing goes into, if it goes into one."""
    if spec["kind"] != "in_region":
        return None
    if (joint := slide_of(model, model.body(spec["region"]["body"]).id)) is None:
        return None
    low, high = model.jnt_range[joint]
    towards, limit = opens(model, joint), float(low + high) / 2
    # half open is open, also where a hand that leaves has pushed it back a little
    end = WIDE * float(high if towards > 0 else low)
    opened = {
        "kind": "joint",
        "joints": [model.joint(joint).name],
        "comparison": ">" if towards > 0 else "<",
        "limit": limit,
        "all": False,
    }
    return Step(opened, Handle(model, joint, limit, towards, False, False, end))
