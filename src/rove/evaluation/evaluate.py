"""Evaluation of a policy: a list of held-out episodes is run to its end and becomes an `EvalReport`.

A run judges its policy here before, during and after training, and `rove eval` does so here too.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence

import torch

from rove.config.schema import EvaluationConfig, Run
from rove.envs import registry as envs
from rove.envs.answers import Checked
from rove.envs.base import Diverging, TaskSuite, VectorEnv
from rove.errors import RoveError
from rove.policies.base import ActingPolicy
from rove.rollout.collect import act_rows, running, scatter
from rove.runtime.pulse import headway
from rove.types import EpisodeRecord, EpisodeSpec, EvalReport, Mode, Split


def episodes(
    suite: TaskSuite, count: int, *, variants: Iterable[str] = ("none",), split: Split = "held_out"
) -> list[EpisodeSpec]:
    """List `count` episodes per variant, spread evenly over the tasks, on the first states of the split.

    The same arguments give the same list everywhere. Raises RoveError when the split has too few states.
    """
    variants = tuple(variants)
    if variants and count > (most := capacity(suite, split)):
        raise RoveError(
            f"{count} episodes were asked for, and {suite.name!r} has {split} states for {most}: ask for at "
            f"most {most}."
        )
    chosen = []
    for variant in variants:
        for number in range(count):
            lap, place = divmod(number, len(suite.tasks))
            task = suite.tasks[place]
            state = suite.initial_states(task, split)[lap]
            chosen.append(EpisodeSpec(task, state, variant, seed=number))
    return chosen


def capacity(suite: TaskSuite, split: Split = "held_out") -> int:
    """Return the largest number of episodes that `episodes` can list: the first task that has no state left
    ends the list."""
    counts = [len(suite.initial_states(task, split)) for task in suite.tasks]
    return min(count * len(counts) + place for place, count in enumerate(counts))


def held_out(suite: TaskSuite, config: EvaluationConfig) -> list[EpisodeSpec]:
    """List the episodes that a run is judged by before and after training, in distribution and shifted.

    Raises RoveError, naming the setting, where the suite has too few states.
    """
    chosen = []
    for setting, variants in (("episodes", ("none",)), ("variant_episodes", tuple(suite.variants))):
        try:
            chosen += episodes(suite, getattr(config, setting), variants=variants)
        except RoveError as error:
            raise RoveError(f"evaluation.{setting}: {error}") from error
    return chosen


def make_env(run: Run, *, chunk: int, gpu: int | None = None) -> VectorEnv:
    """Make the environment in which the run's policy is evaluated, in chunks of `chunk` actions.

    `gpu` is the CUDA index of the device that simulates or renders, where the suite uses one.
    """
    return envs.make(run.env, num_envs=run.evaluation.num_envs, chunk=chunk, autoreset="refill", gpu=gpu)


def evaluate(
    env: VectorEnv,
    policy: ActingPolicy,
    specs: Sequence[EpisodeSpec],
    *,
    decoding: Mode = "greedy",
    seed: int = 0,
    split: Split = "held_out",
    name: str = "",
    about: dict | None = None,
    on_episode: Callable[[EpisodeRecord], None] = lambda record: None,
    on_frames: Callable[[EpisodeSpec, torch.Tensor], None] | None = None,
    done: Iterable[EpisodeRecord] = (),
) -> EvalReport:
    """Run every episode of `specs` once, in a refill environment. Records come back in the order of `specs`.

    Episodes that are `done` already are not run again. With `on_frames(episode, frames)` every action is
    rendered, uint8 [n, H, W, 3], and handed over by chunk. `EvalReport.about` is `about` and, under
    "diverged", the number of episodes that ended because their simulation did.
    """
    if env.autoreset != "refill":
        raise RoveError("Evaluation walks a list: make the environment with autoreset='refill'.")
    began, diverged = time.perf_counter(), _diverged(env)
    records: dict[EpisodeSpec, EpisodeRecord] = {record.spec: record for record in done}
    waiting = [spec for spec in specs if spec not in records]
    first = min(env.num_envs, len(waiting))
    env.finals = "none"
    env.record(range(env.num_envs) if on_frames is not None else ())
    calls = Checked(env)
    observation = calls.reset(waiting[:first])
    env.enqueue(waiting[first:])
    while len(rows := running(env)):
        headway()
        chunk = act_rows(policy, env, observation, rows, decoding, seed)
        acting = env.specs
        result = calls.step_chunk(scatter(chunk.actions, rows, env))
        observation = result.observation
        for record in result.finished:
            records[record.spec] = record
            on_episode(record)
        if on_frames is not None:
            for slot, frames in result.frames.items():
                spec = acting[slot]
                assert spec is not None
                on_frames(spec, frames)
    return EvalReport(
        suite=env.suite.name,
        split=split,
        decoding=decoding,
        records=tuple(records[spec] for spec in specs),
        seconds=time.perf_counter() - began,
        policy=name,
        about={**(about or {}), "diverged": _diverged(env) - diverged},
    )


def _diverged(env: VectorEnv) -> int:
    return env.diverged if isinstance(env, Diverging) else 0
