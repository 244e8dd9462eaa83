"""A file of a run or of a policy that is damaged is gone around, or named; a changed one is never used."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.faults.forks import FULL, Ended, Found, forked
from tests.faults.runs import (
    DIRECTORY,
    EVALUATE,
    OUT,
    RESUME,
    START,
    command,
    difference,
    gone_on,
    left,
    moments_of,
    struck,
)

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"
EVERY = 1 if FULL else 67
"""Of the ways to damage a file, one in so many is tried."""
OF_A_RUN = 3 if FULL else EVERY
"""The same of a run's files: most are there in each of its checkpoints, so every way on every third."""
PARTS = 3 if FULL else 1
"""Into which those of a run are dealt, so that several processes can try them."""
WHOLE = Path("whole")
"""A run, as it is before it is damaged."""


def a_bit(place: float) -> Callable[[bytes], bytes]:
    def flip(content: bytes) -> bytes:
        if not content:
            return content
        at = min(int(place * len(content)), len(content) - 1)
        return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]

    return flip


CONTENT: dict[str, Callable[[bytes], bytes]] = {
    "is empty": lambda content: b"",
    "is cut in half": lambda content: content[: len(content) // 2],
    "has zeros at its end": lambda content: content + bytes(64),
    "is zeros": lambda content: bytes(len(content)),
    "is text": lambda content: b"This is no such file.\n",
    "is a Git LFS pointer": lambda content: POINTER,
    **{f"has a bit changed at {place:.0%}": a_bit(place) for place in (0.0, 0.3, 0.6, 1.0)},
}
JSON: dict[str, Callable[[bytes], bytes]] = {
    "is null": lambda content: b"null\n",
    "is a list": lambda content: b"[]\n",
    "has a byte order mark": lambda content: b"\xef\xbb\xbf" + content,
    "is nested too deeply": lambda content: b"[" * 100_000,
}
PLACES: dict[str, Callable[[Path], Any]] = {
    "is not there": lambda path: None,
    "is a folder": Path.mkdir,
    "is a link to itself": lambda path: path.symlink_to(path.name),
}


def kinds_of(file: Path) -> list[str]:
    """What can be done to a file, in words."""
    return [*CONTENT, *(JSON if file.suffix in (".json", ".jsonl") else ()), *PLACES]


def damage(file: Path, how: str) -> None:
    if how in PLACES:
        file.unlink()
        PLACES[how](file)
    else:
        file.write_bytes((CONTENT | JSON)[how](file.read_bytes()))


def files_of(directory: Path) -> list[Path]:
    """Its files, and of pictures that are made alike the first."""
    files = [path for path in sorted(directory.rglob("*")) if path.is_file() and path.name != ".lock"]
    return [file for file in files if file.suffix != ".webp" or file.stem == "0"]


def judge(ended: Ended, file: Path, found: dict, wanted: dict) -> str | None:
    # A file is named, or the folder of the checkpoint or policy that it is in.
    named = any(part in ended.text for part in file.parts if part not in DIRECTORY.parts)
    if ended.hung or ended.crashed or ended.status not in (0, 2):
        return f"{ended}"
    if ended.status == 2:
        return None if ended.refused and named else f"it is not named: {ended}"
    own = file.as_posix()
    other = difference(
        {name: value for name, value in found.items() if not own.endswith(name)},
        {name: value for name, value in wanted.items() if not own.endswith(name)},
    )
    return None if other is None else f"{other}: {ended.text[-300:]}"


def damage_each(
    kind: str,
    directory: Path,
    restore: Callable[[], None],
    use: Callable[[], Ended],
    result: Path,
    part: int = 0,
    parts: int = 1,
    every: int = EVERY,
) -> Found:
    """Damage each file of a directory in every way, and use what is there.

    What is used as if nothing had happened has to leave in `result` what it leaves there undamaged.
    """
    restore()
    ended = use()
    assert ended.status == 0, ended.text
    wanted = left(result)
    restore()
    files, found = files_of(directory), Found(kind)
    for number, file in enumerate(files):
        for place, how in enumerate(kinds_of(file)):
            if (number + place) % every or (number + place) // every % parts != part:
                continue
            restore()
            damage(file, how)
            ended = use()
            there = left(result) if ended.status == 0 else {}
            found.judge(f"{file} {how}", judge(ended, file, there, wanted))
    return found


def copied(source: Path, target: Path) -> Callable[[], None]:
    def restore() -> None:
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(source, target)
        shutil.rmtree(OUT.parent, ignore_errors=True)

    return restore


def stopped_after(target: str) -> None:
    """A run that was killed as soon as the last directory `target` was in its place, as `WHOLE`."""
    names = moments_of(DIRECTORY, False, *START)
    place = max(n for n, name in enumerate(names) if name.startswith("rename") and f".{target}." in name)
    after = next(n for n in range(place + 1, len(names)) if not names[n].startswith(("fsync", "rem", "rmd")))
    shutil.rmtree(DIRECTORY)
    assert forked(struck, DIRECTORY, after + 1, (signal.SIGKILL,), False, *START).status == -signal.SIGKILL
    shutil.move(DIRECTORY, WHOLE)


def damage_a_run(part: int) -> Found:
    stopped_after("iteration_000002")
    return damage_each(
        "a file of a run is damaged", DIRECTORY, copied(WHOLE, DIRECTORY), lambda: forked(command, *RESUME),
        DIRECTORY, part, PARTS, OF_A_RUN,
    )  # fmt: skip


def damage_a_warm_up() -> Found:
    stopped_after("warm_up")
    restore = copied(WHOLE, DIRECTORY)
    return damage_each("a file of a warm-up is damaged", DIRECTORY, restore, gone_on, DIRECTORY)


def damage_a_policy_that_is_evaluated() -> Found:
    assert forked(command, *START).status == 0
    shutil.copytree(DIRECTORY, WHOLE)
    restore = copied(WHOLE, DIRECTORY)
    found = Found("a file of a policy is damaged")
    for policy in ("best", "checkpoints/iteration_000003"):
        words = list(EVALUATE)
        words[1] = str(DIRECTORY / policy / ("policy" if "/" in policy else ""))
        part = damage_each(
            found.kind, DIRECTORY / policy, restore, lambda words=words: forked(command, *words), OUT.parent
        )
        found.held += part.held
        found.broken += part.broken
    return found


def damage_a_policy_that_is_started_from() -> Found:
    assert forked(command, *START).status == 0
    shutil.move(DIRECTORY / "best", WHOLE)
    policy = Path("policy")
    restored = copied(WHOLE, policy)

    def restore() -> None:
        restored()
        shutil.rmtree(DIRECTORY, ignore_errors=True)

    words = (*START, "--sft", "none", "--policy.checkpoint", str(policy), "--training.iterations", "1")
    return damage_each(
        "a file of a policy is damaged", policy, restore, lambda: forked(command, *words), DIRECTORY
    )


def damage_what_is_reported() -> Found:
    assert forked(command, *START).status == 0
    shutil.copytree(DIRECTORY, WHOLE)
    page = Path("page")
    page.mkdir()
    return damage_each(
        "a file of a run is damaged that is reported", DIRECTORY, copied(WHOLE, DIRECTORY),
        lambda: forked(command, "report", str(DIRECTORY)), page,
    )  # fmt: skip


@pytest.mark.parametrize("part", range(PARTS))
def test_a_damaged_file_of_a_run_is_gone_around_or_named(part, sweep):
    sweep(damage_a_run, part)


@pytest.mark.skipif(not FULL, reason="long: make test-faults runs it")
@pytest.mark.parametrize(
    "inject", [damage_a_warm_up, damage_a_policy_that_is_started_from, damage_what_is_reported]
)
def test_a_damaged_file_of_its_parts_is_gone_around_or_named(inject, sweep):
    sweep(inject)


def test_a_damaged_file_of_a_policy_is_named(sweep):
    sweep(damage_a_policy_that_is_evaluated)
