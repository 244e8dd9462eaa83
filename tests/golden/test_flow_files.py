"""Published layouts by key and shape, prompts, copies of golden checkpoints, and a second oracle for π0."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from rove.config.schema import FlowSampling, LoraConfig, ValueHeadConfig
from rove.policies.flow import FlowVLA, config, prompts, weights
from rove.policies.flow.core import _NETWORKS
from rove.policies.reading import Table

GOLDEN = Path(os.environ.get("ROVE_GOLDEN", Path(__file__).parents[2] / ".." / "shared" / "golden")) / "flow"
pytestmark = pytest.mark.skipif(
    not GOLDEN.is_dir(), reason=f"no golden data at {GOLDEN}; ROVE_GOLDEN says where they are"
)
MODELS = ("smolvla-tiny", "smolvla-tiny-cross", "pi0-tiny", "pi05-tiny")
Arrays = dict[str, Tensor]


def arrays_of(name: str) -> Arrays:
    return {key: torch.from_numpy(value) for key, value in np.load(GOLDEN / name / "golden.npz").items()}


def velocity(policy: FlowVLA, arrays: Arrays) -> Tensor:
    pixels = [value for key, value in arrays.items() if key.startswith("pixel_values_")]
    names = ("image_masks", "lang_tokens", "lang_masks", "state_normalized")
    prefix = policy.prefix(pixels, *(arrays[name] for name in names))
    return policy.velocity(prefix, arrays["x_t"], arrays["time"])


# --- full sizes ---------------------------------------------------------------------------------------


def expanded(keys: dict[str, list[int]]) -> dict[str, tuple[int, ...]]:
    """Spell out "layers.{i}.…  i=0..14 step 2"."""
    out = {}
    for key, shape in keys.items():
        found = re.fullmatch(r"(\S+)  i=(\d+)\.\.(\d+)(?: step (\d+))?", key)
        if found is None:
            out[key] = tuple(shape)
            continue
        name, first, last, step = found.groups()
        for i in range(int(first), int(last) + 1, int(step or 1)):
            out[name.replace("{i}", str(i))] = tuple(shape)
    return out


@pytest.mark.parametrize(("name", "family"), [("smolvla", "smolvla"), ("pi0", "pi0"), ("pi05", "pi05")])
def test_a_published_checkpoint_fits_by_key_and_shape(name: str, family: config.Family) -> None:
    layout = json.loads((GOLDEN / "layouts.json").read_text())[f"lerobot/{name}_base"]
    published = expanded(layout["keys"])
    assert len(published) == layout["tensors"]
    assert sum(map(np.prod, published.values())) == layout["parameters"]
    settings = config.read(Table({"type": family}, "config.json"), family, openpi=False)
    with torch.device("meta"):
        network = _NETWORKS[family](settings)
    ours = {f"model.{key}": tuple(value.shape) for key, value in network.state_dict().items()}
    assert all(parameter.is_meta for parameter in network.parameters())
    read = {key: weights.module_name(key, family) for key in published}
    assert {name: published[key] for key, name in read.items() if name is not None} == ours
    unused = {key for key, name in read.items() if name is None}
    assert all(key.endswith("lm_head.weight") for key in unused) and len(unused) == 1
    written = {weights.stored_name(name, prefix=True) for name in ours}
    assert written <= published.keys()
    # Besides, the published list has each tied embedding twice.
    assert published.keys() - written - unused <= {
        "model.paligemma_with_expert.paligemma.model.language_model.embed_tokens.weight"
    }
    assert {weights.stored_name(name, prefix=False) for name in ours} == {
        key.removeprefix("model.") for key in written
    }


# --- copies ---------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_a_saved_checkpoint_is_the_one_that_was_read(name: str, tmp_path: Path) -> None:
    policy = FlowVLA.from_pretrained(GOLDEN / name)
    policy.save_pretrained(tmp_path / "whole")
    before, after = (load_file(d / "model.safetensors") for d in (GOLDEN / name, tmp_path / "whole"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    if (GOLDEN / name / "policy_preprocessor.json").exists():
        for stem in ("policy_preprocessor", "policy_postprocessor"):
            theirs, ours = (
                json.loads((d / f"{stem}.json").read_text()) for d in (GOLDEN / name, tmp_path / "whole")
            )
            assert theirs == ours
            (file,) = [step["state_file"] for step in theirs["steps"] if "state_file" in step]
            numbers = [load_file(d / file) for d in (GOLDEN / name, tmp_path / "whole")]
            part = "observation.state." if "pre" in stem else "action."
            for key in (key for key in numbers[0] if key.startswith(part)):
                assert torch.equal(numbers[0][key], numbers[1][key])
    policy.save_pretrained(tmp_path / "shards", max_shard_bytes=300_000)
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 2
    arrays = arrays_of(name)
    expected = velocity(policy, arrays)
    for folder in ("whole", "shards"):
        copy = FlowVLA.from_pretrained(tmp_path / folder)
        assert torch.equal(velocity(copy, arrays), expected)
        assert torch.equal(copy.unnormalize(arrays["euler_10"]), policy.unnormalize(arrays["euler_10"]))


@torch.no_grad()
def test_heads_adapters_and_settings_are_kept(tmp_path: Path) -> None:
    policy = FlowVLA.from_pretrained(
        GOLDEN / "smolvla-tiny",
        lora=LoraConfig(rank=2),
        value_head=ValueHeadConfig(level="chunk", hidden=(8,)),
        sampling=FlowSampling(steps=3, sampler="flow_noise", hidden=(8,)),
        chunk=3,
    )
    assert policy.value_head is not None and policy.noise_network is not None
    for parameter in policy.parameters():
        if parameter.requires_grad:
            parameter += 0.01
    policy.save_pretrained(tmp_path)
    copy = FlowVLA.from_pretrained(tmp_path)
    assert (copy.chunk, copy.sampling, copy.lora) == (policy.chunk, policy.sampling, policy.lora)
    state = copy.state_dict()
    assert state.keys() == policy.state_dict().keys()
    assert all(torch.equal(state[key], value) for key, value in policy.state_dict().items())
    arrays = arrays_of("smolvla-tiny")
    expected = velocity(policy, arrays)
    assert torch.equal(velocity(copy, arrays), expected)
    torch.testing.assert_close(velocity(copy.merge(), arrays), expected, atol=1e-5, rtol=0)


# --- other layouts ---------------------------------------------------------------------------------------


def openpi_copy(name: str, directory: Path, asset: str = "physical-intelligence/libero") -> Path:
    """Write a golden checkpoint as openpi has it: no type, no processors, statistics in norm_stats.json."""
    directory.mkdir()
    about = json.loads((GOLDEN / name / "config.json").read_text())
    sizes = {key: about[key] for key in ("vlm_config", "dit_config")}
    content = sizes | {"action_dim": 32, "action_horizon": 10, "precision": "float32"}
    (directory / "config.json").write_text(json.dumps(content))
    shutil.copy(GOLDEN / name / "model.safetensors", directory)
    (stored,) = (GOLDEN / name).glob("policy_pre*.safetensors")
    numbers = load_file(stored)
    parts: dict[str, Any] = {"state": "observation.state.", "actions": "action."}
    stats = {
        part: {n: numbers[prefix + n].tolist() for n in ("mean", "std", "q01", "q99")}
        for part, prefix in parts.items()
    }
    folder = directory / "assets" / asset
    folder.mkdir(parents=True)
    (folder / "norm_stats.json").write_text(json.dumps({"norm_stats": stats}))
    return directory


@torch.no_grad()
@pytest.mark.parametrize("name", ["pi0-tiny", "pi05-tiny"])
def test_openpis_layout(name: str, tmp_path: Path) -> None:
    directory = openpi_copy(name, tmp_path / "openpi")
    policy = FlowVLA.from_pretrained(directory)
    arrays = arrays_of(name)
    torch.testing.assert_close(velocity(policy, arrays), arrays["velocity"], atol=1e-4, rtol=0)
    assert (policy.config.resizer, policy.config.prompt, policy.action_spec.dim) == ("openpi", "openpi", 7)
    state = policy.normalize_state(arrays["state"])
    # openpi adds other small constants to spans.
    torch.testing.assert_close(state, arrays["state_normalized"], atol=1e-3, rtol=1e-3)
    back = policy.unnormalize(arrays["euler_10"], arrays["state"])
    offset = torch.zeros(3, 1, 7)
    if name == "pi0-tiny":
        offset[:, 0, :6] = arrays["state"][:, :6]
    torch.testing.assert_close(back - offset, arrays["actions"], atol=1e-3, rtol=1e-3)
    again = policy.normalize_actions(back, arrays["state"])
    torch.testing.assert_close(again[..., :7], arrays["euler_10"][..., :7], atol=1e-4, rtol=0)
    policy.save_pretrained(tmp_path / "copy")
    copy = FlowVLA.from_pretrained(tmp_path / "copy")
    assert torch.equal(copy.unnormalize(arrays["euler_10"], arrays["state"]), back)
    assert torch.equal(velocity(copy, arrays), velocity(policy, arrays))
    assert (tmp_path / "copy/assets/physical-intelligence/libero/norm_stats.json").exists()


def test_other_names_of_weights(tmp_path: Path) -> None:
    """Both names of the time's network, a second copy of the embedding, and π0's projection in π0.5."""
    from safetensors.torch import save_file

    for name, (ours, theirs) in {
        "pi0-tiny": ("action_time_mlp_", "time_mlp_"),
        "pi05-tiny": ("time_mlp_", "action_time_mlp_"),
    }.items():
        shutil.copytree(GOLDEN / name, tmp_path / name, copy_function=shutil.copyfile)
        (tmp_path / name).chmod(0o755)
        tensors = load_file(GOLDEN / name / "model.safetensors")
        state = {key.replace(ours, theirs): value for key, value in tensors.items()}
        (head,) = [key for key in state if key.endswith("paligemma.lm_head.weight")]
        embedding = head.replace("lm_head", "model.language_model.embed_tokens")
        state[embedding] = state[head].clone()
        if name == "pi05-tiny":
            state["state_proj.weight"] = torch.zeros(48, 32)
        save_file(state, tmp_path / name / "model.safetensors")
        arrays = arrays_of(name)
        with torch.no_grad():
            made = velocity(FlowVLA.from_pretrained(tmp_path / name), arrays)
        torch.testing.assert_close(made, arrays["velocity"], atol=1e-4, rtol=0)


# --- prompts ---------------------------------------------------------------------------------------------


STYLES: dict[str, prompts.Style] = {
    "smolvla": "newline",
    "pi0-lerobot": "newline",
    "pi0-openpi": "openpi",
    "pi05": "state",
}


def cases() -> list[dict[str, Any]]:
    return json.loads((GOLDEN / "prompts.json").read_text())


def test_prompts() -> None:
    for case in cases():
        style = STYLES[case["policy"]]
        state = None
        if "state_normalized" in case:
            (state,) = prompts.discretize(torch.tensor([case["state_normalized"]]), style)
        made = prompts.text(case["task"], style, state)
        expected = case["prompt"].removesuffix(" + '\\n' encoded by itself")
        assert made == expected


# --- a second oracle ---------------------------------------------------------------------------------------


@torch.no_grad()
def test_transformers_pi0_agrees() -> None:
    """Within what its time embedding, which is in float32, leaves."""
    from transformers import PI0ForConditionalGeneration

    arrays, directory = arrays_of("pi0-tiny"), GOLDEN / "pi0-tiny"
    about = json.loads((directory / "config.json").read_text())
    from transformers import PI0Config

    theirs = PI0ForConditionalGeneration(
        PI0Config(vlm_config=about["vlm_config"], dit_config=about["dit_config"], chunk_size=10)
    ).eval()
    names = {
        "paligemma_with_expert.paligemma.model.vision_tower.vision_model.": "model.vlm.vision_tower.",
        "paligemma_with_expert.paligemma.model.": "model.vlm.",
        "paligemma_with_expert.gemma_expert.model.": "model.dit.",
        "paligemma_with_expert.gemma_expert.lm_head.": "model.dit.embed_tokens.",
        "paligemma_with_expert.paligemma.lm_head.": "model.vlm.language_model.embed_tokens.",
        "action_out_proj": "action_out_proj",
        "": "embed_action_time.",
    }
    state = {}
    for key, value in load_file(directory / "model.safetensors").items():
        bare = key.removeprefix("model.")
        prefix = next(name for name in names if bare.startswith(name))
        state[names[prefix] + bare.removeprefix(prefix)] = value
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert not unexpected and not missing
    rows = slice(0, 2)  # with both cameras; the third row has one
    image = about["vlm_config"]["image_token_id"]
    tokens = torch.cat((torch.full((2, 32), image), arrays["lang_tokens"][rows]), dim=1)
    mask = torch.cat((torch.ones(2, 32, dtype=torch.bool), arrays["lang_masks"][rows]), dim=1)
    pixels = torch.stack([arrays["pixel_values_0"][rows], arrays["pixel_values_1"][rows]], dim=1)
    answer = theirs(
        state=arrays["state_normalized"][rows],
        noise=arrays["x_t"][rows],
        timestep=arrays["time"][rows],
        input_ids=tokens,
        pixel_values=pixels,
        pixel_attention_mask=torch.ones(2, 2, dtype=torch.bool),
        attention_mask=mask.long(),
    )
    ours = velocity(FlowVLA.from_pretrained(directory), arrays)
    torch.testing.assert_close(ours[rows], answer.logits, atol=5e-4, rtol=0)
