"""Any value of any setting is refused in words, or accepted and can be planned with."""

from __future__ import annotations

import copy
import json
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as some
from tests.faults.forks import FULL

from rove import cli, recipes
from rove.config import load
from rove.config.ranges import MAX_SEED
from rove.config.schema import GRPO, Run
from rove.config.validate import validate
from rove.errors import RoveError
from rove.placement.inventory import Inventory
from rove.placement.plan import make_plan

RUNS = [recipes.get(name).build() for name in ("tabletop_ppo", "tabletop_grpo", "demo")]
KEYS = sorted({key for run in RUNS for key in load.keys(run, chosen=False)})
MACHINES = (Inventory.of(cores=2), Inventory.of(gpus=2, cores=4))

numbers = some.integers() | some.floats() | some.sampled_from([2**31 - 1, 2**31, MAX_SEED, 2**63, 10**400])
texts = some.text(max_size=12) | some.sampled_from(
    [
        *("none", "true", "..", "a\0b", "\udcff", "²", "cuda:²", "1+2j", "hybrid", "push:99999999999"),
        *("[" * 5000, "(" * 300, "[" * 900 + "]" * 900, "9" * 5000, "0x" + "f" * 6000, "x" * 300),
        *("{'kind': []}", "{'kind': 'grpo'}", "{1: 2}"),
        *("learner: 0-99999999999, env: 0, policy: 0", "learner: all, env: all, policy: all"),
    ]
)
lists = some.lists(numbers | texts, max_size=4).map(lambda items: ",".join(map(str, items)))
words = some.tuples(some.sampled_from(KEYS), numbers.map(str) | texts | lists)
EXAMPLES = 5000 if FULL else 400
"""Of each test that tries any value."""
FUZZ = settings(max_examples=EXAMPLES, deadline=None, derandomize=True, database=None)


def accepted_or_refused(make) -> None:
    """Whatever `make` returns can be validated and planned with, unless a RoveError says why not."""
    with suppress(RoveError):
        run = make()
        list(load.leaves(run))
        validate(run)
        for machine in MACHINES:
            str(make_plan(run, machine))


@FUZZ
@given(some.sampled_from(RUNS), some.lists(words, min_size=1, max_size=3))
def test_any_value_on_the_command_line(run, pairs):
    accepted_or_refused(lambda: load.apply(run, [f"--{key}={text}" for key, text in pairs]))


json_values = some.recursive(
    some.none() | some.booleans() | numbers | texts,
    lambda inner: some.lists(inner, max_size=3) | some.dictionaries(some.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)


@FUZZ
@given(some.sampled_from(RUNS), some.randoms(use_true_random=False), json_values)
def test_any_value_in_a_saved_run(run, random, value):
    data = copy.deepcopy(load.to_dict(run))
    place = data
    while isinstance(below := place[name := random.choice(list(place))], dict) and random.random() < 0.8:
        place = below
    place[name] = value
    accepted_or_refused(lambda: load.decode(Run, data, ""))


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ("--seed 4294967296", "seed = 4294967296: expected a number at least 0 and at most 4294967295"),
        ("--env.threads 1180591620717411303424", "env.threads = 1180591620717411303424: expected an integer"),
        ("--policy.value_head.hidden 64,0", "hidden = [64, 0]: expected numbers, each at least 1"),
        ("--algorithm.clip_high 1e308", "clip_high = 1e+308: expected a number above 0 and at most 1000"),
        ("--placement.deadline 1e10", "deadline = 10000000000.0: expected a number above 0"),
        ("--rollout.emphasis push:99999999999", "rollout.emphasis has 'push:99999999999'"),
        (f"--training.optim.lr 1{'0' * 400}", "expected a finite number"),
        (f"--policy.towers {'[' * 5000}", "expected any number of values"),
        (f"--name {'x' * 300}", "it becomes a folder below `output`"),
        ("--name ..", "it becomes a folder below `output`"),
        ("--algorithm.critic true", "Unknown setting --algorithm.critic"),
        (f"--training.freeze {','.join('a' * 1001)}", "expected at most 1000"),
        ("--placement.device cuda:²", "expected auto, cpu, cuda, or cuda:N"),
    ],
)
def test_an_absurd_value_is_refused_by_name(words, problem, capsys):
    assert cli.main(["show", "tabletop_ppo", *words.split()]) == 2
    assert problem in capsys.readouterr().err


@pytest.mark.parametrize(
    "words", ["--seed -1", "--seed 4294967296", "--num-envs 65537", "--episodes 9999999999"]
)
def test_an_evaluation_refuses_them_too(words, capsys):
    assert cli.main(["eval", "random", "--suite", "tabletop", *words.split()]) == 2
    assert "expected a" in capsys.readouterr().err


def test_a_run_file_that_is_no_text_is_named(tmp_path):
    for content in (b"\xff\xfe\0", b"[" * 100_000, json.dumps(["no run"]).encode()):
        (tmp_path / "run.json").write_bytes(content)
        with pytest.raises(RoveError):
            load.load(tmp_path / "run.json")
    load.save(Run("sound", GRPO()), tmp_path / "run.json")
    load.load(tmp_path / "run.json")
