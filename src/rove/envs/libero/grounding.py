"""Places in the image of the things that an instruction is about."""

# pyright: reportAttributeAccessIssue=false
from __future__ import annotations

import re
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import mujoco
import numpy as np
import torch
from torch import Tensor

from rove.envs.libero import course, package, scenes
from rove.envs.libero.handles import Handle
from rove.envs.libero.predicates import Region
from rove.envs.libero.scenes import CAMERAS, LiberoScene, TaskModel
from rove.envs.libero.worlds import Place


def pixels(place: Place, goal: Mapping[str, Any], size: int) -> Tensor:
    """Return where object (or handle), destination and hand are, float32 [3, 2], in a world whose positions
    are up to date, right and down from the upper left corner of the first camera's picture, as an observation
    shows it: mirrored."""
    data, rows = place.group.data, np.array([place.row])
    model = place.task.model
    where = np.full((3, 3), np.nan)
    if "body" in goal:
        where[0] = data["xpos"][place.row, model.body(goal["body"]).id]
        if "region" in goal:
            where[1] = Region(model, goal["region"]).pose(data, rows)[0][0]
        else:
            where[1] = data["xpos"][place.row, model.body(goal["other"]).id]
    else:
        handle = _handle(place.task.scene, goal)
        by = handle.left(data, place.row)
        where[0], where[1], _ = handle.moved(data, place.row, handle.middle, by)
    where[2] = data["site_xpos"][place.row, place.group.arm.site]
    camera, rotation, slope = _camera(place.task.scene)
    seen = (where - camera) @ rotation  # right, up, towards the viewer
    depth = -seen[:, 2] * slope
    flat = np.stack([0.5 - 0.5 * seen[:, 0] / depth, 0.5 - 0.5 * seen[:, 1] / depth], axis=1)
    outside = (flat < 0) | (flat > 1)
    flat[outside.any(1)] = np.nan
    return torch.from_numpy((size * flat).astype(np.float32))


_handles: weakref.WeakKeyDictionary[LiberoScene, dict[tuple[str, str, float], Handle]] = (
    weakref.WeakKeyDictionary()
)


def _handle(scene: LiberoScene, goal: Mapping[str, Any]) -> Handle:
    """Return the handle of a predicate about a joint, which is looked for once."""
    known = _handles.setdefault(scene, {})
    key = goal["joints"][0], goal["comparison"], goal["limit"]
    if key not in known:
        known[key] = course.handle(scene.model, goal)
    return known[key]


_cameras: weakref.WeakKeyDictionary[LiberoScene, tuple[np.ndarray, np.ndarray, float]] = (
    weakref.WeakKeyDictionary()
)


def _camera(scene: LiberoScene) -> tuple[np.ndarray, np.ndarray, float]:
    """Return position [3], axes [3, 3] and the tangent of half the view of the first camera, which stands
    still."""
    if scene not in _cameras:
        _cameras[scene] = _place_camera(scene)
    return _cameras[scene]


def _place_camera(scene: LiberoScene) -> tuple[np.ndarray, np.ndarray, float]:
    model = scene.model
    camera = model.camera(CAMERAS[0]).id
    data = mujoco.MjData(model)
    mujoco.mj_kinematics(model, data)
    mujoco.mj_camlight(model, data)
    slope = float(np.tan(np.deg2rad(model.cam_fovy[camera]) / 2))
    return data.cam_xpos[camera].copy(), data.cam_xmat[camera].reshape(3, 3).copy(), slope


def requests(task: TaskModel, suite: Sequence[str]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """List what could be asked for where `task` takes place, and what it is about: its own instruction, and
    those of the suite's tasks whose things are here, each the only one of its kind."""
    there = set(task.bodies)
    yield task.instruction, task.goal[0]
    for name in suite:
        goal = () if name == task.task else _things(name)
        if goal and all(thing in there and not _twins(thing, there) for thing in goal):
            yield package.published_instruction(name), scenes.goal(name)[0]


def _things(task: str) -> tuple[str, ...]:
    """Return the objects of a goal that is to put one thing somewhere: that thing, and on or in what; else
    none."""
    goal = package.goal(task)
    if len(goal) != 1 or len(goal[0]) != 3:
        return ()
    thing, target = goal[0][1:]
    return thing, re.sub(r"(_\d+)_.*$", r"\1", target)


def _twins(thing: str, there: set[str]) -> bool:
    """Tell whether there is another thing of that kind."""
    kind = re.sub(r"_\d+$", "", thing)
    return any(other != thing and re.sub(r"_\d+$", "", other) == kind for other in there)
