"""Which entries of a client's message are its pictures, its robot's state and its instruction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from rove.errors import RoveError, nearest
from rove.types import Observation

_MISSING = object()


@dataclass(frozen=True, slots=True)
class Keys:
    """Names of the entries of an observation; an entry within another is "outer/inner"."""

    images: tuple[str, ...]
    """The pictures, in the order in which the policy takes them."""
    state: tuple[str, ...] = ()
    """Vectors that follow one another in the robot's state; empty: it is not read."""
    prompt: str = "prompt"

    def observation(self, message: Any) -> Observation:
        """Read one observation: pictures uint8 [h, w, 3], or [3, h, w], of one size.

        Raises RoveError naming the entry that is missing, or is not what it should be.
        """
        if not isinstance(message, Mapping):
            raise RoveError(f"The message is of type {type(message).__name__}: send a dict of entries.")
        images = [_picture(name, _entry(message, name)) for name in self.images]
        sizes = {image.shape[:2] for image in images}
        if len(sizes) > 1:
            said = ", ".join(
                f"{n} {i.shape[0]} x {i.shape[1]}" for n, i in zip(self.images, images, strict=True)
            )
            raise RoveError(f"The pictures differ in size ({said}): send all in one, such as 224 x 224.")
        prompt = _entry(message, self.prompt)
        if not isinstance(prompt, str) or not prompt.strip():
            raise RoveError(f"{self.prompt!r} is {prompt!r:.40}: send the instruction as text.")
        # A policy that does not read the robot's state needs none of it.
        given = any(_find(message, name) is not _MISSING for name in self.state)
        state = [_vector(name, _entry(message, name)) for name in self.state] if given else []
        return Observation(
            torch.from_numpy(np.stack(images)[None]),
            (prompt,),
            torch.from_numpy(np.concatenate(state)[None]) if state else None,
        )

    def message(self, images: np.ndarray, prompt: str, state: np.ndarray | None) -> dict[str, Any]:
        """Write one observation as a client sends it: pictures uint8 [n, h, w, 3], of which it may take fewer
        than there are, and a state [P]."""
        if len(images) < len(self.images):
            raise RoveError(f"The policy takes {len(self.images)} pictures, and there are {len(images)}.")
        flat = {name: np.ascontiguousarray(image) for name, image in zip(self.images, images, strict=False)}
        if self.state and state is not None:
            flat[self.state[0]] = state
        return {**flat, self.prompt: prompt}


PRESETS = {
    "libero": Keys(("observation/image", "observation/wrist_image"), ("observation/state",)),
    "droid": Keys(
        ("observation/exterior_image_1_left", "observation/wrist_image_left"),
        ("observation/joint_position", "observation/gripper_position"),
    ),
    "aloha": Keys(("images/cam_high", "images/cam_left_wrist", "images/cam_right_wrist"), ("state",)),
}
"""The entries that openpi's own clients send."""


def read_keys(
    preset: str, images: Sequence[str] | None = None, state: Sequence[str] | None = None, prompt: str = ""
) -> Keys:
    """The keys of a preset, with some of them replaced. Raises RoveError where there is no such preset."""
    if preset not in PRESETS:
        raise RoveError(f"Unknown keys {preset!r}. {nearest(preset, PRESETS)}")
    chosen = PRESETS[preset]
    if images is not None:
        chosen = replace(chosen, images=tuple(images))
    if state is not None:
        chosen = replace(chosen, state=tuple(state))
    return replace(chosen, prompt=prompt) if prompt else chosen


def _find(message: Mapping[Any, Any], name: str) -> Any:
    """The entry of that name, or the one that its parts lead to; _MISSING where there is neither."""
    if name in message:
        return message[name]
    found: Any = message
    for part in name.split("/"):
        found = found.get(part, _MISSING) if isinstance(found, Mapping) else _MISSING
    return found


def _entry(message: Mapping[Any, Any], name: str) -> Any:
    if (found := _find(message, name)) is _MISSING:
        there = [str(key) for key in message]
        raise RoveError(
            f"The message lacks {name!r}. {nearest(name, there) if there else 'It is empty.'} The server "
            "reads other names where it is started with --keys, --images, --state or --prompt."
        )
    return found


def _picture(name: str, value: Any) -> np.ndarray:
    if not isinstance(value, np.ndarray) or value.dtype != np.uint8:
        kind = value.dtype if isinstance(value, np.ndarray) else type(value).__name__
        raise RoveError(f"{name!r} is of type {kind}: send the picture as an array of uint8, 0 to 255.")
    if value.ndim == 3 and value.shape[0] == 3 and value.shape[-1] != 3:
        value = value.transpose(1, 2, 0)
    if value.ndim != 3 or value.shape[-1] != 3 or 0 in value.shape:
        raise RoveError(f"{name!r} has shape {list(value.shape)}: send one picture, [height, width, 3].")
    return value


def _vector(name: str, value: Any) -> np.ndarray:
    if not isinstance(value, np.ndarray | np.generic) or value.dtype.kind not in "fiu" or value.ndim > 1:
        raise RoveError(f"{name!r} is no vector of numbers: send an array of floats, [size].")
    vector = np.atleast_1d(value).astype(np.float32)
    if not np.isfinite(vector).all():
        raise RoveError(f"{name!r} has a number that is not finite: {vector.tolist()}.")
    return vector
