"""Reads data sets in LeRobot's layouts v3.0 and v2.1."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image, UnidentifiedImageError

from rove.data import layout, video
from rove.data.recording import NUMBERS, Episode, Feature, Roles, feature
from rove.errors import RoveError

_SUCCESS = "next.success"
"""LeRobot's own feature of a frame after which the task is done."""


class LeRobotRecording:
    """A `Recording` of a LeRobot data set; one data file at a time is kept in memory."""

    def __init__(self, folder: Path) -> None:
        """Read what `folder` holds. Raises RoveError where it is of another version, or its meta files are
        missing or damaged."""
        self.where = folder
        info = self._info = layout.read_json(folder / layout.INFO)
        version = info.get("codebase_version")
        if version not in (layout.VERSION, "v2.1"):
            raise RoveError(f"{folder / layout.INFO}: codebase_version = {version!r}. {_other(version)}")
        self.layout = f"LeRobot {version}"
        try:
            self.fps: float | None = float(info["fps"])
            self.features: Mapping[str, Feature] = {
                name: _feature(found) for name, found in info["features"].items()
            }
            files = (
                _FilesV3(folder, info, self._cameras())
                if version == layout.VERSION
                else _FilesV2(folder, info)
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            if isinstance(error, RoveError):
                raise
            raise RoveError(
                f"{folder / layout.INFO} is damaged ({error!r}): get the data set again."
            ) from error
        self._files = files
        self.lengths = tuple(files.lengths)
        total = info.get("total_episodes")
        if total != len(self.lengths):
            raise RoveError(
                f"{folder / layout.INFO} counts {total} episodes, and meta/ describes {len(self.lengths)}: "
                "the data set is not complete; get it again."
            )
        self.roles = Roles(self._cameras(), self._first("observation.state", "state"), self._action())
        about = folder / layout.ABOUT
        self.about: Mapping[str, Any] = layout.read_json(about) if about.is_file() else {}
        self._kept: tuple[Path, pa.Table] | None = None

    def _cameras(self) -> tuple[str, ...]:
        return tuple(name for name, found in self.features.items() if found.camera)

    def _first(self, *names: str) -> tuple[str, ...]:
        return next(((name,) for name in names if name in self.features), ())

    def _action(self) -> str:
        return next(iter(self._first("action", "actions")), "action")

    def check(self, names: Sequence[str]) -> None:
        """See `Recording.check`."""
        films = [name for name in names if feature(self, name).dtype == "video"]
        for index in range(len(self.lengths)):
            for path in (self._files.data(index), *(self._files.video(index, name)[0] for name in films)):
                if not path.is_file():
                    raise RoveError(
                        f"{path} is missing: get the data set again, with all of its files (of one that was "
                        "cloned by git: git lfs pull)."
                    )

    def episode(self, index: int) -> Episode:
        """Read an episode; see `Recording.episode`."""
        table, path = self._table(index)
        columns = {}
        for name, found in self.features.items():
            if found.dtype in NUMBERS:
                columns[name] = _numbers(table[name], found, path, name)
        tasks = [self._files.tasks.get(number) for number in columns["task_index"].reshape(-1).tolist()]
        if None in tasks:
            raise RoveError(f"{path} names a task that meta/ does not list: get the data set again.")
        success = self._files.success[index]
        if success is None and _SUCCESS in columns:
            success = bool(columns[_SUCCESS].any())
        return Episode(columns, tuple(str(task) for task in tasks), success)

    def pictures(self, index: int, name: str) -> Iterator[np.ndarray]:
        """Read pictures; see `Recording.pictures`."""
        table, path = self._table(index)
        if feature(self, name).dtype == "image":
            for cell in table[name].to_pylist():
                yield _decoded(cell, path, self.where)
            return
        times = np.asarray(table["timestamp"].to_numpy(), np.float64)
        film, start = self._files.video(index, name)
        yield from video.read_video(film, (start + times).tolist())

    def _table(self, index: int) -> tuple[pa.Table, Path]:
        """The rows of an episode, and the file that they are from."""
        path = self._files.data(index)
        if self._kept is None or self._kept[0] != path:
            needed = [name for name, found in self.features.items() if found.dtype in (*NUMBERS, "image")]
            self._kept = path, layout.read_table(path, needed)
        table = self._kept[1]
        rows = np.flatnonzero(table["episode_index"].to_numpy() == index)
        if len(rows) != self.lengths[index]:
            raise RoveError(
                f"{path} has {len(rows)} frames of episode {index}, and meta/ counts {self.lengths[index]}: "
                "get the data set again."
            )
        return table.take(rows), path


class _FilesV3:
    """Where the episodes of a v3.0 data set are: many share a file."""

    def __init__(self, folder: Path, info: Mapping[str, Any], cameras: tuple[str, ...]) -> None:
        self._folder, self._info = folder, info
        films = [name for name in cameras if info["features"][name]["dtype"] == "video"]
        columns = ["episode_index", "length", "data/chunk_index", "data/file_index"]
        for name in films:
            columns += [f"videos/{name}/{key}" for key in ("chunk_index", "file_index", "from_timestamp")]
        rows = []
        for path in sorted((folder / "meta" / "episodes").glob("*/*.parquet")):
            table = layout.read_table(path)
            wanted = [name for name in (*columns, layout.SUCCESS) if name in table.column_names]
            if lacking := set(columns) - set(wanted):
                raise RoveError(f"{path} lacks the column {min(lacking)!r}: get the data set again.")
            rows += table.select(wanted).to_pylist()
        rows.sort(key=lambda row: row["episode_index"])
        # What was cut off before it counted is left to whoever recorded it.
        self._rows = rows[: info["total_episodes"]]
        self.lengths = [row["length"] for row in self._rows]
        self.success = [row.get(layout.SUCCESS) for row in self._rows]
        self.tasks: dict[int, str] = {}
        if rows:
            table = layout.read_table(folder / layout.TASKS)
            sentence = next(name for name in table.column_names if name != "task_index")
            self.tasks = dict(zip(table["task_index"].to_pylist(), table[sentence].to_pylist(), strict=True))

    def data(self, index: int) -> Path:
        row = self._rows[index]
        return self._folder / self._info["data_path"].format(
            chunk_index=row["data/chunk_index"], file_index=row["data/file_index"]
        )

    def video(self, index: int, name: str) -> tuple[Path, float]:
        """The file, and the second of it at which the episode begins."""
        row, at = self._rows[index], f"videos/{name}"
        path = self._info["video_path"].format(
            video_key=name, chunk_index=row[f"{at}/chunk_index"], file_index=row[f"{at}/file_index"]
        )
        return self._folder / path, row[f"{at}/from_timestamp"]


class _FilesV2:
    """Where the episodes of a v2.1 data set are: each has files of its own."""

    def __init__(self, folder: Path, info: Mapping[str, Any]) -> None:
        self._folder, self._info = folder, info
        rows = sorted(_lines(folder / "meta/episodes.jsonl"), key=lambda row: row["episode_index"])
        self.lengths = [row["length"] for row in rows]
        self.success: list[bool | None] = [None] * len(rows)
        self.tasks = {row["task_index"]: row["task"] for row in _lines(folder / "meta/tasks.jsonl")}

    def data(self, index: int) -> Path:
        return self._folder / self._info["data_path"].format(
            episode_chunk=index // self._info["chunks_size"], episode_index=index
        )

    def video(self, index: int, name: str) -> tuple[Path, float]:
        path = self._info["video_path"].format(
            episode_chunk=index // self._info["chunks_size"], episode_index=index, video_key=name
        )
        return self._folder / path, 0.0


def _other(version: Any) -> str:
    """What to do about a version that is not read."""
    match = re.fullmatch(r"v(\d+)\.(\d+)", str(version))
    if match and (int(match[1]), int(match[2])) > (3, 0):
        return "It is newer than what Rove reads (v3.0, v2.1): update Rove."
    if match:
        return "Rove reads v3.0 and v2.1: convert it with LeRobot's own converter first."
    return "Rove reads v3.0 and v2.1: get the data set again."


def _feature(found: Mapping[str, Any]) -> Feature:
    """A feature as info.json describes it; names that are in dicts or lists of lists come one after the
    other."""
    shape, dtype = tuple(found["shape"]), found["dtype"]
    if dtype in ("video", "image") and len(shape) == 3 and shape[0] == 3 and shape[2] != 3:
        shape = (*shape[1:], 3)
    return Feature(dtype, shape, tuple(_flat(found.get("names"))))


def _flat(names: Any) -> Iterator[str]:
    if isinstance(names, Mapping):
        names = list(names.values())
    if isinstance(names, list):
        for name in names:
            yield from _flat(name)
    elif names is not None:
        yield str(names)


def _lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file with one a line."""
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except OSError as error:
        raise RoveError(f"{path} cannot be read: {error.strerror}. Get the data set again.") from error
    except ValueError as error:
        raise RoveError(f"{path} is damaged ({error}): get the data set again.") from error


def _numbers(column: pa.ChunkedArray, found: Feature, path: Path, name: str) -> np.ndarray:
    """A column as [T, *shape]. Raises RoveError where it is not what info.json says."""
    rows = column.combine_chunks()
    while pa.types.is_list(rows.type) or pa.types.is_fixed_size_list(rows.type):
        rows = rows.flatten()
    try:
        return np.asarray(rows.to_numpy(zero_copy_only=False), found.dtype).reshape(len(column), *found.shape)
    except (TypeError, ValueError) as error:
        raise RoveError(
            f"{path}: the column {name!r} ({column.type}) is not what meta/info.json says, {found.dtype} "
            f"{list(found.shape)}: get the data set again."
        ) from error


def _decoded(cell: Any, path: Path, folder: Path) -> np.ndarray:
    """A picture that a data file holds, or names."""
    try:
        content = cell["bytes"]
        if content is None:
            content = (folder / cell["path"]).read_bytes()
        return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
    except (TypeError, KeyError, OSError, UnidentifiedImageError) as error:
        raise RoveError(f"{path} has a picture that is damaged ({error}): get the data set again.") from error
