"""Video files of a data set: one frame a time step, at an exact time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.error import FFmpegError, InvalidDataError
from av.video.stream import VideoStream

from rove.errors import RoveError

CODEC = "h264"
"""As FFmpeg calls it. LeRobot reads any codec. This keeps small pictures as well as its default, AV1 at
quality 30 (mean error 5.0 and 5.5 of 255 on the tabletop's 64 × 64), and every player and browser shows
it."""
PIXELS = "yuv420p"
_OPTIONS = {"crf": "18", "g": "2", "bf": "0", "preset": "veryfast"}
"""A key frame at every other frame, as LeRobot has it: frames are read at random."""
EncodingError = FFmpegError
"""What `write_video` raises where a video cannot be encoded or written."""
_TOLERANCE = 1e-4
"""Seconds that a frame may be away from its time, as LeRobot has it."""


def write_video(path: Path, frames: Iterable[np.ndarray], size: tuple[int, int], fps: int) -> None:
    """Write frames uint8 [height, width, 3] of `size` (height, width), `fps` a second."""
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=fps, options=_OPTIONS)
        stream.height, stream.width = size
        stream.pix_fmt = PIXELS
        for number, picture in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, fps)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def info(size: tuple[int, int], fps: int) -> dict[str, Any]:
    """What a data set says of the videos that `write_video` writes."""
    return {
        "video.height": size[0],
        "video.width": size[1],
        "video.codec": CODEC,
        "video.pix_fmt": PIXELS,
        "is_depth_map": False,
        "video.fps": fps,
        "video.channels": 3,
        "has_audio": False,
    }


def read_video(path: Path, times: Sequence[float]) -> Iterator[np.ndarray]:
    """Read the frames at `times`, seconds, ascending: uint8 [height, width, 3] each.

    Raises RoveError where the file is missing, damaged, or has no frame at one of the times.
    """
    if not path.is_file():
        raise RoveError(
            f"The video {path} is missing: get the data set again, with its videos folder (of a data set "
            "that was cloned by git: git lfs pull)."
        )
    left = list(times)
    try:
        with av.open(str(path)) as container:
            for at, picture in _frames(container, left[0]):
                while left and abs(at - left[0]) < _TOLERANCE:
                    yield picture
                    left.pop(0)
                if not left:
                    return
                if at > left[0]:
                    break
    except FFmpegError as error:
        raise RoveError(f"The video {path} is damaged ({error.strerror}): get it again.") from error
    raise RoveError(
        f"The video {path} has no frame at {left[0]:.4f} s: it is cut off, or was recorded at another rate "
        "than meta/info.json says. Get it again, or record the data set anew."
    )


def _frames(container: Any, start: float) -> Iterator[tuple[float, np.ndarray]]:
    """Decode from the last key frame before `start` on: the time of each frame, and the frame."""
    if not container.streams.video:
        raise InvalidDataError(0, "there is no video in it")
    stream: VideoStream = container.streams.video[0]
    stream.thread_type = "AUTO"
    base = stream.time_base
    assert base is not None
    container.seek(max(0, round(start / base) - 1), backward=True, any_frame=False, stream=stream)
    for frame in container.decode(stream):
        if frame.pts is not None:
            at = float(frame.pts * base)
            if at > start - _TOLERANCE:
                yield at, frame.to_ndarray(format="rgb24")
