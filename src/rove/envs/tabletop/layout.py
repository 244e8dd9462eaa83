"""Initial states: where everything stands, and how it looks, as a function of the episode alone.

Positions are drawn by rejection so that open fingers fit around every object. Objects start exactly at
rest. A variant changes the one thing that it is about; the rest of the scene stays what it is without it,
save where the thing changed has to be known before the scene can be drawn ("unseen_position").
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace

import numpy as np

from rove.envs.tabletop import scene as sc
from rove.envs.tabletop.tasks import (
    OBJECT_COLORS,
    RECEPTACLES,
    TRAINED_OBJECTS,
    VARIANTS,
    Task,
    Thing,
    parse,
    target_of,
)
from rove.types import EpisodeSpec

OBJECT_AREA = np.array([0.175, 0.125])
"""Half extents in x and y of where object centres lie, metres."""
RECEPTACLE_AREA = np.array([0.145, 0.095])
UNSEEN_REGION = (np.array([0.06, 0.02]), OBJECT_AREA)
"""Lower and upper corner of where a target stands in the "unseen_position" variant, and never else."""
MAX_YAW = 0.5
"""Radians, either way."""

START = np.array([0.0, 0.0, 0.14, 0.0])
"""Where the gripper starts: x, y, z [m], yaw [rad]."""
START_SPREAD = np.array([0.03, 0.03, 0.015, 0.1])
PUSH_DISTANCE = (0.115, 0.145)
"""From the object's centre to the zone's, metres."""
BEHIND = 0.065
"""Where a push begins, behind the object's centre."""
DISPLACEMENT = (0.05, 0.08)
"""How far the target is moved in mid-episode, metres."""
DISPLACED_AFTER = 3
"""Executed actions before it is."""

RGB: dict[str, tuple[float, float, float]] = {
    "red": (0.86, 0.10, 0.09),
    "green": (0.10, 0.62, 0.16),
    "blue": (0.10, 0.25, 0.86),
    "yellow": (0.95, 0.83, 0.06),
    "purple": (0.55, 0.13, 0.66),
    "white": (0.97, 0.97, 0.97),
    "black": (0.07, 0.07, 0.08),
    "orange": (0.98, 0.50, 0.08),
    "cyan": (0.15, 0.80, 0.86),
}


@dataclass(frozen=True, slots=True)
class Look:
    """What the vision variants change."""

    camera_shift: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """Of the camera, metres; it still looks at the same point."""
    camera_roll: float = 0.0
    light_direction: tuple[float, float, float] = (-0.25, 0.35, -1.0)
    light_diffuse: tuple[float, float, float] = (0.55, 0.55, 0.55)
    light_ambient: tuple[float, float, float] = (0.50, 0.50, 0.50)
    table_material: str = "plain"
    shade: tuple[float, float, float] = (1.0, 1.0, 1.0)
    """Factor on the colours of the movable objects."""


@dataclass(frozen=True, slots=True)
class Layout:
    """One initial state."""

    objects: tuple[Thing, ...]
    object_xy: np.ndarray
    """[OBJECTS, 2], metres."""
    object_yaw: np.ndarray
    """[OBJECTS], radians."""
    receptacles: tuple[Thing, ...]
    receptacle_xy: np.ndarray
    """[RECEPTACLES, 2]."""
    extras: tuple[Thing, ...]
    extra_xy: np.ndarray
    """[len(extras), 2]."""
    start: np.ndarray
    """[4]: the gripper's x, y, z and yaw."""
    displaced_xy: np.ndarray | None
    """[2]: where the target reappears in mid-episode."""
    look: Look


def _generator(*key: object) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32("|".join(map(str, key)).encode()))


# --- what is in the scene -------------------------------------------------------------------------


def _pick(rng: np.random.Generator, things: list[Thing], count: int) -> list[Thing]:
    return [things[i] for i in rng.permutation(len(things))[:count]]


def _objects(rng: np.random.Generator, task: Task) -> list[Thing]:
    """The target first, then what it is stacked on, then distractors; no colour twice."""
    chosen = [task.target]
    if task.family == "stack":
        assert task.destination is not None
        chosen.append(task.destination)
    taken = {thing.color for thing in chosen}
    for color in rng.permutation([c for c in OBJECT_COLORS if c not in taken])[: sc.OBJECTS - len(chosen)]:
        chosen += _pick(rng, [thing for thing in TRAINED_OBJECTS if thing.color == color], 1)
    return chosen


def _receptacles(rng: np.random.Generator, task: Task) -> list[Thing]:
    """The destination first, then one of its own role, so that its name has to be read, then one of the other."""
    zones = [thing for thing in RECEPTACLES if thing.kind == "zone"]
    vessels = [thing for thing in RECEPTACLES if thing.kind != "zone"]
    if task.family == "push":
        assert task.destination is not None
        return [task.destination, *_pick(rng, [z for z in zones if z != task.destination], 1), *_pick(rng, vessels, 1)]
    if task.family == "put":
        assert task.destination is not None
        return [task.destination, *_pick(rng, [v for v in vessels if v != task.destination], 1), *_pick(rng, zones, 1)]
    return [*_pick(rng, vessels, 2), *_pick(rng, zones, 1)]


# --- where it stands ------------------------------------------------------------------------------

# Smallest distance in x, or else in y, between two kinds of thing: open fingers are 0.12 m wide along x.
_CLEARANCE = {
    ("object", "object"): np.array([0.095, 0.070]),
    ("object", "receptacle"): np.array([0.100, 0.100]),
    ("receptacle", "receptacle"): np.array([0.118, 0.118]),
}
_CANDIDATES = 96


def _clear(candidates: np.ndarray, placed: list[np.ndarray], clearance: np.ndarray) -> np.ndarray:
    """bool [n]: which candidates [n, 2] keep the clearance from everything placed."""
    if not placed:
        return np.ones(len(candidates), bool)
    gap = np.abs(candidates[:, None] - np.stack(placed)[None])
    return (gap >= clearance).any(-1).all(-1)


def _distance_to_segment(points: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    along = np.clip((points - a) @ (b - a) / ((b - a) @ (b - a)), 0.0, 1.0)
    return np.linalg.norm(points - (a + along[:, None] * (b - a)), axis=-1)


def _in_unseen_region(points: np.ndarray) -> np.ndarray:
    low, high = UNSEEN_REGION
    return ((points >= low) & (points <= high)).all(-1)


def _target_candidates(rng: np.random.Generator, unseen: bool, count: int) -> np.ndarray:
    if unseen:
        return rng.uniform(*UNSEEN_REGION, size=(count, 2))
    points = rng.uniform(-OBJECT_AREA, OBJECT_AREA, size=(count, 2))
    return points[~_in_unseen_region(points)]


def _push_start(rng: np.random.Generator, unseen: bool) -> tuple[np.ndarray, np.ndarray] | None:
    """Target and zone of a push, with room for the fist behind the target."""
    target = _target_candidates(rng, unseen, _CANDIDATES)
    angle = rng.uniform(-np.pi, np.pi, len(target))
    direction = np.stack([np.cos(angle), np.sin(angle)], -1)
    zone = target + rng.uniform(*PUSH_DISTANCE, size=(len(target), 1)) * direction
    behind = target - BEHIND * direction
    fits = (np.abs(zone) <= RECEPTACLE_AREA).all(-1) & (np.abs(behind) <= OBJECT_AREA + 0.01).all(-1)
    if not fits.any():
        return None
    first = int(fits.argmax())
    return target[first], zone[first]


def _place(rng: np.random.Generator, task: Task, unseen: bool) -> tuple[np.ndarray, np.ndarray] | None:
    """One attempt at positions, [OBJECTS, 2] and [RECEPTACLES, 2]; None where something found no room."""
    objects: list[np.ndarray] = []
    receptacles: list[np.ndarray] = []
    lane: tuple[np.ndarray, np.ndarray] | None = None
    if task.family == "push":
        pair = _push_start(rng, unseen)
        if pair is None:
            return None
        target, zone = pair
        objects, receptacles = [target], [zone]
        lane = target + BEHIND * (target - zone) / np.linalg.norm(target - zone), zone
    else:
        objects = [_target_candidates(rng, unseen, _CANDIDATES)[0]]
    for kind, placed, total in (("receptacle", receptacles, sc.RECEPTACLES), ("object", objects, sc.OBJECTS)):
        area = OBJECT_AREA if kind == "object" else RECEPTACLE_AREA
        while len(placed) < total:
            points = rng.uniform(-area, area, size=(_CANDIDATES, 2))
            free = _clear(points, objects, _CLEARANCE["object", kind])
            free &= _clear(points, receptacles, _CLEARANCE[kind, "receptacle"])
            if lane is not None:
                free &= _distance_to_segment(points, *lane) >= (0.07 if kind == "object" else 0.1)
            if not free.any():
                return None
            placed.append(points[free.argmax()])
    return np.stack(objects), np.stack(receptacles)


_CLEARANCE["receptacle", "object"] = _CLEARANCE["object", "receptacle"]


def _free_spots(
    rng: np.random.Generator, objects: np.ndarray, receptacles: np.ndarray, points: np.ndarray
) -> np.ndarray:
    free = _clear(points, list(objects), _CLEARANCE["object", "object"])
    return points[free & _clear(points, list(receptacles), _CLEARANCE["object", "receptacle"])]


# --- variants -------------------------------------------------------------------------------------


def _look(rng: np.random.Generator, variant: str) -> Look:
    def triple(low: float, high: float) -> tuple[float, float, float]:
        x, y, z = rng.uniform(low, high, 3).tolist()
        return x, y, z

    if variant == "camera_jitter":
        return Look(camera_shift=triple(-0.05, 0.05), camera_roll=float(rng.uniform(-0.05, 0.05)))
    if variant == "light":
        x, y, _ = triple(-0.8, 0.8)
        warm = float(rng.uniform(-0.12, 0.12))
        level = float(rng.uniform(0.28, 0.45))
        tint = (1 + warm, 1.0, 1 - warm)
        r, g, b = (level * t for t in tint)
        return Look(light_direction=(x, y, -1.0), light_ambient=(r, g, b), light_diffuse=(r, g, b))
    if variant == "object_shade":
        shade = rng.uniform(0.6, 0.85) * rng.uniform(0.85, 1.15, 3)
        return Look(shade=(float(shade[0]), float(shade[1]), float(shade[2])))
    if variant == "table_texture":
        return Look(table_material=("checker", "stripes")[int(rng.integers(2))])
    return Look()


def _displaced(rng: np.random.Generator, task: Task, base: Layout) -> np.ndarray:
    """A free spot near the target; in a push, one on its lane's line backwards or sideways."""
    target = base.object_xy[0]
    angle = rng.uniform(-np.pi, np.pi, 512)
    offset = rng.uniform(*DISPLACEMENT, size=(512, 1)) * np.stack([np.cos(angle), np.sin(angle)], -1)
    points = target + offset
    points = points[(np.abs(points) <= OBJECT_AREA).all(-1)]
    if task.family == "push":
        zone = base.receptacle_xy[0]
        points = points[np.linalg.norm(points - zone, axis=-1) >= PUSH_DISTANCE[0]]
        lanes = [_lane_is_clear(point, base) for point in points]
        points = points[np.array(lanes, bool)]
    spots = _free_spots(rng, base.object_xy[1:], base.receptacle_xy, points)
    return spots[0] if len(spots) else target


def _lane_is_clear(target: np.ndarray, base: Layout) -> bool:
    zone = base.receptacle_xy[0]
    behind = target + BEHIND * (target - zone) / np.linalg.norm(target - zone)
    return bool(
        (np.abs(behind) <= OBJECT_AREA + 0.01).all()
        and (_distance_to_segment(base.object_xy[1:], behind, zone) >= 0.065).all()
        and (_distance_to_segment(base.receptacle_xy[1:], behind, zone) >= 0.095).all()
    )


def _extras(rng: np.random.Generator, task: Task, base: Layout) -> tuple[tuple[Thing, ...], np.ndarray]:
    """Up to EXTRAS further objects, fixed, of colours that no task object of the scene has."""
    named = {task.target.color, task.destination.color if task.destination else ""}
    kinds = [thing for thing in TRAINED_OBJECTS if thing.color not in named and thing.kind != "brick"]
    xy: list[np.ndarray] = []
    for _ in range(sc.EXTRAS):
        points = rng.uniform(-OBJECT_AREA, OBJECT_AREA, size=(1024, 2))
        if task.family == "push":
            zone, target = base.receptacle_xy[0], base.object_xy[0]
            behind = target + BEHIND * (target - zone) / np.linalg.norm(target - zone)
            points = points[_distance_to_segment(points, behind, zone) >= 0.07]
        placed = np.concatenate([base.object_xy, np.array(xy).reshape(-1, 2)])
        spots = _free_spots(rng, placed, base.receptacle_xy, points)
        if not len(spots):
            break
        xy.append(spots[0])
    return tuple(_pick(rng, kinds, len(xy))), np.array(xy).reshape(-1, 2)


def layout(episode: EpisodeSpec) -> Layout:
    """The initial state of an episode, a function of its task, initial state and variant."""
    task, variant = parse(episode.task), episode.variant
    assert variant == "none" or variant in VARIANTS
    unseen = variant == "unseen_position"
    rng = _generator(episode.task, episode.initial_state, "unseen_position" if unseen else "layout")
    objects, receptacles = _objects(rng, task), _receptacles(rng, task)
    placed = None
    while placed is None:
        placed = _place(rng, task, unseen)
    base = Layout(
        objects=(target_of(episode), *objects[1:]),
        object_xy=placed[0],
        object_yaw=rng.uniform(-MAX_YAW, MAX_YAW, sc.OBJECTS),
        receptacles=tuple(receptacles),
        receptacle_xy=placed[1],
        extras=(),
        extra_xy=np.zeros((0, 2)),
        start=START + rng.uniform(-START_SPREAD, START_SPREAD),
        displaced_xy=None,
        look=Look(),
    )
    shift = _generator(episode.task, episode.initial_state, variant)
    if variant == "unseen_start":
        corner = shift.choice([-1.0, 1.0], 2) * shift.uniform([0.10, 0.06], [0.15, 0.10])
        start = np.array([*corner, shift.uniform(0.10, 0.18), shift.uniform(-0.4, 0.4)])
        return replace(base, start=start)
    if variant == "displaced":
        return replace(base, displaced_xy=_displaced(shift, task, base))
    if variant == "distractors":
        extras, xy = _extras(shift, task, base)
        return replace(base, extras=extras, extra_xy=xy)
    return replace(base, look=_look(shift, variant))
