"""LoRA through `peft`: adapters beside frozen linear layers, kept, merged, or written by themselves.

An adapter of Rove's is stored under this package's module names, in the layout of `peft`. Those that others
trained on the published layout, where query, key and value are one matrix, are merged while they are read.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rove.config.schema import LoraConfig
from rove.errors import RoveError, nearest
from rove.policies.openvla.files import Weights, open_tensors, save

CONFIG, FILE = "adapter_config.json", "adapter_model.safetensors"
ALL = "all-linear"
_NAME = "default"
_SAVED = "base_model.model."


def inject(model: nn.Module, config: LoraConfig, generator: torch.Generator) -> None:
    """Put adapters beside the linear layers of `model` that `config` names, and freeze all else.

    Layers that are never computed get none. They start as no change: A is normal with standard deviation
    1 / rank (drawn from `generator`), B zero. Raises RoveError on an unknown target, or without `peft`.
    """
    try:
        import peft
    except ModuleNotFoundError as error:
        raise RoveError('policy.lora needs peft, which is absent: pip install "rove[lora]".') from error
    targets = find_targets(model, config)
    rank = config.rank
    settings = peft.LoraConfig(
        r=rank,
        lora_alpha=rank if config.alpha is None else config.alpha,  # pyright: ignore[reportArgumentType]
        target_modules=targets,
        lora_dropout=0.0,
        bias="none",
    )
    peft.inject_adapter_in_model(settings, model, adapter_name=_NAME)
    model.requires_grad_(False)
    for layer in adapted(model).values():
        a, b = layer.lora_A[_NAME], layer.lora_B[_NAME]
        a.to(torch.float32)
        b.to(torch.float32)
        start = torch.empty(a.weight.shape).normal_(0.0, 1.0 / rank, generator=generator)
        with torch.no_grad():
            a.weight.copy_(start)
            b.weight.zero_()
        a.requires_grad_(True)
        b.requires_grad_(True)


def find_targets(model: nn.Module, config: LoraConfig) -> list[str]:
    """Full names of the linear layers meant, those left out whose weights nothing reads."""
    linear = {
        name: set(name.split("."))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module.weight.requires_grad
    }
    known = {ALL}.union(*linear.values())
    for target in config.targets:
        if target not in known:
            names = (name for name in known if not name.isdigit())
            raise RoveError(f"policy.lora.targets: no linear layer is {target!r}. {nearest(target, names)}")
    if not config.targets:
        raise RoveError(f"policy.lora.targets is empty: set it to {ALL}, or set --policy.lora none.")
    wanted = set(config.targets)
    return [name for name, parts in linear.items() if ALL in wanted or parts & wanted]


def adapted(model: nn.Module) -> dict[str, Any]:
    """The layers that carry an adapter, by name."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}


def delta(layer: Any) -> Tensor:
    """What an adapter adds to its layer's weight, [out, in]: scaling · B · A."""
    return layer.scaling[_NAME] * (layer.lora_B[_NAME].weight @ layer.lora_A[_NAME].weight)


def rows(layer: nn.Module, where: slice) -> Tensor:
    """Rows of a linear layer's weight, its adapter included if it has one."""
    weight = layer.weight[where]  # pyright: ignore[reportIndexIssue]
    if not hasattr(layer, "lora_A"):
        return weight
    a, b = layer.lora_A[_NAME].weight, layer.lora_B[_NAME].weight[where]  # pyright: ignore
    return weight + (layer.scaling[_NAME] * (b @ a)).to(weight.dtype)  # pyright: ignore


@torch.no_grad()
def merge(model: nn.Module) -> None:
    """Add the adapters to their layers' weights and take them away."""
    for name, layer in adapted(model).items():
        base = layer.get_base_layer()
        base.weight.copy_(base.weight.float() + delta(layer).float())
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, base)
    if hasattr(model, "peft_config"):
        del model.peft_config


def base_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict without adapters, under the names that it had before there were any."""
    return {
        key.replace(".base_layer.", "."): value
        for key, value in state.items()
        if ".lora_A." not in key and ".lora_B." not in key
    }


def write(directory: Path, model: nn.Module, config: LoraConfig, base: str) -> None:
    """`adapter_config.json` and `adapter_model.safetensors`; `base` is the checkpoint that they belong to."""
    state = {
        _SAVED + name.replace(f".{_NAME}.", "."): value
        for name, value in model.state_dict().items()
        if ".lora_A." in name or ".lora_B." in name
    }
    save(directory / FILE, state)
    about = {
        "peft_type": "LORA",
        "base_model_name_or_path": base,
        "r": config.rank,
        "lora_alpha": config.rank if config.alpha is None else config.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(adapted(model)),
    }
    (directory / CONFIG).write_text(json.dumps(about, indent=1) + "\n")


@torch.no_grad()
def read(directory: Path, model: nn.Module) -> None:
    """Fill the adapters of `model` with what `write` wrote. Raises RoveError where the two do not fit."""
    path = directory / FILE
    own = {n: p for n, p in model.named_parameters() if ".lora_A." in n or ".lora_B." in n}
    with open_tensors(path) as file:
        stored = {name.removeprefix(_SAVED): name for name in file.keys()}  # noqa: SIM118
        expected = {name.replace(f".{_NAME}.", "."): parameter for name, parameter in own.items()}
        for name in sorted(expected.keys() ^ stored.keys()):
            raise RoveError(f"{path}: {'missing' if name in expected else 'unexpected'} {name}.")
        for name, parameter in expected.items():
            value = file.get_tensor(stored[name])
            if value.shape != parameter.shape:
                raise RoveError(
                    f"{path}: {name} has shape {list(value.shape)}, expected {list(parameter.shape)}."
                )
            parameter.copy_(value)


class PublishedAdapter:
    """A LoRA that was trained on the published layout: what it adds to which key."""

    def __init__(self, directory: Path) -> None:
        """Raises RoveError where it is more than a plain LoRA."""
        self.path = directory / FILE
        about = json.loads((directory / CONFIG).read_text())
        more = ("use_dora", "modules_to_save", "rank_pattern", "alpha_pattern")
        odd = [name for name in more if about.get(name)]
        if about.get("peft_type") != "LORA" or about.get("bias", "none") != "none" or odd:
            what = ", ".join(odd) or f"{about.get('peft_type')} with bias {about.get('bias')!r}"
            raise RoveError(f"{directory / CONFIG} has {what}; only a plain LoRA can be merged.")
        root = about["r"] ** 0.5 if about.get("use_rslora") else about["r"]
        self.scale = about["lora_alpha"] / root
        self.base = str(about["base_model_name_or_path"])
        with open_tensors(self.path) as file:
            self._names = {name.removeprefix(_SAVED): name for name in file.keys()}  # noqa: SIM118
        self.keys = set(self._keys())

    def _keys(self) -> Iterator[str]:
        for name in self._names:
            stem, _, kind = name.removesuffix(".weight").rpartition(".")
            if kind not in ("lora_A", "lora_B") or f"{stem}.lora_A.weight" not in self._names:
                raise RoveError(f"{self.path}: {name} is no part of a plain LoRA.")
            yield f"{stem}.weight"

    def check(self, weights: Weights) -> None:
        """Raises RoveError naming a key that the base checkpoint does not have."""
        for key in sorted(self.keys - weights.shapes.keys()):
            raise RoveError(f"{self.path} adapts {key}, which {weights.directory} does not have.")

    def merged(self, key: str, value: Tensor) -> Tensor:
        """The weight with what the adapter adds, in float32."""
        if key not in self.keys:
            return value
        stem = key.removesuffix(".weight")
        with open_tensors(self.path) as file:
            a, b = (file.get_tensor(self._names[f"{stem}.lora_{side}.weight"]).float() for side in "AB")
        return value.float() + self.scale * (b @ a)
