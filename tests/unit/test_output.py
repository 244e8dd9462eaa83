"""What is printed ends no work: streams that are closed, full, gone, or of another encoding."""

from __future__ import annotations

import io
import os
import subprocess
import sys

import pytest

from rove.reporting.output import Output
from rove.reporting.progress import Progress

PROGRAM = """
import sys
from dataclasses import replace
from rove import cli

# A character that ASCII lacks, in a line of more bytes than a pipe holds.
cli.COMMANDS["recipes"] = replace(cli.COMMANDS["recipes"], handler=lambda *_: print("→" * 99_999))
sys.exit(cli.main(["recipes"]))
"""
METRICS = {"rollout/success": 0.5, "rollout/episodes": 64, "time/training": 1.0}


def closed() -> io.StringIO:
    stream = io.StringIO()
    stream.close()
    return stream


def ascii_only() -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(), encoding="ascii", write_through=True)


@pytest.mark.parametrize(
    "stream",
    [None, closed(), ascii_only(), open("/dev/full", "w")],  # noqa: SIM115
    ids=["none", "closed", "ascii", "full"],
)
def test_a_run_goes_on_whatever_becomes_of_its_output(stream, monkeypatch):
    monkeypatch.setattr(sys, "stdout", stream)
    with Progress("demo", 2) as progress:
        progress.message("a · b → c")
        progress.phase("collect", 4)
        progress.advance()
        progress.iteration(1, METRICS)
    monkeypatch.undo()
    if isinstance(stream, io.TextIOWrapper) and stream.encoding == "ascii":
        assert b"a \\xb7 b \\u2192 c" in stream.buffer.getvalue()  # type: ignore[attr-defined]


def test_the_first_failure_is_remembered_and_nothing_more_is_tried():
    with open("/dev/full", "w") as full:
        output = Output(full)
        assert output.write("lost") == 4
        output.flush()
        assert isinstance(output.error, OSError)
        output.flush()
        os.dup2(os.open(os.devnull, os.O_WRONLY), full.fileno())  # or closing it would fail


@pytest.mark.parametrize(
    ("redirection", "environment", "code", "said"),
    [
        (">/dev/full", {}, 1, "rove: error: What was printed is not complete: "),
        (">&-", {}, 0, ""),
        (">&- 2>&-", {}, 0, ""),
        ("| true", {}, 141, ""),
        ("", {"PYTHONIOENCODING": "ascii", "LC_ALL": "C"}, 0, ""),
    ],
    ids=["full", "closed", "all closed", "gone", "ascii"],
)
def test_the_exit_status_tells_of_output_that_is_lost(redirection, environment, code, said):
    command = f'set -o pipefail; "$0" -c "$1" {redirection}'
    done = subprocess.run(
        ["bash", "-c", command, sys.executable, PROGRAM],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == code
    assert done.stderr.startswith(said) and done.stderr.count("\n") == bool(said)
