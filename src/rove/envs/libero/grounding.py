"""Places in the image of the things that an instruction is about."""

# pyright: reportAttributeAccessIssue=false
from __future__ import annotations

import re
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rove.envs.libero import course, package, scenes
from rove.envs.libero.handles import Handle
from rove.envs.libero.predicates import Region
from rove.envs.libero.scenes import LiberoScene, TaskModel
from rove.envs.libero.worlds import Place
from rove.envs.rotations import matrix


def pixels(place: Place, goal: Mapping[str, Any], cameras: Sequence[str], size: int) -> Tensor:
    """Return where object (or handle), destination and hand are, in a world whose positions are up to date.

    float32 [3 · cameras, 2], the three in the first camera's picture, then in the next one's: right and down
    from its upper left corner, as an observation shows it: mirrored. NaN for what a picture does not show.
    """
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
    parts = []
    for name in cameras:
        camera = _camera(place.task.scene, name)
        position, rotation = camera.pose(data, place.row)
        seen = (where - position) @ rotation  # right, up, towards the viewer
        depth = -seen[:, 2:] * camera.slope
        with np.errstate(divide="ignore", invalid="ignore"):
            flat = 0.5 - 0.5 * seen[:, :2] / depth
        hidden = (flat < 0) | (flat > 1) | (depth <= 0)
        flat[hidden.any(1)] = np.nan
        parts.append(size * flat)
    return torch.from_numpy(np.concatenate(parts).astype(np.float32))


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


class _Camera(NamedTuple):
    """A camera, and the body that carries it."""

    body: int
    position: np.ndarray
    """Its place [3] in the body's frame, metres."""
    rotation: np.ndarray
    """Its axes [3, 3] in the body's frame."""
    slope: float
    """Tangent of half the angle that it sees."""

    def pose(self, data: Mapping[str, np.ndarray], row: int) -> tuple[np.ndarray, np.ndarray]:
        """Return its place [3] and its axes [3, 3] in a world."""
        frame = data["xmat"][row, self.body].reshape(3, 3)
        return data["xpos"][row, self.body] + frame @ self.position, frame @ self.rotation


_cameras: weakref.WeakKeyDictionary[LiberoScene, dict[str, _Camera]] = weakref.WeakKeyDictionary()


def _camera(scene: LiberoScene, name: str) -> _Camera:
    """Return a camera, which is looked for once."""
    known = _cameras.setdefault(scene, {})
    if name not in known:
        model = scene.model
        camera = model.camera(name).id
        known[name] = _Camera(
            int(model.cam_bodyid[camera]),
            model.cam_pos[camera].copy(),
            matrix(model.cam_quat[camera]),
            float(np.tan(np.deg2rad(model.cam_fovy[camera]) / 2)),
        )
    return known[name]


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
