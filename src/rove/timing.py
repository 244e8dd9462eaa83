"""Stopwatches: seconds by name, measured on the host, and when, for a timeline."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple


class Span(NamedTuple):
    """Something that was done, on the clock that all processes of a machine share."""

    name: str
    track: str
    """Who did it: "policy 0", "env 1"."""
    start: float
    """Seconds of `time.perf_counter`."""
    end: float


class Stopwatch:
    """Adds up wall-clock seconds under names; with `spans`, keeps every block too.

    Example: `with watch("simulation"): env.step_chunk(actions)`, then `watch.take()`.
    """

    def __init__(self, track: str = "main", spans: bool = False) -> None:
        self.track = track
        self.seconds: dict[str, float] = defaultdict(float)
        """By name, since the last `take`."""
        self._keeps, self._spans = spans, list[Span]()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Time the block under `name`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.add(name, start, time.perf_counter())

    def add(self, name: str, start: float, end: float, track: str | None = None) -> None:
        """Count what was done from `start` to `end`, seconds of `time.perf_counter`."""
        self.seconds[name] += end - start
        if self._keeps:
            self._spans.append(Span(name, track or self.track, start, end))

    def count(self, name: str, seconds: float) -> None:
        """Count seconds that have no place on a timeline."""
        self.seconds[name] += seconds

    def merge(self, seconds: Mapping[str, float], spans: Iterable[Span] = ()) -> None:
        """Count what another process's stopwatch has taken."""
        for name, spent in seconds.items():
            self.seconds[name] += spent
        self._spans += spans

    def take(self) -> dict[str, float]:
        """Seconds by name since the last `take`."""
        taken = dict(self.seconds)
        self.seconds.clear()
        return taken

    def take_spans(self) -> list[Span]:
        """The blocks since the last `take_spans`."""
        taken, self._spans = self._spans, []
        return taken


def write_trace(path: Path, spans: Iterable[Span]) -> None:
    """Write a timeline that https://ui.perfetto.dev opens: one track for each of the spans' tracks."""
    ordered = sorted(spans, key=lambda span: span.start)
    tracks = {name: number for number, name in enumerate(sorted({span.track for span in ordered}), 1)}
    zero = ordered[0].start if ordered else 0.0
    events: list[dict] = [
        {"ph": "M", "name": "thread_name", "pid": 1, "tid": number, "args": {"name": name}}
        for name, number in tracks.items()
    ]
    events += [
        {
            "ph": "X",
            "name": span.name,
            "pid": 1,
            "tid": tracks[span.track],
            "ts": round((span.start - zero) * 1e6, 1),
            "dur": round((span.end - span.start) * 1e6, 1),
        }
        for span in ordered
    ]
    path.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}))
