import io
import subprocess
import sys

import pytest
from rich.console import Console

from rove.reporting.progress import Progress

METRICS = {
    "rollout/success": 0.5,
    "rollout/episodes": 64,
    "time/simulation": 3.0,
    "time/training": 1.0,
    "speed/env_steps_per_second": 1934.2,
}


def test_without_a_terminal_an_iteration_is_one_line():
    stream = io.StringIO()
    with Progress("demo", 20, console=Console(file=stream, highlight=False)) as progress:
        progress.message("resumed from [best]")
        for iteration in (19, 20):
            progress.phase("collect", 4)
            progress.advance(3)
            progress.iteration(iteration, METRICS)
    lines = stream.getvalue().splitlines()
    expected = "success 50.0 % [38.1, 61.9] · 1,934 steps/s · simulation 75% · training 25%"
    assert lines == [
        "resumed from [best]", "collect: 0/4", f"19/20 · {expected}", f"20/20 · {expected} · 0:00 left",
    ]  # fmt: skip


def test_without_a_terminal_a_long_phase_tells_how_far_it_is(monkeypatch):
    now = 0.0
    monkeypatch.setattr("time.perf_counter", lambda: now)
    stream = io.StringIO()
    with Progress("demo", 20, console=Console(file=stream, highlight=False)) as progress:
        progress.phase("sft", 100)
        for _ in range(100):
            now += 0.5
            progress.advance()
    assert stream.getvalue().splitlines() == [
        "sft: 0/100", "sft: 30/100 · 0:15", "sft: 60/100 · 0:30", "sft: 90/100 · 0:45",
    ]  # fmt: skip


def test_lines_reach_a_pipe_at_once():
    """The first line is there while the phase still goes on."""
    code = (
        "import time\nfrom rove.reporting.progress import Progress\n"
        "with Progress('demo', 1) as progress:\n    progress.phase('demonstrate', 8)\n    time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "demonstrate: 0/8\n"
        assert process.poll() is None
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_live_view_fits_the_terminal(width):
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=width, color_system=None)
    progress = Progress("demo", 20, console=console)
    progress.phase("sft", 1000)
    progress.iteration(1, METRICS | {"eval/success": 0.75, "eval/episodes": 128})
    progress.phase("update", 6)
    progress.iteration(2, {})
    progress.phase("update", 6)
    progress.advance(2)
    console.print(progress._view())
    lines = stream.getvalue().splitlines()
    assert all(len(line.rstrip()) <= width for line in lines)
    rows = {line.split()[0]: line for line in lines if line.strip()}
    assert rows["iteration"].split()[2] == "2/20"
    assert "sft" not in rows
    assert rows["update"].rstrip().endswith("2/6")
    assert rows["success"].rstrip().endswith("50.0 % [38.1, 61.9]")
    assert rows["held-out"].rstrip().endswith("75.0 % [66.8, 81.7]")
    assert "simulation 75%  training 25%" in lines[-1]
