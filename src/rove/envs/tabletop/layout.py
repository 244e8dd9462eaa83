"""Initial states: where everything stands, and how it looks, as a function of the episode alone.

Positions are drawn by rejection so that open fingers fit around every object. Objects start exactly at
rest. A variant changes the one thing that it is about; the rest of the scene stays what it is without it,
save where the thing changed has to be known before the scene can be drawn ("unseen_position").
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np

from rove.envs.tabletop import scene as sc
from rove.envs.tabletop.tasks import (
    OBJECT_COLORS,
    RECEPTACLES,
    TRAINED_OBJECTS,
    TabletopTask,
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
"""Largest turn of an object either way, radians."""

START = np.array([0.0, 0.0, 0.14, 0.0])
"""Pose in which the gripper starts: x, y, z [m], yaw [rad]."""
START_SPREAD = np.array([0.03, 0.03, 0.015, 0.1])
PUSH_DISTANCE = (0.115, 0.145)
"""Distances from the object's centre to the zone's, metres."""
BEHIND = 0.065
"""Distance behind the object's centre at which a push begins."""
DISPLACEMENT = (0.085, 0.18)
"""Metres that the target is moved in mid-episode: out of reach of the fingers that are around it."""
DISPLACED_AFTER = 2
"""Executed actions before the target is moved in mid-episode."""
ARRANGING_VARIANTS = ("unseen_position", "distractors", "displaced")
"""Variants that have to be known before the scene is drawn; the others leave everything in its place."""

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
    """Changes that the vision variants make."""

    camera_shift: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """Displacement of the camera, metres; it still looks at the same point."""
    camera_roll: float = 0.0
    light_direction: tuple[float, float, float] = (-0.25, 0.35, -1.0)
    light_diffuse: tuple[float, float, float] = (0.55, 0.55, 0.55)
    light_ambient: tuple[float, float, float] = (0.50, 0.50, 0.50)
    table_material: str | None = None
    shade: tuple[float, float, float] = (1.0, 1.0, 1.0)
    """Factor on the colours of the movable objects."""

    @property
    def plain_table(self) -> bool:
        """The table looks as it usually does."""
        usual = Look(camera_shift=self.camera_shift, camera_roll=self.camera_roll, shade=self.shade)
        return self == usual


@dataclass(frozen=True, slots=True)
class Layout:
    """One initial state of a scene."""

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
    """Place [2] at which the target reappears in mid-episode."""
    look: Look


# --- what is in the scene -------------------------------------------------------------------------


def _pick(rng: np.random.Generator, things: list[Thing], count: int) -> list[Thing]:
    return [things[i] for i in rng.permutation(len(things))[:count]]


def _objects(rng: np.random.Generator, task: TabletopTask) -> list[Thing]:
    """Draw the objects: the target first, then what it is stacked on, then distractors; no colour twice."""
    chosen = [task.target]
    if task.family == "stack":
        assert task.destination is not None
        chosen.append(task.destination)
    taken = {thing.color for thing in chosen}
    for color in rng.permutation([c for c in OBJECT_COLORS if c not in taken])[: sc.OBJECTS - len(chosen)]:
        chosen += _pick(rng, [thing for thing in TRAINED_OBJECTS if thing.color == color], 1)
    return chosen


def _receptacles(rng: np.random.Generator, task: TabletopTask) -> list[Thing]:
    """Draw the receptacles: the destination first, then one of its role, so that its name has to be read,
    then one of the other."""
    zones = [thing for thing in RECEPTACLES if thing.kind == "zone"]
    vessels = [thing for thing in RECEPTACLES if thing.kind != "zone"]
    if task.family == "push":
        assert task.destination is not None
        return [
            task.destination,
            *_pick(rng, [z for z in zones if z != task.destination], 1),
            *_pick(rng, vessels, 1),
        ]
    if task.family == "put":
        assert task.destination is not None
        return [
            task.destination,
            *_pick(rng, [v for v in vessels if v != task.destination], 1),
            *_pick(rng, zones, 1),
        ]
    return [*_pick(rng, vessels, 2), *_pick(rng, zones, 1)]


# --- where it stands ------------------------------------------------------------------------------

# Smallest distance in x, or else in y: open fingers are 0.12 m wide along x. Both axes: receptacle, object.
_GAP = np.array([[[0.118, 0.118], [0.100, 0.100]], [[0.100, 0.100], [0.095, 0.070]]])
_LANE_GAP = (0.10, 0.07)
"""Metres that a receptacle and an object keep from the way of a push."""
_CANDIDATES = 64
_MOST = sc.OBJECTS + sc.RECEPTACLES + max(sc.EXTRAS, 1)


class _NoRoom(Exception):
    """This attempt at a scene has come to nothing."""


class _Table:
    """Takes things one by one, each clear of those before and of the ways that pushes take."""

    def __init__(self, rng: np.random.Generator) -> None:
        self._rng = rng
        self._xy = np.zeros((_MOST, 2))
        self._object = np.zeros(_MOST, int)
        self._count = 0
        self._lanes: list[tuple[np.ndarray, np.ndarray]] = []

    def put(self, xy: np.ndarray, is_object: bool) -> np.ndarray:
        """Stand something there, come what may."""
        self._xy[self._count], self._object[self._count] = xy, is_object
        self._count += 1
        return xy

    def find(self, candidates: np.ndarray, is_object: bool) -> np.ndarray:
        """Stand something on the first candidate [n, 2] that is clear."""
        n, kind = self._count, int(is_object)
        apart = np.abs(candidates[:, None] - self._xy[:n]) >= _GAP[kind, self._object[:n]]
        free = (apart[..., 0] | apart[..., 1]).all(-1)
        for lane in self._lanes:
            free &= _distance_to_segment(candidates, *lane) >= _LANE_GAP[kind]
        if not free.any():
            raise _NoRoom
        return self.put(candidates[free.argmax()], is_object)

    def find_anywhere(self, is_object: bool) -> np.ndarray:
        """Stand something where it is clear."""
        area = OBJECT_AREA if is_object else RECEPTACLE_AREA
        return self.find(self._rng.uniform(-1.0, 1.0, size=(_CANDIDATES, 2)) * area, is_object)

    def keep_clear(self, target: np.ndarray, zone: np.ndarray) -> None:
        """Leave free what a push from `target` to `zone` needs."""
        self._lanes.append((_behind(target, zone), zone))


def _behind(target: np.ndarray, zone: np.ndarray) -> np.ndarray:
    """Return the place from which the fist of a push starts."""
    away = target - zone
    return target + BEHIND * away / np.linalg.norm(away, axis=-1, keepdims=True)


def _distance_to_segment(points: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    along = np.clip((points - a) @ (b - a) / ((b - a) @ (b - a)), 0.0, 1.0)
    return np.linalg.norm(points - (a + along[:, None] * (b - a)), axis=-1)


def _target_candidates(rng: np.random.Generator, unseen: bool) -> np.ndarray:
    low, high = UNSEEN_REGION
    if unseen:
        return rng.uniform(low, high, size=(_CANDIDATES, 2))
    points = rng.uniform(-OBJECT_AREA, OBJECT_AREA, size=(_CANDIDATES, 2))
    within = (points >= low) & (points <= high)
    return points[~(within[:, 0] & within[:, 1])]


def _around(
    rng: np.random.Generator, centre: np.ndarray, distance: tuple[float, float], count: int
) -> np.ndarray:
    """Draw points [count, 2] at a distance from the centre, [2] or [count, 2]."""
    angle = rng.uniform(-np.pi, np.pi, count)
    return centre + rng.uniform(*distance, size=(count, 1)) * np.stack([np.cos(angle), np.sin(angle)], -1)


def _pushable(target: np.ndarray, zone: np.ndarray) -> np.ndarray:
    """Tell where a zone [n, 2] fits, and the fist behind the target [n, 2] does too, bool [n]."""
    fits = np.abs(zone) <= RECEPTACLE_AREA
    reachable = np.abs(_behind(target, zone)) <= OBJECT_AREA + 0.01
    possible = fits & reachable
    return possible[:, 0] & possible[:, 1]


def _find_target(
    rng: np.random.Generator, table: _Table, task: TabletopTask, variant: str
) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
    """Place the target, the zone of a push, and where the target is moved in mid-episode."""
    candidates = _target_candidates(rng, variant == "unseen_position")
    if task.family != "push":
        target = table.put(candidates[0], True)
        if variant != "displaced":
            return target, None, None
        spots = _around(rng, target, DISPLACEMENT, 4 * _CANDIDATES)
        return target, None, table.find(spots[(np.abs(spots) <= OBJECT_AREA).all(-1)], True)
    zones = _around(rng, candidates, PUSH_DISTANCE, len(candidates))
    possible = np.flatnonzero(_pushable(candidates, zones))
    if not len(possible):
        raise _NoRoom
    target, zone = candidates[possible[0]], zones[possible[0]]
    table.put(target, True)
    table.put(zone, False)
    table.keep_clear(target, zone)
    if variant != "displaced":
        return target, zone, None
    spots = _around(rng, zone, PUSH_DISTANCE, 4 * _CANDIDATES)
    far = np.linalg.norm(spots[:, None] - [target, _behind(target, zone)], axis=-1) >= DISPLACEMENT[0]
    spots = spots[_pushable(spots, np.broadcast_to(zone, spots.shape)) & far.all(-1)]
    spot = table.find(spots, True)
    table.keep_clear(spot, zone)
    return target, zone, spot


def _arrange(
    rng: np.random.Generator, task: TabletopTask, variant: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]:
    """Attempt to find positions: objects, receptacles, extras, each [k, 2], and the displaced target's."""
    table = _Table(rng)
    target, zone, spot = _find_target(rng, table, task, variant)
    receptacles = [] if zone is None else [zone]
    receptacles += [table.find_anywhere(False) for _ in range(sc.RECEPTACLES - len(receptacles))]
    objects = [target, *(table.find_anywhere(True) for _ in range(sc.OBJECTS - 1))]
    extras = [table.find_anywhere(True) for _ in range(sc.EXTRAS if variant == "distractors" else 0)]
    return np.array(objects), np.array(receptacles), np.array(extras).reshape(-1, 2), spot


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
        return Look(table_material=("checker", "blotches")[int(rng.integers(2))])
    return Look()


def _extras(rng: np.random.Generator, task: TabletopTask) -> tuple[Thing, ...]:
    """Further objects of colours that no object named in the instruction has."""
    named = {task.target.color, task.destination.color if task.destination else ""}
    return tuple(
        _pick(rng, [t for t in TRAINED_OBJECTS if t.color not in named and t.kind != "brick"], sc.EXTRAS)
    )


def layout(episode: EpisodeSpec) -> Layout:
    """The initial state of an episode, a function of its task, initial state and variant."""
    task, variant = parse(episode.task), episode.variant
    key = variant if variant in ARRANGING_VARIANTS else "none"
    rng = np.random.default_rng(zlib.crc32(f"{episode.task}|{episode.initial_state}|{key}".encode()))
    objects, receptacles = _objects(rng, task), _receptacles(rng, task)
    while True:
        try:
            object_xy, receptacle_xy, extra_xy, spot = _arrange(rng, task, variant)
            break
        except _NoRoom:
            continue
    yaw = rng.uniform(-MAX_YAW, MAX_YAW, sc.OBJECTS)
    start = START + rng.uniform(-START_SPREAD, START_SPREAD)
    if variant == "unseen_start":
        corner = rng.choice([-1.0, 1.0], 2) * rng.uniform([0.10, 0.06], [0.15, 0.10])
        start = np.array([*corner, rng.uniform(0.10, 0.18), rng.uniform(-0.4, 0.4)])
    return Layout(
        objects=(target_of(episode), *objects[1:]),
        object_xy=object_xy,
        object_yaw=yaw,
        receptacles=tuple(receptacles),
        receptacle_xy=receptacle_xy,
        extras=_extras(rng, task) if variant == "distractors" else (),
        extra_xy=extra_xy,
        start=start,
        displaced_xy=spot,
        look=_look(rng, variant),
    )
