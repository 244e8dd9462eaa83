"""Expert demonstrations: observations at each chunk, with the actions of the scripted expert."""

from __future__ import annotations

import json
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rove.envs.answers import Checked
from rove.envs.base import Corrector, Demonstrator, Fallible, Grounder, VectorEnv
from rove.envs.sampler import EpisodeSampler
from rove.errors import RoveError
from rove.types import Demonstrations, EpisodeRecord, Observation

_AT_REST = 0.05
"""Share of an expert's actions that are exactly zero in a dimension, from which on zero is one of its own."""
_TURN = 3
"""Chunks, in the mean, that an expert and a policy that take turns act before the other does."""


def dataset_statistics(
    demonstrations: Demonstrations, chunk: int | None = None, zero_centred: bool = False
) -> dict[str, dict[str, list[float]]]:
    """Compute for each dimension q01, q99, min, max, mean, std: of the actions that count ("action") and,
    where there is one, of the state ("proprio").

    Where rows begin `chunk` actions after each other and show more of them, each action counts once. With
    `zero_centred` q01 and q99 of an action's dimension in which the expert is often at rest lie as far from
    zero, so that zero is the centre of a bin.
    """
    own = slice(chunk)
    actions = demonstrations.actions[:, own][demonstrations.mask[:, own]]
    found = {"action": _spread(actions)}
    if zero_centred:
        _centre(found["action"], (actions == 0).double().mean(dim=0).tolist())
    return found if demonstrations.state is None else found | {"proprio": _spread(demonstrations.state)}


def _spread(values: torch.Tensor) -> dict[str, list[float]]:
    x = values.double().numpy()
    found = {
        "q01": np.quantile(x, 0.01, axis=0),
        "q99": np.quantile(x, 0.99, axis=0),
        "min": x.min(0),
        "max": x.max(0),
        "mean": x.mean(0),
        "std": x.std(0),
    }
    return {name: numbers.tolist() for name, numbers in found.items()}


def _centre(spread: dict[str, list[float]], at_rest: Sequence[float]) -> None:
    """Make the range from q01 to q99 as wide below zero as above, where the expert is often at rest."""
    for i, share in enumerate(at_rest):
        if share >= _AT_REST:
            reach = max(abs(spread["q01"][i]), abs(spread["q99"][i]))
            spread["q01"][i], spread["q99"][i] = -reach, reach


def save_demonstrations(
    demonstrations: Demonstrations, path: Path, made_from: Mapping[str, Any] | None = None
) -> None:
    """Write one compressed file, with the settings that it was made from; nothing in it can run code."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.draft.npz")
    arrays = {name: getattr(demonstrations, name).numpy() for name in _TENSORS}
    for name in _OPTIONAL:
        if (values := getattr(demonstrations, name)) is not None:
            arrays[name] = values.numpy()
    if made_from is not None:
        arrays["made_from"] = np.array(json.dumps(made_from))
    np.savez_compressed(draft, instruction=np.array(demonstrations.instruction), **arrays)
    draft.rename(path)


def made_from(path: Path) -> dict[str, Any] | None:
    """The settings that a file of demonstrations was made from; None where it does not say."""
    with _opened(path) as file:
        return _made_from(file)


def _made_from(file: Any) -> dict[str, Any] | None:
    return json.loads(str(file["made_from"])) if "made_from" in file.files else None


def described(path: Path) -> tuple[dict[str, Any], tuple[str, ...], int]:
    """What a file of demonstrations was made from, its instructions, each once, and a sum that is another one
    for other content; its pictures are not read. Raises RoveError where there is no such file."""
    if not path.is_file():
        raise RoveError(
            f"There are no demonstrations at {path}: make some, rove data import or rove collect."
        )
    with _opened(path, whole=False) as file:
        instructions = dict.fromkeys(file["instruction"].tolist()) if "instruction" in file.files else {}
        sums = [[entry.filename, entry.CRC] for entry in file.zip.infolist()]
        return _made_from(file) or {}, tuple(instructions), zlib.crc32(json.dumps(sums).encode())


@contextmanager
def _opened(path: Path, whole: bool = True) -> Iterator[Any]:
    """The arrays of a file, of which every byte is checked first where it is to be read `whole`."""
    try:
        with zipfile.ZipFile(path) as archive:
            if whole and (changed := archive.testzip()):  # NumPy does not read as far as the checksum
                raise zipfile.BadZipFile(f"{changed} has changed")
        with np.load(path, allow_pickle=False) as file:
            yield file
    except RoveError:
        raise
    except Exception as error:  # whatever the readers of archives and arrays raise
        raise RoveError(f"{path} is damaged ({error}): delete it, and it is collected anew.") from error


def load_demonstrations(path: Path) -> Demonstrations:
    """Read what `save_demonstrations` wrote; RoveError where it is something else."""
    with _opened(path) as file:
        if missing := {"instruction", *_TENSORS} - set(file.files):
            raise RoveError(f"{path} is not a demonstration file: it lacks {', '.join(sorted(missing))}.")
        there = _TENSORS + tuple(name for name in _OPTIONAL if name in file.files)
        tensors = {name: torch.from_numpy(file[name]) for name in there}
        return Demonstrations(instruction=tuple(file["instruction"].tolist()), **tensors)


_TENSORS = ("images", "frame", "actions", "mask")
_OPTIONAL = ("points", "state", "episode")


def collect_demonstrations(
    env: VectorEnv,
    *,
    episodes: int,
    noise: float,
    seed: int,
    horizon: int | None = None,
    slips: float = 0.0,
    emphasis: Sequence[str] = (),
    on_episode: Callable[[EpisodeRecord], None] = lambda record: None,
    drive: Callable[[Observation], torch.Tensor] | None = None,
    stream: int = 1,
) -> Demonstrations:
    """Collect the first `episodes` successes of the environment's scripted expert on train states.

    Each row shows `horizon` actions (default: those of a chunk) from the beginning of a chunk on, what the
    expert did in the chunks that followed included, as far as the episode went without a miss on purpose.
    Failures are left out. `noise`: see `Demonstrator.step_expert_chunk`; `slips`: the share of chunks in
    which the expert misses on purpose, which are left out, so that the chunks after them show how to recover;
    `emphasis`: see `RolloutConfig`. `on_episode` is called with every record, failures included. `drive`,
    which chooses actions [B, C, A], takes turns with the expert, of a few chunks each, and only what the
    expert did is shown. `stream` numbers the episodes that are drawn. Raises RoveError where the suite has no
    expert, or none that can miss or look on as asked, or where it fails more than half of the time.
    """
    if not isinstance(env, Demonstrator):
        raise RoveError(f"Suite {env.suite.name!r} has no scripted expert; bring demonstrations in a file.")
    if slips and not isinstance(env, Fallible):
        raise RoveError(f"The expert of suite {env.suite.name!r} cannot miss; set sft.slips to 0.")
    if drive and not isinstance(env, Corrector):
        raise RoveError(f"The expert of suite {env.suite.name!r} cannot look on; set sft.relabel to 0.")
    sampler = EpisodeSampler(env.suite, seed, stream=stream, emphasis=emphasis)
    generator = np.random.default_rng((seed, stream) if drive else seed)
    watching = np.zeros(env.num_envs, bool)
    if drive:
        watching = generator.random(env.num_envs) < 0.5
    pending: dict[int, list[tuple]] = defaultdict(list)
    rows: list[tuple] = []
    episode: list[int] = []
    successes = failures = 0
    env.finals = "none"
    calls = Checked(env)
    observation = calls.reset(sampler.take(env.num_envs))
    while successes < episodes:
        env.enqueue(sampler.take(max(0, env.num_envs - env.queued)))
        specs = env.specs
        points = calls.points()
        slipping = np.zeros(env.num_envs, bool)
        if isinstance(env, Fallible) and slips:
            slipping = generator.random(env.num_envs) < slips
            env.slip(slipping, generator)
        if drive and isinstance(env, Corrector):
            watching ^= generator.random(env.num_envs) < 1 / _TURN
            env.watch(watching, drive(observation))
        actions, result = calls.step_expert_chunk(noise, generator)
        for slot, spec in enumerate(specs):
            assert spec is not None
            seen = (observation.images[slot], observation.instruction[slot])
            point = None if points is None else points[slot]
            state = None if observation.state is None else observation.state[slot]
            # What follows a chunk is not shown beyond a miss: nobody is to expect to miss.
            counts = result.executed[slot] & ~torch.tensor(bool(slipping[slot] or watching[slot]))
            pending[slot].append((*seen, actions[slot], counts, point, state))
        for record in result.finished:
            chunks = pending.pop(record.slot, [])
            failures += not record.success
            if successes < episodes:
                on_episode(record)
            if record.success and successes < episodes:
                rows += _shown(chunks, horizon or env.chunk)
                episode += [successes] * (len(rows) - len(episode))
                successes += 1
        if failures > max(successes, env.num_envs):
            if drive:
                raise RoveError(
                    f"Policy and expert of {env.suite.name!r}, taking turns, fail too often ({failures} of "
                    f"{failures + successes} episodes). Raise sft.steps, or set sft.relabel to 0."
                )
            raise RoveError(
                f"The expert of {env.suite.name!r} fails too often ({failures} of "
                f"{failures + successes} episodes). Lower sft.noise or sft.slips, or look at the tasks."
            )
        observation = result.observation
    images, instruction, actions, mask, where, states = zip(*rows, strict=True)
    return Demonstrations(
        torch.stack(images),
        torch.arange(len(rows)),
        tuple(instruction),
        torch.stack(actions),
        torch.stack(mask),
        torch.stack(where) if isinstance(env, Grounder) else None,
        None if observation.state is None else torch.stack(states),
        torch.tensor(episode),
    )


def lengthened(demonstrations: Demonstrations, horizon: int) -> Demonstrations:
    """The same rows, with `horizon` actions each: those of the rows that follow in the same episode are
    added, as far as they count, or what is too many is left out.

    Rows have to show the actions up to the next one, and no more. Raises RoveError where nothing says of
    which episode they are, and some have to be added.
    """
    actions, mask, episode = demonstrations.actions, demonstrations.mask, demonstrations.episode
    count, own = mask.shape
    if horizon > own:
        if episode is None:
            raise RoveError(
                f"The demonstrations show {own} actions from each picture on and do not say how they go on, "
                f"but the policy predicts {horizon}: collect or import them anew."
            )
        following = torch.arange(count)[:, None] + torch.arange(-(-horizon // own))  # [N, rows]
        there = following.clamp(max=count - 1)
        same = (following < count) & (episode[there] == episode[:, None])
        mask = (mask[there] & same[..., None]).flatten(1).int().cumprod(1).bool()
        actions = actions[there].flatten(1, 2) * mask[..., None]
    return replace(demonstrations, actions=actions[:, :horizon], mask=mask[:, :horizon])


def _shown(chunks: Sequence[tuple], horizon: int) -> list[tuple]:
    """Return the rows of an episode: of each chunk that counts `horizon` actions from its beginning on."""
    rows = []
    for start, (image, text, actions, mask, point, state) in enumerate(chunks):
        if not mask.any():
            continue
        following = chunks[start : start - (-horizon // len(actions))]
        shown = torch.zeros(horizon, *actions.shape[1:])
        counts = torch.zeros(horizon, dtype=torch.bool)
        together = torch.cat([chunk[2] for chunk in following])[:horizon]
        there = torch.cat([chunk[3] for chunk in following])[:horizon]
        shown[: len(together)] = together
        counts[: len(there)] = there.cumprod(0)
        rows.append((image, text, shown, counts, point, state))
    return rows


def join(parts: Sequence[Demonstrations]) -> Demonstrations:
    """Concatenate the rows of all parts, in order; points, states and episodes are kept where all parts have
    them, and of points those of the pictures that all parts say them of."""
    frames = np.cumsum([0, *(len(part.images) for part in parts)]).tolist()
    episodes = np.cumsum(
        [0, *(0 if part.episode is None else 1 + int(part.episode.max()) for part in parts)]
    ).tolist()

    known = min((part.points.shape[1] for part in parts if part.points is not None), default=0)

    def all_of(columns: Iterator[torch.Tensor | None]) -> torch.Tensor | None:
        there = [column for column in columns if column is not None]
        return torch.cat(there) if len(there) == len(parts) else None

    return Demonstrations(
        torch.cat([part.images for part in parts]),
        torch.cat([part.frame + offset for part, offset in zip(parts, frames, strict=False)]),
        tuple(text for part in parts for text in part.instruction),
        torch.cat([part.actions for part in parts]),
        torch.cat([part.mask for part in parts]),
        all_of(None if part.points is None else part.points[:, :known] for part in parts),
        all_of(part.state for part in parts),
        all_of(
            None if part.episode is None else part.episode + offset
            for part, offset in zip(parts, episodes, strict=False)
        ),
    )


def collect_grounding_images(
    env: VectorEnv, *, images: int, seed: int, on_image: Callable[[int], None]
) -> Demonstrations:
    """Collect where things are in `pictures` images, or a few more, of scenes of the train split: see
    `Grounder.ground`.

    A published VLA starts from a vision-language model that can find what a sentence names; for a policy
    trained from scratch this stands in for it.
    """
    if not isinstance(env, Grounder):
        raise RoveError(f"Suite {env.suite.name!r} cannot say where things are; set sft.grounding to 0.")
    sampler = EpisodeSampler(env.suite, seed, stream=2)
    calls, parts = Checked(env), []
    left = images
    while left > 0:
        parts.append(calls.ground(sampler.take(min(env.num_envs, left))))
        left -= len(parts[-1].images)
        on_image(len(parts[-1].images))
    return join(parts)
