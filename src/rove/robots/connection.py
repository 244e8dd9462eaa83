"""HTTP to one address, over a connection that is kept: a new one each time costs as much as the answer."""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from rove.errors import RoveError

TIMEOUT = 2.0
"""Seconds that an answer may take. A loop that waits so long is stopped from beside it long before."""


class Connection:
    """Requests to one address, one after the other; from any thread."""

    def __init__(self, url: str) -> None:
        """Raises RoveError where `url` is not http://HOST:PORT, with or without a path."""
        parts = urlsplit(url)
        try:
            if parts.scheme != "http" or not parts.hostname:
                raise ValueError
            self._host, self._port = parts.hostname, parts.port or 80
        except ValueError:
            raise RoveError(f"{url!r} is no address: write http://HOST:PORT.") from None
        self.url = url.rstrip("/")
        self._path = parts.path.rstrip("/") + (f"?{parts.query}" if parts.query else "")
        self._lock = threading.Lock()
        self._open: http.client.HTTPConnection | None = None

    def get(self, path: str = "") -> tuple[bytes, Mapping[str, str]]:
        """Return the body and the headers of an answer. Raises RoveError on any but 200, OSError on none."""
        return self._ask("GET", path, None, TIMEOUT)

    def post(self, path: str, body: Any = None, timeout: float = TIMEOUT) -> bytes:
        """Send JSON, and return the answer's body. Raises RoveError on any but 200, OSError on none."""
        return self._ask("POST", path, body, timeout)[0]

    def json(self, path: str, body: Any = None) -> Any:
        """Send JSON, and return JSON. Raises RoveError where something else comes, OSError where nothing."""
        content = self.post(path, body)
        try:
            return json.loads(content)
        except ValueError:
            raise RoveError(f"{self.url}{path} answered with no JSON: {content[:60]!r}.") from None

    def _ask(self, method: str, path: str, body: Any, timeout: float) -> tuple[bytes, Mapping[str, str]]:
        content = None if body is None else json.dumps(body)
        headers = {} if body is None else {"Content-Type": "application/json"}
        with self._lock:
            kept = self._open is not None
            try:
                answer = self._once(method, path, content, headers, timeout)
            except (http.client.HTTPException, ConnectionError):
                # A server may have let go of a connection that was idle: one that is new tells.
                self.close()
                if not kept:
                    raise
                answer = self._once(method, path, content, headers, timeout)
        status, said, found = answer
        if status != 200:
            raise RoveError(
                f"{self.url}{path} answered {status}: {said[:200].decode(errors='replace').strip()}"
            )
        return said, found

    def _once(
        self, method: str, path: str, content: str | None, headers: dict[str, str], timeout: float
    ) -> tuple[int, bytes, Mapping[str, str]]:
        if self._open is None:
            self._open = http.client.HTTPConnection(self._host, self._port, timeout=timeout)
        self._open.timeout = timeout
        try:
            if self._open.sock is None:
                self._open.connect()
            else:
                self._open.sock.settimeout(timeout)
            self._open.request(method, (self._path + path) or "/", content, headers)
            answer = self._open.getresponse()
            return answer.status, answer.read(), dict(answer.headers.items())
        except BaseException:  # an interrupt too: half an answer would be taken for that of the next request
            self.close()
            raise

    def close(self) -> None:
        """Close what is open; the next request opens it again."""
        if self._open is not None:
            self._open.close()
            self._open = None
