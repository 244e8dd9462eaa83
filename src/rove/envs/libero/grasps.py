"""Grasps of a thing, from the shape that MuJoCo collides it by."""

# pyright: reportAttributeAccessIssue=false
from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import mujoco
import numpy as np

from rove.envs.libero.controller import HAND
from rove.envs.rotations import matrix

WIDEST = 0.080
"""Metres between the open fingers."""
OPENING = 0.066
"""Metres across the widest thing that they go around with room to spare."""
DEPTH = 0.040
"""Metres below its top at which a tall thing is held at least as high: the palm would press on it."""
RIM_DEPTH, BOWL_DEPTH = 0.022, 0.032
"""Metres below its edge at which the wall of a hollow thing is held, and of one that is wider than high, a
bowl, whose wall leans out of the fingers."""
GROUND = 0.012
"""Metres over what the thing stands on: closer, and the fingertips would touch that."""
NEAR, NEAREST = 0.014, 0.004
"""Metres over its grasp at which a hand closes at the earliest, of what rises far above that, and of what is
flat: fingers that close over its top hold nothing."""
ASIDE = 0.006
"""Metres that an open finger keeps off a thing that is held beside the fingers' middle."""
END = 0.012
"""Metres from the end of a thing at which it is held at the outermost."""
MARGIN = 0.008
"""Metres that the hand should keep off other things."""
SLAB = 0.010
"""Metres below the top of a hollow thing within which its points are its edge."""
ANGLES = np.deg2rad([0, 180, 30, -30, 150, -150, 60, -60, 120, -120, 90, -90])
"""Places on an edge to try, from the direction in which the fingers open to begin with."""
APART = 0.25
"""Radians by which the turns of two grasps with a finger on either side differ at least."""
UPRIGHT = np.cos(np.deg2rad(20))
"""Cosine of the angle from which on a hollow thing leans: its edge is then not all within `SLAB` of the
top."""
RAISED = np.deg2rad([0, 30, -30, 60])
"""Places on the edge of what leans to try, from the highest on."""


UP = np.array([0.0, 0.0, 1.0])


@dataclass(frozen=True, slots=True)
class Hold:
    """Pose of the hand at what it is about to hold or push."""

    point: np.ndarray
    """Point [3] between the fingertips, in the frame of the body that is held, metres."""
    rotation: np.ndarray
    """Rotation [3, 3] of the grip site in the world."""
    back: np.ndarray = field(default_factory=UP.copy)
    """Unit vector [3] in the world, along which the hand comes and leaves."""
    pushes: bool = False
    """The fingers are shut, and push."""


@dataclass(frozen=True, slots=True)
class Grasp:
    """Pose of the hand, fingers pointing down."""

    point: np.ndarray
    """Point [3] between the fingertips, from the thing's position, along the world's axes, metres."""
    yaw: float
    """Turn about the vertical, radians, from the hand's orientation after a reset, when the fingers open
    along y."""
    way: int
    """Which of the ways that there are to hold such a thing it is, wherever the thing lies."""

    def hold(self, frame: np.ndarray, home: np.ndarray) -> Hold:
        """Return it for a body with this rotation [3, 3], and the grip site's rotation `home` [3, 3] after a
        reset."""
        cos, sin = np.cos(self.yaw), np.sin(self.yaw)
        return Hold(self.point @ frame, np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]]) @ home)


def shape(model: mujoco.MjModel, body: int) -> np.ndarray:
    """Return the corners [n, 3] of all that collides of a body and those on it, in its frame, metres."""
    data = mujoco.MjData(model)
    mujoco.mj_kinematics(model, data)
    points = []
    for geom in range(model.ngeom):
        owner = model.geom_bodyid[geom]
        while owner not in (0, body):
            owner = model.body_parentid[owner]
        if owner == body and (model.geom_contype[geom] or model.geom_conaffinity[geom]):
            corners = _corners(model, geom) @ data.geom_xmat[geom].reshape(3, 3).T + data.geom_xpos[geom]
            points.append((corners - data.xpos[body]) @ data.xmat[body].reshape(3, 3))
    return np.concatenate(points)


def _corners(model: mujoco.MjModel, geom: int) -> np.ndarray:
    """Return the vertices of a mesh, or the box around any other geom, in the geom's frame."""
    if model.geom_type[geom] == mujoco.mjtGeom.mjGEOM_MESH:
        mesh = model.geom_dataid[geom]
        first = model.mesh_vertadr[mesh]
        return model.mesh_vert[first : first + model.mesh_vertnum[mesh]]
    middle, half = model.geom_aabb[geom, :3], model.geom_aabb[geom, 3:]
    return middle + half * np.array(list(itertools.product((-1, 1), repeat=3)))


def grasps(points: np.ndarray, up: np.ndarray = UP, off_centre: bool = False) -> list[Grasp]:
    """List ways to hold what has these corners [n, 3], along the world's axes from the thing's position; best
    first. A hollow thing opens towards `up` [3], a unit vector. Off-centre ways are those that also hold a
    narrow thing nearer to one finger than to the other, or nearer to one of its ends."""
    across = _across(points)
    if off_centre:
        across = [shifted for grasp in across for shifted in _shifted(points, grasp)]
    return across or [*_raised(points, up), *_edge(points)]


def around(points: np.ndarray, point: np.ndarray) -> float:
    """Return how far over its grasp a hand may close, metres, for a thing with corners [n, 3] that is held at
    `point` [3], in the same frame: the fingers have to be around it."""
    return float(np.clip(points[:, 2].max() - point[2] - NEAREST, NEAREST, NEAR))


def _across(points: np.ndarray) -> list[Grasp]:
    """List grasps with a finger on either side, where the thing is narrow enough."""
    low, high = points[:, 2].min(), points[:, 2].max()
    z = max((low + high) / 2, high - DEPTH, low + GROUND)
    found = []
    for yaw in np.deg2rad(np.arange(-90, 90, 5)):
        along = np.array([-np.sin(yaw), np.cos(yaw)])
        beside = np.array([np.cos(yaw), np.sin(yaw)])
        width = np.ptp(points[:, :2] @ along)
        if width < OPENING:
            extents = [points[:, :2] @ axis for axis in (along, beside)]
            along_at, beside_at = ((extent.min() + extent.max()) / 2 for extent in extents)
            xy = along_at * along + beside_at * beside
            # a hand that need not turn is worth a few millimetres
            found.append((width + 0.008 * abs(yaw), np.array([*xy, z]), float(yaw)))
    found.sort(key=lambda one: one[0])
    apart: list[Grasp] = []
    for _, point, yaw in found:
        if all(abs(yaw - other.yaw) > APART for other in apart):
            apart.append(Grasp(point, yaw, len(apart)))
    return apart


def _shifted(points: np.ndarray, grasp: Grasp) -> list[Grasp]:
    """List a grasp with a finger on either side, and others with the same turn as far off the middle as there
    is room between the fingers, and along the thing."""
    cos, sin = np.cos(grasp.yaw), np.sin(grasp.yaw)
    across, along = np.array([-sin, cos, 0.0]), np.array([cos, sin, 0.0])
    between = max(0.0, (WIDEST - np.ptp(points @ across)) / 2 - ASIDE)
    lengthwise = max(0.0, np.ptp(points @ along) / 2 - END)
    return [
        Grasp(
            grasp.point + step * between * across + part * lengthwise * along,
            grasp.yaw,
            9 * grasp.way + place,
        )
        for place, (step, part) in enumerate(itertools.product((0, -1, 1), repeat=2))
    ]


def _edge(points: np.ndarray) -> list[Grasp]:
    """List grasps of what is hollow, with one finger inside."""
    low, high = points[:, 2].min(), points[:, 2].max()
    edge = points[points[:, 2] > high - SLAB][:, :2]
    middle = (edge.min(0) + edge.max(0)) / 2
    offset = edge - middle
    radius, angle = np.linalg.norm(offset, axis=1), np.arctan2(offset[:, 1], offset[:, 0])
    depth = BOWL_DEPTH if np.ptp(points[:, :2], axis=0).min() > high - low else RIM_DEPTH
    found = []
    for way, turn in enumerate(ANGLES):
        at = np.pi / 2 + turn
        close = np.abs((angle - at + np.pi) % (2 * np.pi) - np.pi) < 0.4
        if close.any():
            xy = middle + radius[close].max() * np.array([np.cos(at), np.sin(at)])
            z = max(high - depth, low + GROUND)
            found.append(Grasp(np.array([*xy, z]), _either_way(turn), way))
    return found


def _raised(points: np.ndarray, up: np.ndarray) -> list[Grasp]:
    """List grasps of what is hollow and leans to one side: by the raised half of its edge, the top first."""
    if not 0.0 < up[2] < UPRIGHT:
        return []
    height = points @ up
    edge = points[height > height.max() - SLAB]
    middle = (edge.min(0) + edge.max(0)) / 2
    level = np.cross(up, UP)
    level /= np.linalg.norm(level)
    found = []
    for way, angle in enumerate(RAISED, start=len(ANGLES)):
        out = np.cos(angle) * np.cross(level, up) + np.sin(angle) * level
        x, y, top = middle + ((edge - middle) @ out).max() * out
        z = max(top - BOWL_DEPTH, points[:, 2].min() + GROUND)
        found.append(Grasp(np.array([x, y, z]), _either_way(np.arctan2(-out[0], out[1])), way))
    return found


def _either_way(yaw: float) -> float:
    """Return the turn, a quarter at most, that brings the fingers to the same places: either may be the one
    inside."""
    return float((yaw + np.pi / 2) % np.pi - np.pi / 2)


class Obstacles:
    """Everything of a model that collides, but for the robot and one thing: oriented boxes."""

    def __init__(self, model: mujoco.MjModel, thing: int) -> None:
        robot = model.body_rootid[model.body(HAND).id]
        roots = model.body_rootid[model.geom_bodyid]
        solid = (model.geom_contype | model.geom_conaffinity) != 0
        # what is flat or endless is the floor, which fingers are kept off already
        solid &= (roots != robot) & (roots != thing) & (model.geom_type != mujoco.mjtGeom.mjGEOM_PLANE)
        geoms = np.flatnonzero(solid)
        self._bodies = model.geom_bodyid[geoms]
        self._rotation = matrix(model.geom_quat[geoms])
        self._half = model.geom_aabb[geoms, 3:]
        middle = model.geom_aabb[geoms, :3]
        self._position = model.geom_pos[geoms] + (self._rotation @ middle[..., None])[..., 0]

    def hits(self, grasp: Grasp, origin: np.ndarray, xpos: np.ndarray, xmat: np.ndarray) -> int:
        """Count the points of the open hand around a thing at `origin` [3] that would be in a box, or nearly,
        with bodies at `xpos` [n, 3] and `xmat` [n, 9]."""
        cos, sin = np.cos(grasp.yaw), np.sin(grasp.yaw)
        hand = _HAND @ np.array([[cos, sin, 0], [-sin, cos, 0], [0, 0, 1]]) + grasp.point + origin
        body = xmat[self._bodies].reshape(-1, 3, 3)
        middle = xpos[self._bodies] + (body @ self._position[..., None])[..., 0]
        axes = body @ self._rotation
        # beside it: what the fingertips come down to is kept off by `GROUND`
        margin = MARGIN * np.linalg.norm(axes[:, :2], axis=1)
        inside = np.abs((hand - middle[:, None]) @ axes) < (self._half + margin)[:, None]
        return int(inside.all(-1).any(0).sum())


def _hand() -> np.ndarray:
    """Return points [n, 3] of the open fingers, the palm and the wrist, from between the fingertips, metres;
    fingers open along y."""
    fingers = itertools.product(
        (-0.018, 0.0, 0.018), (-0.065, -0.055, -0.044, 0.044, 0.055, 0.065), (0.0, 0.015, 0.03, 0.05)
    )
    palm = itertools.product((-0.03, 0.0, 0.03), np.linspace(-0.1, 0.1, 9), (0.03, 0.05, 0.07, 0.1))
    wrist = itertools.product((-0.05, 0.0, 0.05), (-0.05, 0.0, 0.05), (0.13, 0.17, 0.21))
    return np.array([*fingers, *palm, *wrist])


_HAND = _hand()
