"""The put-on-plate tasks as one environment of ManiSkill's, driven by `PlateScene`s.

This module derives from ManiSkill's classes: import it only where a simulation is made.
"""

# ManiSkill and SAPIEN give no types that a checker could follow.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportOptionalMemberAccess=false
# pyright: reportIncompatibleMethodOverride=false, reportIncompatibleVariableOverride=false
from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import sapien
import torch
from mani_skill.envs.sapien_env import BaseEnv
from mani_skill.envs.tasks.digital_twins.bridge_dataset_eval.base_env import WidowX250SBridgeDatasetFlatTable
from mani_skill.sensors.camera import CameraConfig
from mani_skill.utils import sapien_utils
from mani_skill.utils.structs.actor import Actor
from mani_skill.utils.structs.pose import Pose
from mani_skill.utils.structs.types import SimConfig
from torch import Tensor

from rove.envs.maniskill.put_on_plate import overlay, poses, progress
from rove.envs.maniskill.put_on_plate.families import PlateScene
from rove.envs.rotations import yaw_quaternion

CAMERA = "3rd_view_camera"
FRICTION = 1.0
MOVED_AFTER = 5
"""Actions after which the source is put elsewhere, where the scene says so."""
SETTLE, SETTLE_LONGER = 50, 600
"""Physics steps before an episode that settles; the longer time where things still move after the first."""
_BASE, _AWAY = (0.147, 0.028, 0.870), (0.147, 0.028, 1.870)
"""Poses of the robot's base, in an episode and while things settle."""
_TURNED = (0.0, 0.0, 0.0, 1.0)
OPENED = 0.030
"""Position beyond which a finger counts as open, metres; it goes from 0.015 to 0.037."""
OBJECTS, RECEPTACLES = "more_carrot", "more_plate"
"""Folders of the models."""
_PARKED_AT = {OBJECTS: 1.0, RECEPTACLES: 2.0}
"""Place (x) of what an episode does not use: behind the camera, in a row along y."""


def used(scene: PlateScene, group: str) -> set[int]:
    """The models of a group that a scene has on its table."""
    if group == OBJECTS:
        return {scene.object, scene.distractor} - {None}  # pyright: ignore[reportReturnType]
    return {scene.receptacle, scene.second_receptacle} - {None}  # pyright: ignore[reportReturnType]


class PutOnPlate(BaseEnv):
    """ManiSkill's environment of n worlds, a scene each: `reset(options={"scenes": ..., "env_idx": ...})`
    starts some of them.

    With one world, `"reconfigure": True` makes the scene anew, with what the episode uses and nothing else.
    """

    SUPPORTED_REWARD_MODES = ("none",)
    agent: WidowX250SBridgeDatasetFlatTable

    def __init__(
        self,
        *,
        data: Path,
        height: int = overlay.HEIGHT,
        width: int = overlay.WIDTH,
        settle: bool = False,
        **options: Any,
    ) -> None:
        self._data = data
        self._size = (height, width)
        self._settles = settle
        self.everything = False
        """Also build, and park, what an episode does not use."""
        self.scenes: list[PlateScene | None] = [None] * options.get("num_envs", 1)
        super().__init__(
            robot_uids=WidowX250SBridgeDatasetFlatTable,
            obs_mode="rgb+segmentation",
            reward_mode="none",
            **options,
        )

    # --- the scene ----------------------------------------------------------------------

    @property
    def _default_sim_config(self) -> SimConfig:
        return SimConfig(sim_freq=500, control_freq=5, spacing=20)

    @property
    def _default_human_render_camera_configs(self) -> list:
        return []

    def _setup_sensors(self, options: dict) -> None:
        """Set up the published camera; a smaller picture has its intrinsics scaled along each axis."""
        height, width = self._size
        if (height, width) != (overlay.HEIGHT, overlay.WIDTH):
            (published,) = self.agent._sensor_configs
            scale = np.array([[width / overlay.WIDTH], [height / overlay.HEIGHT], [1.0]])
            assert isinstance(published, CameraConfig)
            self._custom_sensor_configs = {
                CAMERA: {"width": width, "height": height, "intrinsic": published.intrinsic * scale}
            }
        super()._setup_sensors(options)

    def _load_agent(self, options: dict, **_: Any) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        super()._load_agent(options, sapien.Pose(p=[0.127, 0.060, 0.85], q=_TURNED))

    def _load_lighting(self, options: dict) -> None:
        self.scene.set_ambient_light([0.3, 0.3, 0.3])
        self.scene.add_directional_light(
            [0, 0, -1], [2.2, 2.2, 2.2], shadow=False, shadow_scale=5, shadow_map_size=2048
        )
        self.scene.add_directional_light([-1, -0.5, -1], [0.7, 0.7, 0.7])
        self.scene.add_directional_light([1, 1, -1], [0.7, 0.7, 0.7])

    def _load_scene(self, options: dict) -> None:
        for robot in self.agent.robot._objs:
            sapien_utils.set_articulation_render_material(robot, specular=0.9, roughness=0.3)
        builder = self.scene.create_actor_builder()
        mesh = str(self._data / "tasks/bridge_v2_real2sim_dataset/stages/bridge_table_1_v1.glb")
        upright = sapien.Pose(q=[0.707, 0.707, 0, 0])
        builder.add_nonconvex_collision_from_file(mesh, pose=upright)
        builder.add_visual_from_file(mesh, pose=upright)
        builder.initial_pose = sapien.Pose([2.0634, 2.8313, 0.0])
        builder.build_static(name="arena")
        self.__dict__.pop("_kept_ids", None)
        self._models = {
            group: list(
                json.loads((self._data / "tasks/carrot" / group / "model_db.json").read_text()).items()
            )
            for group in _PARKED_AT
        }
        # On a GPU nothing can be added later, so all there is; else what the episode uses.
        scenes = options.get("scenes", ())
        everything = self.everything or self._sim_device.is_cuda()
        self._built = {
            group: {
                index: self._build(group, index)
                for index in range(len(models))
                if everything or any(index in used(scene, group) for scene in scenes)
            }
            for group, models in self._models.items()
        }

    def _build(self, group: str, index: int) -> Actor:
        name, about = self._models[group][index]
        folder = self._data / "tasks/carrot" / group / name
        material = sapien.physx.PhysxMaterial(
            static_friction=FRICTION, dynamic_friction=FRICTION, restitution=0.0
        )
        builder = self.scene.create_actor_builder()
        builder.add_multiple_convex_collisions_from_file(
            filename=str(folder / "collision.obj"), material=material, density=about["density"]
        )
        looks = [folder / f"textured.{kind}" for kind in ("obj", "dae", "glb")]
        builder.add_visual_from_file(filename=str(next(file for file in looks if file.is_file())))
        builder.initial_pose = self._parked(group, index)
        return builder.build(name=f"{group}/{index}")

    @staticmethod
    def _parked(group: str, index: int) -> sapien.Pose:
        return sapien.Pose([_PARKED_AT[group], 0.3 * index, 1.0], _TURNED)

    def _sizes(self, group: str, indices: Sequence[int]) -> Tensor:
        """Return the sizes [n, 3] of models, metres."""
        boxes = [self._models[group][i][1]["bbox"] for i in indices]
        sizes = np.array([np.subtract(box["max"], box["min"]) for box in boxes])
        return torch.tensor(sizes, dtype=torch.float32, device=self.device)

    # --- an episode ---------------------------------------------------------------------------------

    def _initialize_episode(self, env_idx: Tensor, options: dict) -> None:
        rows = env_idx.tolist()
        if not hasattr(self, "held_for"):
            self._statistics()
        if "scenes" not in options:  # ManiSkill resets once by itself when it makes an environment
            return
        chosen = options["scenes"]
        for row, scene in zip(rows, chosen, strict=True):
            self.scenes[row] = scene
        self.agent.robot.set_pose(sapien.Pose(_AWAY if self._settles else _BASE, _TURNED))
        for group, actors in self._built.items():
            for index, actor in actors.items():
                actor.set_pose(self._start_poses(group, index, chosen))
        if self._settles:
            self._settle(rows)
            self.agent.robot.set_pose(sapien.Pose(_BASE, _TURNED))
        offsets = poses.joint_offsets()[[scene.joints for scene in chosen]]
        joints = np.array(poses.JOINTS) + offsets
        self.agent.reset(init_qpos=torch.tensor(joints, dtype=torch.float32, device=self.device))
        self._begin(env_idx, chosen)

    def _scene(self, row: int) -> PlateScene:
        scene = self.scenes[row]
        assert scene is not None, "a world without an episode"
        return scene

    def _start_poses(self, group: str, index: int, scenes: Sequence[PlateScene]) -> Pose:
        """Return the poses of one model in each of the scenes: parked where a scene does not use it."""
        rows = []
        for scene in scenes:
            at = self._parked(group, index)
            turned = yaw_quaternion(scene.yaw) if group == OBJECTS else (1.0, 0.0, 0.0, 0.0)
            first, other = (
                (scene.object, scene.distractor)
                if group == OBJECTS
                else (scene.receptacle, scene.second_receptacle)
            )
            # Where both are one model it lies at the third place: as published, the later assignment wins.
            if index == other:
                at = sapien.Pose([*scene.places[2], scene.heights[2]], turned)
            elif index == first:
                slot = 0 if group == OBJECTS else 1
                at = sapien.Pose([*scene.places[slot], scene.heights[slot]], turned)
            rows.append(torch.tensor([*at.p, *at.q], dtype=torch.float32, device=self.device))
        return Pose.create(torch.stack(rows))

    def _settle(self, rows: Sequence[int]) -> None:
        self._apply()
        for steps in (SETTLE, SETTLE_LONGER):
            for _ in range(steps):
                self.scene.step()
            if self.gpu_sim_enabled:
                self.scene._gpu_fetch_all()
            speeds = [
                (a.linear_velocity[row], a.angular_velocity[row]) for row in rows for a in self._used(row)
            ]
            linear, angular = (sum(float(v.norm()) for v in column) for column in zip(*speeds, strict=True))
            if linear <= 1e-3 and angular <= 1e-2:
                break

    def _used(self, row: int) -> list[Actor]:
        """List everything that lies on the table of a world."""
        scene = self._scene(row)
        return [self._built[group][i] for group in self._built for i in sorted(used(scene, group))]

    def _apply(self) -> None:
        if self.gpu_sim_enabled:
            self.scene._gpu_apply_all()

    def _statistics(self) -> None:
        n, device = self.num_envs, self.device
        self.source_extents, self.receptacle_extents = (torch.zeros(n, 3, device=device) for _ in range(2))
        self.held_for = torch.zeros(n, dtype=torch.int64, device=device)
        self.grasped_once, self.held_once = (
            torch.zeros(n, dtype=torch.bool, device=device) for _ in range(2)
        )

    def _begin(self, env_idx: Tensor, chosen: Sequence[PlateScene]) -> None:
        """Take extents as things lie now, for the whole episode, and start statistics from zero."""
        rows = env_idx.tolist()
        source, plate = (
            torch.stack([self.model(group, row).pose.q[row] for row in rows])
            for group in (OBJECTS, RECEPTACLES)
        )
        sizes = self._sizes(OBJECTS, [scene.object for scene in chosen])
        self.source_extents[env_idx] = progress.extents(source, sizes)
        sizes = self._sizes(RECEPTACLES, [scene.receptacle for scene in chosen])
        self.receptacle_extents[env_idx] = progress.extents(plate, sizes)
        self.held_for[env_idx] = 0
        self.grasped_once[env_idx] = False
        self.held_once[env_idx] = False
        self._query = None

    def _after_control_step(self) -> None:
        """Put the source elsewhere in the worlds whose scene has that now; its velocity stays."""
        due = [
            row
            for row, scene in enumerate(self.scenes)
            if scene is not None and scene.moves and int(self._elapsed_steps[row]) + 1 == MOVED_AFTER
        ]
        for row in due:
            scene = self._scene(row)
            self.scene._reset_mask[:] = False
            self.scene._reset_mask[row] = True
            pose = sapien.Pose([*scene.places[2], scene.heights[2]], yaw_quaternion(scene.yaw))
            self.model(OBJECTS, row).set_pose(pose)
        if due:
            self.scene._reset_mask[:] = True
            self._apply()

    # --- what is measured ---------------------------------------------------------------------------

    def model(self, group: str, row: int) -> Actor:
        """Return the source object, or the receptacle, of a world."""
        scene = self._scene(row)
        return self._built[group][scene.object if group == OBJECTS else scene.receptacle]

    def positions(self, group: str) -> Tensor:
        """Return the position [n, 3] of each world's source or receptacle, the origin of its model."""
        return torch.stack(
            [
                torch.zeros(3, device=self.device) if scene is None else self.model(group, row).pose.p[row]
                for row, scene in enumerate(self.scenes)
            ]
        )

    def points(self, rows: Sequence[int]) -> Tensor:
        """Locate source, receptacle and hand, pixels float32 [len(rows), 3, 2] of a picture squashed to a
        square as wide as this one."""
        fingers = (self.agent.finger1_link.pose.p + self.agent.finger2_link.pose.p) / 2
        places = torch.stack([self.positions(OBJECTS), self.positions(RECEPTACLES), fingers], dim=1)
        camera = self._sensors[CAMERA].camera
        turn, shift = camera.get_extrinsic_matrix()[:, :3, :].split((3, 1), dim=-1)
        seen = camera.get_intrinsic_matrix() @ (turn @ places.mT + shift)
        pixels = (seen[:, :2] / seen[:, 2:]).mT
        height, width = self._size
        return (pixels * torch.tensor([1.0, width / height], device=self.device))[list(rows)].float().cpu()

    def forces(self) -> Tensor:
        """Return forces [n, 3, 3], newtons: left and right finger on source, source on receptacle.

        One query for all worlds.
        """
        rows = [row for row, scene in enumerate(self.scenes) if scene is not None]
        pairs = [pair for row in rows for pair in self._pairs(row)]
        found = torch.zeros(self.num_envs, 3, 3, device=self.device)
        if self.gpu_sim_enabled:
            if self._query is None:
                self._query = self.scene.px.gpu_create_contact_pair_impulse_query(pairs)
            self.scene.px.gpu_query_contact_pair_impulses(self._query)
            impulses = self._query.cuda_impulses.torch().clone().reshape(len(rows), 3, 3)
        else:
            impulses = torch.from_numpy(_impulses(self.scene.px.get_contacts(), pairs)).reshape(
                len(rows), 3, 3
            )
        found[rows] = impulses.to(found) / self.scene.px.timestep
        return found

    def _pairs(self, row: int) -> list[tuple]:
        source = self.model(OBJECTS, row)._bodies[row]
        left, right = self.agent.finger1_link._bodies[row], self.agent.finger2_link._bodies[row]
        return [(left, source), (right, source), (source, self.model(RECEPTACLES, row)._bodies[row])]

    def evaluate(self) -> dict[str, Tensor]:
        """Judge every world as it is now; counts nothing, so that it may be called at any time."""
        if not any(scene is not None for scene in self.scenes):
            return {}
        left, right, touch = self.forces().unbind(1)
        axes = [
            link.pose.to_transformation_matrix()[:, :3, 1]
            for link in (self.agent.finger1_link, self.agent.finger2_link)
        ]
        source, plate = self.positions(OBJECTS), self.positions(RECEPTACLES)
        return {
            "is_grasped": progress.grasped(left, right, axes[0], -axes[1]),
            "success": progress.on_target(source, plate, self.source_extents, self.receptacle_extents, touch),
        }

    def count(self, info: dict[str, Tensor]) -> Tensor:
        """Count an action's outcome, once after each; returns the potential now, [n]."""
        self.held_for = torch.where(info["is_grasped"], self.held_for + 1, 0)
        self.grasped_once = self.grasped_once | info["is_grasped"]
        self.held_once = self.held_once | (self.held_for >= progress.HELD_FOR)
        return progress.potential(self.grasped_once, self.held_once, info["success"])

    def hands(self) -> Tensor:
        """Return the point [n, 3] between the fingertips of each world, metres."""
        link = self.agent.controller.controllers["arm"].ee_link.pose
        return link.p + progress.TIP * link.to_transformation_matrix()[:, :3, 0]

    def way_left(self, held: Tensor) -> Tensor:
        """Return what the hand still has to do, [n] metres: see `progress.way_left`; `held` is bool [n]."""
        return progress.way_left(
            self.hands(),
            self.agent.robot.get_qpos()[:, -2:].mean(-1) > OPENED,
            self.positions(OBJECTS),
            self.positions(RECEPTACLES),
            self.source_extents,
            self.receptacle_extents,
            held,
        )

    # --- pictures -----------------------------------------------------------------------------------

    @cached_property
    def _kept_ids(self) -> Tensor:
        """Tell which segmentation ids show before the photo, bool [ids]."""
        kept = torch.zeros(1 + max(self.segmentation_id_map), dtype=torch.bool, device=self.device)
        for number, thing in self.segmentation_id_map.items():
            kept[number] = thing.name not in ("ground", "goal_site", "arena", "")
        return kept

    def frames(self, rows: Sequence[int]) -> Tensor:
        """Render what the policy sees in these worlds, uint8 [len(rows), H, W, 3]."""
        seen = self._get_obs_sensor_data()[CAMERA]
        keep = self._kept_ids[seen["segmentation"][rows, ..., 0].long()]
        scenes = [self._scene(row) for row in rows]
        return overlay.compose(seen["rgb"][rows], keep, scenes, self._data / "tasks/carrot/more_table").cpu()


def _impulses(contacts: Sequence[Any], pairs: Sequence[tuple]) -> np.ndarray:
    """Return the impulses [len(pairs), 3] on the first body of each pair, over all contacts,
    newton-seconds."""
    number = {}
    for index, (first, second) in enumerate(pairs):
        number[first, second] = index, 1.0
        number[second, first] = index, -1.0
    total = np.zeros((len(pairs), 3), np.float32)
    for contact in contacts:
        if (found := number.get((contact.bodies[0], contact.bodies[1]))) is not None:
            index, sign = found
            total[index] += sign * np.sum([point.impulse for point in contact.points], axis=0)
    return total
