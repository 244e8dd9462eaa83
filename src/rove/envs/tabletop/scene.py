"""The one MuJoCo model of the suite: arm, table, object slots, receptacle slots. Compiled once.

Every world runs the same model. What differs between worlds (which shape a slot shows, how large, which
colour) is per-world fields: `geom_size` and the contact bits switch a slot's shapes on and off, so that no
scene is ever rebuilt. Lengths are metres; x points right, y away from the camera, z up; z = 0 is the table.
"""

# pyright: reportAttributeAccessIssue=false
# (MuJoCo's compiled modules have no type stubs)
from __future__ import annotations

import functools
from dataclasses import dataclass

import mujoco
import numpy as np

# --- sizes ----------------------------------------------------------------------------------------

OBJECTS = 4
"""Movable objects in every scene; slot 0 is the episode's target, slot 1 what it is stacked on."""
RECEPTACLES = 3
"""Plates, trays and zones in every scene; slot 0 is the episode's destination."""
EXTRAS = 2
"""Fixed further distractors, shown by the "distractors" variant only."""

TABLE_RGB = (0.74, 0.73, 0.70)
REACH = (0.30, 0.25)
"""Half extents in x and y of the part of the table from which an object can still be brought back."""
HALF_HEIGHT = 0.023
"""Half height of every object but the capsule, metres."""
PLATE_RADIUS, PLATE_HEIGHT = 0.056, 0.008
TRAY_HALF, TRAY_FLOOR, TRAY_WALL = 0.056, 0.004, 0.016
ZONE_HALF = 0.056
TAPE = (0.007, 0.0006)
"""Half width and half thickness of the tape that frames a zone. A filled zone and a tray of one colour look
alike at 64 pixels."""

BASE = (0.0, 0.40)
"""Place of the shoulder, beyond the far edge of the workspace."""
UPPER_ARM, FOREARM, ARM_HEIGHT = 0.34, 0.32, 0.46
FINGER_TRAVEL = 0.048
"""Travel of each finger: the gripper opens to twice this."""
FINGER = (0.006, 0.013, 0.032)
"""Half extents of a finger, metres: thickness, width, height."""

REST_DEPTH = 1.2e-4
"""Metres that an object at rest sinks into what carries it: contacts are soft."""
TIMESTEP = 0.01
"""Seconds of a physics step."""
SUBSTEPS = 12
"""Physics steps an action."""
HIDDEN = 1e-5
"""Size of a shape that its slot does not show: it lies unseen inside the one it does."""

# --- shapes ---------------------------------------------------------------------------------------

OBJECT_GEOMS = ("box", "bar", "cylinder", "capsule")
RECEPTACLE_GEOMS = ("disc", "floor", "left", "right", "near", "far")
EXTRA_GEOMS = ("box", "cylinder")

OBJECT_BIT, FINGER_BIT = 1, 2


@dataclass(frozen=True, slots=True)
class Shape:
    """The geoms of an object slot that make a shape."""

    sizes: dict[str, tuple[float, float, float]]
    """MuJoCo size of each geom that is shown; the others stay hidden."""
    bar_yaw: float = 0.0
    """Rotation of the second box against the first, radians."""
    half_height: float = HALF_HEIGHT
    symmetry: float = np.pi / 2
    """Angle by which a turn gives an equally good grasp, radians; 0: any angle does."""


SHAPES: dict[str, Shape] = {
    "cube": Shape({"box": (0.023, 0.023, HALF_HEIGHT)}),
    "cylinder": Shape({"cylinder": (0.025, HALF_HEIGHT, 0.0)}, symmetry=0.0),
    "brick": Shape({"box": (0.019, 0.034, HALF_HEIGHT)}, symmetry=np.pi),
    "cross": Shape(
        {"box": (0.029, 0.013, HALF_HEIGHT), "bar": (0.029, 0.013, HALF_HEIGHT)}, bar_yaw=np.pi / 2
    ),
    "star": Shape(
        {"box": (0.022, 0.022, HALF_HEIGHT), "bar": (0.022, 0.022, HALF_HEIGHT)},
        bar_yaw=np.pi / 4,
        symmetry=np.pi / 4,
    ),
    "capsule": Shape({"capsule": (0.021, 0.018, 0.0)}, half_height=0.021, symmetry=np.pi),
}


def receptacle_sizes(kind: str) -> dict[str, tuple[float, float, float]]:
    """Return the MuJoCo size of each geom of a receptacle of this kind."""
    if kind == "plate":
        return {"disc": (PLATE_RADIUS, PLATE_HEIGHT / 2, 0.0)}
    if kind == "zone":
        return _frame(TAPE[0], ZONE_HALF, TAPE[1])
    return {"floor": (TRAY_HALF, TRAY_HALF, TRAY_FLOOR / 2)} | _frame(0.004, TRAY_HALF, TRAY_WALL / 2)


def _frame(width: float, length: float, height: float) -> dict[str, tuple[float, float, float]]:
    across, along = (width, length, height), (length, width, height)
    return {"left": across, "right": across, "near": along, "far": along}


# --- the model ------------------------------------------------------------------------------------


def _object_xml(slot: int) -> str:
    # Compiled at their largest: the broad phase keeps these bounds, the worlds only ever shrink them.
    return f"""
    <body name="object{slot}" pos="{0.1 * slot} 0 {HALF_HEIGHT}">
      <joint type="free" damping="0.001"/>
      <inertial pos="0 0 0" mass="0.06" diaginertia="4e-5 4e-5 4e-5"/>
      <geom class="object" name="object{slot}/box" type="box" size=".036 .036 .024"/>
      <geom class="object" name="object{slot}/bar" type="box" size=".036 .036 .024" euler="0 0 1"/>
      <geom class="object" name="object{slot}/cylinder" type="cylinder" size=".026 .024"/>
      <geom class="object" name="object{slot}/capsule" type="capsule" size=".022 .02" quat="1 1 0 0"/>
    </body>"""


def _receptacle_xml(slot: int) -> str:
    wall, z = TRAY_HALF - 0.004, TRAY_WALL / 2
    name = f"receptacle{slot}"
    walls = "".join(
        f'<geom class="fixed" name="{name}/{side}" type="box" size=".06 .06 .01" pos="{x} {y} {z}"/>'
        for side, x, y in (("left", -wall, 0), ("right", wall, 0), ("near", 0, -wall), ("far", 0, wall))
    )
    return f"""
    <body name="{name}" pos="{0.12 * slot - 0.12} 0.1 0">
      <geom class="fixed" name="{name}/disc" type="cylinder" size=".06 .01" pos="0 0 {PLATE_HEIGHT / 2}"/>
      <geom class="fixed" name="{name}/floor" type="box" size=".06 .06 .01" pos="0 0 {TRAY_FLOOR / 2}"/>
      {walls}
    </body>"""


def _extra_xml(slot: int) -> str:
    return f"""
    <body name="extra{slot}" pos="{0.1 * slot} -0.1 {HALF_HEIGHT}">
      <geom class="fixed" name="extra{slot}/box" type="box" size=".026 .026 .024"/>
      <geom class="fixed" name="extra{slot}/cylinder" type="cylinder" size=".026 .024"/>
    </body>"""


def _finger_xml(name: str, sign: int) -> str:
    return f"""
    <body name="{name}" pos="{sign * FINGER[0]} 0 {FINGER[2]}" gravcomp="1">
      <joint name="{name}" type="slide" axis="{sign} 0 0" range="-0.002 {FINGER_TRAVEL + 0.002}"
             armature="0.05" damping="26"/>
      <geom class="finger" name="{name}" type="box" size="{FINGER[0]} {FINGER[1]} {FINGER[2]}" mass="0.02"/>
    </body>"""


def _servo(joint: str, armature: float, frequency: float) -> str:
    """A critically damped position servo for a joint dominated by its armature."""
    stiffness, damping = armature * frequency**2, 2 * armature * frequency
    return f'<position name="{joint}" joint="{joint}" kp="{stiffness}" kv="{damping}"/>'


def _xml() -> str:
    reach = ARM_HEIGHT - 0.08
    return f"""
<mujoco model="tabletop">
  <compiler angle="radian" autolimits="true"/>
  <option timestep="{TIMESTEP}" integrator="implicitfast" cone="elliptic" iterations="20"
          ls_iterations="10" sleep_tolerance="1e-3">
    <flag sleep="enable"/>
  </option>
  <visual><headlight active="0"/><map znear="0.05"/></visual>
  <default>
    <default class="arm">
      <geom contype="0" conaffinity="0" rgba=".33 .36 .42 1"/>
    </default>
    <default class="finger">
      <geom contype="{FINGER_BIT}" conaffinity="0" condim="4" friction="1 .02 .0001" priority="1"
            solref=".02 1" rgba=".12 .13 .16 1"/>
    </default>
    <default class="object">
      <geom contype="{OBJECT_BIT}" conaffinity="{OBJECT_BIT | FINGER_BIT}" condim="3" friction=".7 .01 .0001"
            solref=".02 1" mass="0"/>
    </default>
    <default class="fixed">
      <geom contype="{OBJECT_BIT}" conaffinity="0" condim="3" friction=".7 .01 .0001" solref=".02 1"/>
    </default>
  </default>
  <asset>
    <texture name="checker" type="2d" builtin="checker" width="64" height="64" rgb1=".50 .40 .30"
             rgb2=".66 .56 .44"/>
    <texture name="blotches" type="2d" builtin="gradient" width="64" height="64" rgb1=".36 .44 .40"
             rgb2=".60 .66 .58"/>
    <material name="checker" texture="checker" texrepeat="10 10"/>
    <material name="blotches" texture="blotches" texrepeat="9 9"/>
  </asset>
  <worldbody>
    <light name="lamp" type="directional"/>
    <camera name="front" fovy="19"/>
    <geom class="fixed" name="table" type="plane" size=".6 .6 .1"
          rgba="{TABLE_RGB[0]} {TABLE_RGB[1]} {TABLE_RGB[2]} 1"/>
    <geom class="arm" name="spot" type="cylinder" size=".011 .0004" rgba=".2 .2 .22 1"/>
    {"".join(map(_receptacle_xml, range(RECEPTACLES)))}
    {"".join(map(_extra_xml, range(EXTRAS)))}
    {"".join(map(_object_xml, range(OBJECTS)))}
    <body name="upper_arm" pos="{BASE[0]} {BASE[1]} {ARM_HEIGHT}" gravcomp="1">
      <joint name="shoulder" axis="0 0 1" armature=".5"/>
      <geom class="arm" type="capsule" fromto="0 0 0 {UPPER_ARM} 0 0" size=".028" mass=".2"/>
      <body name="forearm" pos="{UPPER_ARM} 0 0" gravcomp="1">
        <joint name="elbow" axis="0 0 1" armature=".4"/>
        <geom class="arm" type="capsule" fromto="0 0 0 {FOREARM} 0 0" size=".024" mass=".2"/>
        <body name="quill" pos="{FOREARM} 0 {-ARM_HEIGHT}" gravcomp="1">
          <joint name="quill" type="slide" axis="0 0 1" armature="1"/>
          <geom class="arm" type="cylinder" fromto="0 0 .07 0 0 {0.07 + reach}" size=".012" mass=".1"/>
          <body name="hand" gravcomp="1">
            <joint name="wrist" axis="0 0 1" armature=".05"/>
            <geom class="arm" name="palm" type="box" size=".062 .014 .008" pos="0 0 .072" mass=".05"/>
            {_finger_xml("left_finger", -1)}
            {_finger_xml("right_finger", 1)}
          </body>
        </body>
      </body>
    </body>
  </worldbody>
  <equality>
    <joint joint1="left_finger" joint2="right_finger"/>
  </equality>
  <actuator>
    {_servo("shoulder", 0.5, 60)}
    {_servo("elbow", 0.4, 60)}
    {_servo("quill", 1.0, 60)}
    {_servo("wrist", 0.05, 60)}
    <position name="left_finger" joint="left_finger" kp="600" forcerange="-8 8"/>
    <position name="right_finger" joint="right_finger" kp="600" forcerange="-8 8"/>
  </actuator>
  <sensor>
    <contact name="left" body1="left_finger" body2="object0" data="found" num="1"/>
    <contact name="right" body1="right_finger" body2="object0" data="found" num="1"/>
    <contact name="support" body1="object1" body2="object0" data="found" num="1"/>
    <contact name="contained" body1="receptacle0" body2="object0" data="found" num="1"/>
  </sensor>
</mujoco>"""


@dataclass(frozen=True)
class TabletopScene:
    """The compiled model and where things are in it."""

    model: mujoco.MjModel
    object_geoms: np.ndarray
    """int [OBJECTS, len(OBJECT_GEOMS)], geom ids."""
    receptacle_geoms: np.ndarray
    """int [RECEPTACLES, len(RECEPTACLE_GEOMS)]."""
    extra_geoms: np.ndarray
    """int [EXTRAS, len(EXTRA_GEOMS)]."""
    receptacle_bodies: np.ndarray
    """int [RECEPTACLES], body ids."""
    extra_bodies: np.ndarray
    """int [EXTRAS]."""
    table: int
    """Geom id of the table."""
    spot: int
    """Geom id of the mark on the table under the gripper."""
    object_qpos: np.ndarray
    """int [OBJECTS, 7], addresses in qpos."""
    object_qvel: np.ndarray
    """int [OBJECTS, 6], addresses in qvel."""
    arm_qpos: np.ndarray
    """int [6], addresses in qpos: shoulder, elbow, quill, wrist, left and right finger."""


@functools.cache
def scene() -> TabletopScene:
    """The model, compiled at the first call."""
    model = mujoco.MjModel.from_xml_string(_xml())

    def geoms(kind: str, count: int, names: tuple[str, ...]) -> np.ndarray:
        return np.array([[model.geom(f"{kind}{slot}/{name}").id for name in names] for slot in range(count)])

    def bodies(kind: str, count: int) -> np.ndarray:
        return np.array([model.body(f"{kind}{slot}").id for slot in range(count)])

    free = [model.joint(int(model.body(f"object{slot}").jntadr[0])) for slot in range(OBJECTS)]
    arm = ("shoulder", "elbow", "quill", "wrist", "left_finger", "right_finger")
    return TabletopScene(
        model=model,
        object_geoms=geoms("object", OBJECTS, OBJECT_GEOMS),
        receptacle_geoms=geoms("receptacle", RECEPTACLES, RECEPTACLE_GEOMS),
        extra_geoms=geoms("extra", EXTRAS, EXTRA_GEOMS),
        receptacle_bodies=bodies("receptacle", RECEPTACLES),
        extra_bodies=bodies("extra", EXTRAS),
        table=model.geom("table").id,
        spot=model.geom("spot").id,
        object_qpos=np.array([j.qposadr[0] + np.arange(7) for j in free]),
        object_qvel=np.array([j.dofadr[0] + np.arange(6) for j in free]),
        arm_qpos=np.array([model.joint(name).qposadr[0] for name in arm]),
    )
