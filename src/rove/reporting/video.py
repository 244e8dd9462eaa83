"""Recorded episodes as animated pictures, every action a frame, small enough to sit inside a report page.

In a run directory they are `videos/<before|after>/<n>.webp`, listed by `videos/index.json`.
"""

from __future__ import annotations

import base64
import io
import json
import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from rove.envs.base import TaskSuite
from rove.errors import RoveError
from rove.types import EpisodeSpec, EvalReport

_WIDTH = 192
"""Pixels that a smaller image is enlarged to, by a whole factor."""
_MILLISECONDS = 100
"""Duration of a frame of the animation, in milliseconds."""
_HOLD = 1000
"""Duration of the last frame, in milliseconds."""
_PAPER, _INK = "#16181d", "#f2f3f5"
_OUTCOMES = {
    True: ("success", "#2e9e5b"),
    False: ("failure", "#d1495b"),
    None: ("outcome not known", "#8a8f98"),
}
"""Words and colour of an outcome."""
_FONT_SIZE = 11

Side = Literal["before", "after"]
"""The two sides of RL: before training and after it."""


@dataclass(frozen=True, slots=True)
class Video:
    """An entry of `videos/index.json`."""

    phase: Side
    """The side of RL that the episode was recorded on."""
    task: str
    instruction: str
    success: bool
    file: str
    """Path of the animation, relative to the `videos` folder."""


class Evaluator(Protocol):
    """The part of an executor that `record` calls."""

    suite: TaskSuite

    def evaluate(self, specs, name, about, on_episode=..., on_frames=...) -> EvalReport:
        """Run the given episodes; see `Executor.evaluate`."""
        ...


def record(executor: Evaluator, specs: Sequence[EpisodeSpec], directory: Path, phase: Side) -> None:
    """Run the episodes `specs`; write them to `directory/phase`, listed in `directory/index.json`."""
    frames: dict[EpisodeSpec, list[Tensor]] = defaultdict(list)
    report = executor.evaluate(specs, phase, {}, on_frames=lambda spec, part: frames[spec].append(part))
    videos = [video for video in _read_index(directory) if video.phase != phase]
    (directory / phase).mkdir(parents=True, exist_ok=True)
    for number, (spec, outcome) in enumerate(zip(specs, report.records, strict=True)):
        instruction = executor.suite.instruction(spec)
        file = f"{phase}/{number}.webp"
        write_webp(directory / file, torch.cat(frames[spec]), instruction, outcome.success)
        videos.append(Video(phase, spec.task, instruction, outcome.success, file))
    partial = directory / ".index.json.partial"
    partial.write_text(json.dumps([asdict(video) for video in videos], indent=1))
    partial.replace(directory / "index.json")


def animate(
    frames: Tensor,
    instruction: str,
    success: bool | None,
    format: Literal["WEBP", "GIF"] = "WEBP",
    milliseconds: float | None = None,
) -> bytes:
    """Make an endlessly looping animation of an episode, with instruction and outcome below it.

    `frames` is uint8 [F, H, W, 3], one an action, `milliseconds` long each (None: 100). The last one is held
    in a frame of the outcome's colour. Raises RoveError on frames of another kind, and when there are none.
    """
    images = frames.numpy()
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3 or not len(images):
        raise RoveError(
            f"an animation needs frames uint8 [F, H, W, 3]; got {images.dtype} {list(images.shape)}."
        )
    scale = max(1, _WIDTH // images.shape[2])
    height, width = images.shape[1] * scale, images.shape[2] * scale
    pictures = [Image.fromarray(image).resize((width, height), Image.Resampling.LANCZOS) for image in images]
    outcome, colour = _OUTCOMES[success]
    held = pictures[-1].copy()
    ImageDraw.Draw(held).rectangle((0, 0, width - 1, height - 1), outline=colour, width=max(2, width // 48))
    strip = _caption(instruction, outcome, width, colour)
    pictures = [_stack(picture, strip) for picture in [*pictures, held]]
    durations = [round(milliseconds or _MILLISECONDS)] * len(images) + [_HOLD]
    buffer = io.BytesIO()
    pictures[0].save(
        buffer, format, save_all=True, append_images=pictures[1:], duration=durations, loop=0, quality=80
    )
    return buffer.getvalue()


def write_webp(path: Path, frames: Tensor, instruction: str, success: bool) -> None:
    """Write an episode as an animated WebP; see `animate`."""
    path.write_bytes(animate(frames, instruction, success))


def data_uri(picture: bytes) -> str:
    """Encode a WebP image as a data URI, which a page can hold."""
    return "data:image/webp;base64," + base64.b64encode(picture).decode()


def index(run_dir: Path) -> list[Video]:
    """Read the entries of a run's `videos/index.json` whose animations are there, in its `videos` folder;
    empty when nothing was recorded."""
    folder = (run_dir / "videos").resolve()

    def inside(each: Video) -> bool:
        file = Path(os.path.realpath(folder / each.file))  # of a link to itself `resolve` raises
        return folder in file.parents and file.suffix == ".webp" and file.is_file()

    return [each for each in _read_index(run_dir / "videos") if inside(each)]


def _read_index(directory: Path) -> list[Video]:
    """Read the entries that are ones; empty where there is no such file."""
    path = directory / "index.json"
    if not path.exists():
        return []
    try:
        entries = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise RoveError(f"{path} is no JSON: {error}. Delete it: the page then has no videos.") from error
    return [Video(**entry) for entry in entries if _is_video(entry)] if isinstance(entries, list) else []


def _is_video(entry: Any) -> bool:
    """Whether `entry` has a Video's fields, each of its type, of a known side, and a file that can be one."""
    types = {"phase": str, "task": str, "instruction": str, "success": bool, "file": str}
    return (
        isinstance(entry, dict)
        and entry.keys() == types.keys()
        and all(type(entry[name]) is kind for name, kind in types.items())
        and entry["phase"] in get_args(Side)
        and "\0" not in entry["file"]
    )


def _caption(instruction: str, outcome: str, width: int, colour: str) -> Image.Image:
    """Draw instruction and outcome on a strip; the instruction is wrapped to `width` pixels."""
    font = ImageFont.load_default(_FONT_SIZE)
    lines, line = [], ""
    for word in instruction.split():
        if line and font.getlength(f"{line} {word}") > width - 8:
            lines.append(line)
            line = word
        else:
            line = f"{line} {word}".strip()
    lines.append(line)
    step = _FONT_SIZE + 4
    strip = Image.new("RGB", (width, step * (len(lines) + 1) + 8), _PAPER)
    draw = ImageDraw.Draw(strip)
    for row, text in enumerate(lines):
        draw.text((4, 4 + row * step), text, font=font, fill=_INK)
    draw.text((4, 4 + len(lines) * step), outcome, font=font, fill=colour)
    return strip


def _stack(top: Image.Image, bottom: Image.Image) -> Image.Image:
    joined = Image.new("RGB", (top.width, top.height + bottom.height))
    joined.paste(top, (0, 0))
    joined.paste(bottom, (0, top.height))
    return joined
