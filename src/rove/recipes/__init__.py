"""Recipes: functions that return a full `Run`. A variant is a few lines on another one, never a copy.

Every module of this package is searched, so a new recipe is one decorated function. A recipe of your own can
live anywhere: `rove train path/to/file.py:name`.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from rove.config.schema import Run
from rove.errors import RoveError, nearest
from rove.runtime.setup import repeat

T = TypeVar("T")

_recipes: dict[str, Recipe] = {}


@dataclass(frozen=True, slots=True)
class Recipe:
    """A named training configuration."""

    name: str
    summary: str
    """The first line of the recipe function's docstring."""
    build: Callable[[], Run]


def recipe(build: Callable[[], Run]) -> Callable[[], Run]:
    """Register a function under its own name; the first line of its docstring is its summary."""
    if not build.__doc__:
        raise RoveError(f"Recipe {build.__name__!r} needs a docstring: its first line is the summary.")
    known = _recipes.get(build.__name__)
    if known is not None and known.build.__code__.co_filename != build.__code__.co_filename:
        raise RoveError(f"Two recipes are called {build.__name__!r}; rename one.")
    _recipes[build.__name__] = Recipe(build.__name__, build.__doc__.strip().splitlines()[0], build)
    return build


def build(name: str) -> Run:
    """Return the run of the recipe called `name`, see `get`. Raises RoveError where it is a user's own and
    fails."""
    found = get(name)
    file = found.build.__code__.co_filename
    run = found.build() if Path(file).parent == Path(__file__).parent else run_own(found.build, file)
    if not isinstance(run, Run):
        raise RoveError(f"Recipe {found.name!r} in {file} returns {type(run).__name__}; expected a rove.Run.")
    return run


def get(name: str) -> Recipe:
    """Return the recipe called `name`, or, for "path/to/file.py:name", the one in that file.

    Raises RoveError with the nearest name, or when the file is missing or cannot be imported.
    """
    file, colon, short = name.rpartition(":")
    if colon and file.endswith(".py"):
        import_file(Path(file))
    elif name.endswith(".py"):
        raise RoveError(f"{name} is a file: name a recipe in it, {name}:NAME.")
    else:
        short = name
    known = {r.name: r for r in all()}
    if short not in known:
        raise RoveError(f"Unknown recipe {short!r}. {nearest(short, known)}")
    return known[short]


def all() -> tuple[Recipe, ...]:
    """Return every recipe, sorted by name."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    return tuple(sorted(_recipes.values(), key=lambda r: r.name))


def import_file(path: Path) -> None:
    """Import a user's file, once, as a module named after it, so that it can register recipes.

    Raises RoveError, with the line, where it cannot be imported.
    """
    if not path.is_file():
        raise RoveError(f"No recipe file at {path}.")
    if path.suffix != ".py":
        raise RoveError(f"{path} cannot be imported: its name has to end in .py.")
    there = sys.modules.get(path.stem)
    if there is not None:
        if getattr(there, "__file__", None) != str(path.resolve()):
            raise RoveError(f"A module called {path.stem!r} is imported already; rename {path}.")
        return
    spec = importlib.util.spec_from_file_location(path.stem, path.resolve())
    assert spec is not None and spec.loader is not None  # it is a .py file
    import rove.envs  # noqa: F401  (so that the file can import MuJoCo, whatever MUJOCO_GL says)

    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    try:
        run_own(partial(spec.loader.exec_module, module), str(path.resolve()))
    except BaseException:  # an interrupt too: half a module is none
        del sys.modules[path.stem]
        raise
    repeat(import_file, path.resolve())


def run_own(function: Callable[[], T], file: str) -> T:
    """Call what a user wrote in `file`. Raises RoveError naming the line in which it failed."""
    try:
        return function()
    except RoveError:
        raise
    except Exception as error:
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == file]
        if isinstance(error, SyntaxError):  # perhaps of a module that the file imports
            file, lines = error.filename or file, [error.lineno]
        where = f"{file}, line {lines[-1]}" if lines and lines[-1] else file
        why = error.msg if isinstance(error, SyntaxError) else error
        raise RoveError(f"{where}: {type(error).__name__}: {why}") from error
