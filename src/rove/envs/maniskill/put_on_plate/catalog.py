"""Parts of the put-on-plate tasks, by index: objects, receptacles, tables, sentences.

The order is that of the published asset files (`model_db.json` of each group), which number everything. Sizes
and densities are read from those files where a scene is built; a suite needs the names alone.
"""

from __future__ import annotations

import re

SEEN_OBJECTS, SEEN_TABLES = 16, 16
"""Numbers of objects and tables in the train splits, which come first; of the receptacles it is the plate."""

OBJECTS = (
    "carrot",
    "kitchen shovel",
    "bread",
    "plastic bottle",
    "7up can",
    "zuchinni",
    "ketchup bottle",
    "watering can",
    "pipe",
    "toy bear",
    "fast food cup",
    "plant",
    "banana",
    "hamburger",
    "golf ball",
    "BBQ sauce",
    "travel cup",
    "pepper",
    "nonstop can",
    "potato",
    "baguette",
    "champagne glass",
    "kitchen spoon",
    "onion",
    "cup",
)

RECEPTACLES = (
    "plate",
    "cloth",
    "carpet",
    "newspaper",
    "sheet metal",
    "drawing tablet",
    "tomato slice",
    "pizza",
    "flat bowl",
    "gramophone disk",
    "frying pan",
    "mouse pad",
    "cutting board",
    "chess board",
    "manhole cover",
    "envelope",
    "notepad",
)

TABLES = 21

TEMPLATES = (
    "put $C$ on $P$",
    "Place the $C$ on the $P$",
    "set $C$ on $P$",
    "move the $C$ to the $P$",
    "Take the $C$ and put it on the $P$",
    "pick up $C$ and set it down on $P$",
    "please put the $C$ on the $P$",
    "Put $C$ onto $P$.",
    "place the $C$ onto the $P$ surface",
    "Make sure $C$ is on $P$.",
    "on the $P$, put the $C$",
    "put the $C$ where the $P$ is",
    "Move the $C$ from the table to the $P$",
    "Move $C$ so it’s on $P$.",
    "Can you put $C$ on $P$?",
    "$C$ on the $P$, please.",
    "the $C$ should be placed on the $P$.",
    "Lay the $C$ down on the $P$.",
    "could you place $C$ over $P$",
    "position the $C$ atop the $P$",
    "Arrange for the $C$ to be resting on $P$.",
)
"""Forms of an instruction. The first is the one that is trained on, the next 16 the shifted ones; no task
uses the rest."""


def sentence(template: int, obj: int, receptacle: int) -> str:
    """Return an instruction, e.g. `sentence(0, 0, 0)` -> `"put carrot on plate"`."""
    return TEMPLATES[template].replace("$C$", OBJECTS[obj]).replace("$P$", RECEPTACLES[receptacle])


def vocabulary() -> tuple[str, ...]:
    """Every word and mark that a sentence can contain."""
    text = " ".join([*OBJECTS, *RECEPTACLES, *TEMPLATES]).replace("$C$", " ").replace("$P$", " ").lower()
    return tuple(sorted(set(re.findall(r"\w+|[^\w\s]+", text))))
