"""The way of a batch, from the training loop to the loss, by definitions alone: no hop is a string, and a
type checker knows what comes back of each."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rove import algorithms, train
from rove.cluster.executor import Executor
from rove.training.learner import Learner
from rove.workers.policy import PolicyWorker

ROOT = Path(__file__).resolve().parents[2]

SPINE: list[tuple[Callable[..., Any], str, Callable[..., Any]]] = [
    (train._iterate, "executor.update(batch, ", Executor.update),
    (Executor.update, ".call(PolicyWorker.update, share, ", PolicyWorker.update),
    (PolicyWorker.update, "self.learner.train(share, ", Learner.train),
    (Learner.train, "self.accumulate(batch, ", Learner.accumulate),
    (Learner.accumulate, "self.algorithm.loss(output, micro, ", algorithms.Algorithm.loss),
]
"""(where a call is, how it begins, the definition that it leads to)."""


def calls(function: Callable[..., Any]) -> list[str]:
    """Every call in a function's body, as source on one line."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    return [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Call)]


@pytest.mark.parametrize(
    ("where", "call", "definition"), SPINE, ids=lambda value: getattr(value, "__qualname__", value)
)
def test_each_hop_is_a_call_of_the_next_definition(where, call, definition) -> None:
    found = [text for text in calls(where) if call in text]
    found = [text for text in found if not any(other != text and other in text for other in found)]
    assert len(found) == 1, (call, calls(where))
    assert f".{definition.__name__}" in call


def test_no_actor_is_called_by_a_name() -> None:
    for path in (ROOT / "src" / "rove").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.Call(func=ast.Attribute(attr="call"), args=[ast.Constant(), *_]):
                    raise AssertionError(f"{path}: {ast.unparse(node)}")


def test_no_method_is_looked_up_by_a_name_on_the_way() -> None:
    """In the rooms of the runtime nothing is found by `getattr`."""
    for path in (ROOT / "src" / "rove" / "runtime").glob("*.py"):
        names = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Name)]
        found = [node.lineno for node in names if node.id == "getattr"]
        assert path.name == "channel.py" or not found, f"{path}: line {found}"


REVEALED = """
from rove import algorithms
from rove.cluster.executor import Executor
from rove.workers.policy import PolicyWorker
from rove.workers.environment import EnvironmentWorker
from rove.runtime.actor import Actor
from rove.training.deal import Share
from rove.training.learner import Learner
from rove.types import PolicyOutput, TrainBatch

def walk(executor: Executor, actor: Actor[PolicyWorker], environments: Actor[EnvironmentWorker],
         learner: Learner, batch: TrainBatch, share: Share, output: PolicyOutput) -> None:
    reveal_type(executor.update(batch, 0, lambda: None))
    reveal_type(executor.collect(lambda: None))
    reveal_type(actor.call(PolicyWorker.update, share, 0))
    reveal_type(actor.call(PolicyWorker.update, share, 0).result())
    reveal_type(actor.call(PolicyWorker.collect, 0).result())
    reveal_type(environments.call(EnvironmentWorker.step, 0, 0).result())
    reveal_type(learner.train(share, 0))
    reveal_type(learner.algorithm)
    reveal_type(learner.algorithm.loss(
        output, batch, learner.config, denominator=1.0, value_denominator=1.0, reference=None))
"""
WRONG = """
    actor.call(PolicyWorker.update, batch, 0)
    actor.call(PolicyWorker.update, share)
    actor.call(EnvironmentWorker.step, 0, 0)
"""


def test_a_type_checker_walks_it(tmp_path: Path) -> None:
    pyright = Path(sys.executable).with_name("pyright")
    if not pyright.exists():
        pytest.skip("pyright is not installed")
    file = tmp_path / "walk.py"
    file.write_text(REVEALED + WRONG)
    settings = f'{{"extraPaths": ["{ROOT / "src"}"], "pythonVersion": "3.11", "include": ["walk.py"]}}'
    (tmp_path / "pyrightconfig.json").write_text(settings)
    command = [pyright, "--pythonpath", sys.executable, "-p", tmp_path]
    said = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    types = re.findall(r'information: Type of "(.*?)" is "(.*?)"', said, re.DOTALL)
    assert len(types) == REVEALED.count("reveal_type("), said
    for expression, revealed in types:
        assert not re.search(r"\b(Any|Unknown)\b", revealed), f"{expression}: {revealed}"
    known = dict(types)
    assert known["actor.call(PolicyWorker.update, share, 0).result()"] == "Updated"
    assert known["learner.algorithm"] == "Algorithm"
    for number, line in enumerate(file.read_text().splitlines(), 1):
        if line in WRONG.splitlines() and line:
            assert f"walk.py:{number}:" in said, f"{line.strip()} is not refused:\n{said}"
