"""Reading of a checkpoint's files: what is absent, damaged or of another type is refused by file and key."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

from rove.config import load
from rove.config.ranges import Range, range_of
from rove.errors import RoveError, nearest

_POINTER = b"version https://git-lfs.github.com/spec/"


def from_one_to(most: int) -> Range:
    """Return the range of a size that is at most `most`."""
    return Range(f"from 1 to {most:,}", lambda x: 1 <= x <= most)


# What is larger is a damaged file, and would take a machine down before it is found not to fit.
WIDTH = Annotated[int, from_one_to(100_000)]
DEPTH = Annotated[int, from_one_to(1000)]
_DIGITS = 18
"""Most digits of a whole number; more would not fit into 64 bits."""


def refuse_unfit(path: Path) -> None:
    """Raise RoveError where a file is not there to be read, is empty, or is a Git LFS pointer."""
    try:
        with path.open("rb") as file:
            start = file.read(len(_POINTER))
    except FileNotFoundError:
        raise RoveError(f"{path.parent} lacks the file {path.name}.") from None
    except OSError as error:
        raise RoveError(f"{path} cannot be read: {error.strerror}.") from error
    if start == _POINTER:
        raise RoveError(
            f"{path} is a Git LFS pointer, not the file itself: run git lfs pull in {path.parent}."
        )
    if not start:
        raise RoveError(f"{path} is empty: copy or download it again.")


def read_text(path: Path) -> str:
    """Read a text file, with or without a byte order mark. Raises RoveError naming a file that is none."""
    refuse_unfit(path)
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise RoveError(f"{path} is damaged: {error}. Copy or download it again.") from error


def read_json(path: Path) -> Table:
    """Read a JSON object. Raises RoveError naming a file that holds none."""
    try:
        content = json.loads(read_text(path), parse_int=_whole)
    except (json.JSONDecodeError, RecursionError, OverflowError) as error:
        raise RoveError(f"{path} is damaged: {error}. Copy or download it again.") from error
    return Table(_object(content, str(path)), str(path))


def _whole(digits: str) -> int:
    if len(digits) > _DIGITS:
        raise OverflowError(f"{digits[:_DIGITS]}… is too large a number")
    return int(digits)


class Table:
    """A JSON object whose values are read by key and type.

    A value of another type raises RoveError with its key and `where`, which names the file. null stands for
    an absent key unless the type allows None.
    """

    def __init__(self, content: Mapping[str, Any], where: str) -> None:
        self.content, self.where = content, where

    def __contains__(self, key: str) -> bool:
        return self.content.get(key) is not None

    def get(self, key: str, annotation: Any, default: Any) -> Any:
        """Return the value of `key`, of the annotated type and range; `default` where it is absent."""
        if key not in self:
            optional = key in self.content and NoneType in get_args(annotation)
            return None if optional else default
        return _typed(annotation, self.content[key], f"{self.where}: {key}")

    def need(self, key: str, annotation: Any) -> Any:
        """Return the value of `key`, which has to be there."""
        if key not in self:
            raise RoveError(f"{self.where} has no {key}: add it.")
        return self.get(key, annotation, None)

    def table(self, key: str, *, needed: bool = False) -> Table:
        """Return the object of `key`; where it is absent an empty one, unless it is `needed`."""
        where = f"{self.where}: {key}"
        if needed and key not in self:
            raise RoveError(f"{self.where} has no {key}: add it.")
        return Table(_object(self.content[key], where) if key in self else {}, where)

    def tables(self, key: str) -> tuple[Table, ...] | None:
        """Return the list of objects of `key`; None where it is absent."""
        if key not in self:
            return None
        where = f"{self.where}: {key}"
        items = enumerate(_list(self.content[key], where))
        return tuple(Table(_object(item, f"{where}.{i}"), f"{where}.{i}") for i, item in items)

    def numbers(self, key: str, *, endless: bool = False) -> tuple[float, ...]:
        """Return the list of numbers of `key`, which has to be there; infinite ones where `endless`."""
        where = f"{self.where}: {key}"
        if key not in self:
            raise RoveError(f"{self.where} has no {key}: add it.")
        values = _list(self.content[key], where)
        for index, value in enumerate(values):
            if type(value) not in (int, float) or math.isnan(value) or (math.isinf(value) and not endless):
                raise RoveError(
                    f"{where}.{index} = {value!r}: expected a {'' if endless else 'finite '}number."
                )
        return tuple(map(float, values))

    def refuse_others(self, key: str, *computed: Any) -> None:
        """Raise RoveError where `key` has a value that is none of those that Rove computes with."""
        if key not in self or any(_same(self.content[key], value) for value in computed):
            return
        words = " or ".join(json.dumps(value) for value in computed) or "null"
        raise RoveError(
            f"{self.where}: {key} = {self.content[key]!r}: Rove computes with {words} only. Use a checkpoint "
            "that was trained so, or correct the file if that is wrong."
        )

    def refuse_unknown(self, known: Iterable[str]) -> None:
        """Raise RoveError naming a key that is none of `known`, and the nearest of these."""
        for key in self.content:
            if key not in known:
                raise RoveError(f"{self.where} has an unknown key {key!r}. {nearest(key, known)}")


def _same(value: Any, other: Any) -> bool:
    """Return whether two JSON values are equal; true is not 1."""
    return value == other and isinstance(value, bool) == isinstance(other, bool)


def _object(value: Any, name: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise RoveError(f"{name} holds a {type(value).__name__}, expected an object.")
    return value


def _list(value: Any, name: str) -> list[Any] | tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise RoveError(f"{name} holds a {type(value).__name__}, expected a list.")
    return value


def _typed(annotation: Any, value: Any, name: str) -> Any:
    value = load.decode(_plain(annotation), value, name)
    _check_range(annotation, value, name)
    if is_dataclass(value):
        hints = get_type_hints(type(value), include_extras=True)
        for field in fields(value):
            _check_range(hints[field.name], getattr(value, field.name), f"{name}.{field.name}")
    return value


def _check_range(annotation: Any, value: Any, name: str) -> None:
    allowed, numbers = range_of(annotation), value if isinstance(value, tuple) else (value,)
    if allowed is not None and value is not None and not all(map(allowed.holds, numbers)):
        raise RoveError(f"{name} = {value}: expected a number {allowed.words}.")


def _plain(annotation: Any) -> Any:
    """Return an annotation without ranges."""
    if get_origin(annotation) is Annotated:
        return get_args(annotation)[0]
    if get_origin(annotation) in (Union, UnionType):
        return Union[tuple(map(_plain, get_args(annotation)))]  # noqa: UP007
    return annotation
