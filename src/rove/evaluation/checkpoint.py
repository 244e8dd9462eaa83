"""Evaluate a checkpoint directory by itself, outside a run."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from rove.config import load
from rove.config.schema import PPO, EnvConfig, EvaluationConfig, Run
from rove.envs import registry as envs
from rove.envs.base import TaskSuite
from rove.errors import RoveError, nearest
from rove.evaluation.evaluate import episodes, evaluate
from rove.policies import registry as policies
from rove.types import EvalReport


def evaluate_checkpoint(
    path: Path,
    suite: str,
    tasks: str | None,
    variants: str,
    config: EvaluationConfig,
    settings: Sequence[str] = (),
    *,
    seed: int,
) -> EvalReport:
    """Run `config.episodes` held-out episodes per variant of `suite` with the policy at `path`.

    `suite` may name tasks too, "maniskill:PickCube-v1". `settings` are those of the environment, as on the
    command line: `--env.terminate false`.

    Below a run's directory the suite is set up as that run had it, `tasks` aside; elsewhere as the schema's
    defaults say. `variants` is "none", names separated by commas, or "all" (which includes
    "none"). Raises RoveError on an unknown suite, task set or variant.
    """
    policy = policies.load(path)
    suite, _, named = suite.partition(":")
    env = envs.make(
        _with(_env_config(_run_of(path), suite, tasks or named or None), settings),
        num_envs=config.num_envs,
        chunk=policy.chunk,
        autoreset="refill",
    )
    with closing(env):
        specs = episodes(env.suite, config.episodes, variants=_variants(env.suite, variants))
        about = {"axes": dict(env.suite.variants)}
        if published := getattr(env.suite, "published", None):
            about["published"] = published
        return evaluate(env, policy, specs, decoding=config.decoding, seed=seed, name=str(path), about=about)


def _run_of(path: Path) -> Run | None:
    """The run whose directory `path` lies in."""
    files = (folder / "run.json" for folder in path.resolve().parents)
    file = next((file for file in files if file.is_file()), None)
    return load.load(file) if file else None


def _env_config(run: Run | None, suite: str, tasks: str | None) -> EnvConfig:
    trained_here = run is not None and run.env.kind == suite
    config = run.env if run is not None and trained_here else load.section("env", {"kind": suite})
    return config if tasks is None else replace(config, tasks=tasks)


def _with(config: EnvConfig, settings: Sequence[str]) -> EnvConfig:
    """The configuration with `--env.key value` applied. Raises RoveError on a setting of anything else."""
    if bad := [word for word in settings if word.startswith("--") and not word.startswith("--env.")]:
        raise RoveError(
            f"{bad[0]} is not read here: an evaluation takes settings of its environment, --env.*."
        )
    return load.apply(Run(name="evaluation", algorithm=PPO(), env=config), settings).env


def _variants(suite: TaskSuite, names: str) -> tuple[str, ...]:
    known = ("none", *suite.variants)
    if names == "all":
        return known
    chosen = tuple(names.split(","))
    if unknown := [name for name in chosen if name not in known]:
        raise RoveError(f"Unknown variant {unknown[0]!r} of {suite.name!r}. {nearest(unknown[0], known)}")
    return chosen
