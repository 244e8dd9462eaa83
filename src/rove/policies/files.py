"""The tensor files of a checkpoint directory: read one at a time, written shard by shard, never executed.

model*.safetensors           the published keys
action_head--*.pt, proprio_projector--*.pt     parts of OpenVLA-OFT
rove.safetensors             Rove's own: critic, FiLM, pointers, placeholders
adapter_model.safetensors    LoRA, see `lora`
"""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rove.errors import RoveError
from rove.policies.reading import read_json, refuse_unfit

INDEX = "model.safetensors.index.json"
OWN = "rove.safetensors"
OWN_PREFIXES = ("value_head.", "placeholders", "film.", "pointer.", "noise_network.")
HEADS = ("value_head.", "action_head.")
"""Prefixes of the parts that are trained beside adapters, and so saved with them."""
PARTS = ("action_head", "proprio_projector")
"""Parts of OpenVLA-OFT that its layout keeps in files of their own."""
_PART_PREFIXES = tuple(f"{part}." for part in PARTS)
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_REFUSED = {
    "vision_backbone": "a vision backbone with OpenVLA-OFT's FiLM, which Rove does not read: use a "
    "checkpoint without it",
    "noisy_action_projector": "of a diffusion head, which Rove does not have: use a checkpoint with discrete "
    "tokens or the L1 head",
}


class Weights:
    """The tensors of a checkpoint directory, read one by one, and the shapes of all of them.

    A tensor is mapped into memory only while it is converted, so peak memory is that of the model.
    """

    def __init__(self, directory: Path, overlay: Path | None = None) -> None:
        """Read headers, and the small `.pt` parts; heads of `overlay` take the place of `directory`'s.

        Raises RoveError naming a file that is absent, damaged, or holds pickled code.
        """
        self.directory = directory
        self.shapes: dict[str, torch.Size] = {}
        self._where: dict[str, tuple[Path, str]] = {}
        self._parts: dict[str, Tensor] = {}
        for name in model_files(directory):
            self._list(directory / name)
        self._list_extras(directory)
        if overlay is not None:
            for key in [key for key in self.shapes if key.startswith(HEADS)]:
                del self.shapes[key]
                self._where.pop(key, None)
            self._list_extras(overlay)

    def _list_extras(self, directory: Path) -> None:
        if (directory / OWN).is_file():
            self._list(directory / OWN)
        for part in PARTS:
            if path := part_file(directory, part):
                for key, value in read_part(path).items():
                    self._parts[f"{part}.{key}"] = value
                    self.shapes[f"{part}.{key}"] = value.shape

    def _list(self, path: Path) -> None:
        with open_tensors(path) as file:
            for name in file.keys():  # noqa: SIM118
                # LayerScale has two names, by the version of the vision library that stored it.
                key = re.sub(r"(\.ls\d)\.gamma$", r"\1.scale_factor", name)
                if key in self._where:
                    raise RoveError(f"{key} is stored twice, in {self._where[key][0].name} and {path.name}.")
                self.shapes[key] = torch.Size(file.get_slice(name).get_shape())
                self._where[key] = path, name

    def has(self, part: str) -> bool:
        """Return whether there are tensors of a part, such as "action_head"."""
        return any(key.startswith(f"{part}.") for key in self.shapes)

    def place(self, key: str) -> tuple[Path, str]:
        """Return the safetensors file of a tensor, and its name there."""
        return self._where[key]

    def read(self, key: str) -> Tensor:
        """Read a tensor, on the CPU and in its stored dtype."""
        if key in self._parts:
            return self._parts[key]
        path, name = self._where[key]
        with open_tensors(path) as file:
            return read_tensor(file, path, name)


def check_weights(state: Mapping[str, torch.Size], expected: Mapping[str, torch.Size], source: str) -> None:
    """Raise RoveError naming keys of `source` that are missing, unexpected or misshapen."""
    problems = [f"missing {name}" for name in expected.keys() - state.keys()]
    problems += [f"unexpected {name}" for name in state.keys() - expected.keys()]
    problems += [
        f"{name} has shape {list(state[name])}, expected {list(expected[name])}"
        for name in expected.keys() & state.keys()
        if state[name] != expected[name]
    ]
    if problems:
        shown = "; ".join(sorted(problems)[:8])
        more = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise RoveError(f"The weights in {source} do not fit its config.json: {shown}{more}.")


def open_tensors(path: Path) -> Any:
    """Open a safetensors file. Raises RoveError where it is absent or damaged."""
    if not path.exists():
        raise RoveError(f"{path.parent} lacks the weights file {path.name}.{_instead(path.parent)}")
    refuse_unfit(path)
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise RoveError(
            f"{path} is truncated or not safetensors: {error}. Copy or download it again."
        ) from error


def read_tensor(file: Any, path: Path, name: str) -> Tensor:
    """Read a tensor of the open safetensors file at `path`. Raises RoveError where it is no weights."""
    try:
        value = file.get_tensor(name)
    except SafetensorError as error:
        raise RoveError(f"{path}: {name} cannot be read: {error}.") from error
    return checked(value, f"{path}: {name}")


def checked(value: Tensor, name: str) -> Tensor:
    """Return a tensor. Raises RoveError where it is quantised, or holds a number that is not finite."""
    if value.dtype not in _DTYPES:
        kind = str(value.dtype).removeprefix("torch.")
        raise RoveError(
            f"{name} is stored as {kind}: expected floating-point weights. Convert quantised ones to these."
        )
    # The least and the largest take one pass over memory, a twelfth of the time of `isfinite`.
    if value.numel() and not torch.stack(torch.aminmax(value)).isfinite().all():
        raise RoveError(
            f"{name} holds NaN or infinity: the file is damaged, or the training that wrote it had diverged. "
            "Copy it again, or use an earlier checkpoint."
        )
    return value


def _instead(directory: Path) -> str:
    """Say where the weights may be that a directory lacks; "" where there is no telling."""
    if shards := sorted(directory.glob("model-*-of-*.safetensors")):
        return f" There are shards, such as {shards[0].name}, but not their index: add {INDEX}."
    if (directory / "lora_adapter").is_dir():
        return " There is a LoRA adapter in lora_adapter: merge it into its base, and give the result."
    if pickled := sorted(directory.glob("adapter_model.bin")):
        return f" {pickled[0].name} is pickled, which is refused: convert it to safetensors."
    return ""


def model_files(directory: Path) -> list[str]:
    """Return the names of the files that hold the published keys: one, or those that the index lists."""
    index = directory / INDEX
    if index.exists():
        listed = read_json(index)
        if "weight_map" not in listed:
            raise RoveError(f"{index} is damaged: it has no weight_map. Copy or download it again.")
        where = listed.table("weight_map")
        names = sorted({where.get(key, str, "") for key in where.content})
        for name in names:
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise RoveError(f"{index} lists {name!r}; only .safetensors files beside it are read.")
        whole = directory / "model.safetensors"
        if whole.exists() and whole.name not in names:
            raise RoveError(
                f"{directory} has its weights twice, in {whole.name} and in the shards of {INDEX}: remove "
                "those that are not to be used."
            )
        return names
    pickled = [path.name for path in sorted(directory.glob("pytorch_model*.bin"))]
    if pickled and not (directory / "model.safetensors").is_file():
        raise RoveError(
            f"{directory / pickled[0]} is pickled: reading it could execute code, so it is refused. Convert "
            "the weights to safetensors."
        )
    return ["model.safetensors"]


def has_weights(directory: Path) -> bool:
    """Return whether a directory holds the weights of a whole model, in whichever format."""
    patterns = ("model*.safetensors", INDEX, "pytorch_model*.bin")
    return any(True for pattern in patterns for _ in directory.glob(pattern))


def part_file(directory: Path, part: str) -> Path | None:
    """Return the file of one of OFT's parts, `PART--STEP_checkpoint.pt`; None without one.

    Raises RoveError where there are several, or one of a part that cannot be used.
    """
    for name, what in _REFUSED.items():
        if found := sorted(directory.glob(f"{name}--*.pt")):
            raise RoveError(f"{found[0]} is {what}.")
    found = sorted(directory.glob(f"{part}--*.pt"))
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise RoveError(f"{directory} has several files of one part: {names}. Keep the one to use.")
    return found[0] if found else None


def read_part(path: Path) -> dict[str, Tensor]:
    """Read a `.pt` state dict, without the prefix that data-parallel training leaves.

    Raises RoveError naming a file that is damaged, or that holds anything but tensors.
    """
    refuse_unfit(path)
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
    except pickle.UnpicklingError as error:
        raise RoveError(
            f"{path} holds pickled code, which is refused, or is damaged: expected a state dict of tensors "
            "alone."
        ) from error
    except Exception as error:  # an unpickler fails in any way on damaged bytes
        what = str(error).partition("\n")[0]
        raise RoveError(f"{path} is truncated or not a PyTorch file: {what}.") from error
    if not isinstance(state, Mapping) or not all(
        isinstance(value, Tensor) and value.layout == torch.strided for value in state.values()
    ):
        raise RoveError(f"{path} is a {type(state).__name__}, expected a state dict of tensors.")
    return {
        str(key).removeprefix("module."): checked(value, f"{path}: {key}") for key, value in state.items()
    }


def clear(directory: Path) -> None:
    """Remove tensors of an earlier checkpoint, which would be read together with the new ones."""
    parts = [f"{part}--*.pt" for part in PARTS]
    for pattern in ("model*.safetensors", INDEX, OWN, "adapter_*", *parts):
        for path in directory.glob(pattern):
            path.unlink()


def write(directory: Path, state: Mapping[str, Tensor], max_shard_bytes: int) -> None:
    """Write tensors under their published keys, each into the file where the reference layout has it."""
    write_extras(directory, state)
    model = {key: value for key, value in state.items() if not key.startswith(OWN_PREFIXES + _PART_PREFIXES)}
    shards = list(_shards(model, max_shard_bytes))
    if len(shards) == 1:
        write_safetensors(directory / "model.safetensors", shards[0])
        return
    names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    for name, shard in zip(names, shards, strict=True):
        write_safetensors(directory / name, shard)
    total = sum(value.numel() * value.element_size() for value in model.values())
    where = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (directory / INDEX).write_text(json.dumps(index, indent=1, sort_keys=True) + "\n")


def write_extras(directory: Path, state: Mapping[str, Tensor]) -> None:
    """Write those tensors of `state` that are not in the model's shards: Rove's own, and OFT's parts."""
    own = {key: value for key, value in state.items() if key.startswith(OWN_PREFIXES)}
    if own:
        write_safetensors(directory / OWN, own)
    for part, prefix in zip(PARTS, _PART_PREFIXES, strict=True):
        tensors = {k.removeprefix(prefix): _stored(v) for k, v in state.items() if k.startswith(prefix)}
        if tensors:
            torch.save(tensors, directory / f"{part}--latest_checkpoint.pt")


def write_safetensors(path: Path, state: Mapping[str, Tensor]) -> None:
    """Write one safetensors file."""
    save_file({key: _stored(value) for key, value in state.items()}, path, metadata={"format": "pt"})


def _stored(value: Tensor) -> Tensor:
    value = value.detach().cpu().contiguous()
    # A view would be written with all of its storage, or refused for sharing it.
    return (
        value if value.numel() * value.element_size() == value.untyped_storage().nbytes() else value.clone()
    )


def _shards(state: Mapping[str, Tensor], limit: int) -> Iterator[dict[str, Tensor]]:
    """Split a state dict, in order, into shards of at most `limit` bytes, or of a single tensor."""
    shard: dict[str, Tensor] = {}
    size = 0
    for key, value in state.items():
        own = value.numel() * value.element_size()
        if shard and size + own > limit:
            yield shard
            shard, size = {}, 0
        shard[key] = value
        size += own
    yield shard
