"""Before a policy meets a suite: every silent mismatch that is known to cost success, as a table."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from rove import host
from rove.config.schema import Run
from rove.envs import conventions
from rove.envs import registry as envs
from rove.envs.base import TaskSuite
from rove.errors import RoveError
from rove.findings import Finding, table
from rove.policies import registry as policies
from rove.runtime import memory
from rove.training.brought import refuse_other_actions
from rove.training.demonstrations import described
from rove.types import ActionSpec, Conventions, EpisodeSpec, Split


def of_checkpoint(path: Path | str, suite: str, options: Mapping[str, str | None]) -> list[Finding]:
    """Check a checkpoint against a suite by name, without its simulator.

    `options` are words of the command line for settings of `from_pretrained`; None: as saved.
    """
    wanted = conventions.of(suite)
    settings: dict[str, Any] = {name: word for name, word in options.items() if word is not None}
    if "center_crop" in settings:
        settings["center_crop"] = settings["center_crop"] == "true"
    return policies.load(path, device=host.device("auto"), **settings).preflight(wanted, rl=False)


def before_loading(run: Run) -> str:
    """Check a run before anything is loaded; return what its user wants to know of it, or "".

    Raises RoveError where the run's policy cannot do what is asked of it, RL cannot train it, the suite's
    instructions have words that it does not list, or the demonstrations are another suite's.
    """
    policies.check(run)
    check_words(run)
    check_data(run)
    if run.policy.head == "l1":
        raise RoveError(
            "policy.head = 'l1' gives actions no likelihood, which RL needs: only rove sft trains it."
        )
    return (policies.memory(run) or "") if run.policy.checkpoint is not None else ""


def room(run: Run, directory: Path) -> None:
    """Raise RoveError where the run certainly has too little memory for a rollout, or too little disk for its
    checkpoints below `directory`. Counts the least that it can be; what else is needed is not known yet."""
    if run.placement.executor == "local":
        side, frames = run.env.image_size, (run.rollout.chunks + 1) * run.rollout.num_envs
        memory.require(3 * side * side * frames, f"A rollout in {run.rollout.num_envs} environments")
    try:
        work = policies.work(run)
    except RoveError:  # a policy of one's own need not say
        return
    # A new checkpoint is whole before the oldest of those that are kept goes. Beside adapters the weights
    # may be left out, and Adam has two moments of what is trained.
    weights = work.published if run.policy.lora else work.weights
    moments = 0 if run.training.freeze else 2 * work.published
    needed = (run.logging.keep + 1) * (weights + moments)
    there = next(
        folder for folder in (directory.absolute(), *directory.absolute().parents) if folder.is_dir()
    )
    free = shutil.disk_usage(there).free
    if needed > free:
        raise RoveError(
            f"logging.keep = {run.logging.keep} checkpoints of this run need {needed / 2**30:.1f} GiB, and "
            f"{free / 2**30:.1f} GiB are free at {there}: choose another --output, or lower --logging.keep."
        )


def can_write(file: Path, option: str) -> None:
    """Raise RoveError, naming the command's option, where `file` could not be written when it is time."""
    if file.is_dir():
        raise RoveError(f"{option} {file} is a directory: name a file, such as {file / 'result.json'}.")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=file.parent):
            pass
        if file.exists():
            file.open("a").close()
    except OSError as error:
        raise RoveError(f"{option} {file} cannot be written: {error.strerror}. Name another file.") from error


def check_words(run: Run) -> None:
    """Raise RoveError where a policy from scratch could not read every word of the suite's instructions."""
    if run.policy.checkpoint is not None:
        return
    suite = envs.suite(run.env)
    word = policies.unknown_word(run, suite.vocabulary, _instructions(suite))
    if word is not None:
        raise RoveError(
            f"The vocabulary of {suite.name} lacks {word!r}, which its instructions have, and a policy from "
            "scratch could not read it: add the word to the suite's vocabulary."
        )


def check_data(run: Run) -> None:
    """Raise RoveError where the demonstrations that a run is to learn from were recorded in another
    convention than its suite's, or have words that a policy from scratch could not read."""
    if run.sft is None or run.sft.data is None:
        return
    path, suite = Path(run.sft.data), envs.suite(run.env)
    made, instructions, _ = described(path)
    if (known := conventions.find(suite.name)) is not None:
        refuse_other_actions(path, made, known.action_spec, suite.name)
    word = policies.unknown_word(run, suite.vocabulary, instructions)
    if run.policy.checkpoint is None and word is not None:
        raise RoveError(
            f"The vocabulary of {suite.name} lacks {word!r}, which the instructions in {path} have, and a "
            "policy from scratch could not read it: start from a checkpoint (--policy.checkpoint), or "
            "rename the tasks."
        )


def before_run(ask: Callable[[Conventions], list[Finding]], suite: TaskSuite, action_spec: ActionSpec) -> str:
    """Check a policy against the environments that it is about to act in: the warnings, a line each, or "".

    `ask` has the policy examine itself, wherever it is. Raises RoveError where a check fails.
    """
    findings = ask(_conventions_of(suite, action_spec))
    if any(finding.status == "fail" for finding in findings):
        raise RoveError(f"The policy does not fit {suite.name}:\n{table(findings)}")
    warned = (finding for finding in findings if finding.status == "warn")
    return "\n".join(f"preflight: {finding.name}: {finding.detail} → {finding.fix}" for finding in warned)


def _conventions_of(suite: TaskSuite, action_spec: ActionSpec) -> Conventions:
    """Return the conventions on record for the suite, with its environments' own actions and its own
    instructions."""
    known = conventions.find(suite.name)
    if known is None:
        known = Conventions(suite.name, action_spec, (), (), (), state=None)
    return replace(known, action_spec=action_spec, instructions=_instructions(suite), complete=True)


def _instructions(suite: TaskSuite, states: int = 4) -> tuple[str, ...]:
    """Return the instructions of every task in its first initial states, by which some suites phrase them."""
    splits: tuple[Split, ...] = ("train", "held_out")
    episodes = (
        EpisodeSpec(task, state)
        for task in suite.tasks
        for split in splits
        for state in suite.initial_states(task, split)[:states]
    )
    return tuple(dict.fromkeys(map(suite.instruction, episodes)))
