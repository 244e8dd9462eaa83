"""The loop. Recipe in, trained policy out; every placement and every algorithm goes through here.

sync ─▶ collect ─▶ prepare (filter, mask, advantages) ─▶ update ─▶ evaluate ─▶ save ─┐
  ▲                                                                                  │
  └───────────────────────────── weights, version + 1 ◀──────────────────────────────┘
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from rove import algorithms, checkpoint, host, rundir
from rove.cluster import execute, inventory_of, settle
from rove.cluster.executor import Executor
from rove.config import load
from rove.config.needs import needs, optimizer_steps
from rove.config.schema import Run, TrainingConfig
from rove.config.validate import validate
from rove.envs import registry as envs
from rove.evaluation import report
from rove.evaluation.evaluate import capacity, episodes, held_out
from rove.evaluation.trend import Trend
from rove.interrupt import Interrupt
from rove.placement.plan import make_plan
from rove.preflight import before_loading, before_run, room
from rove.reporting import video
from rove.reporting.html import write_report
from rove.reporting.log import Logger
from rove.reporting.progress import Progress
from rove.reporting.summary import evaluation_metrics, rollout_metrics
from rove.runtime.guard import guarded
from rove.timing import write_trace
from rove.training.sft import warm_up
from rove.types import EpisodeRecord

_RECORDED = 8
"""Episodes that are recorded on video before and after RL, where there are so many."""


def train(run: Run, directory: Path | None = None, resume: bool = False, profile: bool = False) -> Path:
    """Train `run` in `directory` (default: `runs/NAME`) and return it, with report.html inside.

    `resume` goes on from the newest checkpoint there; on one process its metrics equal those of a run
    that was never stopped. `profile` writes trace.json, a timeline of who did what when. Raises RoveError on
    a configuration that cannot work, before anything is made, and `Interrupted` after a SIGINT or SIGTERM, at
    which the run is saved.
    """
    validate(run)
    note = "" if resume else before_loading(run)
    inventory = inventory_of(run)
    first_plan = make_plan(run, inventory)
    host.prepare(first_plan.threads)
    directory = directory or rundir.default(run)
    if run.evaluation.episodes:
        held_out(envs.suite(run.env), run.evaluation)
    if not resume:
        room(run, directory)
    with (
        guarded(run.placement.deadline),
        Interrupt() as interrupt,
        rundir.claim(directory),
        Progress(run.name, run.training.iterations) as progress,
    ):
        saved = rundir.begin(run, directory, resume, progress.message)
        if resume:
            note = before_loading(run if saved is None else _from(run, saved / "policy"))
        progress.message(note)
        with Logger(directory, tensorboard=run.logging.tensorboard, wandb=run.logging.wandb) as log:
            if saved:
                start = saved / "policy"
            else:
                start = warm_up(run, directory, log, progress, first_plan.device, interrupt)
            placed = settle(run, inventory, directory, start)
            plan = make_plan(placed, inventory)
            progress.message(f"plan: {plan}")
            host.release()
            progress.phase("start", 1)
            with closing(execute(placed, plan, start, profile)) as executor:
                progress.message(before_run(executor.preflight, executor.suite, executor.action_spec))
                progress.advance()
                _loop(run, directory, saved, executor, log, progress, interrupt)
                if profile:
                    write_trace(directory / "trace.json", executor.watch.take_spans())
        write_report(directory)
        interrupt.check()
    return directory


def _from(run: Run, policy: Path) -> Run:
    """The run as it goes on from a policy of its own: what it once started from may be gone."""
    return replace(run, policy=replace(run.policy, checkpoint=str(policy)))


def _loop(
    run: Run,
    directory: Path,
    saved: Path | None,
    executor: Executor,
    log: Logger,
    progress: Progress,
    interrupt: Interrupt,
) -> None:
    first, spent, best, trend = 0, Spent(), Best(), Trend()
    if saved:
        first, state = checkpoint.load_trainer(saved)
        executor.load_state_dict(state["executor"])
        spent, best = Spent(state["minutes"], state.get("steps", 0)), Best(**state["best"])
        trend = Trend(**state.get("trend", {}))
        log.cut(first)
    else:
        # Of a run that starts again in place only the warm-up's lines count.
        log.keep(lambda line: "sft_step" in line)
        _evaluate(run, directory, executor, "before", progress)
    with interrupt.patient("this iteration"):
        _iterate(run, directory, first, spent, best, trend, executor, log, progress, interrupt)
    if not interrupt.requested:
        _evaluate(run, directory, executor, "after", progress)


def _iterate(
    run: Run,
    directory: Path,
    first: int,
    spent: Spent,
    best: Best,
    trend: Trend,
    executor: Executor,
    log: Logger,
    progress: Progress,
    interrupt: Interrupt,
) -> None:
    algorithm = algorithms.get(run.algorithm.kind)
    settings = load.to_dict(rundir.settled(run))
    began = time.perf_counter()
    for iteration in range(first, run.training.iterations):
        executor.sync(iteration)

        rounds = []
        while algorithm.wants_more(rounds, run.algorithm, run.rollout.num_envs):
            progress.phase("collect", run.rollout.chunks)
            rounds.append(executor.collect(progress.advance))
            best.count(rounds[-1].finished)
            if fallen := trend.count(rounds[-1].finished):
                progress.message(fallen)

        batch, metrics = algorithm.prepare(rounds, run.algorithm)
        progress.phase("update", optimizer_steps(run, len(batch)))
        metrics |= executor.update(batch, iteration, progress.advance)

        done = iteration + 1
        # An iteration of which every step was skipped leaves weights that may be ruined: they replace none.
        healthy = not metrics["train/steps"] or metrics["train/skipped_steps"] < metrics["train/steps"]
        if run.evaluation.every and done % run.evaluation.every == 0:
            specs = episodes(executor.suite, run.evaluation.episodes)
            progress.phase("evaluate", len(specs))
            judged = executor.evaluate(specs, "", {}, on_episode=lambda record: progress.advance())
            metrics |= evaluation_metrics(judged)
            if healthy and best.beaten():
                with executor.watch("checkpoint"):
                    checkpoint.write_atomically(directory / "best", executor.save_policy)
        # Nothing is left out of the run's time: an iteration ends, and the next begins, here.
        ended = time.perf_counter()
        seconds, began = ended - began, ended
        trained = len(batch) * needs(run.algorithm).epochs
        metrics |= rollout_metrics(rounds, trained, executor.watch.take(), seconds)
        for fault in (faults := executor.take_faults()):
            progress.message(f"A worker was replaced, and its episodes are run again: {fault}")
        metrics["rollout/restarts"] = len(faults)
        spent.minutes += seconds / 60
        spent.steps += int(metrics["rollout/simulated_steps"])
        metrics["time/minutes"] = spent.minutes
        log.log(done, metrics)
        progress.iteration(done, metrics)

        last = done == run.training.iterations or spent.all_of(run.training) or interrupt.requested
        if not healthy:
            progress.message(f"Every optimizer step of iteration {done} was skipped: nothing is saved.")
        elif last or done % run.logging.save_every == 0:
            state = {
                "executor": executor.state_dict(),
                "best": asdict(best),
                "trend": asdict(trend),
                **asdict(spent),
            }
            with executor.watch("checkpoint"):
                checkpoint.save(
                    directory / "checkpoints",
                    done,
                    executor.save_policy,
                    state,
                    run.logging.keep,
                    settings,
                )
        if interrupt.requested:
            progress.message(f"Stopped after iteration {done}. Go on with: rove train --resume {directory}")
        if last:
            return


@dataclass
class Spent:
    """What a run has spent so far."""

    minutes: float = 0.0
    steps: int = 0
    """Simulated actions."""

    def all_of(self, limits: TrainingConfig) -> bool:
        """Whether that is as much as it may spend, of either."""
        minutes, steps = limits.max_minutes, limits.max_simulated_steps
        return (minutes is not None and self.minutes >= minutes) or (
            steps is not None and self.steps >= steps
        )


@dataclass
class Best:
    """What `best/` is chosen by: success in the rollouts since the last evaluation, on train states.

    The held-out episodes of an evaluation are reported, so that nothing may be chosen on them.
    """

    rate: float = -1.0
    """Of the policy that is kept."""
    successes: int = 0
    """Since the last evaluation."""
    episodes: int = 0

    def count(self, finished: Sequence[EpisodeRecord]) -> None:
        """Count a rollout's episodes."""
        self.successes += sum(record.success for record in finished)
        self.episodes += len(finished)

    def beaten(self) -> bool:
        """Whether success since the last call is higher than ever before; counting begins anew."""
        rate = self.successes / self.episodes if self.episodes else -1.0
        self.successes = self.episodes = 0
        if rate <= self.rate:
            return False
        self.rate = rate
        return True


def _evaluate(
    run: Run, directory: Path, executor: Executor, name: Literal["before", "after"], progress: Progress
) -> None:
    """Evaluate on held-out states, in distribution and shifted, and record a few episodes."""
    suite, config = executor.suite, run.evaluation
    if not config.episodes:
        return
    specs = held_out(suite, config)
    progress.phase(f"evaluate {name} RL", len(specs))
    about = rundir.about(run) | {"axes": dict(suite.variants)}
    judged = executor.evaluate(specs, name, about, on_episode=lambda record: progress.advance())
    report.save(judged, directory / "eval" / f"{name}.json")
    recorded = episodes(suite, min(_RECORDED, capacity(suite)))
    video.record(executor, recorded, directory / "videos", name)
    executor.watch.take()


class _Callable(ModuleType):
    """`rove.train(run)` is this module's function, also where the module has the name already."""

    def __call__(self, *args: Any, **options: Any) -> Path:
        return train(*args, **options)


sys.modules[__name__].__class__ = _Callable
