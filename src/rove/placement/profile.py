"""A profile: what the parts of a recipe cost on one device each, as straight lines.

Four costs are lines a + b·rows: simulation of a chunk, inference, training, and anchoring what older weights
collected; the fifth is what publishing the weights takes. Each is measured on one device of the kind that
pays it. A profile can be saved, so that machines can be planned for that are not at hand.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rove.errors import RoveError

CPU = "cpu"
LINES = ("simulation", "inference", "training", "anchoring")


@dataclass(frozen=True, slots=True)
class Line:
    """Seconds for n rows: `fixed` + `each`·n."""

    fixed: float
    each: float

    def __call__(self, rows: float) -> float:
        return self.fixed + self.each * rows

    @staticmethod
    def fit(points: Sequence[tuple[int, float]]) -> Line:
        """Least squares on (rows, seconds), neither number below zero."""
        n = len(points)
        mean_x, mean_y = sum(x for x, _ in points) / n, sum(y for _, y in points) / n
        spread = sum((x - mean_x) ** 2 for x, _ in points)
        each = sum((x - mean_x) * (y - mean_y) for x, y in points) / spread if spread else 0.0
        each = max(each, 0.0)
        fixed = mean_y - each * mean_x
        if fixed < 0:  # a line through the origin
            return Line(0.0, sum(x * y for x, y in points) / sum(x * x for x, _ in points))
        return Line(fixed, each)


@dataclass(frozen=True, slots=True)
class Profile:
    """Costs of a recipe's parts on one device each."""

    simulation: Line
    """Seconds a chunk, of slots, on one core, or on one GPU."""
    inference: Line
    """Seconds, of rows, on one core, or on one GPU."""
    training: Line
    """Seconds of a forward-backward pass and its share of an optimizer step, of rows."""
    anchoring: Line
    """Seconds of the forward pass by which an asynchronous learner looks at what older weights collected, of
    rows."""
    sync: float
    """Seconds to publish the weights to another process."""
    scaling: dict[str, float]
    """How much faster each of these is on all cores of the measured machine than on one: with n cores,
    1 + (n − 1)·(speed-up − 1)/(all − 1)."""
    cores: int
    """Number of cores used for the measurement."""
    device: str = CPU
    """Device that inference and training were measured on, or bounded for: "cpu", or the name of a GPU."""

    def save(self, path: Path) -> None:
        """Write it as JSON."""
        path.write_text(json.dumps(asdict(self), indent=1))

    @staticmethod
    def load(path: Path) -> Profile:
        """Read what `save` wrote. Raises RoveError where that is something else."""
        try:
            data = json.loads(path.read_text())
            lines = {name: Line(**data[name]) for name in LINES}
            return Profile(**{**data, **lines})
        except (OSError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise RoveError(
                f"{path} is not a profile that this version of `rove plan --save` wrote ({error!r}): "
                "delete it, or write it again."
            ) from error

    def on(self, what: str, cores: int) -> float:
        """Speed-up of `what` on so many cores; no more is claimed than was measured."""
        if cores <= 1 or self.cores <= 1:
            return 1.0
        gain = (self.scaling[what] - 1) / (self.cores - 1)
        return max(1.0, 1 + (min(cores, self.cores) - 1) * gain)
