"""The live view of a training run: bars on a terminal, lines elsewhere, one every `QUIET_SECONDS` at
least."""

from __future__ import annotations

import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import TextIO, cast

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.measure import Measurement
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from rove.evaluation.statistics import Rate
from rove.reporting.output import Output

_PARTS = {
    "simulation": "cyan",
    "inference": "magenta",
    "training": "green",
    "sync": "yellow",
    "evaluation": "blue",
}
"""The `time/` metrics that the view shows, with their colours."""
_SPARKS = "▁▂▃▄▅▆▇█"
QUIET_SECONDS = 15.0
"""Longest time without a line where output is no terminal and a phase goes on."""


class Progress:
    """Live view of a run, whose iterations count from 1; an evaluation by itself has none.

    Example:
        with Progress("demo", iterations=100) as progress:
            progress.phase("collect", total=chunks)
            progress.advance()
            progress.iteration(1, metrics)
    """

    def __init__(self, run_name: str, iterations: int, *, console: Console | None = None) -> None:
        self._name = run_name
        self._iterations = iterations
        self._done = 0
        self._console = console or Console(highlight=False, file=cast(TextIO, Output(sys.stdout)))
        self._began = time.perf_counter()
        self._ends: list[float] = []
        self._phases: dict[str, tuple[int, int]] = {}
        self._phase = ""
        self._entered: set[str] = set()
        self._metrics: Mapping[str, float] = {}
        self._success: list[float] = []
        self._seconds: Counter[str] = Counter()
        self._announced: set[str] = set()
        self._spoke = self._began
        """Time of the last line that was printed where output is no terminal."""
        self._live = Live(console=self._console, get_renderable=self._view, refresh_per_second=4)

    def __enter__(self) -> Progress:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._console.is_terminal:
            self._phases = {}
            self._live.stop()

    def phase(self, name: str, total: int) -> None:
        """Begin a phase of `total` units ("collect" in chunks, "update" in steps, "evaluate" in episodes).

        Without a terminal, a phase is announced the first time, and its progress is printed every
        `QUIET_SECONDS`.
        """
        self._phases[name] = (0, total)
        self._phase = name
        self._entered.add(name)
        if not self._console.is_terminal and name not in self._announced:
            self._announced.add(name)
            self._say(f"{name}: 0/{total}")

    def advance(self, n: int = 1) -> None:
        """Count `n` more units of the phase that began last."""
        done, total = self._phases[self._phase]
        self._phases[self._phase] = (done + n, total)
        if not self._console.is_terminal and time.perf_counter() - self._spoke >= QUIET_SECONDS:
            self._say(f"{self._phase}: {done + n}/{total} · {_clock(time.perf_counter() - self._began)}")

    def iteration(self, i: int, metrics: Mapping[str, float]) -> None:
        """Show that iteration `i` is complete; `metrics` are those logged for it."""
        self._done = i
        self._ends.append(time.perf_counter())
        # A metric that not every iteration measures, such as an evaluation's, stays on view.
        self._metrics = {**self._metrics, **metrics}
        self._seconds.update({name: metrics.get(f"time/{name}", 0.0) for name in _PARTS})
        if "rollout/success" in metrics:
            self._success.append(metrics["rollout/success"])
        if not self._console.is_terminal:
            self._say(self._line(metrics))
        # The rows of an iteration stay, so that the view does not jump; those of the warm-up go.
        self._phases = {name: (0, self._phases[name][1]) for name in self._phases if name in self._entered}
        self._entered = set()

    def message(self, text: str) -> None:
        """Print a line above the live view; an empty text prints nothing."""
        if text:
            self._say(text)

    def _say(self, text: str) -> None:
        """Print a line at once: a file or a pipe would otherwise hold it back until its buffer is full."""
        self._console.print(text, soft_wrap=True, markup=False)
        self._console.file.flush()
        self._spoke = time.perf_counter()

    @property
    def _left(self) -> float:
        """Seconds until the last iteration ends, at the pace so far; NaN before two have ended."""
        if len(self._ends) < 2:
            return math.nan
        pace = (self._ends[-1] - self._ends[0]) / (len(self._ends) - 1)
        return max(pace * (self._iterations - self._done) - (time.perf_counter() - self._ends[-1]), 0.0)

    def _line(self, metrics: Mapping[str, float]) -> str:
        width = len(str(self._iterations))
        parts = [f"{self._done:{width}d}/{self._iterations}"]
        if rate := _rate(metrics, "rollout"):
            parts.append(f"success {rate}")
        if rate := _rate(metrics, "eval"):
            parts.append(f"held-out {rate}")
        if (speed := metrics.get("speed/env_steps_per_second")) is not None:
            parts.append(f"{speed:,.0f} steps/s")
        parts += [
            f"{name} {share:.0%}"
            for name, share in _shares({part: metrics.get(f"time/{part}", 0.0) for part in _PARTS}).items()
        ]
        if len(self._ends) > 1:
            parts.append(f"{_clock(self._left)} left")
        return " · ".join(parts)

    def _view(self) -> RenderableType:
        elapsed = time.perf_counter() - self._began
        grid = Table.grid(padding=(0, 1), expand=True)
        label = max(map(len, ["iteration", *self._phases]))
        grid.add_column(style="dim", width=label, no_wrap=True)
        grid.add_column(ratio=1, no_wrap=True)
        grid.add_column(justify="right", no_wrap=True)
        left = f" · {_clock(self._left)} left" if len(self._ends) > 1 else ""
        if self._iterations:
            grid.add_row("iteration", _bar(self._done, self._iterations, "green"),
                         f"{self._done}/{self._iterations} · {_clock(elapsed)}{left}")  # fmt: skip
        for name, (done, total) in self._phases.items():
            grid.add_row(name, _bar(done, total, "cyan"), f"{done}/{total}")
        if rate := _rate(self._metrics, "rollout"):
            grid.add_row("success", _Drawn(lambda width: _sparkline(self._success, width)), str(rate))
        if rate := _rate(self._metrics, "eval"):
            grid.add_row("held-out", _Drawn(lambda width: _interval(rate, width)), str(rate))
        title = Text(self._name, style="bold")
        if not (split := _shares(self._seconds)):
            return Group(title, grid)
        speed = self._metrics.get("speed/env_steps_per_second")
        grid.add_row(
            "time", _Drawn(lambda width: _stacked(split, width)), f"{speed:,.0f} steps/s" if speed else ""
        )
        legend = Text("  ").join(
            Text(f"{name} {share:.0%}", style=_PARTS[name]) for name, share in split.items()
        )
        return Group(title, grid, Text.assemble(" " * (label + 1), legend))


def beside_output(name: str) -> Progress:
    """A live view on standard error, where it does not mix with what a command prints."""
    return Progress(name, 0, console=Console(stderr=True, highlight=False))


class _Drawn:
    """A renderable that draws text to the width it gets."""

    def __init__(self, draw: Callable[[int], Text]) -> None:
        self._draw = draw

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self._draw(options.max_width)

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(4, options.max_width)


def _sparkline(values: Sequence[float], width: int) -> Text:
    """Draw the last `width` success rates, on a scale from 0 to 1."""
    marks = [_SPARKS[min(int(value * len(_SPARKS)), len(_SPARKS) - 1)] for value in values[-width:]]
    return Text("".join(marks), style="green")


def _interval(rate: Rate, width: int) -> Text:
    """Draw a scale from 0 to 1 with the interval and its point estimate on it."""
    low, point, high = (
        round(value * (width - 1)) for value in (rate.interval[0], rate.rate, rate.interval[1])
    )
    cells = ["━" if low <= i <= high else "─" for i in range(width)]
    cells[point] = "●"
    text = Text("".join(cells), style="dim")
    text.stylize("not dim blue", low, high + 1)
    return text


def _stacked(split: Mapping[str, float], width: int) -> Text:
    """Draw one bar, divided by share."""
    text, whole, drawn = Text(), 0.0, 0
    for name, share in split.items():
        whole += share
        text.append("━" * (round(whole * width) - drawn), style=_PARTS[name])
        drawn = round(whole * width)
    return text


def _rate(metrics: Mapping[str, float], group: str) -> Rate | None:
    """Return the success rate of a group with the episodes behind it; None where it was not measured."""
    success, episodes = metrics.get(f"{group}/success"), metrics.get(f"{group}/episodes")
    if success is None or not episodes or math.isnan(success):
        return None
    return Rate(round(success * episodes), round(episodes))


def _shares(seconds: Mapping[str, float]) -> dict[str, float]:
    """Return the fraction of the measured time that each part took; parts below 0.5 % are left out."""
    whole = sum(seconds.values())
    return {name: value / whole for name, value in seconds.items() if value > 0.005 * whole}


def _bar(done: int, total: int, colour: str) -> ProgressBar:
    return ProgressBar(total=max(total, 1), completed=done, complete_style=colour, finished_style=colour)


def _clock(seconds: float) -> str:
    """Format seconds as a clock shows them: `"7:05"`, `"1:02:03"`."""
    minutes, second = divmod(round(seconds), 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour}:{minute:02d}:{second:02d}" if hour else f"{minute}:{second:02d}"
