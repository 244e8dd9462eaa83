"""Before a policy meets a suite: every silent mismatch that is known to cost success, as a table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from rove import host
from rove.config.schema import Run
from rove.envs import conventions
from rove.envs.base import TaskSuite
from rove.errors import RoveError
from rove.findings import Finding, table
from rove.policies import registry as policies
from rove.types import ActionSpec, Conventions, EpisodeSpec


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

    Raises RoveError where the run's policy cannot do what is asked of it, or RL cannot train it.
    """
    policies.check(run)
    if run.policy.head == "l1":
        raise RoveError(
            "policy.head = 'l1' gives actions no likelihood, which RL needs: only rove sft trains it."
        )
    return (policies.memory(run) or "") if run.policy.checkpoint is not None else ""


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
    return replace(known, action_spec=action_spec, instructions=_instructions(suite))


def _instructions(suite: TaskSuite, count: int = 16) -> tuple[str, ...]:
    """Instructions of the first tasks."""
    tasks = suite.tasks[:count]
    return tuple(suite.instruction(EpisodeSpec(t, suite.initial_states(t, "train")[0])) for t in tasks)
