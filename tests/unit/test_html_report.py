import json
import re
import shutil
from html.parser import HTMLParser

import pytest
from synthetic import AXES, TASKS, run_directory

from rove.errors import RoveError
from rove.evaluation import report as evaluation
from rove.evaluation.statistics import Rate
from rove.reporting import charts
from rove.reporting.html import write_report
from rove.reporting.log import Logger

VOID = {"meta", "img"}
HOSTILE = "\"'><script>&lt;"
"""Text that becomes markup wherever it is not escaped. It has no slash, which would end a task's family."""


class Outline(HTMLParser):
    """Collects tags, text, attributes and headings; fails on a tag that closes what is not open."""

    def __init__(self):
        super().__init__()
        self.open, self.text, self.attributes, self.headings, self.tags = [], [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.attributes += attrs
        self.tags.append((tag, [name for name, _ in attrs]))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.attributes += attrs
        self.tags.append((tag, [name for name, _ in attrs]))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)
        if self.open and self.open[-1] in ("h2", "summary"):
            self.headings.append(data)


def read(path):
    outline = Outline()
    outline.feed(path.read_text())
    assert outline.open == []
    return outline


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return run_directory(tmp_path_factory.mktemp("runs") / "demo")


def test_the_page_holds_every_section_and_asks_for_nothing(finished):
    page = read(write_report(finished))
    assert page.headings == [
        "Learning curve", "Shifted variants", "Tasks", "Episodes, before and after RL", "Time per iteration",
        "All metrics", "Configuration", "Reproduce",
    ]  # fmt: skip
    addresses = [value for name, value in page.attributes if name in ("src", "href", "data", "xlink:href")]
    assert len(addresses) == 6
    assert all(address.startswith("data:image/webp;base64,") for address in addresses)
    assert not re.search(r"https?://|@import|<script|url\(", (finished / "report.html").read_text())


def test_the_page_shows_the_measured_numbers(finished):
    text = " ".join(read(write_report(finished)).text)
    for name in ("before", "after"):
        rate = Rate.of(evaluation.in_distribution(evaluation.load(finished / "eval" / f"{name}.json")))
        assert f"{100 * rate.rate:.1f} %" in text
        assert f"{rate.successes:,} of {rate.trials:,}" in text
    assert "Gained by RL:" in text
    assert "the same episodes, paired" in text
    for label in (*AXES, *AXES.values(), *TASKS, "algorithm.group_size", "rove demo --seed 1"):
        assert label in text
    assert "A processor <with brackets>" in text  # escaped on the page, unescaped by the parser


def test_what_a_run_lacks_is_left_out(finished, tmp_path):
    for name in ("run.json", "metrics.jsonl"):
        shutil.copy(finished / name, tmp_path / name)
    assert read(write_report(tmp_path)).headings == [
        "Learning curve", "Time per iteration", "All metrics", "Configuration",
    ]  # fmt: skip
    (tmp_path / "metrics.jsonl").unlink()
    assert read(write_report(tmp_path)).headings == ["Configuration"]
    (tmp_path / "run.json").unlink()
    with pytest.raises(RoveError, match="not a run directory"):
        write_report(tmp_path)


def test_a_single_iteration_is_enough_for_a_page(tmp_path):
    assert "Learning curve" in read(write_report(run_directory(tmp_path, iterations=1))).headings


def hostile(tree):
    """The same JSON with `HOSTILE` before each string that a run chooses."""
    if isinstance(tree, dict):
        return {
            hostile(key) if key in AXES else key: value if key in ("file", "phase") else hostile(value)
            for key, value in tree.items()
        }
    if isinstance(tree, list):
        return [hostile(item) for item in tree]
    return HOSTILE + tree if isinstance(tree, str) and tree != evaluation.IN_DISTRIBUTION else tree


def test_what_comes_from_a_run_is_escaped_everywhere(tmp_path):
    run = run_directory(tmp_path)
    harmless = read(write_report(run))
    for name in ("run.json", "about.json", "eval/before.json", "eval/after.json", "videos/index.json"):
        (run / name).write_text(json.dumps(hostile(json.loads((run / name).read_text()))))
    page = read(write_report(run))
    assert page.tags == harmless.tags
    assert [text.strip() for text in page.text].count(f"{HOSTILE}demo") == 3  # heading, two settings
    instructions = {value for name, value in page.attributes if name == "alt"}
    assert len(instructions) == 6
    assert all(value.count(HOSTILE) == 1 for value in instructions)
    for label in (*AXES, *AXES.values(), *TASKS, "rove demo --seed 1", "A processor <with brackets>"):
        assert HOSTILE + label in " ".join(page.text)


def test_only_videos_of_the_run_are_embedded(tmp_path):
    run, secret = run_directory(tmp_path / "run"), tmp_path / "secret.webp"
    secret.write_bytes(b"a secret")
    (run / "videos" / "link.webp").symlink_to(secret)
    entries = json.loads((run / "videos" / "index.json").read_text())
    files = ["../../secret.webp", str(secret), "link.webp", "gone.webp", "before", "index.json", "a\0.webp"]
    wrong = [{**entries[0], "file": file} for file in files]
    wrong += [{**entries[0], "phase": "<script>"}, {**entries[0], "success": 1}, {"file": "before/0.webp"}, 7]
    (run / "videos" / "index.json").write_text(json.dumps([*wrong, *entries]))
    pictures = [value for name, value in read(write_report(run)).attributes if name == "src"]
    assert len(pictures) == len(entries)
    (run / "videos" / "index.json").write_text("{")
    with pytest.raises(RoveError, match="index.json is no JSON"):
        write_report(run)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("run.json", "[]"),
        ("run.json", '{"name": "a", "seed": 1, "env": 3}'),
        ("about.json", "\xff"),
        ("eval/after.json", '{"records": 3}'),
        ("eval/after.json", "success"),
        ("eval/after.json", "axes"),
    ],
)
def test_a_damaged_file_is_named(finished, tmp_path, file, content):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    if content in ("success", "axes"):
        data = json.loads((run / file).read_text())
        data["records"][0]["success"] = {} if content == "success" else True
        data["about"]["axes"] = {"light": []} if content == "axes" else {}
        content = json.dumps(data)
    (run / file).write_bytes(content.encode("latin-1"))
    with pytest.raises(RoveError, match=str(run / file)):
        write_report(run)


def test_an_evaluation_without_finished_training_episodes_is_drawn(tmp_path):
    shutil.copy(run_directory(tmp_path / "run", 1) / "run.json", tmp_path / "run.json")
    line = {"eval/success": 0.5, "eval/episodes": 8, "rollout/episodes": 0, "time/iteration": 2.0}
    with Logger(tmp_path, tensorboard=False, wandb=False) as log:
        log.log(1, {**line, "time/simulation": 1.5})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "time/iteration": NaN}\n{"step": "<b>"}\n{"no": "step"}\n[1]\n')
    assert "Learning curve" in read(write_report(tmp_path)).headings


def test_the_time_of_a_single_iteration_is_a_column():
    (wide,) = re.findall(r'points="([^"]*)"', charts.stacked_area(960, {"training": [(3.0, 2.0)]}))
    corners = {tuple(map(float, point.split(","))) for point in wide.split()}
    assert len({x for x, _ in corners}) == 2 and len({y for _, y in corners}) == 2


@pytest.mark.parametrize(
    ("low", "high", "count", "expected"),
    [(0, 40, 8, [0, 5, 10, 15, 20, 25, 30, 35, 40]), (0, 1, 4, [0, 0.5, 1.0]), (3, 17, 4, [5, 10, 15])],
)
def test_ticks_are_round(low, high, count, expected):
    assert charts.ticks(low, high, count) == pytest.approx(expected)


def test_a_single_point_is_a_dot():
    assert "<circle" in charts.small_chart("train/ratio", [(1.0, 0.5)])
    assert "<circle" not in charts.small_chart("train/ratio", [(1.0, 0.5), (2.0, 0.6)])


def test_thinning_keeps_the_mean_of_a_long_series():
    points = [(float(i), float(i % 7)) for i in range(2400)]
    thinned = charts.thin(points)
    assert len(thinned) == 240
    assert sum(y for _, y in thinned) / 240 == pytest.approx(sum(y for _, y in points) / 2400)
    assert charts.thin(points[:240]) == points[:240]
