"""LoRA (Hu et al. 2021): adapters beside frozen linear layers, computed, kept, merged, or written alone.

An adapter of Rove's is stored under this package's module names, in the layout of `peft`. Adapters that
others trained on the published layout, where query, key and value are one matrix, are merged while they are
read.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rove.config.ranges import PositiveFloat, PositiveInt
from rove.config.schema import LoraConfig
from rove.errors import RoveError, nearest
from rove.policies.files import Weights, open_tensors, read_tensor, write_safetensors
from rove.policies.reading import read_json

CONFIG, FILE = "adapter_config.json", "adapter_model.safetensors"
ALL = "all-linear"
_MORE: tuple[tuple[str, tuple[Any, ...]], ...] = (
    ("peft_type", ("LORA",)),
    ("bias", ("none",)),
    *((name, (False,)) for name in ("use_dora", "use_qalora", "use_bdlora", "lora_bias", "fan_in_fan_out")),
    *((name, ([],)) for name in ("modules_to_save", "layer_replication", "target_parameters")),
    *((name, ({}, [])) for name in ("rank_pattern", "alpha_pattern", "trainable_token_indices")),
    *((name, ({}, [])) for name in ("megatron_config", "arrow_config", "alora_invocation_tokens")),
    # These only draw A and B; any other way to start changes the base as well.
    ("init_lora_weights", (True, False, "gaussian", "eva", "orthogonal")),
    ("revision", ("main",)),
)
"""Keys of `adapter_config.json` with the values of a plain LoRA; null, or no such key, is one, too."""
_NAME = "default"
_SAVED = "base_model.model."


class LoraLinear(nn.Module):
    """A frozen linear layer and its adapter: `x·Wᵀ + bias + scaling·(x·Aᵀ)·Bᵀ`.

    A and B are float32 for the optimizer's sake; the forward pass casts them to the dtype of the weights.
    """

    def __init__(self, base: nn.Linear, rank: int, scaling: float) -> None:
        super().__init__()
        self.base_layer, self.scaling = base, scaling
        self.low: tuple[Tensor, Tensor] | None = None
        """A and B in the dtype of the weights, set within `lowered` only."""
        self._copies: tuple[Tensor, Tensor] | None = None
        device = base.weight.device

        def new(inputs: int, outputs: int) -> nn.ModuleDict:
            layer = nn.Linear(inputs, outputs, bias=False, device=device, dtype=torch.float32)
            return nn.ModuleDict({_NAME: layer})

        self.lora_A, self.lora_B = new(base.in_features, rank), new(rank, base.out_features)

    @property
    def weight(self) -> Tensor:
        """The layer's weight W, without the adapter."""
        return self.base_layer.weight

    @property
    def pair(self) -> tuple[Tensor, Tensor]:
        """The adapter's matrices, A [rank, in] and B [out, rank]."""
        return self.lora_A[_NAME].weight, self.lora_B[_NAME].weight  # pyright: ignore[reportReturnType]

    def forward(self, x: Tensor) -> Tensor:
        """Apply layer and adapter, [..., in] -> [..., out]."""
        return linear(x, self)[0]

    def copies(self) -> tuple[Tensor, Tensor]:
        """Return memory for A and B in the dtype and on the device of the weights; the same each time."""
        if self._copies is None or self._copies[0].device != self.weight.device:
            with torch.inference_mode(False):
                a, b = (torch.empty_like(side, dtype=self.weight.dtype) for side in self.pair)
            self._copies = (a.detach(), b.detach())
        return self._copies


@contextmanager
def lowered(layers: Sequence[LoraLinear]) -> Iterator[None]:
    """Use, within the block and for inference, copies of the adapters in the dtype of their layers' weights,
    made all at once; outside of it each layer casts its own."""
    layers = [layer for layer in layers if layer.weight.dtype != layer.pair[0].dtype]
    if layers:
        low = [copy for layer in layers for copy in layer.copies()]
        with torch.no_grad():
            torch._foreach_copy_(  # pyright: ignore[reportPrivateImportUsage]
                low, [side for layer in layers for side in layer.pair]
            )
    for layer in layers:
        layer.low = layer.copies()
    try:
        yield
    finally:
        for layer in layers:
            layer.low = None


def linear(x: Tensor, *layers: nn.Module, plus: Tensor | None = None) -> tuple[Tensor, ...]:
    """Apply each of `layers`, with an adapter or without, to the same `x` [..., in].

    `plus`, for a single layer, is added to its output: a residual connection.
    """
    assert plus is None or len(layers) == 1
    if not all(isinstance(layer, LoraLinear) for layer in layers):
        outputs = tuple(layer(x) if isinstance(layer, nn.Linear) else linear(x, layer)[0] for layer in layers)
        return outputs if plus is None else (outputs[0] + plus,)
    adapted = [layer for layer in layers if isinstance(layer, LoraLinear)]
    weights: list[Tensor | None] = []
    for layer in adapted:
        pair = layer.low or layer.pair
        weights += [layer.base_layer.weight, layer.base_layer.bias, *pair]
    return _Adapted.apply(x, plus, adapted[0].scaling, *weights)  # pyright: ignore[reportReturnType]


class _Adapted(torch.autograd.Function):
    """Linear layers with adapters on one input, in as few passes over memory as matrix products allow.

    The adapter's output is written first, and the layer's own product added to it in place: a large product
    hides the reading. So does the gradient of the input. The adapters of all layers read `x` once.
    """

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, x: Tensor, plus: Tensor | None, scaling: float, *weights: Tensor | None
    ) -> tuple[Tensor, ...]:
        own = list(zip(*(weights[i::4] for i in range(4)), strict=True))
        kind = x.device.type
        low = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else own[0][0].dtype
        with torch.autocast(kind, enabled=False):
            flat = x.reshape(-1, x.shape[-1]).to(low)
            a = torch.cat([pair[2] for pair in own]).to(low) if len(own) > 1 else own[0][2].to(low)
            down = flat @ a.T
            if scaling != 1.0:
                down *= scaling
            outputs = []
            for (w, bias, _, b), part in zip(own, down.chunk(len(own), 1), strict=True):
                y = part @ b.to(low).T if bias is None else torch.addmm(bias.to(low), part, b.to(low).T)
                outputs.append(y.addmm_(flat, w.to(low).T).view(*x.shape[:-1], -1))
            if plus is not None:
                outputs[0] += plus
        ctx.scaling, ctx.dtype, ctx.plus = scaling, x.dtype, plus is not None
        ctx.save_for_backward(flat, down, a, *(w for row in own for w in (row[0], row[3])))
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        flat, down, a, *rest = ctx.saved_tensors
        own = list(zip(rest[::2], rest[1::2], strict=True))
        low, rank = flat.dtype, len(a) // len(own)
        into_down = torch.empty_like(down)
        answers: list[Tensor | None] = []
        flats = [gradient.reshape(-1, gradient.shape[-1]).to(low) for gradient in gradients]
        with torch.autocast(flat.device.type, enabled=False):
            for i, ((_, b), g) in enumerate(zip(own, flats, strict=True)):
                where = slice(i * rank, (i + 1) * rank)
                into_down[:, where] = g @ b.to(low)
                answers += [None, None, None, (g.T @ down[:, where]).to(b.dtype)]
            if ctx.scaling != 1.0:
                into_down *= ctx.scaling
            for i, part in enumerate((into_down.T @ flat).to(own[0][1].dtype).chunk(len(own))):
                answers[4 * i + 2] = part
            into_x = None
            if ctx.needs_input_grad[0]:
                into_x = into_down @ a
                for (w, _), g in zip(own, flats, strict=True):
                    into_x.addmm_(g, w.to(low))
                into_x = into_x.view(*gradients[0].shape[:-1], -1).to(ctx.dtype)
        return into_x, gradients[0] if ctx.plus else None, None, *answers


def inject(model: nn.Module, config: LoraConfig, generator: torch.Generator) -> None:
    """Put adapters beside the linear layers of `model` that `config` names, and freeze all else.

    Layers that are never computed get none. Adapters start as no change: A is normal with standard deviation
    1 / rank (drawn from `generator`), B zero. Raises RoveError on an unknown target.
    """
    targets, rank = find_targets(model, config), config.rank
    model.requires_grad_(False)
    for name in targets:
        parent, _, leaf = name.rpartition(".")
        base = model.get_submodule(name)
        assert isinstance(base, nn.Linear)
        layer = LoraLinear(base, rank, (rank if config.alpha is None else config.alpha) / rank)
        setattr(model.get_submodule(parent), leaf, layer)
    for layer in adapted(model).values():
        a, b = layer.pair
        with torch.no_grad():
            a.copy_(torch.empty(a.shape).normal_(0.0, 1.0 / rank, generator=generator))
            b.zero_()


def find_targets(model: nn.Module, config: LoraConfig) -> list[str]:
    """Return the full names of the linear layers that `config` names, unless nothing reads their weights."""
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


def adapted(model: nn.Module) -> dict[str, LoraLinear]:
    """Return the layers that carry an adapter, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLinear)}


def rows(layer: nn.Module, x: Tensor, where: slice) -> Tensor:
    """Compute some of a linear layer's outputs for `x` [..., in], those of the rows `where` of its weight."""
    weight = layer.weight[where]  # pyright: ignore[reportIndexIssue]
    out = F.linear(x, weight)
    if isinstance(layer, LoraLinear):
        a, b = (side.to(x.dtype) for side in layer.pair)
        out = out + layer.scaling * F.linear(F.linear(x, a), b[where])
    return out


@torch.no_grad()
def merge(model: nn.Module) -> None:
    """Add the adapters to their layers' weights and remove them."""
    for name, layer in adapted(model).items():
        base, (a, b) = layer.base_layer, layer.pair
        base.weight.copy_(base.weight.float() + layer.scaling * (b @ a))
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, base)


def base_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict without adapters, under the names of a model that has none."""
    return {
        key.replace(".base_layer.", "."): value
        for key, value in state.items()
        if ".lora_A." not in key and ".lora_B." not in key
    }


def write(directory: Path, model: nn.Module, config: LoraConfig, base: str) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors` for the base checkpoint `base`."""
    state = {
        _SAVED + name.replace(f".{_NAME}.", "."): value
        for name, value in model.state_dict().items()
        if ".lora_A." in name or ".lora_B." in name
    }
    write_safetensors(directory / FILE, state)
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
    """Fill the adapters of `model` from the files of `write`. Raises RoveError where the two do not fit."""
    path = directory / FILE
    own = {n: p for n, p in model.named_parameters() if ".lora_A." in n or ".lora_B." in n}
    with open_tensors(path) as file:
        stored = {name.removeprefix(_SAVED): name for name in file.keys()}  # noqa: SIM118
        expected = {name.replace(f".{_NAME}.", "."): parameter for name, parameter in own.items()}
        for name in sorted(expected.keys() ^ stored.keys()):
            raise RoveError(f"{path}: {'missing' if name in expected else 'unexpected'} {name}.")
        for name, parameter in expected.items():
            value = read_tensor(file, path, stored[name])
            if value.shape != parameter.shape:
                raise RoveError(
                    f"{path}: {name} has shape {list(value.shape)}, expected {list(parameter.shape)}."
                )
            parameter.copy_(value)


def check_rank(directory: Path, rank: int) -> None:
    """Raise RoveError where the adapters of a directory are of another rank than its config.json says."""
    path = directory / FILE
    with open_tensors(path) as file:
        for name in file.keys():  # noqa: SIM118
            stored = file.get_slice(name).get_shape()
            if ".lora_A." in name and stored[:1] != [rank]:
                raise RoveError(f"{path}: {name} has shape {stored}, but config.json says rank {rank}.")


def is_adapter(directory: Path) -> bool:
    """Return whether a directory holds files of an adapter."""
    return any(True for _ in directory.glob("adapter_*"))


def base_of(directory: Path) -> str:
    """Return the name of the checkpoint that an adapter of others belongs to, from adapter_config.json."""
    return read_json(directory / CONFIG).need("base_model_name_or_path", str)


class PublishedAdapter:
    """A LoRA that was trained on the published layout, by the keys that it changes."""

    def __init__(self, directory: Path) -> None:
        """Read configuration, keys and shapes. Raises RoveError where it is more than a plain LoRA."""
        self.path = directory / FILE
        about = read_json(directory / CONFIG)
        self.base = base_of(directory)
        about.need("peft_type", str)
        odd = [name for name, plain in _MORE if name in about and about.content[name] not in plain]
        if odd:
            values = ((name, about.content[name]) for name in odd)
            what = ", ".join(name if value is True else f"{name} {value!r}" for name, value in values)
            raise RoveError(
                f"{about.where} has {what}; only a plain LoRA can be merged. Merge it with peft "
                "(merge_and_unload), and give the result."
            )
        self.rank: int = about.need("r", PositiveInt)
        alpha = about.need("lora_alpha", PositiveFloat)
        self.scale = alpha / (self.rank**0.5 if about.get("use_rslora", bool, False) else self.rank)
        with open_tensors(self.path) as file:
            self._names = {name.removeprefix(_SAVED): name for name in file.keys()}  # noqa: SIM118
            self._shapes = {own: file.get_slice(name).get_shape() for own, name in self._names.items()}
        self.keys = set(self._keys())

    def _keys(self) -> Iterator[str]:
        for name in self._names:
            stem, _, kind = name.removesuffix(".weight").rpartition(".")
            other = {"lora_A": "lora_B", "lora_B": "lora_A"}.get(kind)
            if other is None or f"{stem}.{other}.weight" not in self._names:
                raise RoveError(f"{self.path}: {name} is no part of a plain LoRA.")
            yield f"{stem}.weight"

    def check(self, weights: Weights) -> None:
        """Raise RoveError naming a key that the base checkpoint does not have, or has in another shape."""
        for key in sorted(self.keys):
            if key not in weights.shapes:
                raise RoveError(f"{self.path} adapts {key}, which {weights.directory} does not have.")
            stem, shape = key.removesuffix(".weight"), weights.shapes[key]
            sides = [list(self._shapes[f"{stem}.lora_{side}.weight"]) for side in "AB"]
            if len(shape) != 2 or sides != [[self.rank, shape[1]], [shape[0], self.rank]]:
                raise RoveError(
                    f"{self.path} has matrices {sides[0]} and {sides[1]} for {key}, which do not fit its "
                    f"shape {list(shape)} and rank {self.rank} ({CONFIG})."
                )

    def merged(self, key: str, value: Tensor) -> Tensor:
        """Return the weight of `key` with the adapter added, in float32; other weights unchanged."""
        if key not in self.keys:
            return value
        stem = key.removesuffix(".weight")
        with open_tensors(self.path) as file:
            names = [self._names[f"{stem}.lora_{side}.weight"] for side in "AB"]
            a, b = (read_tensor(file, self.path, name).float() for name in names)
        return value.float() + self.scale * (b @ a)
