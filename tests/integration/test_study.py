"""`rove study`: what it runs, how it goes on after Ctrl-C and kills, what it says where something fails.

The runs of most tests are a stand-in's, which leaves what `rove train` leaves in a hundredth of the time; one
test has real ones.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from rove import cli, recipes, rundir, studies, study
from rove.config import load
from rove.errors import RoveError
from rove.runtime import setup

RECIPES = '''
from dataclasses import replace
from rove.config.schema import (
    EvaluationConfig, LlamaConfig, LoggingConfig, OptimConfig, PPO, PolicyConfig, RolloutConfig, Run,
    SFTConfig, TabletopConfig, TowerConfig, TrainingConfig, ValueHeadConfig,
)
from rove.recipes import recipe
from rove.studies import Arm, Pair, Study, study

@recipe
def tiny_start() -> Run:
    """A policy without a critic, warmed up in a second."""
    return Run(
        name="tiny_start",
        algorithm=PPO(),
        env=TabletopConfig(tasks="pick/red_cube", horizon=8, reward="shaped"),
        policy=PolicyConfig(
            towers=(TowerConfig(width=32, depth=2, heads=2, mlp=64),),
            llama=LlamaConfig(width=32, depth=2, heads=2, mlp=64),
            value_head=ValueHeadConfig(hidden=(16,)),
        ),
        rollout=RolloutConfig(num_envs=8, chunk=4, chunks=2),
        training=TrainingConfig(iterations=4, batch=8, micro_batch=8),
        sft=SFTConfig(episodes=4, steps=3, batch=8, micro_batch=8, optim=OptimConfig()),
        evaluation=EvaluationConfig(episodes=4, variant_episodes=0, num_envs=4),
        logging=LoggingConfig(tensorboard=False, save_every=1),
    )

@study
def tiny_study() -> Study:
    """Is a <b>larger</b> rate better?"""
    return Study(
        claim="It is.",
        expected="No <difference>.",
        arms={"<i>high</i>": Arm("tiny_start", "--training.optim.lr 1e-3"), "low|rate": Arm("tiny_start")},
        pairs=(Pair("<i>high</i>", "low|rate", "higher"),),
        steps=128,
        hours=0.1,
        warm_up=Arm("tiny_start"),
        seeds=(1, 2),
    )
'''

OTHER = '''

@study
def other_study() -> Study:
    """Are two epochs better?"""
    return Study(
        claim="It is.",
        expected="It is not.",
        arms={"as it is": Arm("tiny_start"), "twice": Arm("tiny_start", "--algorithm.epochs 2")},
        pairs=(Pair("twice", "as it is"),),
        steps=128,
        hours=0.1,
        warm_up=Arm("tiny_start"),
        seeds=(1, 2),
    )
'''

STANDIN = """
import fcntl, json, os, pathlib, signal, sys, time
from rove import recipes
from rove.config import load

words = sys.argv[1:]
STRIKES = os.environ.get("STANDIN_STRIKES", "")
PARENT = os.getppid()
FAIL = os.environ.get("STANDIN_FAIL", "nothing")
stop = []
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda n, frame: stop.append(n))

if words[0] == "train" and "--resume" in words:
    directory = pathlib.Path(words[words.index("--resume") + 1])
    run = load.load(directory / "run.json")
else:
    run = load.apply(recipes.build(words[1]), words[2:])
    directory = pathlib.Path(run.output) / run.name
directory.mkdir(parents=True, exist_ok=True)
high = run.training.optim.lr == 1e-3
plain = run.training.optim.lr == 3e-4 and run.algorithm.epochs == 1
arm = "warm-up" if words[0] == "sft" else "high" if high else "low" if plain else "other"
if words[0] == "train":
    with open("starts", "a") as starts:
        starts.write(f"{arm}/{directory.name} {'resume' if '--resume' in words else 'start'}\\n")
lock = (directory / ".lock").open("w")
try:
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
except OSError:
    sys.exit("two writers")
load.save(run, directory / "run.json")
if arm == FAIL:
    print("rove: error: this one has to fail.", file=sys.stderr)
    sys.exit(2)
if words[0] == "sft":
    (directory / "sft").mkdir()
    (directory / "sft" / "checksums.json").write_text("{}")
    sys.exit()
log = directory / "metrics.jsonl"
first = len(log.read_text().splitlines()) if log.exists() else 0
for step in range(first + 1, 5):
    with log.open("a") as file:
        file.write(json.dumps({"step": step, "rollout/success": 0.2 * step, "rollout/episodes": 50,
            "rollout/simulated_steps": 32, "time/minutes": step / 10}) + "\\n")
    (directory / "checkpoints" / f"iteration_{step:06d}").mkdir(parents=True, exist_ok=True)
    if STRIKES and step == 2 and high and run.seed == 1 and not first:
        whom, number = STRIKES.split()
        os.kill(PARENT if whom == "parent" else os.getpid(), int(number))
        time.sleep(1 if whom == "parent" else 0)
    if stop:
        sys.exit(128 + stop[0])
records = [
    {"spec": {"task": "t", "initial_state": n, "variant": "none", "seed": n}, "slot": 0, "length": 4,
     "success": n % 10 < (8 if high else 3), "total_reward": 0.0, "truncated": False, "success_at_end": None}
    for n in range(100)
]
(directory / "eval").mkdir()
report = {"suite": "s", "split": "held_out", "decoding": "greedy", "records": records, "seconds": 1.0}
(directory / "eval" / "after.json").write_text(json.dumps(report))
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with a study in mine.py, whose runs are the stand-in's."""
    (tmp_path / "mine.py").write_text(RECIPES)
    (tmp_path / "standin.py").write_text(STANDIN)
    monkeypatch.chdir(tmp_path)
    assert recipes.all() and studies.all()  # else only what mine.py registers would be there, or be forgotten
    monkeypatch.setattr(recipes, "_recipes", dict(recipes._recipes))
    monkeypatch.setattr(studies, "_studies", dict(studies._studies))
    monkeypatch.setattr(setup, "_calls", dict(setup._calls))
    monkeypatch.setattr(study, "ROVE", (sys.executable, str(tmp_path / "standin.py")))
    yield tmp_path
    sys.modules.pop("mine", None)


def question() -> studies.Question:
    return studies.get("mine.py:tiny_study")


def starts(place: Path) -> list[str]:
    """Every start of a run, "low/seed_1 start"."""
    file = place / "starts"
    return sorted(file.read_text().splitlines()) if file.exists() else []


def run_of(place: Path, arm: str, seed: int) -> Path:
    """The directory of a run."""
    command = results(place)["arms"][arm]["runs"][str(seed)]["command"].split()
    return place / command[command.index("--output") + 1] / f"seed_{seed}"


def results(place: Path) -> dict:
    return json.loads((place / "runs" / "studies" / "tiny_study" / "study.json").read_text())


ALL = [f"{arm}/seed_{seed} start" for arm in ("high", "low") for seed in (1, 2)]


def test_a_study_runs_its_arms_and_says_what_it_found(place, capsys):
    assert cli.main(["study", "mine.py:tiny_study"]) == 0
    said = capsys.readouterr().out
    assert "[1/6] warm-up, seed 1: rove sft mine.py:tiny_start" in said and "study.html" in said
    assert starts(place) == ALL
    made = results(place)
    assert made["arms"]["<i>high</i>"]["success"]["value"] == pytest.approx(0.8)
    pair = made["pairs"][0]
    assert (pair["seeds"], pair["verdict"]) == (2, "agrees with the claim")
    assert pair["found"].startswith("<i>high</i> ends higher than low|rate, by 50.0 points [")
    warm_ups = list((place / "runs" / "studies" / "warm-ups").glob("tiny_start-*/seed_*/sft"))
    assert len(warm_ups) == 2, "one a seed, for both arms"
    saved = load.load(run_of(place, "low|rate", 2) / "run.json")
    assert (
        saved.sft is None
        and Path(saved.policy.checkpoint or "").resolve()
        == warm_ups[[path.parent.name for path in warm_ups].index("seed_2")].resolve()
    )
    assert (saved.seed, saved.training.max_simulated_steps, saved.training.max_minutes) == (2, 128, None)
    # Again: nothing is left to do.
    assert cli.main(["study", "mine.py:tiny_study"]) == 0
    assert "6 of 6 warm-ups and runs are done already" in capsys.readouterr().out
    assert starts(place) == ALL


def test_a_study_that_hears_ctrl_c_ends_in_order_and_goes_on_where_it_was(place, monkeypatch, capsys):
    monkeypatch.setenv("STANDIN_STRIKES", f"parent {signal.SIGINT:d}")
    assert cli.main(["study", "mine.py:tiny_study"]) == 130
    said = capsys.readouterr()
    assert "Stopping after the runs under way are saved" in said.err
    assert "<i>high</i>, seed 1: stopped; the same command goes on with it." in said.out
    assert results(place)["pairs"][0]["difference"] is None
    goes_on(place)


def test_a_study_that_is_killed_takes_its_runs_with_it_and_goes_on_where_it_was(place):
    """The child is told by the system, and saves; the second study waits for that, and resumes it."""
    code = (
        "import sys; from rove import cli, study\n"
        f"study.ROVE = (sys.executable, {str(place / 'standin.py')!r})\n"
        "sys.exit(cli.main(['study', 'mine.py:tiny_study']))"
    )
    environment = {**os.environ, "STANDIN_STRIKES": f"parent {signal.SIGKILL:d}"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    goes_on(place)


def goes_on(place: Path) -> None:
    """The same command again: the run under way is resumed, and what was done is not done again."""
    assert starts(place) == ["high/seed_1 start"]
    page, failures = study.carry_out(question(), say=lambda text: None)
    assert failures == [] and page.exists()
    assert sorted(starts(place)) == sorted([*ALL, "high/seed_1 resume"])
    log = run_of(place, "<i>high</i>", 1) / "metrics.jsonl"
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == [1, 2, 3, 4]


def test_a_run_that_is_killed_is_named_and_begun_again_by_the_same_command(place, monkeypatch):
    monkeypatch.setenv("STANDIN_STRIKES", f"itself {signal.SIGKILL:d}")
    _, failures = study.carry_out(question(), say=lambda text: None)
    assert len(failures) == 1
    assert re.match(r"<i>high</i>, seed 1: killed by SIGKILL \(.*seed_1\.log\)", failures[0])
    assert starts(place) == ALL, "the rest has gone on"
    assert study.carry_out(question(), say=lambda text: None)[1] == []
    assert sorted(starts(place)) == sorted([*ALL, "high/seed_1 resume"])


def test_a_failed_arm_is_named_and_the_rest_goes_on(place, monkeypatch, capsys):
    monkeypatch.setenv("STANDIN_FAIL", "low")
    assert cli.main(["study", "mine.py:tiny_study", "--jobs", "1"]) == 1
    error = capsys.readouterr().err
    assert error.count("rove: error: low|rate, seed ") == 2 and "this one has to fail." in error
    made = results(place)
    assert made["arms"]["<i>high</i>"]["success"] is not None and made["arms"]["low|rate"]["success"] is None
    assert made["pairs"][0]["found"].endswith("have no finished run of one seed yet")
    page = (place / "runs/studies/tiny_study/study.html").read_text()
    assert "2 of 4 runs are not finished" in page


def test_without_a_warm_up_its_runs_are_not_begun(place, monkeypatch):
    monkeypatch.setenv("STANDIN_FAIL", "warm-up")
    _, failures = study.carry_out(question(), say=lambda text: None)
    assert len(failures) == 6 and starts(place) == []
    assert failures[1] == "<i>high</i>, seed 1: not run, because its warm-up failed"


def test_one_process_carries_a_study_out(place):
    with rundir.claim(place / "runs" / "studies" / "tiny_study"):
        with pytest.raises(RoveError, match="is being written by another process"):
            study.carry_out(question(), say=lambda text: None)
    assert rundir.writer(place / "runs" / "studies" / "tiny_study") is None


def test_what_two_studies_ask_alike_is_run_once(place):
    """The second has an arm of the first, by another name, and one of its own."""
    (place / "mine.py").write_text(RECIPES + OTHER)
    study.carry_out(question(), say=lambda text: None)
    study.carry_out(studies.get("mine.py:other_study"), say=lambda text: None)
    assert starts(place) == sorted([*ALL, "other/seed_1 start", "other/seed_2 start"])
    other = json.loads((place / "runs/studies/other_study/study.json").read_text())
    assert other["arms"]["as it is"]["success"] == results(place)["arms"]["low|rate"]["success"]


def test_an_arm_that_has_changed_is_run_anew(place):
    study.carry_out(question(), say=lambda text: None)
    (place / "mine.py").write_text(RECIPES.replace("optim.lr 1e-3", "optim.lr 2e-3"))
    sys.modules.pop("mine")
    study.carry_out(question(), say=lambda text: None)
    assert starts(place) == sorted([*ALL, "other/seed_1 start", "other/seed_2 start"])


def test_what_cannot_work_is_refused_before_anything_is_made(place):
    def refused(change: str, message: str, jobs: int = 1) -> None:
        (place / "mine.py").write_text(RECIPES.replace(*change.split(" -> ")))
        sys.modules.pop("mine", None)
        with pytest.raises(RoveError, match=message):
            study.carry_out(question(), jobs=jobs, say=lambda text: None)
        assert not (place / "runs").exists()

    refused("--training.optim.lr 1e-3 -> --training.optim.rl 1e-3", r"Arm '<i>high</i>': Unknown setting")
    refused("--training.optim.lr 1e-3 -> --training.optim.schedule linear", "the budget ends the run")
    refused('"low|rate", "higher" -> "lowrate", "higher"', "a pair names the arm 'lowrate'")
    refused("steps=128 -> steps=None", "it needs one budget")
    refused("seeds=(1, 2) -> seeds=(1, 1)", "its seeds have to be there, and to differ")
    refused("episodes=4, variant_episodes=0 -> episodes=0", "nothing is evaluated that could be compared")
    refused("steps=128 -> minutes=1.0", "which they would take from each other", jobs=2)
    refused("steps=128 -> steps=128", "this machine has", jobs=1000)
    refused("--training.optim.lr 1e-3 -> ", "have the same settings")


class Outline(HTMLParser):
    """Tags that are open, and all text; fails on a tag that closes what is not open."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        if tag not in ("meta", "rect", "circle", "line", "polyline", "polygon"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.add(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_shows_labels_as_text(place):
    page, _ = study.carry_out(question(), say=lambda text: None)
    outline = Outline()
    outline.feed(page.read_text())
    assert outline.open == []
    text = " ".join(" ".join(outline.text).split())
    for words in ("Is a <b>larger</b> rate better?", "No <difference>.", "<i>high</i>", "low|rate"):
        assert words in text
    assert "rove train mine.py:tiny_start --sft none" in text
    assert not re.search(r"https?://|@import|<script|url\(", page.read_text())
    markdown = page.with_suffix(".md").read_text()
    assert "| &lt;i&gt;high&lt;/i&gt; | 80.0 [" in markdown and "low\\|rate" in markdown
    picture = page.with_suffix(".svg").read_text()
    assert picture.startswith("<svg xmlns=") and "&lt;i&gt;high&lt;/i&gt;" in picture
    Outline().feed(picture)


@pytest.mark.slow
def test_a_real_study(place, monkeypatch):
    """Children are `rove sft` and `rove train`, both arms begin with one policy, and the budget ends them."""
    monkeypatch.undo()
    monkeypatch.chdir(place)
    (place / "mine.py").write_text(RECIPES.replace("seeds=(1, 2)", "seeds=(1,)"))
    said: list[str] = []
    page, failures = study.carry_out(question(), say=said.append)
    logs = "\n".join(file.read_text() for file in place.glob("runs/studies/**/*.log"))
    assert failures == [], logs
    made = json.loads(page.with_suffix(".json").read_text())
    for arm in made["arms"].values():
        run = arm["runs"]["1"]
        assert run["finished"] and 128 <= run["steps"] < 128 + 64 and run["iterations"] < 4 + 3
        assert run["before"] == made["arms"]["low|rate"]["runs"]["1"]["before"]
    assert made["about"]["machine"]["cores"] >= 1
    assert page.read_text().count("rove train") == 2
