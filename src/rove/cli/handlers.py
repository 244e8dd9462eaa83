"""What each command does: parsed arguments and settings in, an exit code out (None for 0).

Heavy imports are made inside the handlers, so that help is instant.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import fields, replace
from pathlib import Path

from rove import recipes
from rove.config import load
from rove.config.schema import PPO, EvaluationConfig, PolicyConfig, Run, ValueHeadConfig
from rove.config.validate import check_ranges, validate
from rove.errors import RoveError, nearest
from rove.interrupt import Interrupt
from rove.serving import installed, is_remote


def do_recipes(args: argparse.Namespace, settings: list[str]) -> None:
    known = recipes.all()
    width = max(len(r.name) for r in known)
    for r in known:
        print(f"  {r.name:<{width}}  {r.summary}")
    print("\nrove show RECIPE prints every setting; rove train RECIPE starts it.")


def do_show(args: argparse.Namespace, settings: list[str]) -> None:
    run = load.apply(recipes.build(args.recipe), settings)
    for key, value in load.leaves(run):
        print(f"{key} = {value}")
    validate(run)
    if run.policy.checkpoint is not None:
        from rove.policies import registry as policies

        if memory := policies.memory(run):
            print(f"\n{memory}")


def do_train(args: argparse.Namespace, settings: list[str]) -> None:
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


def do_demo(args: argparse.Namespace, settings: list[str]) -> None:
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


def do_study(args: argparse.Namespace, settings: list[str]) -> int:
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


def do_sft(args: argparse.Namespace, settings: list[str]) -> None:
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


def do_collect(args: argparse.Namespace, settings: list[str]) -> None:
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


def do_eval(args: argparse.Namespace, settings: list[str]) -> None:
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


def do_serve(args: argparse.Namespace, settings: list[str]) -> None:
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


def do_data(args: argparse.Namespace, settings: list[str]) -> None:
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


def do_robot(args: argparse.Namespace, settings: list[str]) -> int:
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


def do_simulate(args: argparse.Namespace, settings: list[str]) -> None:
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


def do_assets(args: argparse.Namespace, settings: list[str]) -> int:
    from rove.envs import downloads
    from rove.findings import table

    findings = downloads.fetch(args.suite, only_check=args.check, say=print)
    print(table(findings))
    return 1 if any(f.status in ("error", "missing") for f in findings) else 0


def do_report(args: argparse.Namespace, settings: list[str]) -> None:
    from rove.reporting.html import write_report

    print(write_report(args.run))


def do_bench(args: argparse.Namespace, settings: list[str]) -> int:
    import subprocess

    scripts = _scripts()
    if unknown := [name for name in args.name if name not in scripts]:
        raise RoveError(f"Unknown benchmark {unknown[0]!r}. {nearest(unknown[0], scripts)}")
    codes = [subprocess.call([sys.executable, scripts[name]]) for name in args.name or scripts]
    return max(codes)


def do_plan(args: argparse.Namespace, settings: list[str]) -> None:
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


def do_doctor(args: argparse.Namespace, settings: list[str]) -> int:
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
    folder = Path(__file__).resolve().parents[3] / "benchmarks"
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
