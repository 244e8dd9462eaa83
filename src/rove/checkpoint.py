"""Checkpoints: written whole or not at all, resumed exactly, refused with the field's name on a mismatch.

A checkpoint is a directory: `policy/` (self-contained, what `rove eval` takes), `trainer.pt` (tensors and
plain values: optimizer, environments, cursors), `meta.json` (iteration, version of the format) and
`checksums.json` (SHA-256 of every other file, written last). One whose files do not have these is damaged: it
is never loaded, and the one before it is resumed instead.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from rove.errors import RoveError
from rove.policies.base import Policy

FORMAT = 3
CHECKSUMS = "checksums.json"
_NAME = re.compile(r"iteration_(\d{6,})")
_DRAFT = re.compile(r"\.(?P<target>.+)\.[0-9a-f]{8}\.draft")


def write_atomically(target: Path, fill: Callable[[Path], None]) -> Path:
    """Let `fill` write a directory beside `target`, and move it into place, with its checksums.

    Whenever the process is killed or the power fails, there is the old directory or the new one after
    `clean_up` of the parent, and both are whole.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    clean_up(target.parent, target.name)
    draft = target.parent / f".{target.name}.{uuid.uuid4().hex[:8]}.draft"
    draft.mkdir()
    try:
        fill(draft)
        (draft / CHECKSUMS).write_text(json.dumps(_checksums(draft), indent=1))
        for path in sorted(draft.rglob("*")):
            _sync(path)
        _sync(draft)
        old = _set_aside(target)
        if target.exists():
            target.rename(old)
        draft.rename(target)
        _sync(target.parent)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return target


def clean_up(directory: Path, name: str | None = None) -> None:
    """Undo what killed writes of `name`, or of any directory, left half done below `directory`.

    An old directory that was set aside is put back where no new one has taken its place; drafts go.
    """
    for path in directory.glob(".*"):
        if (draft := _DRAFT.fullmatch(path.name)) and name in (None, draft["target"]):
            shutil.rmtree(path)
        elif path.name.endswith(".old") and name in (None, path.name[1:-4]) and path.is_dir():
            target = directory / path.name[1:-4]
            if target.exists():
                shutil.rmtree(path)
            else:
                path.rename(target)


def _set_aside(target: Path) -> Path:
    return target.parent / f".{target.name}.old"


def _sync(path: Path) -> None:
    """Have a file's or a directory's content on the disk before going on."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _checksums(directory: Path) -> dict[str, str]:
    files = (path for path in sorted(directory.rglob("*")) if path.is_file() and path.name != CHECKSUMS)
    return {path.relative_to(directory).as_posix(): _checksum(path) for path in files}


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def damage(directory: Path, below: str = "") -> str | None:
    """What is wrong with a directory that `write_atomically` wrote, by file; None where it is whole.

    Only files whose names begin with `below` are looked at.
    """
    file = directory / CHECKSUMS
    wanted = _read(file)
    if wanted is None:
        older = _read(directory / "meta.json")
        if not file.exists() and older is not None and older.get("format") != FORMAT:
            return None  # written before there were checksums; `load_trainer` says so
        return f"{file} is missing or damaged"
    for name, checksum in wanted.items():
        if not name.startswith(below):
            continue
        if not (directory / name).is_file():
            return f"{directory / name} is missing"
        if _checksum(directory / name) != checksum:
            return f"{directory / name} is damaged"
    return None


def refuse_damaged(policy: Path) -> None:
    """Raise RoveError, naming the file, where a policy is not as a run wrote it: a bit of its weights may
    have changed. One without checksums is not looked at."""
    for directory, below in ((policy, ""), (policy.parent, f"{policy.name}/")):
        if (directory / CHECKSUMS).exists() and (what := damage(directory, below)) is not None:
            raise RoveError(
                f"{what}: copy it again from where it came from or, if you changed it yourself, delete "
                f"{directory / CHECKSUMS}."
            )


def _read(file: Path) -> dict[str, Any] | None:
    """The JSON object in a file; None where there is none."""
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def save(
    directory: Path,
    iteration: int,
    policy: Callable[[Path], None],
    trainer: dict[str, Any],
    keep: int,
    run: Mapping[str, Any] | None = None,
) -> Path:
    """Write the state after `iteration` iterations below `directory`; the newest `keep` stay.

    `policy` writes the policy into a directory: its `save_pretrained`, or what has it called elsewhere. `run`
    are the settings, which `refuse_other_run` compares.
    """

    meta = {"format": FORMAT, "iteration": iteration, "run": run}

    def fill(draft: Path) -> None:
        policy(draft / "policy")
        torch.save(trainer, draft / "trainer.pt")
        (draft / "meta.json").write_text(json.dumps(meta))

    path = write_atomically(directory / f"iteration_{iteration:06d}", fill)
    prune(path, keep)
    return path


def prune(newest: Path, keep: int) -> None:
    """Remove the checkpoints that are older than the `keep` that end with `newest`."""
    until = [path for path in _all(newest.parent) if _number(path) <= _number(newest)]
    for old in until[:-keep]:
        shutil.rmtree(old)


def save_policy(target: Path, policy: Policy) -> Path:
    """Write the policy alone (a warm-up's result)."""
    return write_atomically(target, policy.save_pretrained)


def _all(directory: Path) -> list[Path]:
    """The checkpoints below a directory, oldest first; what has another name is not Rove's to touch."""
    return sorted((path for path in directory.glob("*") if _NAME.fullmatch(path.name)), key=_number)


def _number(path: Path) -> int:
    """The iteration of a checkpoint."""
    return int(path.name.rpartition("_")[2])


def exists(directory: Path) -> bool:
    """Whether there is a checkpoint below `directory`, whole or damaged."""
    return bool(_all(directory))


def latest(directory: Path, say: Callable[[str], None] = lambda text: None) -> Path:
    """The newest checkpoint below `directory` that is whole; `say` is told of damaged ones that are newer.

    Raises RoveError where there is none, naming the damaged files.
    """
    clean_up(directory)
    wrong = []
    for path in reversed(_all(directory)):
        if (what := damage(path)) is None:
            for text in wrong:
                say(f"{text}: going on from {path.name} instead")
            return path
        wrong.append(what)
    if wrong:
        raise RoveError(
            f"No checkpoint in {directory} is whole: {'; '.join(wrong)}. Copy it again from where it came "
            f"from, or remove {directory} and start the run again."
        )
    raise RoveError(f"No checkpoint in {directory}: nothing to resume. Start the run without --resume.")


def load_trainer(path: Path) -> tuple[int, dict[str, Any]]:
    """The iteration count and trainer state of a checkpoint; RoveError on a format this code cannot read."""
    meta = json.loads((path / "meta.json").read_text())
    if meta["format"] != FORMAT:
        raise RoveError(
            f"{path} has checkpoint format {meta['format']}; this version of Rove reads {FORMAT}."
        )
    return meta["iteration"], torch.load(path / "trainer.pt", weights_only=True, map_location="cpu")


def refuse_other_run(path: Path, run: Mapping[str, Any]) -> None:
    """Raise RoveError, naming the field, where a checkpoint that is whole is of a run with other settings."""
    made_by = json.loads((path / "meta.json").read_text()).get("run")
    if made_by is not None:  # older checkpoints do not say
        refuse_mismatch(made_by, run)


_MAY_CHANGE = {"placement.deadline", "placement.max_restarts"}
"""How long a run waits for a worker, and how often it is replaced, decides nothing of what is learned; and
who was stopped by it has to be able to change it."""


def refuse_mismatch(saved: Mapping[str, Any], current: Mapping[str, Any], prefix: str = "") -> None:
    """Raise RoveError naming the first field in which two resolved runs differ (`load.to_dict` of each).

    The deadline of a worker and its number of restarts may differ.
    """
    for name in sorted(saved.keys() | current.keys()):
        a, b = saved.get(name), current.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            refuse_mismatch(a, b, f"{prefix}{name}.")
        elif a != b and prefix + name not in _MAY_CHANGE:
            raise RoveError(
                f"Cannot resume: {prefix}{name} is {b!r}, the run was started with {a!r}. "
                "Resume without that override, or start a new run."
            )
