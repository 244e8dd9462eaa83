"""Studies carried out: arms × seeds as child processes of `rove train`, resumable, and the page about them.

    study ─▶ tasks: a warm-up a seed, then a run an arm and seed ─▶ children ─▶ page, after each that ends

    FOLDER/warm-ups/RECIPE-HASH/seed_1/      policies that runs begin with
    FOLDER/runs/RECIPE-HASH/seed_1/          a run's directory, see `rundir.py`; beside it what it printed
    FOLDER/NAME/                             study.html, study.md, study.svg, study.json, .lock

What is done is read from these directories alone, so the same command goes on wherever it was stopped. A hash
is of all settings: what two studies ask alike is run once for both, and what has changed is run anew.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from rove import checkpoint, host, recipes, rundir, studies
from rove.config import load
from rove.config.schema import Run
from rove.config.validate import validate
from rove.errors import RoveError
from rove.evaluation import comparison
from rove.interrupt import Interrupt
from rove.reporting.study import Place, describe, write
from rove.studies import Arm, Question, Study

FOLDER = Path("runs/studies")
WARM_UPS = "warm-ups"
RUNS = "runs"
ROVE = (sys.executable, "-m", "rove.cli")
"""What a child is started by."""
_ENDLESS = 100_000
"""Iterations of a run: its budget ends it."""
_GRACE = 20.0
"""Seconds until what does not stop at a second signal is killed."""


@dataclass(eq=False)
class Task:
    """A child process to run: a warm-up, or a run of an arm."""

    title: str
    directory: Path
    run: Run
    start: tuple[str, ...]
    """The command after `rove`."""
    resume: tuple[str, ...]
    done: Callable[[Path], bool]
    """Whether there is nothing left to do in the directory."""
    after: Task | None = None
    """What has to be done first."""
    process: subprocess.Popen[bytes] | None = None
    failed: str | None = None
    """Why it failed, in a line."""

    @property
    def log(self) -> Path:
        """The file that takes what the child prints."""
        return self.directory.with_name(f"{self.directory.name}.log")

    @property
    def finished(self) -> bool:
        return self.done(self.directory)

    @property
    def command(self) -> tuple[str, ...]:
        """The command that is due now."""
        return self.resume if checkpoint.exists(self.directory / "checkpoints") else self.start


def carry_out(
    question: Question, folder: Path = FOLDER, jobs: int = 1, say: Callable[[str], None] = print
) -> tuple[Path, list[str]]:
    """Run what is left of a study, and write its page below `folder`. Returns the page, and of each run that
    failed a line that says why; the others have gone on.

    `jobs` runs go on side by side, each on its share of the cores. Raises RoveError, before anything is
    made, where an arm's settings cannot work or another process carries the same study out; and `Interrupted`
    after a SIGINT or SIGTERM, once the runs under way have been saved.
    """
    study = studies.build(question)
    comparison.require()
    shares = _shares(study, jobs)
    directory = folder / question.name
    tasks, places = plan(study, folder)
    with Interrupt() as interrupt, rundir.claim(directory):
        page = write(describe(question, study, places), directory)
        children = Children(tasks, shares, say, lambda: write(describe(question, study, places), directory))
        try:
            with interrupt.patient("the runs under way are saved"):
                children.run(interrupt)
        finally:
            children.kill()
        interrupt.check()
    failures = [f"{task.title}: {task.failed}" for task in tasks if task.failed is not None]
    return page, failures


def _shares(study: Study, jobs: int) -> list[tuple[int, ...]]:
    """The cores of each job; RoveError where there are too few, or the jobs would take each other's time."""
    cores = host.cores()
    if jobs > max(1, host.core_count()):
        raise RoveError(f"--jobs {jobs}: this machine has {host.core_count()} cores; run at most so many.")
    if jobs > 1 and study.unit == "minutes":
        raise RoveError(
            f"--jobs {jobs}: the runs of this study have the same time, which they would take from each "
            "other: leave --jobs out."
        )
    return [cores[job::jobs] for job in range(jobs)]


# --- what there is to do --------------------------------------------------------------------------


def plan(study: Study, folder: Path) -> tuple[list[Task], list[Place]]:
    """The tasks of a study, in the order in which they are begun, and the places of its runs.

    Raises RoveError, naming the arm, where its settings cannot work, or are another arm's too.
    """
    tasks: list[Task] = []
    places: list[Place] = []
    for seed in study.seeds:
        warm_up = None if study.warm_up is None else _warm_up(study.warm_up, seed, folder)
        if warm_up is not None:
            tasks.append(warm_up)
        for label, arm in study.arms.items():
            try:
                task = _run(label, arm, seed, study, folder, warm_up)
            except RoveError as error:
                raise RoveError(f"Arm {label!r}: {error}") from error
            twin = next((place.arm for place in places if place.directory == task.directory), None)
            if twin is not None:
                raise RoveError(f"The arms {twin!r} and {label!r} have the same settings: change one.")
            tasks.append(task)
            places.append(Place(label, seed, task.directory, shlex.join(("rove", *task.start))))
    return tasks, places


def _warm_up(arm: Arm, seed: int, folder: Path) -> Task:
    """The warm-up of a seed."""
    settings = shlex.split(arm.settings)
    made = load.apply(recipes.build(arm.recipe), settings)
    validate(made)
    if made.sft is None:
        raise RoveError(f"The warm-up {arm.recipe!r} has no sft section: there is nothing to warm up.")
    place = folder / WARM_UPS / _made_of(made)
    own = [*settings, *_where(seed, place)]
    command = ("sft", _word(arm.recipe), *own)
    return Task(
        f"warm-up, seed {seed}",
        place / f"seed_{seed}",
        load.apply(made, own),
        command,
        command,
        lambda directory: checkpoint.damage(directory / "sft") is None,
    )


def _run(label: str, arm: Arm, seed: int, study: Study, folder: Path, warm_up: Task | None) -> Task:
    """The run of an arm and a seed."""
    budget = ["--training.iterations", str(_ENDLESS)]
    for name, value in (("max_simulated_steps", study.steps), ("max_minutes", study.minutes)):
        budget += [f"--training.{name}", "none" if value is None else str(value)]
    begun = None if warm_up is None else str(warm_up.directory / "sft")
    start = [] if begun is None else ["--sft", "none", "--policy.checkpoint", begun]
    settings = [*start, *shlex.split(study.settings), *shlex.split(arm.settings), *budget]
    run = load.apply(recipes.build(arm.recipe), settings)
    validate(run)
    if run.training.optim.schedule != "constant":
        raise RoveError(
            f"training.optim.schedule = {run.training.optim.schedule!r} runs over iterations, but the budget "
            "ends the run: set --training.optim.schedule constant."
        )
    judged = run.evaluation.episodes if study.metric == "success" else run.evaluation.variant_episodes
    if not judged:
        raise RoveError(
            "nothing is evaluated that could be compared: set --evaluation.episodes, or with the metric "
            "'shifted' --evaluation.variant_episodes."
        )
    alike = run
    if warm_up is not None and run.policy.checkpoint == begun:  # on every seed that of this seed
        alike = replace(run, policy=replace(run.policy, checkpoint=warm_up.directory.parent.name))
    place = folder / RUNS / _made_of(alike)
    own = _where(seed, place)
    directory, word = place / f"seed_{seed}", _word(arm.recipe)
    return Task(
        f"{label}, seed {seed}",
        directory,
        load.apply(run, own),
        ("train", word, *settings, *own),
        ("train", word, "--resume", str(directory)),
        lambda directory: (directory / "eval" / "after.json").exists(),
        warm_up,
    )


def _made_of(run: Run) -> str:
    """A folder's name for what these settings make on any seed."""
    key = json.dumps(load.to_dict(replace(run, seed=0, name="", output="")), sort_keys=True)
    return f"{run.name}-{hashlib.sha256(key.encode()).hexdigest()[:8]}"


def _where(seed: int, place: Path) -> list[str]:
    return ["--seed", str(seed), "--name", f"seed_{seed}", "--output", str(place)]


def _word(recipe: str) -> str:
    """How a recipe is named in a process that has imported no file of its own."""
    found = recipes.get(recipe)
    file = Path(found.build.__code__.co_filename)
    own = file.parent == Path(recipes.__file__).parent
    return found.name if own else f"{os.path.relpath(file)}:{found.name}"


# --- children -------------------------------------------------------------------------------------


class Children:
    """The processes of a study's tasks, at most one on each share of the cores."""

    def __init__(
        self,
        tasks: Sequence[Task],
        shares: Sequence[tuple[int, ...]],
        say: Callable[[str], None],
        on_end: Callable[[], object],
    ) -> None:
        self.tasks, self.say, self.on_end = tasks, say, on_end
        self.free = list(shares)
        self.running: dict[Task, tuple[tuple[int, ...], float]] = {}
        """Task -> its cores, and when it was begun."""
        self.pending = [task for task in tasks if not task.finished]
        self._waits: set[Task] = set()

    def run(self, interrupt: Interrupt) -> None:
        """Run what is left; after a signal, only until what is under way has been saved."""
        if done := len(self.tasks) - len(self.pending):
            self.say(f"{done} of {len(self.tasks)} warm-ups and runs are done already.")
        stopped = False
        while self.running or (self.pending and not interrupt.requested):
            if interrupt.requested and not stopped:
                stopped = True
                self._signal(signal.SIGTERM)
            while self.free and not interrupt.requested and (task := self._next()) is not None:
                self._begin(task)
            time.sleep(0.1)
            for task in list(self.running):
                self._look(task, stopped)

    def _next(self) -> Task | None:
        """The first task that can be begun; those that never can be are given up."""
        for task in list(self.pending):
            first = task.after
            if first is not None and first.failed is not None:
                task.failed = "not run, because its warm-up failed"
                self.pending.remove(task)
            elif first is None or first.finished:
                if (other := rundir.writer(task.directory)) is None:
                    self.pending.remove(task)
                    if not task.finished:  # by who wrote there until now
                        return task
                elif task not in self._waits:
                    self._waits.add(task)
                    self.say(f"{task.title}: waits for {other}, which writes to {task.directory}.")
        return None

    def _begin(self, task: Task) -> None:
        cores, everywhere = self.free.pop(), host.cores()
        words = task.command
        task.directory.parent.mkdir(parents=True, exist_ok=True)
        number = self.tasks.index(task) + 1
        self.say(f"[{number}/{len(self.tasks)}] {task.title}: rove {shlex.join(words)}")
        with task.log.open("ab") as log:
            log.write(f"$ rove {shlex.join(words)}\n".encode())
            log.flush()
            # A child is bound to its cores from its first moment on: what counts them sees these.
            if cores:
                host.bind(cores)
            try:
                task.process = subprocess.Popen(
                    [*ROVE, *words],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # Ctrl-C comes here, and is passed on once
                    preexec_fn=host.with_parent(signal.SIGTERM),
                )
            finally:
                if cores:
                    host.bind(everywhere)
        self.running[task] = (cores, time.monotonic())

    def _look(self, task: Task, stopped: bool) -> None:
        assert task.process is not None
        code = task.process.poll()
        if code is None:
            return
        cores, began = self.running.pop(task)
        self.free.append(cores)
        minutes = (time.monotonic() - began) / 60
        if task.finished:
            self.say(f"{task.title}: done in {minutes:.1f} min.")
        elif stopped and code != 2:
            self.say(f"{task.title}: stopped; the same command goes on with it.")
        else:
            task.failed = f"{_reason(code, task.log)} ({task.log})"
            self.say(f"{task.title}: failed: {task.failed}")
        self.on_end()

    def _signal(self, number: int) -> None:
        for task in self.running:
            assert task.process is not None
            with suppress(ProcessLookupError):
                task.process.send_signal(number)

    def kill(self) -> None:
        """End what still runs, at once: where it does not stop in seconds, with everything it started."""
        self._signal(signal.SIGTERM)
        deadline = time.monotonic() + _GRACE
        for task in self.running:
            assert task.process is not None
            try:
                task.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                os.killpg(task.process.pid, signal.SIGKILL)
                task.process.wait()


def _reason(code: int, log: Path) -> str:
    """Why a child has ended, in a line: its own error, or the signal that ended it."""
    if code < 0:
        with suppress(ValueError):
            return f"killed by {signal.Signals(-code).name}"
        return f"killed by signal {-code}"
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line.removeprefix("rove: error: ") for line in lines if line.startswith("rove: error: ")]
    last = lines[-1] if lines else "nothing was printed"
    return errors[-1] if errors and code == 2 else f"exit status {code}: {last[:300]}"
