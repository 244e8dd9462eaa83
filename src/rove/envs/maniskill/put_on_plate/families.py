"""The published put-on-plate environments as data, and their episode ids as start states: no simulator here.

An id is a number in mixed radix. From its least digit up: yaw, placement, table, receptacle, the family's
extra digit where it has one, object; in "MultiPlate" receptacle and extra digit change places.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import Any, Literal

from rove.envs.maniskill.put_on_plate import catalog, poses
from rove.errors import RoveError, nearest

Extra = Literal["none", "texture", "template", "joints", "distractor", "receptacle"]
"""Choices of the extra digit: one texture, sentence or row of joint offsets, or what else lies there."""

PREFIX = "PutOnPlateInScene25"
DIGITS = ("object", "receptacle", "table", "extra", "placement", "yaw")


@dataclass(frozen=True, slots=True)
class Part:
    """One split of a family: the values of each digit."""

    objects: range = range(16)
    receptacles: range = range(1)
    tables: range = range(16)
    extras: range = range(1)
    places: str = "pairs"
    yaws: tuple[float, ...] = poses.YAWS

    def sizes(self) -> dict[str, int]:
        """Return how many values each digit has."""
        columns = (self.objects, self.receptacles, self.tables, self.extras, poses.places(self.places))
        return dict(zip(DIGITS, map(len, (*columns, self.yaws)), strict=True))


@dataclass(frozen=True, slots=True)
class Family:
    """One published environment."""

    id: str
    parts: Mapping[str, Part]
    """Split -> its part; "train" first."""
    extra: Extra = "none"
    heights: tuple[float, float, float] = (0.90, 0.90, 0.0)
    """Heights at which source, receptacle and a third thing start, metres: those of RLinf, a short fall."""
    settled_heights: tuple[float, float, float] = (0.95, 0.95, 0.0)
    """Heights of RL4VLA, which lets things fall and settle before the episode begins."""
    effect: Literal["none", "texture", "whole"] = "none"
    strength: float = 0.0
    """Strength of the effect on images, 0 to 1."""
    moves: tuple[str, ...] = ()
    """Splits in which the source is put elsewhere in mid-episode."""

    def order(self) -> tuple[str, ...]:
        """List the digits, most significant first."""
        middle = ("receptacle", "extra") if self.extra == "receptacle" else ("extra", "receptacle")
        return ("object", *middle, "table", "placement", "yaw")


_UNSEEN_OBJECTS, _UNSEEN_TABLES = range(16, 25), range(16, 21)
_THREE = (0.95, 0.92, 1.0)


def _family(name: str, train: Part, test: Part | None = None, **options: Any) -> Family:
    parts = {"train": train} if test is None else {"train": train, "test": test}
    return Family(PREFIX + name, parts, **options)


def _vision(name: str, effect: Literal["texture", "whole"], strength: float) -> Family:
    return _family(name, Part(), Part(extras=range(1, 17)), extra="texture", effect=effect, strength=strength)


_MAIN = _family("Main-v3", Part(), Part(objects=_UNSEEN_OBJECTS, tables=_UNSEEN_TABLES))
_TRIPLES = "triples_object"

FAMILIES: dict[str, Family] = {
    family.id: family
    for family in (
        Family(_MAIN.id, {**_MAIN.parts, "all": Part(objects=range(25), tables=range(21))}),
        _family("Single-v1", Part(objects=range(1), tables=range(1))),
        _family("MainCarrot-v3", Part(tables=range(1)), Part(objects=_UNSEEN_OBJECTS, tables=range(1))),
        _family("MainImage-v3", Part(objects=range(1)), Part(objects=range(1), tables=_UNSEEN_TABLES)),
        _family("VisionImage-v1", Part(), Part(tables=_UNSEEN_TABLES)),
        _vision("VisionTexture03-v1", "texture", 0.3),
        _vision("VisionTexture05-v1", "texture", 0.5),
        _vision("VisionWhole03-v1", "whole", 0.3),
        _vision("VisionWhole05-v1", "whole", 0.5),
        _family("Carrot-v1", Part(), Part(objects=_UNSEEN_OBJECTS)),
        _family("Plate-v1", Part(), Part(receptacles=range(1, 17))),
        _family("Instruct-v1", Part(), Part(extras=range(1, 17)), extra="template"),
        _family(
            "MultiCarrot-v1",
            Part(extras=range(15), places=_TRIPLES),
            Part(objects=_UNSEEN_OBJECTS, extras=range(8), places=_TRIPLES),
            extra="distractor",
            heights=_THREE,
            settled_heights=_THREE,
        ),
        _family(
            "MultiPlate-v1",
            Part(tables=range(21), extras=range(16), places="triples_receptacle"),
            Part(receptacles=range(1, 17), tables=range(21), extras=range(15), places="triples_receptacle"),
            extra="receptacle",
            heights=(1.0, 0.92, 0.96),
            settled_heights=(1.0, 0.92, 0.96),
        ),
        _family(
            "Position-v1",
            Part(),
            Part(places="ring", yaws=poses.SHIFTED_YAWS),
            heights=(0.95, 0.95, 0.0),
        ),
        _family("EEPose-v1", Part(), Part(extras=range(1, 14376)), extra="joints"),
        _family(
            "PositionChangeTo-v1",
            Part(places=_TRIPLES),
            Part(places=_TRIPLES),
            heights=_THREE,
            settled_heights=_THREE,
            moves=("test",),
        ),
    )
}
"""Environment id -> family: the 17 published ones."""


@dataclass(frozen=True, slots=True)
class PlateScene:
    """The start state of one episode, and what happens in it."""

    object: int
    receptacle: int
    table: int
    extra: int
    """The extra digit's value; 0 where the family has none."""
    placement: int
    """Row of the family's set of places."""
    yaw: float
    """Yaw of the source object and of a distractor, rad."""
    places: tuple[poses.Place, ...]
    """Places of source, receptacle and, where there is one, a third thing."""
    heights: tuple[float, float, float]
    distractor: int | None = None
    """A second object, at the third place. Where it is the source itself (see `decode`), there is one object,
    and it is there."""
    second_receptacle: int | None = None
    texture: int = 0
    effect: Literal["none", "texture", "whole"] = "none"
    strength: float = 0.0
    """Strength of the effect, 0 without a texture."""
    template: int = 0
    joints: int = 0
    """Row of `poses.joint_offsets()`."""
    moves: bool = False
    """The source is put at the third place after the fifth action."""

    @property
    def instruction(self) -> str:
        return catalog.sentence(self.template, self.object, self.receptacle)


@cache
def family_of(name: str) -> tuple[Family, str]:
    """Return family and split of "PutOnPlateInScene25Main-v3" or "Main-v3:test"; the split is "train" unless
    given.

    Raises RoveError on an unknown one.
    """
    short, _, split = name.partition(":")
    full = short if short.startswith(PREFIX) else PREFIX + short
    if full not in FAMILIES:
        raise RoveError(f"Unknown put-on-plate task {short!r}. {nearest(full, FAMILIES)}")
    family, split = FAMILIES[full], split or "train"
    if split not in family.parts:
        raise RoveError(f"{full} has no split {split!r}. {nearest(split, family.parts)}")
    return family, split


def count(family: Family, split: str) -> int:
    """N, the number of episode ids."""
    return prod(family.parts[split].sizes().values())


def digits(family: Family, split: str, episode: int) -> dict[str, int]:
    """The digits of an id, each from 0. Raises RoveError where the id is out of range."""
    total = count(family, split)
    if not 0 <= episode < total:
        raise RoveError(
            f"Episode id {episode} of {family.id}, split {split!r}, is out of range 0..{total - 1}."
        )
    sizes, found, rest = family.parts[split].sizes(), {}, episode
    for digit in reversed(family.order()):
        rest, found[digit] = divmod(rest, sizes[digit])
    return found


def encode(family: Family, split: str, found: Mapping[str, int]) -> int:
    """The id that has these digits."""
    sizes, episode = family.parts[split].sizes(), 0
    for digit in family.order():
        episode = episode * sizes[digit] + found[digit]
    return episode


def decode(family: Family, split: str, episode: int, settle: bool = False) -> PlateScene:
    """The start state of an id. Raises RoveError where it is out of range.

    In "MultiCarrot", split "test", the published formula for the distractor, (object + x + 1) mod 9 + 16 with
    object from 16, is the object itself where x = 1: in one episode of eight nothing distracts, and the
    object lies at the third place. It is kept.
    """
    part, d = family.parts[split], digits(family, split, episode)
    obj, plate = part.objects[d["object"]], part.receptacles[d["receptacle"]]
    extra = part.extras[d["extra"]] if family.extra != "none" else 0
    distractor = second = None
    if family.extra == "distractor":
        distractor = (obj + extra + 1) % len(part.objects) + part.objects[0]
    if family.extra == "receptacle":
        others = len(part.extras) + 1
        second = (d["receptacle"] + extra + 1) % others + part.receptacles[0]
    texture = extra if family.extra == "texture" else 0
    return PlateScene(
        object=obj,
        receptacle=plate,
        table=part.tables[d["table"]],
        extra=extra,
        placement=d["placement"],
        yaw=part.yaws[d["yaw"]],
        places=poses.places(part.places)[d["placement"]],
        heights=family.settled_heights if settle else family.heights,
        distractor=distractor,
        second_receptacle=second,
        texture=texture,
        effect=family.effect,
        strength=family.strength if texture else 0.0,
        template=extra if family.extra == "template" else 0,
        joints=extra if family.extra == "joints" else 0,
        moves=split in family.moves,
    )


@dataclass(frozen=True, slots=True)
class Space:
    """The episodes of one split as a list in a seeded order, so that any stretch of it is a fair sample.

    `objects` and `tables` leave out all others, for small experiments; a digit in which nothing would be left
    (the unseen objects of a split, say) stays whole.
    """

    family: Family
    split: str
    objects: tuple[int, ...] = ()
    tables: tuple[int, ...] = ()
    settle: bool = False

    @property
    def id(self) -> str:
        """Id of the split, e.g. "PutOnPlateInScene25Carrot-v1:test"."""
        return f"{self.family.id}:{self.split}"

    def _kept(self) -> dict[str, Sequence[int]]:
        """Values that are left of each digit."""
        part = self.family.parts[self.split]
        kept: dict[str, Sequence[int]] = {name: range(size) for name, size in part.sizes().items()}
        for name, values, wanted in (
            ("object", part.objects, self.objects),
            ("table", part.tables, self.tables),
        ):
            kept[name] = [i for i, value in enumerate(values) if value in wanted] or kept[name]
        return kept

    def __len__(self) -> int:
        return prod(map(len, self._kept().values()))

    def episode(self, index: int) -> int:
        """The published id of the episode at `index`. Raises RoveError where there is none."""
        total, kept = len(self), self._kept()
        if not 0 <= index < total:
            raise RoveError(f"Initial state {index} of {self.id} is out of range 0..{total - 1}.")
        rest, found = shuffled(index, total), {}
        for digit in reversed(self.family.order()):
            rest, place = divmod(rest, len(kept[digit]))
            found[digit] = kept[digit][place]
        return encode(self.family, self.split, found)

    def scene(self, index: int) -> PlateScene:
        """The start state of the episode at `index`."""
        return decode(self.family, self.split, self.episode(index), self.settle)


def shuffled(index: int, total: int) -> int:
    """A fixed pseudo-random permutation of 0 … total - 1, computed without a table.

    A four-round Feistel network on the least even number of bits that holds `total`, walked until it falls
    below it (Black and Rogaway 2002, "Ciphers with arbitrary finite domains").
    """
    half = (max(total - 1, 1).bit_length() + 1) // 2
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for key in (0x9E3779B9, 0x7F4A7C15, 0xF39CC060, 0x5CEDC834):
            mixed = (right + key) * 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF
            mixed = (mixed ^ mixed >> 31) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
            left, right = right, left ^ (mixed >> 29 & mask)
        index = left << half | right
        if index < total:
            return index
