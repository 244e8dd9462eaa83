"""Looks at data: what is in it, its numbers, and an episode as an animated picture."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from rove.data import statistics
from rove.data.lerobot import unfinished
from rove.data.recording import Recording
from rove.errors import RoveError
from rove.reporting.video import animate

_SHOWN = 16
"""Dimensions of a feature whose statistics are printed, at most."""
_COUNTERS = ("timestamp", "frame_index", "episode_index", "index", "task_index")


def describe(recording: Recording) -> Iterator[str]:
    """Lines that tell what a recording holds: counts, features, tasks, and statistics of its numbers."""
    total, episodes = sum(recording.lengths), len(recording.lengths)
    rate = "rate not recorded" if recording.fps is None else f"{recording.fps:g} frames a second"
    yield f"{recording.where}: {recording.layout}, {episodes} episodes, {total} frames, {rate}"
    if episodes:
        yield f"episodes of {min(recording.lengths)} to {max(recording.lengths)} frames"
    yield from unfinished(recording.where)
    width = max(map(len, recording.features), default=0)
    yield "\nfeatures"
    for name, found in recording.features.items():
        if name not in _COUNTERS:
            names = f"  {', '.join(found.names)}" if found.names and not found.camera else ""
            yield f"  {name:<{width}}  {found.dtype} {list(found.shape)}{names}"
    if not episodes:
        return
    read = [recording.episode(index) for index in range(episodes)]
    known = [episode.success for episode in read if episode.success is not None]
    if known:
        yield f"\nsuccess: {sum(known)} of {len(known)} episodes that say"
    yield "\ntasks"
    told = [task for episode in read for task in dict.fromkeys(episode.tasks)]
    for task in dict.fromkeys(told):
        yield f"  {told.count(task):>5} episodes  {task}"
    yield "\nstatistics"
    yield f"  {'':<{width + 5}}{'min':>11}{'q01':>11}{'mean':>11}{'std':>11}{'q99':>11}{'max':>11}"
    for name, found in recording.features.items():
        if name in read[0].columns and name not in _COUNTERS and found.dtype != "bool":
            values = np.concatenate(
                [episode.columns[name].reshape(len(episode.tasks), -1) for episode in read]
            )
            yield from _rows(name, statistics.of_numbers(values), width)


def _rows(name: str, found: Mapping[str, Any], width: int) -> Iterator[str]:
    for i in range(min(_SHOWN, len(found["mean"]))):
        numbers = "".join(f"{found[key][i]:>11.4g}" for key in ("min", "q01", "mean", "std", "q99", "max"))
        yield f"  {name:<{width}} {i:>3} {numbers}"
    if len(found["mean"]) > _SHOWN:
        yield f"  {name:<{width}}   … {len(found['mean']) - _SHOWN} more"


def draw(recording: Recording, index: int, path: Path) -> None:
    """Write an episode as an animated picture, its cameras side by side. Raises RoveError where there is no
    such episode, or it has no pictures."""
    if not 0 <= index < len(recording.lengths):
        raise RoveError(f"{recording.where} has episodes 0 to {len(recording.lengths) - 1}, and no {index}.")
    cameras = [name for name, found in recording.features.items() if found.camera]
    if not cameras:
        raise RoveError(f"{recording.where} has no pictures.")
    recording.check(cameras)
    episode = recording.episode(index)
    height = min(recording.features[name].shape[0] for name in cameras)
    films = [np.stack([_of_height(p, height) for p in recording.pictures(index, name)]) for name in cameras]
    frames = torch.from_numpy(np.concatenate(films, axis=2))
    picture = animate(
        frames,
        episode.tasks[0],
        episode.success,
        "GIF" if path.suffix == ".gif" else "WEBP",
        1000 / recording.fps if recording.fps else None,
    )
    path.write_bytes(picture)


def _of_height(picture: np.ndarray, height: int) -> np.ndarray:
    if len(picture) == height:
        return picture
    image = Image.fromarray(np.ascontiguousarray(picture))
    return np.asarray(image.resize((round(image.width * height / image.height), height)))
