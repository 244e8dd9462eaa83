"""What the clients of the tests ask, the same in every environment."""

from __future__ import annotations

from typing import Any

import numpy as np

CLIENTS, TURNS = 8, 4
SIDE = 224
PROMPTS = ("put the red cube on the blue plate", "pick up the green cylinder")


def observation(client: int, turn: int, state: int) -> dict[str, Any]:
    """One observation, with the keys of openpi's LIBERO client; `state` numbers of the robot's state."""
    draw = np.random.default_rng((client, turn))
    blocks = draw.integers(0, 256, (2, 8, 8, 3), dtype=np.uint8).repeat(SIDE // 8, 1).repeat(SIDE // 8, 2)
    return {
        "observation/image": blocks[0],
        "observation/wrist_image": blocks[1],
        "observation/state": draw.uniform(-0.5, 0.5, state).astype(np.float32),
        "prompt": PROMPTS[(client + turn) % 2],
    }
