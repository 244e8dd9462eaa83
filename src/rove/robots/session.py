"""A run from beginning to end: the arm is claimed, what is there is checked, episodes are run, and the arm is
left holding still."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path

from rove.errors import RoveError
from rove.evaluation.statistics import wilson
from rove.robots.asking import Asker
from rove.robots.base import Frame
from rove.robots.claim import claimed
from rove.robots.journal import Journal
from rove.robots.limits import Stopped
from rove.robots.recording import LeRobotRecorder
from rove.robots.runner import Outcome, Pace, Runner
from rove.robots.setup import Arm, arm
from rove.robots.stopping import EStop, button, keyboard, signals
from rove.serving.remote import RemotePolicy

_PICTURES = 10.0
"""Times a second that cameras are read at least: the slower the loop, the more it needs to know them well."""


@dataclass(frozen=True)
class Session:
    """What a run is about."""

    policy: str
    """Address of a served policy, ws://HOST:PORT."""
    arm: str
    """Address of a simulated arm, http://HOST:PORT, or a file that describes one."""
    instruction: str | None = None
    """What is to be done; None: what the arm says."""
    episodes: Sequence[int] = (0,)
    """Their numbers; a simulated arm begins each in an initial state of its own."""
    pace: Pace = field(default_factory=Pace)
    execute: int | None = None
    """Actions of an answer that are executed; None: all of Rove's, 5 of another's."""
    record: Path | None = None
    """Folder of the data set."""
    log: Path | None = None
    """File of the journal."""
    stop_port: int = 0
    """Port at which POST /stop stops the arm; 0: any."""
    dry: bool = False
    """Whether targets are shown in place of sent."""


def run(session: Session, say: Callable[[str], None] = print) -> list[Outcome]:
    """Run the episodes of a session. Raises RoveError before the arm moves where something is not as it
    should be, and `Stopped` where the arm was stopped; what was recorded until then is kept."""
    chosen = arm(session.arm, max(session.pace.rate, _PICTURES))
    if 2.0 / session.pace.rate > chosen.limits.loop_late:
        raise RoveError(
            f"A period of {1 / session.pace.rate:.2f} s is no shorter than half of limits.loop_late, "
            f"{chosen.limits.loop_late} s: give a higher --rate."
        )
    with ExitStack() as stack:
        stack.enter_context(claimed(chosen.robot.address))
        journal = stack.enter_context(closing(Journal(session.log, say)))
        try:
            return _run(session, chosen, journal, stack)
        except Stopped as stopped:
            journal.write("stopped", text=str(stopped), cause=stopped.cause)
            raise


def _run(session: Session, chosen: Arm, journal: Journal, stack: ExitStack) -> list[Outcome]:
    robot, instruction = chosen.robot, session.instruction or chosen.instruction
    if not instruction:
        raise RoveError("Nobody says what is to be done: give it, --instruction TEXT.")
    policy = RemotePolicy(
        session.policy,
        connections=1,
        execute=session.execute,
        api_key=os.environ.get("ROVE_API_KEY"),
        patience=0.0,
        timeout=chosen.limits.policy_late + 1.0,  # the loop gives up first
    )
    stack.callback(policy.close)
    asker = stack.enter_context(closing(Asker(policy, robot.action_spec, instruction)))
    recorder = None
    if session.record is not None:
        recorder = LeRobotRecorder(
            session.record,
            robot,
            chosen.kind,
            rate=session.pace.rate / chosen.speed,
            instruction=instruction,
        )
        stack.callback(recorder.close)
    stack.callback(robot.close)
    robot.connect()
    _check_pictures(robot.observe().frames)
    estop = stack.enter_context(
        closing(EStop((lambda: None) if session.dry else robot.stop, chosen.limits.loop_late))
    )
    stack.enter_context(signals(estop))
    keys = stack.enter_context(keyboard(estop))
    if keys is None and not robot.judges and not session.dry:
        raise RoveError(
            "A real arm is not run without a terminal: its keys are what stops it, and what says success. "
            "Start it in one."
        )
    url = stack.enter_context(button(estop, session.stop_port))
    journal.write(
        "begin",
        text=f"{instruction!r} on {robot.address}. Space or Ctrl-C stops the arm, so do kill {os.getpid()} "
        f"and POST {url}.",
    )
    runner = Runner(robot, asker, chosen.limits, estop, journal, session.pace, recorder, keys, session.dry)
    try:
        return runner.run(session.episodes)
    finally:
        estop.close()
        if estop.trouble:
            journal.write("alarm", text=f"{estop.trouble} Use the button on the arm.")


def _check_pictures(frames: Mapping[str, Frame]) -> None:
    sizes = {frame.image.shape for frame in frames.values()}
    if len(sizes) > 1:
        said = ", ".join(f"{n} {f.image.shape[0]} x {f.image.shape[1]}" for n, f in frames.items())
        raise RoveError(f"The cameras' pictures differ in size ({said}): set all to one.")


def summary(outcomes: Sequence[Outcome]) -> str:
    """Say how episodes went: each one, then how many succeeded, with Wilson's 95 % interval."""
    lines = []
    for one in outcomes:
        verdict = {True: "success", False: "failure", None: "not said"}[one.success]
        lines.append(
            f"episode {one.episode}: {verdict}, {one.actions} actions in {one.seconds:.1f} s, {one.held} "
            f"periods held, {one.dropped} answers too late, {one.clipped} targets clipped"
        )
    known = [one.success for one in outcomes if one.success is not None]
    if known:
        low, high = wilson(sum(known), len(known))
        lines.append(f"{sum(known)} of {len(known)} succeeded [{100 * low:.1f}, {100 * high:.1f}] %")
    return "\n".join(lines)
