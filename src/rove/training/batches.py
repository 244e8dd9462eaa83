"""Which rows an optimizer step of supervised training sees."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np


def batches(count: int, size: int, seed: int) -> Iterator[np.ndarray]:
    """Endless batches of row indices, int64 [size], every pass a fresh permutation of `count` rows; a
    remainder opens the next pass."""
    left = np.empty(0, dtype=np.int64)
    lap = 0
    while True:
        while len(left) < size:
            left = np.concatenate([left, np.random.default_rng((seed, lap)).permutation(count)])
            lap += 1
        yield left[:size]
        left = left[size:]
