"""Runs in LeRobot's own environment: python with_lerobot.py write FOLDER | read FOLDER OUT.npz"""

import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

from frames import CAMERAS, FEATURES, FPS, LENGTHS, TASKS, frame
from lerobot.datasets.lerobot_dataset import LeRobotDataset


def write(folder: str) -> None:
    """Write a data set as LeRobot does."""
    made = LeRobotDataset.create("rove/test", FPS, FEATURES, root=folder, robot_type="test")
    for episode, length in enumerate(LENGTHS):
        for number in range(length):
            made.add_frame(frame(episode, number) | {"task": TASKS[episode]})
        made.save_episode(parallel_encoding=False)
    made.finalize()


def read(folder: str, out: str) -> None:
    """Write down every frame as LeRobot reads it."""
    found = LeRobotDataset("rove/test", root=folder, video_backend="pyav")
    rows = [found[i] for i in range(len(found))]
    arrays = {
        name: np.stack([row[name].numpy() for row in rows]) for name in rows[0] if name not in ("task",)
    }
    for name in CAMERAS:
        arrays[name] = np.rint(255 * arrays[name]).astype(np.uint8).transpose(0, 2, 3, 1)
    about = {
        "tasks": [row["task"] for row in rows],
        "success": [episode.get("success") for episode in found.meta.episodes],
        "mean": found.meta.stats["action"]["mean"].tolist(),
    }
    np.savez(out, about=np.array(json.dumps(about)), **arrays)


if __name__ == "__main__":
    {"write": write, "read": read}[sys.argv[1]](*sys.argv[2:])
