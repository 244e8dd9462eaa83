"""The loop. Recipe in, trained policy out; every placement and every algorithm goes through here.

sync ─▶ collect ─▶ prepare (filter, mask, advantages) ─▶ update ─▶ evaluate ─▶ save ─┐
  ▲                                                                                  │
  └───────────────────────────── weights, version + 1 ◀──────────────────────────────┘
"""

from __future__ import annotations

import time
from contextlib import closing
from pathlib import Path

from rove import algorithms, checkpoint, host, rundir
from rove.config.schema import Run
from rove.config.validate import validate
from rove.errors import RoveError
from rove.evaluation import report, videos
from rove.evaluation.evaluate import episodes
from rove.interrupt import Interrupt
from rove.placement.local import LocalExecutor
from rove.placement.plan import Inventory, make_plan
from rove.policies import registry as policies
from rove.preflight import before_run
from rove.reporting.html import write_report
from rove.reporting.log import Logger
from rove.reporting.progress import Progress
from rove.reporting.summary import evaluation_metrics, rollout_metrics
from rove.training.sft import warm_up


def train(run: Run, directory: Path | None = None, resume: bool = False) -> Path:
    """Train `run` in `directory` (default: `runs/NAME`) and return it, with report.html inside.

    `resume` goes on from the newest checkpoint there; on one process its metrics equal those of a run
    that was never stopped. Raises RoveError on a configuration that cannot work, before anything is made.
    """
    validate(run)
    if run.policy.head == "l1":
        raise RoveError(
            "policy.head = 'l1' gives actions no likelihood, which RL needs: only rove sft trains it."
        )
    plan = make_plan(run, Inventory.here())
    host.prepare(plan.threads)
    directory = directory or rundir.default(run)
    if resume:
        rundir.check_same(run, directory)
    else:
        rundir.create(run, directory)
    with Logger(directory, tensorboard=run.logging.tensorboard, wandb=run.logging.wandb) as log:
        with Interrupt() as interrupt, Progress(run.name, run.training.iterations) as progress:
            progress.message(f"plan: {plan}")
            if run.policy.checkpoint is not None and (memory := policies.memory(run)):
                progress.message(memory)
            saved = checkpoint.latest(directory / "checkpoints") if resume else None
            start = saved / "policy" if saved else warm_up(run, directory, log, progress, plan.device)
            with closing(LocalExecutor(run, plan, algorithms.get(run.algorithm.kind), start)) as executor:
                for finding in before_run(executor.policy, executor.env):
                    if finding.status == "warn":
                        progress.message(f"preflight: {finding.name}: {finding.detail} → {finding.fix}")
                _loop(run, directory, saved, executor, log, progress, interrupt)
    write_report(directory)
    return directory


def _loop(
    run: Run,
    directory: Path,
    saved: Path | None,
    executor: LocalExecutor,
    log: Logger,
    progress: Progress,
    interrupt: Interrupt,
) -> None:
    algorithm = algorithms.get(run.algorithm.kind)
    first, minutes, best = 0, 0.0, -1.0
    if saved:
        first, state = checkpoint.load_trainer(saved)
        executor.load_state_dict(state["executor"])
        minutes, best = state["minutes"], state["best"]
        log.cut(first)
    else:
        _judge(run, directory, executor, "sft", progress)

    for iteration in range(first, run.training.iterations):
        began = time.perf_counter()
        executor.sync(iteration)

        rounds = []
        while algorithm.wants_more(rounds, run.algorithm, run.rollout.num_envs):
            progress.phase("collect", run.rollout.chunks)
            rounds.append(executor.collect(progress.advance))

        batch, metrics = algorithm.prepare(rounds, run.algorithm)
        progress.phase("update", executor.learner.steps(len(batch)))
        metrics |= executor.update(batch, iteration, progress.advance)

        done = iteration + 1
        if run.evaluation.every and done % run.evaluation.every == 0:
            specs = episodes(executor.env.suite, run.evaluation.episodes)
            progress.phase("evaluate", len(specs))
            judged = executor.evaluate(specs, "", {}, on_episode=lambda record: progress.advance())
            metrics |= evaluation_metrics(judged)
            if metrics["eval/success"] > best:
                best = metrics["eval/success"]
                checkpoint.save_policy(directory / "best", executor.policy)
        seconds = time.perf_counter() - began
        metrics |= rollout_metrics(rounds, executor.watch.take(), seconds)
        minutes += seconds / 60
        metrics["time/minutes"] = minutes
        log.log(done, metrics)
        progress.iteration(done, metrics)

        out_of_time = run.training.max_minutes is not None and minutes >= run.training.max_minutes
        last = done == run.training.iterations or out_of_time or interrupt.requested
        if last or done % run.logging.save_every == 0:
            state = {"executor": executor.state_dict(), "minutes": minutes, "best": best}
            checkpoint.save(directory / "checkpoints", done, executor.policy, state, run.logging.keep)
        if interrupt.requested:
            progress.message(f"Stopped after iteration {done}. Go on with: rove train --resume {directory}")
            return
        if last:
            break
    _judge(run, directory, executor, "rl", progress)


def _judge(run: Run, directory: Path, executor: LocalExecutor, name: str, progress: Progress) -> None:
    """Evaluate on held-out states, in distribution and shifted, and record a few episodes."""
    suite, config = executor.env.suite, run.evaluation
    if not config.episodes:
        return
    specs = episodes(suite, config.episodes)
    if config.variant_episodes:
        specs += episodes(suite, config.variant_episodes, variants=suite.variants)
    progress.phase(f"evaluate {name}", len(specs))
    about = rundir.about(run) | {"axes": dict(suite.variants)}
    judged = executor.evaluate(specs, name, about, on_episode=lambda record: progress.advance())
    report.save(judged, directory / "eval" / f"{name}.json")
    videos.record(executor, directory / "videos", "before" if name == "sft" else "after")
    executor.watch.take()
