"""Settings of a flow policy that no published checkpoint has: how it draws actions, what is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from rove.config.ranges import PositiveFloat, PositiveInt, Range, Size
from rove.errors import RoveError

Freeze = Literal["none", "vision", "vlm"]
"""What is not trained: nothing, the vision tower, or all that the prefix is made by (the VLM, and in SmolVLA
the projection of the state, which is a part of the prefix)."""
FREEZES: tuple[Freeze, ...] = ("none", "vision", "vlm")


@dataclass(frozen=True, slots=True)
class FlowSampling:
    """How actions are drawn: the chain's steps, which of them are stochastic, and their noise."""

    steps: PositiveInt = 4
    """Denoising steps, K."""
    noise: Literal["sde", "cps", "learned"] = "sde"
    """Flow-SDE, Flow-CPS, or Flow-Noise, whose deviation is a small network's and is trained too."""
    level: Annotated[float, Range("above 0 and at most 1", lambda x: 0 < x <= 1)] = 0.5
    """Noise level a of Flow-SDE and Flow-CPS."""
    stochastic: Literal["one", "all"] = "one"
    """"one": a single step, drawn for each chunk, so that training needs one pass of the expert; the others
    follow the flow. "all": every step, as Flow-Noise always has it; training needs K passes."""
    low: PositiveFloat = 0.08
    high: PositiveFloat = 0.16
    """Bounds of Flow-Noise's standard deviation."""
    hidden: tuple[Size, ...] = (128, 64)
    """Widths of the hidden layers of Flow-Noise's network."""

    def __post_init__(self) -> None:
        if self.noise == "cps" and self.steps < 2:
            raise RoveError("Flow-CPS has no noise in its last step: set its steps to 2 or more.")
        if self.noise == "cps" and self.stochastic == "all":
            raise RoveError("Flow-CPS has no density in its last step: draw one step, stochastic='one'.")
        if self.low >= self.high:
            raise RoveError(f"Flow-Noise needs low < high, not {self.low} and {self.high}.")

    @property
    def joint(self) -> bool:
        """True where every step is stochastic."""
        return self.stochastic == "all" or self.noise == "learned"

    @property
    def choices(self) -> int:
        """Number of steps that may be the stochastic one."""
        return self.steps - 1 if self.noise == "cps" else self.steps

    @property
    def points(self) -> int:
        """Number of points of the chain that a sample holds, S."""
        return self.steps + 1 if self.joint else 2
