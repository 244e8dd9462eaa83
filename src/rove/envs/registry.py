"""Environments by name: the only place that knows which suites there are."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from rove.config import load
from rove.config.schema import EnvConfig
from rove.envs.answers import ends_no_process
from rove.envs.base import Resources, TaskSuite, VectorEnv
from rove.errors import RoveError, nearest
from rove.runtime.setup import repeat
from rove.types import Autoreset

_ENTRY_POINTS = {
    "tabletop": "rove.envs.tabletop",
    "libero": "rove.envs.libero",
    "maniskill": "rove.envs.maniskill",
    "maniskill_put_on_plate": "rove.envs.maniskill",
}
"""Kind -> entry point, a module or `module:object`, with everything that others have to know of a suite.

It has `make(config, num_envs, chunk, autoreset) -> VectorEnv` and `suite(config) -> TaskSuite`, and may have:

- `resources(config, gpus) -> Resources`, where its environments can run on a GPU; `gpus` says whether there
  are any. `make` is then given the CUDA index of one as a fifth argument, `gpu`, which has to have a default:
  who makes an environment outside a run names none.
- `published_settings(tasks) -> dict`: settings that published results of these tasks were obtained with.
- `conventions(name) -> Conventions | None`: the suite's expectations of a policy, see `envs/conventions.py`.
- `downloads() -> (Path, Archives)`: the folder that data go to, and their sources, see `envs/downloads.py`.
- `examine() -> list[Finding]`: lines of `rove doctor`.
"""


def register(settings: type, entry_point: str) -> None:
    """Make an environment known by the `kind` of its settings, to recipes and on the command line.

    `settings` is a frozen dataclass with `kind: Literal["name"] = "name"`, `tasks`, `image_size` and
    `horizon`; `entry_point` names the module, or the object in one, that has `make` and `suite`.

    Example: `register(MyRobotConfig, "my_package.my_robot")`. Raises RoveError where the kind is taken, or
    `settings` is no such dataclass.
    """
    _enter(load.kind_of(settings), entry_point)
    load.register("env", settings)


def _enter(kind: str, entry_point: str) -> None:
    """Add a kind here and in every process to come, which has its settings from whatever it is sent."""
    if _ENTRY_POINTS.get(kind, entry_point) != entry_point:
        raise RoveError(
            f"Environment {kind!r} is already registered as {_ENTRY_POINTS[kind]!r}; use another name."
        )
    _ENTRY_POINTS[kind] = entry_point
    repeat(_enter, kind, entry_point)


def kinds() -> tuple[str, ...]:
    """List the registered environments."""
    return tuple(_ENTRY_POINTS)


def _module(kind: str) -> Any:
    if kind not in _ENTRY_POINTS:
        raise RoveError(
            f"Unknown environment {kind!r}. {nearest(kind, _ENTRY_POINTS)} One of your own is known where "
            "the file that registers it is named: rove eval --import FILE.py."
        )
    module, _, name = _ENTRY_POINTS[kind].partition(":")
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise RoveError(
            f"Environment {kind!r} needs the package {error.name!r}, which is not installed."
        ) from error
    return getattr(found, name) if name else found


def offered(kind: str, name: str) -> Callable[..., Any] | None:
    """Return the function `name` of an environment's entry point; None where it has none."""
    return getattr(_module(kind), name, None)


def kind_of(suite: str) -> str | None:
    """Return the environment that a suite's name begins with: "libero:object", "libero_object" ->
    "libero"."""
    begin = (kind for kind in _ENTRY_POINTS if suite == kind or suite.startswith((f"{kind}:", f"{kind}_")))
    return max(begin, key=len, default=None)


def make(
    config: EnvConfig, *, num_envs: int, chunk: int, autoreset: Autoreset, gpu: int | None = None
) -> VectorEnv:
    """Make B = `num_envs` environments of the suite that `config` describes, all slots idle until reset.

    `gpu` is the CUDA index of the one that they run on, in case they run on any; None: the suite chooses.
    """
    module = _module(config.kind)
    given = () if gpu is None or not resources(config, gpus=True).gpu else (gpu,)
    with ends_no_process(config.kind, "make"):
        return module.make(config, num_envs, chunk, autoreset, *given)


def resources(config: EnvConfig, gpus: bool) -> Resources:
    """Return the devices that the environments of `config` run on, on a machine with GPUs or without."""
    say = offered(config.kind, "resources")
    return Resources() if say is None else say(config, gpus)


def configure(suite: str, tasks: str | None = None, **settings: Any) -> EnvConfig:
    """Return the settings of a suite named as on the command line: "tabletop", "libero:object".

    `tasks` go before those of the name, and `settings` before the ones that published results of the tasks
    were obtained with. Raises RoveError on an unknown suite or setting.
    """
    kind, _, named = suite.partition(":")
    tasks = tasks or named or None
    say = offered(kind, "published_settings")
    published = {} if say is None else say(tasks)
    chosen = {} if tasks is None else {"tasks": tasks}
    return load.section("env", {"kind": kind, **chosen, **published, **settings})


def suite(config: EnvConfig) -> TaskSuite:
    """Return the tasks that `config` selects; builds no simulation."""
    return _module(config.kind).suite(config)
