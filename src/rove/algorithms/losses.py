"""The losses of clipped policy optimisation. Pure and differentiable; metrics come detached.

Every function reduces through `masking.masked_mean`: with the whole batch's `denominator`, losses and
metrics of its micro-batches add up to the batch's.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from rove.algorithms.masking import masked_mean

Level = Literal["token", "action", "chunk"]


def policy_loss(
    logprob: Tensor,
    old_logprob: Tensor,
    advantage: Tensor,
    mask: Tensor,
    *,
    level: Level = "token",
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
    episode_length: Tensor | None = None,
    horizon: int | None = None,
    denominator: float | Tensor | None = None,
    proximal: Tensor | None = None,
    max_behavior_weight: float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Clipped surrogate loss (Schulman et al. 2017, equation 7), with clip-higher and dual clip on demand.

    logprob, old_logprob: float [N, C, A]; advantage: float [N, C] or [N, 1]; mask: bool [N, C].
    `level` is the unit of a ratio: a token, an action (log-probs summed over A) or a chunk (over C and
    A; advantage and mask are then [N, 1]). At chunk level the tokens of actions that an early end left
    unexecuted are in the ratio: they were sampled with the rest, and change its variance, not its mean.
    Ratios are clipped to [1 − clip_low, 1 + clip_high] (Yu et al. 2025, section 3.1, has clip_high larger).
    `dual_clip` c > 1 bounds the loss of a negative advantage by c·|A| (Ye et al. 2020, equation 5).
    `episode_length` int64 [N, 1] with `horizon` selects the length-normalised form; see `masked_mean` for it
    and for `denominator`.
    `proximal`, shaped like `logprob`, decouples the policy that updates stay close to from the older one that
    acted (Hilton et al. 2022; for asynchronous RL Fu et al. 2025): ratios are taken to it, and each term
    counts by proximal over behaviour probability, at most `max_behavior_weight`. It equals the coupled form
    where the two policies are one. `ratio` and `approx_kl` are then weighted, too: means over what the
    proximal policy would do. Adds the metric `behavior_weight`.
    Metrics are means over ratios: `policy_loss`, `ratio`, `approx_kl` (k3 estimate of KL(old ‖ new), nats,
    Schulman 2020), `clip_fraction` and, with a dual clip, `dual_clip_fraction`.
    Raises ValueError on shapes that do not fit the level.
    """
    _check_shapes(logprob, advantage, mask, level)
    behavior, old_logprob = old_logprob, old_logprob if proximal is None else proximal
    if level == "token":
        advantage, counts = advantage[..., None], mask[..., None]
    else:
        logprob, old_logprob, behavior = (_joint(x, level) for x in (logprob, old_logprob, behavior))
        counts = mask
    # Masked ratios are 1: an overflow there would turn a zero weight into NaN.
    log_ratio = (logprob - old_logprob).masked_fill(~counts, 0.0)
    ratio = log_ratio.exp()
    unclipped = -advantage * ratio
    clipped = -advantage * ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    surrogate = torch.maximum(unclipped, clipped)
    bound = None if dual_clip is None else dual_clip * advantage.abs()
    form = (episode_length, horizon, denominator)
    weight = None
    if proximal is not None:
        weight = (old_logprob - behavior).masked_fill(~counts, 0.0).exp().clamp(max=max_behavior_weight)
    held = surrogate if bound is None else torch.minimum(surrogate, bound)
    loss = masked_mean(
        held if weight is None else weight * held,
        mask,
        episode_length=episode_length,
        horizon=horizon,
        denominator=denominator,
    )
    with torch.no_grad():
        k3 = ratio - 1.0 - log_ratio
        metrics = {
            "policy_loss": loss.detach(),
            "ratio": _mean(ratio if weight is None else weight * ratio, mask, *form),
            "approx_kl": _mean(k3 if weight is None else weight * k3, mask, *form),
            "clip_fraction": _mean((clipped > unclipped).to(ratio), mask, *form),
        }
        if bound is not None:
            metrics["dual_clip_fraction"] = _mean((surrogate > bound).to(ratio), mask, *form)
        if weight is not None:
            metrics["behavior_weight"] = _mean(weight, mask, *form)
    return loss, metrics


def value_loss(
    value: Tensor,
    old_value: Tensor,
    returns: Tensor,
    mask: Tensor,
    *,
    clip: float,
    huber_delta: float,
    denominator: float | Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute the larger of clipped and unclipped Huber error, averaged over the mask.

    All tensors have shape [N, C] or [N, 1]; the mask is bool. The clipped prediction leaves the old one by at
    most `clip` (Andrychowicz et al. 2021, appendix B.1). Huber is 0.5·e² inside δ and δ·(|e| − 0.5·δ)
    outside. Metrics: `value_loss`, and `value_clip_fraction`, the share of predictions beyond `clip`.
    """
    step = value - old_value
    near = old_value + step.clamp(-clip, clip)
    error = torch.maximum(
        functional.huber_loss(value, returns, reduction="none", delta=huber_delta),
        functional.huber_loss(near, returns, reduction="none", delta=huber_delta),
    )
    loss = masked_mean(error, mask, denominator=denominator)
    with torch.no_grad():
        fraction = masked_mean((step.abs() > clip).to(value), mask, denominator=denominator)
    return loss, {"value_loss": loss.detach(), "value_clip_fraction": fraction}


def token_mean(
    x: Tensor,
    mask: Tensor,
    *,
    level: Level,
    episode_length: Tensor | None = None,
    horizon: int | None = None,
    denominator: float | Tensor | None = None,
) -> Tensor:
    """Average a quantity of tokens (entropy, KL), in its own unit at every level.

    x: float [N, C, A]; the other arguments as in `policy_loss`, whose weights and denominator it shares.
    """
    if level != "token":
        x = x.mean(-1) if level == "action" else x.mean((1, 2))[:, None]
    return _mean(x, mask, episode_length, horizon, denominator)


def kl_estimate(logprob: Tensor, reference: Tensor) -> Tensor:
    """Estimate KL(policy ‖ reference) at each sampled token, nats: k3 = e^d − 1 − d, d = log π_ref − log π.

    The estimate is unbiased and never negative (Schulman 2020). Inputs and result are float tensors of one
    shape.
    """
    difference = reference - logprob
    return difference.exp() - 1.0 - difference


def _joint(logprob: Tensor, level: Level) -> Tensor:
    """Sum the log-probabilities of tokens [N, C, A] into those of an action [N, C] or of a chunk [N, 1]."""
    return logprob.sum(-1) if level == "action" else logprob.sum((1, 2))[:, None]


def _mean(
    x: Tensor,
    mask: Tensor,
    episode_length: Tensor | None,
    horizon: int | None,
    denominator: float | Tensor | None,
) -> Tensor:
    """Average over elements; `masked_mean`'s plain form divides by actions, of which each has A tokens."""
    mean = masked_mean(x, mask, episode_length=episode_length, horizon=horizon, denominator=denominator)
    return mean / x.shape[-1] if x.dim() == 3 and episode_length is None else mean


def _check_shapes(logprob: Tensor, advantage: Tensor, mask: Tensor, level: Level) -> None:
    n, c, _ = logprob.shape
    wanted = (n, 1) if level == "chunk" else (n, c)
    if mask.shape != wanted:
        raise ValueError(f"policy_loss at {level} level needs a mask {list(wanted)}, not {list(mask.shape)}")
    if advantage.shape not in (wanted, (n, 1)):
        raise ValueError(
            f"policy_loss at {level} level needs an advantage {list(wanted)}"
            f"{'' if level == 'chunk' else f' or {[n, 1]}'}, not {list(advantage.shape)}"
        )
