"""Checkpoints: written whole or not at all, resumed exactly, refused with the field's name on a mismatch.

A checkpoint is a directory: `policy/` (self-contained, what `rove eval` takes), `trainer.pt` (tensors and
plain values: optimizer, environments, cursors) and `meta.json` (iteration, version of the format).
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from rove.errors import RoveError
from rove.policies.base import Policy

FORMAT = 2
_PREFIX = "iteration_"


def write_atomically(target: Path, fill: Callable[[Path], None]) -> Path:
    """Let `fill` write a directory beside `target`, then move it into place in one rename."""
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.parent / f".{target.name}.{uuid.uuid4().hex[:8]}"
    draft.mkdir()
    try:
        fill(draft)
        for file in draft.rglob("*"):
            if file.is_file():
                with open(file, "rb") as handle:
                    os.fsync(handle.fileno())
        if target.exists():
            old = target.parent / f".{target.name}.old"
            target.rename(old)
            draft.rename(target)
            shutil.rmtree(old)
        else:
            draft.rename(target)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return target


def save(
    directory: Path, iteration: int, policy: Callable[[Path], None], trainer: dict[str, Any], keep: int
) -> Path:
    """Write the state after `iteration` iterations below `directory`; the newest `keep` stay.

    `policy` writes the policy into a directory: its `save_pretrained`, or what has it called elsewhere.
    """

    def fill(draft: Path) -> None:
        policy(draft / "policy")
        torch.save(trainer, draft / "trainer.pt")
        (draft / "meta.json").write_text(json.dumps({"format": FORMAT, "iteration": iteration}))

    path = write_atomically(directory / f"{_PREFIX}{iteration:06d}", fill)
    for old in _all(directory)[:-keep]:
        shutil.rmtree(old)
    return path


def save_policy(target: Path, policy: Policy) -> Path:
    """Write the policy alone (a warm-up's result)."""
    return write_atomically(target, policy.save_pretrained)


def _all(directory: Path) -> list[Path]:
    return sorted(directory.glob(f"{_PREFIX}*"))


def latest(directory: Path) -> Path:
    """The newest checkpoint below `directory`; RoveError where there is none."""
    found = _all(directory)
    if not found:
        raise RoveError(f"No checkpoint in {directory}: nothing to resume. Start the run without --resume.")
    return found[-1]


def load_trainer(path: Path) -> tuple[int, dict[str, Any]]:
    """The iteration count and trainer state of a checkpoint; RoveError on a format this code cannot read."""
    meta = json.loads((path / "meta.json").read_text())
    if meta["format"] != FORMAT:
        raise RoveError(
            f"{path} has checkpoint format {meta['format']}; this version of Rove reads {FORMAT}."
        )
    return meta["iteration"], torch.load(path / "trainer.pt", weights_only=True, map_location="cpu")


def refuse_mismatch(saved: dict[str, Any], current: dict[str, Any], prefix: str = "") -> None:
    """Raise RoveError naming the first field in which two resolved runs differ (`load.to_dict` of each)."""
    for name in sorted(saved.keys() | current.keys()):
        a, b = saved.get(name), current.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            refuse_mismatch(a, b, f"{prefix}{name}.")
        elif a != b:
            raise RoveError(
                f"Cannot resume: {prefix}{name} is {b!r}, the run was started with {a!r}. "
                "Resume without that override, or start a new run."
            )
