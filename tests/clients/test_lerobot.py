"""LeRobot itself and Rove read each other's data sets, frame by frame.

A data set that LeRobot 0.6.1 wrote is kept beside this file, so that reading it needs no LeRobot. The other
direction runs where `LEROBOT_PYTHON` names the interpreter of an environment that has it: `make
test-lerobot`.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from tests.clients.frames import CAMERAS, FEATURES, FPS, LENGTHS, TASKS, frame

from rove.data.lerobot import Writer
from rove.data.recording import Recording, open_recording

HERE = Path(__file__).parent
KEPT = HERE / "written_by_lerobot"
PYTHON = os.environ.get("LEROBOT_PYTHON")
NUMBERS = [name for name in FEATURES if name not in CAMERAS]
there = pytest.mark.skipif(not PYTHON, reason="needs LeRobot in an environment of its own: make test-lerobot")


def write(folder: Path) -> Path:
    with Writer(folder, fps=FPS, features=FEATURES, robot_type="test") as writer:
        for episode, length in enumerate(LENGTHS):
            for number in range(length):
                writer.add(frame(episode, number), TASKS[episode])
            writer.end_episode((True, None)[episode])
    return folder


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("data") / "ours")


def with_lerobot(*words: str | Path) -> None:
    assert PYTHON is not None
    quiet = {"HF_HUB_OFFLINE": "1", "SVT_LOG": "1", "HF_HOME": str(Path(words[1]).parent / "cache")}
    command = [PYTHON, str(HERE / "with_lerobot.py"), *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | quiet)
    assert done.returncode == 0, done.stderr


def check_frames(recording: Recording) -> None:
    """Every number is exact, every picture as near as a video keeps it: nearer than to any other frame."""
    assert recording.lengths == LENGTHS and recording.fps == FPS
    for episode, length in enumerate(LENGTHS):
        read = recording.episode(episode)
        assert read.tasks == (TASKS[episode],) * length
        wanted = [frame(episode, number) for number in range(length)]
        for name in NUMBERS:
            np.testing.assert_array_equal(read.columns[name], [each[name] for each in wanted])
            assert read.columns[name].dtype == FEATURES[name]["dtype"]
        for name in CAMERAS:
            check_pictures(list(recording.pictures(episode, name)), [each[name] for each in wanted])


def check_pictures(found: list[np.ndarray], wanted: list[np.ndarray]) -> None:
    assert len(found) == len(wanted)
    for at, picture in enumerate(found):
        apart = [np.abs(picture.astype(int) - each).mean() for each in wanted]
        assert apart[at] < 3 and np.argmin(apart) == at


def test_what_lerobot_wrote_is_read_frame_by_frame() -> None:
    recording = open_recording(KEPT)
    assert recording.roles.images == CAMERAS and recording.roles.state == ("observation.state",)
    assert recording.features["action"].names == ("x", "y", "gripper")
    check_frames(recording)


def test_what_rove_wrote_is_read_frame_by_frame(ours: Path) -> None:
    recording = open_recording(ours)
    check_frames(recording)
    assert [recording.episode(i).success for i in range(2)] == [True, None]


def test_rove_writes_the_columns_that_lerobot_writes(ours: Path) -> None:
    """Names and types; the success of an episode is Rove's own."""
    for part in ("data", "meta/episodes"):
        one, other = (
            {field.name: field.type for field in pq.read_schema(next((at / part).glob("*/*.parquet")))}
            for at in (ours, KEPT)
        )
        assert one.keys() - other.keys() <= {"success"}
        assert other.keys() <= one.keys()
        # A list of a fixed size is called so in the layout, and read as a list either way.
        assert {n: str(t).replace("element", "item") for n, t in one.items() if n in other} == {
            n: str(t).replace("element", "item") for n, t in other.items()
        }
    tasks = [
        pq.read_schema(at / "meta/tasks.parquet").pandas_metadata["index_columns"] for at in (ours, KEPT)
    ]
    assert tasks[0] == tasks[1] == ["task"]
    info, kept = (json.loads((at / "meta/info.json").read_text()) for at in (ours, KEPT))
    assert info.keys() == kept.keys()
    for name, feature in kept["features"].items():
        mine = info["features"][name]
        assert {**mine, "info": 0} == {**feature, "info": 0}
        assert mine.get("info", {}).keys() <= feature.get("info", {}).keys()


def test_statistics_are_lerobots(ours: Path) -> None:
    one, other = (json.loads((at / "meta/stats.json").read_text()) for at in (ours, KEPT))
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].keys() == other[name].keys()
        for key, value in one[name].items():
            near = 0.03 if name in CAMERAS else 1e-5
            # LeRobot reads quantiles off a histogram, and so in steps.
            spread = np.subtract(one[name]["max"], one[name]["min"]).max()
            slack = 0.35 * spread if key[0] == "q" else near * max(1.0, spread)
            np.testing.assert_allclose(value, other[name][key], atol=slack, err_msg=f"{name} {key}")


@there
def test_lerobot_reads_what_rove_wrote(ours: Path, tmp_path: Path) -> None:
    with_lerobot("read", ours, tmp_path / "read.npz")
    with np.load(tmp_path / "read.npz") as read:
        about = json.loads(str(read["about"]))
        assert about["tasks"] == [TASKS[e] for e, length in enumerate(LENGTHS) for _ in range(length)]
        assert about["success"] == [True, None]
        every = [(e, n) for e, length in enumerate(LENGTHS) for n in range(length)]
        for name in NUMBERS:
            wanted = np.stack([frame(*at)[name] for at in every])
            np.testing.assert_array_equal(read[name].reshape(wanted.shape), wanted)
        np.testing.assert_allclose(
            about["mean"], np.mean([frame(*at)["action"] for at in every], axis=0), rtol=1e-5
        )
        np.testing.assert_array_equal(read["index"], np.arange(len(every)))
        for name in CAMERAS:
            check_pictures(list(read[name][: LENGTHS[0]]), [frame(0, n)[name] for n in range(LENGTHS[0])])
            check_pictures(list(read[name][LENGTHS[0] :]), [frame(1, n)[name] for n in range(LENGTHS[1])])


@there
def test_rove_reads_what_lerobot_writes_there(tmp_path: Path) -> None:
    with_lerobot("write", tmp_path / "theirs")
    check_frames(open_recording(tmp_path / "theirs"))


@there
def test_lerobot_goes_on_with_what_was_recovered(tmp_path: Path) -> None:
    """An episode that was cut off, finished by `recover`, is one to LeRobot like any other."""
    from rove.data.lerobot import recover

    folder = tmp_path / "cut"
    writer = Writer(folder, fps=FPS, features=FEATURES, robot_type="test")
    for number in range(4):
        writer.add(frame(0, number), TASKS[0])
    writer._end_journal()
    writer._lock.close()
    assert recover(folder) == 4
    with_lerobot("read", folder, tmp_path / "read.npz")
    with np.load(tmp_path / "read.npz") as read:
        np.testing.assert_array_equal(read["action"], [frame(0, n)["action"] for n in range(4)])
