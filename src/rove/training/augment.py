"""Colour augmentation of images."""

from __future__ import annotations

from dataclasses import replace

import torch

from rove.types import Observation


class ColorJitter:
    """Random brightness and colour of every image, as a change of light without shadows.

    Every image is multiplied by a brightness of 1 ± `amount`, and each of its channels by 1 ± `amount` / 4,
    uniformly drawn. Where `amount` is 0 nothing is drawn and images stay as they are.
    """

    def __init__(self, amount: float, seed: int) -> None:
        self.amount = amount
        self._generator = torch.Generator().manual_seed(seed)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """State of the random generator."""
        return {"generator": self._generator.get_state()}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Restore what `state_dict` gave."""
        self._generator.set_state(state["generator"])

    def __call__(self, observation: Observation) -> Observation:
        if not self.amount:
            return observation
        images = observation.images

        def gain(*shape: int) -> torch.Tensor:
            return torch.rand(*shape, generator=self._generator) * 2 - 1

        brightness = 1 + self.amount * gain(len(images), 1, 1, 1, 1)
        tint = 1 + self.amount / 4 * gain(len(images), 1, 1, 1, 3)
        lit = images * (brightness * tint).to(images.device)
        return replace(observation, images=lit.round_().clamp_(0, 255).to(torch.uint8))
