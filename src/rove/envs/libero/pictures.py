"""Pictures of worlds: where everything was when it was observed, and a renderer for each scene."""

# pyright: reportAttributeAccessIssue=false
from __future__ import annotations

from collections.abc import Sequence

import mujoco
import numpy as np
from mujoco.batch import Batch

from rove.config.schema import LiberoConfig
from rove.envs.libero import fingerprint
from rove.envs.libero.frame import LiberoFrame
from rove.envs.libero.predicates import COMPARISONS
from rove.envs.libero.render import LiberoRenderer
from rove.envs.libero.scenes import TaskModel
from rove.envs.libero.worlds import Place
from rove.envs.rotations import matrix

LARGEST = 16
"""Worlds drawn at once at most: what a renderer holds grows with it."""
_POSITIONS = mujoco.mjtStage.mjSTAGE_POS.value


class _Scene:
    """Renders the worlds of one scene: kinematics in batch, and a renderer."""

    def __init__(
        self,
        task: TaskModel,
        config: LiberoConfig,
        cameras: Sequence[str],
        *,
        capacity: int,
        threads: int,
        gpu: int | None,
    ) -> None:
        model, looks = task.model, task.scene.looks()
        assert config.renderer != "none"
        self.capacity = capacity
        self._task = task  # tasks of a scene have the same burners
        self._sites = np.array([model.site(burner["site"]).id for burner in task.burners], int)
        self._batch = Batch(model, capacity, nthread=threads)
        self._position, self._quaternion = self._batch.expand("body_pos"), self._batch.expand("body_quat")
        self._qpos = self._batch.bind("qpos")
        self._bound = {
            name: self._batch.bind(name)
            for name in (
                "xpos", "xmat", "cam_xpos", "cam_xmat", "light_xpos", "light_xdir", "site_xpos", "site_xmat",
            )
        }  # fmt: skip
        self._bodies, self._offset = looks.geom_bodyid.copy(), looks.geom_pos.copy()
        self._turn = matrix(looks.geom_quat)
        self._renderer = LiberoRenderer(
            looks,
            capacity,
            cameras=cameras,
            size=config.image_size,
            burners=self._sites.tolist(),
            backend=config.renderer,
            device=_device(config, gpu),
            gpu=gpu,
            threads=threads,
        )

    def draw(self, places: Sequence[Place], poses: np.ndarray) -> np.ndarray:
        """Draw the worlds of `places` in poses [n, nq]: uint8 [n, cameras, H, W, 3]."""
        parts = [
            self._draw(places[i : i + self.capacity], poses[i : i + self.capacity])
            for i in range(0, len(places), self.capacity)
        ]
        return np.concatenate(parts)

    def _draw(self, places: Sequence[Place], poses: np.ndarray) -> np.ndarray:
        rows = np.arange(len(places))
        for row, place in enumerate(places):
            self._position[row], self._quaternion[row] = place.group.body_poses(place.row)
        self._qpos[rows] = poses
        self._batch.forward(rows, stage=_POSITIONS)
        bound = {name: values[rows] for name, values in self._bound.items()}
        bodies = _matrices(bound["xmat"])[:, self._bodies]
        return self._renderer.render(
            LiberoFrame(
                geom_xpos=bound["xpos"][:, self._bodies] + (bodies @ self._offset[..., None])[..., 0],
                geom_xmat=bodies @ self._turn,
                cam_xpos=bound["cam_xpos"],
                cam_xmat=_matrices(bound["cam_xmat"]),
                light_xpos=bound["light_xpos"],
                light_xdir=bound["light_xdir"],
                burner_xpos=bound["site_xpos"][:, self._sites],
                burner_xmat=_matrices(bound["site_xmat"][:, self._sites]),
                lit=self._lit(poses),
            )
        )

    def _lit(self, poses: np.ndarray) -> np.ndarray:
        """Tell which burners are on, bool [n, burners]."""
        lit = np.zeros((len(poses), len(self._sites)), bool)
        for i, burner in enumerate(self._task.burners):
            for joint in burner["joints"]:
                address = self._task.model.joint(joint).qposadr[0]
                lit[:, i] |= COMPARISONS[burner["comparison"]](poses[:, address], burner["limit"])
        return lit

    def close(self) -> None:
        self._renderer.close()


def _device(config: LiberoConfig, gpu: int | None) -> str:
    """Device on which the "warp" renderer draws."""
    return f"cuda:{gpu or 0}" if config.render == "cuda" else "cpu"


def _matrices(flat: np.ndarray) -> np.ndarray:
    return flat.reshape(*flat.shape[:2], 3, 3)


class Pictures:
    """Draws any worlds; keeps a renderer for each scene that it has drawn, until the scene is dropped."""

    def __init__(
        self, config: LiberoConfig, cameras: Sequence[str], num_envs: int, threads: int, gpu: int | None
    ) -> None:
        """`gpu` is the CUDA index of the one that draws, where one does; None: the first."""
        assert config.renderer != "none"
        fingerprint.check(config.renderer, _device(config, gpu), gpu)
        self._gpu = gpu
        self._config, self._cameras = config, cameras
        self._capacity, self._threads = min(num_envs, LARGEST), threads
        self._scenes: dict[str, _Scene] = {}

    def _scene(self, task: TaskModel) -> _Scene:
        key = task.scene.key
        if key not in self._scenes:
            self._scenes[key] = _Scene(
                task,
                self._config,
                self._cameras,
                capacity=self._capacity,
                threads=self._threads,
                gpu=self._gpu,
            )
        return self._scenes[key]

    def draw(self, places: Sequence[Place]) -> np.ndarray:
        """uint8 [n, cameras, H, W, 3]: what was last observed in each.

        As published: the stock picture, which is upside down, turned by 180 degrees, so mirrored.
        """
        size = self._config.image_size
        images = np.empty((len(places), len(self._cameras), size, size, 3), np.uint8)
        by_scene: dict[str, list[int]] = {}
        for i, place in enumerate(places):
            by_scene.setdefault(place.task.scene.key, []).append(i)
        for members in by_scene.values():
            some = [places[i] for i in members]
            poses = np.stack([place.group.pose[place.row] for place in some])
            images[members] = self._scene(some[0].task).draw(some, poses)[..., ::-1, :]
        return images

    def film(self, place: Place, poses: Sequence[np.ndarray]) -> np.ndarray:
        """Draw the first camera's picture of one world in each of n poses: uint8 [n, H, W, 3]."""
        drawn = self._scene(place.task).draw([place] * len(poses), np.stack(poses))
        return np.ascontiguousarray(drawn[:, 0, :, ::-1])

    def drop(self, scene: str) -> None:
        """Forget a scene."""
        if (dropped := self._scenes.pop(scene, None)) is not None:
            dropped.close()

    def close(self) -> None:
        """Free everything; harmless when called twice."""
        for key in list(self._scenes):
            self.drop(key)
