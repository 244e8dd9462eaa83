"""The report page of a run: one self-contained HTML file that opens anywhere, without a network.

`templates/report.html.j2` is the page; this module reads the run directory and computes the values on it:

- `run.json`: the resolved configuration; `about.json`: versions, git commit, seed, machine, command.
- `metrics.jsonl`: see `log.py`.
- `eval/<name>.json`: see `evaluation/report.py`; the names in its `NAMES`.
- `videos/`: see `video.py`.

Files that a run directory lacks are left out of the page.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined

from rove.errors import RoveError
from rove.evaluation import report as evaluation
from rove.evaluation.report import NAMES
from rove.evaluation.statistics import Difference, Rate, by, difference, family, task
from rove.reporting import charts, log, video
from rove.reporting.metrics import GROUPS, METRICS, WARM_UP, Metric
from rove.types import EvalReport

_PARTS = ("simulation", "inference", "training", "sync", "evaluation", "checkpoint")

Lines = Sequence[Mapping[str, Any]]
"""The lines of a run's `metrics.jsonl`."""
Reports = Mapping[str, EvalReport]
"""The evaluations of a run: name -> report."""
Row = tuple[str, int, dict[str, Rate]]
"""A row of a table of success rates: label, indent, evaluation -> rate."""


class Time(NamedTuple):
    """The wall-clock time of the iterations, by part."""

    chart: charts.Responsive
    shares: dict[str, float]
    """Fraction of the whole time that each part took."""


def write_report(run_dir: Path) -> Path:
    """Write `report.html` into the run directory and return its path.

    Raises RoveError when the folder is not a run directory, or a file in it is damaged. Nothing that lies
    outside the folder gets into the page.
    """
    if not (run_dir / "run.json").is_file():
        raise RoveError(f"{run_dir} is not a run directory: it has no run.json. `rove train` makes one.")
    config = _configuration(run_dir / "run.json")
    about = _object(run_dir / "about.json") if (run_dir / "about.json").exists() else {}
    reports = _reports(run_dir)
    lines = log.read(run_dir)
    page = environment().get_template("report.html.j2").render(
        name=config["name"],
        facts=_facts(config, about, reports),
        rates={name: Rate.of(evaluation.in_distribution(report)) for name, report in reports.items()},
        gain=_gain(reports),
        learning_curve=_learning_curve(lines, reports),
        shifts=_shift_rows(reports),
        tasks=_task_rows(reports),
        episodes=_episodes(run_dir),
        animation=lambda each: video.data_uri((run_dir / "videos" / each.file).read_bytes()),
        time=_time(lines),
        metrics=_metrics(lines),
        configuration=_flat(config),
        command=about.get("command"),
        about=[pair for pair in _flat(about) if pair[0] != "command"],
    )  # fmt: skip
    path = run_dir / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def _object(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises RoveError, naming the file, where there is none."""
    try:
        content = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise RoveError(f"{path} is damaged, and no JSON: {error}.") from error
    if not isinstance(content, dict):
        raise RoveError(f"{path} is damaged: it holds no JSON object.")
    return content


def _configuration(path: Path) -> dict[str, Any]:
    """Read a run's settings, of which only what the page names has to be there: the rest may be another
    version's, or of a kind that nothing here registers."""
    config = _object(path)
    kinds = [s.get("kind") for name in ("algorithm", "env") if isinstance(s := config.get(name), dict)]
    if not {"name", "seed"} <= config.keys() or len(kinds) < 2 or None in kinds:
        raise RoveError(f"{path} is damaged: it has no name, seed, algorithm.kind or env.kind.")
    return config


def _reports(run_dir: Path) -> Reports:
    """Read a run's evaluations. Raises RoveError, naming the file, where one holds no episodes."""
    reports = evaluation.load_all(run_dir)
    for name, report in reports.items():
        for record in report.records:
            texts = (record.spec.task, record.spec.variant)
            if not all(isinstance(text, str) for text in texts) or not isinstance(record.success, bool):
                raise RoveError(f"{run_dir / 'eval' / name}.json is damaged: it holds {record}.")
        axes = report.about.get("axes", {}) if isinstance(report.about, dict) else None
        if not isinstance(axes, dict) or not all(isinstance(axis, str) for axis in axes.values()):
            raise RoveError(f"{run_dir / 'eval' / name}.json is damaged: its `about` has no axes.")
    return {name: report for name, report in reports.items() if evaluation.in_distribution(report)}


def environment() -> Environment:
    """Make the template environment: values are escaped, and a name that is not given is an error."""
    made = Environment(
        loader=PackageLoader("rove.reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters["percent"] = lambda fraction, digits=1: f"{100 * fraction:.{digits}f}"
    made.globals["titles"] = NAMES
    return made


def _facts(config: Mapping[str, Any], about: Mapping[str, Any], reports: Reports) -> list[str]:
    """Return the facts below the title: algorithm, tasks, seed, commit, number of episodes."""
    tasks = config["env"].get("tasks", "all")
    facts = [
        str(config["algorithm"]["kind"]).upper(),
        f"{config['env']['kind']}: {tasks} tasks",
        f"seed {config['seed']}",
    ]
    if about.get("commit"):
        facts.append(f"commit {str(about['commit'])[:10]}")
    if reports:
        last = list(reports.values())[-1]
        facts.append(f"{len(evaluation.in_distribution(last)):,} held-out episodes")
    return facts


def _gain(reports: Reports) -> Difference | None:
    """Compute success after RL minus success before it; None unless both were measured."""
    if len(reports) < len(NAMES):
        return None
    return difference(*(evaluation.in_distribution(reports[name]) for name in ("after", "before")))


def _learning_curve(lines: Lines, reports: Reports) -> charts.Responsive | None:
    """Draw success of rollouts and of held-out evaluations over iterations; None when nothing was logged."""
    rollout, evaluated = _rates(lines, "rollout"), _rates(lines, "eval")
    if not rollout and not evaluated:
        return None
    last = max([*rollout, *evaluated])
    if "after" in reports:
        evaluated.pop(last, None)  # the final evaluation runs the same weights on more episodes
    held = [charts.HeldOut(i, rate, f"iteration {i}", "after") for i, rate in evaluated.items()]
    for name, iteration in (("before", 0), ("after", last)):
        if name in reports:
            rate = Rate.of(evaluation.in_distribution(reports[name]))
            held.append(charts.HeldOut(iteration, rate, NAMES[name], name))
    return charts.responsive(lambda width: charts.learning_curve(width, rollout, held))


def _shift_rows(reports: Reports) -> list[Row]:
    """Return success in distribution and on each shifted variant; empty without shifted episodes."""
    rows = evaluation.rows(reports) if reports else []
    return rows if len(rows) > 1 else []


def _task_rows(reports: Reports) -> list[Row]:
    """Return success in distribution on each family of tasks, followed by its tasks where it has several."""
    episodes = {name: evaluation.in_distribution(report) for name, report in reports.items()}
    families = {name: by(records, family) for name, records in episodes.items()}
    rates = {name: by(records, task) for name, records in episodes.items()}
    members: dict[str, str] = {r.spec.task: family(r) for records in episodes.values() for r in records}
    rows: list[Row] = []
    for group in dict.fromkeys(members.values()):
        tasks = [name for name, owner in members.items() if owner == group]
        if len(tasks) > 1:
            rows.append((group, 0, {name: families[name].get(group, Rate(0, 0)) for name in reports}))
        for each in tasks:
            rows.append(
                (each, int(len(tasks) > 1), {name: rates[name].get(each, Rate(0, 0)) for name in reports})
            )
    return rows


def _episodes(run_dir: Path) -> list[list[video.Video]]:
    """Return the recorded episodes in pairs, before and after RL."""
    pairs: dict[tuple[str, str, int], list[video.Video]] = {}
    seen: dict[tuple[str, str, str], itertools.count[int]] = {}
    for each in video.index(run_dir):
        # The n-th episode of a task before training stands beside the n-th after it.
        number = next(seen.setdefault((each.phase, each.task, each.instruction), itertools.count()))
        pairs.setdefault((each.task, each.instruction, number), []).append(each)
    return [sorted(pair, key=lambda each: each.phase, reverse=True) for pair in pairs.values()]


def _time(lines: Lines) -> Time | None:
    """Sum and draw the seconds of each part of an iteration; None when no iteration was timed."""
    timed = [line for line in lines if line.get("time/iteration")]
    if not timed:
        return None
    parts = {
        name: [(line["step"], line.get(f"time/{name}") or 0.0) for line in timed]
        for name in _PARTS
        if any(line.get(f"time/{name}") for line in timed)
    }
    known = [sum(points[i][1] for points in parts.values()) for i in range(len(timed))]
    parts["other"] = [
        (line["step"], max(line["time/iteration"] - spent, 0.0))
        for line, spent in zip(timed, known, strict=True)
    ]
    seconds = {name: sum(y for _, y in points) for name, points in parts.items()}
    whole = sum(seconds.values())
    return Time(
        charts.responsive(lambda width: charts.stacked_area(width, parts)),
        {name: spent / whole for name, spent in seconds.items()},
    )


def _metrics(lines: Lines) -> dict[str, list[tuple[Metric, str]]]:
    """Return the logged metrics, each with its chart, by title of their group."""
    groups: dict[str, list[tuple[Metric, str]]] = {}
    for metric in METRICS.values():
        counter = "sft_step" if metric.group in WARM_UP else "step"
        points = [(line[counter], line[metric.name]) for line in lines if line.get(metric.name) is not None]
        if points:
            chart = charts.small_chart(metric.name, points)
            groups.setdefault(GROUPS[metric.group], []).append((metric, chart))
    return groups


def _flat(tree: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Flatten a nested mapping to pairs of a dotted key and a value."""
    if isinstance(tree, list) and any(isinstance(item, dict) for item in tree):
        tree = {str(number): item for number, item in enumerate(tree)}
    if isinstance(tree, dict):
        return [
            pair for key, value in tree.items() for pair in _flat(value, f"{prefix}.{key}" if prefix else key)
        ]
    if tree is None or tree == []:
        return [(prefix, "–")]
    return [(prefix, tree if isinstance(tree, str) else json.dumps(tree))]


def _rates(lines: Lines, group: str) -> dict[int, Rate]:
    """Return iteration -> success rate, where success and episodes of the group were logged."""
    return {
        line["step"]: Rate(
            round(line[f"{group}/success"] * line[f"{group}/episodes"]), round(line[f"{group}/episodes"])
        )
        for line in lines
        if line.get(f"{group}/success") is not None and line.get(f"{group}/episodes")
    }
