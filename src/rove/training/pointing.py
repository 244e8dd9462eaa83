"""Learning to point: the positions of an instruction's objects, learned patch by patch.

A policy from scratch that is shown actions alone needs many thousands before it finds what a sentence names:
each tells a little, about the whole policy at once. Trained on the positions themselves, with a loss over the
patches of the image, it finds them within a few hundred steps.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rove import transfer
from rove.config.schema import SFTConfig
from rove.errors import RoveError
from rove.policies.base import Locator
from rove.training.augment import ColorJitter
from rove.training.batches import OnStep, gradient_descent
from rove.training.snapshots import Snapshots
from rove.types import Demonstrations


def pointing_loss(logits: Tensor, points: Tensor, size: int, denominator: int) -> Tensor:
    """Cross-entropy, nats, of logits [B, K, P] against points [B, K, 2], in pixels of an image `size` wide.

    Points that are not there are left out. The sum is over `denominator`, their number in the whole batch.
    """
    # A point that is not there has a target of zeros: an index by a mask would make the host wait.
    target = (
        bilinear_targets(points.nan_to_num(), size, math.isqrt(logits.shape[-1])) * present(points)[..., None]
    )
    return -(transfer.to(target, logits.device) * logits.log_softmax(-1)).sum() / denominator


def pointed_at(points: Tensor, logits: Tensor) -> Tensor:
    """Return the points [B, K, 2] that a policy with logits [B, K, P] is to find: of those that are known,
    those of the first pictures. Raises RoveError where fewer are known."""
    wanted, known = logits.shape[1], points.shape[1]
    if wanted > known or known % wanted:
        raise RoveError(
            f"The policy has {wanted} pointers, the demonstrations say where {known} points are: set "
            "policy.pointers to the number in a picture, policy.pointed to that of pictures, or collect them "
            "anew."
        )
    return points[:, :wanted]


def present(points: Tensor) -> Tensor:
    """Return which of points [..., K, 2] are there, bool [..., K]."""
    return ~points.isnan().any(-1)


def bilinear_targets(points: Tensor, size: int, side: int) -> Tensor:
    """Distribute points [..., 2], in pixels of an image `size` wide, over a grid of side x side patches.

    Returns [..., side²]: bilinear weights of the four nearest patch centres, so that the weighted mean of the
    centres is the point itself, to a fraction of a patch.
    """
    place = (points * (side / size) - 0.5).clamp(0, side - 1)
    weight = (1 - (place[..., None] - torch.arange(side)).abs()).clamp_min(0)
    x, y = weight.unbind(-2)
    return (y[..., :, None] * x[..., None, :]).flatten(-2)


def learn_to_point(
    policy: Locator,
    grounding: Demonstrations,
    config: SFTConfig,
    seed: int,
    *,
    max_bad_steps: int,
    on_step: OnStep = lambda step, metrics: None,
    snapshots: Snapshots | None = None,
) -> None:
    """Train `policy` in place for `config.grounding_steps` optimizer steps, on grounding images alone.

    Raises RoveError where the images have no points, or where the policy does not point.
    """
    if grounding.points is None:
        raise RoveError("The pictures do not say where things are in them; set sft.grounding to 0.")
    points, size = grounding.points, grounding.images.shape[-2]
    jitter = ColorJitter(config.color_jitter, seed)

    def gradient(rows: Tensor, step: int) -> dict[str, Tensor]:
        losses = []
        for part in rows.split(config.micro_batch):
            logits = policy.point(jitter(grounding.observation(part)))
            count = int(present(pointed_at(points[rows], logits)).sum())
            loss = pointing_loss(logits, pointed_at(points[part], logits), size, count)
            loss.backward()
            losses.append(loss.detach())
        return {"loss": torch.stack(losses).sum()}

    gradient_descent(
        policy,
        len(grounding),
        config,
        seed,
        gradient,
        name="pointing",
        steps=config.grounding_steps,
        max_bad_steps=max_bad_steps,
        on_step=on_step,
        jitter=jitter,
        snapshots=snapshots,
    )
