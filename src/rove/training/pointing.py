"""Pointing: a policy from scratch learns to point at what its instruction is about, before and while it
learns to act.

    picture, instruction ─ towers, projector ─▶ patch embeddings ─ a vector per role ─▶ softmax over patches

A published VLA starts from a vision-language model that finds what a sentence names; this stands in for it.
The loss reaches the towers directly, where the action tokens of a demonstration have to discover, through
the language model, that a picture matters at all: a few hundred steps do what tens of thousands of action
labels did not.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rove.config.schema import SFTConfig
from rove.errors import RoveError
from rove.policies.base import Locator
from rove.training.batches import batches
from rove.training.optim import Optimizer
from rove.types import Demonstrations


class Pointing(nn.Module):
    """K vectors, one a role (object, destination, hand): a patch is pointed at as far as it lies along one.

    It listens to the policy it is made for: after every forward pass of that, `loss` is about its picture.
    The vectors are a scaffold, and are not saved with the policy.
    """

    seen: Tensor

    def __init__(self, policy: Locator, pictures: Demonstrations, seed: int) -> None:
        """Raises RoveError where the pictures do not say where things are in them."""
        super().__init__()
        if pictures.points is None:
            raise RoveError("The pictures do not say where things are in them; set sft.grounding to 0.")
        self.views, self.size = pictures.images.shape[1:3]
        policy.projector.register_forward_hook(self._see)
        with torch.no_grad():
            policy.patches(pictures.observation(torch.tensor([0])))
        roles, width = pictures.points.shape[1], self.seen.shape[-1]
        noise = torch.randn(roles, width, generator=torch.Generator().manual_seed(seed))
        self.vectors = nn.Parameter((noise / math.sqrt(width)).to(self.seen.device))

    def _see(self, module: nn.Module, inputs: tuple, patches: Tensor) -> None:
        self.seen = patches

    def loss(self, points: Tensor, denominator: int) -> Tensor:
        """Cross-entropy, nats, of what the policy saw last against those of points [B, K, 2] in the first
        camera's picture that are there, over `denominator`: how many there are in the whole batch."""
        patches = self.seen[:, : self.seen.shape[1] // self.views]
        # The direction of an embedding counts, not its length.
        unit = F.rms_norm(patches, patches.shape[-1:])
        there = present(points)
        side = math.isqrt(patches.shape[1])
        target = spread(points[there], self.size, side).to(patches.device)
        logits = torch.einsum("kd,bpd->bkp", self.vectors, unit)[there.to(patches.device)].float()
        return -(target * logits.log_softmax(-1)).sum() / denominator


def present(points: Tensor) -> Tensor:
    """bool [..., K] of points [..., K, 2]: those that are there."""
    return ~points.isnan().any(-1)


def spread(points: Tensor, size: int, side: int) -> Tensor:
    """How points [..., 2], in pixels of a picture `size` wide, lie on a grid of side x side patches.

    Returns [..., side²]: bilinear weights of the four nearest patch centres, so that the weighted mean of
    the centres is the point itself, to a fraction of a patch.
    """
    place = (points * (side / size) - 0.5).clamp(0, side - 1)
    weight = (1 - (place[..., None] - torch.arange(side)).abs()).clamp_min(0)
    x, y = weight.unbind(-2)
    return (y[..., :, None] * x[..., None, :]).flatten(-2)


def learn_to_point(
    policy: Locator,
    pointing: Pointing,
    pictures: Demonstrations,
    config: SFTConfig,
    seed: int,
    *,
    max_bad_steps: int,
    on_step: Callable[[int, dict[str, float]], None] = lambda step, metrics: None,
) -> None:
    """Train `policy` in place for `config.grounding_steps` optimizer steps, on pictures alone."""
    assert isinstance(policy, nn.Module) and pictures.points is not None
    steps = config.grounding_steps
    optimizer = Optimizer(nn.ModuleList([policy, pointing]), config.optim, steps, max_bad_steps)
    rows_of = batches(len(pictures), config.batch, seed)
    policy.train()
    while optimizer.steps < steps:
        rows = torch.from_numpy(next(rows_of))
        total, count = 0.0, int(present(pictures.points[rows]).sum())
        for part in rows.split(config.micro_batch):
            policy.patches(pictures.observation(part))
            error = pointing.loss(pictures.points[part], count)
            error.backward()
            total += error.item()
        norm, _ = optimizer.step()
        on_step(optimizer.steps, {"pointing/loss": total, "pointing/grad_norm": norm})
    policy.eval()
