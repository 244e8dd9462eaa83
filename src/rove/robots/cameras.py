"""Cameras: each is read by a thread of its own, so that a slow one never holds up the arm.

A camera is anything with `read() -> Frame`. The newest picture of each is what is seen; a camera that gives
none, the same one again and again, or a black one stops the run.
"""

from __future__ import annotations

import importlib
import io
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
from PIL import Image

from rove.errors import RoveError
from rove.robots.base import Frame
from rove.robots.connection import Connection
from rove.robots.limits import Limits, Stopped

STAMP = "X-Timestamp"
"""Header of a picture that says when it was taken, in seconds of the camera's clock."""
_BLACK = 3
"""Pictures that have to be black one after the other: an exposure may fail once."""


class Camera(Protocol):
    """A source of pictures."""

    def read(self) -> Frame:
        """Wait for a picture and return it. Raises an OSError or RoveError where none comes."""
        ...


class HttpCamera:
    """A camera that answers GET with a picture (PNG or JPEG), as network cameras do with their snapshots."""

    def __init__(self, url: str) -> None:
        self._connection = Connection(url)

    def read(self) -> Frame:
        content, headers = self._connection.get()
        received = time.monotonic()
        try:
            image = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
        except OSError as error:
            raise RoveError(f"{self._connection.url} answered with no picture: {error}.") from error
        stamp = headers.get(STAMP)
        try:
            return Frame(image, received if stamp is None else float(stamp), received)
        except ValueError:
            raise RoveError(f"{self._connection.url} sends {STAMP}: {stamp!r:.40}, no seconds.") from None


def camera(source: str) -> Camera:
    """Make a camera of "http://…", or of MODULE:NAME, a function without arguments that returns one.

    Raises RoveError where there is no such function.
    """
    if source.startswith("http://"):
        return HttpCamera(source)
    made: Camera = imported(source, "a camera")()
    return made


def imported(name: str, what: str) -> Callable[..., Any]:
    """Return the class or function that MODULE:NAME names. Raises RoveError, saying `what` was looked for,
    where there is none."""
    module, _, attribute = name.partition(":")
    if not attribute:
        raise RoveError(f"{name!r} is not {what}: write MODULE:NAME, or an address, http://HOST:PORT.")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise RoveError(f"{name!r} cannot be imported as {what}: {error}.") from error
    if not callable(found):
        raise RoveError(
            f"{name!r} is a {type(found).__name__}: name a class or a function that makes {what}."
        )
    return found


class Watch:
    """The newest picture of one camera, and what is wrong with it."""

    def __init__(self, name: str, limits: Limits) -> None:
        self.name, self._limits = name, limits
        self.newest: Frame | None = None
        self.asked = 0.0
        """When the newest picture was asked for."""
        self.trouble = ""
        """Why there was no picture when one was last asked for."""
        self._since = time.monotonic()
        self._same = self._black = 0

    def take(self, frame: Frame, asked: float) -> None:
        """Take note of a picture, and of when it was asked for."""
        before = self.newest
        if before is not None and frame.stamp <= before.stamp:
            return  # an old picture again: it goes stale
        alike = before is not None and np.array_equal(before.image, frame.image)
        self._same = self._same + 1 if alike else 1
        self._black = self._black + 1 if frame.image.mean() < self._limits.camera_black else 0
        self.newest, self.asked, self._since, self.trouble = frame, asked, frame.received, ""

    def frame(self) -> Frame:
        """Return the newest picture. Raises Stopped where the camera is black, frozen or stale."""
        age, frame = time.monotonic() - self._since, self.newest
        if frame is None or age > self._limits.camera_late:
            trouble = f" ({self.trouble})" if self.trouble else ""
            raise Stopped("camera_stale", f"{self.name!r} has given no new picture for {age:.2f} s{trouble}.")
        if self._same >= self._limits.camera_frozen:
            raise Stopped("camera_frozen", f"{self.name!r} gave one picture {self._same} times.")
        if self._black >= _BLACK:
            mean = frame.image.mean()
            raise Stopped("camera_black", f"{self.name!r} is black: its mean is {mean:.1f} of 255.")
        return frame


class Cameras:
    """The cameras of an arm, each with a thread that reads it."""

    def __init__(self, sources: Mapping[str, Camera], limits: Limits, rate: float) -> None:
        """`rate` is how often a second each is read, at most."""
        self._period, self._ended = 1.0 / rate, threading.Event()
        self._watches = [Watch(name, limits) for name in sources]
        self._threads = [
            threading.Thread(target=self._read, args=(watch, source), name=watch.name, daemon=True)
            for watch, source in zip(self._watches, sources.values(), strict=True)
        ]

    def start(self, patience: float = 30.0) -> None:
        """Begin to read, and wait for a picture of each. Raises RoveError where one gives none."""
        for thread in self._threads:
            thread.start()
        self.renew(patience)

    def renew(self, patience: float = 5.0) -> None:
        """Wait for pictures that were asked for from now on: those before show what was. Raises RoveError
        where a camera gives none."""
        begun = time.monotonic()
        for watch in self._watches:
            while watch.asked < begun:
                if time.monotonic() > begun + patience:
                    self.close()
                    raise RoveError(
                        f"The camera {watch.name!r} gives no picture: {watch.trouble or 'it is silent'}."
                    )
                time.sleep(0.01)

    def frames(self) -> dict[str, Frame]:
        """Return the newest picture of each. Raises Stopped where a camera is black, frozen or stale."""
        return {watch.name: watch.frame() for watch in self._watches}

    def close(self) -> None:
        """Stop reading; harmless when called twice."""
        self._ended.set()

    def _read(self, watch: Watch, source: Camera) -> None:
        while not self._ended.is_set():
            begun = time.monotonic()
            try:
                watch.take(source.read(), begun)
            except Exception as error:  # noqa: BLE001  # whatever a driver raises: no picture came
                watch.trouble = f"{type(error).__name__}: {error}"
            self._ended.wait(max(0.0, self._period - (time.monotonic() - begun)))
