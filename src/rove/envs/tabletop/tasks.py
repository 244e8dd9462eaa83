"""Tasks and their instructions.

A task id names its family and what it is about: `pick/red_cube`, `put/green_cylinder/white_plate`,
`stack/purple_cube/yellow_cylinder`, `push/yellow_cube/cyan_zone`.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from types import MappingProxyType

from rove.errors import RoveError, nearest
from rove.types import EpisodeSpec, Split

FAMILIES = ("pick", "put", "stack", "push")

OBJECT_COLORS = ("red", "green", "blue", "yellow", "purple")
RECEPTACLE_COLORS = ("white", "black", "orange", "cyan")
RECEPTACLE_KINDS = ("plate", "tray", "zone")
TRAINED_SHAPES = ("cube", "cylinder", "brick")
UNSEEN_SHAPES: Mapping[str, tuple[str, ...]] = {
    # A capsule rolls off whatever it is stacked on, and away from what pushes it.
    "pick": ("cross", "star", "capsule"),
    "put": ("cross", "star", "capsule"),
    "stack": ("cross", "star"),
    "push": ("cross", "star"),
}
UNSEEN_SHAPE_OF = {
    "red": "brick",
    "green": "cube",
    "blue": "cylinder",
    "yellow": "brick",
    "purple": "cylinder",
}
"""The object-colour pairs that no training scene contains, one for each colour."""

VARIANTS: Mapping[str, str] = MappingProxyType(
    {
        "table_texture": "vision",
        "light": "vision",
        "object_shade": "vision",
        "camera_jitter": "vision",
        "unseen_shape": "semantics",
        "unseen_pair": "semantics",
        "unseen_phrasing": "semantics",
        "distractors": "semantics",
        "unseen_position": "execution",
        "unseen_start": "execution",
        "displaced": "execution",
    }
)

INITIAL_STATES: Mapping[Split, range] = {"train": range(4096), "held_out": range(1_000_000, 1_000_256)}

DEMO_TASKS = (
    "pick/red_cube",
    "pick/blue_brick",
    "pick/green_cylinder",
    "put/green_cylinder/white_plate",
    "put/yellow_cube/black_tray",
    "put/purple_cube/cyan_tray",
    "stack/green_cylinder/red_cube",
    "push/yellow_cube/cyan_zone",
)
TRAIN_TASKS = (
    *DEMO_TASKS,
    "pick/yellow_cylinder",
    "pick/purple_brick",
    "pick/blue_cube",
    "put/red_cylinder/orange_plate",
    "put/blue_cube/white_plate",
    "put/green_brick/orange_plate",
    "put/red_cube/black_tray",
    "stack/purple_cube/yellow_cylinder",
    "stack/blue_cube/purple_cube",
    "stack/yellow_cube/blue_cube",
    "stack/red_cylinder/green_cylinder",
    "stack/red_cube/yellow_cube",
    "push/purple_brick/orange_zone",
    "push/red_cube/orange_zone",
    "push/green_brick/cyan_zone",
    "push/blue_cube/orange_zone",
)
UNSEEN_TASKS = (
    "pick/purple_cube",
    "pick/green_brick",
    "put/red_cube/white_plate",
    "put/purple_brick/cyan_tray",
    "stack/blue_cube/red_cylinder",
    "stack/green_cylinder/purple_cube",
    "push/blue_brick/cyan_zone",
    "push/purple_cube/orange_zone",
)
"""Object-destination combinations never trained, of objects that were."""
TASK_SETS = {"demo": DEMO_TASKS, "train": TRAIN_TASKS, "unseen": UNSEEN_TASKS}

# `{o}` is the object, `{d}` the destination with its preposition, `{t}` the destination alone.
TEMPLATES: Mapping[str, tuple[str, ...]] = {
    "pick": ("pick up the {o}", "lift the {o}", "grab the {o} and lift it", "take the {o} off the table"),
    "put": (
        "put the {o} {d}",
        "place the {o} {d}",
        "pick up the {o} and put it {d}",
        "grab the {o} and place it {d}",
    ),
    "stack": ("stack the {o} on the {t}", "place the {o} on top of the {t}", "put the {o} on the {t}"),
    "push": (
        "push the {o} to the {t}",
        "slide the {o} into the {t}",
        "push the {o} across the table to the {t}",
    ),
}
UNSEEN_TEMPLATES: Mapping[str, tuple[str, ...]] = {
    # Recombinations of the words above: a word never trained would carry no meaning.
    "pick": ("grab the {o} and take it off the table", "take the {o} and lift it up"),
    "put": ("take the {o} and place it {d}", "lift the {o} and put it {d}"),
    "stack": ("grab the {o} and stack it on top of the {t}", "pick up the {o} and place it on the {t}"),
    "push": ("slide the {o} across the table to the {t}", "push the {o} off to the {t}"),
}
GENERIC_NOUNS = ("object", "block")


@dataclass(frozen=True, slots=True)
class Thing:
    """A coloured object or receptacle, e.g. `red_cube`."""

    color: str
    kind: str

    @property
    def words(self) -> str:
        return f"{self.color} {self.kind}"


TRAINED_OBJECTS = tuple(
    Thing(color, shape)
    for color, shape in product(OBJECT_COLORS, TRAINED_SHAPES)
    if UNSEEN_SHAPE_OF[color] != shape
)
RECEPTACLES = tuple(
    Thing(color, kind)
    for kind, colors in (
        ("plate", ("white", "orange")),
        ("tray", ("black", "cyan")),
        ("zone", ("cyan", "orange")),
    )
    for color in colors
)


@dataclass(frozen=True, slots=True)
class TabletopTask:
    """A parsed task id."""

    id: str
    family: str
    target: Thing
    destination: Thing | None
    """A receptacle (put, push), an object (stack), nothing (pick)."""


def _things(names: tuple[str, ...], colors: tuple[str, ...]) -> dict[str, Thing]:
    return {f"{color}_{name}": Thing(color, name) for color, name in product(colors, names)}


_OBJECTS = _things(TRAINED_SHAPES, OBJECT_COLORS)
DESTINATIONS: Mapping[str, dict[str, Thing]] = {
    "put": _things(("plate", "tray"), RECEPTACLE_COLORS),
    "push": _things(("zone",), RECEPTACLE_COLORS),
    # A brick is too narrow to stand on.
    "stack": _things(("cube", "cylinder"), OBJECT_COLORS),
}


@functools.cache
def parse(task: str) -> TabletopTask:
    """Parse the task that an id names; ValueError (with the nearest valid choice) where it names none."""
    family, *parts = task.split("/")
    if family not in FAMILIES:
        raise RoveError(f"Unknown task family {family!r} in task {task!r}. {nearest(family, FAMILIES)}")
    expected = 1 if family == "pick" else 2
    if len(parts) != expected:
        form = f"{family}/OBJECT" + ("" if expected == 1 else "/DESTINATION")
        raise RoveError(f"Task {task!r} has {len(parts)} names after its family; expected {form}.")
    if parts[0] not in _OBJECTS:
        raise RoveError(f"Unknown object {parts[0]!r} in task {task!r}. {nearest(parts[0], _OBJECTS)}")
    if expected == 1:
        return TabletopTask(task, family, _OBJECTS[parts[0]], None)
    valid = DESTINATIONS[family]
    if parts[1] not in valid:
        raise RoveError(f"Unknown destination {parts[1]!r} in task {task!r}. {nearest(parts[1], valid)}")
    target, destination = _OBJECTS[parts[0]], valid[parts[1]]
    if target.color == destination.color and family == "stack":
        raise RoveError(f"Task {task!r} stacks two {target.color} objects; every object has its own colour.")
    return TabletopTask(task, family, target, destination)


def _choose(count: int, *key: object) -> int:
    """Make a fixed choice in [0, count) for a key, the same on every machine."""
    return zlib.crc32("|".join(map(str, key)).encode()) % count


def _validate(episode: EpisodeSpec) -> None:
    if episode.variant != "none" and episode.variant not in VARIANTS:
        raise RoveError(
            f"Unknown variant {episode.variant!r}. {nearest(episode.variant, ('none', *VARIANTS))}"
        )
    if not any(episode.initial_state in states for states in INITIAL_STATES.values()):
        spans = ", ".join(f"{s.start}..{s.stop - 1} ({name})" for name, s in INITIAL_STATES.items())
        raise RoveError(f"Initial state {episode.initial_state} does not exist; valid ids are {spans}.")


def target_of(episode: EpisodeSpec) -> Thing:
    """Return the object that the episode is about: the task's own, or what a semantic variant puts in its
    place."""
    task = parse(episode.task)
    color = task.target.color
    if episode.variant == "unseen_shape":
        shapes = UNSEEN_SHAPES[task.family]
        return Thing(color, shapes[_choose(len(shapes), episode.initial_state, "shape")])
    if episode.variant == "unseen_pair":
        return Thing(color, UNSEEN_SHAPE_OF[color])
    return task.target


@functools.lru_cache(maxsize=65536)
def instruction_of(task_id: str, initial_state: int, variant: str) -> str:
    episode = EpisodeSpec(task_id, initial_state, variant)
    _validate(episode)
    task, target = parse(task_id), target_of(episode)
    templates = (UNSEEN_TEMPLATES if variant == "unseen_phrasing" else TEMPLATES)[task.family]
    template = templates[_choose(len(templates), task_id, initial_state, "template")]
    # Colours are unique among the objects of a scene, so that a generic noun names one thing only, and an
    # unseen shape, whose name was never trained, can be asked for.
    noun = _choose(8, task_id, initial_state, "noun")
    generic = GENERIC_NOUNS[noun % 2] if noun < 4 or target.kind not in TRAINED_SHAPES else target.kind
    return sentence(template, target, generic, task.destination)


def sentence(template: str, target: Thing, noun: str, destination: Thing | None) -> str:
    words = {"o": f"{target.color} {noun}"}
    if destination is not None:
        preposition = "in" if destination.kind == "tray" else "on"
        words |= {"t": destination.words, "d": f"{preposition} the {destination.words}"}
    return template.format(**words)


def vocabulary_words() -> tuple[str, ...]:
    texts = [text for group in (TEMPLATES, UNSEEN_TEMPLATES) for family in group.values() for text in family]
    words = {word for text in texts for word in text.split() if not word.startswith("{")}
    words |= {"in", *OBJECT_COLORS, *RECEPTACLE_COLORS, *TRAINED_SHAPES, *RECEPTACLE_KINDS, *GENERIC_NOUNS}
    return tuple(sorted(words))
