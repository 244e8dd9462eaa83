"""What every recording has, whatever its layout: features, episodes, pictures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from rove.data import installed
from rove.errors import RoveError, nearest

CAMERA = ("video", "image")
"""Kinds of features that are pictures."""
NUMBERS = (
    "float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64",
    "bool",
)  # fmt: skip
"""Kinds of features that are numbers; others are listed, and not read."""


@dataclass(frozen=True, slots=True)
class Feature:
    """One thing that is recorded at every frame."""

    dtype: str
    """NumPy's name of its numbers; "video" or "image" where it is pictures."""
    shape: tuple[int, ...]
    """Of one frame; [height, width, 3] where it is pictures."""
    names: tuple[str, ...] = ()
    """One a dimension; empty where the recording has none."""

    @property
    def camera(self) -> bool:
        """Whether it is pictures."""
        return self.dtype in CAMERA


@dataclass(frozen=True, slots=True, eq=False)
class Episode:
    """All of an episode but its pictures; T frames."""

    columns: Mapping[str, np.ndarray]
    """Feature -> [T, *shape]."""
    tasks: tuple[str, ...]
    """T instructions."""
    success: bool | None
    """None where the recording does not say."""


@dataclass(frozen=True, slots=True)
class Roles:
    """Names of the features that an import takes unless it is told others."""

    images: tuple[str, ...]
    state: tuple[str, ...]
    action: str


class Recording(Protocol):
    """Episodes on disk."""

    where: Path
    layout: str
    """The layout's name and version, for a reader."""
    fps: float | None
    """Frames a second; None where that is not recorded."""
    features: Mapping[str, Feature]
    lengths: tuple[int, ...]
    """Frames of each episode."""
    roles: Roles
    about: Mapping[str, Any]
    """What Rove wrote down besides, such as the action spec; empty in recordings of others."""

    def check(self, names: Sequence[str]) -> None:
        """Raise RoveError where a file is missing that the pictures of these features are in."""
        ...

    def episode(self, index: int) -> Episode:
        """Read an episode. Raises RoveError naming the file that is missing or damaged."""
        ...

    def pictures(self, index: int, name: str) -> Iterator[np.ndarray]:
        """Read the pictures of an episode one after the other, uint8 [H, W, 3]. Raises as `episode` does."""
        ...


def open_recording(path: Path) -> Recording:
    """Open a LeRobot data set (a folder), or LIBERO's HDF5 files (one, or a folder of them).

    Raises RoveError where it is neither.
    """
    with installed():
        from rove.data.lerobot_reader import LeRobotRecording
        from rove.data.libero_files import LiberoRecording

    if not path.exists():
        raise RoveError(f"There is nothing at {path}: name a LeRobot data set, or LIBERO's .hdf5 files.")
    if path.is_dir() and (path / "meta").is_dir():
        return LeRobotRecording(path)
    files = sorted(path.glob("*.hdf5")) if path.is_dir() else [path]
    if files and all(file.suffix in (".hdf5", ".h5") for file in files):
        return LiberoRecording(path, files)
    raise RoveError(
        f"{path} is no data set that Rove reads: expected a LeRobot folder, with meta/info.json in it, or "
        "LIBERO's .hdf5 files."
    )


def feature(recording: Recording, name: str) -> Feature:
    """The feature of that name. Raises RoveError where there is none."""
    if name not in recording.features:
        raise RoveError(
            f"{recording.where} has no feature {name!r}. {nearest(name, recording.features)} rove data show "
            "lists what it has."
        )
    return recording.features[name]


def numbers(recording: Recording, name: str) -> Feature:
    """The feature of that name, which is numbers. Raises RoveError where it is none, or not there."""
    found = feature(recording, name)
    if found.dtype not in NUMBERS:
        kind = "pictures" if found.camera else f"of a kind that Rove does not read, {found.dtype!r}"
        raise RoveError(f"{name!r} of {recording.where} is {kind}: name one that is numbers.")
    return found
