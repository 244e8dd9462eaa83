import io

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
    assert lines == ["resumed from [best]", f"19/20 · {expected}", f"20/20 · {expected} · 0:00 left"]


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
