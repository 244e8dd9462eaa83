"""What an arm may be asked to do, and what ends a run. All limits are on this side: servers check nothing.

Every limit has a value, and there is no switch that turns one off: a file may move them, within ranges.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

import numpy as np

from rove.errors import RoveError, nearest
from rove.robots.base import RobotObservation

Cause = Literal[
    "camera_black", "camera_frozen", "camera_stale", "policy_late", "policy_gone", "policy_refused",
    "out_of_limits", "outside_box", "too_fast", "does_not_follow", "loop_late", "robot_failed",
    "runner_failed",
    "estop_signal", "estop_key", "estop_http", "keyboard_lost",
]  # fmt: skip
"""Everything that stops an arm."""


class Stopped(RoveError):
    """The arm was stopped, and holds still."""

    def __init__(self, cause: Cause, text: str, signal: int | None = None) -> None:
        super().__init__(f"The arm was stopped ({cause}): {text}")
        self.cause: Cause = cause
        self.signal = signal
        """Number of the signal that did it, where one did."""


@dataclass(frozen=True, slots=True)
class AxisLimits:
    """Limits of one axis, in its own unit: metres, radians, or for a gripper the share that it is open."""

    low: float
    high: float
    """The arm stays between them."""
    step: float
    """Most that a target is away from where the axis is."""
    speed: float
    """Most that a target moves in a second."""
    fastest: float
    """Units a second that the axis never reaches: one that does is stopped."""
    lag: float
    """Most of position error × time, unit × s, while the axis goes nowhere; an error below a sixth of `step`
    is none."""
    margin: float = 0.0
    """How far targets stay away from `low` and `high`: an arm overshoots."""
    ramp: bool = False
    """Whether what is asked for jumps by nature, as "open" and "close" of a gripper do: it is then slowed
    down, and nothing is thought of it."""

    def __post_init__(self) -> None:
        for name in ("low", "high", "step", "speed", "fastest", "lag", "margin"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise RoveError(f"{name} = {value!r} is no limit: give a finite number.")
        for name in ("step", "speed", "fastest", "lag"):
            if getattr(self, name) <= 0:
                raise RoveError(f"{name} = {getattr(self, name)} would let nothing move: give more than 0.")
        if self.margin < 0 or self.low + self.margin >= self.high - self.margin:
            raise RoveError(
                f"low = {self.low}, high = {self.high} and margin = {self.margin} leave no room: low + "
                "margin has to be below high - margin."
            )


_NONE = 6.0
"""Part of `step` below which a position error is none."""
_RANGES = {
    "in_a_row": (1, 200), "refused": (1, 20),
    "policy_late": (0.2, 60.0), "policy_gone": (0.5, 600.0), "camera_late": (0.1, 5.0),
    "camera_frozen": (2, 100), "camera_black": (0.5, 64.0), "loop_late": (0.1, 2.0),
}  # fmt: skip
"""What each number of `Limits` may be set to."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of an arm and of what is around it."""

    axes: Mapping[str, AxisLimits]
    """By name, in the order of the arm's axes."""
    in_a_row: int = 20
    """Targets that may be clipped one after the other, before the arm is stopped."""
    refused: int = 3
    """Answers, or actions, that may be refused one after the other."""
    policy_late: float = 5.0
    """Seconds that one answer may take."""
    policy_gone: float = 30.0
    """Seconds in which a server that went away has to be back; the arm holds still meanwhile."""
    camera_late: float = 0.5
    """Seconds in which each camera has to give a new picture."""
    camera_frozen: int = 10
    """Pictures that may be the same, bit by bit."""
    camera_black: float = 4.0
    """Mean of a picture's values, of 255, below which it is black."""
    loop_late: float = 0.5
    """Seconds without a sign of the control loop after which the arm is stopped from beside it."""

    def __post_init__(self) -> None:
        for name, (low, high) in _RANGES.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
                raise RoveError(f"limits.{name} = {value!r}: give a number from {low} to {high}.")

    def changed(self, found: Mapping[str, Any]) -> Limits:
        """Return these limits with those of a setup file in their place: numbers, and `axes` by name.

        Raises RoveError on a limit or an axis that there is not, and on a value that is none.
        """
        known = {f.name for f in fields(self)}
        if unknown := [name for name in found if name not in known]:
            raise RoveError(f"There is no limits.{unknown[0]}. {nearest(unknown[0], known)}")
        axes = dict(self.axes)
        of_axes = _table(found.get("axes", {}), "limits.axes")
        names = {f.name for f in fields(AxisLimits)} - {"ramp"}
        for axis, values in of_axes.items():
            if axis not in axes:
                raise RoveError(f"There is no axis {axis!r} in this arm. {nearest(axis, axes)}")
            given = _table(values, f"limits.axes.{axis}")
            if wrong := [name for name in given if name not in names]:
                raise RoveError(f"There is no limits.axes.{axis}.{wrong[0]}. {nearest(wrong[0], names)}")
            try:
                axes[axis] = replace(axes[axis], **given)
            except RoveError as error:
                raise RoveError(f"limits.axes.{axis}: {error}") from error
        return replace(self, **{name: value for name, value in found.items() if name != "axes"}, axes=axes)


def _table(found: Any, name: str) -> Mapping[str, Any]:
    if not isinstance(found, Mapping):
        raise RoveError(f"{name} is {found!r}: write it as a table, [{name}].")
    return found


@dataclass(frozen=True, slots=True, eq=False)
class Allowed:
    """A target as it may be sent."""

    target: np.ndarray
    """float64 [n]."""
    clipped: tuple[str, ...] = ()
    """What was changed, in words: "z 0.012 below 0.030"."""
    counted: bool = False
    """Whether one of these counts towards a stop."""


@dataclass(eq=False)
class Guard:
    """Keeps one arm within its limits, period after period of `period` seconds."""

    limits: Limits
    period: float
    clips: int = field(default=0, init=False)
    """Targets that were clipped, of all."""
    _row: int = field(default=0, init=False)
    _refused: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        axes = self.limits.axes.values()
        self._names = tuple(self.limits.axes)
        self._low, self._high = np.array([a.low for a in axes]), np.array([a.high for a in axes])
        self._step, self._speed = np.array([a.step for a in axes]), np.array([a.speed for a in axes])
        self._fastest, self._margin = np.array([a.fastest for a in axes]), np.array([a.margin for a in axes])
        self.ramps = np.array([a.ramp for a in axes])
        """bool [n]: the axes that are a gripper's."""
        self._lag, self._lags = np.zeros(len(self._names)), np.array([a.lag for a in axes])
        self._before: np.ndarray | None = None

    def inside(self, position: np.ndarray) -> np.ndarray:
        """Return the nearest place [n] within the limits, where an arm that is at `position` may stay."""
        return np.clip(position, self._low + self._margin, self._high - self._margin)

    def begin(self) -> None:
        """Begin an episode: what counts in a row begins anew."""
        self._row = self._refused = 0
        self._lag[:] = 0.0
        self._before = None

    def allow(self, target: np.ndarray, seen: RobotObservation, previous: np.ndarray) -> Allowed:
        """Return a target [n] within the limits, given where the arm is and the target before.

        Raises Stopped after `in_a_row` targets that had to be changed, and at one that is not finite.
        """
        target = np.asarray(target, float)
        if not np.isfinite(target).all():  # comparing with a limit would let it through
            raise Stopped("policy_refused", f"a target is {target.tolist()}.")
        clipped: list[str] = []
        counted = False
        # The box comes last: a target is in it whatever else is asked of it.
        for word, lower, upper in (
            ("step", seen.position - self._step, seen.position + self._step),
            ("speed", previous - self._speed * self.period, previous + self._speed * self.period),
            ("box", self._low + self._margin, self._high - self._margin),
        ):
            inside = np.clip(target, lower, upper)
            for i in np.flatnonzero(np.abs(inside - target) > 1e-9):
                clipped.append(f"{self._names[i]} {target[i]:.3f} by its {word} to {inside[i]:.3f}")
                counted |= not self.ramps[i]
            target = inside
        self.clips += counted
        self._row = self._row + 1 if counted else 0
        if self._row >= self.limits.in_a_row:
            raise Stopped(
                "out_of_limits", f"{self._row} targets in a row were out of limits, the last {clipped[-1]}."
            )
        return Allowed(target, tuple(clipped), counted)

    def finite(self, actions: np.ndarray) -> bool:
        """Tell whether an answer's actions may be carried out: one with numbers that are not finite is
        refused.

        Raises Stopped after `refused` answers in a row.
        """
        if np.isfinite(actions).all():
            self._refused = 0
            return True
        self.refuse("an action has numbers that are not finite")
        return False

    def refuse(self, why: str) -> None:
        """Count an answer that is not carried out. Raises Stopped after `refused` in a row."""
        self._refused += 1
        if self._refused >= self.limits.refused:
            raise Stopped("policy_refused", f"{self._refused} answers in a row were refused: {why}")

    def check(self, seen: RobotObservation, target: np.ndarray | None) -> None:
        """Look at where the arm is, and whether it goes where it was sent; None: it was sent nowhere.

        Raises Stopped where it is outside its box, faster than it may be, or does not follow: position error
        × time, while an axis makes no way towards its target, above `lag`.
        """
        position = seen.position
        if not np.isfinite(position).all():
            raise Stopped("robot_failed", f"the arm says that it is at {position.tolist()}.")
        beyond = np.maximum(self._low - position, position - self._high)
        # A gripper's reading, or a turn from a reference, jitters about its end.
        if (beyond > 1e-3).any():
            i = int(beyond.argmax())
            raise Stopped(
                "outside_box",
                f"{self._names[i]} is {position[i]:.3f}, outside {self._low[i]:.3f} to {self._high[i]:.3f}.",
            )
        if seen.velocity is not None:
            over = np.abs(seen.velocity) / self._fastest
            if (over > 1.0).any():
                i = int(over.argmax())
                raise Stopped(
                    "too_fast",
                    f"{self._names[i]} moves {seen.velocity[i]:.3f} a second; {self._fastest[i]:.3f} is the "
                    "most.",
                )
        if target is not None:
            self._follow(position, target)
        self._before = position

    def _follow(self, position: np.ndarray, target: np.ndarray) -> None:
        error = target - position
        way = np.zeros_like(error) if self._before is None else (position - self._before) * np.sign(error)
        # An arm that is being held, or has lost its controller, makes no way. A gripper that holds something
        # does not reach its target either, and is as it should be.
        still = (np.abs(error) > self._step / _NONE) & (way < 0.02 * np.abs(error)) & ~self.ramps
        self._lag = np.where(still, self._lag + np.abs(error) * self.period, 0.0)
        if (self._lag > self._lags).any():
            i = int((self._lag / self._lags).argmax())
            raise Stopped(
                "does_not_follow",
                f"{self._names[i]} stays {error[i]:+.3f} from its target (error × time {self._lag[i]:.3f}).",
            )


def axis_table(names: Sequence[str], limits: Sequence[AxisLimits]) -> dict[str, AxisLimits]:
    """Return limits by axis."""
    return dict(zip(names, limits, strict=True))
