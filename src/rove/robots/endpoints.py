"""The HTTP interface of a Franka in SERL's set-ups, for an arm that is simulated.

Every route of franka_server.py is POST, JSON in and out, plain text for commands. Besides, an arm that is
simulated has cameras (GET /camera/NAME), says what its task is and whether it is done (/task), hands out its
own record (GET /record), and can be made to fail (/fault).
"""

from __future__ import annotations

import io
import json
import math
import time
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Protocol

import numpy as np
from PIL import Image

from rove.errors import RoveError, nearest
from rove.robots.cameras import STAMP

FAULTS = ("frozen", "black", "stale", "stuck", "slow")
"""What can be made to go wrong: cameras that repeat their picture, that are black, that take none; an arm
that takes no targets; answers that take 0.7 s."""
_SLOW = 0.7
"""Seconds that an answer takes while it is to be slow."""


class Arm(Protocol):
    """An arm behind the routes. Called from several threads."""

    cameras: tuple[str, ...]

    def state(self) -> Mapping[str, Any]:
        """What /getstate answers."""
        ...

    def go(self, pose: np.ndarray) -> None:
        """Set the equilibrium pose [7]: position, quaternion x, y, z, w, in the base frame."""
        ...

    def grip(self, opening: float) -> None:
        """Move the gripper to a share of its opening, 0 shut to 1 open."""
        ...

    def reset(self, episode: int | None) -> None:
        """Go home; with an episode's number, put the scene back too."""
        ...

    def picture(self, camera: str) -> tuple[np.ndarray, float]:
        """Take a picture, uint8 [H, W, 3], and say when it was taken, s."""
        ...

    def task(self) -> Mapping[str, Any]:
        """What /task answers."""
        ...

    def record(self) -> np.ndarray:
        """Where the arm was, float64 [n, columns], at its own rate; see `rove.robots.simulated.COLUMNS`."""
        ...

    def close(self) -> None:
        """Let the arm be; harmless when called twice."""
        ...


_READ = {
    "/getpos": "pose", "/getvel": "vel", "/getforce": "force", "/gettorque": "torque", "/getq": "q",
    "/getdq": "dq", "/getjacobian": "jacobian", "/get_gripper": "gripper_pos",
}  # fmt: skip
"""Routes that answer with one entry of the state."""
_SAID = {
    "/activate_gripper": "Activated", "/reset_gripper": "Reset", "/clearerr": "Clear", "/startimp": "Started",
    "/stopimp": "Stopped", "/update_param": "Updated compliance parameters",
}  # fmt: skip
"""Routes that change nothing of a simulated arm."""


class _Refused(RoveError):
    """A body that is not what the route takes."""


class ArmServer(ThreadingHTTPServer):
    """A server of one arm; `serve_forever` and `shutdown` as of any of the standard library."""

    daemon_threads = True
    fault: str | None = None
    """What goes wrong now: one of `FAULTS`, or nothing."""

    arm: Arm
    """Set before it serves: the port is taken first, so that nobody waits for an arm to be refused it."""

    def __init__(self, host: str, port: int) -> None:
        """Take the port. Raises RoveError where it is taken."""
        self._last: dict[str, tuple[np.ndarray, float]] = {}
        try:
            super().__init__((host, port), _Handler)
        except (OSError, OverflowError) as error:
            raise RoveError(
                f"{host}:{port} cannot be listened at: {error}. Name another with --host or --port; --port 0 "
                "takes any that is free."
            ) from error

    def close(self) -> None:
        """Give the port back."""
        self.server_close()

    @property
    def port(self) -> int:
        """Where it listens."""
        return self.server_address[1]

    def picture(self, camera: str) -> tuple[np.ndarray, float]:
        """A picture of a camera, as it is or as it fails."""
        image, stamp = self.arm.picture(camera)
        last = self._last.setdefault(camera, (image, stamp))
        match self.fault:
            case "frozen":
                return last[0], stamp
            case "stale":
                return last
            case "black":
                return np.zeros_like(image), stamp
        self._last[camera] = image, stamp
        return image, stamp


class _Handler(BaseHTTPRequestHandler):
    server: ArmServer
    protocol_version = "HTTP/1.1"  # connections are kept
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        name = self.path.rsplit("/", 1)[-1]
        if self.path == "/record":
            content = io.BytesIO()
            np.save(content, self.server.arm.record())
            self._send(content.getvalue(), "application/octet-stream")
        elif self.path == f"/camera/{name}" and name in self.server.arm.cameras:
            image, stamp = self.server.picture(name)
            content = io.BytesIO()
            Image.fromarray(image).save(content, "png", compress_level=1)
            self._send(content.getvalue(), "image/png", {STAMP: repr(stamp)})
        else:
            self._send(f"There is no {self.path} here.\n".encode(), status=404)

    def do_POST(self) -> None:
        if self.server.fault == "slow" and self.path != "/fault":
            time.sleep(_SLOW)
        try:
            answer = self._answer(self._body())
        except RoveError as error:
            self._send(f"{error}\n".encode(), status=400)
            return
        if isinstance(answer, str):
            self._send(answer.encode())
        else:
            self._send(json.dumps(answer).encode(), "application/json")

    def _answer(self, body: Mapping[str, Any]) -> str | Mapping[str, Any]:
        arm, path = self.server.arm, self.path
        if path in _READ:
            return {_READ[path].replace("gripper_pos", "gripper"): arm.state()[_READ[path]]}
        if path in _SAID:
            return _SAID[path]
        match path:
            case "/getstate":
                return arm.state()
            case "/task":
                return arm.task()
            case "/pose":
                pose = _numbers(body.get("arr"), 7)
                if self.server.fault != "stuck":
                    arm.go(pose)
                return "Moved"
            case "/move_gripper":
                arm.grip(_opening(body.get("gripper_pos")))
                return "Moved Gripper"
            case "/open_gripper":
                arm.grip(1.0)
                return "Opened"
            case "/close_gripper":
                arm.grip(0.0)
                return "Closed"
            case "/jointreset":
                arm.reset(_episode(body))
                return "Reset Joint"
            case "/fault":
                return self._fail(body.get("name"))
        raise _Refused(f"There is no {path} here.")

    def _fail(self, name: Any) -> str:
        if name is not None and name not in FAULTS:
            raise _Refused(f"There is no fault {name!r}. {nearest(str(name), FAULTS)}")
        self.server.fault = name
        return "Failing" if name else "Well"

    def _body(self) -> Mapping[str, Any]:
        try:
            content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            found = json.loads(content) if content else {}
        except ValueError:
            raise _Refused("The body is no JSON.") from None
        if not isinstance(found, Mapping):
            raise _Refused("The body is no JSON object.")
        return found

    def _send(
        self, content: bytes, kind: str = "text/plain", headers: Mapping[str, str] = {}, status: int = 200
    ) -> None:
        try:
            self.send_response(status)
            for name, value in {"Content-Type": kind, "Content-Length": str(len(content)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)
        except ConnectionError:
            self.close_connection = True  # whoever asked has gone

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing of each request: there are sixty a second."""


def _numbers(found: Any, count: int) -> np.ndarray:
    try:
        values = np.array(found, float)
    except (TypeError, ValueError):
        values = np.empty(0)
    if values.shape != (count,) or not np.isfinite(values).all():
        raise _Refused(f"arr is {found!r:.80}: expected {count} finite numbers.")
    return values


def _opening(found: Any) -> float:
    """A Robotiq's number, 0 open to 255 shut, as the share that it is open."""
    if isinstance(found, bool) or not isinstance(found, int | float) or not math.isfinite(found):
        raise _Refused(f"gripper_pos is {found!r:.40}: expected a number from 0 to 255.")
    return 1.0 - min(max(found, 0), 255) / 255


def _episode(body: Mapping[str, Any]) -> int | None:
    episode = body.get("episode")
    if episode is not None and (isinstance(episode, bool) or not isinstance(episode, int) or episode < 0):
        raise _Refused(f"episode is {episode!r:.40}: expected a number from 0 on.")
    return episode
