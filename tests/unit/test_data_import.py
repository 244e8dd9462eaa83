"""Demonstrations made of data sets: LeRobot's two layouts, LIBERO's files, and everything that does not
fit."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from rove.data import layout, video
from rove.data.importing import ImportOptions, import_recording
from rove.data.lerobot import Writer
from rove.data.recording import Recording, open_recording
from rove.data.show import describe
from rove.envs import conventions
from rove.errors import RoveError
from rove.training.demonstrations import dataset_statistics, lengthened
from rove.types import ActionSpec

SIDE, FPS = 32, 20
LENGTHS = (5, 3)
TASKS = ("pick up the milk", "pick up the ketchup")
CAMERAS = ("observation.images.image", "observation.images.image2")
LIBERO = conventions.of("libero:object")
OPTIONS = ImportOptions(image_size=SIDE)


def action(episode: int, number: int) -> np.ndarray:
    hand = np.sin(np.arange(6) + number + 10 * episode)
    return np.array([*hand, 1.0 if number > 1 else -1.0], np.float32)


def state(episode: int, number: int) -> np.ndarray:
    return np.arange(8, dtype=np.float32) + number + 100 * episode


def picture(camera: int, episode: int, number: int) -> np.ndarray:
    """Another level in each corner, so that a turned picture is noticed."""
    levels = np.array([[40, 90], [140, 190]]) + 6 * number + 3 * episode + 20 * camera
    return np.repeat(np.kron(levels, np.ones((SIDE // 2, SIDE // 2)))[..., None], 3, -1).astype(np.uint8)


def features() -> dict[str, dict[str, Any]]:
    return {
        **{name: {"dtype": "video", "shape": (SIDE, SIDE, 3), "names": None} for name in CAMERAS},
        "observation.state": {"dtype": "float32", "shape": (8,), "names": None},
        "action": {"dtype": "float32", "shape": (7,), "names": list(LIBERO.action_spec.names)},
    }


def v3(folder: Path, success: tuple[bool | None, bool | None] = (True, None), fps: int = FPS) -> Path:
    with Writer(folder, fps=fps, features=features()) as writer:
        for episode, length in enumerate(LENGTHS):
            for number in range(length):
                frame = {name: picture(c, episode, number) for c, name in enumerate(CAMERAS)}
                frame |= {"observation.state": state(episode, number), "action": action(episode, number)}
                writer.add(frame, TASKS[episode])
            writer.end_episode(success[episode])
    return folder


def v21(folder: Path) -> Path:
    """As LeRobot wrote data sets before v3.0: files of its own for each episode, JSON lines."""
    described = features() | layout.COUNTED | {"next.success": {"dtype": "bool", "shape": [1], "names": None}}
    total = 0
    for episode, length in enumerate(LENGTHS):
        columns = {
            "observation.state": np.stack([state(episode, n) for n in range(length)]),
            "action": np.stack([action(episode, n) for n in range(length)]),
            "timestamp": np.arange(length, dtype=np.float32) / FPS,
            "frame_index": np.arange(length),
            "episode_index": np.full(length, episode),
            "index": total + np.arange(length),
            "task_index": np.full(length, episode),
            "next.success": np.arange(length) == (length - 1 if episode == 0 else -1),
        }
        table = pa.table({name: layout.column(described[name], value) for name, value in columns.items()})
        layout.write_table(folder / f"data/chunk-000/episode_{episode:06d}.parquet", table)
        for camera, name in enumerate(CAMERAS):
            film = folder / f"videos/chunk-000/{name}/episode_{episode:06d}.mp4"
            film.parent.mkdir(parents=True, exist_ok=True)
            frames = [picture(camera, episode, n) for n in range(length)]
            video.write_video(film, frames, (SIDE, SIDE), FPS)
        total += length
    info = {
        "codebase_version": "v2.1", "robot_type": "panda", "total_episodes": 2, "total_frames": total,
        "total_tasks": 2, "total_videos": 4, "total_chunks": 1, "chunks_size": 1000, "fps": FPS,
        "splits": {"train": "0:2"}, "features": described,
        "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "video_path": "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
    }  # fmt: skip
    layout.write_json(folder / "meta/info.json", info)
    lines = {
        "episodes": [{"episode_index": i, "tasks": [TASKS[i]], "length": n} for i, n in enumerate(LENGTHS)],
        "tasks": [{"task_index": i, "task": task} for i, task in enumerate(TASKS)],
    }
    for name, rows in lines.items():
        (folder / f"meta/{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def hdf5(folder: Path) -> Path:
    """As LIBERO publishes its demonstrations: a file a task, pictures upside down, so turned by 180°."""
    folder.mkdir(parents=True)
    for episode, length in enumerate(LENGTHS):
        with h5py.File(folder / f"task_{episode}_demo.hdf5", "w") as file:
            data = file.create_group("data")
            data.attrs["problem_info"] = json.dumps({"language_instruction": list(TASKS[episode])})
            demo = data.create_group("demo_0")
            demo["actions"] = np.stack([action(episode, n) for n in range(length)]).astype(np.float64)
            demo["dones"] = np.arange(length) == length - 1
            states = np.stack([state(episode, n) for n in range(length)])
            demo["obs/ee_states"], demo["obs/gripper_states"] = states[:, :6], states[:, 6:]
            for camera, name in enumerate(("agentview_rgb", "eye_in_hand_rgb")):
                demo[f"obs/{name}"] = np.stack(
                    [picture(camera, episode, n)[::-1, ::-1] for n in range(length)]
                )
    return folder


LAYOUTS = {"LeRobot v3.0": v3, "LeRobot v2.1": v21, "LIBERO HDF5": hdf5}


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("sets")
    return {name: write(folder / name) for name, write in LAYOUTS.items()}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_gives_the_same_demonstrations(name: str, sets: dict[str, Path]) -> None:
    recording = open_recording(sets[name])
    assert recording.layout == name
    options = OPTIONS if name != "LeRobot v2.1" else replace(OPTIONS, failures=True)
    made, about = import_recording(recording, LIBERO, options)
    rows = [(e, n) for e, length in enumerate(LENGTHS) for n in range(length)]
    assert made.instruction == tuple(TASKS[e] for e, _ in rows)
    assert made.episode.tolist() == [e for e, _ in rows] and made.frame.tolist() == list(range(8))
    np.testing.assert_allclose(made.actions[:, 0], [action(*row) for row in rows], atol=1e-6)
    np.testing.assert_array_equal(made.state, [state(*row) for row in rows])
    wanted = np.stack([[picture(c, *row) for c in range(2)] for row in rows])
    assert made.images.shape == wanted.shape and made.images.dtype == torch.uint8
    assert np.abs(made.images.numpy().astype(int) - wanted).mean() < 3
    assert about["suite"] == "libero:object" and about["episodes"] == 2
    assert about["action_spec"]["gripper"] == "open_low"
    assert about["statistics"] == dataset_statistics(made)
    assert json.loads(json.dumps(about)) == about


def test_episodes_that_failed_are_left_out(sets: dict[str, Path], tmp_path: Path) -> None:
    made, about = import_recording(open_recording(sets["LeRobot v2.1"]), LIBERO, OPTIONS)
    assert len(made) == LENGTHS[0] and about["left_out"] == 1
    recording = open_recording(v3(tmp_path / "failed", success=(False, False)))
    with pytest.raises(RoveError, match="no episode that succeeded: import failures too, --failures"):
        import_recording(recording, LIBERO, OPTIONS)


def test_rows_can_be_further_apart_and_show_more(sets: dict[str, Path]) -> None:
    whole, _ = import_recording(open_recording(sets["LeRobot v3.0"]), LIBERO, OPTIONS)
    made, about = import_recording(open_recording(sets["LeRobot v3.0"]), LIBERO, replace(OPTIONS, every=2))
    assert made.actions.shape == (5, 2, 7) and made.mask.sum(1).tolist() == [2, 2, 1, 2, 1]
    assert torch.equal(made.images, whole.images[[0, 2, 4, 5, 7]])
    assert torch.equal(made.state, whole.state[[0, 2, 4, 5, 7]])
    np.testing.assert_allclose(about["statistics"]["action"]["mean"], whole.actions[:, 0].mean(0), atol=1e-6)
    for horizon in (1, 3, 4, 9):
        one, other = lengthened(made, horizon), lengthened(whole, horizon)
        assert one.actions.shape == (5, horizon, 7)
        for name in ("actions", "mask"):
            assert torch.equal(getattr(one, name), getattr(other, name)[[0, 2, 4, 5, 7]])
    assert lengthened(whole, 9).mask.sum(1).tolist() == [5, 4, 3, 2, 1, 3, 2, 1]
    with pytest.raises(RoveError, match="do not say how they go on"):
        lengthened(replace(whole, episode=None), 3)


def test_actions_of_another_convention_are_converted(sets: dict[str, Path]) -> None:
    spec = replace(LIBERO.action_spec, gripper="open_high")
    recording = open_recording(sets["LeRobot v3.0"])
    made, about = import_recording(recording, LIBERO, replace(OPTIONS, action_spec=spec))
    plain, _ = import_recording(recording, LIBERO, OPTIONS)
    assert torch.equal(made.actions[..., :6], plain.actions[..., :6])
    assert torch.equal(made.actions[..., 6], -plain.actions[..., 6])
    assert about["recorded_as"]["gripper"] == "open_high" and about["action_spec"]["gripper"] == "open_low"


def changed(recording: Recording, episode_action: Any) -> Recording:
    """The recording with a function applied to its actions."""
    read = recording.episode

    def episode(index: int) -> Any:
        found = read(index)
        return replace(found, columns={**found.columns, "action": episode_action(found.columns["action"])})

    recording.episode = episode  # type: ignore[method-assign]
    return recording


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"images": ("observation.image",)}, "no feature 'observation.image'. Did you mean"),
        ({"images": CAMERAS[:1] * 3}, r"gives 3 pictures a frame, libero:object 1 or 2: name those to take"),
        ({"images": ("action",)}, "'action' of .* is no picture"),
        ({"state": ("action",)}, r"has 7 numbers of the robot's state \(action 7\), libero:object 8"),
        ({"state": CAMERAS[:1]}, "is pictures: name one that is numbers"),
        (
            {"action": "observation.state"},
            r"'observation.state' of .* is float32 \[8\], and the convention has 7",
        ),
        ({"action": "acton"}, "no feature 'acton'. Did you mean 'action'"),
        ({"fps": 10.0}, "--fps 10, but .* was recorded at 20 frames a second"),
        (
            {"action_spec": ActionSpec(("x",), ("m",), (-1.0,), (1.0,))},
            r"is float32 \[7\], and the convention has 1 dimensions",
        ),
        (
            {"action_spec": replace(LIBERO.action_spec, control="absolute")},
            "control='absolute', the environment expects 'delta'",
        ),
    ],
)
def test_options_that_do_not_fit_name_the_fix(
    options: dict[str, Any], reason: str, sets: dict[str, Path]
) -> None:
    with pytest.raises(RoveError, match=reason):
        import_recording(open_recording(sets["LeRobot v3.0"]), LIBERO, replace(OPTIONS, **options))


def test_actions_that_cannot_be_the_suites_are_refused(sets: dict[str, Path]) -> None:
    for change, reason in (
        (lambda a: 30 * a, r"% of 'x' in 'action' of .* lie outside \[-1, 1\].*--actions FILE.json"),
        (lambda a: np.where(np.arange(7) == 6, (a + 1) / 2, a), r"gripper in 'action' of .* spans \[0, 1\]"),
        (lambda a: np.where(np.arange(7) == 2, np.nan, a), "has numbers that are not finite"),
    ):
        with pytest.raises(RoveError, match=reason):
            import_recording(changed(open_recording(sets["LeRobot v3.0"]), change), LIBERO, OPTIONS)


def test_another_rate_is_refused_unless_it_is_said(tmp_path: Path) -> None:
    recording = open_recording(v3(tmp_path / "slow", fps=10))
    with pytest.raises(
        RoveError, match="recorded at 10 frames a second, and libero:object acts 20.*--fps 10"
    ):
        import_recording(recording, LIBERO, OPTIONS)
    assert len(import_recording(recording, LIBERO, replace(OPTIONS, fps=10.0))[0]) == 8


def test_features_of_a_kind_that_is_not_read_are_listed_and_left(
    sets: dict[str, Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(sets["LeRobot v2.1"], tmp_path / "set")
    described = json.loads((folder / INFO).read_text())["features"]
    described["action"]["names"] = {"motors": [["x", "y", "z"], "roll", "pitch", "yaw", "gripper"]}
    described["caption"] = {"dtype": "language", "shape": [1], "names": None}
    edit(folder / INFO, features=described)
    recording = open_recording(folder)
    assert recording.features["action"].names == LIBERO.action_spec.names
    assert any("caption" in line and "language" in line for line in describe(recording))
    assert len(import_recording(recording, LIBERO, OPTIONS)[0]) == LENGTHS[0]
    with pytest.raises(RoveError, match="'caption' of .* is of a kind that Rove does not read, 'language'"):
        import_recording(recording, LIBERO, replace(OPTIONS, state=("caption",)))


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


def drop(path: Path, column: str) -> None:
    pq.write_table(pq.read_table(path).drop_columns([column]), path)


INFO = "meta/info.json"
DATA, EPISODES = "data/chunk-000/file-000.parquet", "meta/episodes/chunk-000/file-000.parquet"
FILM = f"videos/{CAMERAS[1]}/chunk-000/file-001.mp4"
BROKEN: dict[str, tuple[Any, str]] = {
    "a newer version": (lambda s: edit(s / INFO, codebase_version="v3.1"), r"info.json: .*'v3.1'. It is "
    "newer.*update Rove"),
    "an older version": (lambda s: edit(s / INFO, codebase_version="v1.6"), "'v1.6'. .*LeRobot's own "
    "converter"),
    "no version": (lambda s: edit(s / INFO, codebase_version=3), "Rove reads v3.0 and v2.1"),
    "no JSON": (lambda s: (s / INFO).write_text("{"), "info.json is damaged"),
    "no features": (lambda s: edit(s / INFO, features=[]), "info.json is damaged"),
    "another count": (lambda s: edit(s / INFO, total_episodes=3), "counts 3 episodes, and meta/ describes 2"),
    "no tasks": (lambda s: (s / "meta/tasks.parquet").unlink(), "tasks.parquet is missing"),
    "no data": (lambda s: (s / DATA).unlink(), "file-000.parquet is missing"),
    "cut data": (lambda s: cut(s / DATA), "data/chunk-000/file-000.parquet is damaged"),
    "a column is gone": (lambda s: drop(s / DATA, "action"), "file-000.parquet lacks the column 'action'"),
    "cut episodes": (lambda s: cut(s / EPISODES), "meta/episodes/chunk-000/file-000.parquet is damaged"),
    "episodes that name no film": (
        lambda s: drop(s / EPISODES, f"videos/{CAMERAS[0]}/file_index"),
        "lacks the column 'videos/observation.images.image/file_index'",
    ),
    "other data": (lambda s: shutil.copy(s / DATA.replace("000.p", "001.p"), s / DATA), "has 0 frames of "
    "episode 0"),
    "no video": (lambda s: (s / FILM).unlink(), "image2/chunk-000/file-001.mp4 is missing: .*git lfs pull"),
    "a pointer for a video": (lambda s: (s / FILM).write_text("version https"), "file-001.mp4 is damaged"),
    "cut video": (lambda s: cut(s / FILM), "file-001.mp4 (is damaged|has no frame)"),
    "an empty video": (lambda s: (s / FILM).write_bytes(b""), "file-001.mp4 is damaged"),
    "a shorter video": (
        lambda s: video.write_video(s / FILM, [picture(0, 0, 0)] * 2, (SIDE, SIDE), FPS),
        r"file-001.mp4 has no frame at 0.1000 s",
    ),
    "a video of another rate": (
        lambda s: video.write_video(s / FILM, [picture(0, 0, 0)] * 3, (SIDE, SIDE), 7),
        "has no frame at 0.0500 s: .*another rate",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_damaged_data_set_names_the_file_and_the_fix(
    name: str, sets: dict[str, Path], tmp_path: Path
) -> None:
    damage, reason = BROKEN[name]
    damage(shutil.copytree(sets["LeRobot v3.0"], tmp_path / "set"))
    with pytest.raises(RoveError, match=reason) as caught:
        import_recording(open_recording(tmp_path / "set"), LIBERO, OPTIONS)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_damaged_files_of_libero_and_of_v21(sets: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(sets["LIBERO HDF5"], tmp_path / "libero")
    with h5py.File(folder / "task_0_demo.hdf5", "a") as file:
        kept = file["data/demo_0/obs/eye_in_hand_rgb"][:-1]
        del file["data/demo_0/obs/eye_in_hand_rgb"]
        file["data/demo_0/obs/eye_in_hand_rgb"] = kept
    with pytest.raises(RoveError, match="task_0_demo.hdf5 has 5 actions, and 4 frames of demo_0/obs/eye_in"):
        import_recording(open_recording(folder), LIBERO, OPTIONS)
    with h5py.File(folder / "task_1_demo.hdf5", "a") as file:
        del file["data/demo_0/obs/gripper_states"]
    with pytest.raises(RoveError, match=r"task_1_demo.hdf5 is damaged, or holds something else"):
        open_recording(folder).episode(1)
    (folder / "task_1_demo.hdf5").write_bytes(b"nothing")
    with pytest.raises(RoveError, match=r"task_1_demo.hdf5 is damaged"):
        open_recording(folder)
    folder = shutil.copytree(sets["LeRobot v2.1"], tmp_path / "old")
    (folder / "meta/episodes.jsonl").write_text("{")
    with pytest.raises(RoveError, match=r"episodes.jsonl is damaged"):
        open_recording(folder)
    (folder / "meta/episodes.jsonl").unlink()
    with pytest.raises(RoveError, match=r"episodes.jsonl cannot be read"):
        open_recording(folder)


def test_what_is_no_data_set_says_so(tmp_path: Path) -> None:
    with pytest.raises(RoveError, match="There is nothing at"):
        open_recording(tmp_path / "nowhere")
    with pytest.raises(RoveError, match="expected a LeRobot folder, with meta/info.json in it"):
        open_recording(tmp_path)
    (tmp_path / "meta").mkdir()
    with pytest.raises(RoveError, match=r"info.json cannot be read: No such file"):
        open_recording(tmp_path)
