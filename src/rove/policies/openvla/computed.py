"""The part of a checkpoint's description that Rove computes with; any other value is refused by name.

Such a value would raise nothing by itself: the model would answer differently from the one that was trained.
"""

from __future__ import annotations

from typing import Any

from rove.config.ranges import PositiveFloat
from rove.errors import RoveError
from rove.policies.reading import Table

_TEXT: dict[str, tuple[Any, ...]] = {
    "model_type": ("llama",),
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "sliding_window": (),
    "use_sliding_window": (False,),
    "partial_rotary_factor": (1,),
    "tie_word_embeddings": (False,),
    "quantization_config": (),
    "bos_token_id": (1,),
    "eos_token_id": (2,),
}
"""Values of `text_config` that are computed, by key; null, or no such key, always is."""
_MODEL: dict[str, tuple[Any, ...]] = {
    "n_action_bins": (256,),
    "image_resize_strategy": ("resize-naive",),
    "quantization_config": (),
}
_PREPROCESSOR: dict[str, tuple[Any, ...]] = {
    "image_resize_strategy": ("resize-naive",),
    "tvf_do_letterbox": (False,),
    "do_resize": (True,),
    "do_normalize": (True,),
}
_LANGUAGE_MODELS = ("llama2-", "vicuna-v15-")
"""Beginnings of the names of the language models that are Llamas."""
_ROPE = ("rope_type", "type", "rope_theta", "partial_rotary_factor")
ROPE_THETA = 10000.0


def check_model(config: Table, towers: int) -> None:
    """Raise RoveError where config.json, apart from its `text_config`, describes another computation."""
    for key, values in _MODEL.items():
        config.refuse_others(key, *values)
    config.refuse_others("use_fused_vision_backbone", towers > 1)
    config.refuse_others("timm_override_act_layers", [None] * towers)
    language_model = config.get("llm_backbone_id", str, _LANGUAGE_MODELS[0])
    if not language_model.startswith(_LANGUAGE_MODELS):
        raise RoveError(
            f"{config.where}: llm_backbone_id = {language_model!r}: Rove computes Llamas only, whose names "
            f"begin with {' or '.join(_LANGUAGE_MODELS)}."
        )


def check_text(text: Table, head_dim: int) -> None:
    """Raise RoveError where `text_config` describes another Llama than Rove computes."""
    for key, values in _TEXT.items():
        text.refuse_others(key, *values)
    text.refuse_others("head_dim", head_dim)


def check_preprocessor(preprocessor: Table, towers: int, image_size: int) -> None:
    """Raise RoveError where preprocessor_config.json describes other pixel values than Rove computes."""
    for key, values in _PREPROCESSOR.items():
        preprocessor.refuse_others(key, *values)
    preprocessor.refuse_others("use_fused_vision_backbone", towers > 1)
    preprocessor.refuse_others("input_sizes", *([[3, image_size, image_size]] * n for n in (towers, 1)))


def rope_theta(text: Table) -> float:
    """Return the base of the rotary embedding's wavelengths, under its older or its newer name.

    Raises RoveError where the embedding is scaled, or is not rotary over all channels.
    """
    bases = [text.get("rope_theta", PositiveFloat, None)]
    for name in ("rope_parameters", "rope_scaling"):
        rope = text.table(name)
        for key in ("rope_type", "type"):
            rope.refuse_others(key, "default")
        rope.refuse_others("partial_rotary_factor", 1)
        for key in rope.content:
            if key not in _ROPE:
                rope.refuse_others(key)
        bases.append(rope.get("rope_theta", PositiveFloat, None))
    given = sorted({base for base in bases if base is not None})
    if len(given) > 1:
        raise RoveError(f"{text.where} gives rope_theta twice, as {given[0]:g} and {given[1]:g}: keep one.")
    return given[0] if given else ROPE_THETA
