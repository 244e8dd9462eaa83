"""Checkpoint directories: read onto the meta device's modules one tensor at a time, and written.

config.json, preprocessor_config.json, tokenizer.json, dataset_statistics.json, and the tensors: see `files`.
A directory with adapters alone names the checkpoint that they belong to, its base.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rove.config.schema import LoraConfig, PolicyConfig
from rove.errors import RoveError
from rove.policies import hub
from rove.policies.openvla import bins, files, lora
from rove.policies.openvla.config import Checkpoint
from rove.policies.openvla.files import Weights
from rove.policies.openvla.heads import NO_LIKELIHOOD
from rove.policies.openvla.tokenizer import PromptTokenizer, read_tokenizer
from rove.policies.openvla.weights import check_weights, from_reference, to_reference, units

if TYPE_CHECKING:
    from rove.policies.openvla.model import OpenVLA
    from rove.types import ActionSpec

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def from_config(
    cls: type[OpenVLA],
    config: PolicyConfig,
    chunk: int,
    action_spec: ActionSpec,
    statistics: Mapping[str, Any] | None,
    seed: int,
    device: torch.device | str,
) -> Any:
    """The checkpoint that `config` names, run as it says; see `OpenVLA.build`."""
    assert config.checkpoint is not None
    return cls.from_pretrained(
        config.checkpoint,
        decoding=config.decoding,
        attention=config.attention,
        unnorm_key=config.unnorm_key if statistics is None else None,
        value_head=config.value_head,
        lora=config.lora,
        head=config.head,
        temperature=config.temperature,
        chunk=chunk,
        action_spec=None if statistics is None else action_spec,
        statistics=statistics,
        center_crop=config.center_crop,
        compiled=config.compile,
        seed=seed,
        dtype=DTYPES[config.dtype],
        device=device,
    )


def load(cls: type[OpenVLA], path: Path | str, **wanted: Any) -> Any:
    """See `OpenVLA.from_pretrained`."""
    directory = hub.locate(path)
    base, origin, published = _base(path, directory)
    checkpoint = Checkpoint.read(base if published else directory)
    settings = _settings(checkpoint, base, wanted)
    head = checkpoint.value_head if wanted["value_head"] == "saved" else wanted["value_head"]
    given, asked = wanted["statistics"], settings.pop("unnorm_key")
    own = directory if (directory / "dataset_statistics.json").is_file() else base
    statistics = given or bins.read_statistics(own, checkpoint.norm_stats)
    key = bins.choose_key(statistics, None if given else asked)
    dim = len(statistics[key]["action"]["q01"]) if key else 7
    tokenizer = read_tokenizer(directory) or read_tokenizer(base)
    policy = cls(
        checkpoint,
        **settings,
        action_spec=wanted["action_spec"] or checkpoint.action_spec(key, dim),
        statistics=statistics,
        unnorm_key=key,
        value_head=head,
        tokenizer=None if tokenizer is None else PromptTokenizer(tokenizer, checkpoint),
        center_crop=wanted["center_crop"],
        compiled=wanted["compiled"],
    )
    weights = Weights(base, overlay=None if directory == base else directory)
    new = ["value_head."] if head != checkpoint.value_head else []
    new += ["action_head."] if not any(k.startswith("action_head.") for k in weights.shapes) else []
    fill(policy, weights, wanted["dtype"], wanted["device"], skip=new, adapter=published)
    generator = torch.Generator().manual_seed(wanted["seed"])
    for prefix, module in (("value_head.", policy.value_head), ("action_head.", policy.action_head)):
        if module is not None and prefix in new:
            module.to_empty(device="cpu").initialize(generator)
    policy.base = origin
    _adapt(policy, directory, checkpoint.lora, wanted["lora"], generator)
    return policy.to(wanted["device"])


def _base(path: Path | str, directory: Path) -> tuple[Path, str | None, lora.PublishedAdapter | None]:
    """Where a checkpoint's weights are, how to name that place in checkpoints of adapters alone (None: they
    have to hold the weights as well), and the adapter of somebody else's that is to be merged."""
    if (directory / lora.CONFIG).is_file() and not _stands_alone(directory):
        adapter = lora.PublishedAdapter(directory)
        return hub.locate(adapter.base), None, adapter
    about = Checkpoint.read(directory).rove
    name, beside = about.get("base"), about.get("base_from_here")
    if name is None:
        here = str(path) if not Path(path).is_dir() else str(directory.resolve())
        return directory, None if about.get("lora") else here, None
    if beside is not None and (directory / beside / "config.json").is_file():
        base = (directory / beside).resolve()
        return base, str(base), None
    try:
        return hub.locate(name), name, None
    except RoveError as error:
        raise RoveError(f"{directory} holds adapters of {name}, which is not to be had: {error}") from error


def _stands_alone(directory: Path) -> bool:
    """Whether a directory with adapters is Rove's, or holds all weights as well."""
    has_config = (directory / "config.json").is_file()
    return has_config and bool(Checkpoint.read(directory).rove or any(directory.glob("model*.safetensors")))


def _settings(checkpoint: Checkpoint, base: Path, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """What the policy's constructor takes, as asked for, as saved, or as published."""
    has_l1 = files.part_file(base, "action_head") is not None
    stored = "l1" if has_l1 or checkpoint.rove.get("head") == "l1" else "discrete"
    head = wanted["head"] or stored
    if stored == "l1" and head == "discrete":
        raise RoveError(f"{base} was trained with an L1 head, and not with discrete tokens. {NO_LIKELIHOOD}")
    proprio = files.part_file(base, "proprio_projector") is not None
    settings = checkpoint.settings(wanted["decoding"], head=head, proprio=proprio)
    for name in ("attention", "unnorm_key", "temperature", "chunk"):
        settings[name] = wanted[name] or settings[name]
    return settings


def fill(
    policy: OpenVLA,
    weights: Weights,
    dtype: torch.dtype,
    device: torch.device,
    *,
    skip: list[str],
    adapter: lora.PublishedAdapter | None = None,
) -> None:
    """Take the weights over, converted and moved one by one; keys that begin as in `skip` are left out.

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
    for keys in units(shapes):
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


def _adapt(
    policy: OpenVLA,
    directory: Path,
    saved: LoraConfig | None,
    wanted: LoraConfig | str | None,
    generator: torch.Generator,
) -> None:
    """Put adapters beside the weights: the saved ones, or new ones after those are merged."""
    keep = wanted in ("saved", saved)
    policy.trainable = frozenset(n for n, p in policy.vlm.named_parameters() if p.requires_grad)
    if saved is not None:
        policy.adapt(saved, generator)
        lora.read(directory, policy.vlm)
        if not keep:
            merge(policy)
    if not keep and isinstance(wanted, LoraConfig):
        origin = None if saved is not None else policy.base
        policy.adapt(wanted, generator)
        policy.base = origin


def merge(policy: OpenVLA) -> None:
    """See `OpenVLA.merge`."""
    if policy.lora is not None:
        lora.merge(policy.vlm)
        for name, parameter in policy.vlm.named_parameters():
            parameter.requires_grad_(name in policy.trainable)
        policy.lora, policy.adapters, policy.base = None, (), None


def save(policy: OpenVLA, directory: Path, max_shard_bytes: int) -> None:
    """See `OpenVLA.save_pretrained`."""
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


def _saved_settings(policy: OpenVLA) -> dict[str, Any]:
    vlm = policy.vlm
    return {
        "decoding": policy.decoding,
        "attention": policy.attention,
        "head": "discrete" if policy.action_head is None else "l1",
        "chunk": policy.chunk,
        "temperature": policy.temperature,
        "film": vlm.film is not None,
        "proprio": policy.state_normalizer is not None,
        "pointers": 0 if vlm.pointer is None else len(vlm.pointer.queries),
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
    """How to find the base again, also after both have been moved together."""
    there = Path(base)
    return {"base": base, "base_from_here": os.path.relpath(there, directory) if there.is_dir() else None}
