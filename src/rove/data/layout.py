"""LeRobot's data set layout v3.0: names of files and of columns, and the small files of its meta folder.

Source: lerobot 0.6.1, lerobot/datasets/utils.py, dataset_metadata.py and dataset_writer.py.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rove.errors import RoveError

VERSION = "v3.0"
INFO = Path("meta/info.json")
STATS = Path("meta/stats.json")
TASKS = Path("meta/tasks.parquet")
ABOUT = Path("meta/rove.json")
"""Rove's own file: what LeRobot's layout has no place for. LeRobot does not look at it."""
EPISODES = "meta/episodes/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
DATA = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
VIDEO = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
FILES = 1000
"""Files in a chunk, at most."""
SUCCESS = "success"
"""Column of the episodes, Rove's own: whether it succeeded, null where nobody said."""
COUNTED: dict[str, dict[str, Any]] = {
    "timestamp": {"dtype": "float32", "shape": [1], "names": None},
    "frame_index": {"dtype": "int64", "shape": [1], "names": None},
    "episode_index": {"dtype": "int64", "shape": [1], "names": None},
    "index": {"dtype": "int64", "shape": [1], "names": None},
    "task_index": {"dtype": "int64", "shape": [1], "names": None},
}
"""Features that every data set has beside its own."""


def place(episode: int) -> dict[str, int]:
    """Indices of chunk and file of an episode that has files of its own."""
    return {"chunk_index": episode // FILES, "file_index": episode % FILES}


def replace_file(path: Path, draft: Path) -> None:
    """Put a file that is whole, `draft`, in the place of `path`, on the disk before this returns."""
    with draft.open("rb") as file:
        os.fsync(file.fileno())
    path.parent.mkdir(parents=True, exist_ok=True)
    draft.replace(path)


def write_json(path: Path, content: Any) -> None:
    """Write JSON as LeRobot does, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.draft")
    draft.write_text(json.dumps(content, indent=4, ensure_ascii=False))
    replace_file(path, draft)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises RoveError where the file is missing or holds something else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RoveError(f"{path} cannot be read: {error.strerror}. Get the data set again.") from error
    except (ValueError, RecursionError) as error:
        raise RoveError(f"{path} is damaged ({error}): get the data set again.") from error
    if not isinstance(found, dict):
        raise RoveError(f"{path} is damaged (it holds no object): get the data set again.")
    return found


def write_table(path: Path, table: pa.Table) -> None:
    """Write a parquet file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.draft")
    pq.write_table(table, draft, compression="snappy")
    replace_file(path, draft)


def read_table(path: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """Read a parquet file. Raises RoveError where it is missing or damaged, or lacks one of the columns."""
    if not path.is_file():
        raise RoveError(f"{path} is missing: get the data set again, with all of its files.")
    try:
        with pq.ParquetFile(path) as file:
            if lacking := set(columns or ()) - set(file.schema_arrow.names):
                raise RoveError(f"{path} lacks the column {min(lacking)!r}: get the data set again.")
            return file.read(columns)
    except (pa.ArrowException, OSError) as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        raise RoveError(f"{path} is damaged ({reason}): get the data set again.") from error


def tasks_table(tasks: Sequence[str]) -> pa.Table:
    """Tasks in the order of their index, with the sentence as pandas' index, which LeRobot looks up."""
    table = pa.table(
        {"task_index": pa.array(range(len(tasks)), pa.int64()), "task": pa.array(tasks, pa.string())}
    )

    def column(name: str, kind: str, numpy: str) -> dict[str, Any]:
        return {"name": name, "field_name": name, "pandas_type": kind, "numpy_type": numpy, "metadata": None}

    pandas = {
        "index_columns": ["task"],
        "column_indexes": [{**column("", "unicode", "object"), "name": None, "field_name": None}],
        "columns": [column("task_index", "int64", "int64"), column("task", "unicode", "object")],
        "creator": {"library": "pyarrow", "version": pa.__version__},
        "pandas_version": "2.0.0",
    }
    return table.replace_schema_metadata({b"pandas": json.dumps(pandas).encode()})


def column(feature: Mapping[str, Any], values: Any) -> pa.Array:
    """A column of a data file, as LeRobot types it: scalars for shape [1], else lists of a fixed size."""
    kind = pa.from_numpy_dtype(feature["dtype"])
    (size,) = feature["shape"]
    flat = pa.array(values.reshape(-1), kind)
    return flat if size == 1 else pa.FixedSizeListArray.from_arrays(flat, size)
