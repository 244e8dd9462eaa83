"""Override, save and load a run. Types, choices and defaults are read from `schema.py`; nothing is restated.

A key is a dotted path into `Run`: `rollout.num_envs`, `policy.towers.0.width`. On the command line it is
written `--rollout.num_envs 32` or `--rollout.num_envs=32`. Special values and keys:

- `none` clears an optional setting; naming a key below an optional section that is unset creates it with its
  defaults (`--policy.value_head.level chunk`).
- `--algorithm.kind ppo` switches the variant of a tagged union, with that variant's defaults.
- A whole section or list may be given as a Python or JSON literal: `--policy.towers '[{"width": 64}]'`.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import json
import math
import re
import sys
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from rove.config.schema import Run
from rove.errors import RoveError, nearest

_extra: dict[str, list[type]] = {}
_LEAVES = {int: "an integer", float: "a finite number", bool: "true or false", str: "text"}
_MOST_ITEMS = 1000
"""Values of a list: no list of settings is longer."""
_CONSTANTS = {"none": None, "null": None, "true": True, "false": False}


def register(section: str, variant: type) -> None:
    """Make one more variant of a tagged union known; the registries of `envs` and `algorithms` call this.

    `variant` is a frozen dataclass whose `kind: Literal["name"] = "name"` tells it from the others; every
    field has a default. From then on it can be overridden, saved and loaded like the built-in ones.
    """
    kind_of(variant)
    known = _extra.setdefault(section, [])
    if variant not in known:
        known.append(variant)


def kind_of(variant: type) -> str:
    """Return the `kind` of a tagged union's dataclass. Raises RoveError where it is none."""
    kind = _tag(variant) if is_dataclass(variant) else None
    if kind is None:
        raise RoveError(
            f'{variant.__name__} needs to be a dataclass with a `kind: Literal["name"] = "name"`.'
        )
    return kind


def apply(run: Run, overrides: Sequence[str]) -> Run:
    """A copy of `run` with command-line overrides applied; variants are switched first, then later wins.

    Raises RoveError on an unknown key (with the nearest valid one), a value of the wrong type (with what was
    expected), a key of a variant that is not chosen, or a key without a value.
    """
    pairs = sorted(_pairs(overrides), key=lambda pair: not pair[0].endswith(".kind"))
    for key, text in pairs:
        run = _replace(Run, run, key.split("."), text, key, run)
    return run


def save(run: Run, path: Path) -> None:
    """Write the resolved run as JSON."""
    path.write_text(json.dumps(to_dict(run), indent=2) + "\n")


def load(path: Path) -> Run:
    """Read what `save` wrote; `load(save(run)) == run`. Raises RoveError naming the key that is wrong."""
    try:
        data = json.loads(path.read_text())
    except FileNotFoundError:
        raise RoveError(f"No run configuration at {path}.") from None
    except (ValueError, RecursionError) as error:  # no JSON, no text
        raise RoveError(f"{path} is not valid JSON: {error}.") from None
    try:
        return decode(Run, data, "")
    except RoveError as error:
        raise RoveError(f"{path}: {error}") from None


def to_dict(value: Any) -> Any:
    """Convert to plain JSON values: dataclasses become objects, tuples lists."""
    if is_dataclass(value):
        return {f.name: to_dict(getattr(value, f.name)) for f in fields(value)}
    return [to_dict(item) for item in value] if isinstance(value, tuple) else value


def decode(annotation: Any, data: Any, key: str) -> Any:
    """Return the typed value of plain JSON `data`, strictly checked. Raises RoveError naming `key`."""
    if data is None and _optional(annotation):
        return None
    if classes := variants(annotation):
        return _decode_section(classes, data, key)
    leaf = _required(annotation)
    if get_origin(leaf) is tuple and isinstance(data, list | tuple):
        return _decode_tuple(leaf, data, key)
    if get_origin(leaf) is Literal:
        return _decode_choice(leaf, data, key)
    if leaf is float and type(data) is int and abs(data) <= sys.float_info.max:
        data = float(data)
    if (
        type(data) is not leaf
        or (isinstance(data, float) and not math.isfinite(data))
        or (isinstance(data, int) and abs(data) >= 2**63)
    ):
        raise RoveError(f"{key} = {shown(data)}: expected {describe(annotation)}.")
    return data


def section(name: str, data: dict[str, Any]) -> Any:
    """One section of a run, typed and checked: `section("env", {"kind": "tabletop"})` -> TabletopConfig()."""
    return decode(_hints(Run)[name], data, name)


def describe(annotation: Any) -> str:
    """Describe in words what a value of this type is: "an integer", "one of 'first', 'mean', or none"."""
    ending = " or none" if _optional(annotation) else ""
    annotation = _required(annotation)
    if get_origin(annotation) is Literal:
        return "one of " + ", ".join(map(repr, get_args(annotation))) + ending
    if get_origin(annotation) is tuple:
        items = get_args(annotation)
        count = "any number of values" if Ellipsis in items else f"{len(items)} values"
        return f"{count} separated by commas, each {describe(items[0])}{ending}"
    if variants(annotation):
        return "a section: set the keys below it" + ending
    return _LEAVES[annotation] + ending


def keys(part: Any, prefix: str = "", chosen: bool = True) -> Iterator[str]:
    """Every dotted key that may be set, optional sections included.

    `part` is a value (its own variant's keys) or a class. With `chosen` False, the keys of tagged-union
    variants that are not chosen follow too.
    """
    hints = _hints(part if isinstance(part, type) else type(part))
    for name, annotation in hints.items():
        value = None if isinstance(part, type) else getattr(part, name)
        yield prefix + name
        if isinstance(value, tuple):
            for index, item in enumerate(value):
                if is_dataclass(item):
                    yield from keys(item, f"{prefix}{name}.{index}.", chosen)
            continue
        if is_dataclass(value):
            yield from keys(value, f"{prefix}{name}.", chosen)
        for variant in variants(annotation):
            if type(value) is not variant and (value is None or not chosen):
                yield from keys(variant, f"{prefix}{name}.", chosen)


def leaves(part: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Every setting of a run, or of a part of it, as (dotted key, value as it would be typed)."""
    for f in fields(part):
        value, key = getattr(part, f.name), prefix + f.name
        if is_dataclass(value):
            yield from leaves(value, f"{key}.")
        elif isinstance(value, tuple) and value and is_dataclass(value[0]):
            for index, item in enumerate(value):
                yield from leaves(item, f"{key}.{index}.")
        else:
            yield key, _typed(value)


def variants(annotation: Any) -> tuple[type, ...]:
    """The dataclasses among an annotation's alternatives; empty for a leaf."""
    return tuple(o for o in _alternatives(annotation) if isinstance(o, type) and is_dataclass(o))


# --- overriding -----------------------------------------------------------------------------------


def _pairs(overrides: Sequence[str]) -> Iterator[tuple[str, str]]:
    words = iter(overrides)
    for word in words:
        if not word.startswith("--"):
            raise RoveError(f"Unexpected argument {word!r}: a setting is written --key value, e.g. --seed 3.")
        key, equals, text = word[2:].partition("=")
        if not equals:
            text = next(words, None)
            if text is None or text.startswith("--"):
                raise RoveError(f"--{key} needs a value: --{key} VALUE.")
        yield key, text


def _replace(annotation: Any, value: Any, path: list[str], text: str, key: str, run: Run) -> Any:
    """`value` with what lies at `path` below it set from `text`; `key` and `run` are for messages."""
    if not path:
        return decode(annotation, _literal(annotation, text), key)
    name, *rest = path
    if isinstance(value, tuple):
        if not re.fullmatch("[0-9]{1,4}", name) or int(name) >= len(value):
            raise _unknown_key(key, run)
        item = _replace(get_args(_required(annotation))[0], value[int(name)], rest, text, key, run)
        return (*value[: int(name)], item, *value[int(name) + 1 :])
    classes = variants(annotation)
    if path == ["kind"] and all(map(_tag, classes)) and classes:
        chosen = _choose(classes, text, key)
        return value if type(value) is chosen else chosen()
    if value is None and len(classes) == 1:
        value = classes[0]()
    if not is_dataclass(value) or isinstance(value, type) or name not in _hints(type(value)):
        raise _unknown_key(key, run)
    below = _hints(type(value))[name]
    return dataclasses.replace(value, **{name: _replace(below, getattr(value, name), rest, text, key, run)})


def _unknown_key(key: str, run: Run) -> RoveError:
    """The error for a key that this run does not have: which variant would read it, or the nearest key."""
    valid = list(dict.fromkeys(keys(run)))
    if key in keys(run, chosen=False):
        section, _, name = key.rpartition(".")
        readers = [c for c in variants(_hints(Run)[section]) if name in _hints(c)]
        names = " or ".join(str(_tag(c)) for c in readers)
        now = _tag(type(getattr(run, section)))
        return RoveError(
            f"--{key} is read with --{section}.kind {names} only, and this run's {section} is {now!r}."
        )
    leaf = key.rpartition(".")[2]
    same = [k for k in valid if k.rpartition(".")[2] == leaf]
    close = same or difflib.get_close_matches(key, valid, n=1)
    if not close:
        by_leaf = {k.rpartition(".")[2]: k for k in reversed(valid)}
        close = [by_leaf[m] for m in difflib.get_close_matches(leaf, by_leaf, n=1, cutoff=0.7)]
    hint = (
        f"Did you mean {' or '.join('--' + k for k in close[:3])}?"
        if close
        else f"Sections: {', '.join(f.name for f in fields(run))}."
    )
    return RoveError(f"Unknown setting --{key}. {hint}")


def _literal(annotation: Any, text: str) -> Any:
    """Command-line text as a plain value; what does not read as a literal stays text."""
    if text.lower() in ("none", "null") and _optional(annotation):
        return None
    annotation = _required(annotation)
    if annotation is str or get_origin(annotation) is Literal:
        return text
    if get_origin(annotation) is tuple and get_args(annotation)[0] is str:
        words = "" if text.strip() in ("[]", "()") else text  # as an empty one is printed
        return tuple(word.strip() for word in words.split(",") if word.strip())
    try:
        value = _CONSTANTS[text.lower()] if text.lower() in _CONSTANTS else _parse(text)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):  # the last two: deep nesting
        return text
    scalar = get_origin(annotation) is tuple and not isinstance(value, list | tuple | dict)
    return (value,) if scalar else value


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return ast.literal_eval(text)  # also reads `.5`, `1_000` and `0.9, 0.95`


# --- decoding -------------------------------------------------------------------------------------


def _decode_section(classes: tuple[type, ...], data: Any, key: str) -> Any:
    first, *others = classes
    if not isinstance(data, dict):
        example = f"{key}.{next(iter(_hints(first)))}" if key else "name"
        raise RoveError(f"{key or 'The file'} = {shown(data)}: a section; set its keys, e.g. {example}.")
    tagged = _tag(first) is not None and (others or "kind" in data)
    cls = _choose(classes, data.get("kind"), f"{key}.kind") if tagged else first
    prefix = f"{key}." if key else ""
    hints = _hints(cls)
    for name in data:
        if name not in hints:
            raise RoveError(f"{prefix}{name} is not a setting. {nearest(str(name), hints)}")
    for f in fields(cls):
        if f.name not in data and f.default is MISSING and f.default_factory is MISSING:
            raise RoveError(f"{prefix}{f.name} is missing: expected {describe(hints[f.name])}.")
    return cls(**{name: decode(hints[name], item, prefix + name) for name, item in data.items()})


def _decode_tuple(annotation: Any, data: Sequence[Any], key: str) -> tuple[Any, ...]:
    items = get_args(annotation)
    if len(data) > _MOST_ITEMS:
        raise RoveError(f"{key} has {len(data)} values: expected at most {_MOST_ITEMS}.")
    if Ellipsis in items:
        items = (items[0],) * len(data)
    if len(items) != len(data):
        raise RoveError(f"{key} = {shown(data)}: expected {describe(annotation)}.")
    return tuple(decode(a, item, f"{key}.{i}") for i, (a, item) in enumerate(zip(items, data, strict=True)))


def _decode_choice(annotation: Any, data: Any, key: str) -> Any:
    choices = get_args(annotation)
    if data not in choices:
        raise RoveError(f"{key} = {shown(data)}. {nearest(str(data), choices)}")
    return data


def _choose(classes: Sequence[type], kind: Any, key: str) -> type:
    tags = {_tag(cls): cls for cls in classes}
    if not isinstance(kind, str) or kind not in tags:
        raise RoveError(f"{key} = {shown(kind)}. {nearest(str(kind), map(str, tags))}")
    return tags[kind]


# --- annotations ----------------------------------------------------------------------------------


def _hints(cls: type) -> dict[str, Any]:
    hints = dict(_declared(cls))
    for section, registered in _extra.items() if cls is Run else ():
        hints[section] = typing.Union[hints[section], *registered]
    return hints


@functools.cache
def _declared(cls: type) -> dict[str, Any]:
    """The annotations of a dataclass's fields; its class variables are no settings."""
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in fields(cls)}


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    union = get_origin(annotation) in (typing.Union, types.UnionType)
    return get_args(annotation) if union else (annotation,)


def _optional(annotation: Any) -> bool:
    return types.NoneType in _alternatives(annotation)


def _required(annotation: Any) -> Any:
    """The annotation without its None; a union of sections stays one."""
    left = [option for option in _alternatives(annotation) if option is not types.NoneType]
    return left[0] if len(left) == 1 else annotation


def _tag(cls: type) -> str | None:
    """The value of a union member's `kind`; None for a section that is not a member of a tagged union."""
    choices: tuple[str, ...] = get_args(_hints(cls).get("kind"))
    return choices[0] if len(choices) == 1 else None


def _typed(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(map(_typed, value)) or "[]"
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def shown(data: Any) -> str:
    """A value as a message quotes it: not at length."""
    try:
        text = repr(list(data) if isinstance(data, tuple) else data)
    except (ValueError, RecursionError):  # a number of thousands of digits; lists in lists
        return "..."
    return text if len(text) <= 60 else text[:57] + "..."
