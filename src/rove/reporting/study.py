"""The page of a study: what was predicted and found, curves and tables, as HTML, Markdown, SVG and JSON.

Everything is computed from the runs' directories (`metrics.jsonl`, `eval/after.json`), so a page can be made
of a study under way: what is not there yet is left out, and said.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rove.evaluation import comparison
from rove.evaluation import report as evaluation
from rove.evaluation.statistics import Difference, Mean, Rate
from rove.reporting import charts, log
from rove.reporting.html import environment
from rove.studies import Question, Study
from rove.types import EpisodeRecord, EvalReport

_POINTS = 40
"""Points of a run's curve, each the episodes of as many iterations."""
_ARMS = 8
"""Colours of arms in the style sheet."""
_UNITS = {"steps": "simulated actions, thousands", "minutes": "minutes of training"}
FILES = ("study.html", "study.md", "study.svg", "study.json")


class Place(NamedTuple):
    """A run of a study: where it is, and what it is started by."""

    arm: str
    seed: int
    directory: Path
    command: str


class Point(NamedTuple):
    """Rollouts of some iterations in a row."""

    steps: int
    """Simulated actions of the run until then."""
    minutes: float
    success: Rate


@dataclass(frozen=True, slots=True)
class RunResult:
    """What a run of a study has come to."""

    command: str
    finished: bool
    before: Rate | None
    success: Rate | None
    """After training, of the episodes that the study's metric counts."""
    iterations: int
    steps: int
    minutes: float
    collapsed: bool
    curve: list[Point]


@dataclass(slots=True)
class ArmResult:
    """What the runs of an arm have come to."""

    colour: str
    runs: dict[int, RunResult] = field(default_factory=dict)
    success: Mean | None = None
    """Over the seeds that are finished; None: none is."""

    @property
    def finished(self) -> list[RunResult]:
        return [run for run in self.runs.values() if run.finished]

    @property
    def spread(self) -> float | None:
        """Standard deviation of success over seeds, a fraction; None with fewer than two."""
        rates = [run.success.rate for run in self.finished if run.success]
        return statistics.stdev(rates) if len(rates) > 1 else None

    @property
    def collapses(self) -> int:
        return sum(run.collapsed for run in self.runs.values())


@dataclass(frozen=True, slots=True)
class PairResult:
    """Two arms compared."""

    first: str
    second: str
    difference: Difference | None
    """first - second; None: they have no finished seed in common."""
    seeds: int
    found: str
    verdict: str


@dataclass(frozen=True, slots=True)
class Results:
    """All that a page shows."""

    name: str
    summary: str
    claim: str
    expected: str
    metric: str
    budget: str
    unit: str
    about: dict[str, Any]
    """Commit, machine and versions of the first run that is there."""
    arms: dict[str, ArmResult]
    pairs: list[PairResult]

    @property
    def runs(self) -> list[RunResult]:
        return [run for arm in self.arms.values() for run in arm.runs.values()]

    @property
    def missing(self) -> int:
        """Runs that are not finished."""
        return sum(not run.finished for run in self.runs)


def describe(question: Question, study: Study, places: Sequence[Place]) -> Results:
    """Read the runs of a study, and compute what was found. Raises RoveError, naming the file, where one
    that is there is damaged."""
    arms = {label: ArmResult(f"arm-{number % _ARMS}") for number, label in enumerate(study.arms)}
    judged: dict[str, dict[int, list[EpisodeRecord]]] = {label: {} for label in study.arms}
    for place in places:
        reports = evaluation.load_all(place.directory)
        if "after" in reports:
            judged[place.arm][place.seed] = _counted(reports["after"], study.metric)
        arms[place.arm].runs[place.seed] = _result(place, reports, study.metric)
    for label, arm in arms.items():
        if judged[label]:
            arm.success = comparison.mean_success(judged[label])
    pairs = []
    for pair in study.pairs:
        seeds = judged[pair.first].keys() & judged[pair.second].keys()
        if not seeds:
            waits = f"{pair.first} and {pair.second} have no finished run of one seed yet"
            pairs.append(PairResult(pair.first, pair.second, None, 0, waits, "not compared"))
            continue
        gap = comparison.difference_in_success(judged[pair.first], judged[pair.second])
        found = comparison.found(pair.first, pair.second, gap)
        verdict = comparison.verdict(pair.claimed, gap)
        pairs.append(PairResult(pair.first, pair.second, gap, len(seeds), found, verdict))
    held = "held-out states" if study.metric == "success" else "held-out states of all shifted variants"
    budget = f"{study.steps:,} simulated actions" if study.steps else f"{study.minutes:g} minutes of training"
    return Results(
        question.name,
        question.summary,
        study.claim,
        study.expected,
        f"success on {held}, after training",
        f"{budget} a run",
        study.unit,
        _about(places),
        arms,
        pairs,
    )


def write(results: Results, directory: Path) -> Path:
    """Write the page, its Markdown, its picture and its numbers into a study's folder; returns the page."""
    page = environment().get_template("study.html.j2").render(
        study=results,
        curves={unit: _responsive(results, unit) for unit in _order(results)} if _drawn(results) else {},
    )  # fmt: skip
    written = (page, markdown(results), picture(results), json.dumps(_plain(results), indent=1) + "\n")
    for name, text in zip(FILES, written, strict=True):
        partial = directory / f".{name}.partial"
        partial.write_text(text, encoding="utf-8")
        partial.replace(directory / name)
    return directory / FILES[0]


# --- reading --------------------------------------------------------------------------------------


def _counted(report: EvalReport, metric: str) -> list[EpisodeRecord]:
    """The episodes that the study's metric counts."""
    inside = evaluation.in_distribution(report)
    if metric == "success":
        return inside
    return [record for record in report.records if record.spec.variant != evaluation.IN_DISTRIBUTION]


def _result(place: Place, reports: Mapping[str, EvalReport], metric: str) -> RunResult:
    lines = [line for line in log.read(place.directory) if "step" in line]
    curve = _curve(lines)
    return RunResult(
        command=place.command,
        finished="after" in reports,
        before=Rate.of(_counted(reports["before"], metric)) if "before" in reports else None,
        success=Rate.of(_counted(reports["after"], metric)) if "after" in reports else None,
        iterations=int(lines[-1]["step"]) if lines else 0,
        steps=curve[-1].steps if curve else 0,
        minutes=curve[-1].minutes if curve else 0.0,
        collapsed=comparison.collapsed([point.success for point in curve]),
        curve=curve,
    )


def _curve(lines: Sequence[Mapping[str, Any]]) -> list[Point]:
    """Pool the rollouts of a run to at most `_POINTS` points, each of as many iterations."""
    size = max(1, -(-len(lines) // _POINTS))
    points, steps = [], 0
    for start in range(0, len(lines), size):
        part = lines[start : start + size]
        steps += round(sum(line.get("rollout/simulated_steps") or 0 for line in part))
        ended = [(line.get("rollout/success") or 0.0, line.get("rollout/episodes") or 0) for line in part]
        won = round(sum(success * episodes for success, episodes in ended))
        rate = Rate(won, round(sum(episodes for _, episodes in ended)))
        if rate.trials:
            points.append(Point(steps, part[-1].get("time/minutes") or 0.0, rate))
    return points


def _about(places: Iterable[Place]) -> dict[str, Any]:
    for place in places:
        file = place.directory / "about.json"
        if file.exists():
            about = json.loads(file.read_text())
            return {name: about.get(name) for name in ("commit", "machine", "versions")}
    return {}


# --- drawing --------------------------------------------------------------------------------------


def _drawn(results: Results) -> bool:
    return any(run.curve for run in results.runs)


def _order(results: Results) -> list[str]:
    """Units of the horizontal axis, that of the budget first."""
    return sorted(_UNITS, key=lambda unit: unit != results.unit)


def _bands(results: Results, unit: str) -> list[charts.Band]:
    return [charts.Band(label, arm.colour, _band(arm, unit)) for label, arm in results.arms.items()]


def _band(arm: ArmResult, unit: str) -> list[tuple[float, float, float, float]]:
    """Lowest, mean and highest success of an arm's runs, where all of them have been."""
    ways = []
    for run in arm.runs.values():
        if run.curve:
            x = [point.steps / 1000 if unit == "steps" else point.minutes for point in run.curve]
            ways.append((np.array(x), np.array([point.success.rate for point in run.curve])))
    if not ways:
        return []
    first, last = max(x[0] for x, _ in ways), min(x[-1] for x, _ in ways)
    grid = np.linspace(first, last, _POINTS) if last > first else np.array([last])
    rates = np.array([np.interp(grid, x, y) for x, y in ways])
    return list(
        zip(*(row.tolist() for row in (grid, rates.min(0), rates.mean(0), rates.max(0))), strict=True)
    )


def _responsive(results: Results, unit: str) -> charts.Responsive:
    curves = _bands(results, unit)
    return charts.responsive(lambda width: charts.bands(width, curves, _UNITS[unit]))


def picture(results: Results) -> str:
    """Draw the curves over the budget's unit as an SVG file that stands alone, with a legend."""
    style = environment().get_template("report.css").render()
    # A picture in somebody's page is on white, whatever the colours of the reader's system are.
    colours = dict(re.findall(r"--([\w-]+): (#\w+);", style.partition("@media")[0]))
    rules = "".join(re.findall(r"^svg (\.[^\n]*|text[^\n]*)$", style, re.MULTILINE))
    chart = charts.bands(charts.WIDE, _bands(results, results.unit), _UNITS[results.unit])
    height = float(chart.split('viewBox="0 0 ')[1].split('"')[0].split()[1])
    rows = []
    for number, (label, arm) in enumerate(results.arms.items()):
        x, y = 48 + 230 * (number % 4), height + 18 + 20 * (number // 4)
        rows.append(
            f'<rect x="{x}" y="{y - 9:g}" width="10" height="10" rx="3" style="fill:var(--{arm.colour})"/>'
            f'<text x="{x + 16}" y="{y:g}">{escape(label)}</text>'
        )
    tall = height + 20 * (1 + (len(rows) - 1) // 4) + 12
    inside = chart[chart.index(">") + 1 : chart.rindex("</svg>")]
    drawn = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {charts.WIDE} {tall:g}" role="img" '
        f'aria-label="{escape(results.summary)}"><style>svg{{font:12px sans-serif;'
        f"background:#fff}}{rules}</style>{inside}{''.join(rows)}</svg>\n"
    )
    # Not every program that draws such files knows of variables.
    return re.sub(r"var\(--([\w-]+)\)", lambda name: colours[name[1]], drawn)


# --- texts ----------------------------------------------------------------------------------------


def markdown(results: Results) -> str:
    """Write the study as a part of a page in Markdown, the picture beside it."""
    lines = [
        f"## {_escaped(results.summary)}",
        "",
        f"Claimed: {_escaped(results.claim)}",
        "",
        f"Expected here: {_escaped(results.expected)}",
        "",
        *(f"- **{_escaped(pair.found)}**: {pair.verdict}." for pair in results.pairs),
        "",
        f"![Success over {_UNITS[results.unit]}](study.svg)",
        "",
        f"{results.metric[0].upper()}{results.metric[1:]}; {results.budget}.{_lacking(results)}",
        "",
        "| arm | success, % | each seed | spread, points | collapses | actions, thousands | minutes |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for label, arm in results.arms.items():
        done = arm.finished
        cells = [
            _escaped(label),
            "–" if arm.success is None else str(arm.success).replace(" %", ""),
            ", ".join(f"{100 * run.success.rate:.1f}" for run in done if run.success) or "–",
            "–" if arm.spread is None else f"{100 * arm.spread:.1f}",
            f"{arm.collapses} of {sum(bool(run.curve) for run in arm.runs.values())}",
            _mean([run.steps / 1000 for run in done], 0),
            _mean([run.minutes for run in done], 1),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", "```sh", f"rove study {results.name}", "```", ""])


def _lacking(results: Results) -> str:
    if not results.missing:
        return ""
    return f" {results.missing} of {len(results.runs)} runs are not finished: what is said is of the others."


def _escaped(text: str) -> str:
    """Text that stays text in Markdown, in a table too."""
    return re.sub(r"([\\`*_\[\]|])", r"\\\1", escape(text, quote=False))


def _mean(values: Sequence[float], digits: int) -> str:
    return f"{statistics.fmean(values):.{digits}f}" if values else "–"


def _plain(results: Results) -> dict[str, Any]:
    """The results as JSON, with what the properties compute."""
    plain = asdict(results)
    for label, arm in results.arms.items():
        plain["arms"][label] |= {"spread": arm.spread, "collapses": arm.collapses}
    return plain
