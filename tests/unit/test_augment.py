"""Colour jitter: what it changes, by how much, and what it leaves alone."""

import torch

from rove.training.augment import ColorJitter
from rove.types import Observation

GREY = Observation(torch.full((256, 1, 4, 4, 3), 100, dtype=torch.uint8), ("look",) * 256)


def test_brightness_and_tint_stay_within_their_bounds():
    lit = ColorJitter(0.4, seed=1)(GREY).images.float()
    assert lit.flatten(1, 3).std(1).max() == 0  # a picture's pixels all alike
    level, tint = lit.mean((1, 2, 3, 4)), lit[:, 0, 0, 0]
    assert 53 <= lit.min() < 70 and 130 < lit.max() <= 154  # 100 · (1 ± 0.4) · (1 ± 0.1)
    assert level.std() > 15 and (tint / level[:, None] - 1).abs().max() < 0.2
    assert (tint.amax(1) - tint.amin(1)).max() > 5


def test_the_same_seed_gives_the_same_light_and_each_call_another():
    one, two = ColorJitter(0.4, seed=1), ColorJitter(0.4, seed=1)
    first = one(GREY).images
    assert torch.equal(first, two(GREY).images)
    assert not torch.equal(first, one(GREY).images)


def test_nothing_changes_without_it():
    assert ColorJitter(0.0, seed=1)(GREY) is GREY


def test_white_does_not_wrap_around():
    white = Observation(torch.full((64, 1, 2, 2, 3), 255, dtype=torch.uint8), ("look",) * 64)
    assert ColorJitter(0.4, seed=3)(white).images.min() > 130
