"""Actions as tokens: 256 bins a dimension, held by the last 256 ids of the vocabulary.

OpenVLA (Kim et al. 2024, section 3.2): the higher the id, the lower the value. Un-normalisation maps
[-1, 1] onto the 1st and 99th percentile of the training data.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rove import transfer
from rove.errors import RoveError, nearest
from rove.policies.openvla.config import BINS, Checkpoint
from rove.policies.reading import Table, read_json
from rove.types import ActionSpec


def tokenize(normalized: Tensor, vocab_size: int) -> Tensor:
    """Convert actions in [-1, 1], clipped to that range, to int64 token ids; any shape."""
    edges = _edges(normalized.device)
    bins = torch.bucketize(normalized.double().clamp(-1.0, 1.0), edges, right=True)
    return vocab_size - bins


def detokenize(tokens: Tensor, vocab_size: int) -> Tensor:
    """Convert token ids to float64 bin centres in (-1, 1); any shape. The two lowest ids share a centre."""
    edges = _edges(tokens.device)
    centres = (edges[:-1] + edges[1:]) / 2
    return centres[(vocab_size - tokens - 1).clamp(0, BINS - 2)]


@cache
def _edges(device: torch.device) -> Tensor:
    """Return the bin edges, float64 [256], evenly from -1 to 1; copied to each device once."""
    with torch.inference_mode(False):
        return transfer.to(torch.from_numpy(np.linspace(-1.0, 1.0, BINS)), device)


ZERO = BINS // 2
"""The column of normalised zero: among 256 scores, highest value first, that of the bin with centre 0."""


def smooth(logp: Tensor, column: Tensor, width: float, alone: Tensor | None = None) -> Tensor:
    """Average `logp` [..., 256] around each of `column` [..., G] to [..., G], under Gaussian weights.

    `width` is the standard deviation in bins; of columns that are `alone`, bool [..., G], nothing is spread.
    The negative of the result is a cross-entropy that knows the
    order of the bins: a histogram loss (Farebrother et al. 2024, "Stop Regressing", section 3.1).
    """
    place = torch.arange(BINS, device=logp.device)
    weight = torch.exp(-0.5 * ((place - column[..., None]) / width) ** 2)
    weight = weight / weight.sum(dim=-1, keepdim=True)
    spread = (weight * logp[..., None, :]).sum(dim=-1)
    return spread if alone is None else torch.where(alone, logp.gather(-1, column), spread)


def statistics_of_bounds(spec: ActionSpec) -> dict[str, Any]:
    """Make statistics that map [-1, 1] onto the bounds of `spec`, for a policy that has seen no data."""
    action = {"q01": list(spec.low), "q99": list(spec.high), "mask": [True] * spec.dim}
    return {"bounds": {"action": action}}


def read_statistics(*directories: Path) -> Table:
    """Read statistics, which may be empty, from the first of `directories` that has some: in
    dataset_statistics.json, or else in config.json (`norm_stats`)."""
    for directory in directories:
        path = directory / "dataset_statistics.json"
        if path.exists():
            return read_json(path)
        if (directory / "config.json").exists():
            stored = Checkpoint.read(directory).norm_stats
            if stored.content:
                return stored
    return Table({}, str(directories[0] / "dataset_statistics.json"))


def check_statistics(statistics: Table, key: str, *parts: str) -> int:
    """Return the number of dimensions of actions in the statistics of data set `key`.

    Raises RoveError naming what is wrong in them, or in other `parts` ("proprio") that they have.
    """
    chosen = statistics.table(key, needed=True)
    action = chosen.table("action", needed=True)
    _check_percentiles(action)
    for part in parts:
        if part in chosen:
            _check_percentiles(chosen.table(part))
    return len(action.numbers("q01"))


def _check_percentiles(part: Table) -> None:
    if "q01" not in part and "min" in part:
        raise RoveError(
            f"{part.where} has no q01 and q99, by which numbers are normalised, but min and max: where the "
            "policy was trained by these, copy them to q01 and q99, or else compute them from its data."
        )
    low, high = part.numbers("q01"), part.numbers("q99")
    mask = part.get("mask", tuple[bool, ...], (True,) * len(low))
    if not len(low) == len(high) == len(mask) > 0:
        raise RoveError(
            f"{part.where} has {len(low)} numbers in q01, {len(high)} in q99 and {len(mask)} in mask: "
            "expected one each for every dimension."
        )
    wrong = [i for i, (a, b, used) in enumerate(zip(low, high, mask, strict=True)) if used and a > b]
    if wrong:
        i = wrong[0]
        raise RoveError(
            f"{part.where}: q01 is above q99 in dimension {i}, {low[i]:g} and {high[i]:g}: correct it."
        )


def choose_key(statistics: Mapping[str, Any], key: str | None) -> str | None:
    """Choose the data set whose statistics un-normalise; a `_no_noops` suffix may be missing or surplus.

    None where `key` is None and there is not exactly one. Raises RoveError where `key` is unknown.
    """
    if key is None:
        return next(iter(statistics)) if len(statistics) == 1 else None
    for candidate in (key, key + "_no_noops", key.removesuffix("_no_noops")):
        if candidate in statistics:
            return candidate
    known = (
        nearest(key, statistics) if statistics else "The checkpoint has none: add dataset_statistics.json."
    )
    raise RoveError(f"No action statistics for unnorm_key {key!r}. {known}")


def no_key(statistics: Mapping[str, Any]) -> RoveError:
    """Return the error message for a checkpoint for which `choose_key` found no statistics."""
    if not statistics:
        return RoveError(
            "The checkpoint has action statistics neither in dataset_statistics.json nor in config.json "
            "(norm_stats), so its actions cannot be un-normalised. Add the file, or give statistics."
        )
    names = ", ".join(sorted(statistics))
    return RoveError(f"The checkpoint has statistics of several data sets: set unnorm_key to one of {names}.")


class Normalizer(nn.Module):
    """Conversion between [-1, 1] and a data set's units; unmasked dimensions pass through."""

    q01: Tensor
    q99: Tensor
    mask: Tensor
    centred: Tensor
    """bool [A]: dimensions of which exactly zero is the centre of a bin, `ZERO`."""

    def __init__(self, action: Mapping[str, Any]) -> None:
        """Take the statistics `action`: "q01", "q99" and, optionally, "mask", A entries each."""
        super().__init__()
        low = torch.tensor(action["q01"], dtype=torch.float64)
        used = action.get("mask")
        mask = torch.tensor([True] * len(low) if used is None else used, dtype=torch.bool)
        self.register_buffer("q01", low, persistent=False)
        self.register_buffer("q99", torch.tensor(action["q99"], dtype=torch.float64), persistent=False)
        self.register_buffer("mask", mask, persistent=False)

        self.register_buffer("centred", mask & (self.q01 == -self.q99), persistent=False)

    @property
    def dim(self) -> int:
        """Number of dimensions, A."""
        return len(self.mask)

    def normalize(self, actions: Tensor) -> Tensor:
        """Normalise to float64 [..., A], clipped to [-1, 1] as where the published policies were trained.

        A dimension that hardly moves would otherwise have values of any size.
        """
        span = (self.q99 - self.q01).clamp_min(1e-8)
        scaled = (2 * (actions.double() - self.q01) / span - 1).clamp(-1.0, 1.0)
        return torch.where(self.mask, scaled, actions.double())

    def unnormalize(self, normalized: Tensor) -> Tensor:
        """Convert normalised actions to the data set's units, float64 [..., A]."""
        normalized = normalized.double()
        scaled = 0.5 * (normalized + 1) * (self.q99 - self.q01) + self.q01
        return torch.where(self.mask, scaled, normalized)
