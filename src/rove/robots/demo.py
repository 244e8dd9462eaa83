"""`rove demo robot`: a policy, its server and a simulated Franka in processes of their own, and faults.

What a newcomer would type in three terminals, and then everything that can go wrong, one thing after the
other, each looked up in the arm's own record afterwards: it never left its limits.
"""

from __future__ import annotations

import importlib.util
import io
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np

from rove.errors import RoveError
from rove.robots import session
from rove.robots.connection import Connection
from rove.robots.limits import Cause, Stopped
from rove.robots.runner import Outcome, Pace
from rove.serving.faults import FaultyServer

RECIPE = "libero_milk"
TASK = "object/pick_up_the_milk_and_place_it_in_the_basket"
EPISODES = 10
SPEED = 0.5
"""Of the simulation's time, so that two cores hold the arm, its camera, the server and the loop."""
PACE = Pace(rate=10.0, horizon=160)
"""Ten periods a second are twenty of the arm's, as the policy was trained."""
_ROVE = (sys.executable, "-c", "import sys; from rove.cli import main; sys.exit(main())")
_FAULTS: tuple[tuple[str, str, tuple[Cause, ...]], ...] = (
    ("the camera repeats its picture", "frozen", ("camera_frozen",)),
    ("the camera is black", "black", ("camera_black",)),
    ("the camera takes no picture", "stale", ("camera_stale",)),
    ("the arm takes no targets", "stuck", ("does_not_follow",)),
    ("the arm's server is slow", "slow", ("loop_late",)),
    ("answers come 500 ms late", "late", ()),
    ("the policy's server is away for a second", "away", ()),
    ("actions are no numbers", "nan", ("policy_refused",)),
    ("the policy pushes out of the box", "far", ("out_of_limits", "does_not_follow")),
    ("somebody stops the arm", "stop", ("estop_http",)),
)
"""In words, what is done, and what may stop the arm; nothing: it goes on."""
_OF_THE_ARM = ("frozen", "black", "stale", "stuck", "slow")


def demo(say: Callable[[str], None]) -> None:
    """Run the demonstration in `runs/robot`. Raises RoveError where a fault is not met as it should be."""
    folder = Path("runs") / "robot"
    policy = Path("runs") / RECIPE / "sft"
    begun = time.monotonic()
    if not policy.is_dir():
        say("A tiny policy is warmed up on an expert's demonstrations.")
        if subprocess.call([*_ROVE, "sft", RECIPE], stdout=sys.stderr):
            raise RoveError("The warm-up failed, see above.")
    with ExitStack() as stack:
        served = f"serve {policy} --port 0 --images observation/image --suite libero:{TASK}"
        simulated = f"simulate {TASK} --port 0 --image-size 64 --one-camera --speed {SPEED}"
        starting = [stack.enter_context(_process(words.split())) for words in (served, simulated)]
        server, arm = (_address(process) for process in starting)
        say(f"Policy: {server}. Arm: {arm}. Each is a process of its own. ({time.monotonic() - begun:.0f} s)")
        asked = session.Session(
            server,
            _setup(folder, arm),
            pace=PACE,
            log=folder / "log.jsonl",
            record=_record(folder, say),
        )
        outcomes = [episode(asked, number, say) for number in range(EPISODES)]
        say(f"\n{session.summary(outcomes)}\n({time.monotonic() - begun:.0f} s)\n")
        broken = [fault for fault in _FAULTS if not _throw(fault, arm, replace(asked, record=None), say)]
        _look_through(arm, say)
    if asked.record is not None and any(outcome.success for outcome in outcomes):
        _learn_from(asked.record, policy, folder, say)
    if broken:
        raise RoveError(f"Not met as it should be: {', '.join(fault[0] for fault in broken)}.")
    say(f"All of it took {time.monotonic() - begun:.0f} s. Every event: {asked.log}")


def episode(asked: session.Session, number: int, say: Callable[[str], None]) -> Outcome:
    """Run one episode; one in which limits stop the arm has failed, and the next one may do better."""
    begun = time.monotonic()
    try:
        return session.run(replace(asked, episodes=(number,)), say)[0]
    except Stopped as stopped:
        if stopped.signal is not None:
            raise
        return Outcome(number, False, 0, 0, 0, 0, round(time.monotonic() - begun, 2))


def _setup(folder: Path, address: str) -> str:
    """Write a file that describes the arm, and allows for what a simulation that shares two cores is late by;
    return its name."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "arm.toml"
    file.write_text(
        f'adapter = "simulated"\naddress = "{address}"\n\n[limits]\ncamera_late = 1.0\nloop_late = 1.2\n'
    )
    return str(file)


def _throw(
    fault: tuple[str, str, tuple[Cause, ...]],
    address: str,
    asked: session.Session,
    say: Callable[[str], None],
) -> bool:
    """Run an episode in which something goes wrong after a while; return whether it was met."""
    words, name, expected = fault
    lines: list[str] = []
    arm = Connection(address)
    with FaultyServer(asked.policy) as policy:

        def begin() -> None:
            if name in _OF_THE_ARM:
                arm.post("/fault", {"name": name})
                # Of an arm that is hardly sent anywhere nobody knows whether it would go.
                policy.fault = "far" if name == "stuck" else None
            elif name == "stop":
                said = next(line for line in lines if "POST http" in line)
                Connection(said.rsplit("POST ", 1)[1].removesuffix("/stop.")).post("/stop")
            elif name == "away":
                policy.fault = "gone"
                time.sleep(1.0)
                policy.fault = None
            else:
                assert name in ("late", "nan", "far")
                policy.fault = name

        timer = threading.Timer(2.0, begin)
        timer.start()
        # As long as it takes: the arm that takes no targets is noticed last.
        pace = replace(asked.pace, horizon=100 if expected else 40)
        try:
            session.run(replace(asked, policy=policy.address, episodes=(0,), pace=pace), lines.append)
            cause = None
        except Stopped as stopped:
            cause = stopped.cause
        finally:
            timer.join()
            arm.post("/fault", {"name": None})
            arm.close()
    met = cause in expected if expected else cause is None
    said = lines[-1].partition(": ")[2] if cause else "it held still while there was no action, and went on."
    say(f"{words}: {said}{'' if met else ' THIS IS NOT WHAT WAS EXPECTED.'}")
    return met


def _look_through(arm: str, say: Callable[[str], None]) -> None:
    """Say where the arm was, by its own record. Raises RoveError where it was outside its limits."""
    connection = Connection(arm)
    about = connection.json("/task", {})
    record = np.load(io.BytesIO(connection.get("/record")[0]))
    connection.close()
    hand, speed = record[:, 1:4], record[:, about["columns"].index("speed")]
    low, high = np.array(about["box"])
    say(
        f"By the arm's own record ({len(record)} rows, {record[-1, 0]:.0f} s of its time) its hand was in "
        f"{np.round(hand.min(0), 3).tolist()} to {np.round(hand.max(0), 3).tolist()} of "
        f"{low.tolist()} to {high.tolist()}, and moved {speed.max():.2f} m/s at most."
    )
    if (hand < low).any() or (hand > high).any():
        raise RoveError("The arm left its box.")


def _record(folder: Path, say: Callable[[str], None]) -> Path | None:
    if importlib.util.find_spec("pyarrow") is None:
        say("Nothing is recorded: that needs pip install 'rove[data]'.")
        return None
    number = 1
    while (folder / f"data-{number}").exists():
        number += 1
    return folder / f"data-{number}"


def _learn_from(recorded: Path, policy: Path, folder: Path, say: Callable[[str], None]) -> None:
    """Import the successes that were recorded, and take a few steps of SFT on them from the same policy."""
    file = folder / f"{recorded.name}.npz"
    commands = (
        f"data import {recorded} --suite libero:{TASK} --image-size 64 --out {file}",
        f"sft {RECIPE} --name robot_{recorded.name} --policy.checkpoint {policy} --sft.data {file} "
        "--sft.steps 20 --sft.optim.warmup 2 --sft.grounding 0 --sft.grounding_steps 0",
    )
    for words in commands:
        say(f"rove {words}")
        if subprocess.call([*_ROVE, *words.split()], stdout=sys.stderr):
            raise RoveError("That failed, see above.")


@contextmanager
def _process(words: Sequence[str]) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [*_ROVE, *words], stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _address(process: subprocess.Popen[str]) -> str:
    """Wait until a process says where it is. Raises RoveError where it ends before."""
    assert process.stdout is not None
    for line in process.stdout:
        words = line.replace(";", " ").split()
        if found := next((word for word in words if word.startswith(("ws://", "http://"))), None):
            return found.rstrip(".")
    raise RoveError(f"{' '.join(map(str, process.args[3:]))} ended, see above.")  # pyright: ignore
