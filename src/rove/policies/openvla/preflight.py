"""Checks that a policy fits a suite, and still does what its weights were trained for; a function each.

They look for mistakes that raise nothing by themselves but cost success. A check that runs the model runs the
functions that act, on images of noise.
"""

from __future__ import annotations

from dataclasses import replace
from fnmatch import fnmatch

import torch
from torch import Tensor

from rove.findings import Finding
from rove.policies import lora
from rove.policies.openvla import decoding
from rove.policies.openvla.config import BINS
from rove.policies.openvla.core import ActionModel
from rove.policies.openvla.heads import NO_LIKELIHOOD
from rove.policies.openvla.language import Attention
from rove.policies.openvla.vlm import Prefix
from rove.policies.preflight import actions, gripper
from rove.types import Conventions

MASS = 0.5
"""Least probability that a trained policy gives the action tokens."""
STILL = 1e-6
"""Range of an action dimension, in its data's units, up to which it does not move."""
_BOS = 1


def examine(policy: ActionModel, conventions: Conventions, *, rl: bool) -> list[Finding]:
    """Run every check; none changes the policy."""
    # What learned from this suite's own demonstrations learned from what it is given here: conventions of
    # published checkpoints, and examples of instructions from parts that it does not know, are nothing to it.
    at_home = (policy.unnorm_key or "").partition(":")[0] == conventions.suite.partition(":")[0]
    told = conventions.instructions if conventions.complete else ()
    own = replace(conventions, center_crop=None, prompt=None, instructions=told)
    expected = own if at_home else conventions
    findings = [
        statistics(policy, conventions),
        images(policy, conventions),
        actions(policy.action_spec, conventions),
        gripper(policy.action_spec, *_ends(policy), conventions),
        state(policy, conventions),
        crop(policy, expected),
        prompt(policy, expected),
        likelihood(policy, rl),
    ]
    with torch.no_grad():
        prefix = _example(policy, conventions)
        findings.append(attention(policy, prefix))
        if policy.action_head is None:
            findings += [action_tokens(policy, prefix), trained_attention(policy, prefix)]
    return findings


# --- what the files say, beside what the suite needs ----------------------------------------------


def statistics(policy: ActionModel, conventions: Conventions) -> Finding:
    """Check that actions are un-normalised by this suite's percentiles, and that these span something.

    Those of another data set would scale and shift every action.
    """
    finding, still = _data_set(policy, conventions), []
    if policy.normalizer is not None:
        moves = ~policy.normalizer.mask | (policy.normalizer.q99 - policy.normalizer.q01 > STILL)
        still = [name for name, moving in zip(policy.action_spec.names, moves, strict=True) if not moving]
    if finding.status != "pass" or not still:
        return finding
    detail = f"{policy.unnorm_key}: its data hardly move in {', '.join(still)}, and neither will the policy"
    return Finding("statistics", "warn", detail, "use data that do, unless the task needs no such movement")


def _data_set(policy: ActionModel, conventions: Conventions) -> Finding:
    key, names = policy.unnorm_key, ", ".join(sorted(policy.statistics)) or "none"
    if key is None:
        detail = f"no data set is chosen; the checkpoint has {names}"
        return Finding("statistics", "fail", detail, "set unnorm_key (--policy.unnorm_key) to one of them")
    plain = key.removesuffix("_no_noops")
    if any(fnmatch(name, pattern) for name in (key, plain) for pattern in conventions.statistics):
        return Finding("statistics", "pass", f"{key} fits {conventions.suite}")
    if not conventions.statistics:
        known = key in (conventions.suite, "bounds")
        detail = f"{key}; what {conventions.suite} needs is not on record"
        return Finding("statistics", "pass" if known else "warn", detail)
    wanted = ", ".join(conventions.statistics)
    detail = f"{key} is not of {conventions.suite}, which needs one of: {wanted}"
    fix = f"set unnorm_key (--policy.unnorm_key) to a fitting one of: {names}; or fine-tune first"
    return Finding("statistics", "fail", detail, fix)


def images(policy: ActionModel, conventions: Conventions) -> Finding:
    """Check that the suite gives as many images as the policy was trained on.

    With another number the policy would read its prompt at other positions.
    """
    wanted, given = policy.num_images, conventions.images
    if given and _pointed(policy) > max(given):
        return Finding(
            "images",
            "fail",
            f"the policy points in {_pointed(policy)} pictures, {conventions.suite} gives {max(given)}",
            "choose a suite with as many cameras",
        )
    if wanted is None or not given:
        return Finding(
            "images", "pass", "the checkpoint leaves their number open" if given else "not on record"
        )
    if wanted in given:
        return Finding("images", "pass", f"{wanted} at a time")
    detail = (
        f"the checkpoint reads {wanted} at a time, {conventions.suite} gives {' or '.join(map(str, given))}"
    )
    return Finding(
        "images",
        "fail",
        detail,
        'choose cameras that match, or correct "num_images" below "rove" in config.json',
    )


def _pointed(policy: ActionModel) -> int:
    """How many pictures the policy needs to point in."""
    return 1 if policy.vlm.pointer is None else policy.vlm.pointer.images


def _ends(policy: ActionModel) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """Return the ends of each action dimension in the data; None twice where nothing is un-normalised."""
    normalizer = policy.normalizer
    return (None, None) if normalizer is None else (normalizer.q01, normalizer.q99)


def state(policy: ActionModel, conventions: Conventions) -> Finding:
    """Check that the suite gives a robot state of the size that the policy's projector was trained on."""
    wanted = 0 if policy.state_normalizer is None else policy.state_normalizer.dim
    if not wanted:
        return Finding("state", "pass", "not read")
    if conventions.state is None or conventions.state == wanted:
        return Finding("state", "pass", f"{wanted} numbers")
    detail = f"the policy reads {wanted} numbers, {conventions.suite} gives {conventions.state}"
    return Finding("state", "fail", detail, "use a checkpoint without proprio, or one of this suite")


def crop(policy: ActionModel, conventions: Conventions) -> Finding:
    """Check that images are cropped as in training.

    Without the crop that training ended on, everything in the image is 5 % smaller than it was.
    """
    usual, chosen = conventions.center_crop, policy.center_crop
    if usual is None or usual == bool(chosen):
        return Finding("crop", "pass", "centre crop" if chosen else "no crop")
    say = f"checkpoints of {conventions.suite} are {'' if usual else 'not '}usually cropped"
    if chosen is None:
        return Finding(
            "crop",
            "fail",
            f"{say}, and this one does not say",
            f"set center_crop {str(usual).lower()}, or the other",
        )
    detail = f"{say}, this one is {'' if chosen else 'not '}to be"
    return Finding("crop", "warn", detail, f"unless you know better: center_crop {str(usual).lower()}")


def prompt(policy: ActionModel, conventions: Conventions) -> Finding:
    """Check the prompt's template, and that the tokenizer knows every word of the suite's instructions."""
    if policy.tokenizer is None:
        fix = "put the checkpoint's tokenizer.json beside its config.json"
        return Finding("prompt", "fail", "the checkpoint has no tokenizer", fix)
    template = policy.checkpoint.prompt
    if conventions.prompt is not None and template != conventions.prompt:
        detail = f"{template!r}, but checkpoints of {conventions.suite} read {conventions.prompt!r}"
        return Finding("prompt", "fail", detail, 'correct "prompt" below "rove" in config.json')
    for text in conventions.instructions:
        ids = policy.tokenizer.encode(text)
        if ids[0] != _BOS or ids[-1] != policy.checkpoint.prompt_end:
            detail = (
                f"{text!r} becomes {ids[0]} … {ids[-1]}, expected {_BOS} … {policy.checkpoint.prompt_end}"
            )
            fix = "use the tokenizer.json that was published with the checkpoint"
            return Finding("prompt", "fail", detail, fix)
        if (word := policy.tokenizer.unknown(text)) is not None:
            fix = (
                "fine-tune on this suite's instructions, or evaluate on the one it was trained on; a suite "
                "of your own has to list the word in its vocabulary"
            )
            detail = f"the tokenizer does not know every word of {text!r}: {word!r}"
            return Finding("prompt", "fail", detail, fix)
    return Finding("prompt", "pass", repr(template))


def likelihood(policy: ActionModel, rl: bool) -> Finding:
    """Check that actions have a probability, by which RL weighs them."""
    if policy.action_head is None:
        return Finding("likelihood", "pass", "256 tokens a dimension")
    detail = "actions come from the L1 head, which gives them none"
    return Finding("likelihood", "fail" if rl else "warn", detail, NO_LIKELIHOOD)


# --- what the model does --------------------------------------------------------------------------


def attention(policy: ActionModel, prefix: Prefix) -> Finding:
    """Check that the model attends as it is set to.

    The last action position is disturbed: the first may change if, and only if, attention is bidirectional.
    """
    looks = looks_ahead(policy, prefix)
    wanted = policy.attention == "bidirectional"
    if looks == wanted:
        return Finding("attention", "pass", f"{policy.attention}, as an early token shows")
    detail = f"set to {policy.attention}, but an early token {'sees' if looks else 'does not see'} a late one"
    fix = "the installed torch or transformers computes another mask: make clean setup, and report this"
    return Finding("attention", "fail", detail, fix)


def looks_ahead(policy: ActionModel, prefix: Prefix) -> bool:
    """Return whether the hidden state that predicts the first token changes with the input of the last."""
    vlm, width = policy.vlm, prefix.embeddings.shape[2]
    loud = prefix.embeddings.float().std().to(prefix.embeddings.dtype)
    count = max(policy.chunk * policy.action_spec.dim, 2)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1, 1, width, generator=generator).to(prefix.embeddings)
    suffix = prefix.embeddings.new_zeros(1, count, width)
    disturbed = torch.cat((suffix[:, :-1], 10 * loud * noise), dim=1)
    before, after = (
        decoding.after_prompt(vlm, prefix, one, policy.attention)[:, 0].float() for one in (suffix, disturbed)
    )
    return float((after - before).norm() / before.norm()) > 1e-6


def action_tokens(policy: ActionModel, prefix: Prefix) -> Finding:
    """Check that probability over the whole vocabulary lies on the action tokens, as training leaves it."""
    mass, elsewhere, _ = _token_mass(policy, prefix, policy.attention)
    if mass >= MASS:
        return Finding("action tokens", "pass", f"{mass:.0%} of probability")
    if elsewhere >= MASS:
        detail = f"the model prefers other tokens: {mass:.1%} of probability is on the 256 action tokens"
        fix = (
            "check vocab_size, pad_to_multiple_of and tokenizer, or use a checkpoint that was trained to act"
        )
        return Finding("action tokens", "fail", detail, fix)
    detail = (
        f"{mass:.1%} of probability, the rest all over the vocabulary: the model is hardly trained to act"
    )
    return Finding("action tokens", "warn", detail, "fine-tune it first, unless it is new on purpose")


def trained_attention(policy: ActionModel, prefix: Prefix) -> Finding:
    """Check that weights were not trained with the other attention.

    Predictions of such weights are more confident under it, on the action tokens.
    """
    if policy.decoding == "autoregressive":
        return Finding("trained for", "pass", "autoregressive decoding, which is causal")
    other: Attention = "bidirectional" if policy.attention == "causal" else "causal"
    mass, _, entropy = _token_mass(policy, prefix, policy.attention)
    other_mass, _, other_entropy = _token_mass(policy, prefix, other)
    if other_mass > mass + 0.2 or (other_mass >= mass - 0.01 and other_entropy < entropy - 1.0):
        detail = (
            f"under {other} attention the model is surer: {other_mass:.0%} instead of {mass:.0%} on action "
            f"tokens, {other_entropy:.1f} instead of {entropy:.1f} nats"
        )
        fix = f"it looks trained so: set attention {other} (--policy.attention {other})"
        return Finding("trained for", "warn", detail, fix)
    return Finding("trained for", "pass", f"{policy.attention} attention, or for neither more than the other")


def _token_mass(policy: ActionModel, prefix: Prefix, attention: Attention) -> tuple[float, float, float]:
    """Return mean probability of the action tokens, of the likeliest other token, and mean entropy."""
    vlm, count = policy.vlm, policy.chunk * policy.action_spec.dim
    if policy.decoding == "parallel":
        hidden = decoding.parallel(vlm, prefix, count, attention, policy.checkpoint.stop_token)
    else:
        _, _, hidden = decoding.one_by_one(vlm, prefix, count, 1.0, None)
    everything = lora.rows(vlm.lm_head, hidden, slice(None)).float().softmax(-1)
    chosen = slice(vlm.vocab_size - BINS, vlm.vocab_size)
    inside = everything[..., chosen].sum(-1)
    others = everything.clone()
    others[..., chosen] = 0.0
    entropy = -(everything * everything.clamp_min(1e-30).log()).sum(-1)
    return float(inside.mean()), float(others.amax(-1).mean()), float(entropy.mean())


def _example(policy: ActionModel, conventions: Conventions) -> Prefix:
    """Make a prompt with images of noise; without a tokenizer its ids have no meaning."""
    device, size = policy.device, policy.checkpoint.image_size
    count = policy.num_images or max(_pointed(policy), min(conventions.images, default=1))
    generator = torch.Generator().manual_seed(0)
    pictures = torch.randint(0, 256, (1, count, size, size, 3), dtype=torch.uint8, generator=generator)
    if policy.tokenizer is not None and conventions.instructions:
        ids = torch.tensor([policy.tokenizer.encode(conventions.instructions[0])], device=device)
    else:
        ids = torch.tensor([[_BOS, *range(4, 16), policy.checkpoint.prompt_end]], device=device)
    robot: Tensor | None = None
    if policy.state_normalizer is not None:
        robot = torch.zeros(1, policy.state_normalizer.dim, device=device)
    return policy.vlm.prefix(ids, None, policy.process_images(pictures), robot)
