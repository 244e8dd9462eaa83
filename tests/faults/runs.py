"""What a run of the dots leaves in its directory, without what a clock or a process id says."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from tests.faults import dots
from tests.faults.forks import Ended, forked, rove
from tests.faults.moments import Moments

from rove import train
from rove.training.snapshots import Snapshots

DIRECTORY = Path("runs/dots")
assert dots
START = ("train", "dots")
RESUME = ("train", "--resume", str(DIRECTORY))
OUT = Path("out/result.json")
EVALUATE = (
    "eval",
    str(DIRECTORY / "best"),
    *"--suite dots --episodes 6 --num-envs 2 --out".split(),
    str(OUT),
)

_ASIDE = {"seconds", "command", "commit", "slot"}
"""Keys of what may differ: an evaluation that goes on has its episodes in other slots, and the source may
change while a sweep runs."""
_SKIPPED = (".lock", "report.html")
"""Compared by their being there."""


def command(*words: str) -> int:
    """A command of Rove's in this process, in which a warm-up is saved after each of its steps, and few
    episodes are recorded."""
    Snapshots.__init__.__kwdefaults__["seconds"] = 0.0
    train._RECORDED = 2
    return rove(*words)


def left(directory: Path) -> dict[str, Any]:
    """Every file of a directory -> what is in it."""
    return {path.relative_to(directory).as_posix(): _content(path) for path in sorted(directory.rglob("*"))}


def _content(path: Path) -> Any:
    if path.name in _SKIPPED or not path.is_file():
        return None
    try:
        return _read(path)
    except Exception:  # noqa: BLE001 - it is the damaged one, of whatever kind
        return path.read_bytes()


def _read(path: Path) -> Any:
    if path.name == "trainer.pt":
        return _plain(torch.load(path, weights_only=True))
    if path.name == "metrics.jsonl":
        return [_plain(json.loads(line)) for line in path.read_text().splitlines()]
    if path.name == "checksums.json":  # of a trainer that holds a clock's numbers
        return sorted(json.loads(path.read_text()))
    return _plain(json.loads(path.read_text())) if path.suffix == ".json" else path.read_bytes()


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            key: _plain(item)
            for key, item in value.items()
            if not (key in _ASIDE or str(key).startswith(("time/", "speed/", "minutes")))
        }
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return (value.dtype, value.tolist()) if isinstance(value, torch.Tensor) else value


def difference(found: dict[str, Any], wanted: dict[str, Any]) -> str | None:
    """Which files differ; None: none does."""
    lacking, more = wanted.keys() - found.keys(), found.keys() - wanted.keys()
    other = [name for name in wanted.keys() & found.keys() if repr(found[name]) != repr(wanted[name])]
    words = [("lacks", lacking), ("has besides", more), ("differs in", other)]
    return "; ".join(f"{word} {', '.join(sorted(names)[:4])}" for word, names in words if names) or None


def moments_of(folder: Path, halves: bool, *words: str) -> list[str]:
    """Run a command and name the moments at which something below the folder changes."""
    folder.parent.mkdir(parents=True, exist_ok=True)  # it is there at every later command
    names = Path("moments")
    ended = forked(_counted, folder, halves, names, *words)
    assert ended.status == 0, ended.text
    return names.read_text().splitlines()


def _counted(folder: Path, halves: bool, names: Path, *words: str) -> int:
    moments = Moments(folder, halves=halves)
    moments.watch()
    code = command(*words)
    moments.end()
    names.write_text("\n".join(moments.names))
    return code


def struck(folder: Path, at: int, signals: tuple[int, ...], halves: bool, *words: str) -> int:
    """Run a command, in this process, to which signals come at a moment of the folder."""
    moments = Moments(folder, at, signals, halves)
    moments.watch()
    code = command(*words)
    moments.end()
    return code


def gone_on() -> Ended:
    """Have the run of the dots go on, as its user would after whatever happened: resumed, or where there is
    nothing to resume started again."""
    ended = forked(command, *RESUME)
    return forked(command, *START) if ended.refused else ended


def imported(names: Path) -> int:
    """A run, of which the names of the modules that it imports are written."""
    before = set(sys.modules)
    code = command(*START)
    names.write_text("\n".join(sorted(set(sys.modules) - before)))
    return code
