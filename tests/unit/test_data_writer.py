"""Recording: what is refused, what is kept, and that no frame is lost, whatever ends the process when."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rove.data import lerobot, video
from rove.data.lerobot import JOURNAL, Writer, recover
from rove.data.recording import open_recording
from rove.errors import RoveError

FEATURES: dict[str, dict[str, Any]] = {
    "observation.images.front": {"dtype": "video", "shape": (32, 48, 3), "names": None},
    "observation.state": {"dtype": "float32", "shape": (2,), "names": ["x", "y"]},
    "action": {"dtype": "float32", "shape": (1,), "names": None},
}
TASK = "push the button"


def frame(number: int) -> dict[str, np.ndarray]:
    return {
        "observation.images.front": np.full((32, 48, 3), 20 * number, np.uint8),
        "observation.state": np.array([number, -number], np.float32),
        "action": np.array([number / 10], np.float32),
    }


def record(folder: Path, *lengths: int, success: bool | None = True) -> Path:
    with Writer(folder, fps=10, features=FEATURES) as writer:
        for length in lengths:
            for number in range(length):
                writer.add(frame(number), TASK)
            writer.end_episode(success)
    return folder


def held(folder: Path) -> list[tuple[list[float], bool | None]]:
    """Actions and success of every episode; the pictures are compared on the way."""
    recording, found = open_recording(folder), []
    for index, length in enumerate(recording.lengths):
        pictures = list(recording.pictures(index, "observation.images.front"))
        assert [round(picture.mean() / 20) for picture in pictures] == list(range(length))
        episode = recording.episode(index)
        found.append(((10 * episode.columns["action"][:, 0]).round(3).tolist(), episode.success))
    return found


def test_episodes_are_kept_with_their_success_and_more_can_follow(tmp_path: Path) -> None:
    folder = record(tmp_path / "set", 3, 2)
    record(folder, 4, success=False)
    record(folder, 2, success=None)
    assert held(folder) == [([0, 1, 2], True), ([0, 1], True), ([0, 1, 2, 3], False), ([0, 1], None)]
    assert not (folder / JOURNAL).exists()


def test_an_episode_without_frames_is_nothing(tmp_path: Path) -> None:
    with Writer(tmp_path / "set", fps=10, features=FEATURES) as writer:
        writer.end_episode(True)
        assert writer.episodes == 0
    assert held(tmp_path / "set") == []


def test_closing_keeps_the_episode_that_is_under_way(tmp_path: Path) -> None:
    def fails() -> None:
        with Writer(tmp_path / "set", fps=10, features=FEATURES) as writer:
            writer.add(frame(0), TASK)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert held(tmp_path / "set") == [([0], None)]


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {root!r})
from tests.unit.test_data_writer import *
writer = Writer(Path({folder!r}), fps=10, features=FEATURES)
for number in range(3):
    writer.add(frame(number), TASK)
writer.end_episode(True)
for number in range(5):
    writer.add(frame(number), TASK)
die = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
{moment}
writer.end_episode(True)
"""
MOMENTS = {
    "between two frames": "die()",
    "in a frame": "writer._files['action'].write(b'ab'); writer._files['action'].flush(); die()",
    "before its numbers are written": "lerobot.layout.write_table = die",
    "in its video": "lerobot.video.write_video = lambda path, *_: (path.write_bytes(b'half'), die())",
    "before it counts": "lerobot.layout.write_json = die",
    "after it counts": "lerobot.shutil.rmtree = die",
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_kill_loses_no_frame(moment: str, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    root = str(Path(__file__).parents[2])
    code = KILLED.format(root=root, folder=str(folder), moment=MOMENTS[moment])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    counted = moment == "after it counts"
    assert held(folder)[: 1 + counted] == [([0, 1, 2], True), ([0, 1, 2, 3, 4], True)][: 1 + counted]
    assert next(lerobot.unfinished(folder)).endswith("finishes it.")
    assert recover(folder) == (0 if counted else 5)
    assert held(folder) == [([0, 1, 2], True), ([0, 1, 2, 3, 4], True if counted else None)]
    assert recover(folder) == 0
    record(folder, 2)
    assert len(held(folder)) == 3


def test_an_error_while_an_episode_is_written_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = Writer(tmp_path / "set", fps=10, features=FEATURES)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    for number in range(3):
        writer.add(frame(number), TASK)
    with monkeypatch.context() as patch:
        patch.setattr(video, "write_video", full)
        with pytest.raises(RoveError, match=r"No space left on device.*Its frames are kept in"):
            writer.end_episode(True)
    writer.add(frame(0), TASK)  # finishes what is there first
    writer.end_episode(False)
    writer.close()
    assert held(tmp_path / "set") == [([0, 1, 2], None), ([0], False)]


def test_a_full_disk_in_the_middle_of_a_frame_leaves_the_frames_before(tmp_path: Path) -> None:
    """/dev/full refuses what is flushed to it."""
    folder = tmp_path / "set"
    writer = Writer(folder, fps=10, features=FEATURES)
    writer.add(frame(0), TASK)
    writer._files["action"].close()
    writer._files["action"] = open("/dev/full", "wb")  # noqa: SIM115
    with pytest.raises(RoveError, match=r"cannot be written: No space left.*is kept"):
        writer.add(frame(1), TASK)
    writer.close()
    assert held(folder) == [([0], None)]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"action": None}, "lacks the feature 'action'"),
        ({"actoin": np.zeros(1)}, "'actoin', which is no feature here. Did you mean 'action'"),
        ({"action": np.zeros(2)}, r"'action' is float64 \[2\]: expected float32 \[1\]"),
        ({"action": np.array(["x"])}, "'action' is <U1"),
        ({"observation.images.front": np.zeros((32, 48, 3))}, r"float64 \[32, 48, 3\]: expected uint8"),
        ({"observation.images.front": np.zeros((48, 32, 3), np.uint8)}, r"uint8 \[48, 32, 3\]"),
    ],
)
def test_a_frame_of_something_else_is_refused_whole(
    change: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    with Writer(tmp_path / "set", fps=10, features=FEATURES) as writer:
        writer.add(frame(0), TASK)
        wrong = {name: value for name, value in (frame(1) | change).items() if value is not None}
        with pytest.raises(RoveError, match=reason):
            writer.add(wrong, TASK)
        with pytest.raises(RoveError, match="give the instruction as text"):
            writer.add(frame(1), " ")
        writer.add(frame(1), TASK)
        writer.end_episode(True)
    assert held(tmp_path / "set") == [([0, 1], True)]


@pytest.mark.parametrize(
    ("name", "feature", "reason"),
    [
        ("a/b", {"dtype": "float32", "shape": (1,)}, "without '/'"),
        ("index", {"dtype": "int64", "shape": (1,)}, "counts itself"),
        ("film", {"dtype": "video", "shape": (33, 48, 3)}, "even height and width"),
        ("film", {"dtype": "video", "shape": (3, 32, 48)}, r"expected \[height, width, 3\]"),
        ("x", {"dtype": "audio", "shape": (1,)}, "dtype 'audio'"),
        ("x", {"dtype": "float32", "shape": (2, 2)}, r"shape \[2, 2\]"),
        ("x", {"dtype": "float32", "shape": (2,), "names": ["a"]}, "2 dimensions, but 1 names"),
    ],
)
def test_a_feature_that_cannot_be_recorded_is_refused(
    name: str, feature: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    with pytest.raises(RoveError, match=reason):
        Writer(tmp_path / "set", fps=10, features={name: feature})


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(RoveError, match=r"is no data set, and is not empty \(letter.txt\)"):
        Writer(tmp_path, fps=10, features=FEATURES)
    folder = record(tmp_path / "set", 1)
    with pytest.raises(RoveError, match="with fps = 10, not 20: record into a new folder"):
        Writer(folder, fps=20, features=FEATURES)
    with pytest.raises(RoveError, match="with features ="):
        Writer(folder, fps=10, features={"action": FEATURES["action"]})
    with pytest.raises(RoveError, match=r"fps = 0\.5"):
        Writer(tmp_path / "other", fps=0.5, features=FEATURES)  # type: ignore[arg-type]
    assert len(held(folder)) == 1


def test_a_folder_has_one_writer(tmp_path: Path) -> None:
    writer = Writer(tmp_path / "set", fps=10, features=FEATURES)
    with pytest.raises(RoveError, match="Another process is recording"):
        Writer(tmp_path / "set", fps=10, features=FEATURES)
    with pytest.raises(RoveError, match="Another process is recording"):
        recover(tmp_path / "set")
    writer.close()
    writer.close()
    Writer(tmp_path / "set", fps=10, features=FEATURES).close()


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere")
def test_a_folder_that_is_closed_to_writing(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(RoveError, match="cannot be written: Permission denied"):
        Writer(tmp_path / "set", fps=10, features=FEATURES)
