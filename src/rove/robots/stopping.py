"""What stops an arm whatever else happens: signals, keys, a POST, and a loop that gives no sign of life.

An `EStop` latches: once pressed it stays so, and nothing is sent to the arm but "hold still". It is not
pressed by the loop, which may hang in a call, but by threads beside it; one of them tells the arm.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import termios
import threading
import time
import tty
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import FrameType
from typing import TextIO

from rove.errors import RoveError
from rove.robots.limits import Cause, Stopped

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
_PRESSED = {" ": "space", "\x1b": "Escape", "e": "e", "\x03": "Ctrl-C"}
"""Keys that stop."""
_LOOK = 0.005
"""Seconds between two looks at whether the arm is to stop."""


class EStop:
    """The emergency stop of one arm."""

    def __init__(self, stop: Callable[[], None], loop_late: float) -> None:
        """`stop` makes the arm hold still; it is called from a thread beside the loop. `loop_late` is the
        most seconds between two calls of `beat`, from the first on."""
        self._stop, self._late = stop, loop_late
        self._reason: Stopped | None = None
        self._beat: float | None = None
        self._sending, self._ended = threading.Lock(), False
        self.trouble = ""
        """Why the arm could not be told, where it could not."""
        self._thread = threading.Thread(target=self._watch, name="emergency stop", daemon=True)
        self._thread.start()

    def press(self, cause: Cause, text: str, number: int | None = None) -> None:
        """Stop the arm, and the run. The first cause is the one that is named.

        From any thread, and from a handler of a signal, which may have interrupted anything: it takes no
        lock, not even an event's.
        """
        self.stopped(Stopped(cause, text, number))

    def stopped(self, reason: Stopped) -> None:
        """Stop the arm for a reason that was raised; as `press`."""
        if self._reason is None:
            self._reason = reason

    @property
    def pressed(self) -> bool:
        """Whether the arm was stopped."""
        return self._reason is not None

    def check(self) -> None:
        """Raise the `Stopped` that it was pressed with."""
        if self._reason is not None:
            raise self._reason

    def wait(self, seconds: float) -> None:
        """Sleep, and raise `Stopped` as soon as it is pressed."""
        until = time.monotonic() + seconds
        self.check()
        while (left := until - time.monotonic()) > 0:
            time.sleep(min(left, _LOOK))
            self.check()

    def beat(self) -> None:
        """Give a sign of life."""
        self._beat = time.monotonic()

    def rest(self) -> None:
        """Say that no sign of life is to be expected for a while: the arm is not being moved."""
        self._beat = None

    def sends(self, send: Callable[[], None]) -> None:
        """Send something to the arm, unless it is stopped. Raises `Stopped` where it is."""
        with self._sending:
            self.check()
            send()

    def close(self) -> None:
        """End the watch; an arm that was stopped has been told then. Harmless when called twice."""
        self._ended = True
        self._thread.join(10.0)

    def _watch(self) -> None:
        while self._reason is None:
            if self._ended:
                return
            time.sleep(_LOOK)
            beat = self._beat
            if beat is not None and (silent := time.monotonic() - beat) > self._late:
                self.press("loop_late", f"the control loop has given no sign of life for {silent:.2f} s.")
        self._tell()
        # A target may have been on its way: once that call has come back the arm is told again.
        with self._sending:
            self._tell()

    def _tell(self) -> None:
        try:
            self._stop()
            self.trouble = ""
        except Exception as error:  # noqa: BLE001  # of an adapter, whatever it is: it is said, and tried again
            self.trouble = f"The arm could not be told to stop: {error}"


@contextmanager
def signals(estop: EStop) -> Iterator[None]:
    """Within the block, Ctrl-C, SIGTERM, SIGQUIT and a terminal that goes away press the e-stop."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: FrameType | None) -> None:
        estop.press("estop_signal", f"{signal.Signals(number).name} came.", number)

    before = {number: signal.signal(number, handle) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Keys:
    """The keyboard: space, Escape or e stop; what else is pressed is there to be asked for."""

    def __init__(self, estop: EStop, stream: TextIO) -> None:
        """`stream` is a terminal. One that goes away stops the arm: nobody could, from there."""
        self._estop, self._file = estop, stream.fileno()
        self._seen: list[str] = []
        self._ended = threading.Event()
        self._before = termios.tcgetattr(self._file)
        tty.setcbreak(self._file)
        self._thread = threading.Thread(target=self._read, name="keys", daemon=True)
        self._thread.start()

    def take(self) -> str | None:
        """Return the oldest key that was pressed and not yet taken."""
        return self._seen.pop(0) if self._seen else None

    def close(self) -> None:
        """Give the terminal back."""
        self._ended.set()
        self._thread.join(1.0)
        with suppress(termios.error, OSError):  # it may have gone
            termios.tcsetattr(self._file, termios.TCSADRAIN, self._before)

    def _read(self) -> None:
        while not self._ended.is_set():
            try:
                ready, _, _ = select.select([self._file], [], [], 0.1)
                content = os.read(self._file, 1) if ready else None
            except (OSError, ValueError):
                content = b""
            if content is None:
                continue
            if not content:
                self._estop.press("keyboard_lost", "the terminal has gone.")
                return
            key = content.decode(errors="replace")
            if key in _PRESSED:
                self._estop.press("estop_key", f"{_PRESSED[key]} was pressed.")
            else:
                self._seen.append(key)


@contextmanager
def keyboard(estop: EStop) -> Iterator[Keys | None]:
    """Within the block, read the keys of the terminal; None where there is none."""
    if not sys.stdin.isatty():
        yield None
        return
    keys = Keys(estop, sys.stdin)
    try:
        yield keys
    finally:
        keys.close()


@contextmanager
def button(estop: EStop, port: int, host: str = "127.0.0.1") -> Iterator[str]:
    """Within the block, POST /stop at the address that is given presses the e-stop, from any program.

    Raises RoveError where the port is taken.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            known = self.path == "/stop"
            if known:
                estop.press("estop_http", f"POST /stop came from {self.client_address[0]}.")
            text = b"Stopped\n" if known else b"POST /stop stops the arm.\n"
            self.send_response(200 if known else 404)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing: the stop itself is logged."""

    try:
        server = ThreadingHTTPServer((host, port), Handler)
    except OSError as error:
        raise RoveError(
            f"{host}:{port} cannot be listened at for the e-stop: {error}. Name another port, --stop-port."
        ) from error
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield f"http://{host}:{server.server_address[1]}/stop"
    finally:
        server.shutdown()
        server.server_close()
