"""Standard output and error that end no work: what cannot be printed is lost, and remembered as lost."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO, cast


class Output:
    """A stream for text in front of another one, which may be closed, full, or of an encoding that lacks
    characters: those are written as escapes; from the first failure on nothing is written any more."""

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream
        self.error: OSError | ValueError | None = None
        """The first failure; a stream that was never open is none."""

    def write(self, text: str) -> int:
        """Write as much as can be written, and claim to have written it all."""
        if self._stream is not None and self.error is None:
            try:
                try:
                    self._stream.write(text)
                except UnicodeEncodeError as error:
                    self._stream.write(text.encode(error.encoding, "backslashreplace").decode(error.encoding))
            except (OSError, ValueError) as error:  # ValueError: it is closed
                self.error = error
        return len(text)

    def flush(self) -> None:
        """Hand on what is buffered."""
        if self._stream is not None and self.error is None:
            try:
                self._stream.flush()
            except (OSError, ValueError) as error:
                self.error = error

    def isatty(self) -> bool:
        """Whether somebody looks at it."""
        try:
            return self._stream is not None and self._stream.isatty()
        except ValueError:  # it is closed
            return False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def kept() -> Iterator[Output]:
    """Within the block, printing never fails; yields what stands for standard output."""
    _open_descriptors()
    streams = sys.stdout, sys.stderr
    out, err = Output(streams[0]), Output(streams[1])
    sys.stdout, sys.stderr = cast(TextIO, out), cast(TextIO, err)
    try:
        yield out
    finally:
        sys.stdout, sys.stderr = streams
        for output in (out, err):
            output.flush()
            if output.error is not None:
                _discard(output)


def _open_descriptors() -> None:
    """Open what of descriptors 0 to 2 is closed, or the next file to be opened would be printed into."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)


def _discard(output: Output) -> None:
    """Give what is still in a buffer somewhere to go, or the interpreter would fail on it at its end."""
    with suppress(OSError, ValueError):  # it is closed, or has no descriptor
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, output.fileno())
        os.close(null)
