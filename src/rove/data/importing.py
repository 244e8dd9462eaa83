"""Makes demonstrations for SFT of a recording: the suite's actions, pictures of one size, each checked."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from rove.config import load
from rove.data.recording import Episode, Recording, feature, numbers
from rove.errors import RoveError
from rove.policies.actions import ActionConverter
from rove.runtime import memory
from rove.training.demonstrations import dataset_statistics
from rove.types import ActionSpec, Conventions, Demonstrations

_OUTSIDE = 0.01
"""Share of a dimension's actions that may lie outside the suite's bounds; they are clipped."""
_SPAN = 0.25
"""Share of its range by which a gripper's extremes may miss its bounds."""


@dataclass(frozen=True, slots=True)
class ImportOptions:
    """What is taken of a recording, and how; None: what the recording suggests."""

    image_size: int
    """Pixels of a side; pictures of another size are resized to it, squashed where they are no squares."""
    images: tuple[str, ...] | None = None
    """Features that are the pictures, in the suite's order."""
    state: tuple[str, ...] | None = None
    """Features that follow one another in the robot's state; empty: none is imported."""
    action: str | None = None
    action_spec: ActionSpec | None = None
    """The convention of the recorded actions; None: as the recording says, or else the suite's."""
    every: int = 1
    """Frames from one row to the next."""
    fps: float | None = None
    """The rate that the recording is known to have, where it is not the suite's."""
    episodes: int | None = None
    """The first so many; None: all."""
    failures: bool = False
    """Take episodes that failed, too."""


def import_recording(
    recording: Recording,
    conventions: Conventions,
    options: ImportOptions,
    on_begin: Callable[[int], None] = lambda episodes: None,
    on_episode: Callable[[], None] = lambda: None,
) -> tuple[Demonstrations, dict[str, Any]]:
    """Read demonstrations for a suite, and what is known of them: source, convention, statistics.

    `on_begin` is told the number of episodes, `on_episode` each one that has been read. Raises RoveError
    where something of the recording does not fit the suite; before any picture is read, where that can be
    known.
    """
    _check_rate(recording, conventions, options)
    images = recording.roles.images if options.images is None else options.images
    state = recording.roles.state if options.state is None else options.state
    action = options.action or recording.roles.action
    _check_cameras(recording, conventions, images)
    state = _state(recording, conventions, state, told=options.state is not None)
    source = _source_spec(recording, conventions, action, options.action_spec)
    recording.check(images)

    chosen: dict[int, Episode] = {}
    for index in range(min(len(recording.lengths), options.episodes or len(recording.lengths))):
        episode = recording.episode(index)
        if options.failures or episode.success is not False:
            chosen[index] = episode
    if not chosen:
        raise RoveError(f"{recording.where} has no episode that succeeded: import failures too, --failures.")
    _check_actions(recording, _all(chosen, action), action, source, conventions)
    for name in state:
        if not np.isfinite(_all(chosen, name)).all():
            raise RoveError(f"{name!r} of {recording.where} has numbers that are not finite: leave it out.")
    on_begin(len(chosen))
    pictures = _pictures(recording, chosen, images, options, on_episode)
    convert = ActionConverter(source, conventions.action_spec)
    parts = [_rows(episode, state, action, convert, options.every) for episode in chosen.values()]
    actions, mask, states, texts = zip(*parts, strict=True)
    demonstrations = Demonstrations(
        pictures,
        torch.arange(len(pictures)),
        tuple(text for part in texts for text in part),
        torch.cat(actions),
        torch.cat(mask),
        state=torch.cat(states) if state else None,
        episode=torch.repeat_interleave(torch.tensor([len(part) for part in texts])),
    )
    about = {
        "source": str(recording.where.resolve()),
        "layout": recording.layout,
        "suite": conventions.suite,
        "action_spec": load.to_dict(conventions.action_spec),
        "recorded_as": load.to_dict(source),
        "features": {"images": list(images), "state": list(state), "action": action},
        "fps": recording.fps,
        "every": options.every,
        "episodes": len(chosen),
        "left_out": len(recording.lengths[: options.episodes]) - len(chosen),
        "statistics": dataset_statistics(demonstrations),
    }
    return demonstrations, about


def _all(episodes: Mapping[int, Episode], name: str) -> np.ndarray:
    return np.concatenate([episode.columns[name] for episode in episodes.values()])


def _pictures(
    recording: Recording,
    episodes: Mapping[int, Episode],
    names: Sequence[str],
    options: ImportOptions,
    on_episode: Callable[[], None],
) -> Tensor:
    """The pictures of every row, uint8 [N, n, H, W, 3]: of one frame in `options.every`."""
    every, size = options.every, options.image_size
    rows = sum(-(-len(episode.tasks) // every) for episode in episodes.values())
    _check_memory(rows * len(names) * size * size * 3)
    pictures, at = torch.empty(rows, len(names), size, size, 3, dtype=torch.uint8), 0
    for index, episode in episodes.items():
        length = len(episode.tasks)
        for camera, name in enumerate(names):
            for frame, picture in zip(range(length), recording.pictures(index, name), strict=True):
                if frame % every == 0:
                    pictures[at + frame // every, camera] = _resized(picture, size)
        at += -(-length // every)
        on_episode()
    return pictures


def _rows(
    episode: Episode, state: Sequence[str], action: str, convert: ActionConverter, every: int
) -> tuple[Tensor, Tensor, Tensor, tuple[str, ...]]:
    """Of an episode's rows: actions [n, every, A], which of them are there, state [n, P], instructions."""
    length = len(episode.tasks)
    count = -(-length // every)
    converted = convert(torch.from_numpy(np.array(episode.columns[action])))
    actions = torch.zeros(count * every, converted.shape[1])
    actions[:length] = converted
    mask = torch.arange(count * every) < length
    vectors = [episode.columns[name].reshape(length, -1)[::every] for name in state]
    states = np.concatenate(vectors or [np.zeros((count, 0))], axis=1, dtype=np.float32)
    return (
        actions.reshape(count, every, -1),
        mask.reshape(count, every),
        torch.from_numpy(states),
        episode.tasks[::every],
    )


def _check_rate(recording: Recording, conventions: Conventions, options: ImportOptions) -> None:
    """Raise RoveError where actions last longer or shorter in the recording than in the suite."""
    fps, rate = recording.fps, conventions.rate
    if options.fps is not None and fps is not None and options.fps != fps:
        raise RoveError(
            f"--fps {options.fps:g}, but {recording.where} was recorded at {fps:g} frames a second."
        )
    if fps is None or rate is None or options.fps is not None:
        return
    if abs(fps - rate) > 0.5:  # LeRobot's are whole numbers
        raise RoveError(
            f"{recording.where} was recorded at {fps:g} frames a second, and {conventions.suite} acts "
            f"{rate:.3g} times: an action is not as long in one as in the other. Record or convert the data "
            f"at the suite's rate; where only the number is wrong, say so: --fps {fps:g}."
        )


def _check_cameras(recording: Recording, conventions: Conventions, images: Sequence[str]) -> None:
    for name in images:
        if not feature(recording, name).camera:
            raise RoveError(f"{name!r} of {recording.where} is no picture: name a camera with --images.")
    if not images or (conventions.images and len(images) not in conventions.images):
        wanted = " or ".join(map(str, conventions.images)) or "1 or more"
        there = [name for name, found in recording.features.items() if found.camera]
        raise RoveError(
            f"{recording.where} gives {len(images)} pictures a frame, {conventions.suite} {wanted}: name "
            f"those to take, in its order, with --images ({', '.join(there) or 'it has none'})."
        )


def _state(
    recording: Recording, conventions: Conventions, names: tuple[str, ...], told: bool
) -> tuple[str, ...]:
    """The features of the robot's state; none where the suite has none. Raises RoveError where their sizes do
    not make up the suite's state."""
    if conventions.state == 0 and not told:
        return ()
    sizes = {name: int(np.prod(numbers(recording, name).shape)) for name in names}
    total = sum(sizes.values())
    if names and conventions.state is not None and total != conventions.state:
        said = ", ".join(f"{name} {size}" for name, size in sizes.items())
        raise RoveError(
            f"{recording.where} has {total} numbers of the robot's state ({said}), {conventions.suite} "
            f"{conventions.state}: name features that make those up with --state KEY,KEY, or --state none."
        )
    return names


def _source_spec(
    recording: Recording, conventions: Conventions, action: str, told: ActionSpec | None
) -> ActionSpec:
    """The convention of the recorded actions. Raises RoveError where it cannot be the one of the
    recording."""
    found = numbers(recording, action)
    spec = told
    if spec is None and (kept := recording.about.get("action_spec")) is not None:
        spec = read_spec(kept, f"{recording.where}/meta/rove.json")
    if spec is None:
        spec = conventions.action_spec
    if found.shape != (spec.dim,):
        raise RoveError(
            f"{action!r} of {recording.where} is {found.dtype} {list(found.shape)}, and the convention has "
            f"{spec.dim} dimensions ({', '.join(spec.names)}): name another feature with --action, or "
            "describe what was recorded with --actions FILE.json."
        )
    return spec


def read_spec(found: Mapping[str, Any], where: str) -> ActionSpec:
    """An action spec from JSON. Raises RoveError, naming `where`, where it is none."""
    spec = load.decode(ActionSpec, dict(found), where)
    if len({len(spec.names), len(spec.units), len(spec.low), len(spec.high)}) != 1:
        raise RoveError(f"{where} describes actions by lists of different lengths: one entry a dimension.")
    return spec


def _check_actions(
    recording: Recording, recorded: np.ndarray, action: str, spec: ActionSpec, conventions: Conventions
) -> None:
    """Raise RoveError where the recorded actions, [T, A], cannot be in the convention that they are said to
    be."""
    fix = (
        "say in which convention they are with --actions FILE.json (names, units, low, high, frame, control, "
        "gripper)"
    )
    if not np.isfinite(recorded).all():
        raise RoveError(f"{action!r} of {recording.where} has numbers that are not finite: record it anew.")
    for i, name in enumerate(spec.names):
        low, high = spec.low[i], spec.high[i]
        slack = 1e-3 * (high - low)
        column = recorded[:, i]
        outside = float(((column < low - slack) | (column > high + slack)).mean())
        lowest, highest = float(column.min()), float(column.max())
        if outside > _OUTSIDE:
            raise RoveError(
                f"{outside:.0%} of {name!r} in {action!r} of {recording.where} lie outside [{low:g}, "
                f"{high:g}] (they span [{lowest:.3g}, {highest:.3g}]), so they are not actions of "
                f"{conventions.suite}: {fix}."
            )
        if (
            name == "gripper"
            and max(lowest - low, high - highest) > _SPAN * (high - low)
            and lowest != highest
        ):
            raise RoveError(
                f"The gripper in {action!r} of {recording.where} spans [{lowest:.3g}, {highest:.3g}], and "
                f"[{low:g}, {high:g}] is expected: {fix}."
            )


def _check_memory(size: int) -> None:
    there = memory.available()
    if there is not None and size > there:
        raise RoveError(
            f"The pictures need {size / 2**30:.1f} GiB of memory, and {there / 2**30:.1f} GiB are there: "
            "import with --every 4, a smaller --image-size, or fewer --episodes."
        )


def _resized(picture: np.ndarray, size: int) -> Tensor:
    """A picture uint8 [H, W, 3] as [size, size, 3]."""
    if picture.shape[:2] != (size, size):
        image = Image.fromarray(np.ascontiguousarray(picture))
        picture = np.asarray(image.resize((size, size), Image.Resampling.LANCZOS))
    return torch.from_numpy(np.array(picture))
