"""A served policy, an arm and the runner over real sockets, with everything that can go wrong between them.

At the end of each test the arm's own record, 200 times a second, is looked through: it stayed in its box.
"""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.fake_arm import BOX, HOME, FakeArm, ToyArm, fake_arm
from tests.unit import test_serving
from torch import Tensor

from rove.errors import RoveError
from rove.robots import session
from rove.robots.asking import Asker
from rove.robots.base import RobotObservation
from rove.robots.endpoints import ArmServer
from rove.robots.franka import ACTIONS
from rove.robots.journal import Journal
from rove.robots.limits import Stopped
from rove.robots.runner import Outcome, Pace, Runner
from rove.robots.setup import arm as arm_of
from rove.robots.stopping import EStop
from rove.serving.faults import FaultyServer
from rove.serving.remote import RemotePolicy
from rove.types import Observation

COMMAND = (sys.executable, "-c", "import sys; from rove.cli import main; sys.exit(main())")
CHUNK = 8
PACE = Pace(rate=20.0, horizon=400)


def waving(seen: Observation) -> Tensor:
    """To and fro along y, about where the hand begins."""
    assert seen.state is not None
    actions = torch.zeros(len(seen), CHUNK, 7)
    actions[:, :, 1] = torch.where(seen.state[:, 1] > 0, -0.4, 0.4)[:, None]
    actions[:, :, 6] = -1.0
    return actions


@pytest.fixture(scope="module")
def upstream() -> Iterator[str]:
    """The address of a policy that waves."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(test_serving, "SPEC", ACTIONS)
        patch.setattr(test_serving, "CHUNK", CHUNK)
        with test_serving.serving(waving) as served:
            yield f"ws://{served.address}"


@pytest.fixture
def policy(upstream: str) -> Iterator[FaultyServer]:
    with FaultyServer(upstream) as server:
        yield server


@pytest.fixture
def arm(tmp_path: Path) -> Iterator[tuple[ArmServer, FakeArm]]:
    with fake_arm() as made:
        yield made


class Run:
    """A run in this thread, with something that happens meanwhile."""

    def __init__(self, arm: tuple[ArmServer, FakeArm], policy: FaultyServer, folder: Path) -> None:
        self.said: list[str] = []
        server, self.arm = arm
        setup = folder / "arm.toml"
        setup.write_text(
            f'adapter = "simulated"\naddress = "http://127.0.0.1:{server.port}"\n'
            # What is looked at here is short, what is not is long: other tests may take the cores meanwhile.
            "[limits]\npolicy_gone = 1.0\npolicy_late = 0.8\ncamera_late = 1.0\nloop_late = 1.2\n"
            "axes.y.lag = 0.03\n"
        )
        self.session = session.Session(
            policy.address, str(setup), pace=PACE, log=folder / "log.jsonl", episodes=(3,)
        )

    def __call__(self, then: Callable[[], object] = lambda: None) -> list[Outcome]:
        """Run, and do something once the arm moves."""

        def wait() -> None:
            until = time.monotonic() + 60
            while len(self.arm.targets) < 12 and time.monotonic() < until:
                if self.ended:
                    return
                time.sleep(0.005)
            then()

        self.ended = False
        aside = threading.Thread(target=wait)
        aside.start()
        try:
            return session.run(self.session, self.said.append)
        finally:
            self.ended = True
            aside.join()

    def stopped(self, then: Callable[[], object]) -> Stopped:
        with pytest.raises(Stopped) as stopped:
            self(then)
        return stopped.value

    def events(self) -> list[dict]:
        assert self.session.log is not None
        return [json.loads(line) for line in self.session.log.read_text().splitlines()]


@pytest.fixture
def run(arm: tuple[ArmServer, FakeArm], policy: FaultyServer, tmp_path: Path) -> Run:
    return Run(arm, policy, tmp_path)


def rests(arm: FakeArm) -> None:
    """Assert that the arm holds still, and that nobody goes on telling it to move."""
    time.sleep(0.2)
    before, sent = arm.record()[-1, 1:4], len(arm.targets)
    time.sleep(0.15)
    np.testing.assert_allclose(arm.record()[-1, 1:4], before, atol=1e-4)
    assert len(arm.targets) == sent


def test_a_policy_moves_the_arm_without_a_pause_and_success_ends_it(policy, tmp_path) -> None:
    with fake_arm(success_after=40) as made:
        run, arm = Run(made, policy, tmp_path), made[1]
        (outcome,) = run()
        assert outcome.success and outcome.actions in range(36, 42)
        assert arm.episodes == [3]
        # The first chunk is waited for; no other is.
        assert outcome.held <= 8
        assert outcome.clipped == 0
        times = np.array([when for when, _ in arm.targets])[1:-1]
        assert np.median(np.diff(times)) == pytest.approx(0.05, abs=0.02)
        y = arm.record()[:, 2]
        assert y.max() > 0.005 and y.max() - y.min() < 0.4  # it looks once a chunk, of 16 cm
        rests(arm)
    assert [event["event"] for event in run.events()][-1] == "episode"


@pytest.mark.parametrize(
    ("fault", "cause", "within"),
    [
        ("frozen", "camera_frozen", 2.0),
        ("black", "camera_black", 1.0),
        ("stale", "camera_stale", 2.0),
        ("stuck", "does_not_follow", 3.0),
        ("slow", "loop_late", 4.0),
    ],
)
def test_a_fault_of_the_arm_or_of_its_camera_stops_it(run, arm, fault, cause, within) -> None:
    def fail() -> None:
        begun.append(time.monotonic())
        arm[0].fault = fault

    begun: list[float] = []
    assert run.stopped(fail).cause == cause
    assert time.monotonic() - begun[0] < within + 1.0
    assert run.events()[-1]["cause"] == cause
    arm[0].fault = None
    rests(arm[1])


def test_a_server_that_is_killed_in_a_chunk_is_waited_for_with_the_arm_at_rest(run, arm, policy) -> None:
    resting: list[np.ndarray] = []

    def kill() -> None:
        policy.fault = "gone"
        time.sleep(0.8)
        resting.append(arm[1].record()[-40:, 1:4])
        policy.fault = None

    run.session = replace(run.session, pace=replace(PACE, horizon=50))
    (outcome,) = run(kill)
    assert outcome.actions == 50 and outcome.held > 5
    assert np.ptp(resting[0], axis=0).max() < 1e-3
    assert "gone" in [event["event"] for event in run.events()]


def test_a_server_that_stays_away_stops_the_run(run, arm, policy) -> None:
    def kill() -> None:
        policy.fault = "gone"

    assert run.stopped(kill).cause == "policy_gone"
    rests(arm[1])


def test_a_server_that_says_nothing_stops_the_run(run, arm, policy) -> None:
    def hush() -> None:
        policy.fault = "silent"

    assert run.stopped(hush).cause == "policy_late"
    policy.fault = None
    rests(arm[1])


def test_answers_that_come_late_make_the_arm_wait_and_are_said(run, arm, policy) -> None:
    policy.fault = "late"
    run.session = replace(run.session, pace=replace(PACE, horizon=24))
    (outcome,) = run()
    assert outcome.actions == 24
    assert outcome.held > 10
    # 0.5 s are ten periods, a chunk eight: what was asked for while the arm moved is too late, and said so.
    assert outcome.dropped >= 1
    assert any(event["event"] == "dropped" for event in run.events())


def test_actions_that_are_no_numbers_are_refused(run, arm, policy) -> None:
    def spoil() -> None:
        policy.fault = "nan"

    stopped = run.stopped(spoil)
    assert stopped.cause == "policy_refused" and "not finite" in str(stopped)
    assert [event["event"] for event in run.events()].count("refused") == 3
    rests(arm[1])


def test_a_policy_that_leaves_the_box_is_held_back_then_stopped(run, arm, policy) -> None:
    def push() -> None:
        policy.fault = "far"

    assert run.stopped(push).cause == "out_of_limits"
    clips = [event for event in run.events() if event["event"] == "clipped"]
    assert any("by its box" in event["text"] for event in clips)
    # It went as far as it may, and no farther.
    assert BOX[1][0] - 0.02 < arm[1].record()[:, 1].max() <= BOX[1][0]
    rests(arm[1])


def test_a_post_stops_the_arm_within_a_period(run, arm) -> None:
    def press() -> None:
        url = next(text for text in run.said if "POST http" in text).rsplit("POST ")[-1].rstrip(".")
        urllib.request.urlopen(urllib.request.Request(url, method="POST"), timeout=5).read()
        pressed.append(time.monotonic())

    pressed: list[float] = []
    assert run.stopped(press).cause == "estop_http"
    last, where = arm[1].targets[-1]
    assert last - pressed[0] < 0.2
    # It was told to stay where it was then, not where it was going.
    np.testing.assert_allclose(where[:3], arm[1].record()[-1, 1:4], atol=5e-3)
    rests(arm[1])


def test_a_dry_run_sends_nothing(run, arm) -> None:
    run.session = replace(run.session, dry=True, pace=replace(PACE, horizon=10))
    run()
    assert arm[1].targets == [] and arm[1].episodes == []
    np.testing.assert_array_equal(arm[1].record()[-1, 1:4], HOME[:3])
    shown = [event["target"] for event in run.events() if event["event"] == "would send"]
    assert len(shown) >= 10 and len(shown[0]) == 7


def test_what_goes_wrong_before_the_arm_moves_is_said_in_a_line(run, arm, policy) -> None:
    policy.fault = "gone"
    with pytest.raises(RoveError, match="Nobody serves a policy"):
        run()
    policy.fault = None
    run.session = replace(run.session, policy="ws://127.0.0.1:1")
    with pytest.raises(RoveError, match="Nobody serves a policy"):
        run()
    run.session = replace(run.session, policy=policy.address, arm="http://127.0.0.1:1")
    with pytest.raises(RoveError, match="rove simulate TASK"):
        run()
    run.session = replace(run.session, arm=policy.address.replace("ws", "http"))
    with pytest.raises(RoveError):
        run()
    run.session = replace(run.session, arm=f"http://127.0.0.1:{arm[0].port}", pace=Pace(rate=1.0))
    with pytest.raises(RoveError, match="higher --rate"):
        run()
    assert arm[1].targets == []


@pytest.mark.parametrize(("how", "cause"), [("key", "estop_key"), ("lost", "keyboard_lost")])
def test_a_key_and_a_lost_terminal_stop_the_arm(run, arm, how, cause, monkeypatch) -> None:
    ours, theirs = pty.openpty()
    pressed: list[float] = []

    def press() -> None:
        pressed.append(time.monotonic())
        if how == "key":
            os.write(ours, b"x ")
        else:
            os.close(ours)

    with open(theirs) as terminal:
        monkeypatch.setattr(sys, "stdin", terminal)
        # A process that has this terminal would be told by SIGHUP too.
        assert run.stopped(press).cause == cause
    if how == "key":
        os.close(ours)
    assert arm[1].targets[-1][0] - pressed[0] < 0.2
    rests(arm[1])


@pytest.mark.parametrize(("key", "success"), [("s", True), ("f", False)])
def test_a_person_says_how_it_went(run, arm, key, success, monkeypatch) -> None:
    ours, theirs = pty.openpty()
    with open(theirs) as terminal:
        monkeypatch.setattr(sys, "stdin", terminal)
        (outcome,) = run(lambda: os.write(ours, key.encode()))
    os.close(ours)
    assert outcome.success is success
    rests(arm[1])


def test_a_real_arm_waits_for_a_person_who_also_says_how_it_went(run, arm, tmp_path, monkeypatch) -> None:
    setup = tmp_path / "lab.toml"
    axes = "\n".join(f"{n} = {{ low = {a}, high = {b} }}" for n, a, b in zip("xyz", *BOX, strict=True))
    address = f"http://127.0.0.1:{arm[0].port}"
    setup.write_text(
        f'adapter = "serl"\naddress = "{address}"\n[cameras]\nfront = "{address}/camera/front"\n'
        f"[limits]\ncamera_late = 1.0\nloop_late = 1.2\n[limits.axes]\n{axes}\n"
    )
    run.session = replace(run.session, arm=str(setup), instruction="reach")
    ours, theirs = pty.openpty()

    def come() -> None:
        while not any("press Enter" in text for text in run.said):
            time.sleep(0.01)
        time.sleep(0.3)
        assert arm[1].episodes == [] and arm[1].targets == []
        os.write(ours, b"\n")

    person = threading.Thread(target=come)
    person.start()
    with open(theirs) as terminal:
        monkeypatch.setattr(sys, "stdin", terminal)
        (outcome,) = run(lambda: os.write(ours, b"s"))
    person.join()
    os.close(ours)
    assert outcome.success is True and outcome.actions > 5
    assert arm[1].episodes == [None]
    rests(arm[1])


def test_sigterm_stops_the_arm_of_a_process_that_is_its_only_one(run, arm, policy) -> None:
    words = ("robot", policy.address, "--arm", f"http://127.0.0.1:{arm[0].port}", "--horizon", "4000")
    process = subprocess.Popen(
        [*COMMAND, *words], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        until = time.monotonic() + 120
        while len(arm[1].targets) < 20:
            assert time.monotonic() < until and process.poll() is None, "the arm does not move"
            time.sleep(0.02)
        with pytest.raises(RoveError, match=f"another process .{process.pid}."):
            run()
        process.send_signal(signal.SIGTERM)
        pressed = time.monotonic()
        output, errors = process.communicate(timeout=60)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 143, errors
    assert "estop_signal" in errors.decode() and "SIGTERM came" in output.decode()
    assert arm[1].targets[-1][0] - pressed < 0.2
    rests(arm[1])


# --- LeRobot's interface --------------------------------------------------------------------------

TOY = """
adapter = "lerobot"
robot = "tests.fake_arm:ToyArm"
[limits.axes."shoulder.pos"]
low = -30.0
high = 30.0
step = 10.0
speed = 100.0
fastest = 500.0
lag = 50.0
[limits.axes."gripper.pos"]
low = 0.0
high = 100.0
step = 100.0
speed = 200.0
fastest = 500.0
lag = 50.0
ramp = true
"""


def test_an_arm_of_lerobots_is_driven_within_its_limits(tmp_path: Path, monkeypatch) -> None:
    file = tmp_path / "toy.toml"
    file.write_text(TOY)
    found = arm_of(str(file), 20.0)
    toy = ToyArm.made[-1]

    def far(seen: Observation) -> Tensor:
        return torch.tensor([[[90.0, 0.0]]]).expand(len(seen), CHUNK, 2)

    monkeypatch.setattr(
        test_serving, "SPEC", replace(found.robot.action_spec, low=(-99.0, 0.0), high=(99.0, 99.0))
    )
    monkeypatch.setattr(test_serving, "CHUNK", CHUNK)
    with test_serving.serving(far) as served:
        remote = RemotePolicy(f"ws://{served.address}", connections=1)
        with pytest.raises(RoveError, match="terminal"):
            session.run(
                session.Session(f"ws://{served.address}", str(file), instruction="go"), lambda text: None
            )
        found.robot.connect()
        estop = EStop(found.robot.stop, 0.5)
        asker = Asker(remote, replace(found.robot.action_spec, low=(-99.0, 0.0), high=(99.0, 99.0)), "go")
        kept = Kept()
        runner = Runner(found.robot, asker, found.limits, estop, Journal(None), Pace(20.0, 100), kept)
        with pytest.raises(Stopped, match="out_of_limits"):
            runner.run([0])
        estop.close()
        asker.close()
    found.robot.close()
    shoulder = np.array([action["shoulder.pos"] for action in toy.sent])
    assert shoulder.max() == 30.0 and np.abs(np.diff(shoulder)).max() <= 5.0 + 1e-9
    assert min(action["gripper.pos"] for action in toy.sent) == 0.0
    assert not toy.connected
    # What was carried out is kept beside what was asked for, and the episode is ended though nobody said how.
    # Else the arm holds still: at the end, twice, and wherever an answer came too late.
    assert kept.ended == [None]
    assert [row[1][0] for row in kept.rows] == [90.0] * len(kept.rows)
    carried_out, still = iter([row[0][0] for row in kept.rows]), 0
    awaited, before = next(carried_out), 0.0
    for sent in shoulder:
        if awaited is not None and sent == pytest.approx(awaited):
            awaited = next(carried_out, None)
        else:
            assert sent == before
            still += 1
        before = sent
    assert awaited is None and still >= 2
    assert all(row[2] for row in kept.rows)


class Kept:
    """A `Recorder` that keeps rows of action, what was asked for, and whether limits changed it."""

    def __init__(self) -> None:
        self.rows: list[tuple[np.ndarray, np.ndarray, bool]] = []
        self.ended: list[bool | None] = []

    def add(
        self, observation: RobotObservation, action: np.ndarray, asked: np.ndarray, clipped: bool
    ) -> None:
        self.rows.append((action, asked, clipped))

    def end_episode(self, success: bool | None) -> None:
        self.ended.append(success)

    def close(self) -> None:
        pass


def test_a_run_is_recorded_as_a_data_set(policy, tmp_path) -> None:
    pytest.importorskip("pyarrow")
    with fake_arm(success_after=30) as made:
        run = Run(made, policy, tmp_path)
        folder = tmp_path / "data"
        run.session = replace(run.session, record=folder, episodes=(0, 1))
        outcomes = run()
    info = json.loads((folder / "meta" / "info.json").read_text())
    assert info["total_episodes"] == 2 and info["fps"] == 20
    assert info["total_frames"] == sum(outcome.actions for outcome in outcomes)
    assert {"action", "policy_action", "observation.state", "observation.images.front"} < set(
        info["features"]
    )


def test_what_is_not_known_of_an_arm_of_lerobots_is_asked_for(tmp_path: Path) -> None:
    file = tmp_path / "toy.toml"
    for before, after, said in (
        ('[limits.axes."gripper.pos"]', '[limits.axes."other.pos"]', "limits of 'gripper.pos' are not given"),
        ("speed = 100.0\n", "", "shoulder.pos.*speed"),
        (":ToyArm", ":NoArm", "cannot be imported as a robot"),
        (":ToyArm", ":BOX", "is a tuple"),
    ):
        file.write_text(TOY.replace(before, after, 1))
        with pytest.raises(RoveError, match=said):
            arm_of(str(file), 20.0)
