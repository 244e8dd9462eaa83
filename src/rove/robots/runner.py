"""The control loop: one period after the other, observe, choose, limit, send.

consumes      pictures and the arm's state, answers of the policy
produces      one target a period, and one row of the recording
waits for     the end of the period, the arm's answer to a target, and where there is no action half a period
              for the policy's; never for a picture
ends by       success, the horizon, a person's key, or `Stopped`; the arm then holds still

The next chunk is asked for as late as it can be: where answers take less than half a period once the present
one is executed, as in simulation, else so many periods before as they take; `schedule` joins the two. An
action is for one period: if its answer is late it is dropped, and said so. Where no chunk has an action for a
period the arm holds still where it is; an answer to an observation that was made since then is for now,
whenever it comes, since nothing has moved.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from rove.errors import RoveError
from rove.robots.asking import Answer, Asker
from rove.robots.base import Recorder, Robot, RobotObservation
from rove.robots.journal import Journal
from rove.robots.limits import Guard, Limits, Stopped
from rove.robots.schedule import Schedule
from rove.robots.stopping import EStop, Keys

_FIRST_WAIT, _LONGEST_WAIT = 0.2, 2.0
"""Seconds before a server that has gone is tried again: twice as long each time, up to the second."""
_PATIENCE = 0.5
"""Part of a period for which an answer is waited for while the arm goes on to where it was sent."""
_LOOK = 0.002
"""Seconds between two looks whether it has come."""
_REMEMBERED = 5
"""Answers of which the slowest says how early the next one is asked for."""


@dataclass(frozen=True, slots=True)
class Pace:
    """How a run goes."""

    rate: float = 20.0
    """Periods a second."""
    horizon: int = 240
    """Periods with an action, after which an episode has failed."""
    ahead: int | None = None
    """The next chunk is asked for when so many actions are left; None: as few as the last answers took
    periods, 0 where they took less than half of one."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of an episode."""

    episode: int
    success: bool | None
    """None: nobody said."""
    actions: int
    """Periods with an action."""
    held: int
    """Periods in which the arm held still for want of one."""
    dropped: int
    """Answers that came too late, with all of their actions."""
    clipped: int
    """Targets that limits changed."""
    seconds: float


@dataclass(eq=False)
class Runner:
    """Runs episodes of one policy on one arm."""

    robot: Robot
    asker: Asker
    limits: Limits
    estop: EStop
    journal: Journal
    pace: Pace = field(default_factory=Pace)
    recorder: Recorder | None = None
    keys: Keys | None = None
    dry: bool = False
    """Whether targets are shown in place of sent."""

    def __post_init__(self) -> None:
        self.period = 1.0 / self.pace.rate
        self.guard = Guard(self.limits, self.period)

    def run(self, episodes: Sequence[int]) -> list[Outcome]:
        """Run episodes, one after the other. Raises Stopped where the arm was stopped; the outcomes until
        then are in the journal."""
        outcomes = []
        for episode in episodes:
            self._prepare(episode)
            outcome = self._episode(episode)
            outcomes.append(outcome)
            self.journal.write("episode", **{name: getattr(outcome, name) for name in Outcome.__slots__})
        return outcomes

    def _prepare(self, episode: int) -> None:
        if not self.robot.judges and self.keys is not None and not self.dry:
            self.journal.write("waits", text="Put the scene in order, stand back, and press Enter.")
            while self.keys.take() not in ("\n", "\r"):
                self.estop.wait(0.05)
        self.estop.check()
        if not self.dry:
            self.estop.rest()
            self.robot.begin(episode)
        self.estop.check()

    def _episode(self, episode: int) -> Outcome:
        state = _Episode(self, episode)
        success: bool | None = None
        try:
            success = state.run()
        except Stopped as stopped:
            self.estop.stopped(stopped)
            raise
        except BaseException as error:
            # What was recorded is ended below, which may take a while: the arm is stopped first.
            self.estop.press("runner_failed", f"{type(error).__name__}: {error}")
            raise
        finally:
            self.estop.rest()
            if self.recorder is not None:
                self.recorder.end_episode(success)
            self.asker.settle(0.0 if self.estop.pressed else self.limits.policy_late)
        return state.outcome(success)


class _Episode:
    """One episode as it runs."""

    def __init__(self, runner: Runner, episode: int) -> None:
        self._runner, self._episode = runner, episode
        self._schedule = Schedule(average=runner.robot.action_spec.control == "absolute")
        self._held = self._acted = self._dropped = 0
        self._clips = runner.guard.clips
        self._still_since: int | None = None
        """Period in which the arm began to hold still; None: it moves."""
        self._sent: np.ndarray | None = None
        self._gone_since: float | None = None
        self._wait, self._again = _FIRST_WAIT, 0.0
        self._took: deque[float] = deque(maxlen=_REMEMBERED)
        self._begun = time.monotonic()

    def run(self) -> bool | None:
        runner = self._runner
        runner.guard.begin()
        begun, now = time.monotonic(), 0
        while self._acted < runner.pace.horizon:
            runner.estop.beat()
            seen = self._observe()
            if (verdict := self._verdict(seen)) is not None:
                self._hold(seen, now)
                return verdict
            self._listen(now)
            self._ask(seen, now)
            self._move(seen, now)
            # Periods that have gone by are not made up for: what was for them is not executed.
            due = int((time.monotonic() - begun) / runner.period) + 1
            if due > now + 1:
                runner.journal.write("late", quiet=True, periods=due - now - 1)
            now = max(now + 1, due)
            runner.estop.wait(begun + now * runner.period - time.monotonic())
        self._hold(self._observe(), now)
        return False

    def outcome(self, success: bool | None) -> Outcome:
        return Outcome(
            self._episode,
            success,
            self._acted,
            self._held,
            self._dropped,
            self._runner.guard.clips - self._clips,
            round(time.monotonic() - self._begun, 2),
        )

    def _observe(self) -> RobotObservation:
        try:
            seen = self._runner.robot.observe()
        except Stopped:
            raise
        except RoveError as error:
            raise Stopped("robot_failed", str(error)) from error
        self._runner.guard.check(seen, None if self._runner.dry else self._sent)
        return seen

    def _verdict(self, seen: RobotObservation) -> bool | None:
        """Return whether the episode is over, and how: by the arm's own word or a person's key."""
        if seen.success:
            return True
        keys = self._runner.keys
        while keys is not None and (key := keys.take()) is not None:
            if key in "sf":
                return key == "s"
        return None

    def _listen(self, now: int) -> None:
        runner = self._runner
        answer = runner.asker.poll()
        if answer is None:
            waiting = runner.asker.waiting
            if waiting is not None and waiting > runner.limits.policy_late:
                raise Stopped("policy_late", f"the policy has not answered for {waiting:.1f} s.")
        elif answer.gone:
            self._has_gone(answer)
        elif answer.actions is None:
            runner.journal.write("refused", text=answer.problem)
            runner.guard.refuse(answer.problem)
        elif runner.guard.finite(answer.actions):
            self._gone_since, self._wait = None, _FIRST_WAIT
            self._took.append(answer.seconds)
            self._add(answer.actions, answer.period, now, answer.seconds)

    def _add(self, actions: np.ndarray, period: int, now: int, seconds: float) -> None:
        still = self._still_since is not None and period >= self._still_since
        first = now if still else period
        # The first actions of an answer that was asked for on the way are always for periods that have gone:
        # the chunk before had those.
        if self._schedule.add(first, actions, now) == len(actions):
            self._dropped += 1
            self._runner.journal.write(
                "dropped", text=f"An answer took {seconds:.2f} s: all {len(actions)} actions are too late."
            )

    def _has_gone(self, answer: Answer) -> None:
        limits, now = self._runner.limits, time.monotonic()
        if self._gone_since is None:
            self._gone_since = now
            self._runner.journal.write("gone", text=f"{answer.problem} It is tried again.")
        if now - self._gone_since > limits.policy_gone:
            raise Stopped("policy_gone", f"no policy for {limits.policy_gone:.0f} s. {answer.problem}")
        self._again = now + self._wait
        self._wait = min(2 * self._wait, _LONGEST_WAIT)

    def _ask(self, seen: RobotObservation, now: int) -> None:
        runner, left = self._runner, self._schedule.left(now)
        if runner.asker.waiting is not None or time.monotonic() < self._again or left > self._ahead():
            return
        runner.asker.ask(seen, now)
        if left:
            return
        until = time.monotonic() + _PATIENCE * runner.period
        while runner.asker.waiting is not None and time.monotonic() < until:
            runner.estop.wait(_LOOK)
            self._listen(now)
        if not self._schedule.left(now):
            # In the period of the question: the answer is then for whenever it comes.
            self._hold(seen, now)

    def _ahead(self) -> int:
        """How many actions are left when the next chunk is asked for."""
        if (given := self._runner.pace.ahead) is not None:
            return given
        periods = max(self._took, default=0.0) / self._runner.period
        return 0 if periods < _PATIENCE else min(math.ceil(periods), self._runner.asker.chunk - 1)

    def _move(self, seen: RobotObservation, now: int) -> None:
        runner = self._runner
        asked = self._schedule.at(now)
        if asked is None:
            self._hold(seen, now)
            self._held += 1
            return
        self._still_since = None
        previous = self._sent if self._sent is not None else seen.position
        target = runner.robot.aim(seen, asked, previous)
        allowed = runner.guard.allow(target, seen, previous)
        if allowed.counted:
            runner.journal.write("clipped", quiet=True, text="; ".join(allowed.clipped))
        self._send(allowed.target)
        self._acted += 1
        if runner.recorder is not None:
            action = runner.robot.carried_out(seen, allowed.target, asked)
            runner.recorder.add(seen, action, asked, allowed.counted)

    def _hold(self, seen: RobotObservation, now: int) -> None:
        """Stay where the arm is now, with the gripper as it was sent; once."""
        if self._still_since is not None:
            return
        self._still_since = now
        still = seen.position.copy()
        if self._sent is not None:
            still = np.where(self._runner.guard.ramps, self._sent, still)
        self._send(self._runner.guard.inside(still))

    def _send(self, target: np.ndarray) -> None:
        runner = self._runner
        if runner.dry:
            runner.journal.write("would send", target=[round(float(value), 4) for value in target])
        else:
            try:
                runner.estop.sends(lambda: runner.robot.act(target))
            except Stopped:
                raise
            except (RoveError, OSError) as error:
                raise Stopped("robot_failed", str(error)) from error
        self._sent = target
