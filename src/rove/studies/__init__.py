"""Studies: functions that return a `Study`, a question that runs of a few recipes answer.

Every module of this package is searched, so a new study is one decorated function. A study of your own can
live anywhere: `rove study path/to/file.py:name`.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rove import recipes
from rove.errors import RoveError, nearest

_studies: dict[str, Question] = {}


@dataclass(frozen=True, slots=True)
class Arm:
    """One side of a study: a recipe and what is changed in it."""

    recipe: str
    """A name from `rove recipes`, or FILE.py:NAME."""
    settings: str = ""
    """Overrides as they are typed: "--algorithm.branches 4"."""


@dataclass(frozen=True, slots=True)
class Pair:
    """Two arms that are compared, by their labels."""

    first: str
    second: str
    claimed: Literal["higher", "same"] | None = None
    """What is claimed of the first: it ends higher than the second, as high, or nothing."""


@dataclass(frozen=True, slots=True)
class Study:
    """Arms × seeds, and what is compared. Runs differ in nothing but what an arm or the seed changes."""

    arms: Mapping[str, Arm]
    """Label -> arm, in the order in which they are shown."""
    pairs: tuple[Pair, ...]
    claim: str
    """What somebody claims, and who, in a sentence."""
    expected: str
    """What is expected here, and why, in a sentence."""
    hours: float
    """Hours that its runs take on two cores, roughly; warm-ups, which studies share, come on top."""
    steps: int | None = None
    """Budget of every run, in simulated actions, those that vine sampling only tries included."""
    minutes: float | None = None
    """Budget of every run in minutes of training, in the place of `steps`."""
    settings: str = ""
    """Overrides of every arm, before the arm's own."""
    warm_up: Arm | None = None
    """What the policy that the arms of a seed begin with is warmed up by (`rove sft`); studies that name the
    same one share it. None: every run begins as its recipe says."""
    seeds: tuple[int, ...] = (1, 2, 3)
    metric: Literal["success", "shifted"] = "success"
    """Success after training, on held-out states in distribution, or on all shifted variants."""

    @property
    def unit(self) -> Literal["steps", "minutes"]:
        """What the budget is counted in."""
        return "steps" if self.minutes is None else "minutes"

    def problems(self) -> list[str]:
        """Everything about the study itself that cannot work, a sentence each."""
        found = []
        if len(self.arms) < 2:
            found.append("it needs two arms or more.")
        if (self.steps is None) == (self.minutes is None):
            found.append("it needs one budget: steps, or minutes.")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            found.append("its seeds have to be there, and to differ.")
        for pair in self.pairs:
            for label in (pair.first, pair.second):
                if label not in self.arms:
                    found.append(f"a pair names the arm {label!r}. {nearest(label, self.arms)}")
        return found


@dataclass(frozen=True, slots=True)
class Question:
    """A named study."""

    name: str
    summary: str
    """The first line of the study function's docstring."""
    build: Callable[[], Study]


def study(build: Callable[[], Study]) -> Callable[[], Study]:
    """Register a function under its own name; the first line of its docstring is its summary."""
    if not build.__doc__:
        raise RoveError(f"Study {build.__name__!r} needs a docstring: its first line is the summary.")
    known = _studies.get(build.__name__)
    if known is not None and known.build.__code__.co_filename != build.__code__.co_filename:
        raise RoveError(f"Two studies are called {build.__name__!r}; rename one.")
    _studies[build.__name__] = Question(build.__name__, build.__doc__.strip().splitlines()[0], build)
    return build


def get(name: str) -> Question:
    """Return the study called `name`, or, for "path/to/file.py:name", the one in that file.

    Raises RoveError with the nearest name, or when the file is missing or cannot be imported.
    """
    file, colon, short = name.rpartition(":")
    if colon and file.endswith(".py"):
        recipes.import_file(Path(file))
    elif name.endswith(".py"):
        raise RoveError(f"{name} is a file: name a study in it, {name}:NAME.")
    else:
        short = name
    known = {question.name: question for question in all()}
    if short not in known:
        raise RoveError(f"Unknown study {short!r}. {nearest(short, known)}")
    return known[short]


def build(question: Question) -> Study:
    """Return the study of a question. Raises RoveError where it fails, or cannot work."""
    file = question.build.__code__.co_filename
    made = recipes.run_own(question.build, file)
    if not isinstance(made, Study):
        raise RoveError(
            f"Study {question.name!r} in {file} returns {type(made).__name__}; expected a rove.studies.Study."
        )
    if problems := made.problems():
        listed = "\n".join(f"  - {problem}" for problem in problems)
        raise RoveError(f"Study {question.name!r} cannot work:\n{listed}")
    return made


def all() -> tuple[Question, ...]:
    """Return every study, in the order in which they are written down."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    return tuple(_studies.values())
