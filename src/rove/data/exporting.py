"""Writes demonstrations as a LeRobot data set."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rove.config import load
from rove.data.lerobot import Writer
from rove.errors import RoveError
from rove.types import ActionSpec, Demonstrations

_CAMERAS = ("observation.images.image", "observation.images.image2", "observation.images.image3")
"""As LeRobot's own data sets of LIBERO call them."""


def export(
    demonstrations: Demonstrations,
    folder: Path,
    *,
    fps: int,
    spec: ActionSpec,
    suite: str,
    made: Mapping[str, Any],
    on_episode: Callable[[], None] = lambda: None,
) -> None:
    """Write demonstrations, a row a frame; all of them are successes.

    `made` is what their file says that they were made from. Raises RoveError where there is not a picture for
    every action, or the folder holds something already.
    """
    if demonstrations.episode is None:
        raise RoveError(
            "The demonstrations do not say which rows are of one episode: collect or import them anew."
        )
    apart = made.get("chunk", made.get("every", demonstrations.actions.shape[1]))
    if apart != 1 or made.get("sft", {}).get("slips"):
        raise RoveError(
            f"The demonstrations have a picture every {apart} actions, or leave some out, and a data set "
            "has one for every action: collect them with --rollout.chunk 1 --sft.slips 0, or import them "
            "with --every 1."
        )
    if demonstrations.actions.shape[2] != spec.dim:
        raise RoveError(
            f"The demonstrations have actions of {demonstrations.actions.shape[2]} numbers, {suite} of "
            f"{spec.dim}: name the suite that they are of with --suite."
        )
    if folder.exists() and any(folder.iterdir()):
        raise RoveError(f"{folder} is not empty: name a new folder with --out.")
    cameras, height, width, _ = demonstrations.images.shape[1:]
    names = _CAMERAS[:cameras]
    features: dict[str, dict[str, Any]] = {
        name: {"dtype": "video", "shape": (height, width, 3), "names": ["height", "width", "channels"]}
        for name in names
    }
    if demonstrations.state is not None:
        features["observation.state"] = _vector(demonstrations.state.shape[1], None)
    features["action"] = _vector(spec.dim, list(spec.names))
    about = {"suite": suite, "action_spec": load.to_dict(spec)}
    with Writer(
        folder, fps=fps, features=features, robot_type=suite.partition(":")[0], about=about
    ) as writer:
        episode = demonstrations.episode.tolist()
        for row, number in enumerate(episode):
            at = int(demonstrations.frame[row])
            frame: dict[str, np.ndarray] = dict(zip(names, demonstrations.images[at].numpy(), strict=True))
            if demonstrations.state is not None:
                frame["observation.state"] = demonstrations.state[at].numpy()
            frame["action"] = demonstrations.actions[row, 0].numpy()
            writer.add(frame, demonstrations.instruction[row])
            if row + 1 == len(episode) or episode[row + 1] != number:
                writer.end_episode(True)
                on_episode()


def _vector(size: int, names: list[str] | None) -> dict[str, Any]:
    return {"dtype": "float32", "shape": (size,), "names": names}
