"""Whether a flow policy fits a suite: what raises nothing where the two differ, and costs success."""

from __future__ import annotations

from fnmatch import fnmatch

from torch import Tensor

from rove.findings import Finding
from rove.policies.flow import loading
from rove.policies.flow.core import FlowModel
from rove.policies.flow.images import Resizer
from rove.policies.flow.prompts import NO_TOKENIZER
from rove.policies.preflight import actions, gripper
from rove.policies.words import unknown_word
from rove.types import Conventions

_NEWLINES = {49280: 198, 257152: 108}
"""Token of a newline by the size of the published vocabularies, SmolVLM2's and PaliGemma's."""
_LONG = 25
"""Actions after which a chunk is a long one to follow without looking."""
_STILL = 1e-6


def examine(policy: FlowModel, conventions: Conventions) -> list[Finding]:
    """Run every check; none changes the policy."""
    return [
        statistics(policy, conventions),
        normalization(policy),
        images(policy, conventions),
        resizer(policy),
        actions(policy.action_spec, conventions),
        gripper(policy.action_spec, *_ends(policy), conventions),
        delta(policy, conventions),
        state(policy, conventions),
        prompt(policy, conventions),
        horizon(policy),
    ]


def statistics(policy: FlowModel, conventions: Conventions) -> Finding:
    """Check that actions are un-normalised by numbers of this suite, and that these span something."""
    found = policy.statistics
    sizes = {len(numbers) for numbers in found.action.values()}
    if sizes and min(sizes) < policy.action_spec.dim:
        detail = f"of {min(sizes)} action dimensions, but the policy gives {policy.action_spec.dim}"
        return Finding("statistics", "fail", detail, "use the statistics of the data that it was trained on")
    moves = policy.action_normalizer.back[: policy.action_spec.dim] > _STILL
    still = [n for n, moving in zip(policy.action_spec.names, moves.tolist(), strict=False) if not moving]
    if still:
        detail = f"the data hardly move in {', '.join(still)}, and neither will the policy"
        return Finding(
            "statistics", "warn", detail, "use data that do, unless the task needs no such movement"
        )
    name = found.asset.rpartition("/")[2]
    if found.layout != "openpi":
        return Finding("statistics", "pass", "of the data that it was trained on, whose name is not recorded")
    wanted = (conventions.suite.partition(":")[0].partition("_")[0], *conventions.statistics)
    if any(fnmatch(name, f"{pattern}*") for pattern in wanted):
        return Finding("statistics", "pass", f"{found.asset} fits {conventions.suite}")
    detail = f"{found.asset} is not of {conventions.suite}"
    return Finding("statistics", "fail", detail, "set unnorm_key to a fitting data set; or fine-tune first")


def normalization(policy: FlowModel) -> Finding:
    """Check how state and action are normalised: by statistics, and as the layout's checkpoints are."""
    of_state, of_action = policy.statistics.methods
    if of_action == "IDENTITY":
        detail = "actions are not normalised: the checkpoint has no statistics of them"
        return Finding(
            "normalisation", "fail", detail, "use a fine-tuned checkpoint, or fine-tune this one first"
        )
    if policy.reads_state and of_state == "IDENTITY":
        detail = "the state is read, but not normalised"
        return Finding("normalisation", "fail", detail, "give statistics with the state's numbers")
    if policy.config.prompt in ("state", "padded_state") and of_state not in ("QUANTILES", "MIN_MAX"):
        detail = f"the prompt gives the state between -1 and 1, but {of_state} leaves that range"
        return Finding(
            "normalisation", "warn", detail, "unless it was trained so, set STATE to QUANTILES in the files"
        )
    return Finding("normalisation", "pass", f"state {of_state}, actions {of_action}")


def images(policy: FlowModel, conventions: Conventions) -> Finding:
    """Check that the suite gives as many pictures as the policy was trained on, beside absent ones."""
    wanted, given, absent = policy.config.cameras, conventions.images, policy.config.absent
    beside = f", {absent} more absent" if absent else ""
    if wanted is None or not given:
        return Finding(
            "images", "pass", "the checkpoint leaves their number open" if given else "not on record"
        )
    if wanted in given:
        return Finding("images", "pass", f"{wanted} at a time{beside}")
    detail = (
        f"the checkpoint reads {wanted} at a time{beside}, {conventions.suite} gives "
        f"{' or '.join(map(str, given))}"
    )
    fix = 'choose cameras that match; one that is always black is named "empty_camera" in input_features'
    return Finding("images", "fail", detail, fix)


def resizer(policy: FlowModel) -> Finding:
    """Check that pictures are resized as the layout's checkpoints were trained."""
    config, layout = policy.config, policy.statistics.layout
    usual: Resizer = "smolvla"
    if config.family != "smolvla":
        usual = "openpi" if layout == "openpi" else "lerobot"
    if config.resizer == usual:
        return Finding("resizer", "pass", f"{usual}'s, to {config.vision.image} pixels")
    detail = f"pictures are resized as {config.resizer}'s, but checkpoints of this layout saw {usual}'s"
    # Both put the picture in the middle; SmolVLA puts it at the right, bottom.
    middle = {config.resizer, usual} == {"lerobot", "openpi"}
    return Finding(
        "resizer",
        "warn" if middle else "fail",
        detail,
        f"set policy.flow.resizer {usual}, unless you know better",
    )


def _ends(policy: FlowModel) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """Return the ends of each action dimension in the data: quantiles, else extremes; None twice: neither."""
    known = policy.statistics.action
    for low, high in (("q01", "q99"), ("min", "max")):
        if low in known and high in known:
            return known[low], known[high]
    return None, None


def delta(policy: FlowModel, conventions: Conventions) -> Finding:
    """Check whether actions are relative to the state as the data set's are: openpi's π0 for LIBERO alone."""
    found, given = policy.statistics, policy.config.delta
    implied = loading.implied_by(found.asset, policy.config.family) if found.layout == "openpi" else {}
    wanted = implied.get("delta", 0)
    if given == wanted or "rove" in policy.config.content:  # one of Rove's own says what it was trained on
        what = f"relative to the state's first {given} numbers" if given else "as the suite takes them"
        return Finding("delta", "pass", f"actions are {what}")
    detail = (
        f"actions are relative to {given} numbers of the state, but checkpoints of this layout to {wanted}"
    )
    return Finding(
        "delta", "fail", detail, f"set policy.flow.delta {wanted}, or correct it in config.json, rove"
    )


def state(policy: FlowModel, conventions: Conventions) -> Finding:
    """Check that the suite gives a robot state of the size that the policy was trained on."""
    if not policy.reads_state and not policy.config.delta:
        return Finding("state", "pass", "not read")
    how = "in the prompt" if policy.config.prompt in ("state", "padded_state") else "by the network"
    wanted, given = policy.state_size, conventions.state
    if given == 0 or (wanted and given is not None and given != wanted):
        detail = f"the policy reads {wanted or 'some'} numbers {how}, {conventions.suite} gives {given}"
        return Finding("state", "fail", detail, "use a checkpoint that was trained on this suite")
    return Finding("state", "pass", f"{wanted or given} numbers, read {how}")


def prompt(policy: FlowModel, conventions: Conventions) -> Finding:
    """Check the prompt's format, and that the tokenizer is the model's and knows the suite's words."""
    prompts, config, found = policy.prompts, policy.config, policy.statistics
    if prompts is None:
        return Finding(
            "prompt",
            "fail",
            f"the checkpoint {NO_TOKENIZER.partition('. ')[0]}",
            NO_TOKENIZER.partition(". ")[2],
        )
    usual = {"smolvla": ("newline",), "pi0": ("newline",), "pi05": ("state", "padded_state")}[config.family]
    if found.layout == "openpi":
        own = loading.implied_by(found.asset, config.family).get("prompt")
        usual = (own,) if own else ("openpi",) if config.family == "pi0" else usual
    elif policy.pointer is not None or "rove" in config.content:
        usual = (*usual, config.prompt)  # one of Rove's own was trained with what it says
    if config.prompt not in usual:
        read = " or ".join(map(repr, usual))
        detail = f"prompts have the format {config.prompt!r}, but checkpoints of this layout read {read}"
        return Finding("prompt", "fail", detail, f"set policy.flow.prompt {usual[0]}")
    newline = _NEWLINES.get(config.text.vocab)
    given = prompts.tokenizer.encode("\n", add_special_tokens=False).ids
    if newline is not None and given != [newline]:
        detail = f"a newline becomes {given}, expected [{newline}]"
        return Finding("prompt", "fail", detail, "use the tokenizer that was published with the model")
    for text in conventions.instructions if conventions.complete else ():
        if (word := unknown_word(prompts.tokenizer, text)) is not None:
            detail = f"the tokenizer does not know every word of {text!r}: {word!r}"
            fix = (
                "fine-tune on this suite's instructions, or list the word in the vocabulary of your own suite"
            )
            return Finding("prompt", "fail", detail, fix)
    return Finding("prompt", "pass", f"{config.prompt!r}")


def horizon(policy: FlowModel) -> Finding:
    """Check how many of the predicted actions are executed before the policy looks again."""
    executed, predicted = policy.chunk, policy.horizon
    if executed > _LONG:
        detail = f"all of {executed} actions are executed before the policy looks again"
        fix = (
            "set rollout.chunk to 5 or 10, as LIBERO is evaluated; n_action_steps of config.json is often 50"
        )
        return Finding("horizon", "warn", detail, fix)
    return Finding("horizon", "pass", f"{executed} of {predicted} predicted actions are executed")
