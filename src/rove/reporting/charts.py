"""Charts as inline SVG, drawn by hand: no script, no request, hover texts from `<title>`.

Colours are CSS custom properties (`--after`, `--part-simulation`, …) that `templates/report.css` sets for
light and dark. Text in an SVG shrinks with it, so a page holds each wide chart twice, see `responsive`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import NamedTuple

from rove.evaluation.statistics import Rate

WIDE, NARROW = 960, 350
"""Widths of charts in pixels, for a desktop and a phone."""
_MAX_POINTS = 240

Point = tuple[float, float]


@dataclass(frozen=True, slots=True)
class HeldOut:
    """A held-out evaluation on the learning curve."""

    iteration: int
    rate: Rate
    label: str
    colour: str


@dataclass(frozen=True, slots=True)
class Band:
    """Success of several runs of one kind along their way."""

    label: str
    colour: str
    points: Sequence[tuple[float, float, float, float]]
    """(x, lowest, mean, highest) of the runs, success in fractions."""


@dataclass(frozen=True, slots=True)
class PlotArea:
    """The plotting area of a chart, which maps values to pixels and draws in SVG."""

    width: int
    height: int
    x_range: tuple[float, float]
    y_range: tuple[float, float]
    left: int = 44
    right: int = 12
    top: int = 10
    bottom: int = 34

    def x(self, value: float) -> float:
        return self.left + (self.width - self.left - self.right) * _place(value, self.x_range)

    def y(self, value: float) -> float:
        return (
            self.height - self.bottom - (self.height - self.top - self.bottom) * _place(value, self.y_range)
        )

    def path(self, points: Sequence[Point]) -> str:
        """Return the `points` attribute of a line through `points`."""
        return " ".join(f"{self.x(x):.1f},{self.y(y):.1f}" for x, y in points)

    def line(self, points: Sequence[Point], colour: str) -> str:
        """Draw a line through the points; a dot where there is only one."""
        if len(points) == 1:
            (x, y) = points[0]
            return f'<circle style="fill:var(--{colour})" cx="{self.x(x):.1f}" cy="{self.y(y):.1f}" r="3"/>'
        return f'<polyline class="line" style="stroke:var(--{colour})" points="{self.path(points)}"/>'

    def area(self, low: Sequence[Point], high: Sequence[Point], colour: str, opacity: float) -> str:
        """Fill the surface between two lines."""
        outline = self.path([*high, *reversed(low)])
        return f'<polygon style="fill:var(--{colour});opacity:{opacity}" points="{outline}"/>'

    def axes(self, x_title: str, y_label: Callable[[float], str], y_ticks: Sequence[float]) -> str:
        """Draw grid lines with their values, and the title of the horizontal axis."""
        parts, end = [], self.width - self.right
        for tick in y_ticks:
            y = self.y(tick)
            parts.append(f'<line class="grid" x1="{self.left}" x2="{end}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(
                f'<text x="{self.left - 6}" y="{y + 4:.1f}" text-anchor="end">{y_label(tick)}</text>'
            )
        base = self.height - self.bottom
        for tick in ticks(*self.x_range, 8 if self.width > 500 else 4, whole=True):
            parts.append(f'<text x="{self.x(tick):.1f}" y="{base + 15}" text-anchor="middle">{tick:g}</text>')
        middle = (self.left + end) / 2
        parts.append(f'<text x="{middle:.1f}" y="{self.height - 3}" text-anchor="middle">{x_title}</text>')
        return "".join(parts)

    def hover(self, texts: Mapping[float, str]) -> str:
        """Draw invisible columns, each of which shows its text on hover."""
        if not texts:
            return ""
        places = sorted(texts)
        edges = [self.x(a) / 2 + self.x(b) / 2 for a, b in itertools.pairwise(places)]
        starts, ends = [self.left, *edges], [*edges, self.width - self.right]
        return "".join(
            f'<rect class="hover" x="{a:.1f}" y="{self.top}" width="{max(b - a, 0.1):.1f}" '
            f'height="{self.height - self.top - self.bottom}"><title>{escape(texts[place])}</title></rect>'
            for place, a, b in zip(places, starts, ends, strict=True)
        )

    def svg(self, label: str, body: str) -> str:
        box = f"0 0 {self.width} {self.height}"
        return f'<svg viewBox="{box}" role="img" aria-label="{escape(label)}">{body}</svg>'


class Responsive(NamedTuple):
    """A chart as SVG at both widths; the style sheet shows the one that fits the screen."""

    wide: str
    narrow: str


def responsive(draw: Callable[[int], str]) -> Responsive:
    """Draw a chart at both widths; `draw` takes a width in pixels."""
    return Responsive(draw(WIDE), draw(NARROW))


def learning_curve(width: int, rollout: Mapping[int, Rate], held_out: Sequence[HeldOut]) -> str:
    """Draw success over iterations: rollouts as a line with a 95 % band, evaluations as points with bars."""
    last = max([*rollout, *(point.iteration for point in held_out), 1])
    plot = PlotArea(width, 320 if width > 500 else 240, (0, last), (0.0, 1.0))
    low = [(i, rate.interval[0]) for i, rate in rollout.items()]
    high = [(i, rate.interval[1]) for i, rate in rollout.items()]
    body = [
        plot.axes("iteration", lambda value: f"{value:.0%}", [0, 0.25, 0.5, 0.75, 1]),
        plot.area(low, high, "rollout", 0.2),
        plot.line([(i, rate.rate) for i, rate in rollout.items()], "rollout"),
        plot.hover({i: f"iteration {i}: {rate} of {rate.trials} episodes" for i, rate in rollout.items()}),
        *(_point(plot, point) for point in held_out),
    ]
    return plot.svg("Success rate over iterations", "".join(body))


def bands(width: int, curves: Sequence[Band], x_title: str) -> str:
    """Draw success over time or effort: for each curve the mean of its runs as a line, and their range."""
    last = max([x for curve in curves for x, *_ in curve.points], default=1.0)
    plot = PlotArea(width, 340 if width > 500 else 260, (0.0, last or 1.0), (0.0, 1.0))
    body = [plot.axes(x_title, lambda value: f"{value:.0%}", [0, 0.25, 0.5, 0.75, 1])]
    for curve in curves:
        if curve.points:
            low, mean, high = ([(point[0], point[i]) for point in curve.points] for i in (1, 2, 3))
            drawn = plot.area(low, high, curve.colour, 0.15) + plot.line(mean, curve.colour)
            body.append(f"<g>{drawn}<title>{escape(curve.label)}</title></g>")
    return plot.svg(f"Success over {x_title}", "".join(body))


def stacked_area(width: int, parts: Mapping[str, Sequence[Point]]) -> str:
    """Draw seconds an iteration: `parts` maps a name to (iteration, seconds), the same iterations in each."""
    parts = {name: thin(points) for name, points in parts.items()}
    steps = [x for x, _ in next(iter(parts.values()))]
    base = [(x, 0.0) for x in steps]
    layers, texts = [], {x: [f"iteration {x:g}"] for x in steps}
    for name, points in parts.items():
        top = [(x, below + seconds) for (x, below), (_, seconds) in zip(base, points, strict=True)]
        layers.append((base, top, f"part-{name}"))
        for x, seconds in points:
            texts[x].append(f"{name} {seconds:.2f} s")
        base = top

    def wide(points: Sequence[Point]) -> Sequence[Point]:
        # A single iteration is a column, where an area would have no width.
        return [(x + d, y) for d in (-0.5, 0.5) for x, y in points] if len(points) == 1 else points

    ceiling = max(max(y for _, y in base), 1e-9)
    plot = PlotArea(
        width, 260 if width > 500 else 210, (wide(base)[0][0], wide(base)[-1][0]), (0.0, ceiling * 1.05)
    )
    body = [plot.area(wide(low), wide(high), colour, 0.9) for low, high, colour in layers]
    body.append(plot.axes("iteration", lambda value: f"{value:g} s", ticks(0.0, ceiling, 6)))
    body.append(plot.hover({x: "\n".join(lines) for x, lines in texts.items()}))
    return plot.svg("Seconds per iteration by part", "".join(body))


def small_chart(name: str, points: Sequence[Point]) -> str:
    """Draw one metric over steps in a small frame."""
    points = thin(points)
    values = [y for _, y in points]
    low, high = min(values), max(values)
    if low == high:
        low, high = low - (abs(low) or 1.0) / 2, high + (abs(high) or 1.0) / 2
    steps = (points[0][0], max(points[-1][0], points[0][0] + 1))
    plot = PlotArea(300, 120, steps, (low, high), left=72, right=8, top=8, bottom=20)
    end, base = plot.width - plot.right, plot.height - plot.bottom
    body = [
        *(
            f'<text x="{plot.left - 6}" y="{plot.y(value) + 4:.1f}" text-anchor="end">{value:.4g}</text>'
            for value in (low, high)
        ),
        f'<text x="{plot.left}" y="{plot.height - 4}">{steps[0]:g}</text>',
        f'<text x="{end}" y="{plot.height - 4}" text-anchor="end">{steps[1]:g}</text>',
        f'<rect class="frame" x="{plot.left}" y="{plot.top}" '
        f'width="{end - plot.left}" height="{base - plot.top}"/>',
        plot.line(points, "rollout"),
        plot.hover({x: f"{x:g}: {y:.4g}" for x, y in points}),
    ]
    return plot.svg(name, "".join(body))


def thin(points: Sequence[Point]) -> list[Point]:
    """Reduce to at most `_MAX_POINTS` points, means of neighbours, so that a long run stays a small page."""
    stride = math.ceil(len(points) / _MAX_POINTS)
    groups = [points[i : i + stride] for i in range(0, len(points), stride)]
    return [(group[len(group) // 2][0], sum(y for _, y in group) / len(group)) for group in groups]


def ticks(low: float, high: float, count: int, *, whole: bool = False) -> list[float]:
    """Return about `count` round numbers in [low, high], multiples of 1, 2 or 5 times a power of ten."""
    raw = (high - low) / max(count, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * (1 - 1e-9))
    if whole:
        step = max(1.0, step)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _place(value: float, span: tuple[float, float]) -> float:
    return (value - span[0]) / (span[1] - span[0])


def _point(plot: PlotArea, point: HeldOut) -> str:
    x, (low, high) = plot.x(point.iteration), point.rate.interval
    return (
        f'<g style="stroke:var(--{point.colour});fill:var(--{point.colour})">'
        f'<line class="bar" x1="{x:.1f}" x2="{x:.1f}" y1="{plot.y(low):.1f}" y2="{plot.y(high):.1f}"/>'
        f'<circle cx="{x:.1f}" cy="{plot.y(point.rate.rate):.1f}" r="4.5"/>'
        f"<title>{escape(point.label)}: {point.rate} of {point.rate.trials} held-out episodes</title></g>"
    )
