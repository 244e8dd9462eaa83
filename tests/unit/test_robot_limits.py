"""What an arm may be asked to do, chunk after chunk, without an arm."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest

from rove.errors import RoveError
from rove.robots import franka, turns
from rove.robots.base import Frame, RobotObservation
from rove.robots.cameras import Cameras, Watch
from rove.robots.claim import claimed
from rove.robots.limits import AxisLimits, Guard, Limits, Stopped
from rove.robots.schedule import Schedule
from rove.robots.setup import arm

LIMITS = franka.limits((0.3, -0.3, 0.1), (0.6, 0.3, 0.5))
PERIOD = 0.05


def seen(*hand: float, velocity: float = 0.0) -> RobotObservation:
    position = np.array([*hand, 0.0, 0.0, 0.0, 1.0])
    return RobotObservation({}, position, np.full(7, velocity), np.zeros(8, np.float32), 0.0)


def sent(*hand: float) -> np.ndarray:
    return seen(*hand).position


def test_a_target_within_limits_is_sent_as_it_is() -> None:
    guard = Guard(LIMITS, PERIOD)
    target = sent(0.44, 0.01, 0.31)
    allowed = guard.allow(target, seen(0.42, 0.0, 0.3), sent(0.42, 0.0, 0.3))
    np.testing.assert_array_equal(allowed.target, target)
    assert allowed.clipped == () and guard.clips == 0


@pytest.mark.parametrize(
    ("target", "expected", "word"),
    [
        ((9.0, 0.0, 0.3), (0.48, 0.0, 0.3), "x 9.000 by its step"),
        ((0.42, -0.2, 0.3), (0.42, -0.06, 0.3), "y -0.200 by its step"),
        ((0.42, 0.0, 0.05), (0.42, 0.0, 0.24), "z 0.050 by its step"),
    ],
)
def test_a_step_is_cut_short(target, expected, word) -> None:
    allowed = Guard(LIMITS, PERIOD).allow(sent(*target), seen(0.42, 0.0, 0.3), sent(0.42, 0.0, 0.3))
    np.testing.assert_allclose(allowed.target[:3], expected)
    assert allowed.counted and word in allowed.clipped[0]


def test_the_box_has_the_last_word_and_keeps_its_margin() -> None:
    guard = Guard(LIMITS, PERIOD)
    for here in (0.59, 0.6, 0.62):  # the last one is outside already: it is sent back, however far
        allowed = guard.allow(sent(here + 0.05, 0.0, 0.3), seen(here, 0.0, 0.3), sent(here, 0.0, 0.3))
        assert allowed.target[0] == pytest.approx(0.59)


def test_a_target_moves_no_faster_than_its_speed() -> None:
    slow = LIMITS.changed({"axes": {"x": {"speed": 0.2}}})
    allowed = Guard(slow, PERIOD).allow(sent(0.46, 0.0, 0.3), seen(0.42, 0.0, 0.3), sent(0.42, 0.0, 0.3))
    assert allowed.target[0] == pytest.approx(0.43)
    assert "speed" in allowed.clipped[0]


def test_a_gripper_is_slowed_down_and_nothing_is_thought_of_it() -> None:
    guard = Guard(LIMITS, PERIOD)
    here, target = seen(0.42, 0.0, 0.3), sent(0.42, 0.0, 0.3)
    target[6] = 0.0
    before = here.position
    for expected in (0.875, 0.75, 0.625):
        allowed = guard.allow(target, here, before)
        assert allowed.target[6] == pytest.approx(expected)
        assert allowed.clipped and not allowed.counted
        before = allowed.target


def test_many_clipped_targets_in_a_row_stop_the_arm_and_one_between_them_does_not() -> None:
    guard = Guard(LIMITS.changed({"in_a_row": 3}), PERIOD)
    here, far, near = seen(0.42, 0.0, 0.3), sent(0.9, 0.0, 0.3), sent(0.43, 0.0, 0.3)
    for target in (far, far, near, far, far):
        guard.allow(target, here, here.position)
    assert guard.clips == 4
    with pytest.raises(Stopped, match="out_of_limits.*3 targets in a row.*x 0.900") as stopped:
        guard.allow(far, here, here.position)
    assert stopped.value.cause == "out_of_limits"


def test_numbers_that_are_not_finite_are_refused_then_stop_the_arm() -> None:
    guard = Guard(LIMITS, PERIOD)
    bad = np.array([0.0, np.nan])
    assert not guard.finite(bad) and not guard.finite(bad)
    assert guard.finite(np.zeros(2))
    assert not guard.finite(bad) and not guard.finite(np.array([np.inf]))
    with pytest.raises(Stopped, match="policy_refused"):
        guard.finite(bad)
    with pytest.raises(Stopped, match="policy_refused"):
        guard.allow(sent(np.nan, 0.0, 0.3), seen(0.42, 0.0, 0.3), sent(0.42, 0.0, 0.3))


@pytest.mark.parametrize(
    ("where", "cause"),
    [
        (seen(0.62, 0.0, 0.3), "outside_box"),
        (seen(0.42, 0.0, 0.3, velocity=30.0), "too_fast"),
        (seen(np.nan, 0.0, 0.3), "robot_failed"),
    ],
)
def test_an_arm_that_is_where_it_may_not_be_is_stopped(where, cause) -> None:
    with pytest.raises(Stopped) as stopped:
        Guard(LIMITS, PERIOD).check(where, None)
    assert stopped.value.cause == cause


def test_an_arm_that_goes_nowhere_is_stopped_and_one_that_lags_is_not() -> None:
    guard, target = Guard(LIMITS, PERIOD), sent(0.5, 0.0, 0.3)
    for i in range(80):  # always 5 cm behind, and on its way
        guard.check(seen(0.40 + 0.002 * i, 0.0, 0.3), sent(0.45 + 0.002 * i, 0.0, 0.3))
    guard.begin()
    # 0.08 m × 0.05 s a period; the lag of 0.15 m s is passed in the 38th.
    for _ in range(37):
        guard.check(seen(0.42, 0.0, 0.3), target)
    with pytest.raises(Stopped, match=r"does_not_follow.*x stays \+0.080"):
        guard.check(seen(0.42, 0.0, 0.3), target)


def test_no_limit_can_be_left_out_or_made_endless() -> None:
    for name, value in (
        ("camera_late", 1e9),
        ("in_a_row", 0),
        ("loop_late", float("nan")),
        ("policy_late", "no"),
    ):
        with pytest.raises(RoveError, match=f"limits.{name}"):
            LIMITS.changed({name: value})
    for value in (float("inf"), float("nan"), 0, -1.0, "fast", None, True):
        with pytest.raises(RoveError, match=r"limits.axes.x: speed"):
            LIMITS.changed({"axes": {"x": {"speed": value}}})
    with pytest.raises(RoveError, match="leave no room"):
        LIMITS.changed({"axes": {"x": {"low": 0.7}}})
    with pytest.raises(RoveError, match=r"limits.axes.x.ramp"):
        LIMITS.changed({"axes": {"x": {"ramp": True}}})
    with pytest.raises(RoveError, match="Did you mean 'policy_late'"):
        LIMITS.changed({"policy_lat": 1.0})
    with pytest.raises(RoveError, match="no axis 'w'"):
        LIMITS.changed({"axes": {"w": {}}})
    assert LIMITS.changed({"axes": {"x": {"low": 0.35}}}).axes["x"].low == 0.35


def test_chunks_of_places_are_averaged_where_they_overlap_so_that_none_jumps() -> None:
    schedule = Schedule(average=True)
    assert schedule.at(0) is None and schedule.left(0) == 0
    assert schedule.add(0, np.zeros((8, 1)), 0) == 0
    assert schedule.left(0) == 8
    # Asked for in period 4, answered in 5: its first action is for a period that has gone.
    assert schedule.add(4, np.ones((8, 1)), 5) == 1
    values = [float(action[0]) if (action := schedule.at(now)) is not None else None for now in range(5, 13)]
    older, newer = 1.0, np.exp(-0.01)
    assert values[:3] == pytest.approx([newer / (older + newer)] * 3)
    assert values[3:] == [1.0, 1.0, 1.0, 1.0, None]
    assert schedule.add(0, np.ones((8, 1)), 30) == 8  # all of it is too late
    assert schedule.at(30) is None


def test_of_chunks_of_relative_actions_the_newest_counts() -> None:
    schedule = Schedule(average=False)
    schedule.add(0, np.zeros((8, 1)), 0)
    assert schedule.add(4, np.ones((8, 1)), 5) == 1
    values = [float(action[0]) if (action := schedule.at(now)) is not None else None for now in range(5, 13)]
    assert values == [1.0] * 7 + [None]
    # One that ends sooner than the one before, as another server's might, leaves the rest of that.
    schedule.add(13, np.zeros((8, 1)), 13)
    schedule.add(14, np.ones((2, 1)), 14)
    assert [float(schedule.at(now)[0]) for now in (14, 15, 16)] == [1.0, 1.0, 0.0]


class Late(franka.Franka):
    """A Franka whose hand is seen where it was `late` seconds ago."""

    def __init__(self, late: float, speed: float) -> None:
        super().__init__("http://127.0.0.1:1", {}, LIMITS, rate=20.0)
        self.late, self.speed = late, speed

    def seen(self, velocity: tuple[float, ...] | None) -> RobotObservation:
        position = np.array([0.5, 0.1, 0.2, 0.0, 0.0, 0.3, 1.0])
        return RobotObservation(
            {},
            position,
            None if velocity is None else np.array([*velocity, 0.0]),
            np.zeros(8, np.float32),
            time.monotonic() - self.late,
        )


@pytest.mark.parametrize("speed", [1.0, 0.5])
def test_a_relative_action_is_relative_to_where_the_hand_is_when_it_is_told(speed) -> None:
    robot = Late(0.5, speed)
    seen = robot.seen((0.2, 0.0, -0.1, 0.0, 0.0, 0.4))
    action = np.array([1.0, 0.0, 0.0, 0.0, 0.0, 0.2, 1.0])
    target = robot.aim(seen, action, seen.position)
    gone = 0.5 * speed  # seconds of the arm's time
    np.testing.assert_allclose(target[:3], [0.55 + 0.2 * gone, 0.1, 0.2 - 0.1 * gone], atol=2e-3)
    np.testing.assert_allclose(target[3:6], [0.0, 0.0, 0.3 + 0.4 * gone + 0.1], atol=4e-3)
    np.testing.assert_allclose(robot.carried_out(seen, target, action), action, atol=1e-9)
    # Of an arm that does not say how fast it is nothing is made up.
    seen = robot.seen(None)
    np.testing.assert_allclose(robot.aim(seen, action, seen.position)[:3], [0.55, 0.1, 0.2], atol=1e-12)


def test_turns_from_down_and_back() -> None:
    generator = np.random.default_rng(0)
    assert turns.from_down(turns.DOWN).tolist() == [0, 0, 0]
    for _ in range(50):
        turn = generator.uniform(-1.5, 1.5, 3)
        quaternion = turns.down(turn)
        assert np.linalg.norm(quaternion) == pytest.approx(1.0)
        np.testing.assert_allclose(turns.from_down(quaternion), turn, atol=1e-12)
        np.testing.assert_allclose(turns.from_down(-quaternion), turn, atol=1e-12)
    # A quarter turn about the vertical, then down: x of the hand lies along y.
    quarter = turns.product(turns.of(np.array([0, 0, np.pi / 2])), turns.DOWN)
    np.testing.assert_allclose(turns.from_down(quarter), [0, 0, np.pi / 2], atol=1e-12)


def picture(value: int, stamp: float) -> Frame:
    return Frame(np.full((4, 4, 3), value, np.uint8), stamp, time.monotonic())


class Slow:
    """A camera that shows the scene as it was when it was asked, a while later."""

    scene = 100

    def read(self) -> Frame:
        scene = self.scene
        time.sleep(0.1)
        return picture(scene, time.monotonic())


def test_an_episode_does_not_begin_with_a_picture_of_what_was_before_it() -> None:
    camera = Slow()
    cameras = Cameras({"front": camera}, LIMITS, rate=50.0)
    try:
        cameras.start()
        for scene in (110, 120, 130):
            time.sleep(0.03)  # somewhere in the middle of a picture
            camera.scene = scene
            cameras.renew()
            assert cameras.frames()["front"].image[0, 0, 0] == scene
    finally:
        cameras.close()


def test_an_arm_that_begins_an_episode_waits_for_its_picture(monkeypatch) -> None:
    camera = Slow()
    robot = franka.Franka("http://127.0.0.1:1", {"front": camera}, LIMITS, rate=50.0)
    monkeypatch.setattr(robot, "_ask", lambda path, body=None, timeout=0.0: setattr(camera, "scene", 150))
    try:
        robot._cameras.start()
        robot.begin(0)
        assert robot._cameras.frames()["front"].image[0, 0, 0] == 150
    finally:
        robot._cameras.close()


def test_cameras_are_told_apart_from_dead_ones() -> None:
    limits = LIMITS.changed({"camera_frozen": 3, "camera_late": 0.1})
    watch = Watch("front", limits)
    for i in range(6):
        watch.take(picture(100 + i % 2, float(i)), 0.0)
        assert watch.frame().stamp == i
    watch.take(picture(101, 6.0), 0.0)
    assert watch.frame()
    watch.take(picture(101, 7.0), 0.0)
    with pytest.raises(Stopped, match="camera_frozen.*'front' gave one picture 3 times"):
        watch.frame()
    dark = Watch("front", limits)
    for i in range(3):
        dark.take(picture(i % 2, float(i)), 0.0)
    with pytest.raises(Stopped, match="camera_black"):
        dark.frame()
    stale = Watch("front", limits)
    stale.take(picture(50, 1.0), 0.0)
    stale.frame()
    time.sleep(0.12)
    stale.take(picture(60, 1.0), 0.0)  # another picture of the same moment is none
    with pytest.raises(Stopped, match="camera_stale"):
        stale.frame()


def test_one_arm_has_one_runner() -> None:
    address = f"http://arm.test:{time.monotonic_ns()}"
    with claimed(address):
        with pytest.raises(RoveError, match="run by another process"), claimed(address):
            pass
    with claimed(address):
        pass


SERL = """
adapter = "serl"
address = "http://127.0.0.1:1"
[cameras]
front = "http://127.0.0.1:1/snapshot"
[limits]
camera_late = 0.3
[limits.axes]
x = { low = 0.3, high = 0.6 }
y = { low = -0.2, high = 0.2 }
z = { low = 0.05, high = 0.4, speed = 0.5 }
"""


def test_a_file_describes_a_real_arm(tmp_path: Path) -> None:
    file = tmp_path / "lab.toml"
    file.write_text(SERL)
    found = arm(str(file), 20.0)
    assert found.limits.camera_late == 0.3
    assert found.limits.axes["z"] == AxisLimits(0.05, 0.4, 0.06, 0.5, 1.2, 0.15, 0.01)
    assert found.robot.cameras == ("front",) and not found.robot.judges


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ('"serl"', '"serle"', "Did you mean 'serl'"),
        ("y = { low = -0.2, high = 0.2 }", "", "box of a real arm has no default"),
        ("[cameras]\nfront", "[other]\nfront", "'other' is no entry"),
        ("[limits]", "scale = 3\n[limits]", "no camera|text|scale"),
        ("http://127.0.0.1:1/snapshot", "no_such_module:camera", "cannot be imported as a camera"),
        ("camera_late = 0.3", "camera_late = 300", "from 0.1 to 5.0"),
        ('adapter = "serl"', "adapter = ", "no TOML"),
    ],
)
def test_mistakes_in_it_are_said_with_the_file(tmp_path: Path, before: str, after: str, said: str) -> None:
    file = tmp_path / "lab.toml"
    assert before in SERL
    file.write_text(SERL.replace(before, after))
    with pytest.raises(RoveError, match=said) as error:
        arm(str(file), 20.0)
    assert str(error.value).startswith(str(file))


def test_limits_need_an_axis_each() -> None:
    with pytest.raises(RoveError, match="limits.in_a_row"):
        Limits({}, in_a_row=1000)
