"""The command line: what it parses, what it hands on, what it says to mistakes."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
import types
from pathlib import Path

import pytest

from rove import cli
from rove.errors import RoveError


def fake(monkeypatch, module: str, **functions) -> None:
    monkeypatch.setitem(sys.modules, module, types.SimpleNamespace(**functions))


@pytest.fixture
def calls(monkeypatch):
    """What `rove train` hands to the loop."""
    made = []

    def train(run, directory=None, resume=False, profile=False):
        made.append((run, directory, resume))
        return directory or Path(run.output) / run.name

    fake(monkeypatch, "rove.train", train=train)
    return made


def test_help_is_fast_and_lists_every_command(capsys):
    assert cli.main([]) == 0
    text = capsys.readouterr().out
    assert all(f"\n    {name} " in text for name in cli.COMMANDS)
    code = "import sys, rove.cli; rove.cli.main(['--help']); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_each_command_has_help(name, capsys):
    assert cli.main([name, "--help"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: rove {name}")
    assert ("--key value" in text) == cli.COMMANDS[name].settings


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("trian demo", "Unknown command 'trian'. Did you mean 'train'"),
        ("train dmeo", "Unknown recipe 'dmeo'. Did you mean 'demo'"),
        ("train", "Name a recipe, or a run to go on with"),
        ("train demo --num_envs 3", "--rollout.num_envs or --evaluation.num_envs"),
        ("train demo --rollout.num_envs x", "expected an integer"),
        ("train demo --rollout.num_envs", "--rollout.num_envs needs a value"),
        ("train demo --seed --name x", "--seed needs a value"),
        ("train tabletop_grpo --algorithm.group_size 7", "does not divide rollout.num_envs"),
        ("train demo --resum x", "Unknown option --resum. Did you mean '--resume'"),
        ("train demo again", "Unrecognized arguments: again"),
        ("sft demo --sft none", "nothing to start from"),
        ("eval x", "--suite"),
        ("eval x --suit tabletop", "Unknown option --suit. Did you mean '--suite'"),
        ("eval x --suite tabletop --episodes 0", "expected a whole number of at least 1"),
        ("eval x --suite tabletop --decoding gredy", "evaluation.decoding = 'gredy'. Did you mean 'greedy'"),
        ("report", "The following arguments are required: RUN"),
        ("recipes --all", "Unknown option --all"),
        ("plan demo --nodes 1000000000", "expected a whole number from 1 to 256, got '1000000000'"),
        ("bench nothing_like_it", "Unknown benchmark 'nothing_like_it'"),
        ("train --resume gone", "No run configuration at gone/run.json"),
    ],
)
def test_mistakes_get_one_message_and_exit_code_2(words, message, capsys, monkeypatch):
    monkeypatch.setattr(cli.handlers, "_scripts", lambda: {"envs": Path("envs.py")})
    assert cli.main(words.split()) == 2
    output = capsys.readouterr()
    assert output.err.startswith("rove: error: ")
    assert message in output.err
    assert "Traceback" not in output.err


def test_train_hands_on_the_resolved_run(calls, capsys):
    assert cli.main(["train", "--seed", "5", "demo", "--training.optim.lr=1e-5"]) == 0
    ((run, directory, resume),) = calls
    assert (run.name, run.seed, run.training.optim.lr) == ("demo", 5, 1e-5)
    assert (directory, resume) == (None, False)
    assert "runs/demo/report.html" in capsys.readouterr().out


def test_resume_takes_the_configuration_from_the_run(calls, tmp_path):
    from rove import recipes
    from rove.config import load

    run = load.apply(recipes.get("demo").build(), ["--seed", "9"])
    load.save(run, tmp_path / "run.json")
    assert cli.main(["train", "--resume", str(tmp_path)]) == 0
    assert calls == [(run, tmp_path, True)]


@pytest.mark.parametrize(
    ("error", "code"), [(RoveError("no"), 2), (KeyboardInterrupt(), 130)], ids=["mistake", "ctrl-c"]
)
def test_exit_codes(error, code, monkeypatch):
    def fail(*args, **kwargs):
        raise error

    fake(monkeypatch, "rove.train", train=fail)
    assert cli.main(["train", "demo"]) == code


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "No space left", "runs/x"), "runs/x cannot be used: No space left. Free"),
        (OSError(errno.ENOSPC, "No space left"), "A file cannot be used: No space left. Free some space"),
        (PermissionError(errno.EACCES, "Denied", "runs"), "runs cannot be used: Denied.\n"),
        (MemoryError("Unable to allocate 8 TiB"), "Not enough memory (Unable to allocate 8 TiB): lower"),
        (RuntimeError("[x] DefaultCPUAllocator: can't allocate"), "Not enough memory ("),
        (ValueError("Could not allocate memory"), "Not enough memory (Could not allocate memory): lower"),
    ],
)
def test_what_the_machine_lacks_gets_one_line(error, message, monkeypatch, capsys):
    def fail(*args, **kwargs):
        raise error

    fake(monkeypatch, "rove.train", train=fail)
    assert cli.main(["train", "demo"]) == 2
    said = capsys.readouterr().err
    assert message in said and said.startswith("rove: error: ") and said.count("\n") == 1


def test_what_a_full_disk_makes_of_pytorch_and_safetensors_is_known():
    import torch
    from safetensors.torch import save_file

    for write in (lambda: torch.save(torch.zeros(9999), "/dev/full"), lambda: save_file({}, "/dev/full/x")):
        with pytest.raises(Exception) as caught:  # noqa: PT011
            write()
        assert cli._lack(caught.value) is not None


def test_resuming_names_the_file_that_registered_what_a_run_names(calls, tmp_path, capsys):
    from rove import recipes
    from rove.config import load

    load.save(recipes.get("demo").build(), tmp_path / "run.json")
    text = (tmp_path / "run.json").read_text().replace('"tabletop"', '"unheard_of"')
    (tmp_path / "run.json").write_text(text)
    (tmp_path / "about.json").write_text(json.dumps({"command": "rove train own/env.py:reach --seed 1"}))
    assert cli.main(["train", "--resume", str(tmp_path)]) == 2
    assert f"rove train own/env.py:reach --resume {tmp_path}\n" in capsys.readouterr().err
    for damaged in ("[]", "{"):
        (tmp_path / "about.json").write_text(damaged)
        assert cli.main(["train", "--resume", str(tmp_path)]) == 2
        assert "env.kind = 'unheard_of'" in capsys.readouterr().err
    assert calls == []


def test_a_bug_keeps_its_traceback(monkeypatch):
    def fail(*args, **kwargs):
        raise ValueError("a bug of ours")

    fake(monkeypatch, "rove.train", train=fail)
    with pytest.raises(ValueError, match="a bug of ours"):
        cli.main(["train", "demo"])


def test_recipes_are_listed_with_their_summaries(capsys):
    assert cli.main(["recipes"]) == 0
    assert "GRPO on the same eight tasks" in capsys.readouterr().out


def test_show_prints_settings_that_can_be_typed_back(capsys):
    from rove import recipes
    from rove.config import load

    assert cli.main(["show", "tabletop_ppo", "--seed", "3"]) == 0
    lines = [line.split(" = ", 1) for line in capsys.readouterr().out.splitlines()]
    words = [word for key, value in lines for word in (f"--{key}", value)]
    expected = load.apply(recipes.get("tabletop_ppo").build(), ["--seed", "3"])
    assert load.apply(recipes.get("tabletop_ppo").build(), words) == expected


def test_show_says_what_is_wrong(capsys):
    assert cli.main(["show", "tabletop_grpo", "--algorithm.kind", "ppo"]) == 2
    assert "PPO needs a critic" in capsys.readouterr().err


def test_report_prints_the_page(monkeypatch, capsys, tmp_path):
    fake(monkeypatch, "rove.reporting.html", write_report=lambda run: run / "report.html")
    assert cli.main(["report", str(tmp_path)]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "report.html")


def test_bench_runs_scripts_and_reports_their_failure(monkeypatch, tmp_path, capfd):
    (tmp_path / "good.py").write_text("print('measured')")
    (tmp_path / "bad.py").write_text("raise SystemExit(3)")
    monkeypatch.setattr(cli.handlers, "_scripts", lambda: {p.stem: p for p in sorted(tmp_path.glob("*.py"))})
    assert cli.main(["bench", "good"]) == 0
    assert "measured" in capfd.readouterr().out
    assert cli.main(["bench"]) == 3


def test_eval_imports_files_and_hands_on_what_was_given(monkeypatch, capsys, tmp_path):
    from rove import recipes
    from rove.config.schema import EvaluationConfig
    from rove.evaluation import report
    from rove.types import EvalReport

    made, imported = [], []
    monkeypatch.setattr(recipes, "import_file", imported.append)
    monkeypatch.setattr(report, "table", lambda reports, published: f"table of {', '.join(reports)}")
    monkeypatch.setattr(report, "task_table", lambda judged: f"tasks of {judged.policy}")
    fake(
        monkeypatch,
        "rove.evaluation.checkpoint",
        evaluate_checkpoint=lambda *args, **kwargs: (
            made.append((args, kwargs)) or EvalReport("reach", "held_out", "greedy", (), 0.0, "judged")
        ),
    )
    words = "eval runs/x/sft --suite reach --import mine.py --episodes 5 --variant all --out a.json"
    words += " --env.horizon 8"
    assert cli.main(words.split()) == 0
    config = EvaluationConfig(episodes=5)
    options = {"seed": 0, "settings": ["--env.horizon", "8"], "execute": None, "out": Path("a.json")}
    [(positional, keywords)] = made
    assert positional == ("runs/x/sft", "reach", None, "all", config)
    assert {name: keywords[name] for name in options} == options
    assert imported == [Path("mine.py")]
    assert capsys.readouterr().out.split("\n\n") == ["tasks of judged", "table of sft\n"]


@pytest.mark.parametrize(("status", "code"), [("missing", 0), ("error", 1)])
def test_doctor_fails_on_errors_only(monkeypatch, status, code, capsys):
    from rove import doctor

    monkeypatch.setattr(doctor, "examine", lambda: [doctor.Finding("Thing", status, "detail")])
    assert cli.main(["doctor"]) == code
    assert f"{status:>7}  Thing  detail" in capsys.readouterr().out
