"""Evaluation reports on disk (`EvalReport` as JSON), and the plain-text tables that compare them.

The JSON holds every episode, so any other grouping or interval can be computed from it later.
`about["axes"]` maps each shifted variant to its axis ("vision", "semantics", "execution").
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from rove.errors import RoveError
from rove.evaluation.statistics import Mean, Rate, by, family, task, variant
from rove.types import EpisodeRecord, EpisodeSpec, EvalReport

NAMES = {"before": "before RL", "after": "after RL"}
"""Evaluations of one run, `eval/<name>.json`, with their titles."""
IN_DISTRIBUTION = "none"
"""`EpisodeSpec.variant` of an episode that is not shifted."""


def save(report: EvalReport, path: Path) -> None:
    """Write the report as JSON, atomically; `load` gives an equal one back."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(asdict(report)) + "\n")
    partial.replace(path)


def load(path: Path) -> EvalReport:
    """Read the report that `save` wrote. Raises RoveError when the file is missing or of another kind."""
    if not path.is_file():
        raise RoveError(f"no evaluation report at {path}; `rove eval` writes one.")
    try:
        content = json.loads(path.read_text())
        records = tuple(
            EpisodeRecord(**{**record, "spec": EpisodeSpec(**record["spec"])})
            for record in content["records"]
        )
        return EvalReport(**{**content, "records": records})
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise RoveError(f"{path} is not an evaluation report: {error}") from error


def load_all(run_dir: Path) -> dict[str, EvalReport]:
    """Read the evaluations of a run that are compared, in the order of `NAMES`; missing ones are left out."""
    paths = {name: run_dir / "eval" / f"{name}.json" for name in NAMES}
    return {name: load(path) for name, path in paths.items() if path.exists()}


def in_distribution(report: EvalReport) -> list[EpisodeRecord]:
    """Return the episodes of a report that are not shifted."""
    return [record for record in report.records if record.spec.variant == IN_DISTRIBUTION]


def shifted(report: EvalReport) -> dict[str, dict[str, Rate]]:
    """Return the success rates on shifted variants, grouped by axis: axis -> variant -> rate.

    Variants that `about["axes"]` does not place come under "other".
    """
    axes = report.about.get("axes", {})
    grouped: dict[str, dict[str, Rate]] = {}
    for name, rate in by(report.records, variant).items():
        if name != IN_DISTRIBUTION:
            grouped.setdefault(axes.get(name, "other"), {})[name] = rate
    return grouped


def pooled(rates: Mapping[str, Rate]) -> Rate:
    """Pool the episodes of several groups into one rate."""
    return Rate(sum(r.successes for r in rates.values()), sum(r.trials for r in rates.values()))


def rows(reports: Mapping[str, EvalReport]) -> list[tuple[str, int, dict[str, Rate]]]:
    """Return rows (label, indent, column -> rate): in distribution, then each axis and its variants."""
    result = [("in distribution", 0, {name: Rate.of(in_distribution(r)) for name, r in reports.items()})]
    shifts = {name: shifted(report) for name, report in reports.items()}
    axes = dict.fromkeys(axis for grouped in shifts.values() for axis in grouped)
    for axis in axes:
        result.append((axis, 0, {name: pooled(grouped.get(axis, {})) for name, grouped in shifts.items()}))
        variants = dict.fromkeys(v for grouped in shifts.values() for v in grouped.get(axis, {}))
        for each in variants:
            cells = {name: grouped.get(axis, {}).get(each, Rate(0, 0)) for name, grouped in shifts.items()}
            result.append((each, 1, cells))
    return result


def once_and_at_end(name: str, report: EvalReport) -> dict[str, EvalReport]:
    """Return the report by its name, and where episodes go on after success, one of success at their end."""
    if all(record.success_at_end in (None, record.success) for record in report.records):
        return {name: report}
    at_end = tuple(replace(record, success=bool(record.success_at_end)) for record in report.records)
    return {f"{name}, once": report, "at the end": replace(report, records=at_end)}


def table(
    reports: Mapping[str, EvalReport], published: Mapping[str, Mapping[str, float]] | None = None
) -> str:
    """Format a plain-text comparison: a column a report, each cell success with its 95 % Wilson interval.

    Rows are the in-distribution episodes, then each axis of shift, pooled, with its variants below it, then
    the mean of the axes. The last column is the number of episodes of the first report that has any in that
    row. `published` holds further columns: name -> row -> percent; an axis is the mean of its variants.
    """
    published = published or {}
    axes = {axis: list(found) for report in reports.values() for axis, found in shifted(report).items()}
    known = {name: _with_means(column, axes) for name, column in published.items()}
    body = [
        [
            "  " * indent + label,
            *(str(cells[name]) for name in reports),
            *(f"{column[label]:.1f} %" if label in column else "–" for column in known.values()),
            str(next((n for r in cells.values() if (n := r.trials)), 0)),
        ]
        for label, indent, cells in rows(reports)
    ]
    if len(axes) > 1:
        means = [_mean([pooled(found).rate for found in shifted(r).values()]) for r in reports.values()]
        others = [f"{column[_SHIFTED]:.1f} %" if _SHIFTED in column else "–" for column in known.values()]
        body.append(
            [f"{_SHIFTED}: mean of the axes", *(f"{100 * mean:.1f} %" for mean in means), *others, ""]
        )
    titles = [*(NAMES.get(name, name) for name in reports), *known, "episodes"]
    return _aligned([["success, 95 % interval", *titles], *body])


def task_table(report: EvalReport) -> str:
    """Format a plain-text table of one evaluation without its shifts: each family of tasks (in LIBERO: each
    suite) with its tasks below it, then the means of families, as LIBERO's results are published, and of
    tasks."""
    records = in_distribution(report)
    families, tasks = by(records, family), by(records, task)
    body = []
    for name, rate in families.items():
        body.append([name, str(rate), str(rate.trials)])
        body += [
            ["  " + label.partition("/")[2], str(own), str(own.trials)]
            for label, own in tasks.items()
            if label.startswith(f"{name}/")
        ]
    for label, rates in (("mean of families", families), ("mean of tasks", tasks)):
        if len(rates) > 1:
            body.append([label, str(Mean.of(list(rates.values()))), str(len(records))])
    return _aligned([["task", "success, 95 % interval", "episodes"], *body])


def tally(records: Sequence[EpisodeRecord]) -> str:
    """Format a plain-text table of episodes that are no evaluation: each task, then all."""
    body = [[name, str(rate), str(rate.trials)] for name, rate in sorted(by(records, task).items())]
    body.append(["all", str(Rate.of(records)), str(len(records))])
    return _aligned([["task", "success, 95 % interval", "episodes"], *body])


def _aligned(lines: Sequence[Sequence[str]]) -> str:
    """Format columns side by side, the first aligned left, with a rule below the heading."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = [
        "  ".join(
            [line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))]
        )
        for line in lines
    ]
    return "\n".join([text[0], "─" * len(text[0]), *text[1:]])


_SHIFTED = "shifted"


def _with_means(column: Mapping[str, float], axes: Mapping[str, list[str]]) -> dict[str, float]:
    """Add to a published column the means of the axes whose variants it has, and the mean of all axes."""
    whole = {
        axis: _mean([column[name] for name in names])
        for axis, names in axes.items()
        if all(name in column for name in names)
    }
    overall = {_SHIFTED: _mean(list(whole.values()))} if len(whole) == len(axes) > 1 else {}
    return {**overall, **column, **whole}


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
