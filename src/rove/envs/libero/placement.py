"""Initial states drawn anew, by the rules of the stock environment's reset.

A reset draws the arm's joints, then those of doors, drawers and knobs, then puts one thing after the other
into its region, at random until it is clear of all that were put before it. What a task's regions are is read
off its stock samplers when it is compiled (`build.py`). Numbers are drawn in the stock order: from the same
stream of random numbers come the same initial states.
"""

# pyright: reportAttributeAccessIssue=false
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import mujoco
import numpy as np

from rove.envs.libero.controller import FINGERS, JOINTS, POSTURE
from rove.envs.libero.wide import ARM_NOISE as WIDE_ARM_NOISE
from rove.envs.libero.wide import GAP, Wide
from rove.envs.rotations import matrix

ARM_NOISE = 0.02
"""Standard deviation of the arm's joints in published initial states, radians."""
OPEN = (0.020833, -0.020833)
"""The finger joints after a reset, metres."""
TRIES = 5000
"""Places that are tried for a thing before everything is drawn again."""

Placed = dict[str, tuple[np.ndarray, np.ndarray, Mapping[str, Any]]]
"""Name -> position, quaternion (w, x, y, z), and what is known of the thing."""


class _NoRoom(Exception):
    """A thing found no place."""


def draw(
    model: mujoco.MjModel,
    placement: Mapping[str, Any],
    fixtures: Sequence[int],
    rng: np.random.Generator,
    wide: Wide | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Draw an initial state [1 + nq + nv], and the poses [fixtures, 7] of these bodies, which cannot move;
    with `wide`, things lie where it admits them."""
    while True:
        try:
            return _reset(model, placement, fixtures, rng, wide)
        except _NoRoom:  # the stock environment begins again, too
            continue


def _reset(
    model: mujoco.MjModel,
    placement: Mapping[str, Any],
    fixtures: Sequence[int],
    rng: np.random.Generator,
    wide: Wide | None,
) -> tuple[np.ndarray, np.ndarray]:
    qpos = model.qpos0.copy()
    noise = ARM_NOISE if wide is None else WIDE_ARM_NOISE
    qpos[:JOINTS] = POSTURE + noise * rng.standard_normal(JOINTS)
    for name, opening in zip(FINGERS, OPEN, strict=True):
        qpos[model.joint(name).qposadr] = opening
    for drawn in placement["joints"]:
        value = _uniform(rng, *drawn["range"])
        for name in drawn["joints"]:
            qpos[model.joint(name).qposadr] = value
    sites = _sites(model, qpos) if any(thing["site"] for thing in placement["things"]) else np.zeros((0, 3))
    placed: Placed = {}
    footprints = None
    for thing in placement["things"] if wide is None else _fixed_first(placement["things"], wide):
        if wide is not None and thing["name"] in wide.radii:
            if footprints is None:
                wide.scene.arrange(fixtures, _poses(model, fixtures, qpos, placed), qpos)
                footprints = wide.scene.footprints(wide.boxes)
            placed[thing["name"]] = _put_anywhere(thing, wide, footprints, placed, rng)
            continue
        origin, site = _origin(thing, placed), np.zeros(3)
        if thing["site"]:
            # where the site is before its fixture is moved, which lies at the world's origin until then
            site = matrix(placed[thing["reference"]][1]) @ sites[model.site(thing["site"]).id]
        placed[thing["name"]] = _put(thing, origin, site, placed, rng)
    poses = _poses(model, fixtures, qpos, placed)
    if wide is not None:
        wide.scene.arrange(fixtures, poses, qpos)
        if wide.scene.solved(wide.goal):
            raise _NoRoom
    return np.concatenate([[0.0], qpos, np.zeros(model.nv)]), poses


def _poses(model: mujoco.MjModel, fixtures: Sequence[int], qpos: np.ndarray, placed: Placed) -> np.ndarray:
    """Return the poses [fixtures, 7] of fixtures that have been placed; those of things go into `qpos`."""
    poses = np.concatenate([model.body_pos[list(fixtures)], model.body_quat[list(fixtures)]], axis=1)
    for position, quaternion, thing in placed.values():
        pose = np.concatenate([position, quaternion])
        if thing["joint"] is None:
            poses[list(fixtures).index(model.body(thing["body"]).id)] = pose
        else:
            start = int(model.joint(thing["joint"]).qposadr[0])
            qpos[start : start + 7] = pose
    return poses


def _uniform(rng: np.random.Generator, low: float, high: float) -> float:
    """Draw between two numbers; a region that is smaller than what goes into it has them the wrong way round,
    which the stock sampler takes as well."""
    return low + (high - low) * float(rng.random())


def _sites(model: mujoco.MjModel, qpos: np.ndarray) -> np.ndarray:
    """Return the positions [nsite, 3] of sites where fixtures are as they were compiled."""
    data = mujoco.MjData(model)
    data.qpos[:] = qpos
    mujoco.mj_kinematics(model, data)
    return data.site_xpos.copy()


def _origin(thing: Mapping[str, Any], placed: Placed) -> np.ndarray:
    if thing["reference"] is None:
        return np.array(thing["origin"])
    position, _, reference = placed[thing["reference"]]
    return position + np.array([0.0, 0.0, reference["top"] if thing["stacked"] else 0.0])


def _put(
    thing: Mapping[str, Any], origin: np.ndarray, site: np.ndarray, placed: Placed, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, Mapping[str, Any]]:
    """Find a place for a thing."""
    margin = thing["margin"]
    for _ in range(TRIES):
        x0, x1, y0, y1 = thing["ranges"][int(rng.integers(len(thing["ranges"])))]
        x = _uniform(rng, x0 + margin, x1 - margin) + origin[0] + site[0]
        y = _uniform(rng, y0 + margin, y1 - margin) + origin[1] + site[1]
        z = thing["above"] + origin[2] + site[2] - thing["bottom"]
        position = np.array([x, y, z])
        if not thing["apart"] or all(_clear(position, thing, *other) for other in placed.values()):
            return position, _orientation(thing, rng), thing
    raise _NoRoom


def _fixed_first(things: Sequence[Mapping[str, Any]], wide: Wide) -> list[Mapping[str, Any]]:
    """Sort things: those that have a place, those that lie anywhere, then what lies on another one."""
    return sorted(things, key=lambda thing: 2 if thing["reference"] else int(thing["name"] in wide.radii))


def _put_anywhere(
    thing: Mapping[str, Any], wide: Wide, footprints: np.ndarray, placed: Placed, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, Mapping[str, Any]]:
    """Find a place for a thing anywhere in reach."""
    name, z = thing["name"], thing["above"] + thing["origin"][2] - thing["bottom"]
    near = [
        (where[:2], wide.radii.get(other["name"], other["radius"]))
        for where, _, other in placed.values()
        if other["joint"] is not None
    ]
    for _ in range(TRIES):
        xy = wide.anywhere(rng)
        apart = all(np.linalg.norm(xy - where) > wide.radii[name] + radius + GAP for where, radius in near)
        if apart and wide.admits(name, xy) and wide.clear(name, xy, footprints):
            return np.array([*xy, z]), _orientation(thing, rng), thing
    raise _NoRoom


def _clear(
    position: np.ndarray,
    thing: Mapping[str, Any],
    where: np.ndarray,
    quaternion: np.ndarray,
    other: Mapping[str, Any],
) -> bool:
    """Tell whether a thing is beside another one, or above it."""
    beside = np.linalg.norm(position[:2] - where[:2]) > other["radius"] + thing["radius"]
    return bool(beside or position[2] - where[2] > other["top"] - thing["bottom"])


def _orientation(thing: Mapping[str, Any], rng: np.random.Generator) -> np.ndarray:
    """Draw a quaternion, as it is written into the state, which reads it as (w, x, y, z).

    Most stock samplers compose it as (x, y, z, w), so that things turn another way than is meant; published
    states have that in them.
    """
    quaternion = None
    for axis, *ends in thing["turns"]:
        angle = ends[0] if len(ends) == 1 else _uniform(rng, *ends)
        turn = np.zeros(4)
        turn["xyz".index(axis) + (1 if thing["first"] else 0)] = np.sin(angle / 2)
        turn[0 if thing["first"] else 3] = np.cos(angle / 2)
        quaternion = turn if quaternion is None else _compose(turn, quaternion)
    assert quaternion is not None
    if thing["start"] is not None:
        quaternion = _compose(quaternion, np.array(thing["start"]))
    return quaternion


def _compose(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Multiply two quaternions (x, y, z, w), to the precision of the stock environment: single."""
    x0, y0, z0, w0 = other
    x1, y1, z1, w1 = one
    product = [
        x1 * w0 + y1 * z0 - z1 * y0 + w1 * x0,
        -x1 * z0 + y1 * w0 + z1 * x0 + w1 * y0,
        x1 * y0 - y1 * x0 + z1 * w0 + w1 * z0,
        -x1 * x0 - y1 * y0 - z1 * z0 + w1 * w0,
    ]
    return np.array(product, np.float32).astype(np.float64)
