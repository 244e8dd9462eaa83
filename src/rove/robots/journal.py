"""What a run says: to a person as it goes, and to a file, a line of JSON each."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Journal:
    """A log of events. From any thread."""

    def __init__(self, file: Path | None, say: Callable[[str], None] = lambda text: None) -> None:
        """`say` is told each event in words; `file` gets it as JSON, after what is there already."""
        self._say, self._lock = say, threading.Lock()
        self.events: list[dict[str, Any]] = []
        """All events of this run, oldest first."""
        self._file = None
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            self._file = file.open("a")

    def write(self, event: str, quiet: bool = False, **details: Any) -> None:
        """Write an event: what happened, and numbers or text about it; a `quiet` one to the file only."""
        with self._lock:
            entry = {"event": event, "time": round(time.time(), 3), **details}
            self.events.append(entry)
            if self._file is not None:
                self._file.write(json.dumps(entry) + "\n")
                self._file.flush()
        if quiet:
            return
        words = details.get("text") or ", ".join(f"{name} {value}" for name, value in details.items())
        self._say(f"{event}: {words}" if words else event)

    def close(self) -> None:
        """Close the file; harmless when called twice."""
        if self._file is not None:
            self._file.close()
            self._file = None
