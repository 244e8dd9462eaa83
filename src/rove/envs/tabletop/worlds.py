"""B physics worlds and what is needed to draw them: the only file that writes into MuJoCo's arrays."""

# pyright: reportAttributeAccessIssue=false
# (MuJoCo's compiled modules have no type stubs)
from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import mujoco
import numpy as np
from mujoco.batch import Batch, SimulationError

from rove.envs.rotations import yaw_of, yaw_quaternion
from rove.envs.tabletop import robot
from rove.envs.tabletop import scene as sc
from rove.envs.tabletop.layout import RGB, Layout, Look, layout
from rove.envs.tabletop.progress import Situation
from rove.envs.tabletop.render import TabletopFrame
from rove.envs.tabletop.tasks import FAMILIES, Thing, parse
from rove.types import EpisodeSpec

RAMPS = 3
"""Steps into which an action's way is divided on the way to the new target."""

HELD_FINGER, HELD_ABOVE = 0.020, 0.013
"""Place of a finger that holds an object, and how far the object's centre is above the fingertips, metres: on
average over what the expert holds."""

LOOK_AT = np.array([0.0, 0.005, 0.02])
CAMERA_DISTANCE, CAMERA_ELEVATION = 1.35, np.deg2rad(56)

BEHIND_THE_CAMERA = (0.0, -5.0, 5.0)

_DIVERGED = [
    int(w)
    for w in (
        mujoco.mjtWarning.mjWARN_BADQPOS,
        mujoco.mjtWarning.mjWARN_BADQVEL,
        mujoco.mjtWarning.mjWARN_BADQACC,
        mujoco.mjtWarning.mjWARN_BADCTRL,
    )
]


@dataclass(frozen=True, slots=True)
class Setup:
    """A layout as rows of MuJoCo's arrays."""

    layout: Layout
    qpos: np.ndarray
    pose: np.ndarray
    """Commanded gripper pose [4]."""
    geom_size: np.ndarray
    geom_quat: np.ndarray
    contact: np.ndarray
    """Geoms that collide, bool [ngeom]: False where one collides with nothing because its slot does not show
    it."""
    body_pos: np.ndarray
    geom_rgba: np.ndarray
    geom_matid: np.ndarray
    cam_xpos: np.ndarray
    cam_xmat: np.ndarray
    light_xdir: np.ndarray
    light_diffuse: np.ndarray
    light_ambient: np.ndarray
    family: int
    half_height: float
    symmetry: float
    destination: np.ndarray
    """Top [3] of the receptacle that the task names; for a stack, overridden by the object's."""
    displaced: np.ndarray
    """Place [2] at which the target reappears in mid-episode; NaN: it does not."""


@functools.lru_cache(maxsize=1024)
def _camera(look: Look) -> tuple[np.ndarray, np.ndarray]:
    """Return world position [3] and orientation [3, 3] (columns: right, up, backwards) of a look's camera."""
    direction = np.array([0.0, -np.cos(CAMERA_ELEVATION), np.sin(CAMERA_ELEVATION)])
    position = LOOK_AT + CAMERA_DISTANCE * direction + np.array(look.camera_shift)
    back = (position - LOOK_AT) / np.linalg.norm(position - LOOK_AT)
    right = np.cross([0.0, 0.0, 1.0], back)
    right /= np.linalg.norm(right)
    up = np.cross(back, right)
    c, s = np.cos(look.camera_roll), np.sin(look.camera_roll)
    return position, np.stack([c * right + s * up, c * up - s * right, back], axis=-1)


def _light_direction(look: Look) -> np.ndarray:
    direction = np.array(look.light_direction)
    return direction / np.linalg.norm(direction)


def background() -> tuple[float, float, float]:
    """Return the colour of the plain table in the usual light.

    It is the same in every pixel, so that it need not be traced: pictures take half the time without.
    """
    look = Look()
    light = np.array(look.light_ambient) - np.array(look.light_diffuse) * _light_direction(look)[2]
    r, g, b = np.minimum(np.array(sc.TABLE_RGB) * light, 1.0).tolist()
    return r, g, b


def _top(receptacle: Thing) -> float:
    return {"plate": sc.PLATE_HEIGHT, "tray": sc.TRAY_FLOOR, "zone": 0.0}[receptacle.kind]


class _Painter:
    """Fills the per-geom rows of one setup, slot by slot."""

    def __init__(self, scene: sc.TabletopScene) -> None:
        model = scene.model
        self.size, self.quat = model.geom_size.copy(), model.geom_quat.copy()
        self.rgba, self.matid = model.geom_rgba.astype(np.float32), model.geom_matid.copy()
        self.contact = np.ones(model.ngeom, bool)
        hidden = np.concatenate(
            [g.ravel() for g in (scene.object_geoms, scene.receptacle_geoms, scene.extra_geoms)]
        )
        self.size[hidden], self.contact[hidden] = sc.HIDDEN, False

    def show(
        self, geom: int, size: tuple[float, float, float], rgb: np.ndarray, contact: bool = True
    ) -> None:
        self.size[geom], self.contact[geom] = size, contact
        self.rgba[geom, :3] = rgb


@functools.lru_cache(maxsize=16384)
def setup(task_id: str, initial_state: int, variant: str) -> Setup:
    """Compute the rows of one initial state; cached, because groups of episodes share it."""
    scene, task = sc.scene(), parse(task_id)
    start = layout(EpisodeSpec(task_id, initial_state, variant))
    paint, model = _Painter(scene), scene.model
    qpos, body_pos = model.qpos0.copy(), model.body_pos.copy()
    shade = np.array(start.look.shade)
    for slot, (thing, xy, yaw) in enumerate(
        zip(start.objects, start.object_xy, start.object_yaw, strict=True)
    ):
        shape = sc.SHAPES[thing.kind]
        qpos[scene.object_qpos[slot]] = [*xy, shape.half_height - sc.REST_DEPTH, *yaw_quaternion(yaw)]
        for name, size in shape.sizes.items():
            geom = scene.object_geoms[slot, sc.OBJECT_GEOMS.index(name)]
            paint.show(geom, size, np.clip(np.array(RGB[thing.color]) * shade, 0.0, 1.0))
            if name == "bar":
                paint.quat[geom] = yaw_quaternion(shape.bar_yaw)
    for slot, (thing, xy) in enumerate(zip(start.receptacles, start.receptacle_xy, strict=True)):
        # A zone's tape is where the walls of a tray are, let down to the table.
        z = sc.TAPE[1] - sc.TRAY_WALL / 2 if thing.kind == "zone" else 0.0
        body_pos[scene.receptacle_bodies[slot]] = [*xy, z]
        for name, size in sc.receptacle_sizes(thing.kind).items():
            geom = scene.receptacle_geoms[slot, sc.RECEPTACLE_GEOMS.index(name)]
            paint.show(geom, size, np.array(RGB[thing.color]), contact=thing.kind != "zone")
    _paint_extras(scene, start, paint, body_pos)
    if start.look.plain_table:
        paint.size[scene.table] = sc.HIDDEN
    elif start.look.table_material:
        paint.matid[scene.table] = model.material(start.look.table_material).id
    qpos[scene.arm_qpos] = robot.inverse(start.start[None], robot.opening(np.ones(1)))[0]
    position, orientation = _camera(start.look)
    target = sc.SHAPES[start.objects[0].kind]
    return Setup(
        layout=start,
        qpos=qpos,
        pose=start.start,
        geom_size=paint.size,
        geom_quat=paint.quat,
        contact=paint.contact,
        body_pos=body_pos,
        geom_rgba=paint.rgba,
        geom_matid=paint.matid,
        cam_xpos=position[None],
        cam_xmat=orientation[None],
        light_xdir=_light_direction(start.look)[None],
        light_diffuse=np.array([start.look.light_diffuse]),
        light_ambient=np.array([start.look.light_ambient]),
        family=FAMILIES.index(task.family),
        half_height=target.half_height,
        symmetry=target.symmetry,
        destination=np.array([*start.receptacle_xy[0], _top(start.receptacles[0])]),
        displaced=np.full(2, np.nan) if start.displaced_xy is None else start.displaced_xy,
    )


def _paint_extras(scene: sc.TabletopScene, start: Layout, paint: _Painter, body_pos: np.ndarray) -> None:
    body_pos[scene.extra_bodies] = [*start.receptacle_xy[0], 0.0]  # out of sight, inside a receptacle
    for slot, (thing, xy) in enumerate(zip(start.extras, start.extra_xy, strict=True)):
        body_pos[scene.extra_bodies[slot]] = [*xy, sc.HALF_HEIGHT]
        for name, size in sc.SHAPES[thing.kind].sizes.items():
            paint.show(scene.extra_geoms[slot, sc.EXTRA_GEOMS.index(name)], size, np.array(RGB[thing.color]))


_LOOK_FIELDS = (
    "geom_size", "geom_rgba", "geom_matid", "cam_xpos", "cam_xmat",
    "light_xdir", "light_diffuse", "light_ambient",
)  # fmt: skip


class TabletopWorlds:
    """B worlds of the tabletop scene; every method takes the rows it is about."""

    def __init__(self, count: int, threads: int) -> None:
        self.scene = sc.scene()
        # Objects that nothing touches sleep, which makes a step about twice as fast; a world needs its own
        # MjData for that.
        self._batch = Batch(self.scene.model, count, nthread=threads, persistent=True)
        expand, bind = self._batch.expand, self._batch.bind
        self._size, self._quat, self._body_pos = expand("geom_size"), expand("geom_quat"), expand("body_pos")
        self._contype, self._conaffinity = expand("geom_contype"), expand("geom_conaffinity")
        self._qpos, self._qvel, self._ctrl = bind("qpos"), bind("qvel"), bind("ctrl")
        self._xpos, self._xmat, self._sensors = bind("geom_xpos"), bind("geom_xmat"), bind("sensordata")
        example = setup("pick/red_cube", 0, "none")
        self._look = {
            name: np.zeros((count, *(row := getattr(example, name)).shape), row.dtype)
            for name in _LOOK_FIELDS
        }
        self.pose = np.zeros((count, 4))
        """Commanded gripper poses."""
        self.open = np.ones(count, bool)
        self._contacts = np.zeros((count, 4), bool)
        self._family = np.zeros(count, np.int64)
        self._half_height, self.symmetry = np.zeros(count), np.zeros(count)
        self._destination = np.zeros((count, 3))
        self._displaced = np.full((count, 2), np.nan)

    def start(self, row: int, episode: EpisodeSpec) -> None:
        """Put one world into the initial state of an episode."""
        self._dress(row, initial := setup(episode.task, episode.initial_state, episode.variant))
        self._batch.reset([row], stage=mujoco.mjtStage.mjSTAGE_NONE.value)
        self._qpos[row] = initial.qpos
        self._ctrl[row] = initial.qpos[self.scene.arm_qpos]
        self.pose[row], self.open[row], self._contacts[row] = initial.pose, True, False

    def _dress(self, row: int, initial: Setup) -> None:
        """Set what follows from a world's episode alone, and never changes in it."""
        model = self.scene.model
        self._size[row], self._quat[row], self._body_pos[row] = (
            initial.geom_size, initial.geom_quat, initial.body_pos
        )  # fmt: skip
        self._contype[row] = np.where(initial.contact, model.geom_contype, 0)
        self._conaffinity[row] = np.where(initial.contact, model.geom_conaffinity, 0)
        for name, rows in self._look.items():
            rows[row] = getattr(initial, name)
        self._family[row], self._half_height[row] = initial.family, initial.half_height
        self.symmetry[row], self._destination[row] = initial.symmetry, initial.destination
        self._displaced[row] = initial.displaced

    def catch_in_the_act(self, row: int, rng: np.random.Generator) -> tuple[int, int] | None:
        """Put the hand where an episode may take it: anywhere in its workspace, over an object, or with one
        between its fingers, mostly over something else, which it then hides in part. To look at, not to go on
        from: nothing is at rest.

        Returns, where something is held over something else, which of the scene's objects, and over which of
        its objects and receptacles, in this order.
        """
        scene, act = self.scene, rng.choice(3, p=(0.25, 0.25, 0.5))
        # The expert turns the hand by up to 0.8 rad, half of what the workspace allows.
        pose = rng.uniform(robot.WORKSPACE_LOW, robot.WORKSPACE_HIGH) * [1, 1, 1, 0.5]
        finger = robot.opening(rng.choice([1.0, -1.0], 1))
        objects = self._qpos[row, scene.object_qpos[:, :2]]
        chosen = int(rng.integers(len(objects)))
        carried = None
        if act == 1:
            pose[:2] = objects[chosen] + rng.normal(0.0, 0.02, 2)
        elif act == 2:
            if rng.random() < 0.7:
                things = np.concatenate([objects, self._body_pos[row, scene.receptacle_bodies, :2]])
                below = int(rng.choice(np.delete(np.arange(len(things)), chosen)))
                pose[:2] = things[below] + rng.normal(0.0, 0.03, 2)
                pose[2] = rng.uniform(0.02, 0.12)
                carried = chosen, below
            finger[:] = HELD_FINGER
            held = scene.object_qpos[chosen]
            self._qpos[row, held] = [*pose[:2], pose[2] + HELD_ABOVE, *yaw_quaternion(pose[3])]
        self.pose[row], self.open[row] = pose, act != 2 and finger[0] > 0
        self._qpos[row, scene.arm_qpos] = robot.inverse(pose[None], finger)[0]
        return carried

    def object_places(self, row: int) -> np.ndarray:
        """Return the centres [OBJECTS, 3] of the objects, metres; the task's target first."""
        return self._qpos[row, self.scene.object_qpos[:, :3]]

    def displace(self, rows: np.ndarray) -> None:
        """Move the target of those worlds whose variant says so, at rest and upright."""
        rows = rows[~np.isnan(self._displaced[rows, 0])]
        where, speed = self.scene.object_qpos[0], self.scene.object_qvel[0]
        self._qpos[rows[:, None], where[:2]] = self._displaced[rows]
        self._qpos[rows, where[2]] = self._half_height[rows] - sc.REST_DEPTH
        self._qpos[rows[:, None], where[4:6]] = 0.0
        self._qvel[rows[:, None], speed] = 0.0

    def act(self, rows: np.ndarray, actions: np.ndarray) -> np.ndarray:
        """Execute one action [n, 5] in each of `rows`; returns where the simulation diverged, bool [n]."""
        before = self.pose[rows]
        after = np.clip(before + actions[:, :4], robot.WORKSPACE_LOW, robot.WORKSPACE_HIGH)
        self.pose[rows], self.open[rows] = after, actions[:, 4] > 0
        opening = robot.opening(actions[:, 4])
        warned = self._warnings(rows)
        bad = np.zeros(len(rows), bool)
        for ramp in range(1, RAMPS + 1):
            way = before + (after - before) * (ramp / RAMPS)
            self._ctrl[rows] = robot.inverse(way, opening)
            try:
                self._batch.step(rows, sc.SUBSTEPS // RAMPS)
            except SimulationError as error:
                bad |= np.isin(rows, error.ids)
        bad |= self._warnings(rows) > warned
        self._contacts[rows] = self._sensors[rows] > 0
        return bad

    def _warnings(self, rows: np.ndarray) -> np.ndarray:
        """Count how often MuJoCo has found a world's numbers bad, and reset it: int [n]."""
        return self._batch.warning[rows][:, _DIVERGED, 1].sum(-1)

    def wake(self, rows: np.ndarray) -> None:
        """Wake what sleeps.

        What sleeps is not part of the state rows. Waking everything at the end of a chunk makes the next
        one a function of the rows alone, so that a run that was saved there goes on bit for bit.
        """
        state = self._batch.state[rows]
        self._batch.reset(rows, stage=mujoco.mjtStage.mjSTAGE_NONE.value)
        self._batch.state[rows] = state

    def situation(self, rows: np.ndarray) -> Situation:
        """Return the privileged state of `rows`."""
        scene, qpos = self.scene, self._qpos[rows]
        destination = self._destination[rows]
        stacked = self._family[rows] == FAMILIES.index("stack")
        base = qpos[:, scene.object_qpos[1, :3]] + np.array([0.0, 0.0, sc.HALF_HEIGHT])
        contacts = self._contacts[rows]
        return Situation(
            family=self._family[rows],
            gripper=robot.forward(qpos[:, scene.arm_qpos]),
            target=qpos[:, scene.object_qpos[0, :3]],
            half_height=self._half_height[rows],
            destination=np.where(stacked[:, None], base, destination),
            touched=contacts[:, :2],
            supported=np.where(stacked, contacts[:, 2], contacts[:, 3]),
            open=self.open[rows],
        )

    def proprioception(self, rows: np.ndarray) -> np.ndarray:
        """Return the gripper's measured x, y, z [m], yaw [rad] and finger opening [m]: float32 [n,
        STATE_DIM]."""
        joints = self._qpos[rows][:, self.scene.arm_qpos]
        return np.column_stack([robot.forward(joints), joints[:, -1]]).astype(np.float32)

    def target_yaw(self, rows: np.ndarray) -> np.ndarray:
        """Return the yaw [n] of the target objects, radians."""
        return yaw_of(self._qpos[rows[:, None], self.scene.object_qpos[0, 3:]])

    def project(self, rows: np.ndarray, places: np.ndarray) -> np.ndarray:
        """Project `places` [n, k, 3] into the cameras of `rows`: right and down, 0 to 1 [n, k, 2]."""
        position, axes = self._look["cam_xpos"][rows], self._look["cam_xmat"][rows]
        seen = np.einsum("nki,nij->nkj", places - position, axes[:, 0])
        focal = 0.5 / np.tan(np.deg2rad(self.scene.model.cam_fovy[0]) / 2)
        return 0.5 + focal * seen[..., :2] / -seen[..., 2:] * [1.0, -1.0]

    def frame(self, rows: np.ndarray) -> TabletopFrame:
        """Return how `rows` look now."""
        self._batch.forward(rows, stage=mujoco.mjtStage.mjSTAGE_POS.value)
        xpos = self._xpos[rows].astype(np.float32)
        xpos[:, self.scene.spot] = robot.forward(self._qpos[rows][:, self.scene.arm_qpos])[:, :3] * [1, 1, 0]
        xmat = self._xmat[rows].reshape(len(rows), -1, 3, 3)
        look = {name: values[rows] for name, values in self._look.items()}
        # Out of every ray's way, which would otherwise look at them one by one.
        xpos[look["geom_size"][..., 0] <= sc.HIDDEN] = BEHIND_THE_CAMERA
        return TabletopFrame(xpos, xmat, **look)

    def state_dict(self) -> dict[str, np.ndarray]:
        """Return the state that the episodes alone do not determine."""
        return {
            "physics": self._batch.state.copy(),
            "pose": self.pose.copy(),
            "open": self.open.copy(),
            "contacts": self._contacts.copy(),
        }

    def load_state_dict(self, state: dict[str, Any], episodes: dict[int, EpisodeSpec]) -> None:
        """Restore the worlds that run `episodes`."""
        for row, episode in episodes.items():
            self._dress(row, setup(episode.task, episode.initial_state, episode.variant))
        self.restore(state)

    def restore(self, state: dict[str, Any]) -> None:
        """Go back to what `state_dict` gave while the same episodes ran."""
        self._batch.reset(stage=mujoco.mjtStage.mjSTAGE_NONE.value)
        self._batch.state[...] = state["physics"]
        self.pose[...], self.open[...], self._contacts[...] = state["pose"], state["open"], state["contacts"]
