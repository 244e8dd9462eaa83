"""Reads LIBERO's own demonstrations: HDF5 files, one a task.

Of each frame the actions are those of the suite; the pictures are stored upside down and are turned by 180°,
as the suite and published checkpoints have them. Source: LIBERO's scripts/create_dataset.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from rove.data.recording import Episode, Feature, Roles, feature
from rove.errors import RoveError

_CAMERAS = ("agentview_rgb", "eye_in_hand_rgb")
_STATE = ("ee_states", "gripper_states")
"""Position and axis-angle of the hand, 6, and its two fingers': the suite's 8 numbers."""


class LiberoRecording:
    """A `Recording` of HDF5 files of LIBERO."""

    layout = "LIBERO HDF5"
    fps: float | None = 20.0
    """LIBERO's control rate, which its files do not repeat."""
    about: Mapping[str, Any] = {}

    def __init__(self, where: Path, files: Sequence[Path]) -> None:
        """Read what the files hold. Raises RoveError where one is damaged or holds something else."""
        self.where = where
        self._demos: list[tuple[Path, str, str]] = []
        lengths = []
        for path in files:
            with _opened(path) as file:
                task, data = _task(path, file), file["data"]
                for name in sorted(data, key=lambda name: int(name.removeprefix("demo_"))):
                    self._demos.append((path, name, task))
                    lengths.append(len(data[name]["actions"]))
        if not lengths:
            raise RoveError(f"{where} has no demonstrations in it: get it again.")
        self.lengths = tuple(lengths)
        path, name, _ = self._demos[0]
        with _opened(path) as file:
            demo = file["data"][name]
            found = {"actions": _feature(demo["actions"])}
            found |= {name: _feature(values) for name, values in demo["obs"].items()}
        self.features: Mapping[str, Feature] = found
        cameras = tuple(name for name in _CAMERAS if name in found)
        self.roles = Roles(cameras, tuple(name for name in _STATE if name in found), "actions")

    def check(self, names: Sequence[str]) -> None:
        """See `Recording.check`: the files are there, or they would not have been opened, so this compares
        the number of pictures with that of actions."""
        for (path, demo, _), length in zip(self._demos, self.lengths, strict=True):
            with _opened(path) as file:
                for name in names:
                    _check_length(path, f"{demo}/obs/{name}", file["data"][demo]["obs"][name], length)

    def episode(self, index: int) -> Episode:
        """Read a demonstration, which succeeded; see `Recording.episode`."""
        path, name, task = self._demos[index]
        with _opened(path) as file:
            demo = file["data"][name]
            columns = {"actions": demo["actions"][()]}
            for key, found in self.features.items():
                if not found.camera and key != "actions":
                    columns[key] = demo["obs"][key][()]
                    _check_length(path, f"{name}/obs/{key}", columns[key], self.lengths[index])
        return Episode(columns, (task,) * self.lengths[index], True)

    def pictures(self, index: int, name: str) -> Iterator[np.ndarray]:
        """Read pictures, turned by 180°; see `Recording.pictures`."""
        feature(self, name)
        path, demo, _ = self._demos[index]
        with _opened(path) as file:
            for picture in file["data"][demo]["obs"][name]:
                yield picture[::-1, ::-1]


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A file to read from, of which every error names the file."""
    try:
        with h5py.File(path, "r") as file:
            yield file
    except RoveError:
        raise
    except (KeyError, OSError, RuntimeError, TypeError, ValueError, AttributeError) as error:
        raise RoveError(
            f"{path} is damaged, or holds something else than LIBERO's demonstrations ({error}): get it "
            "again."
        ) from error


def _check_length(path: Path, name: str, values: Any, length: int) -> None:
    if len(values) != length:
        raise RoveError(f"{path} has {length} actions, and {len(values)} frames of {name}: get it again.")


def _task(path: Path, file: Any) -> str:
    """The instruction of a file's task."""
    words = json.loads(file["data"].attrs["problem_info"])["language_instruction"]
    text = "".join(words).strip().strip('"')  # some files have it as a list of letters
    if not text:
        raise RoveError(f"{path} names no instruction in data's problem_info: get it again.")
    return text


def _feature(values: Any) -> Feature:
    shape = tuple(values.shape[1:])
    camera = values.dtype == np.uint8 and len(shape) == 3 and shape[2] == 3
    return Feature("image" if camera else values.dtype.name, shape)
