"""Which arm a run is for: a simulated one by its address, any other by a file that describes it."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rove.errors import RoveError, nearest
from rove.robots.base import Robot
from rove.robots.cameras import camera, imported
from rove.robots.franka import Franka, Scale, SimulatedFranka
from rove.robots.franka import limits as franka_limits
from rove.robots.lerobot import LeRobotArm
from rove.robots.limits import Limits

_KEYS = {
    "simulated": ("address", "limits"),
    "serl": ("address", "cameras", "limits", "origin", "scale"),
    "lerobot": ("robot", "limits"),
}
"""Adapters, and the entries of a setup file that each reads besides `adapter`."""


@dataclass(frozen=True, slots=True)
class Arm:
    """An arm that is not connected yet."""

    robot: Robot
    limits: Limits
    kind: str
    """The name of its adapter."""
    instruction: str | None = None
    """What is to be done, where the arm knows."""
    speed: float = 1.0
    """Of its time: 1 but for one that is simulated."""


def arm(where: str, rate: float) -> Arm:
    """Return the arm that `where` names: the address of a simulated one, http://HOST:PORT, or a TOML file.

    Cameras are read `rate` times a second. Raises RoveError where nothing answers there, or the file has not
    what its adapter needs.
    """
    if where.startswith("http://"):
        return _simulated({"address": where}, rate)
    try:
        found = tomllib.loads(Path(where).read_text())
    except OSError as error:
        raise RoveError(
            f"{where} cannot be read: {error.strerror}. Name a setup file, or a simulated arm's address, "
            "http://HOST:PORT."
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RoveError(f"{where} is no TOML: {error}.") from error
    try:
        kind = found.pop("adapter", None)
        if kind not in _KEYS:
            raise RoveError(f"adapter = {kind!r}. {nearest(str(kind), _KEYS)}")
        if unknown := [key for key in found if key not in _KEYS[kind]]:
            raise RoveError(f"{unknown[0]!r} is no entry of a {kind} arm. {nearest(unknown[0], _KEYS[kind])}")
        return {"simulated": _simulated, "serl": _serl, "lerobot": _lerobot}[kind](found, rate)
    except RoveError as error:
        raise RoveError(f"{where}: {error}") from error


def _simulated(found: Mapping[str, Any], rate: float) -> Arm:
    robot = SimulatedFranka(_text(found, "address"), _table(found, "limits"), rate=rate)
    return Arm(robot, robot.limits, "simulated", robot.instruction, robot.speed)


def _serl(found: Mapping[str, Any], rate: float) -> Arm:
    changes = _table(found, "limits")
    axes = _table(changes, "axes")
    corners = []
    for side in ("low", "high"):
        try:
            corners.append([float(axes[axis][side]) for axis in "xyz"])
        except (KeyError, TypeError, ValueError):
            raise RoveError(
                f"The box of a real arm has no default: give {side} of [limits.axes.x], y and z, metres in "
                "the base frame."
            ) from None
    known = franka_limits(*corners).changed(changes)
    sources = _table(found, "cameras")
    if not sources:
        raise RoveError("No cameras: name each below [cameras], in the order that the policy takes them.")
    scale = _table(found, "scale")
    if unknown := [key for key in scale if key not in ("position", "rotation")]:
        raise RoveError(f"There is no scale.{unknown[0]}: there are position (m) and rotation (rad).")
    if wrong := [key for key, value in scale.items() if not _positive(value)]:
        raise RoveError(f"scale.{wrong[0]} = {scale[wrong[0]]!r}: give a number above 0.")
    origin = found.get("origin", [0.0, 0.0, 0.0])
    if not isinstance(origin, list) or len(origin) != 3 or not all(_number(value) for value in origin):
        raise RoveError(f"origin = {origin!r}: give three numbers, m.")
    robot = Franka(
        _text(found, "address"),
        {name: camera(_text(sources, name)) for name in sources},
        known,
        rate=rate,
        origin=origin,
        scale=Scale(**scale),
    )
    return Arm(robot, known, "serl")


def _lerobot(found: Mapping[str, Any], rate: float) -> Arm:
    name = _text(found, "robot")
    robot = LeRobotArm(name, imported(name, "a robot"), _table(found, "limits"))
    return Arm(robot, robot.limits, "lerobot")


def _text(found: Mapping[str, Any], name: str) -> str:
    value = found.get(name)
    if not isinstance(value, str) or not value:
        raise RoveError(f"{name} = {value!r}: give it as text.")
    return value


def _table(found: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = found.get(name, {})
    if not isinstance(value, Mapping):
        raise RoveError(f"{name} = {value!r}: write it as a table, [{name}].")
    return value


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _positive(value: Any) -> bool:
    return _number(value) and value > 0
