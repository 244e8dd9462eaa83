"""Metrics over time: one JSON object a line, TensorBoard, and Weights & Biases if asked for.

A line is `{"step": 12, "rollout/success": 0.61, …}` for iteration 12, counted from 1, or
`{"sft_step": 300, "sft/loss": 1.2, …}` for an optimizer step of the warm-up. null stands for a value that
is not finite.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from rove.errors import RoveError
from rove.reporting.metrics import WARM_UP, declaration

FILE = "metrics.jsonl"
_COUNTERS = ("step", "sft_step")
_HUGE = 1e300
"""No metric is as large, and charts compute with it; NaN and infinity are not smaller."""


def read(directory: Path) -> list[dict[str, Any]]:
    """Read the logged lines of a run directory, in order; empty when nothing was logged.

    Lines that a crash cut short, or filled with zeros, are left out.
    """
    path = directory / FILE
    if not path.exists():
        return []
    return [line for text in path.read_bytes().split(b"\n")[:-1] if (line := _line(text)) is not None]


def _line(text: bytes) -> dict[str, Any] | None:
    """What was logged in a line; None where a power failure, or who else, left something else there."""
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(line, dict) or not any(type(line.get(counter)) is int for counter in _COUNTERS):
        return None
    values = [value for value in line.values() if value is not None]
    numbers = all(type(value) in (int, float) and abs(value) < _HUGE for value in values)
    return line if numbers else None


class Logger:
    """Writer of a run's metrics below its directory, each call appending one line.

    Example:
        with Logger(directory, tensorboard=True, wandb=False) as logger:
            logger.log(1, {"rollout/success": 0.61})
    """

    def __init__(self, directory: Path, *, tensorboard: bool, wandb: bool) -> None:
        """Open the sinks. Raises RoveError, with the install command, when one is not installed."""
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        self._tensorboard = _tensorboard_writer(directory) if tensorboard else None
        self._wandb = _wandb_run(directory) if wandb else None
        self._file = _rewrite(directory, read(directory))

    def keep(self, which: Callable[[Mapping[str, Any]], bool]) -> None:
        """Forget every line but these."""
        self._file.close()
        self._file = _rewrite(self._directory, [line for line in read(self._directory) if which(line)])

    def cut(self, iteration: int) -> None:
        """Forget what was logged after `iteration`, as if the run had stopped there."""
        self.keep(lambda line: line.get("step", 0) <= iteration)
        if self._tensorboard is not None:
            self._tensorboard.close()
            self._tensorboard = _tensorboard_writer(self._directory, purge_step=iteration + 1)

    def log(self, iteration: int, metrics: Mapping[str, float]) -> None:
        """Write the metrics of one iteration, flushed. Raises RoveError on a metric that is not declared."""
        self._write("step", iteration, metrics)

    def log_sft(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write the metrics of one optimizer step of the warm-up, flushed; see `log`."""
        self._write("sft_step", step, metrics)

    def _write(self, counter: str, step: int, metrics: Mapping[str, float]) -> None:
        values = {declaration(name).name: float(value) for name, value in metrics.items()}
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        try:
            self._file.write(json.dumps({counter: step, **finite}) + "\n")
            self._file.flush()
        except OSError as error:
            raise RoveError(
                f"{self._directory / FILE} cannot be written: {error.strerror}. Make room, then go on: "
                f"rove train --resume {self._directory}"
            ) from error
        if self._tensorboard is not None:
            for name, value in values.items():
                self._tensorboard.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log({counter: step, **values})

    def close(self) -> None:
        """Flush and close every sink; calling it twice is harmless."""
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()

    def __enter__(self) -> Logger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _rewrite(directory: Path, lines: Sequence[Mapping[str, Any]]) -> TextIO:
    """Replace the file by these lines, atomically, and open it at its end."""
    partial = directory / f".{FILE}.partial"
    partial.write_text("".join(json.dumps(line) + "\n" for line in lines))
    partial.replace(directory / FILE)
    return (directory / FILE).open("a")


def _tensorboard_writer(directory: Path, purge_step: int | None = None) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise RoveError(
            "TensorBoard is not installed: `pip install tensorboard`, or --logging.tensorboard false."
        ) from error
    return SummaryWriter(str(directory / "tensorboard"), purge_step=purge_step)


def _wandb_run(directory: Path) -> Any:
    try:
        import wandb  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise RoveError(
            "Weights & Biases is not installed: `pip install 'rove[wandb]'`, or --logging.wandb false."
        ) from error
    # A resumed run is a new one in the same group: wandb cannot take back the steps that were cut.
    run = wandb.init(project="rove", name=directory.name, group=directory.name, dir=directory)
    run.define_metric("*", step_metric="step")
    for group in WARM_UP:
        run.define_metric(f"{group}/*", step_metric="sft_step")
    return run
