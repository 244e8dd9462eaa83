"""The `rove` command: parses, then delegates. Heavy imports live in the handlers, so that help is instant.

A mistake of the user (RoveError), and a machine that is full or closed to writing, print one message and exit
with 2; Ctrl-C exits with 130, the SIGTERM of a scheduler with 143. Output that cannot be printed ends
nothing: the exit status is then 1, or 141 where its reader has gone.
"""

from __future__ import annotations

import argparse
import difflib
import errno
import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from rove import recipes
from rove.config import load
from rove.config.ranges import MAX_SEED
from rove.config.schema import PPO, EvaluationConfig, PolicyConfig, Run, ValueHeadConfig
from rove.config.validate import check_ranges, validate
from rove.errors import RoveError, nearest
from rove.interrupt import Interrupt, Interrupted
from rove.reporting.output import kept
from rove.serving import installed, is_remote


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    with kept() as output:
        code = _guarded(list(sys.argv[1:] if argv is None else argv))
    if code or output.error is None:
        return code
    if isinstance(output.error, BrokenPipeError):  # whoever read the output has enough of it
        return 141
    with kept():
        print(f"rove: error: What was printed is not complete: {output.error}.", file=sys.stderr)
    return 1


def _guarded(words: list[str]) -> int:
    try:
        return _dispatch(words)
    except Interrupted as interrupted:
        return interrupted.exit_code
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        message = str(error) if isinstance(error, RoveError) else _lack(error)
        if message is None:
            raise
        print(f"rove: error: {message}", file=sys.stderr)
        return 2


_FILES = (
    errno.EACCES, errno.EDQUOT, errno.EEXIST, errno.EFBIG, errno.EIO, errno.EISDIR, errno.ELOOP, errno.EMFILE,
    errno.ENAMETOOLONG, errno.ENFILE, errno.ENOENT, errno.ENOSPC, errno.ENOTDIR, errno.EPERM, errno.EROFS,
)  # fmt: skip
"""Errors of a file system, which no change to Rove would mend."""


_TOO_MUCH = ("DefaultCPUAllocator", "Could not allocate memory", "size calculation overflowed")
"""How PyTorch and MuJoCo tell that there is not enough memory."""


def _lack(error: Exception) -> str | None:
    """What the machine lacked, and what to do; None for an error that is none of the machine's."""
    text = str(error).strip().partition("\n")[0]
    if (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or any(words in text for words in _TOO_MUCH)
    ):
        return (
            f"Not enough memory ({text or 'MemoryError'}): lower --rollout.num_envs or --rollout.chunks, "
            "--training.micro_batch, or the sizes of the policy."
        )
    fix = "Free some space, or name another place"
    if isinstance(error, OSError) and error.errno in _FILES:
        full = error.errno in (errno.EDQUOT, errno.EFBIG, errno.ENOSPC)
        named = "A file" if error.filename is None else str(error.filename)
        return f"{named} cannot be used: {error.strerror}.{f' {fix}.' if full else ''}"
    # How PyTorch and safetensors, which are not written in Python, tell of a file system's errors.
    if "inline_container.cc" in text or "(os error " in text:
        return f"A file cannot be written: {text}. {fix}."
    return None


# --- handlers: parsed arguments and settings in, exit code (or None for 0) out --------------------


def _recipes(args: argparse.Namespace, settings: list[str]) -> None:
    known = recipes.all()
    width = max(len(r.name) for r in known)
    for r in known:
        print(f"  {r.name:<{width}}  {r.summary}")
    print("\nrove show RECIPE prints every setting; rove train RECIPE starts it.")


def _show(args: argparse.Namespace, settings: list[str]) -> None:
    run = load.apply(recipes.build(args.recipe), settings)
    for key, value in load.leaves(run):
        print(f"{key} = {value}")
    validate(run)
    if run.policy.checkpoint is not None:
        from rove.policies import registry as policies

        if memory := policies.memory(run):
            print(f"\n{memory}")


def _train(args: argparse.Namespace, settings: list[str]) -> None:
    if not args.recipe and not args.resume:
        raise RoveError(
            "Name a recipe, or a run to go on with: rove train RECIPE, or rove train --resume RUN."
        )
    # A run goes on with the settings that it was started with; FILE.py is imported for what it registers.
    run = recipes.build(args.recipe) if args.recipe else None
    if args.resume or run is None:
        run = _saved(args.resume)
    if args.ray_address:
        settings = ["--placement.executor=ray", f"--placement.ray_address={args.ray_address}", *settings]
    run = load.apply(run, settings)
    validate(run)
    from rove.train import train

    directory = train(run, args.resume, resume=args.resume is not None, profile=args.profile)
    print(f"Report: {directory / 'report.html'}")


def _saved(directory: Path) -> Run:
    """The settings of a run that was started. Raises RoveError where a file has to be imported first.

    It is named, and not imported: a run's directory may come from anybody, and must not decide what is
    executed here.
    """
    try:
        return load.load(directory / "run.json")
    except RoveError as error:
        for word in _command(directory):
            if ".py:" in word:
                raise RoveError(
                    f"{error}\n{directory} was started with the recipe {word}: if the file registers that, "
                    f"name it again: rove train {word} --resume {directory}"
                ) from error
        raise


def _command(directory: Path) -> list[str]:
    """The words of the command that a run was started by, as far as it is known."""
    try:
        about = json.loads((directory / "about.json").read_text())
    except (OSError, ValueError, RecursionError):
        return []
    return str(about.get("command", "")).split() if isinstance(about, dict) else []


def _demo(args: argparse.Namespace, settings: list[str]) -> None:
    if args.what == "robot":
        if settings:
            raise RoveError(f"{settings[0]} is no option of rove demo robot: it takes none.")
        with installed():
            from rove.robots import demo

        demo.demo(lambda text: print(text, flush=True))
        return
    run = _run("demo", settings)
    from rove import checkpoint, rundir
    from rove.evaluation import report
    from rove.train import train

    directory = rundir.default(run)
    train(run, directory, resume=checkpoint.exists(directory / "checkpoints"))
    print(f"\n{report.table(report.load_all(directory))}\n\nReport: {directory / 'report.html'}")


def _study(args: argparse.Namespace, settings: list[str]) -> int:
    from rove import studies

    if args.name is None:
        known = studies.all()
        width = max(len(question.name) for question in known)
        for question in known:
            made = studies.build(question)
            runs = f"{len(made.arms) * len(made.seeds)} runs, {made.hours:g} h"
            print(f"  {question.name:<{width}}  {question.summary} ({runs})")
        print("\nrove study NAME carries one out; the hours are those of two cores, roughly.")
        return 0
    question = studies.get(args.name)
    from rove import study

    page, failures = study.carry_out(
        question, args.run_dir or study.FOLDER, args.jobs, lambda text: print(text, flush=True)
    )
    print(f"Page: {page}")
    for failure in failures:
        print(f"rove: error: {failure}", file=sys.stderr)
    return 1 if failures else 0


def _sft(args: argparse.Namespace, settings: list[str]) -> None:
    run = _run(args.recipe, settings)
    from rove import host, rundir
    from rove.placement.inventory import Inventory
    from rove.placement.plan import make_plan
    from rove.policies import registry as policies
    from rove.preflight import check_data, check_words
    from rove.reporting.log import Logger
    from rove.reporting.progress import Progress
    from rove.runtime.guard import guarded
    from rove.training.sft import warm_up

    policies.check(run)
    check_words(run)
    check_data(run)
    plan = make_plan(run, Inventory.here())
    host.prepare(plan.threads)
    directory = rundir.default(run)
    with (
        guarded(run.placement.deadline),
        Interrupt() as interrupt,
        rundir.claim(directory),
        Progress(run.name, run.training.iterations) as progress,
    ):
        rundir.begin(run, directory, False, progress.message)
        with Logger(directory, tensorboard=run.logging.tensorboard, wandb=run.logging.wandb) as log:
            policy = warm_up(run, directory, log, progress, plan.device, interrupt)
    print(f"Policy: {policy}")


def _collect(args: argparse.Namespace, settings: list[str]) -> None:
    run = _run_of_suite(args.recipe, settings) or _run(args.recipe, settings)
    from rove import preflight, rundir
    from rove.evaluation import report
    from rove.reporting.progress import Progress
    from rove.runtime.guard import guarded
    from rove.training.sft import demonstrate, make_env

    if args.out:
        preflight.can_write(args.out, "--out")
    out = args.out or rundir.default(run) / "demonstrations.npz"
    records = []
    with (
        guarded(run.placement.deadline),
        Interrupt(),
        Progress(run.name, run.training.iterations) as progress,
        closing(make_env(run)) as env,
    ):
        demonstrations = demonstrate(run, env, out, progress, records.append, keep=True)
    if records:  # none where the file was there
        print(f"{report.tally(records)}\n")
    print(f"{len(demonstrations)} chunks: {out}")


def _run_of_suite(name: str, settings: list[str]) -> Run | None:
    """For "libero:object", a run that holds nothing but that suite; None where no suite is called so."""
    from rove.envs import registry

    if name.partition(":")[0] not in registry.kinds() or name in {recipe.name for recipe in recipes.all()}:
        return None
    base = Run(
        name.replace(":", "_").replace("/", "_").replace(",", "_"),
        PPO(),
        env=registry.configure(name),
        policy=PolicyConfig(value_head=ValueHeadConfig()),
    )
    run = load.apply(base, settings)
    validate(run)
    return run


def _eval(args: argparse.Namespace, settings: list[str]) -> None:
    from rove.evaluation import report
    from rove.evaluation.checkpoint import evaluate_checkpoint
    from rove.reporting.progress import beside_output

    for file in args.files:
        recipes.import_file(file)
    given = {name: value for name in _EVALUATION if (value := getattr(args, name)) is not None}
    config = load.decode(EvaluationConfig, given, "evaluation")
    check_ranges(config, "evaluation.")
    # The table is what goes to standard output.
    with Interrupt(), beside_output("evaluation") as progress:
        judged = evaluate_checkpoint(
            args.checkpoint,
            args.suite,
            args.tasks,
            args.variant,
            config,
            seed=args.seed,
            settings=settings,
            execute=args.execute,
            out=args.out,
            on_begin=lambda count: progress.phase("evaluate", count),
            on_episode=lambda record: progress.advance(),
            say=progress.message,
        )
    name = args.checkpoint if is_remote(args.checkpoint) else Path(args.checkpoint).name
    compared = report.once_and_at_end(name, judged)
    print(f"{report.task_table(judged)}\n\n{report.table(compared, judged.about.get('published'))}")


def _serve(args: argparse.Namespace, settings: list[str]) -> None:
    from rove.api import serve

    with installed():
        from rove.serving.server import ServerOptions

    for file in args.files:
        recipes.import_file(file)
    given = {field.name: getattr(args, field.name, None) for field in fields(ServerOptions)}
    options = ServerOptions(**{name: value for name, value in given.items() if value is not None})
    names = {name: getattr(args, name) for name in ("images", "state", "prompt")}
    serve(
        args.checkpoint,
        args.suite,
        keys=args.keys,
        **{name: value for name, value in names.items() if value is not None},
        options=replace(options, api_key=os.environ.get("ROVE_API_KEY")),
        settings=settings,
        say=lambda text: print(text, flush=True),
    )


def _data(args: argparse.Namespace, settings: list[str]) -> None:
    from rove.data import installed as data_installed

    reads = {"import": _IMPORT, "export": _EXPORT, "show": _SHOW, "recover": ()}[args.what]
    for name in (*_IMPORT, *_EXPORT, *_SHOW):
        if name not in reads and getattr(args, name) not in (None, False):
            option = f"--{name.replace('_', '-')}"
            raise RoveError(f"rove data {args.what} does not read {option}: leave it out.")
    with data_installed():
        from rove.data import command

    {"import": command.import_, "export": command.export, "show": command.show, "recover": command.recover}[
        args.what
    ](args.source, **{name: getattr(args, name) for name in reads})


_IMPORT = (
    "suite", "out", "images", "state", "action", "actions", "image_size", "every", "fps", "episodes",
    "failures",
)  # fmt: skip
_EXPORT = ("suite", "out", "fps")
_SHOW = ("episode", "out")
"""Options that each part of `rove data` reads."""


def _robot(args: argparse.Namespace, settings: list[str]) -> int:
    with installed():
        from rove.robots import session
    from rove.robots.limits import Stopped
    from rove.robots.runner import Pace

    if args.record is not None:
        from rove import preflight

        preflight.can_write(args.record, "--record")
    asked = session.Session(
        policy=args.policy,
        arm=args.arm,
        instruction=args.instruction,
        episodes=range(args.first, args.first + args.episodes),
        pace=Pace(args.rate, args.horizon, args.ahead),
        execute=args.execute,
        record=args.record,
        log=args.log,
        stop_port=args.stop_port,
        dry=args.dry_run,
    )
    try:
        outcomes = session.run(asked, say=lambda text: print(text, flush=True))
    except Stopped as stopped:
        print(f"rove: error: {stopped}", file=sys.stderr)
        return 3 if stopped.signal is None else 128 + stopped.signal
    print(session.summary(outcomes))
    return 0


def _simulate(args: argparse.Namespace, settings: list[str]) -> None:
    from rove.robots import simulated

    simulated.serve(
        args.task,
        args.host,
        args.port,
        image_size=args.image_size,
        wrist=not args.one_camera,
        speed=args.speed,
        split=args.split,
        say=lambda text: print(text, flush=True),
    )


def _assets(args: argparse.Namespace, settings: list[str]) -> int:
    from rove.envs import downloads
    from rove.findings import table

    findings = downloads.fetch(args.suite, only_check=args.check, say=print)
    print(table(findings))
    return 1 if any(f.status in ("error", "missing") for f in findings) else 0


def _report(args: argparse.Namespace, settings: list[str]) -> None:
    from rove.reporting.html import write_report

    print(write_report(args.run))


def _bench(args: argparse.Namespace, settings: list[str]) -> int:
    import subprocess

    scripts = _scripts()
    if unknown := [name for name in args.name if name not in scripts]:
        raise RoveError(f"Unknown benchmark {unknown[0]!r}. {nearest(unknown[0], scripts)}")
    codes = [subprocess.call([sys.executable, scripts[name]]) for name in args.name or scripts]
    return max(codes)


def _plan(args: argparse.Namespace, settings: list[str]) -> None:
    run = _run(args.recipe, settings)
    import tempfile

    from rove import preflight
    from rove.cluster import inventory_of, measure
    from rove.placement import planner
    from rove.placement.cards import CARDS
    from rove.placement.inventory import Inventory
    from rove.placement.profile import Profile

    if args.card and args.profile:
        raise RoveError("--card and --profile are two sources of the same numbers: give one.")
    if args.card and not args.gpus:
        raise RoveError("--card is of GPUs that are not here: say how many with --gpus N.")
    if args.save:
        preflight.can_write(args.save, "--save")
    there = args.gpus or args.cores
    inventory = (
        Inventory.of(args.nodes, gpus=args.gpus or 0, cores=args.cores or 1) if there else inventory_of(run)
    )
    if len(inventory.nodes) > 1:
        run = replace(run, placement=replace(run.placement, executor="ray"))
    # Before anything is measured, which takes a minute.
    if not planner.candidates(run, inventory):
        raise RoveError(f"No placement of {run.name!r} fits {inventory}; change --rollout.num_envs.")
    with tempfile.TemporaryDirectory() as scratch:
        measures = args.profile is None and args.card is None
        start = measure.start_of(run, Path(scratch)) if measures or args.check else Path()
        if args.card:
            profile = measure.bound(run, CARDS[args.card])
        elif args.profile:
            profile = Profile.load(args.profile)
        else:
            profile = measure.measure(run, start)
        if args.save:
            profile.save(args.save)
        predictions = planner.ranked(run, inventory, profile)
        measured = {}
        if args.check:
            measured = {
                i: measure.try_out(replace(run, placement=one.placement), start)
                for i, one in enumerate(predictions)
            }
        print(planner.table(predictions, measured))
        chosen = next(one for one in predictions if one.placement.ahead == run.placement.ahead)
        print(f"\nBest for ahead = {run.placement.ahead}: {chosen.plan}")


def _doctor(args: argparse.Namespace, settings: list[str]) -> int:
    from rove import doctor
    from rove.findings import table

    if (args.policy is None) != (args.suite is None):
        raise RoveError("--policy and --suite go together: rove doctor --policy CHECKPOINT --suite SUITE.")
    if args.policy is None:
        findings = doctor.examine()
    else:
        from rove import preflight

        findings = preflight.of_checkpoint(
            args.policy, args.suite, {name: getattr(args, name) for name in _PREFLIGHT}
        )
    print(table(findings))
    return 1 if any(f.status in ("error", "fail") for f in findings) else 0


def _scripts() -> dict[str, Path]:
    folder = Path(__file__).resolve().parents[2] / "benchmarks"
    scripts = {path.stem: path for path in sorted(folder.glob("*.py")) if not path.stem.startswith("_")}
    if not scripts:
        raise RoveError(
            f"No benchmarks at {folder}: they come with the source, not with the installed package."
        )
    return scripts


_PREFLIGHT = ("decoding", "attention", "unnorm_key", "center_crop", "dtype")
"""Settings of the policy that `rove doctor --policy` takes as options."""
_EVALUATION = ("episodes", "decoding", "num_envs")
"""Settings of `EvaluationConfig` that `rove eval` takes as options."""


def _run(recipe: str, settings: Sequence[str]) -> Run:
    run = load.apply(recipes.build(recipe), settings)
    validate(run)
    return run


# --- what each command takes ----------------------------------------------------------------------


def _positive(text: str) -> int:
    if not text.isdecimal() or len(text) > 10 or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text[:40]!r}")
    return int(text)


def _count(text: str) -> int:
    if not text.isdecimal() or len(text) > 10:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 0, got {text[:40]!r}")
    return int(text)


def _machines(text: str) -> int:
    """A number of nodes, GPUs or cores, every one of which a plan lists."""
    if (number := _positive(text)) > _MOST_MACHINES:
        raise argparse.ArgumentTypeError(f"expected at most {_MOST_MACHINES}, got {number}")
    return number


_MOST_MACHINES = 256


def _port(text: str) -> int:
    if not text.isdecimal() or len(text) > 5 or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"expected a port from 0 to 65535, got {text[:40]!r}")
    return int(text)


def _number(text: str, low: float, high: float) -> float:
    try:
        number = float(text)
    except ValueError:
        number = float("nan")
    if not low <= number <= high:
        raise argparse.ArgumentTypeError(f"expected a number from {low:g} to {high:g}, got {text[:40]!r}")
    return number


def _whole(text: str) -> int:
    if not text.isdecimal() or len(text) > 9:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 0, got {text[:40]!r}")
    return int(text)


def _wait(text: str) -> float:
    """Milliseconds, as seconds."""
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number <= 10_000:
        raise argparse.ArgumentTypeError(f"expected milliseconds from 0 to 10000, got {text[:40]!r}")
    return number / 1000


def _names(text: str) -> tuple[str, ...]:
    return tuple(name for name in text.split(",") if name)


def _seed(text: str) -> int:
    if not text.isdecimal() or len(text) > 10 or int(text) > MAX_SEED:
        raise argparse.ArgumentTypeError(f"expected a whole number from 0 to {MAX_SEED}, got {text[:40]!r}")
    return int(text)


@dataclass(frozen=True)
class Argument:
    """One `add_argument` call."""

    name: str
    help: str
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Command:
    """A sub-command. With `settings`, it takes `--key value` for any key of a run besides its own options."""

    handler: Callable[[argparse.Namespace, list[str]], int | None]
    help: str
    arguments: tuple[Argument, ...] = ()
    settings: bool = False

    @property
    def flags(self) -> set[str]:
        return {"--help", *(a.name for a in self.arguments if a.name.startswith("--"))}


_RECIPE = Argument("recipe", "a name from `rove recipes`, or FILE.py:NAME", {"metavar": "RECIPE"})

COMMANDS: dict[str, Command] = {
    "demo": Command(
        _demo,
        "warm up, train and evaluate the demo recipe, then print the table; or, demo robot, run an arm",
        (
            Argument(
                "what",
                "robot: serve a tiny policy, run it on a simulated Franka, and let everything go wrong",
                {"nargs": "?", "choices": ("robot",), "metavar": "robot"},
            ),
        ),
        settings=True,
    ),
    "recipes": Command(_recipes, "list the recipes"),
    "show": Command(_show, "print and check a recipe's settings", (_RECIPE,), settings=True),
    "train": Command(
        _train,
        "train a recipe, or go on with a run that was stopped",
        (
            replace(_RECIPE, options={"metavar": "RECIPE", "nargs": "?"}),
            Argument("--resume", "directory of the run to go on with", {"metavar": "RUN", "type": Path}),
            Argument(
                "--profile", "write trace.json, a timeline for ui.perfetto.dev", {"action": "store_true"}
            ),
            Argument("--ray-address", "use the Ray cluster at this address; auto: this machine's"),
        ),
        settings=True,
    ),
    "study": Command(
        _study,
        "compare recipes over seeds, and write a page of what was found; without a name, list the studies",
        (
            Argument("name", "a study, or FILE.py:NAME", {"nargs": "?", "metavar": "NAME"}),
            Argument(
                "--run-dir", "folder of all studies (default: runs/studies)", {"type": Path, "metavar": "DIR"}
            ),
            Argument(
                "--jobs",
                "runs side by side, each on its share of the cores (default: 1)",
                {"type": _positive, "default": 1, "metavar": "N"},
            ),
        ),
    ),
    "sft": Command(_sft, "only the supervised warm-up of a recipe", (_RECIPE,), settings=True),
    "collect": Command(
        _collect,
        "only the expert demonstrations of a recipe, or of a suite such as libero:object",
        (_RECIPE, Argument("--out", "file to write (default: in the run's directory)", {"type": Path})),
        settings=True,
    ),
    "eval": Command(
        _eval,
        "evaluate a checkpoint on held-out episodes",
        (
            Argument(
                "checkpoint",
                "a policy directory, e.g. runs/demo/sft; a served one, ws://HOST:PORT; or random",
                {"metavar": "CHECKPOINT"},
            ),
            Argument(
                "--suite",
                "environment suite, e.g. tabletop, libero:130 or maniskill:PickCube-v1",
                {"required": True},
            ),
            Argument("--tasks", "a named set of tasks, or task ids separated by commas"),
            Argument(
                "--variant", "a shifted variant; several separated by commas; or all", {"default": "none"}
            ),
            Argument("--episodes", "episodes for each variant", {"type": _positive, "metavar": "N"}),
            Argument("--decoding", "greedy or sample"),
            Argument("--num-envs", "episodes simulated at once", {"type": _positive, "metavar": "B"}),
            Argument("--seed", "of the sampling noise", {"type": _seed, "default": 0, "metavar": "N"}),
            Argument(
                "--execute",
                "actions executed of a server's answer (default: Rove's all, another's 5) or a flow policy's",
                {"type": _positive, "metavar": "N"},
            ),
            Argument(
                "--import",
                "a file that registers the suite or the policy; may be given again",
                {"type": Path, "metavar": "FILE.py", "dest": "files", "action": "append", "default": []},
            ),
            Argument(
                "--out",
                "file for every episode's outcome, as JSON; a stopped evaluation goes on from its journal",
                {"type": Path},
            ),
        ),
        settings=True,
    ),
    "serve": Command(
        _serve,
        "serve a checkpoint to robots and simulators, by openpi's websocket protocol",
        (
            Argument(
                "checkpoint",
                "a policy directory, e.g. runs/demo/best",
                {"type": Path, "metavar": "CHECKPOINT"},
            ),
            Argument(
                "--suite", "the suite in whose conventions it answers (default: its run's, else its own)"
            ),
            Argument("--host", "address to listen at; 0.0.0.0: other machines too (default: 127.0.0.1)"),
            Argument("--port", "port to listen at; 0: any (default: 8000)", {"type": _port, "metavar": "N"}),
            Argument("--keys", "whose entries clients send: libero, droid or aloha", {"default": "libero"}),
            Argument("--images", "or those of the pictures, KEY,KEY", {"type": _names, "metavar": "KEYS"}),
            Argument("--state", "those of the robot's state, KEY,KEY", {"type": _names, "metavar": "KEYS"}),
            Argument("--prompt", "that of the instruction", {"metavar": "KEY"}),
            Argument("--limit", "most observations in a forward pass", {"type": _positive, "metavar": "N"}),
            Argument(
                "--wait", "most milliseconds that one waits for others", {"type": _wait, "metavar": "MS"}
            ),
            Argument("--message-limit", "most bytes of a message", {"type": _positive, "metavar": "N"}),
            Argument(
                "--import",
                "a file that registers the suite or the policy; may be given again",
                {"type": Path, "metavar": "FILE.py", "dest": "files", "action": "append", "default": []},
            ),
        ),
        settings=True,
    ),
    "data": Command(
        _data,
        "bring robot data in, take it out, and look at it: rove data import, export, show or recover",
        (
            Argument(
                "what",
                "import: make demonstrations of a data set; export: the other way; show: print what it is; "
                "recover: finish a recording that was cut off",
                {"choices": ("import", "export", "show", "recover"), "metavar": "WHAT"},
            ),
            Argument(
                "source",
                "a LeRobot folder, or LIBERO's .hdf5 files; of export, a file of demonstrations",
                {"type": Path, "metavar": "SOURCE"},
            ),
            Argument("--suite", "the suite that the demonstrations are for, e.g. libero:object"),
            Argument("--out", "file of demonstrations, folder, or picture to write", {"type": Path}),
            Argument("--images", "features that are the pictures", {"type": _names, "metavar": "KEYS"}),
            Argument("--state", "those of the robot's state; none", {"type": _names, "metavar": "KEYS"}),
            Argument("--action", "that of the actions", {"metavar": "KEY"}),
            Argument(
                "--actions", "the convention of the actions, as JSON", {"type": Path, "metavar": "FILE.json"}
            ),
            Argument("--image-size", "pixels (default: the suite's)", {"type": _positive, "metavar": "N"}),
            Argument("--every", "frames between two rows (default: 1)", {"type": _positive, "metavar": "N"}),
            Argument("--fps", "frames a second, where the suite has others", {"type": _positive}),
            Argument("--episodes", "only the first so many", {"type": _positive, "metavar": "N"}),
            Argument("--failures", "take episodes that failed, too", {"action": "store_true"}),
            Argument("--episode", "the episode to draw (default: 0)", {"type": _count, "metavar": "N"}),
        ),
    ),
    "robot": Command(
        _robot,
        "run a served policy on an arm, within limits",
        (
            Argument("policy", "address of a served policy, ws://HOST:PORT", {"metavar": "POLICY"}),
            Argument(
                "--arm",
                "address of a simulated arm, http://HOST:PORT, or a TOML file that describes one",
                {"required": True},
            ),
            Argument("--instruction", "what is to be done (default: what a simulated arm says)"),
            Argument("--episodes", "how many", {"type": _positive, "default": 1, "metavar": "N"}),
            Argument("--first", "number of the first one", {"type": _whole, "default": 0, "metavar": "N"}),
            Argument(
                "--rate",
                "periods a second, 5 to 50 (default: 20)",
                {"type": partial(_number, low=5, high=50), "default": 20.0, "metavar": "HZ"},
            ),
            Argument(
                "--horizon",
                "actions after which an episode has failed (default: 240)",
                {"type": _positive, "default": 240, "metavar": "N"},
            ),
            Argument(
                "--ahead",
                "ask for the next chunk when N actions are left (default: as its answers need)",
                {"type": _whole, "metavar": "N"},
            ),
            Argument(
                "--execute",
                "actions of an answer that are executed (default: Rove's all, another's 5)",
                {"type": _positive, "metavar": "N"},
            ),
            Argument("--record", "folder of a data set in LeRobot's layout", {"type": Path}),
            Argument("--log", "file for every event, a line of JSON each", {"type": Path}),
            Argument(
                "--stop-port",
                "port at which POST /stop stops the arm (default: any that is free)",
                {"type": _port, "default": 0, "metavar": "N"},
            ),
            Argument("--dry-run", "show what would be sent, and send nothing", {"action": "store_true"}),
        ),
    ),
    "simulate": Command(
        _simulate,
        "simulate a Franka in a task of LIBERO, behind the HTTP server of SERL's set-ups",
        (
            Argument(
                "task",
                "e.g. object/pick_up_the_milk_and_place_it_in_the_basket",
                {"metavar": "TASK"},
            ),
            Argument("--host", "address to listen at (default: 127.0.0.1)", {"default": "127.0.0.1"}),
            Argument(
                "--port",
                "port to listen at; 0: any (default: 5000)",
                {"type": _port, "default": 5000, "metavar": "N"},
            ),
            Argument(
                "--image-size",
                "pixels of a picture's side (default: 128)",
                {"type": _positive, "default": 128, "metavar": "N"},
            ),
            Argument("--one-camera", "leave out the camera in the hand", {"action": "store_true"}),
            Argument(
                "--speed",
                "of its time: 0.5 where the machine cannot keep up, with half the --rate",
                {"type": partial(_number, low=0.05, high=4), "default": 1.0, "metavar": "X"},
            ),
            Argument(
                "--split",
                "initial states that episodes begin in: held_out (default) or train",
                {"choices": ("held_out", "train"), "default": "held_out"},
            ),
        ),
    ),
    "assets": Command(
        _assets,
        "download what a suite needs, check it, and say what is missing",
        (
            Argument("suite", "maniskill", {"metavar": "SUITE"}),
            Argument("--check", "say what is there, and download nothing", {"action": "store_true"}),
        ),
    ),
    "report": Command(
        _report,
        "write a run's report.html",
        (Argument("run", "directory of the run", {"type": Path, "metavar": "RUN"}),),
    ),
    "bench": Command(
        _bench,
        "run benchmarks, all of them unless named",
        (Argument("name", "a script in benchmarks/", {"nargs": "*", "metavar": "NAME"}),),
    ),
    "plan": Command(
        _plan,
        "measure a recipe's parts, predict every placement's iteration time, and pick one",
        (
            _RECIPE,
            Argument("--save", "file for the measurements", {"type": Path, "metavar": "FILE"}),
            Argument("--profile", "measurements to use, for new ones", {"type": Path, "metavar": "FILE"}),
            Argument("--nodes", "plan for so many nodes", {"type": _machines, "default": 1, "metavar": "N"}),
            Argument("--gpus", "with so many GPUs each", {"type": _machines, "metavar": "N"}),
            Argument("--card", "of this kind, by its rates: none is needed", {"choices": ("h100",)}),
            Argument("--cores", "with so many cores each", {"type": _machines, "metavar": "N"}),
            Argument("--check", "also run each one here, and show its time", {"action": "store_true"}),
        ),
        settings=True,
    ),
    "doctor": Command(
        _doctor,
        "say what this machine has and lacks, or with --policy whether a checkpoint fits a suite",
        (
            Argument("--policy", "a checkpoint directory, or a name on the hub", {"metavar": "CHECKPOINT"}),
            Argument("--suite", "the suite that it is for, e.g. libero_spatial", {"metavar": "SUITE"}),
            Argument("--decoding", "how it decodes", {"choices": ("autoregressive", "parallel")}),
            Argument("--attention", "how it attends", {"choices": ("causal", "bidirectional")}),
            Argument("--unnorm_key", "data set whose statistics un-normalise", {"metavar": "KEY"}),
            Argument("--center_crop", "crop pictures", {"choices": ("true", "false")}),
            Argument("--dtype", "of its weights in memory", {"choices": ("float32", "bfloat16")}),
        ),
    ),
}

_SETTINGS_HELP = "Any setting of the run can be given as --key value, e.g. --rollout.num_envs 32."


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise RoveError(f"{message[:1].upper()}{message[1:]}. See {self.prog} --help.")


def _dispatch(words: list[str]) -> int:
    name = words[0] if words else "--help"
    if not name.startswith("-") and name not in COMMANDS:
        raise RoveError(f"Unknown command {name!r}. {nearest(name, COMMANDS)}")
    parser = _parser()
    try:
        if name.startswith("-"):
            parser.parse_args([name])
        command = COMMANDS[name]
        own, settings = _split(command, words[1:])
        args = parser.parse_args([name, *own])
    except SystemExit as done:  # argparse has printed the help
        return int(done.code or 0)
    return command.handler(args, settings) or 0


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="rove",
        description="Train vision-language-action robot policies by reinforcement learning.",
        epilog="Start with: rove recipes",
        allow_abbrev=False,
    )
    added = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        usage = " ".join([f"rove {name}", *_usage(command)])
        sub = added.add_parser(
            name,
            help=command.help,
            description=f"{command.help[0].upper()}{command.help[1:]}.",
            usage=usage,
            epilog=_SETTINGS_HELP if command.settings else None,
            allow_abbrev=False,
        )
        for argument in command.arguments:
            sub.add_argument(argument.name, help=argument.help, **argument.options)
    return parser


def _usage(command: Command) -> Iterable[str]:
    optional = []
    for argument in command.arguments:
        name = str(argument.options.get("metavar", argument.name.lstrip("-").upper()))
        if not argument.name.startswith("--"):
            yield f"[{name}]" if "nargs" in argument.options else name
        elif argument.options.get("required"):
            yield f"{argument.name} {name}"
        else:
            optional.append(f"[{argument.name} {name}]")
    yield from optional if len(optional) < 3 else ["[options]"]
    if command.settings:
        yield "[--key value …]"


def _split(command: Command, words: Iterable[str]) -> tuple[list[str], list[str]]:
    """The command's own words, and the settings; refuses an option that is close to one of the command's."""
    own: list[str] = []
    settings: list[str] = []
    words = list(words)
    while words:
        word = words.pop(0)
        flag = word.partition("=")[0]
        if not flag.startswith("--") or flag in command.flags:
            own.append(word)
            continue
        top_level = flag[2:] in {f.name for f in fields(Run)}
        meant = difflib.get_close_matches(flag, command.flags, n=1, cutoff=0.75)
        if not command.settings or (meant and not top_level and "." not in flag):
            raise RoveError(f"Unknown option {flag}. {nearest(flag, command.flags)}")
        settings.append(word)
        if "=" not in word and words and not words[0].startswith("--"):
            settings.append(words.pop(0))
    return own, settings


if __name__ == "__main__":
    sys.exit(main())
