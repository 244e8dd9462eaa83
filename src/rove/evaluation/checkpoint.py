"""Evaluate a checkpoint directory by itself, outside a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import astuple, replace
from pathlib import Path

from rove import host, rundir
from rove.config import load
from rove.config.schema import PPO, EvaluationConfig, Run
from rove.envs import registry as envs
from rove.envs.base import TaskSuite
from rove.errors import RoveError, nearest
from rove.evaluation.evaluate import episodes, evaluate
from rove.evaluation.journal import Journal
from rove.evaluation.report import save
from rove.policies import registry as policies
from rove.policies.uniform import Uniform
from rove.types import EpisodeRecord, EvalReport

RANDOM = "random"
"""In place of a checkpoint: actions drawn uniformly, in chunks of RANDOM_CHUNK."""
RANDOM_CHUNK = 8


def evaluate_checkpoint(
    path: Path,
    suite: str,
    tasks: str | None,
    variants: str,
    config: EvaluationConfig,
    *,
    seed: int,
    settings: Sequence[str] = (),
    out: Path | None = None,
    on_episode: Callable[[EpisodeRecord], None] = lambda record: None,
) -> EvalReport:
    """Run `config.episodes` held-out episodes per variant of `suite` with the policy at `path`.

    `suite` is an environment, with or without tasks: "tabletop", "libero:130". Below a run's directory it is
    set up as that run had it, `tasks` and `settings` ("--env.protocol", "published") aside; elsewhere as the
    schema's defaults and what is published for the tasks say. The policy is on a GPU where there is one, or
    where "--placement.device" says. `variants` is "none", names separated by commas, or "all" (which includes
    "none"). With `out` every episode is kept in a journal beside that file, from which the same evaluation
    goes on after a stop. Raises RoveError on an unknown suite, task set, variant or setting.
    """
    kind, _, named = suite.partition(":")
    run = _configured(_run_of(path), kind, tasks or named or None, settings)
    env_config, device = run.env, host.device(run.placement.device)
    policy = None if str(path) == RANDOM else policies.load(path, device=device)
    chunk = RANDOM_CHUNK if policy is None else policy.chunk
    env = envs.make(env_config, num_envs=config.num_envs, chunk=chunk, autoreset="refill")
    with closing(env):
        policy = policy or Uniform(env.action_spec, chunk)
        specs = episodes(env.suite, config.episodes, variants=_variants(env.suite, variants))
        # Task by task, so that few scenes have to be in memory at once.
        order = {task: i for i, task in enumerate(env.suite.tasks)}
        specs.sort(key=lambda spec: order[spec.task])
        about = {
            "axes": dict(env.suite.variants),
            "seed": seed,
            "env": load.to_dict(env_config),
            "chunk": chunk,
            "versions": rundir.versions(),
        }
        if published := getattr(env.suite, "published", None):
            about["published"] = published
        listed = [astuple(spec) for spec in specs]
        decides = {**about, "policy": str(path), "decoding": config.decoding, "episodes": listed}
        journal = Journal(out, decides) if out else None

        def keep(record: EpisodeRecord) -> None:
            if journal:
                journal.add(record)
            on_episode(record)

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
        diverged = getattr(env, "diverged", 0)
    report.about["diverged"] = diverged
    if journal and out:
        save(report, out)
        journal.close()
    return report


def _run_of(path: Path) -> Run | None:
    """The run whose directory `path` lies in."""
    files = (folder / "run.json" for folder in path.resolve().parents)
    file = next((file for file in files if file.is_file()), None)
    return load.load(file) if file else None


def _configured(run: Run | None, kind: str, tasks: str | None, settings: Sequence[str]) -> Run:
    """A run that holds the environment of an evaluation, and where its policy is placed."""
    trained_here = run is not None and run.env.kind == kind
    if run is not None and trained_here:
        config = run.env if tasks is None else replace(run.env, tasks=tasks)
    else:
        given = {} if tasks is None else {"tasks": tasks}
        config = load.section("env", {"kind": kind, **given, **envs.published(kind, tasks)})
    known = ("--env.", "--placement.device")
    if wrong := [word for word in settings if word.startswith("--") and not word.startswith(known)]:
        raise RoveError(
            f"{wrong[0]} is no setting of an evaluation, only --env.* and --placement.device are."
        )
    return load.apply(Run("evaluation", PPO(), env=config), settings)


def _variants(suite: TaskSuite, names: str) -> tuple[str, ...]:
    known = ("none", *suite.variants)
    if names == "all":
        return known
    chosen = tuple(names.split(","))
    if unknown := [name for name in chosen if name not in known]:
        raise RoveError(f"Unknown variant {unknown[0]!r} of {suite.name!r}. {nearest(unknown[0], known)}")
    return chosen
