"""Writes data sets in LeRobot's layout v3.0, so that a kill or an error at any moment loses no frame."""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np
import pyarrow as pa

from rove.data import layout, statistics, video
from rove.errors import RoveError, nearest

JOURNAL = ".recording"
"""Folder of the episode that is being recorded: raw frames, one file a feature."""
_NUMBERS = ("float32", "float64", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "bool")


class Writer:
    """Records episodes into a folder, frame by frame; LeRobot reads what is finished at any time.

    Each frame goes to the disk as it is given (`JOURNAL`), and becomes part of the data set when its episode
    ends: then its numbers go into a parquet file and its pictures into videos, one a camera, each written
    whole beside its place and put there, and `meta/info.json` counts them last. An episode that was cut off
    by a kill or an error, in the middle of a frame or of that, is found and finished by the next writer that
    opens the folder, its success not known. A process that is killed loses nothing, a machine that loses its
    power what its disk had not yet written of the episode under way.
    """

    def __init__(
        self,
        folder: Path | str,
        *,
        fps: int,
        features: Mapping[str, Mapping[str, Any]],
        robot_type: str = "unknown",
        about: Mapping[str, Any] | None = None,
    ) -> None:
        """Open a new data set, or go on with one of the same features.

        `features` are LeRobot's: name -> {"dtype", "shape", "names"}; dtype "video" with shape [height,
        width, 3] for pictures, else a NumPy number and [size]. `about` is kept in `meta/rove.json`; an import
        reads "action_spec" there. Raises RoveError where a feature cannot be recorded, the folder holds
        something else, or another process writes to it.
        """
        self.folder = Path(folder)
        self.features = {name: _checked(name, feature) for name, feature in features.items()}
        if fps != int(fps) or fps < 1:
            raise RoveError(f"fps = {fps}: LeRobot counts whole frames a second; record at 1 or more.")
        self.fps, self._robot_type = int(fps), robot_type
        self._files: dict[str, BinaryIO] = {}
        self._lock = _locked(self.folder)
        try:
            self._open(dict(about or {}))
        except BaseException:  # an interrupt too: nobody else could let go of the folder
            self._lock.close()
            raise

    @property
    def episodes(self) -> int:
        """Number of episodes that are finished."""
        return self._info["total_episodes"]

    def add(self, frame: Mapping[str, np.ndarray], task: str) -> None:
        """Record one frame: every feature, and the instruction that holds at that moment.

        Raises RoveError where a feature is missing, unknown, or of another type or shape; nothing of the
        frame is recorded then.
        """
        if not isinstance(task, str) or not task.strip():
            raise RoveError(f"The task of a frame is {task!r}: give the instruction as text.")
        if unlike := frame.keys() ^ self.features.keys():
            name = min(unlike)
            raise RoveError(
                f"The frame lacks the feature {name!r}: every frame has all of them."
                if name in self.features
                else f"The frame has {name!r}, which is no feature here. {nearest(name, self.features)}"
            )
        values = {name: _value(name, frame[name], self.features[name]) for name in self.features}
        if not self._files:
            self._begin()
        try:
            for name, value in values.items():
                self._files[name].write(value.tobytes())
            # The task last: a frame without one was cut off.
            self._files[""].write(json.dumps(task, ensure_ascii=False).encode() + b"\n")
            for file in self._files.values():
                file.flush()
        except OSError as error:
            self._end_journal()
            raise RoveError(
                f"{self.folder} cannot be written: {error.strerror}. What was recorded until here is kept; "
                "the next recording into the same folder finishes it."
            ) from error

    def end_episode(self, success: bool | None) -> None:
        """Finish the episode and put it into the data set; nothing where no frame was added to it.

        This encodes its videos. Raises RoveError where that fails; its frames are kept, see the class.
        """
        self._end_journal()
        self._finish(success)

    def close(self) -> None:
        """Finish an episode that is under way, its success not known, and let go of the folder."""
        if self._lock.closed:
            return
        try:
            self.end_episode(None)
        finally:
            self._lock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # --- the journal ------------------------------------------------------------------------------

    def _begin(self) -> None:
        journal = self.folder / JOURNAL
        self._finish(None)  # what an error left there
        journal.mkdir()
        (journal / "episode.json").write_text(json.dumps({"episode": self.episodes}))
        self._files = {name: (journal / _file(name)).open("wb") for name in (*self.features, "")}

    def _end_journal(self) -> None:
        for file in self._files.values():
            # Of a full disk: what it did not take is of a frame that does not count.
            with suppress(OSError):
                file.close()
        self._files = {}

    def _recorded(self) -> tuple[list[str], dict[str, np.ndarray]] | None:
        """Tasks and values [T, *shape] of the frames in the journal that are whole; None where there are
        none, or where they are in the data set already."""
        journal = self.folder / JOURNAL
        try:
            begun = json.loads((journal / "episode.json").read_text())["episode"]
            *tasks, _ = (journal / _file("")).read_bytes().split(b"\n")
        except (OSError, ValueError):  # killed before the first frame
            return None
        sizes = {name: _bytes(feature) for name, feature in self.features.items()}
        counts = [(journal / _file(name)).stat().st_size // size for name, size in sizes.items()]
        count = min(len(tasks), *counts)
        if not count or begun != self.episodes:
            return None
        values: dict[str, np.ndarray] = {
            name: np.memmap(journal / _file(name), _dtype(feature), "r", shape=(count, *feature["shape"]))
            for name, feature in self.features.items()
        }
        return [json.loads(task) for task in tasks[:count]], values

    # --- the data set -----------------------------------------------------------------------------

    def _finish(self, success: bool | None) -> None:
        """Put the journal's episode into the data set, and delete the journal. Raises as `end_episode`
        does."""
        journal = self.folder / JOURNAL
        if not journal.exists():
            return
        try:
            if (recorded := self._recorded()) is not None:
                self._write_episode(*recorded, success)
            shutil.rmtree(journal)
        except (OSError, pa.ArrowException, video.EncodingError) as error:
            raise RoveError(
                f"The episode could not be written to {self.folder}: {error}. Its frames are kept in "
                f"{journal}; the next recording into the same folder finishes it."
            ) from error

    def _write_episode(
        self, tasks: Sequence[str], values: Mapping[str, np.ndarray], success: bool | None
    ) -> None:
        number, count, before = self.episodes, len(tasks), self._info["total_frames"]
        known = [*dict.fromkeys((*self._tasks, *tasks))]
        counted = {
            "timestamp": (np.arange(count) / self.fps).astype(np.float32),
            "frame_index": np.arange(count),
            "episode_index": np.full(count, number),
            "index": before + np.arange(count),
            "task_index": np.array([known.index(task) for task in tasks]),
        }
        at = layout.place(number)
        numbers = {
            name: value for name, value in values.items() if not _is_video(self.features[name])
        } | counted
        kinds = self.features | layout.COUNTED
        table = pa.table({name: layout.column(kinds[name], value) for name, value in numbers.items()})
        layout.write_table(self.folder / layout.DATA.format(**at), table)
        found = {name: statistics.of_numbers(value) for name, value in numbers.items()}
        row: dict[str, Any] = {
            "episode_index": number, "tasks": [*dict.fromkeys(tasks)], "length": count,
            "data/chunk_index": at["chunk_index"], "data/file_index": at["file_index"],
            "dataset_from_index": before, "dataset_to_index": before + count, layout.SUCCESS: success,
            "meta/episodes/chunk_index": at["chunk_index"], "meta/episodes/file_index": at["file_index"],
        }  # fmt: skip
        for name, frames in values.items():
            if _is_video(self.features[name]):
                path = self.folder / layout.VIDEO.format(video_key=name, **at)
                path.parent.mkdir(parents=True, exist_ok=True)
                draft = path.with_name(f".{path.name}.draft")
                video.write_video(draft, frames, frames.shape[1:3], self.fps)
                layout.replace_file(path, draft)
                found[name] = statistics.of_pictures(frames)
                row |= {f"videos/{name}/{key}": value for key, value in at.items()}
                row |= {f"videos/{name}/from_timestamp": 0.0, f"videos/{name}/to_timestamp": count / self.fps}
        for name, each in statistics.plain(found).items():
            row |= {f"stats/{name}/{key}": value for key, value in each.items()}
        layout.write_table(self.folder / layout.TASKS, layout.tasks_table(known))
        layout.write_table(self.folder / layout.EPISODES.format(**at), _row(row))
        every = [*self._statistics, found]
        all_of_it = {name: statistics.together([each[name] for each in every]) for name in found}
        layout.write_json(self.folder / layout.STATS, statistics.plain(all_of_it))
        info = self._info | {
            "total_episodes": number + 1, "total_frames": before + count, "total_tasks": len(known),
            "splits": {"train": f"0:{number + 1}"},
        }  # fmt: skip
        layout.write_json(self.folder / layout.INFO, info)  # from here on the episode counts
        self._info, self._tasks, self._statistics = info, known, every

    def _open(self, about: dict[str, Any]) -> None:
        """Begin the data set, or read how far it is; finish what was cut off."""
        self._tasks: list[str] = []
        self._statistics: list[dict[str, statistics.Statistics]] = []
        new = self._new_info()
        if (self.folder / layout.INFO).exists():
            self._info = layout.read_json(self.folder / layout.INFO)
            self._check_same(new)
            if self.episodes:
                tasks = layout.read_table(self.folder / layout.TASKS, ("task_index", "task"))
                self._tasks = tasks.sort_by("task_index")["task"].to_pylist()
                self._statistics = [self._statistics_of(number) for number in range(self.episodes)]
        else:
            if there := sorted(path.name for path in self.folder.iterdir() if path.name != JOURNAL + ".lock"):
                raise RoveError(
                    f"{self.folder} is no data set, and is not empty ({there[0]}): name a new folder."
                )
            if about:
                layout.write_json(self.folder / layout.ABOUT, about)
            layout.write_json(self.folder / layout.INFO, new)
            self._info = new
        self._finish(None)

    def _new_info(self) -> dict[str, Any]:
        features = {}
        for name, feature in self.features.items():
            kept = {"dtype": feature["dtype"], "shape": list(feature["shape"]), "names": feature["names"]}
            if _is_video(feature):
                kept["info"] = video.info(feature["shape"][:2], self.fps)
            features[name] = kept
        return {
            "codebase_version": layout.VERSION, "robot_type": self._robot_type, "total_episodes": 0,
            "total_frames": 0, "total_tasks": 0, "chunks_size": layout.FILES, "data_files_size_in_mb": 100,
            "video_files_size_in_mb": 200, "fps": self.fps, "splits": {"train": "0:0"},
            "data_path": layout.DATA, "video_path": layout.VIDEO, "features": features | layout.COUNTED,
        }  # fmt: skip

    def _check_same(self, new: Mapping[str, Any]) -> None:
        for name in ("codebase_version", "fps", "robot_type", "data_path", "video_path", "features"):
            if self._info.get(name) != new[name]:
                raise RoveError(
                    f"{self.folder} holds a data set with {name} = {self._info.get(name)!r:.200}, not "
                    f"{new[name]!r:.200}: record into a new folder."
                )

    def _statistics_of(self, number: int) -> dict[str, statistics.Statistics]:
        row = layout.read_table(self.folder / layout.EPISODES.format(**layout.place(number))).to_pylist()[0]
        found: dict[str, statistics.Statistics] = {name: {} for name in (*self.features, *layout.COUNTED)}
        for column, value in row.items():
            if column.startswith("stats/"):
                _, name, key = column.split("/")
                found[name][key] = np.array(value)
        return found


def _locked(folder: Path) -> BinaryIO:
    """Make the folder, and keep other writers from it until the file is closed."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / f"{JOURNAL}.lock").open("ab")
    except OSError as error:
        raise RoveError(f"{folder} cannot be written: {error.strerror}. Name another folder.") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        lock.close()
        raise RoveError(
            f"Another process is recording into {folder}: wait until it has ended, or name another folder."
        ) from error
    return lock


def _checked(name: str, feature: Mapping[str, Any]) -> dict[str, Any]:
    """A feature as it is kept. Raises RoveError where it cannot be recorded."""
    if "/" in name or not name or name in layout.COUNTED:
        raise RoveError(
            f"No feature can be called {name!r}: LeRobot takes names without '/', and counts itself."
        )
    dtype, shape = feature["dtype"], tuple(int(size) for size in feature["shape"])
    if dtype == "video":
        if len(shape) != 3 or shape[2] != 3 or shape[0] % 2 or shape[1] % 2 or not all(shape):
            raise RoveError(
                f"The video {name!r} has shape {list(shape)}: expected [height, width, 3] with an even "
                "height and width, which its codec needs."
            )
        names = feature.get("names") or ["height", "width", "channels"]
    elif dtype not in _NUMBERS or len(shape) != 1 or shape[0] < 1:
        raise RoveError(
            f"The feature {name!r} has dtype {dtype!r} and shape {list(shape)}: expected a vector, [size], "
            f"of one of {', '.join(_NUMBERS)}, or a video."
        )
    else:
        names = feature.get("names")
    if names is not None and not _is_video({"dtype": dtype}) and len(names) != shape[0]:
        raise RoveError(f"The feature {name!r} has {shape[0]} dimensions, but {len(names)} names.")
    return {"dtype": dtype, "shape": shape, "names": None if names is None else list(names)}


def _is_video(feature: Mapping[str, Any]) -> bool:
    return feature["dtype"] == "video"


def _dtype(feature: Mapping[str, Any]) -> np.dtype:
    return np.dtype(np.uint8 if _is_video(feature) else feature["dtype"])


def _bytes(feature: Mapping[str, Any]) -> int:
    return _dtype(feature).itemsize * int(np.prod(feature["shape"]))


def _value(name: str, value: Any, feature: Mapping[str, Any]) -> np.ndarray:
    """A frame's value as it is kept; numbers of another size of the same kind are converted."""
    array, wanted = np.asarray(value), _dtype(feature)
    if array.shape == () and feature["shape"] == (1,):
        array = array[None]
    if array.shape != feature["shape"] or not np.can_cast(array.dtype, wanted, "same_kind"):
        raise RoveError(
            f"The frame's {name!r} is {array.dtype} {list(array.shape)}: expected {wanted} "
            f"{list(feature['shape'])}."
        )
    return np.ascontiguousarray(array, wanted)


def _file(name: str) -> str:
    """Name of a feature's file in the journal; of the tasks' for ""."""
    return f"{name}.raw" if name else "tasks.jsonl"


def _row(row: Mapping[str, Any]) -> pa.Table:
    """One episode, with a type also where its success is not known."""
    table = pa.Table.from_pylist([dict(row)])
    at = table.schema.get_field_index(layout.SUCCESS)
    return table.set_column(at, layout.SUCCESS, pa.array([row[layout.SUCCESS]], pa.bool_()))


def recover(folder: Path) -> int:
    """Finish an episode that was cut off in a data set that `Writer` wrote: the number of its frames, 0 where
    there is none. Raises RoveError where `folder` is no such data set, or is being recorded into."""
    info = layout.read_json(folder / layout.INFO)
    features = {name: feature for name, feature in info["features"].items() if name not in layout.COUNTED}
    before = info["total_frames"]
    with Writer(folder, fps=info["fps"], features=features, robot_type=info["robot_type"]) as writer:
        return writer._info["total_frames"] - before


def unfinished(folder: Path) -> Iterator[str]:
    """A sentence, with the fix, where an episode was cut off in a data set that `Writer` wrote."""
    if (folder / JOURNAL).is_dir():
        yield f"An episode was cut off there, or is being recorded: rove data recover {folder} finishes it."
