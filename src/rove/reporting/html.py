"""One self-contained page about a run: open it from anywhere, without a network.

A run directory holds what the page shows; what is missing is left out of it:

- `run.json`: the resolved configuration; `about.json`: versions, git commit, seed, machine, command.
- `metrics.jsonl`: see `log.py`.
- `eval/<name>.json`: see `evaluation/report.py`; the names in its `NAMES`.
- `videos/`: see `video.py`.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from rove.errors import RoveError
from rove.evaluation import report as evaluation
from rove.evaluation.report import NAMES
from rove.evaluation.statistics import Rate, by, difference, family, task
from rove.reporting import charts, log, video
from rove.reporting.metrics import GROUPS, METRICS, WARM_UP
from rove.reporting.style import CSS
from rove.types import EvalReport

_PARTS = ("simulation", "inference", "training", "sync", "evaluation", "checkpoint")

Rows = Sequence[tuple[str, int, Mapping[str, Rate]]]


def write_report(run_dir: Path) -> Path:
    """Write `report.html` into the run directory and return its path.

    Raises RoveError when the folder is not a run directory.
    """
    if not (run_dir / "run.json").is_file():
        raise RoveError(f"{run_dir} is not a run directory: it has no run.json. `rove train` makes one.")
    config = json.loads((run_dir / "run.json").read_text())
    about_file = run_dir / "about.json"
    about = json.loads(about_file.read_text()) if about_file.exists() else {}
    reports = evaluation.load_all(run_dir)
    lines = log.read(run_dir)
    sections = [
        _header(config, about, reports),
        _headline(reports),
        _learning(lines, reports),
        _shifts(reports),
        _tasks(reports),
        _episodes(run_dir),
        _time(lines),
        _metrics(lines),
        _configuration(config),
        _reproduce(about),
    ]
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(config['name'])} · Rove</title><style>{CSS}</style></head>\n"
        f"<body>{''.join(sections)}</body></html>\n"
    )
    path = run_dir / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def _header(config: Mapping[str, Any], about: Mapping[str, Any], reports: Mapping[str, EvalReport]) -> str:
    tasks = config["env"].get("tasks", "all")
    facts = [
        config["algorithm"]["kind"].upper(),
        f"{config['env']['kind']}: {tasks} tasks",
        f"seed {config['seed']}",
    ]
    if about.get("commit"):
        facts.append(f"commit {about['commit'][:10]}")
    facts += [
        f"{len(evaluation.in_distribution(r)):,} held-out episodes" for r in list(reports.values())[-1:]
    ]
    return f'<h1>{escape(config["name"])}</h1><p class="soft">{escape(" · ".join(facts))}</p>'


def _headline(reports: Mapping[str, EvalReport]) -> str:
    if not reports:
        return ""
    cards = []
    for name, report in reports.items():
        rate = Rate.of(evaluation.in_distribution(report))
        low, high = rate.interval
        cards.append(
            f'<div class="card"><span class="soft">{_key(name)}{NAMES[name]}</span>'
            f'<b>{_percent(rate.rate)}</b><span class="soft">{100 * low:.1f} to {100 * high:.1f} % · '
            f"{rate.successes:,} of {rate.trials:,}</span>{_scale(name, rate)}</div>"
        )
    lines = []
    if len(reports) == len(NAMES):
        gain = difference(*(evaluation.in_distribution(reports[name]) for name in ("after", "before")))
        how = "the same episodes, paired" if gain.paired else "different episodes"
        lines.append(
            f'<p class="difference">Gained by RL: <b>{gain}</b> <span class="soft">({how})</span></p>'
        )
    note = (
        '<p class="note">Success on held-out initial states, in distribution. Intervals are 95 %: '
        "Wilson 1927 for a rate, Newcombe 1998 (method 10) for a difference.</p>"
    )
    return f'<div class="numbers">{"".join(cards)}</div>{"".join(lines)}{note}'


def _learning(lines: Sequence[Mapping[str, Any]], reports: Mapping[str, EvalReport]) -> str:
    rollout, evaluated = _rates(lines, "rollout"), _rates(lines, "eval")
    if not rollout and not evaluated:
        return ""
    last = max([*rollout, *evaluated])
    if "after" in reports:
        evaluated.pop(last, None)  # the final evaluation judges the same weights on more episodes
    held = [charts.Held(i, rate, f"iteration {i}", "after") for i, rate in evaluated.items()]
    for name, iteration in (("before", 0), ("after", last)):
        if name in reports:
            rate = Rate.of(evaluation.in_distribution(reports[name]))
            held.append(charts.Held(iteration, rate, NAMES[name], _css(name)))
    keys = [f"<span>{_key('rollout')}training rollouts, sampled actions</span>"]
    keys += [f"<span>{_key(name)}{NAMES[name]}, held-out</span>" for name in reports]
    curve = charts.responsive(lambda width: charts.learning_curve(width, rollout, held))
    return (
        f'<h2>Learning curve</h2><div class="legend">{"".join(keys)}</div><div class="card">{curve}</div>'
        '<p class="note">Band and bars are 95 % Wilson intervals of the episodes behind each value.</p>'
    )


def _shifts(reports: Mapping[str, EvalReport]) -> str:
    rows = evaluation.rows(reports) if reports else []
    if len(rows) < 2:
        return ""
    note = "Each axis pools its variants. No variant was seen in training."
    return f'<h2>Shifted variants</h2><p class="note">{note}</p>{_comparison(rows, reports)}'


def _tasks(reports: Mapping[str, EvalReport]) -> str:
    if not reports:
        return ""
    episodes = {name: evaluation.in_distribution(report) for name, report in reports.items()}
    families = {name: by(records, family) for name, records in episodes.items()}
    rates = {name: by(records, task) for name, records in episodes.items()}
    members: dict[str, str] = {r.spec.task: family(r) for records in episodes.values() for r in records}
    rows: list[tuple[str, int, Mapping[str, Rate]]] = []
    for group in dict.fromkeys(members.values()):
        tasks = [name for name, owner in members.items() if owner == group]
        if len(tasks) > 1:
            rows.append((group, 0, {name: families[name].get(group, Rate(0, 0)) for name in reports}))
        for each in tasks:
            rows.append(
                (each, int(len(tasks) > 1), {name: rates[name].get(each, Rate(0, 0)) for name in reports})
            )
    return f"<h2>Tasks</h2>{_comparison(rows, reports)}"


def _comparison(rows: Rows, reports: Mapping[str, EvalReport]) -> str:
    """A table of success rates: a column a report, and all of a row's intervals on one scale."""
    head = "".join(f"<th>{_key(name)}{NAMES[name]}</th>" for name in reports)
    body = []
    for label, indent, cells in rows:
        shown = "".join(
            f'<td data-name="{NAMES[name]}" style="--key:var(--{_css(name)})">{_cell(rate)}</td>'
            for name, rate in cells.items()
        )
        body.append(
            f'<tr class="{"member" if indent else "group"}"><td>{escape(label)}</td>{shown}'
            f'<td class="scale-cell">{"".join(_scale(name, rate) for name, rate in cells.items())}</td></tr>'
        )
    return (
        f'<table style="--columns:{len(reports)}"><thead><tr><th></th>{head}'
        f'<th class="ends"><span>0 %</span><span>100 %</span></th></tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table>"
    )


def _episodes(run_dir: Path) -> str:
    videos = video.index(run_dir)
    pairs: dict[tuple[str, str, int], list[video.Video]] = {}
    seen: dict[tuple[str, str, str], itertools.count[int]] = {}
    for each in videos:
        # The n-th episode of a task before training stands beside the n-th after it.
        number = next(seen.setdefault((each.phase, each.task, each.instruction), itertools.count()))
        pairs.setdefault((each.task, each.instruction, number), []).append(each)
    if not pairs:
        return ""
    cards = []
    for (_, instruction, _), pair in pairs.items():
        figures = "".join(
            _figure(run_dir, each) for each in sorted(pair, key=lambda v: v.phase, reverse=True)
        )
        cards.append(f'<div class="card episode"><p>{escape(instruction)}</p><div>{figures}</div></div>')
    return f'<h2>Episodes, before and after RL</h2><div class="episodes">{"".join(cards)}</div>'


def _figure(run_dir: Path, each: video.Video) -> str:
    picture = video.data_uri((run_dir / "videos" / each.file).read_bytes())
    outcome = '<span class="pass">success</span>' if each.success else '<span class="fail">failure</span>'
    alt = escape(f"{each.phase} RL: {each.instruction}")
    return (
        f'<figure><img src="{picture}" alt="{alt}"><figcaption>{each.phase}: {outcome}</figcaption></figure>'
    )


def _time(lines: Sequence[Mapping[str, Any]]) -> str:
    timed = [line for line in lines if line.get("time/iteration")]
    if not timed:
        return ""
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
    whole = sum(y for points in parts.values() for _, y in points)
    keys = "".join(
        f"<span>{_key(f'part-{name}')}{name} {100 * sum(y for _, y in points) / whole:.1f} %</span>"
        for name, points in parts.items()
    )
    area = charts.responsive(lambda width: charts.stacked_area(width, parts))
    return f'<h2>Time per iteration</h2><div class="legend">{keys}</div><div class="card">{area}</div>'


def _metrics(lines: Sequence[Mapping[str, Any]]) -> str:
    groups = []
    for group, title in GROUPS.items():
        cards = []
        counter = "sft_step" if group in WARM_UP else "step"
        for metric in (m for m in METRICS.values() if m.group == group):
            points = [
                (line[counter], line[metric.name]) for line in lines if line.get(metric.name) is not None
            ]
            if points:
                unit = "" if metric.unit == "1" else f" ({metric.unit})"
                cards.append(
                    f'<div class="card"><p><code>{metric.name}</code></p>{charts.small(metric.name, points)}'
                    f'<p class="soft">{escape(metric.meaning + unit)}</p></div>'
                )
        if cards:
            groups.append(f'<h3>{escape(title)}</h3><div class="metrics">{"".join(cards)}</div>')
    return f"<details><summary>All metrics</summary>{''.join(groups)}</details>" if groups else ""


def _configuration(config: Mapping[str, Any]) -> str:
    return f"<details><summary>Configuration</summary>{_definitions(config)}</details>"


def _reproduce(about: Mapping[str, Any]) -> str:
    if not about:
        return ""
    command = f"<pre>{escape(about['command'])}</pre>" if about.get("command") else ""
    rest = {key: value for key, value in about.items() if key != "command"}
    return f"<h2>Reproduce</h2>{command}{_definitions(rest)}"


def _definitions(tree: Mapping[str, Any]) -> str:
    """A nested mapping as dotted keys and values."""
    pairs = "".join(f"<dt>{escape(key)}</dt><dd>{escape(value)}</dd>" for key, value in _flat(tree))
    return f"<dl>{pairs}</dl>"


def _flat(tree: Any, prefix: str = "") -> list[tuple[str, str]]:
    if isinstance(tree, list) and any(isinstance(item, dict) for item in tree):
        tree = {str(number): item for number, item in enumerate(tree)}
    if isinstance(tree, dict):
        return [
            pair for key, value in tree.items() for pair in _flat(value, f"{prefix}.{key}" if prefix else key)
        ]
    if tree is None or tree == []:
        return [(prefix, "–")]
    return [(prefix, tree if isinstance(tree, str) else json.dumps(tree))]


def _rates(lines: Sequence[Mapping[str, Any]], group: str) -> dict[int, Rate]:
    """Iteration -> success rate, where success and episodes of the group were logged."""
    return {
        line["step"]: Rate(
            round(line[f"{group}/success"] * line[f"{group}/episodes"]), round(line[f"{group}/episodes"])
        )
        for line in lines
        if line.get(f"{group}/success") is not None and line.get(f"{group}/episodes")
    }


def _scale(name: str, rate: Rate) -> str:
    """0 to 100 %, with the interval of a rate and its point."""
    if not rate.trials:
        return ""
    low, high = rate.interval
    colour = f"background:var(--{_css(name)})"
    return (
        f'<span class="scale" title="{NAMES[name]}: {rate}">'
        f'<i style="left:{100 * low:.1f}%;width:{100 * (high - low):.1f}%;{colour}"></i>'
        f'<i class="dot" style="left:{100 * rate.rate:.1f}%;{colour}"></i></span>'
    )


def _key(name: str) -> str:
    return f'<span class="key" style="background:var(--{_css(name)})"></span>'


def _css(name: str) -> str:
    """The custom property that colours `name`."""
    return name.replace("_", "-")


def _percent(rate: float) -> str:
    return f"{100 * rate:.1f} %"


def _cell(rate: Rate) -> str:
    low, high = rate.interval
    return f"{_percent(rate.rate)} <small>{100 * low:.0f}–{100 * high:.0f}</small>" if rate.trials else "–"
