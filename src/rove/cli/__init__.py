"""The `rove` command: parses, then delegates.

A mistake of the user (RoveError), and a machine that is full or closed to writing, print one message and exit
with 2; Ctrl-C exits with 130, the SIGTERM of a scheduler with 143. Output that cannot be printed ends
nothing: the exit status is then 1, or 141 where its reader has gone.
"""

from __future__ import annotations

import errno
import sys
from collections.abc import Sequence

from rove.cli.commands import COMMANDS
from rove.cli.parsing import parse
from rove.errors import RoveError
from rove.interrupt import Interrupted
from rove.reporting.output import kept

__all__ = ["COMMANDS", "main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    with kept() as output:
        code = _guarded(list(sys.argv[1:] if argv is None else argv))
    if code or output.error is None:
        return code
    if isinstance(output.error, BrokenPipeError):  # whoever read the output has enough of it
        return 141
    with kept():
        print(f"rove: error: What was printed is not complete: {output.error}.", file=sys.stderr)
    return 1


def _guarded(words: list[str]) -> int:
    try:
        if (parsed := parse(COMMANDS, words)) is None:
            return 0
        command, args, settings = parsed
        return command.handler(args, settings) or 0
    except Interrupted as interrupted:
        return interrupted.exit_code
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        message = str(error) if isinstance(error, RoveError) else _lack(error)
        if message is None:
            raise
        print(f"rove: error: {message}", file=sys.stderr)
        return 2


_FILES = (
    errno.EACCES, errno.EDQUOT, errno.EEXIST, errno.EFBIG, errno.EIO, errno.EISDIR, errno.ELOOP, errno.EMFILE,
    errno.ENAMETOOLONG, errno.ENFILE, errno.ENOENT, errno.ENOSPC, errno.ENOTDIR, errno.EPERM, errno.EROFS,
)  # fmt: skip
"""Errors of a file system, which no change to Rove would mend."""


_TOO_MUCH = ("DefaultCPUAllocator", "Could not allocate memory", "size calculation overflowed")
"""How PyTorch and MuJoCo tell that there is not enough memory."""


def _lack(error: Exception) -> str | None:
    """What the machine lacked, and what to do; None for an error that is none of the machine's."""
    text = str(error).strip().partition("\n")[0]
    if (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or any(words in text for words in _TOO_MUCH)
    ):
        return (
            f"Not enough memory ({text or 'MemoryError'}): lower --rollout.num_envs or --rollout.chunks, "
            "--training.micro_batch, or the sizes of the policy."
        )
    fix = "Free some space, or name another place"
    if isinstance(error, OSError) and error.errno in _FILES:
        full = error.errno in (errno.EDQUOT, errno.EFBIG, errno.ENOSPC)
        named = "A file" if error.filename is None else str(error.filename)
        return f"{named} cannot be used: {error.strerror}.{f' {fix}.' if full else ''}"
    # How PyTorch and safetensors, which are not written in Python, tell of a file system's errors.
    if "inline_container.cc" in text or "(os error " in text:
        return f"A file cannot be written: {text}. {fix}."
    return None
