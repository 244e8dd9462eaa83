"""The studies that ship, and how they are found."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from rove import cli, studies, study
from rove.errors import RoveError
from rove.runtime import setup

NAMES = [question.name for question in studies.all()]


@pytest.mark.parametrize("name", NAMES)
def test_every_study_is_sound(name, tmp_path):
    question = studies.get(name)
    made = studies.build(question)
    tasks, places = study.plan(made, tmp_path)  # builds and checks the settings of every run
    assert len(places) == len(made.arms) * len(made.seeds)
    assert len({task.directory for task in tasks}) == len(tasks)
    assert made.pairs and {label for pair in made.pairs for label in (pair.first, pair.second)} == set(
        made.arms
    )
    assert 20 < len(question.summary) < 100 and made.claim.endswith(".") and made.expected.endswith(".")


def test_all_of_them_take_ten_hours_and_share_what_they_have_in_common(tmp_path):
    tabletop = [name for name in NAMES if not name.startswith("libero_")]
    assert len(tabletop) >= 10 and len(NAMES) - len(tabletop) == 2
    built = {name: studies.build(studies.get(name)) for name in NAMES}
    assert all(len(built[name].seeds) >= 3 for name in tabletop)
    tasks = [task for made in built.values() for task in study.plan(made, tmp_path)[0]]
    warm_ups = {task.directory for task in tasks if task.start[0] == "sft"}
    assert len(warm_ups) == 3 + 1
    runs = [task.directory for task in tasks if task.start[0] == "train"]
    assert f"of the {len(runs)} runs of all studies there are {len(set(runs))} to carry out" in DOCUMENTED
    assert sum(made.hours for made in built.values()) + 3 * 4 / 60 + 11 / 60 <= 10.0


def test_they_are_listed_with_their_times(capsys):
    assert cli.main(["study"]) == 0
    said = capsys.readouterr().out
    assert all(f"  {name} " in said for name in NAMES)
    assert "Vine sampling with 2, 4, 8 and 16 tries" in said and "(18 runs, 0.8 h)" in said


def test_a_misspelt_name_gets_the_nearest(capsys):
    assert cli.main(["study", "ppo_gpro"]) == 2
    assert "Unknown study 'ppo_gpro'. Did you mean 'ppo_grpo'" in capsys.readouterr().err
    with pytest.raises(RoveError, match="name a study in it, mine.py:NAME"):
        studies.get("mine.py")


DOCUMENTED = (Path(__file__).resolve().parents[2] / "docs" / "findings.md").read_text()


def test_the_documentation_has_each_with_its_command_and_time():
    rows = dict(re.findall(r"`rove study (\w+)` \| ([\d.]+) \|", DOCUMENTED))
    assert {name: float(hours) for name, hours in rows.items()} == {
        name: studies.build(studies.get(name)).hours for name in NAMES
    }


def test_the_study_in_the_documentation(tmp_path, monkeypatch):
    monkeypatch.setattr(studies, "_studies", dict(studies._studies))
    monkeypatch.setattr(setup, "_calls", dict(setup._calls))
    file = tmp_path / "documented_study.py"
    file.write_text(re.findall(r"```python\n(.*?)```", DOCUMENTED, re.DOTALL)[0])
    made = studies.build(studies.get(f"{file}:entropy"))
    sys.modules.pop("documented_study")
    _, places = study.plan(made, tmp_path)
    assert len(places) == 10 and "--algorithm.entropy_coef 0.01" in places[1].command
