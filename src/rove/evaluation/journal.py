"""A journal of finished episodes on disk, from which an evaluation that was stopped goes on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rove.errors import RoveError
from rove.types import EpisodeRecord, EpisodeSpec


class Journal:
    """A file beside the report to come: a line that describes the evaluation, then a line for each episode.

    `about` is everything that decides an outcome; a journal of another evaluation is refused.
    """

    def __init__(self, out: Path, about: Mapping[str, Any]) -> None:
        self.path = out.with_name(out.name + ".journal")
        self.done: list[EpisodeRecord] = []
        """Episodes that ended before the evaluation was stopped."""
        head = json.dumps(about, sort_keys=True)
        lines = self.path.read_text(errors="replace").splitlines() if self.path.is_file() else []
        if lines and lines[0] != head:
            raise RoveError(
                f"{self.path} is of another evaluation, which was stopped: delete it, or name another --out."
            )
        for line in lines[1:]:
            if (record := _record(line)) is not None:
                self.done.append(record)
        out.parent.mkdir(parents=True, exist_ok=True)
        # Written anew, for the last line may have been cut short; whole or not at all.
        partial = self.path.with_name(f".{self.path.name}.partial")
        partial.write_text("".join(f"{line}\n" for line in [head, *map(_line, self.done)]))
        partial.replace(self.path)

    def add(self, record: EpisodeRecord) -> None:
        """Append one finished episode."""
        with self.path.open("a") as file:
            file.write(_line(record) + "\n")

    def close(self) -> None:
        """Delete the file, since the report holds every episode."""
        self.path.unlink(missing_ok=True)


def _line(record: EpisodeRecord) -> str:
    return json.dumps(asdict(record))


def _record(line: str) -> EpisodeRecord | None:
    try:
        content = json.loads(line)
        return EpisodeRecord(**{**content, "spec": EpisodeSpec(**content["spec"])})
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
