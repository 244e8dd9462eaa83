"""Checkpoint directories of flow policies: read onto the meta device's modules tensor by tensor, and written.

LeRobot's layout with processors or with old buffers, and openpi's, which RLinf's is but for a folder. Besides
the published files there are Rove's own: settings under "rove" in config.json, rove.safetensors with the
critic and the network of Flow-Noise, and tokenizer.json.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rove.config.schema import FlowSampling, LoraConfig, ValueHeadConfig
from rove.errors import RoveError
from rove.policies import files, hub, lora
from rove.policies.files import Weights, check_weights
from rove.policies.flow import config as configs
from rove.policies.flow import prompts, statistics, weights
from rove.policies.flow.config import Family, FlowConfig, Freeze
from rove.policies.flow.core import FlowModel, Settings
from rove.policies.flow.images import Resizer
from rove.policies.flow.prompts import Prompts, Style
from rove.policies.flow.statistics import Layout, Statistics
from rove.policies.reading import Table, read_json
from rove.types import ActionSpec

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "**/full_weights.pt")
_ARM = ("x", "y", "z", "roll", "pitch", "yaw", "gripper")
_BOS: dict[Family, int | None] = {"smolvla": None, "pi0": 2, "pi05": 2}
_PAD: dict[Family, int] = {"smolvla": 2, "pi0": 0, "pi05": 0}
_OPENPI_DATA: dict[str, dict[Family, dict[str, Any]]] = {
    "*libero*": {"pi0": {"delta": 6}, "pi05": {"prompt": "openpi"}}
}
"""What openpi's data sets, by patterns of their names, mean for a family: in LIBERO π0's actions are relative
to the state, and π0.5's prompt has no state."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What is asked of a checkpoint besides what it says of itself; see `FlowVLA.from_pretrained`."""

    lora: LoraConfig | Literal["saved"] | None
    value_head: ValueHeadConfig | Literal["saved"] | None
    sampling: FlowSampling | Mapping[str, Any] | None
    freeze: Freeze | None
    chunk: int | None
    horizon: int | None
    cameras: int | None
    action_spec: ActionSpec | None
    statistics: Mapping[str, Any] | None
    unnorm_key: str | None
    resizer: Resizer | None
    prompt: Style | None
    delta: int | None


@dataclass(frozen=True, slots=True)
class CheckpointParts:
    """Contents of a checkpoint directory, before any weight is read."""

    settings: Settings
    directory: Path
    weights: Weights
    stored: Mapping[str, str]
    """Names of tensors in the files by those of `FlowVLA`."""
    unused: tuple[str, ...]
    """Stored tensors that nothing computes with, which a copy keeps."""
    new: tuple[str, ...]
    """Beginnings of the names of heads that are not taken from the checkpoint."""
    saved_lora: LoraConfig | None
    lora: LoraConfig | None


def read(path: Path | str, asked: Asked) -> CheckpointParts:
    """Read everything but the weights of a checkpoint; see `FlowVLA.from_pretrained`."""
    directory = _locate(path)
    file = directory / "config.json"
    table = read_json(file) if file.exists() else Table({}, str(file))
    configs.family_of(table, {})  # an unknown type is told before anything about its weights
    _refuse_pickled(directory)
    stored = Weights(directory)
    family = configs.family_of(table, stored.shapes)
    about = table.table("rove")
    found, published = _statistics(directory, table, family, stored, asked)
    openpi = found.layout == "openpi"
    config = _with(configs.read(table, family, openpi=openpi), about, asked, found, published)
    head = about.get("value_head", ValueHeadConfig, None) if asked.value_head == "saved" else asked.value_head
    saved_head = about.get("value_head", ValueHeadConfig, None)
    saved_sampling = about.get("sampling", FlowSampling, None)
    sampling = saved_sampling or FlowSampling(steps=config.steps)
    if isinstance(asked.sampling, Mapping):
        sampling = replace(sampling, **asked.sampling)
    elif asked.sampling is not None:
        sampling = asked.sampling
    saved = about.get("lora", LoraConfig, None)
    if saved is None and lora.is_adapter(directory):
        raise RoveError(
            f"{directory} holds an adapter beside or instead of weights: merge it into its base "
            "(peft's merge_and_unload), and give the result."
        )
    spec = asked.action_spec or _action_spec(about, config, found)
    names = {key: weights.module_name(key, family) for key in stored.shapes if not weights.is_statistic(key)}
    new = () if head == saved_head else ("value_head.",)
    learned = saved_sampling is not None and saved_sampling.sampler == "flow_noise"
    new += () if learned and sampling == saved_sampling else ("noise_network.",)
    settings = Settings(
        config=config,
        statistics=found,
        chunk=asked.chunk or about.get("chunk", configs.HORIZON, config.executed),
        action_spec=spec,
        sampling=sampling,
        freeze=asked.freeze or about.get("freeze", Freeze, "none"),
        value_head=head,
        pointers=about.get("pointers", configs.COUNT, 0),
        pointed=about.get("pointed", configs.PICTURES, 1),
        prompts=make_prompts(directory, config),
        prefixed=any(key.startswith("model.") for key in stored.shapes),
        processors=_processors(directory),
    )
    return CheckpointParts(
        settings,
        directory,
        stored,
        {name: key for key, name in reversed(names.items()) if name is not None},
        tuple(key for key, name in names.items() if name is None),
        new,
        saved,
        saved if asked.lora == "saved" else asked.lora,
    )


def describe(name: Path | str, kind: str) -> FlowConfig:
    """Read what a checkpoint that is here says of itself, without its statistics and its weights.

    One of the hub that is not here yet is assumed to be a published one of that `kind`.
    """
    try:
        directory = _locate(name, download=False)
    except RoveError:
        if not hub.is_hub_name(name):
            raise
        family = configs.family_named(kind) or "smolvla"
        return configs.read(Table({"type": family}, str(name)), family, openpi=False)
    file = directory / "config.json"
    table = read_json(file) if file.exists() else Table({}, str(file))
    typed = "type" in table
    family = configs.family_of(table, {} if typed else Weights(directory).shapes)
    return configs.read(table, family, openpi=not typed)


def horizon(name: Path | str, published: int) -> int:
    """Return how many actions a checkpoint predicts; `published` where it is not here yet."""
    if hub.is_hub_name(name) and not Path(name).is_dir():
        try:
            hub.locate(name, download=False)
        except RoveError:
            return published
    return describe(name, "").horizon


def check(path: Path | str, *, statistics: bool, unnorm_key: str | None) -> None:
    """Look at the files of a checkpoint without reading its weights. Raises RoveError naming one that is
    absent, damaged, or cannot be read, or a key that does not fit; without `statistics` none are needed."""
    some = {"some": {"action": {"q01": [-1.0], "q99": [1.0]}}}
    asked = Asked(
        lora="saved",
        value_head="saved",
        sampling=None,
        freeze=None,
        chunk=1,
        horizon=None,
        cameras=None,
        action_spec=None,
        statistics=None if statistics else some,
        unnorm_key=unnorm_key if statistics else None,
        resizer=None,
        prompt=None,
        delta=None,
    )
    parts = read(path, asked)
    _refuse_misfit(FlowModel(parts.settings), parts)
    if parts.settings.prompts is None:
        raise RoveError(f"{parts.directory} {prompts.NO_TOKENIZER}")


def make_prompts(directory: Path, config: FlowConfig) -> Prompts | None:
    """Read the tokenizer of a directory; None where it has none."""
    tokenizer = prompts.read_tokenizer(directory, config.text.vocab)
    return None if tokenizer is None else prompts_of(tokenizer, config)


def prompts_of(tokenizer: Any, config: FlowConfig) -> Prompts:
    """Return the prompts of a policy by its tokenizer."""
    family, length = config.family, config.prompt_length
    return Prompts(tokenizer, style=config.prompt, length=length, bos=_BOS[family], pad=_PAD[family])


def complete(
    policy: FlowModel, parts: CheckpointParts, *, seed: int, dtype: torch.dtype, device: torch.device
) -> None:
    """Fill a policy made from `parts.settings`; heads and adapters that start anew are drawn from `seed`."""
    _fill(policy, parts, dtype, device)
    generator = torch.Generator().manual_seed(seed)
    for prefix, module in (("value_head.", policy.value_head), ("noise_network.", policy.noise_network)):
        if module is not None and prefix in parts.new:
            module.to_empty(device="cpu").initialize(generator)
    policy.unused = {key: parts.weights.read(key) for key in parts.unused}
    saved, wanted = parts.saved_lora, parts.lora
    if saved is not None:
        lora.check_rank(parts.directory, saved.rank)
        policy.adapt(saved, generator)
        lora.read(parts.directory, policy.model.towers)
        if wanted != saved:
            policy.merge()
    if wanted is not None and wanted != saved:
        policy.adapt(wanted, generator)


def _locate(path: Path | str, *, download: bool = True) -> Path:
    """Return the directory of a checkpoint; one that RLinf wrote need not have a config.json."""
    directory = Path(path)
    if directory.is_dir() and not (directory / "config.json").exists():
        _refuse_pickled(directory)
        if files.has_weights(directory) and statistics.find_assets(directory):
            return directory
    return hub.locate(path, download=download)


def _refuse_pickled(directory: Path) -> None:
    """Raise RoveError where a directory has no safetensors, but weights in a format that is not read."""
    if any(directory.glob("model*.safetensors")) or (directory / files.INDEX).exists():
        return
    for pattern in _PICKLED:
        if found := sorted(directory.glob(pattern)):
            raise RoveError(
                f"{found[0]} is pickled: reading it could execute code, so it is refused. Convert the "
                "weights to safetensors."
            )
    if (directory / "params").is_dir():
        raise RoveError(
            f"{directory / 'params'} holds weights of JAX: convert them by openpi's "
            "examples/convert_jax_model_to_pytorch.py."
        )


def _statistics(
    directory: Path, table: Table, family: Family, stored: Weights, asked: Asked
) -> tuple[Statistics, str]:
    """Return the statistics that are asked for, or those of the checkpoint, and the name of openpi's data set
    that it was trained on, "" for other layouts. Raises RoveError without any statistics."""
    buffers = {key: stored.place(key) for key in stored.shapes if weights.is_statistic(key)}
    key = None if asked.statistics is not None else asked.unnorm_key
    found = statistics.read(directory, table, buffers, quantiles=family == "pi05", asset=key)
    published = found.asset if found is not None and found.layout == "openpi" else ""
    if asked.statistics is not None:
        return statistics.from_suite(asked.statistics, asked.unnorm_key, found), published
    if found is None:
        raise RoveError(
            f"{directory} has no statistics, neither in policy_preprocessor.json and the file it names, nor "
            "in buffers of model.safetensors, nor in norm_stats.json, so its actions cannot be "
            "un-normalised: a published base has none. Use a fine-tuned checkpoint, or train this one with "
            "the statistics of demonstrations first."
        )
    return found, published


def _with(config: FlowConfig, about: Table, asked: Asked, found: Statistics, published: str) -> FlowConfig:
    """Return a configuration changed as asked, as saved, or as openpi's data set `published` implies.

    Statistics of demonstrations are those of actions as they are, relative to no state.
    """
    implied = implied_by(published, config.family)
    if asked.statistics is not None:
        implied = implied | {"delta": 0}
    style = config.prompt if "prompt" in about else implied.get("prompt", config.prompt)
    saved = "delta" in about and asked.statistics is None
    delta = config.delta if saved else implied.get("delta", config.delta)
    return replace(
        config,
        horizon=asked.horizon or config.horizon,
        executed=min(config.executed, asked.horizon or config.horizon),
        cameras=asked.cameras or config.cameras,
        **_sizes(asked, found),
        resizer=asked.resizer or config.resizer,
        prompt=asked.prompt or style,
        delta=delta if asked.delta is None else asked.delta,
    )


def _sizes(asked: Asked, found: Statistics) -> dict[str, int]:
    """Return the sizes of state and action of the data that a checkpoint is to be trained on."""
    if asked.statistics is None or asked.action_spec is None:
        return {}
    state = max((len(numbers) for numbers in found.state.values()), default=None)
    return {"actions": asked.action_spec.dim} | ({} if state is None else {"state": state})


def implied_by(asset: str, family: Family) -> dict[str, Any]:
    """Return what openpi's data set of that name means for a policy of a family: "delta" or "prompt"."""
    known = (by for pattern, by in _OPENPI_DATA.items() if fnmatch(asset.lower(), pattern))
    return next(known, {}).get(family, {})


def _action_spec(about: Table, config: FlowConfig, found: Statistics) -> ActionSpec:
    """Return the action spec: the saved one, or LIBERO's, whose actions go to the environment as they are."""
    spec = about.get("action_spec", ActionSpec, None)
    if spec is not None:
        return spec
    dim = config.actions or _real(found)
    if dim == len(_ARM):
        return ActionSpec(_ARM, ("1",) * 7, (-1.0,) * 7, (1.0,) * 7, gripper="open_low")
    names = tuple(f"joint_{i}" for i in range(dim))
    return ActionSpec(names, ("1",) * dim, (-torch.inf,) * dim, (torch.inf,) * dim)


def _real(found: Statistics) -> int:
    """Return the number of action dimensions that vary in the data; those after them are padding."""
    low, high = (found.action[name] for name in statistics.NEEDS[found.methods[1]])
    varies = (high != 0) if found.methods[1] == "MEAN_STD" else (high != low)
    return int(varies.nonzero().max()) + 1 if bool(varies.any()) else len(low)


def _processors(directory: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]] | None:
    """Return the steps of LeRobot's processors before and after the policy; None where there are none."""
    paths = [directory / f"policy_{when}processor.json" for when in ("pre", "post")]
    if not paths[0].exists():
        return None
    before, after = ([dict(step.content) for step in read_json(p).tables("steps") or ()] for p in paths)
    return before, after


def _fill(policy: FlowModel, parts: CheckpointParts, dtype: torch.dtype, device: torch.device) -> None:
    """Copy the weights into the policy, one by one. Raises RoveError naming the keys that do not fit."""
    low = low_names(policy, adapted=parts.lora is not None)
    for name in _refuse_misfit(policy, parts):
        value = parts.weights.read(parts.stored[name])
        wanted = dtype if name in low else torch.float32
        _assign(policy, name, value.to(device, wanted, copy=True))


def low_names(policy: FlowModel, *, adapted: bool) -> set[str]:
    """Return the names of the weights that may be in lower precision: VLM and expert, but an expert that is
    trained beside a frozen VLM stays float32, since steps on weights of 8 bits are mostly lost."""
    towers = {id(p) for p in policy.model.towers.parameters()}
    named = {name: p for name, p in policy.named_parameters() if id(p) in towers}
    trains = policy.freeze == "vlm" and not adapted
    return {name for name, p in named.items() if not (trains and p.requires_grad)}


def _refuse_misfit(policy: FlowModel, parts: CheckpointParts) -> list[str]:
    """Return the names of the weights to read. Raises RoveError naming the keys that do not fit."""
    prefix = policy.prefixed
    shapes = {
        name: value.shape for name, value in policy.state_dict().items() if not name.startswith(parts.new)
    }
    there = {n: parts.weights.shapes[key] for n, key in parts.stored.items() if not n.startswith(parts.new)}
    public = [{weights.stored_name(n, prefix=prefix): s for n, s in each.items()} for each in (there, shapes)]
    whole = parts.directory / "model.safetensors"
    check_weights(public[0], public[1], str(whole if whole.exists() else parts.directory / files.INDEX))
    return list(shapes)


def _assign(module: nn.Module, name: str, value: Tensor) -> None:
    parent, _, leaf = name.rpartition(".")
    owner = module.get_submodule(parent)
    old = getattr(owner, leaf)
    setattr(owner, leaf, nn.Parameter(value, requires_grad=old.requires_grad))


# --- writing ----------------------------------------------------------------------------------------


def save(policy: FlowModel, directory: Path, layout: Layout | None, max_shard_bytes: int) -> None:
    """Write a checkpoint directory; see `FlowVLA.save_pretrained`."""
    found = policy.statistics
    layout = layout or found.layout
    if (layout == "openpi") != (found.layout == "openpi"):
        raise RoveError(
            f"The policy's statistics are {found.layout}'s, which {layout} applies otherwise: save it as it "
            "was read (layout=None)."
        )
    directory.mkdir(parents=True, exist_ok=True)
    state = dict(policy.unused) | {
        weights.stored_name(name, prefix=policy.prefixed): value
        for name, value in lora.base_state(policy.state_dict()).items()
    }
    if layout == "buffers":
        state |= statistics.buffers_of(found)
    files.clear(directory)
    for stale in directory.glob("policy_*processor*"):
        stale.unlink()
    files.write(directory, state, max_shard_bytes)
    if policy.lora is not None:
        lora.write(directory, policy.model.towers, policy.lora, ".")
    content = _content(policy)
    (directory / "config.json").write_text(json.dumps(content, indent=1) + "\n")
    if layout == "openpi":
        statistics.write_openpi(directory, found)
    elif layout == "lerobot":
        before, after = policy.processors or _steps(policy, content)
        statistics.write_processors(directory, found, before, after)
    if policy.prompts is not None:
        policy.prompts.tokenizer.save(str(directory / "tokenizer.json"))


def _content(policy: FlowModel) -> dict[str, Any]:
    """Return config.json: as it was read, with what has been changed."""
    config = policy.config
    content = dict(config.content)
    horizon = "action_horizon" if "action_horizon" in content else "chunk_size"
    content[horizon] = policy.horizon
    if "type" in content:
        content["n_action_steps"] = policy.chunk
    head, spec = policy.value_head, policy.action_spec
    sizes = {"STATE": config.state, "ACTION": spec.dim}
    for group in ("input_features", "output_features"):
        if group in content:
            content[group] = {
                name: {**one, "shape": [sizes[one["type"]]]} if sizes.get(one["type"]) else one
                for name, one in content[group].items()
            }
    content["rove"] = {
        "chunk": policy.chunk,
        "cameras": config.cameras,
        "resizer": config.resizer,
        "prompt": config.prompt,
        "delta": config.delta,
        "action_spec": asdict(spec),
        "sampling": asdict(policy.sampling),
        "freeze": policy.freeze,
        "value_head": None if head is None else asdict(head.config),
        "lora": None if policy.lora is None else asdict(policy.lora),
        "pointers": 0 if policy.pointer is None else len(policy.pointer.queries) // policy.pointer.pictures,
        "pointed": 1 if policy.pointer is None else policy.pointer.pictures,
    }
    return content


_TOKENIZERS: dict[Family, str] = {
    "smolvla": "HuggingFaceTB/SmolVLM2-500M-Video-Instruct",
    "pi0": "google/paligemma-3b-pt-224",
    "pi05": "google/paligemma-3b-pt-224",
}


def _steps(
    policy: FlowModel, content: Mapping[str, Any]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the steps of LeRobot's processors for a policy that had none."""
    config = policy.config
    inputs, outputs = content.get("input_features", {}), content.get("output_features", {})

    def step(name: str, **settings: Any) -> dict[str, Any]:
        return {"registry_name": name, "config": settings}

    names = {
        "rename": step("rename_observations_processor", rename_map={}),
        "batch": step("to_batch_processor"),
    }
    device = step("device_processor", device="cpu", float_dtype=None)
    normalize = step("normalizer_processor", features={**inputs, **outputs})
    unnormalize = step("unnormalizer_processor", features=dict(outputs))
    tokenize = step(
        "tokenizer_processor",
        max_length=config.prompt_length,
        task_key="task",
        padding_side="right",
        padding="longest" if config.family == "smolvla" else "max_length",
        truncation=True,
        tokenizer_name=_TOKENIZERS[config.family],
    )
    relative = step(
        "relative_actions_processor", enabled=False, exclude_joints=["gripper"], action_names=None
    )
    start, after = list(names.values()), [unnormalize, device]
    if config.family == "smolvla":
        return [*start, step("smolvla_new_line_processor"), tokenize, device, normalize], after
    after.insert(1, step("absolute_actions_processor", enabled=False))
    if config.family == "pi0":
        return [*start, step("pi0_new_line_processor"), tokenize, device, relative, normalize], after
    prepare = step("pi05_prepare_state_tokenizer_processor_step")
    return [*start, relative, normalize, prepare, tokenize, device], after
