"""Normalisation of states and actions: statistics in each published layout, read, applied and written.

LeRobot keeps them in a file that policy_preprocessor.json names, and before that in buffers beside the
weights; openpi keeps them in norm_stats.json. Nothing is clipped.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from rove.errors import RoveError, nearest
from rove.policies.files import open_tensors
from rove.policies.reading import Table, read_json

Method = Literal["MEAN_STD", "QUANTILES", "MIN_MAX", "IDENTITY"]
Layout = Literal["lerobot", "buffers", "openpi"]
"""Where statistics are kept: LeRobot's processors, LeRobot's old buffers, or openpi's norm_stats.json."""
NEEDS: dict[Method, tuple[str, ...]] = {
    "MEAN_STD": ("mean", "std"),
    "QUANTILES": ("q01", "q99"),
    "MIN_MAX": ("min", "max"),
    "IDENTITY": (),
}
Numbers = Mapping[str, Tensor]
"""Statistics of one feature by name ("mean", "q01"), float64, one number a dimension."""

_PROCESSORS = {
    "policy_preprocessor": ("normalizer_processor", "observation.state"),
    "policy_postprocessor": ("unnormalizer_processor", "action"),
}
_BUFFERS = {
    "normalize_inputs.buffer_observation_state.": "state",
    "normalize_targets.buffer_action.": "action",
    "unnormalize_outputs.buffer_action.": "action",
}
BUFFERS = ("normalize_inputs.", "normalize_targets.", "unnormalize_outputs.")
"""Beginnings of the names of LeRobot's old buffers, which are no weights."""


@dataclass(frozen=True, slots=True, eq=False)
class Statistics:
    """Statistics of state and action, how they are applied, and the layout that they came in."""

    state: Numbers
    action: Numbers
    methods: tuple[Method, Method]
    """How the state and the action are normalised."""
    layout: Layout = "lerobot"
    asset: str = "rove"
    """openpi's name of the data set."""

    def normalizers(self, where: str) -> tuple[Normalizer, Normalizer]:
        """Return the normalizers of state and action; RoveError, by `where`, where one lacks numbers."""
        openpi = self.layout == "openpi"
        parts = (("observation.state", self.state), ("action", self.action))
        state, action = (
            Normalizer(numbers, method, openpi=openpi, where=f"{where}: {name}")
            for (name, numbers), method in zip(parts, self.methods, strict=True)
        )
        return state, action


class Normalizer(nn.Module):
    """A linear map of each dimension to normalised units and back; dimensions beyond the statistics pass."""

    shift: Tensor
    forth: Tensor
    back: Tensor
    offset: Tensor

    def __init__(self, numbers: Numbers, method: Method, *, openpi: bool, where: str) -> None:
        """Take the statistics that `method` needs. With `openpi`, its small constants are added to spans.

        Raises RoveError, by `where`, where numbers are absent, not finite, or of different lengths.
        """
        super().__init__()
        low, high = _needed(numbers, method, where) if NEEDS[method] else (torch.zeros(0), torch.zeros(0))
        small = 1e-6 if openpi else 1e-8
        if method == "MEAN_STD":
            forth, offset = high + small, 0.0
            back = forth if openpi else high
        else:
            span = high - low
            # LeRobot replaces a span of zero; openpi adds to every span.
            span = span + small if openpi else torch.where(span == 0, small, span)
            forth, offset = span / 2, 1.0
            back = forth
        self.dim = len(low)
        for name, value in (("shift", low), ("forth", forth), ("back", back)):
            self.register_buffer(name, value.double(), persistent=False)
        self.register_buffer("offset", torch.tensor(offset, dtype=torch.float64), persistent=False)

    def normalize(self, x: Tensor) -> Tensor:
        """Normalise [..., n] in the data's units, float32."""
        known = x[..., : self.dim].double()
        n = known.shape[-1]
        known = (known - self.shift[:n]) / self.forth[:n] - self.offset
        return torch.cat((known.float(), x[..., n:].float()), dim=-1)

    def unnormalize(self, x: Tensor) -> Tensor:
        """Convert normalised [..., n] to the data's units, float32: the inverse of `normalize`."""
        known = x[..., : self.dim].double()
        n = known.shape[-1]
        known = (known + self.offset) * self.back[:n] + self.shift[:n]
        return torch.cat((known.float(), x[..., n:].float()), dim=-1)


def _needed(numbers: Numbers, method: Method, where: str) -> tuple[Tensor, Tensor]:
    names = NEEDS[method]
    if lacking := [name for name in names if name not in numbers]:
        raise RoveError(
            f"{where} is normalised by {method}, but its statistics lack {' and '.join(lacking)}: add them, "
            "or give the policy the statistics of the data that it is to be trained on."
        )
    low, high = (numbers[name].double() for name in names)
    if low.shape != high.shape or low.ndim != 1:
        raise RoveError(
            f"{where} has {names[0]} of shape {list(low.shape)}, {names[1]} of {list(high.shape)}."
        )
    if not bool(torch.isfinite(low).all() & torch.isfinite(high).all()):
        raise RoveError(
            f"{where} has {names[0]} or {names[1]} that are not finite: it has no statistics yet."
        )
    wrong = high < 0 if method == "MEAN_STD" else low > high
    if bool(wrong.any()):
        i = int(wrong.nonzero()[0])
        raise RoveError(
            f"{where}: {names[0]} {float(low[i]):g} and {names[1]} {float(high[i]):g} of dimension {i} "
            "cannot be: correct the file."
        )
    return low, high


# --- reading ----------------------------------------------------------------------------------------


def read(
    directory: Path,
    config: Table,
    tensors: Mapping[str, tuple[Path, str]],
    *,
    quantiles: bool,
    asset: str | None,
) -> Statistics | None:
    """Read the statistics of a checkpoint directory, whichever layout it has; None where it has none.

    `tensors` tells file and name of every tensor beside the weights; `asset` names openpi's data set where
    there are several; `quantiles` is how the family is normalised unless a file says so. Raises RoveError
    naming a file that is damaged or absent.
    """
    method: Method = "QUANTILES" if quantiles else "MEAN_STD"
    buffers = {key: place for key, place in tensors.items() if key.startswith(BUFFERS)}
    if (directory / "policy_preprocessor.json").exists():
        return _read_processors(directory, config, method)
    if buffers:
        return _read_buffers(buffers, config, method)
    return _read_openpi(directory, method, asset)


def find_assets(directory: Path) -> dict[str, Path]:
    """Return the norm_stats.json files of a directory in openpi's or RLinf's layout, by data set."""
    found = {}
    for path in sorted(directory.glob("**/norm_stats.json")):
        name = path.parent.relative_to(directory).as_posix()
        found[name.removeprefix("assets/") if name != "." else directory.name] = path
    return found


def from_suite(statistics: Mapping[str, Any], key: str | None, previous: Statistics | None) -> Statistics:
    """Take the statistics of demonstrations, `{key: {"action": {"q01", "q99", …}, "proprio": {…}}}`.

    The methods stay those of the `previous` statistics where the numbers that they need are there, and always
    in openpi's layout, which does not say them; otherwise quantiles are used. Raises RoveError where `key` is
    unknown, or None and there are several.
    """
    if key is None and len(statistics) != 1:
        raise RoveError(
            f"There are statistics of several data sets: name one of {', '.join(sorted(statistics))}."
        )
    name = next(iter(statistics)) if key is None else key
    if name not in statistics:
        raise RoveError(f"No statistics of {name!r}. {nearest(name, statistics)}")
    chosen = Table(statistics, "statistics").table(name, needed=True)
    parts = [_masked(chosen.table(part)) for part in ("proprio", "action")]
    wanted: tuple[Method, Method] = previous.methods if previous else ("QUANTILES", "QUANTILES")
    fixed = previous is not None and previous.layout == "openpi"
    methods: list[Method] = [
        method if fixed or (parts[i] and all(n in parts[i] for n in NEEDS[method])) else _any_method(parts[i])
        for i, method in enumerate(wanted)
    ]
    layout = "lerobot" if previous is None else previous.layout
    return Statistics(parts[0], parts[1], (methods[0], methods[1]), layout, name)


def _any_method(numbers: Numbers) -> Method:
    return "QUANTILES" if "q01" in numbers else "MEAN_STD" if "mean" in numbers else "IDENTITY"


def _masked(part: Table) -> dict[str, Tensor]:
    """Return the numbers of one part; a dimension that its mask leaves out is mapped onto itself."""
    names = [name for name in ("mean", "std", "min", "max", "q01", "q99") if name in part]
    numbers = {name: torch.tensor(part.numbers(name), dtype=torch.float64) for name in names}
    mask = part.get("mask", tuple[bool, ...] | None, None)
    if mask is not None:
        same = {"mean": 0.0, "std": 1.0, "min": -1.0, "max": 1.0, "q01": -1.0, "q99": 1.0}
        keep = torch.tensor(mask)
        numbers = {name: torch.where(keep, value, same[name]) for name, value in numbers.items()}
    return numbers


def _read_processors(directory: Path, config: Table, default: Method) -> Statistics | None:
    parts: dict[str, tuple[dict[str, Tensor], Method]] = {}
    for stem, (kind, feature) in _PROCESSORS.items():
        path = directory / f"{stem}.json"
        steps = read_json(path).tables("steps") or ()
        for step in steps:
            # What changes states or actions besides, and is not computed here.
            if step.get("registry_name", str, "") in (
                "relative_actions_processor",
                "absolute_actions_processor",
            ):
                step.table("config").refuse_others("enabled", False)
        found = [step for step in steps if step.get("registry_name", str, "") == kind]
        if not found:
            raise RoveError(f"{path} has no step {kind!r}, by which statistics are found: add it.")
        name = found[0].get("state_file", str | None, None)
        if name is None:
            return None
        if Path(name).name != name:
            raise RoveError(f"{path}: state_file = {name!r}: expected the name of a file beside it.")
        method = _method(found[0].table("config").table("norm_map"), config, feature, default)
        parts[feature] = (dict(_tensors(directory / name, f"{feature}.")), method)
    (state, of_state), (action, of_action) = parts["observation.state"], parts["action"]
    empty = not action or not all(
        torch.isfinite(value).all() for value in (*state.values(), *action.values())
    )
    return None if empty else Statistics(state, action, (of_state, of_action), "lerobot")


def _read_buffers(
    buffers: Mapping[str, tuple[Path, str]], config: Table, default: Method
) -> Statistics | None:
    parts: dict[str, dict[str, Tensor]] = {"state": {}, "action": {}}
    for key, (path, stored) in buffers.items():
        for prefix, part in _BUFFERS.items():
            if key.startswith(prefix):
                with open_tensors(path) as file:
                    parts[part][key.removeprefix(prefix)] = file.get_tensor(stored).double()
    finite = all(torch.isfinite(value).all() for part in parts.values() for value in part.values())
    if not parts["action"] or not finite:  # a base's are infinite: it was never given any
        return None
    nothing = Table({}, config.where)
    methods = (
        _method(nothing, config, "observation.state", default),
        _method(nothing, config, "action", default),
    )
    return Statistics(parts["state"], parts["action"], methods, "buffers")


def _read_openpi(directory: Path, method: Method, asset: str | None) -> Statistics | None:
    found = find_assets(directory)
    if not found:
        return None
    if asset is None and len(found) > 1:
        raise RoveError(
            f"{directory} has statistics of several data sets: set unnorm_key to {' or '.join(found)}."
        )
    name = next(iter(found)) if asset is None else asset
    if name not in found:
        raise RoveError(f"{directory} has no statistics of {name!r}. {nearest(name, found)}")
    table = read_json(found[name]).table("norm_stats", needed=True)
    parts = []
    for key in ("state", "actions"):
        part = table.table(key, needed=True)
        names = [n for n in ("mean", "std", "q01", "q99") if n in part]
        parts.append({n: torch.tensor(part.numbers(n), dtype=torch.float64) for n in names})
    return Statistics(parts[0], parts[1], (method, method), "openpi", name)


def _tensors(path: Path, prefix: str) -> Iterator[tuple[str, Tensor]]:
    with open_tensors(path) as file:
        for key in file.keys():  # noqa: SIM118
            if key.startswith(prefix):
                yield key.removeprefix(prefix), file.get_tensor(key).double()


def _method(norm_map: Table, config: Table, feature: str, default: Method) -> Method:
    """Return how a feature is normalised: by the processor, or else by config.json."""
    kind = "ACTION" if feature == "action" else "STATE"
    for table in (norm_map, config.table("normalization_mapping")):
        if kind in table:
            method = table.need(kind, str)
            if method not in NEEDS:
                raise RoveError(f"{table.where}: {kind} = {method!r}. {nearest(method, get_args(Method))}")
            return method
    return default


# --- writing ----------------------------------------------------------------------------------------


def buffers_of(statistics: Statistics) -> dict[str, Tensor]:
    """Return LeRobot's old buffers, which lie beside the weights."""
    parts: dict[str, tuple[Numbers, Method]] = {
        "state": (statistics.state, statistics.methods[0]),
        "action": (statistics.action, statistics.methods[1]),
    }
    return {
        prefix + name: parts[part][0][name].float()
        for prefix, part in _BUFFERS.items()
        for name in NEEDS[parts[part][1]]
    }


def write_openpi(directory: Path, statistics: Statistics) -> None:
    """Write assets/NAME/norm_stats.json."""
    folder = directory / "assets" / statistics.asset
    folder.mkdir(parents=True, exist_ok=True)
    parts = {"state": statistics.state, "actions": statistics.action}
    content = {part: {n: value.tolist() for n, value in numbers.items()} for part, numbers in parts.items()}
    (folder / "norm_stats.json").write_text(json.dumps({"norm_stats": content}, indent=1) + "\n")


def write_processors(
    directory: Path, statistics: Statistics, before: list[dict[str, Any]], after: list[dict[str, Any]]
) -> None:
    """Write LeRobot's processors and their statistics; `before` and `after` are their other steps.

    In `before` and `after` a step {"registry_name": "…normalizer_processor"} stands for the one with numbers.
    """
    methods = dict(zip(("STATE", "ACTION"), statistics.methods, strict=True))
    tensors = {f"observation.state.{n}": v.float() for n, v in statistics.state.items()}
    tensors |= {f"action.{n}": v.float() for n, v in statistics.action.items()}
    for (stem, (kind, _)), steps in zip(_PROCESSORS.items(), (before, after), strict=True):
        written = []
        for index, step in enumerate(steps):
            if step["registry_name"] == kind:
                name = f"{stem}_step_{index}_{kind}.safetensors"
                config = {"eps": 1e-8} | step["config"] | {"norm_map": {"VISUAL": "IDENTITY", **methods}}
                step = {"registry_name": kind, "config": config, "state_file": name}
                save_file(tensors, directory / name)
            written.append(step)
        content = {"name": stem, "steps": written}
        (directory / f"{stem}.json").write_text(json.dumps(content, indent=2) + "\n")
