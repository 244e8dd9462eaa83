"""Names of the published tensors of flow policies: read, known by another name, or never used."""

from __future__ import annotations

from rove.policies.flow.config import Family
from rove.policies.flow.statistics import BUFFERS

_LANGUAGE = "model.paligemma_with_expert.paligemma."
_STORED_EMBEDDING = f"{_LANGUAGE}lm_head.weight"
_EMBEDDING = f"{_LANGUAGE}model.language_model.embed_tokens.weight"
_UNUSED = {
    "smolvla": ("model.vlm_with_expert.vlm.lm_head.weight",),
    "pi0": ("model.paligemma_with_expert.gemma_expert.lm_head.weight",),
    # Some files of π0.5 carry what only π0 computes with.
    "pi05": (
        "model.paligemma_with_expert.gemma_expert.lm_head.weight",
        "model.state_proj.weight",
        "model.state_proj.bias",
    ),
}
OWN = ("value_head.", "noise_network.", "pointer.")
"""Beginnings of the names of Rove's own parameters, which no published checkpoint has."""


def is_statistic(key: str) -> bool:
    """Return whether a stored tensor is one of LeRobot's old buffers."""
    return key.startswith(BUFFERS)


def module_name(key: str, family: Family) -> str | None:
    """Return the name of a stored tensor in `FlowVLA`; None where nothing computes with it.

    Files that LeRobot saved begin names with "model."; openpi's do not. π's embedding is stored under the
    name of the head that it is tied to, and in some files a second time under its own.
    """
    name = key if key.startswith(("model.", *OWN)) else f"model.{key}"
    if name in _UNUSED[family]:
        return None
    if family == "smolvla":
        return name
    if name == _STORED_EMBEDDING:
        return _EMBEDDING
    # Both names of the time's network are in use for either family.
    wrong, right = (
        ("action_time_mlp_", "time_mlp_") if family == "pi05" else ("time_mlp_", "action_time_mlp_")
    )
    return name.replace(f"model.{wrong}", f"model.{right}")


def stored_name(name: str, *, prefix: bool) -> str:
    """Return the published name of a parameter of `FlowVLA`, with "model." or without; see `module_name`."""
    key = _STORED_EMBEDDING if name == _EMBEDDING else name
    return key if prefix or key.startswith(OWN) else key.removeprefix("model.")
