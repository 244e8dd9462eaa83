"""Statistics of what is recorded, in the form of LeRobot's stats.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

QUANTILES = (0.01, 0.10, 0.50, 0.90, 0.99)
_PICTURES = 100
"""Pictures of an episode of which statistics are taken, at most."""

Statistics = dict[str, np.ndarray]
"""Statistics of one feature: min, max, mean, std, count [1], and q01 to q99."""


def of_numbers(values: np.ndarray) -> Statistics:
    """Statistics of a feature's values [T, …], over the T frames; each has at least one dimension."""
    x = values.astype(np.float64)
    if x.ndim == 1:
        x = x[:, None]
    return _statistics(x) | {"count": np.array([len(x)])}


def of_pictures(frames: np.ndarray) -> Statistics:
    """Statistics of each channel of pictures uint8 [T, H, W, 3], as fractions of 255, [3, 1, 1] each."""
    every = -(-len(frames) // _PICTURES)
    shown = np.asarray(frames[::every])
    stride = max(1, min(shown.shape[1:3]) // 150)
    pixels = shown[:, ::stride, ::stride].reshape(-1, 3) / 255.0
    found = {name: value.reshape(3, 1, 1) for name, value in _statistics(pixels).items()}
    return found | {"count": np.array([len(shown)])}


def _statistics(x: np.ndarray) -> Statistics:
    """Of [n, …], without the count."""
    quantiles = np.quantile(x, QUANTILES, axis=0)
    found = {"min": x.min(0), "max": x.max(0), "mean": x.mean(0), "std": x.std(0)}
    return found | {f"q{round(100 * q):02d}": each for q, each in zip(QUANTILES, quantiles, strict=True)}


def together(parts: Sequence[Statistics]) -> Statistics:
    """Statistics of all parts, exact but for quantiles: those are means of the parts', as in LeRobot."""
    counts = np.array([part["count"].item() for part in parts], np.float64)

    def mean(values: Sequence[np.ndarray]) -> np.ndarray:
        return np.tensordot(counts, np.stack(values), axes=1) / counts.sum()

    found = {name: mean([part[name] for part in parts]) for name in parts[0] if name[0] == "q"}
    found["mean"] = mean([part["mean"] for part in parts])
    found["std"] = np.sqrt(mean([part["std"] ** 2 + (part["mean"] - found["mean"]) ** 2 for part in parts]))
    found["min"] = np.min([part["min"] for part in parts], axis=0)
    found["max"] = np.max([part["max"] for part in parts], axis=0)
    found["count"] = np.array([int(counts.sum())])
    return found


def plain(statistics: Mapping[str, Statistics]) -> dict[str, dict[str, Any]]:
    """As lists, for JSON."""
    return {name: {key: value.tolist() for key, value in each.items()} for name, each in statistics.items()}
