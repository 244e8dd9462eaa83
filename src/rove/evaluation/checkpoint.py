"""Evaluation of a checkpoint directory by itself, outside a run."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import astuple, replace
from functools import partial, reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rove import checkpoint, host, rundir
from rove.config import load
from rove.config.schema import PPO, EvaluationConfig, Run
from rove.envs import registry as envs
from rove.envs.base import TaskSuite
from rove.errors import RoveError, nearest
from rove.evaluation.evaluate import episodes, evaluate, make_env
from rove.evaluation.journal import Journal
from rove.evaluation.report import save
from rove.policies import registry as policies
from rove.policies.base import ActingPolicy, Policy
from rove.policies.uniform import Uniform
from rove.preflight import before_run, can_write
from rove.runtime.guard import guarded
from rove.serving import installed, is_remote
from rove.types import ActionSpec, EpisodeRecord, EvalReport

if TYPE_CHECKING:
    from rove.serving.remote import RemotePolicy

RANDOM = "random"
"""The name that stands for a random policy: uniform actions, by default in chunks of RANDOM_CHUNK."""
RANDOM_CHUNK = 8
SETTINGS = ("--env.", "--policy.", "--placement.device", "--placement.deadline")
"""Beginnings of the settings of a run that an evaluation takes too."""


def evaluate_checkpoint(
    path: Path | str,
    suite: str,
    tasks: str | None,
    variants: str,
    config: EvaluationConfig,
    *,
    seed: int,
    settings: Sequence[str] = (),
    execute: int | None = None,
    out: Path | None = None,
    on_begin: Callable[[int], None] = lambda count: None,
    on_episode: Callable[[EpisodeRecord], None] = lambda record: None,
    say: Callable[[str], None] = lambda text: None,
) -> EvalReport:
    """Run `config.episodes` held-out episodes per variant of `suite` with the policy at `path`.

    `suite` is an environment, with or without tasks: "tabletop", "libero:130". Below a run's directory suite
    and policy are set up as that run had them, except for `tasks` and `settings` ("--env.protocol",
    "published", "--policy.dtype", "bfloat16"); elsewhere by the schema's defaults, by the published settings
    of the tasks and by the checkpoint. The policy is on a GPU where there is one, or where
    "--placement.device" says; an environment that hangs ends the process after "--placement.deadline".
    `path` may also be the address of a served policy, "ws://HOST:PORT", of which `execute` actions an answer
    are executed, and whose key is in the environment variable ROVE_API_KEY.
    `variants` is "none", names separated by commas, or "all" (which includes "none"). With `out` every
    episode is kept in a journal beside that file, from which the same evaluation goes on after a stop.
    `on_begin` is called with the number of episodes to run, `say` with the warnings of the policy's preflight
    check of the suite. Raises RoveError before the first episode on an unknown suite, task set, variant or
    setting, and where the policy does not fit the suite.
    """
    if out is not None:
        can_write(out, "--out")
    kind, _, named = suite.partition(":")
    trained = run_of(path)
    run = configured(trained, kind, tasks or named or None, settings)
    run = replace(run, seed=seed, evaluation=config)
    # What can be wrong is found out before a large policy is loaded.
    if not is_remote(path):
        checkpoint.refuse_damaged(Path(path))
    listed = envs.suite(run.env)
    specs = episodes(listed, config.episodes, variants=_variants(listed, variants))
    with ExitStack() as stack:
        if is_remote(path):
            served = stack.enter_context(closing(_served(str(path), config.num_envs, execute)))
            chunk, placed = served.chunk, served.placed
        else:
            chunk, placed = policy_of(Path(path), run, trained is not None, settings, execute)
        stack.enter_context(guarded(run.placement.deadline))
        env = stack.enter_context(closing(make_env(run, chunk=chunk)))
        policy = placed(env.action_spec)
        if isinstance(policy, Policy):
            ask = partial(policy.preflight, rl=False)
            say(before_run(ask, env.suite, env.action_spec))
        # Task by task, so that few scenes have to be in memory at once.
        order = {task: i for i, task in enumerate(env.suite.tasks)}
        specs.sort(key=lambda spec: order[spec.task])
        about: dict[str, Any] = {
            "axes": dict(env.suite.variants),
            "seed": seed,
            "env": load.to_dict(run.env),
            "chunk": chunk,
            "versions": rundir.versions(),
        }
        if env.suite.published_success:
            about["published"] = {name: dict(rows) for name, rows in env.suite.published_success.items()}
        own = {word: value for word, value in load.leaves(run.policy, "policy.") if trained}
        decides = {
            **about,
            "policy": str(path),
            "settings": own or list(settings),
            "decoding": config.decoding,
            "episodes": [astuple(spec) for spec in specs],
        }
        journal = Journal(out, decides) if out else None

        def keep(record: EpisodeRecord) -> None:
            if journal:
                journal.add(record)
            on_episode(record)

        on_begin(len(specs) - (len(journal.done) if journal else 0))
        report = evaluate(
            env,
            policy,
            specs,
            decoding=config.decoding,
            seed=seed,
            name=str(path),
            about=about,
            on_episode=keep,
            done=journal.done if journal else (),
        )
    if journal and out:
        save(report, out)
        journal.close()
    return report


def run_of(path: Path | str) -> Run | None:
    """Read the run whose directory `path` lies in; None where it lies in none."""
    if is_remote(path):
        return None
    files = (folder / "run.json" for folder in Path(path).resolve().parents)
    file = next((file for file in files if file.is_file()), None)
    return load.load(file) if file else None


def configured(run: Run | None, kind: str, tasks: str | None, settings: Sequence[str]) -> Run:
    """Return the run to evaluate as: `run`, or a new one, with environment and settings replaced."""
    if wrong := [word for word in settings if word.startswith("--") and not word.startswith(SETTINGS)]:
        raise RoveError(
            f"{wrong[0]} is no setting of an evaluation: only --env.*, --policy.*, --placement.device and "
            "--placement.deadline are."
        )
    if run is not None and run.env.kind == kind:
        config = run.env if tasks is None else replace(run.env, tasks=tasks)
    else:
        config = envs.configure(kind, tasks)
    run = Run("evaluation", PPO(), env=config) if run is None else replace(run, env=config)
    # Where the run was trained says nothing of this machine.
    return load.apply(replace(run, placement=replace(run.placement, device="auto")), settings)


def policy_of(
    path: Path, run: Run, trained: bool, settings: Sequence[str], execute: int | None = None
) -> tuple[int, Callable[[ActionSpec], ActingPolicy]]:
    """Return the policy's chunk C, and a function that builds the policy for an action spec.

    A run's checkpoint is read with the run's settings, any other as it was saved, except for `settings`
    ("--policy."), and for `execute`: how many of more predicted actions are executed.
    """
    if str(path) == RANDOM:
        drawn = execute or RANDOM_CHUNK
        return drawn, lambda spec: Uniform(spec, drawn)
    device = host.device(run.placement.device)
    if trained:
        chunk = execute or run.rollout.chunk
        return chunk, lambda spec: _executing(policies.restore(run, path, spec, device), execute)
    policy = _executing(policies.load(path, device=device, **_asked(run, settings)), execute)
    return policy.chunk, lambda spec: policy


def _executing(policy: Policy, execute: int | None) -> Policy:
    """Have `execute` of the predicted actions executed before the policy looks again, where that is asked.

    Raises RoveError where there are not so many, or where the policy's actions are executed as predicted.
    """
    if execute is None or execute == policy.chunk:
        return policy
    if type(policy).horizon is Policy.horizon:
        raise RoveError(
            f"--execute {execute}: all {policy.chunk} actions that this policy predicts are executed."
        )
    if execute > policy.horizon:
        raise RoveError(f"--execute {execute}: the policy predicts {policy.horizon}: set at most that.")
    policy.chunk = execute
    return policy


def _served(uri: str, connections: int, execute: int | None) -> RemotePolicy:
    with installed():
        from rove.serving.remote import RemotePolicy

    key = os.environ.get("ROVE_API_KEY")
    return RemotePolicy(uri, connections=connections, execute=execute, api_key=key)


def _asked(run: Run, settings: Sequence[str]) -> dict[str, Any]:
    """Return the "--policy." settings as keyword arguments of a policy's `from_pretrained`."""
    words = [word.partition("=")[0] for word in settings]
    names = [word.removeprefix("--policy.") for word in words if word.startswith("--policy.")]
    known = ("unnorm_key", "center_crop", "dtype", "decoding", "attention", "temperature", "head")
    known += ("flow.resizer", "flow.prompt", "flow.delta", "flow.sampling.steps", "flow.sampling.start")
    if wrong := [name for name in names if name not in known]:
        raise RoveError(
            f"--policy.{wrong[0]} is decided by the checkpoint; an evaluation can set "
            f"{', '.join(f'--policy.{name}' for name in known)}."
        )
    asked: dict[str, Any] = {}
    for *sections, name in (name.split(".") for name in names):
        value = getattr(reduce(getattr, sections, run.policy), name)
        if "sampling" in sections:
            asked.setdefault("sampling", {})[name] = value
        else:
            asked[name] = value
    return asked


def _variants(suite: TaskSuite, names: str) -> tuple[str, ...]:
    known = ("none", *suite.variants)
    if names == "all":
        return known
    chosen = tuple(names.split(","))
    if unknown := [name for name in chosen if name not in known]:
        raise RoveError(f"Unknown variant {unknown[0]!r} of {suite.name!r}. {nearest(unknown[0], known)}")
    return chosen
