"""Conversion between published OpenVLA keys and this package's module names, both ways."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from rove.config.schema import TowerConfig

State = dict[str, Tensor]

_PREFIXES = {
    "language_model.model.": "vlm.language_model.",
    "language_model.lm_head.": "vlm.lm_head.",
    "projector.": "vlm.projector.",
    "value_head.": "value_head.",
    "action_head.": "action_head.",
    "placeholders": "vlm.placeholders",
    "film.": "vlm.film.",
    "proprio_projector.": "vlm.proprio_projector.",
    "pointer.": "vlm.pointer.",
}
_TOWER_PREFIXES = ("vision_backbone.featurizer.", "vision_backbone.fused_featurizer.")

# Reference name -> ours, "#" for a block's number; weight and bias follow.
_DINO = {
    "cls_token": "embeddings.cls_token",
    "reg_token": "embeddings.register_tokens",
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "blocks.#.norm1": "encoder.layer.#.norm1",
    "blocks.#.attn.proj": "encoder.layer.#.attention.o_proj",
    "blocks.#.ls1.scale_factor": "encoder.layer.#.layer_scale1.lambda1",
    "blocks.#.norm2": "encoder.layer.#.norm2",
    "blocks.#.mlp.fc1": "encoder.layer.#.mlp.fc1",
    "blocks.#.mlp.fc2": "encoder.layer.#.mlp.fc2",
    "blocks.#.ls2.scale_factor": "encoder.layer.#.layer_scale2.lambda1",
    "norm": "layernorm",
}
_SIGLIP = {
    "patch_embed.proj": "embeddings.patch_embedding",
    "blocks.#.norm1": "encoder.layers.#.layer_norm1",
    "blocks.#.attn.proj": "encoder.layers.#.self_attn.out_proj",
    "blocks.#.norm2": "encoder.layers.#.layer_norm2",
    "blocks.#.mlp.fc1": "encoder.layers.#.mlp.fc1",
    "blocks.#.mlp.fc2": "encoder.layers.#.mlp.fc2",
    "norm": "post_layernorm",
    "attn_pool.latent": "head.probe",
    "attn_pool.proj": "head.attention.out_proj",
    "attn_pool.norm": "head.layernorm",
    "attn_pool.mlp.fc1": "head.mlp.fc1",
    "attn_pool.mlp.fc2": "head.mlp.fc2",
}
_TABLE = {"dinov2": _DINO, "siglip": _SIGLIP}
_QKV = {"dinov2": "encoder.layer.#.attention.", "siglip": "encoder.layers.#.self_attn."}
_ENDS = (".weight", ".bias")


def _rename(key: str, table: Mapping[str, str]) -> str:
    """Return `key` under its other name; unchanged where the table has no rule for it."""
    end = next((end for end in _ENDS if key.endswith(end)), "")
    number = re.search(r"\.(\d+)\.", key)
    stem = re.sub(r"\.\d+\.", ".#.", key.removesuffix(end), count=1)
    if stem not in table:
        return key
    return table[stem].replace("#", number[1] if number else "") + end


def _tower_from_reference(state: State, kind: str) -> State:
    out: State = {}
    for key, value in state.items():
        if match := re.fullmatch(r"blocks\.(\d+)\.attn\.qkv(\..+)", key):
            prefix = _QKV[kind].replace("#", match[1])
            for name, part in zip("qkv", value.chunk(3), strict=True):
                out[f"{prefix}{name}_proj{match[2]}"] = part.contiguous()
        elif key == "pos_embed" and kind == "siglip":
            out["embeddings.position_embedding.weight"] = value[0]
        elif key == "pos_embed":
            # timm adds no position to the class token.
            out["embeddings.position_embeddings"] = torch.cat((torch.zeros_like(value[:, :1]), value), dim=1)
            out["embeddings.mask_token"] = torch.zeros_like(value[0, :1])
        elif match := re.fullmatch(r"attn_pool\.q\.(weight|bias)", key):
            parts = (value, state[f"attn_pool.kv.{match[1]}"])
            out[f"head.attention.in_proj_{match[1]}"] = torch.cat(parts)
        elif not key.startswith("attn_pool.kv."):
            out[_rename(key, _TABLE[kind])] = value
    return out


def _tower_to_reference(state: State, kind: str) -> State:
    table = {ours: theirs for theirs, ours in _TABLE[kind].items()}
    out: State = {}
    for key, value in state.items():
        if match := re.fullmatch(r"(encoder\.layers?\.(\d+)\.\w+\.)q_proj(\..+)", key):
            parts = [state[f"{match[1]}{name}_proj{match[3]}"] for name in "qkv"]
            out[f"blocks.{match[2]}.attn.qkv{match[3]}"] = torch.cat(parts)
        elif re.search(r"\.[kv]_proj\.", key) or key == "embeddings.mask_token":
            continue
        elif key == "embeddings.position_embedding.weight":
            out["pos_embed"] = value[None]
        elif key == "embeddings.position_embeddings":
            out["pos_embed"] = value[:, 1:]
        elif key == "embeddings.cls_token":
            out["cls_token"] = value + state["embeddings.position_embeddings"][:, :1]
        elif match := re.fullmatch(r"head\.attention\.in_proj_(weight|bias)", key):
            width = len(value) // 3
            out[f"attn_pool.q.{match[1]}"] = value[:width]
            out[f"attn_pool.kv.{match[1]}"] = value[width:]
        else:
            out[_rename(key, table)] = value
    return out


def _sub(state: Mapping[str, Tensor], prefix: str) -> State:
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def from_reference(state: Mapping[str, Tensor], towers: Sequence[TowerConfig]) -> State:
    """Convert a published state dict to this package's names; unknown keys keep theirs."""
    out: State = {}
    for index, (tower, theirs) in enumerate(zip(towers, _TOWER_PREFIXES, strict=False)):
        renamed = _tower_from_reference(_sub(state, theirs), tower.kind)
        out |= {f"vlm.towers.{index}.{key}": value for key, value in renamed.items()}
    for key, value in state.items():
        if not key.startswith(_TOWER_PREFIXES[: len(towers)]):
            prefix = next((theirs for theirs in _PREFIXES if key.startswith(theirs)), "")
            out[_PREFIXES.get(prefix, "") + key.removeprefix(prefix)] = value
    return out


def to_reference(state: Mapping[str, Tensor], towers: Sequence[TowerConfig]) -> State:
    """Convert a state dict to published names, the inverse of `from_reference`; tensors may be views."""
    out: State = {}
    for index, (tower, theirs) in enumerate(zip(towers, _TOWER_PREFIXES, strict=False)):
        renamed = _tower_to_reference(_sub(state, f"vlm.towers.{index}."), tower.kind)
        out |= {theirs + key: value for key, value in renamed.items()}
    for theirs, ours in _PREFIXES.items():
        out |= {theirs + key: value for key, value in _sub(state, ours).items()}
    return out


def key_groups(keys: Iterable[str]) -> Iterator[list[str]]:
    """Yield the published keys in the groups that `from_reference` needs at once; most are of one key."""
    for key in keys:
        if ".attn_pool.q." in key:
            yield [key, key.replace(".q.", ".kv.")]
        elif ".attn_pool.kv." not in key:
            yield [key]
