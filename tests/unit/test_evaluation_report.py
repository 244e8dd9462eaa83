from dataclasses import replace

import pytest
from synthetic import AXES, report

from rove.errors import RoveError
from rove.evaluation import report as evaluation
from rove.evaluation.statistics import Rate


def test_a_report_survives_the_disk(tmp_path):
    saved = report(0.6)
    evaluation.save(saved, tmp_path / "eval" / "after.json")
    assert evaluation.load(tmp_path / "eval" / "after.json") == saved
    assert [path.name for path in (tmp_path / "eval").iterdir()] == ["after.json"]


def test_a_file_that_is_no_report_is_refused(tmp_path):
    with pytest.raises(RoveError, match="rove eval"):
        evaluation.load(tmp_path / "after.json")
    (tmp_path / "after.json").write_text('{"records": [{"spec": {"task": "a"}}]}')
    with pytest.raises(RoveError, match="initial_state"):
        evaluation.load(tmp_path / "after.json")


def test_an_axis_pools_its_variants():
    rows = {label: cells["after"] for label, _, cells in evaluation.rows({"after": report(0.6)})}
    assert list(rows) == [
        "in distribution",
        *("vision", "table_texture", "light"),
        *("semantics", "unseen_shape", "unseen_phrasing"),
        *("execution", "unseen_position"),
    ]
    light, texture = rows["light"], rows["table_texture"]
    assert rows["vision"] == Rate(light.successes + texture.successes, light.trials + texture.trials)
    assert rows["in distribution"].trials == 200


def test_a_variant_without_an_axis_is_shown_apart():
    axes = {name: axis for name, axis in AXES.items() if name != "light"}
    shifts = evaluation.shifted(replace(report(0.6), about={"axes": axes}))
    assert list(shifts["other"]) == ["light"]
    assert list(shifts["vision"]) == ["table_texture"]


def test_a_run_compares_what_it_has_in_one_order(tmp_path):
    for name in ("after", "best", "before"):
        evaluation.save(report(0.6), tmp_path / "eval" / f"{name}.json")
    assert list(evaluation.load_all(tmp_path)) == ["before", "after"]
    head = evaluation.table(evaluation.load_all(tmp_path)).splitlines()[0]
    assert head.split()[-5:] == ["before", "RL", "after", "RL", "episodes"]


def test_the_table_lines_up_and_admits_what_was_not_measured():
    sft, rl = report(0.4), report(0.9)
    sft = replace(sft, records=tuple(r for r in sft.records if r.spec.variant in ("none", "light")))
    lines = evaluation.table({"SFT": sft, "RL": rl}).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[2].split() == ["in", "distribution", *str(Rate.of(evaluation.in_distribution(sft))).split(),
                                *str(Rate.of(evaluation.in_distribution(rl))).split(), "200"]  # fmt: skip
    unseen = next(line for line in lines if line.startswith("  unseen_shape"))
    assert unseen.split()[1] == "–"
    assert unseen.split()[-1] == "60"


def test_published_rows_stand_beside_with_their_means():
    column = {"in distribution": 90.0, "light": 70.0, "table_texture": 50.0, "shifted": 61.0}
    lines = evaluation.table({"after": report(0.6)}, {"Published": column}).splitlines()
    assert len({len(line.rstrip()) for line in lines[2:-1]}) == 1
    cells = {line.split("  ")[0].strip() or line.split()[0]: line.split() for line in lines[2:]}
    assert "Published" in lines[0].split()
    assert cells["in distribution"][-3:-1] == ["90.0", "%"]
    assert cells["vision"][-3:-1] == ["60.0", "%"]
    assert cells["execution"][-2] == "–"
    assert lines[-1].startswith("shifted: mean of the axes") and lines[-1].split()[-2:] == ["61.0", "%"]


def test_success_once_and_at_the_end_are_two_columns():
    plain = report(0.6)
    assert list(evaluation.once_and_at_end("mine", plain)) == ["mine"]
    lost = tuple(replace(r, success_at_end=False) for r in plain.records)
    both = evaluation.once_and_at_end("mine", replace(plain, records=lost))
    assert list(both) == ["mine, once", "at the end"]
    assert Rate.of(both["mine, once"].records) == Rate.of(plain.records)
    assert Rate.of(both["at the end"].records).successes == 0
