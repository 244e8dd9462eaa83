"""Checkpoint directories: read onto the meta device's modules one tensor at a time, and written.

config.json, preprocessor_config.json, tokenizer.json, dataset_statistics.json, and the tensors: see `files`.
A directory with adapters alone names the checkpoint that they belong to, its base.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rove.config.schema import LoraConfig, ValueHeadConfig
from rove.errors import RoveError
from rove.policies import files, hub, lora
from rove.policies.files import Weights, check_weights
from rove.policies.openvla import bins
from rove.policies.openvla.config import Checkpoint
from rove.policies.openvla.core import ActionModel
from rove.policies.openvla.decoding import Decoding
from rove.policies.openvla.heads import NO_LIKELIHOOD
from rove.policies.openvla.language import Attention
from rove.policies.openvla.settings import Head, Settings
from rove.policies.openvla.tokenizer import NO_TOKENIZER, read_tokenizer
from rove.policies.openvla.weights import from_reference, key_groups, to_reference
from rove.policies.reading import Table
from rove.types import ActionSpec

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class CheckpointParts:
    """Contents of a checkpoint directory, before any weight is read."""

    settings: Settings
    """Settings to build and run the policy with: those asked for, saved, or published."""
    directory: Path
    weights: Weights
    new_heads: tuple[str, ...]
    """Prefixes of the heads that are not taken from the checkpoint, such as "value_head."."""
    base: str | None
    """Name of the checkpoint with the weights, for saving adapters alone; None: weights are saved too."""
    published: lora.PublishedAdapter | None
    """The adapter of others that is to be merged into the weights; None without one."""
    saved_lora: LoraConfig | None
    """Configuration of the adapters whose weights are in the checkpoint; None without adapters."""
    lora: LoraConfig | None
    """Configuration of the adapters that the policy is to have; None without adapters."""


def read(
    path: Path | str,
    *,
    decoding: Decoding | None,
    attention: Attention | None,
    unnorm_key: str | None,
    value_head: ValueHeadConfig | Literal["saved"] | None,
    lora: LoraConfig | Literal["saved"] | None,
    head: Head | None,
    temperature: float | None,
    chunk: int | None,
    action_spec: ActionSpec | None,
    statistics: Mapping[str, Any] | None,
    center_crop: bool | None,
    compiled: bool,
) -> CheckpointParts:
    """Read everything but the weights of a checkpoint; see `OpenVLA.from_pretrained`."""
    directory = hub.locate(path)
    base, origin, published = _base(path, directory)
    checkpoint = Checkpoint.read(directory, base) if published else Checkpoint.read(directory)
    weights = Weights(base, overlay=None if directory == base else directory)
    stored = _stored(checkpoint, weights, decoding, head)
    critic = checkpoint.value_head if value_head == "saved" else value_head
    found = Table(statistics, "statistics") if statistics else bins.read_statistics(directory, base)
    asked = None if statistics else unnorm_key or stored["unnorm_key"]
    key = bins.choose_key(found.content, asked)
    dim = bins.check_statistics(found, key, *["proprio"] * stored["proprio"]) if key else 7
    stored |= {"unnorm_key": key}
    for name, value in (("attention", attention), ("temperature", temperature), ("chunk", chunk)):
        stored[name] = value or stored[name]
    settings = Settings(
        **stored,
        checkpoint=checkpoint,
        action_spec=action_spec or checkpoint.action_spec(key, dim),
        statistics=found.content,
        value_head=critic,
        tokenizer=read_tokenizer(directory, checkpoint) or read_tokenizer(base, checkpoint),
        center_crop=center_crop,
        compiled=compiled,
    )
    new = ("value_head.",) if critic != checkpoint.value_head else ()
    new += () if weights.has("action_head") else ("action_head.",)
    saved = checkpoint.lora
    return CheckpointParts(
        settings, directory, weights, new, origin, published, saved, saved if lora == "saved" else lora
    )


def check(path: Path | str) -> None:
    """Look at the files of a checkpoint without reading its weights. Raises RoveError naming one that is
    absent, damaged, or cannot be read."""
    directory = hub.locate(path)
    base, _, published = _base(path, directory)
    checkpoint = Checkpoint.read(directory, base) if published else Checkpoint.read(directory)
    Weights(base, overlay=None if directory == base else directory)
    if not (read_tokenizer(directory, checkpoint) or read_tokenizer(base, checkpoint)):
        raise RoveError(f"{directory}: {NO_TOKENIZER}")


def complete(
    policy: ActionModel, parts: CheckpointParts, *, seed: int, dtype: torch.dtype, device: torch.device
) -> None:
    """Fill a policy made from `parts.settings` with weights; heads that start anew are drawn from `seed`."""
    fill(policy, parts.weights, dtype, device, skip=parts.new_heads, adapter=parts.published)
    generator = torch.Generator().manual_seed(seed)
    for prefix, module in (("value_head.", policy.value_head), ("action_head.", policy.action_head)):
        if module is not None and prefix in parts.new_heads:
            module.to_empty(device="cpu").initialize(generator)
    policy.base = parts.base
    _adapt(policy, parts, generator)


def _base(path: Path | str, directory: Path) -> tuple[Path, str | None, lora.PublishedAdapter | None]:
    """Find the directory of a checkpoint's weights, its name for saving adapters alone (None: the weights are
    saved with them), and the adapter of others that is to be merged."""
    if lora.is_adapter(directory) and not _is_own_adapter(directory):
        if files.has_weights(directory):
            raise RoveError(
                f"{directory} holds the weights of a whole model and a LoRA adapter that config.json does "
                "not mention. Where the weights have it merged already, remove adapter_*; where not, move "
                f"these files into a folder of their own, whose {lora.CONFIG} names this one as "
                "base_model_name_or_path."
            )
        adapter = lora.PublishedAdapter(directory)
        return _locate_base(directory, adapter.base), None, adapter
    about = Checkpoint.read(directory).rove
    name, beside = (about.get(key, str | None, None) for key in ("base", "base_from_here"))
    if name is None:
        here = str(path) if not Path(path).is_dir() else str(directory.resolve())
        return directory, None if "lora" in about else here, None
    if beside is not None and (directory / beside / "config.json").is_file():
        base = (directory / beside).resolve()
        return base, str(base), None
    return _locate_base(directory, name), name, None


def describe(name: Path | str, *, download: bool) -> Checkpoint:
    """Read what a checkpoint, or the base of an adapter, says of itself, without its weights."""
    directory = hub.locate(name, download=download)
    if (directory / "config.json").exists():
        return Checkpoint.read(directory)
    return Checkpoint.read(_locate_base(directory, lora.base_of(directory), download=download))


def _locate_base(directory: Path, name: str, *, download: bool = True) -> Path:
    """Return the directory of the checkpoint `name` that the adapters in `directory` belong to."""
    try:
        base = hub.locate(name, download=download)
    except RoveError as error:
        raise RoveError(f"{directory} holds adapters of {name}, which is not to be had: {error}") from error
    if not (base / "config.json").exists():
        raise RoveError(
            f"{directory} holds adapters of {name}, which has no config.json: a base has to be a whole model."
        )
    return base


def _is_own_adapter(directory: Path) -> bool:
    """Return whether the adapters in a directory are Rove's, which its config.json describes."""
    return (directory / "config.json").exists() and "lora" in Checkpoint.read(directory).rove


def _stored(
    checkpoint: Checkpoint, weights: Weights, decoding: Decoding | None, head: Head | None
) -> dict[str, Any]:
    """Return fields of `Settings` as saved, or as published; decoding and head as asked for.

    Raises RoveError where a part is not there that the checkpoint was trained with.
    """
    regresses = checkpoint.rove.get("head", Literal["discrete", "l1"], None) == "l1"
    has_l1, proprio = weights.has("action_head"), weights.has("proprio_projector")
    if regresses and not has_l1:
        raise RoveError(
            f"{weights.directory} was trained with an L1 head (config.json: rove.head), but its file "
            "action_head--*.pt is not there: copy or download it again."
        )
    if checkpoint.table.get("use_proprio", bool, False) and not proprio:
        raise RoveError(
            f"{checkpoint.config_file}: use_proprio is true, but the part that reads the robot's state, "
            "proprio_projector--*.pt, is not there: copy or download it again."
        )
    if has_l1 and head == "discrete":
        raise RoveError(
            f"{weights.directory} was trained with an L1 head, and not with discrete tokens. {NO_LIKELIHOOD}"
        )
    return checkpoint.settings(decoding, head=head or ("l1" if has_l1 else "discrete"), proprio=proprio)


def fill(
    policy: ActionModel,
    weights: Weights,
    dtype: torch.dtype,
    device: torch.device,
    *,
    skip: Sequence[str],
    adapter: lora.PublishedAdapter | None = None,
) -> None:
    """Copy the weights into the policy, converted and moved one by one, except keys with a prefix in `skip`.

    Heads stay float32. Raises RoveError naming the keys that do not fit.
    """
    towers = policy.checkpoint.towers
    skipped = tuple(skip)
    expected = {
        k: v.shape for k, v in to_reference(policy.state_dict(), towers).items() if not k.startswith(skipped)
    }
    shapes = {k: v for k, v in weights.shapes.items() if not k.startswith(skipped)}
    check_weights(shapes, expected, str(weights.directory))
    if adapter is not None:
        adapter.check(weights)
    for keys in key_groups(shapes):
        stored = {key: weights.read(key) for key in keys}
        if adapter is not None:
            stored = {key: adapter.merged(key, value) for key, value in stored.items()}
        for name, value in from_reference(stored, towers).items():
            wanted = torch.float32 if name.startswith("value_head.") else dtype
            _assign(policy, name, value.to(device, wanted, copy=True))


def _assign(module: nn.Module, name: str, value: Tensor) -> None:
    parent, _, leaf = name.rpartition(".")
    owner = module.get_submodule(parent)
    old = getattr(owner, leaf)
    setattr(owner, leaf, nn.Parameter(value, requires_grad=old.requires_grad))


def _adapt(policy: ActionModel, parts: CheckpointParts, generator: torch.Generator) -> None:
    """Put adapters beside the weights: the saved ones, or new ones after the saved are merged."""
    saved, wanted = parts.saved_lora, parts.lora
    policy.trainable = frozenset(n for n, p in policy.vlm.named_parameters() if p.requires_grad)
    if saved is not None:
        lora.check_rank(parts.directory, saved.rank)
        policy.adapt(saved, generator)
        lora.read(parts.directory, policy.vlm)
        if wanted != saved:
            policy.merge()
    if wanted is not None and wanted != saved:
        origin = None if saved is not None else policy.base
        policy.adapt(wanted, generator)
        policy.base = origin


def save(policy: ActionModel, directory: Path, max_shard_bytes: int) -> None:
    """Write a checkpoint directory; see `OpenVLA.save_pretrained`."""
    base = policy.base if policy.lora is not None else None
    if base is not None and Path(base).resolve() == directory.resolve():
        raise RoveError(f"{directory} holds the weights that the adapters belong to: save them elsewhere.")
    directory.mkdir(parents=True, exist_ok=True)
    files.clear(directory)
    settings = _saved_settings(policy) | (_where(base, directory) if base else {})
    policy.checkpoint.with_settings(settings).write(directory)
    state = to_reference(lora.base_state(policy.state_dict()), policy.checkpoint.towers)
    if base:
        files.write_extras(directory, {k: v for k, v in state.items() if k.startswith(files.HEADS)})
    else:
        files.write(directory, state, max_shard_bytes)
    if policy.lora is not None:
        lora.write(directory, policy.vlm, policy.lora, base or ".")
    (directory / "dataset_statistics.json").write_text(json.dumps(policy.statistics, indent=1) + "\n")
    if policy.tokenizer is not None:
        policy.tokenizer.save(directory)


def _saved_settings(policy: ActionModel) -> dict[str, Any]:
    vlm = policy.vlm
    return {
        "decoding": policy.decoding,
        "attention": policy.attention,
        "head": "discrete" if policy.action_head is None else "l1",
        "chunk": policy.chunk,
        "temperature": policy.temperature,
        "film": vlm.film is not None,
        "proprio": policy.state_normalizer is not None,
        "pointers": 0 if vlm.pointer is None else len(vlm.pointer.queries) // vlm.pointer.images,
        "pointed": 1 if vlm.pointer is None else vlm.pointer.images,
        "placeholders": "zero" if vlm.placeholders is None else "learned",
        "num_images": policy.num_images,
        **({} if policy.center_crop is None else {"center_crop": policy.center_crop}),
        "action_spec": asdict(policy.action_spec),
        "unnorm_key": policy.unnorm_key,
        "value_head": None if policy.value_head is None else asdict(policy.value_head.config),
        "lora": None if policy.lora is None else asdict(policy.lora),
        "base": None,
        "base_from_here": None,
    }


def _where(base: str, directory: Path) -> dict[str, Any]:
    """Return how to find the base again, also after both directories have been moved together."""
    there = Path(base)
    return {"base": base, "base_from_here": os.path.relpath(there, directory) if there.is_dir() else None}
