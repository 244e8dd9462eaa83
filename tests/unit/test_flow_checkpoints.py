"""Checkpoint directories of flow policies: layouts, and what is refused by file and key."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_flow_policy import STATISTICS, build, chance, observe

from rove.config.schema import (
    FlowPolicyConfig,
    FlowSampling,
    LoraConfig,
    PolicyConfig,
    Run,
    ValueHeadConfig,
    Vine,
)
from rove.config.validate import validate
from rove.errors import RoveError
from rove.policies.flow import FlowVLA


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny SmolVLA in LeRobot's layout."""
    directory = tmp_path_factory.mktemp("smolvla")
    build(critic=None).save_pretrained(directory)
    return directory


@pytest.fixture
def checkpoint(saved: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may change."""
    return Path(shutil.copytree(saved, tmp_path / "checkpoint"))


def edit(path: Path, **keys: object) -> None:
    """Change keys of a JSON file; None takes one away."""
    content = json.loads(path.read_text()) | keys
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def edit_weights(directory: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    path = directory / "model.safetensors"
    state = load_file(path)
    change(state)
    save_file(state, path)


def refused(directory: Path, *words: str, **settings: Any) -> None:
    """Reading a checkpoint is refused by a message with all of the words."""
    with pytest.raises(RoveError) as caught:
        FlowVLA.from_pretrained(directory, **settings)
    for word in words:
        assert word in str(caught.value), str(caught.value)


OUT = "model.action_out_proj.weight"


def test_weights_that_do_not_fit(checkpoint: Path) -> None:
    edit_weights(checkpoint, lambda state: state.pop(OUT))
    refused(checkpoint, "model.safetensors", f"missing {OUT}")


def test_weights_that_nothing_reads(checkpoint: Path) -> None:
    edit_weights(checkpoint, lambda state: state.update({"model.extra.weight": torch.zeros(2)}))
    refused(checkpoint, "model.safetensors", "unexpected model.extra.weight")


def test_misshapen_weights(checkpoint: Path) -> None:
    edit_weights(checkpoint, lambda state: state.update({OUT: torch.zeros(2, 3)}))
    refused(checkpoint, "model.safetensors", OUT, "[2, 3]", "[8, 24]")


def test_weights_that_are_not_finite(checkpoint: Path) -> None:
    edit_weights(checkpoint, lambda state: state[OUT].fill_(torch.nan))
    refused(checkpoint, "model.safetensors", OUT, "NaN")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "full_weights.pt", "model.ckpt"])
def test_pickles(checkpoint: Path, name: str) -> None:
    (checkpoint / "model.safetensors").unlink()
    (checkpoint / name).write_bytes(b"\x80\x04.")
    refused(checkpoint, name, "pickled", "Convert the weights to safetensors")


def test_a_directory_of_a_pickle_alone(tmp_path: Path) -> None:
    folder = tmp_path / "actor" / "model_state_dict"
    folder.mkdir(parents=True)
    (folder / "full_weights.pt").write_bytes(b"\x80\x04.")
    refused(tmp_path, "full_weights.pt", "pickled")


def test_jax_weights(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    (checkpoint / "params").mkdir()
    refused(checkpoint, "params", "convert_jax_model_to_pytorch")


def test_no_weights_at_all(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    refused(checkpoint, "model.safetensors")


def test_no_statistics(checkpoint: Path) -> None:
    for path in checkpoint.glob("policy_*"):
        path.unlink()
    refused(checkpoint, str(checkpoint), "no statistics", "policy_preprocessor.json", "norm_stats.json")
    policy = FlowVLA.from_pretrained(checkpoint, statistics=STATISTICS)
    assert policy.act(observe(), "greedy").actions.shape == (3, 3, 5)


def test_infinite_statistics_are_none(checkpoint: Path) -> None:
    """As in a published base, which has been given none yet."""
    for path in checkpoint.glob("policy_*.safetensors"):
        save_file({key: torch.full_like(value, torch.inf) for key, value in load_file(path).items()}, path)
    refused(checkpoint, "no statistics")


def test_statistics_that_a_method_needs(checkpoint: Path) -> None:
    content = json.loads((checkpoint / "policy_preprocessor.json").read_text())
    content["steps"][-1]["config"]["norm_map"]["STATE"] = "MEAN_STD"
    (checkpoint / "policy_preprocessor.json").write_text(json.dumps(content))
    refused(checkpoint, "observation.state", "MEAN_STD", "mean and std")
    content["steps"][-1]["config"]["norm_map"]["STATE"] = "MEAN"
    (checkpoint / "policy_preprocessor.json").write_text(json.dumps(content))
    refused(checkpoint, "policy_preprocessor.json", "STATE = 'MEAN'", "MEAN_STD")


def test_a_statistics_file_that_is_not_there(checkpoint: Path) -> None:
    (path,) = checkpoint.glob("policy_preprocessor_step_*.safetensors")
    path.unlink()
    refused(checkpoint, path.name)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"type": "smolvlm"}, ("unknown flow policy, type = 'smolvlm'", "Did you mean 'smolvla'?")),
        ({"attention_mode": "self_attn"}, ("attention_mode", "cross_attn")),
        ({"num_expert_layers": 1}, ("num_expert_layers", "equal")),
        ({"adapt_to_pi_aloha": True}, ("adapt_to_pi_aloha",)),
        ({"chunk_size": "many"}, ("chunk_size",)),
        ({"resize_imgs_with_padding": [16, 16]}, ("resize_imgs_with_padding",)),
        ({"vlm_config": None, "vlm_model_name": "someone/large"}, ("vlm_model_name", "vlm_config")),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_a_configuration_that_is_not_computed_with(
    checkpoint: Path, keys: dict[str, Any], words: tuple[str, ...]
) -> None:
    edit(checkpoint / "config.json", **keys)
    refused(checkpoint, "config.json", *words)


def test_another_number_of_cameras(saved: Path) -> None:
    policy, seen = FlowVLA.from_pretrained(saved), observe()
    one = type(seen)(seen.images[:, :1], seen.instruction, seen.state)
    with pytest.raises(RoveError, match=r"sees 2 pictures .*config.json.*gives 1.*cameras=1"):
        policy.act(one, "greedy")
    with pytest.raises(RoveError, match="sees 2 pictures"):
        policy.process_images([seen.images[:, 0]])
    other = FlowVLA.from_pretrained(saved, cameras=1)
    assert other.act(one, "greedy").actions.shape == (3, 3, 5)


def test_no_tokenizer(checkpoint: Path) -> None:
    (checkpoint / "tokenizer.json").unlink()
    policy = FlowVLA.from_pretrained(checkpoint)
    with pytest.raises(RoveError) as caught:
        policy.act(observe(), "greedy")
    assert str(checkpoint) in str(caught.value) and "HuggingFaceTB/SmolVLM2-500M" in str(caught.value)


def test_a_damaged_tokenizer(checkpoint: Path) -> None:
    (checkpoint / "tokenizer.json").write_text("{}")
    refused(checkpoint, "tokenizer.json", "damaged")


def test_no_state() -> None:
    for family in ("smolvla", "pi0", "pi05"):
        seen = observe()
        with pytest.raises(RoveError, match="reads the robot's state"):
            build(family).act(type(seen)(seen.images, seen.instruction), "greedy")


def test_a_sample_of_another_policy() -> None:
    seen = observe()
    sample = build().act(seen, "sample", chance()).sample
    with pytest.raises(RoveError, match="of other settings"):
        build(sampling=FlowSampling(steps=3, stochastic="all")).evaluate(seen, sample)


@pytest.mark.parametrize(
    "settings",
    [{"chunk": 9}, {"value_head": ValueHeadConfig(level="action")}, {"freeze": "llm"}],
    ids=lambda value: next(iter(value)),
)
def test_settings_that_do_not_fit(saved: Path, settings: dict[str, Any]) -> None:
    refused(saved, next(iter(settings)).split(".")[0], **settings)


@pytest.mark.parametrize(
    ("sampling", "words"),
    [
        (FlowSampling(sampler="flow_cps", steps=1), "no noise in its last step"),
        (FlowSampling(sampler="flow_cps", stochastic="all"), "no density in its last step"),
        (FlowSampling(sampler="flow_noise", low=0.3), "low = 0.3 and high = 0.16"),
    ],
)
def test_chains_without_a_density(sampling: FlowSampling, words: str) -> None:
    with pytest.raises(RoveError, match=words):
        build(sampling=sampling)
    run = Run(name="x", algorithm=Vine(), policy=PolicyConfig(flow=FlowPolicyConfig(sampling=sampling)))
    with pytest.raises(RoveError, match=words):
        validate(run)


def test_an_adapter_of_others(checkpoint: Path) -> None:
    (checkpoint / "adapter_config.json").write_text("{}")
    refused(checkpoint, "adapter", "merge")


def test_buffers_are_read_and_written(saved: Path, tmp_path: Path) -> None:
    policy, seen = FlowVLA.from_pretrained(saved), observe()
    # The old layout names the method in config.json alone.
    policy.save_pretrained(tmp_path, layout="buffers")
    assert not list(tmp_path.glob("policy_*"))
    keys = load_file(tmp_path / "model.safetensors").keys()
    assert "normalize_inputs.buffer_observation_state.q01" in keys
    copy = FlowVLA.from_pretrained(tmp_path)
    assert torch.equal(copy.act(seen, "greedy").actions, policy.act(seen, "greedy").actions)
    assert copy.statistics.layout == "buffers"
    with pytest.raises(RoveError, match="openpi"):
        copy.save_pretrained(tmp_path / "other", layout="openpi")


def test_saving_over_what_was_read(checkpoint: Path) -> None:
    policy, seen = FlowVLA.from_pretrained(checkpoint), observe()
    before = policy.act(seen, "greedy").actions
    policy.save_pretrained(checkpoint)
    assert torch.equal(FlowVLA.from_pretrained(checkpoint).act(seen, "greedy").actions, before)


def test_saved_adapters_are_continued_or_merged(saved: Path, tmp_path: Path) -> None:
    policy, seen = FlowVLA.from_pretrained(saved, lora=LoraConfig(rank=2), freeze="vlm"), observe()
    assert policy.adapters and not any(p.requires_grad for p in policy.model.vlm.parameters())
    with torch.no_grad():
        for layer in policy.adapters:
            layer.pair[1].fill_(0.1)
    expected = policy.act(seen, "sample", chance())
    policy.save_pretrained(tmp_path)
    same = FlowVLA.from_pretrained(tmp_path)
    assert same.lora == policy.lora and same.freeze == "vlm"
    assert torch.equal(same.act(seen, "sample", chance()).sample, expected.sample)
    merged = FlowVLA.from_pretrained(tmp_path, lora=None)
    assert merged.lora is None
    torch.testing.assert_close(
        merged.act(seen, "sample", chance()).sample, expected.sample, atol=1e-4, rtol=0
    )


def test_words_of_the_suite_are_known() -> None:
    policy = build("pi05")
    assert policy.prompts is not None
    ids, mask = policy.prompts(["push the red_cube", "sing"], torch.tensor([[-1.0, 0.999], [0.0, -2.0]]))
    words = [policy.prompts.tokenizer.id_to_token(i) for i in ids[0][mask[0]].tolist()]
    assert " ".join(map(str, words)) == "<bos> task : push the red cube , state : 0 255 ; \n action :"
    assert "<unk>" in [policy.prompts.tokenizer.id_to_token(i) for i in ids[1].tolist()]
    assert words[0] == "<bos>" and ids[1][~mask[1]].eq(0).all()
