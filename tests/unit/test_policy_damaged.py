"""Checkpoints as they are found: damaged, of another kind, half fetched. Each is read, or refused by name."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.unit.test_openvla_checkpoints import (
    CONFIG,
    L1,
    build,
    observe,
    published_oft,
    rewrite,
    sharded,
)
from tokenizers import Tokenizer

from rove.config.schema import LoraConfig, TowerConfig, ValueHeadConfig
from rove.errors import RoveError
from rove.policies import files, hub, registry
from rove.policies.openvla import OpenVLA, bins
from rove.policies.openvla.tokenizer import word_tokenizer
from rove.policies.words import unknown_word

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"
LORA = LoraConfig(rank=2, alpha=4.0)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoints") / "base"
    build().save_pretrained(directory)
    return directory


@pytest.fixture
def copy(base: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(base, tmp_path / "copy"))


def change(path: Path, keys: str, value: object) -> None:
    """Set the value of `keys` ("text_config.hidden_act") in a JSON file."""
    content = json.loads(path.read_text())
    *parents, last = keys.split(".")
    place = content
    for key in parents:
        place = place[key]
    place[last] = value
    path.write_text(json.dumps(content))


# --- JSON -----------------------------------------------------------------------------------------

JSON = ("config.json", "preprocessor_config.json", "dataset_statistics.json", "tokenizer.json")


@pytest.mark.parametrize("name", [*JSON, "model.safetensors.index.json", "adapter_config.json"])
def test_a_json_file_that_holds_no_object_is_named(name: str, base: Path, tmp_path: Path) -> None:
    if name.startswith("model"):
        sharded(tmp_path / "copy")
    elif name.startswith("adapter"):
        (tmp_path / "copy").mkdir()
    else:
        shutil.copytree(base, tmp_path / "copy")
    path = tmp_path / "copy" / name
    whole = path.read_bytes() if path.exists() else b'{"peft_type": "LORA"}'
    for content, message in (
        (whole[: len(whole) // 2], "is damaged"),
        (b"\xff" + whole, "is damaged"),
        (b'{"a": ' * 100_000, "is damaged"),
        (b"", "is empty"),
        (b"[]", "list|damaged"),
        (b"null", "NoneType|damaged"),
        (POINTER, "is a Git LFS pointer, not the file itself: run git lfs pull in "),
    ):
        path.write_bytes(content)
        with pytest.raises(RoveError, match=rf"{name}.*({message})"):
            registry.load(tmp_path / "copy")
    path.unlink()
    path.mkdir()
    with pytest.raises(RoveError, match=rf"{name} cannot be read: Is a directory|has no config\.json"):
        registry.load(tmp_path / "copy")


def test_a_byte_order_mark_and_null_for_an_absent_key_are_read(base: Path, copy: Path) -> None:
    for name in JSON:
        (copy / name).write_bytes(b"\xef\xbb\xbf" + (copy / name).read_bytes())
    expected = OpenVLA.from_pretrained(base).act(observe(), "greedy").actions
    assert torch.equal(OpenVLA.from_pretrained(copy).act(observe(), "greedy").actions, expected)
    (copy / "config.json").write_bytes((base / "config.json").read_bytes())
    for key in ("norm_stats", "image_resize_strategy", "text_config.rope_scaling", "rove.value_head"):
        change(copy / "config.json", key, None)
    assert torch.equal(OpenVLA.from_pretrained(copy).act(observe(), "greedy").actions, expected)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model_type", None, "no model_type"),
        ("model_type", "gr00t", "unknown policy, model_type = 'gr00t'.*openvla"),
        ("image_sizes", 56, "image_sizes = 56: expected any number of values"),
        ("image_sizes", [16, 24], "one positive size for all towers"),
        ("image_sizes", [20, 20], "patch 8 does not divide the image size 20"),
        ("timm_model_ids", ["vit_patch8_siglip"], "timm_kwargs has 2 entries, timm_model_ids 1"),
        ("timm_model_ids", ["a_clip", "b_clip"], "timm_kwargs.0: unknown vision tower 'a_clip'"),
        ("timm_kwargs", [{"embed_dim": 16, "depth": 3}] * 2, "timm_kwargs.0 has no num_heads"),
        ("timm_kwargs", [{"init_values": 1}] * 2, "unknown key 'init_values'"),
        ("timm_override_act_layers", [None, "quick_gelu"], "timm_override_act_layers = .*Rove computes with"),
        ("use_fused_vision_backbone", False, "use_fused_vision_backbone = False"),
        ("image_resize_strategy", "letterbox", "'letterbox': Rove computes with \"resize-naive\" only"),
        ("n_action_bins", 128, "n_action_bins = 128: Rove computes with 256"),
        ("llm_backbone_id", "mistral-v0.1-7b-pure", "Rove computes Llamas only"),
        ("quantization_config", {"load_in_4bit": True}, "quantization_config"),
        ("use_proprio", True, "proprio_projector--.* is not there"),
        ("pad_to_multiple_of", 64, "leaves no room for the 256 action tokens"),
        ("pad_token_id", 999, "pad_token_id = 999 is beyond the 264 tokens"),
        ("norm_stats", 3, "norm_stats holds a int, expected an object"),
        ("text_config", [], "text_config holds a list, expected an object"),
        ("text_config.hidden_size", "32", "text_config: hidden_size = '32': expected an integer"),
        ("text_config.hidden_size", 10**30, "is damaged: 100000000000000000… is too large a number"),
        ("text_config.num_hidden_layers", 10**9, "expected a number from 1 to 1,000"),
        ("text_config.num_attention_heads", 3, "width 32 must be a multiple of 2 x heads = 6"),
        ("text_config.num_key_value_heads", 3, "num_key_value_heads 3 does not divide the 2 heads"),
        ("text_config.head_dim", 32, "head_dim = 32: Rove computes with 16 only"),
        ("text_config.hidden_act", "gelu", "text_config: hidden_act = 'gelu': Rove computes with \"silu\""),
        ("text_config.model_type", "mistral", "text_config: model_type = 'mistral'"),
        ("text_config.attention_bias", True, "attention_bias = True: Rove computes with false"),
        ("text_config.mlp_bias", True, "mlp_bias"),
        ("text_config.sliding_window", 4096, "sliding_window = 4096: Rove computes with null only"),
        (
            "text_config.tie_word_embeddings",
            True,
            "tie_word_embeddings = True: Rove computes with false only",
        ),
        ("text_config.rms_norm_eps", -1.0, "rms_norm_eps = -1.0: expected a number at least 0"),
        ("text_config.rope_theta", "x", "rope_theta = 'x': expected a finite number"),
        ("text_config.rope_scaling", {"type": "linear", "factor": 2.0}, "rope_scaling: type = 'linear'"),
        ("text_config.rope_parameters", {"rope_type": "llama3"}, "rope_parameters: rope_type = 'llama3'"),
        ("text_config.rope_parameters", {"factor": 8.0}, "rope_parameters: factor = 8.0"),
        ("rove", [1], "rove holds a list"),
        ("rove.centre_crop", True, "unknown key 'centre_crop'. Did you mean 'center_crop'"),
        ("rove.center_crop", "yes", "rove: center_crop = 'yes': expected true or false"),
        ("rove.decoding", "serial", "rove: decoding = 'serial'. Did you|rove: decoding = 'serial'. Choose"),
        ("rove.chunk", 0, "rove: chunk = 0: expected a number from 1 to 1,000"),
        ("rove.temperature", 0, "rove: temperature = 0.0: expected a number above 0"),
        ("rove.prompt", "do {this}", "expected text with {instruction} in it"),
        ("rove.prompt", "do {instruction", "expected text with {instruction} in it"),
        ("rove.prompt_end", 5000, "prompt_end = 5000 is beyond the 264 tokens"),
        ("rove.interpolation", "nearest", "interpolation = 'nearest'"),
        ("rove.head", "l1", "its file action_head--.* is not there"),
        ("rove.lora", {"rank": 0}, "rove: lora.rank = 0: expected a number at least 1"),
        ("rove.value_head", {"hidden": [-3]}, "value_head.hidden"),
        ("rove.action_spec.low", [0.0], "as many names, all different, as units, low and high"),
        ("rove.action_spec.low", [2.0] * 7, "low is above high in a, b"),
        ("rove.action_spec.low", [float("nan")] * 7, "low.0 = nan: expected a number"),
        ("rove.action_spec.gripper", "left", "gripper = 'left'"),
    ],
)
def test_a_value_of_config_that_cannot_be_computed_with_is_named(
    key: str, value: object, message: str, copy: Path
) -> None:
    change(copy / "config.json", key, value)
    with pytest.raises(RoveError, match=message) as caught:
        registry.load(copy)
    assert "\n" not in str(caught.value)
    assert "config.json" in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("means", [[0.5] * 3], "expected means and stds of 2 towers"),
        ("means", [[0.5, 0.5]] * 2, "means.0 = .*expected 3 values"),
        ("means", None, "has no means: add it"),
        ("stds", [[0.5, 0.5, 0.0]] * 2, "each std above 0"),
        ("interpolations", ["bicubic", "lanczos"], "expected one for all towers"),
        ("interpolations", ["nearest"] * 2, "'nearest'"),
        ("image_resize_strategy", "resize-crop", "Rove computes with"),
        ("input_sizes", [[3, 24, 24]] * 2, "input_sizes"),
    ],
)
def test_a_value_of_the_preprocessor_that_cannot_be_computed_with_is_named(
    key: str, value: object, message: str, copy: Path
) -> None:
    change(copy / "preprocessor_config.json", key, value)
    with pytest.raises(RoveError, match=rf"preprocessor_config\.json.*{message}"):
        OpenVLA.from_pretrained(copy)


def test_what_is_computed_with_is_read(copy: Path) -> None:
    """The rotary embedding's base under both names, the norm's epsilon, another mean."""
    path = copy / "config.json"
    before = OpenVLA.from_pretrained(copy)
    change(path, "text_config.rope_parameters", {"rope_type": "default", "rope_theta": 500.0})
    change(path, "text_config.rms_norm_eps", 1e-3)
    change(copy / "preprocessor_config.json", "means", [[0.1, 0.2, 0.3]] * 2)
    policy = OpenVLA.from_pretrained(copy)
    config = policy.vlm.language_model.config
    assert config.rope_parameters["rope_theta"] == 500.0
    assert policy.vlm.language_model.norm.variance_epsilon == 1e-3
    torch.testing.assert_close(policy.mean, 255 * torch.tensor([0.1, 0.2, 0.3] * 2))
    seen = observe()
    prompt, pixels = before._prompt(seen), before.process_images(seen.images)
    assert (policy.action_logits(*prompt, pixels) - before.action_logits(*prompt, pixels)).abs().max() > 1e-4
    change(path, "text_config.rope_theta", 10000.0)
    with pytest.raises(RoveError, match="gives rope_theta twice, as 500 and 10000"):
        OpenVLA.from_pretrained(copy)


# --- statistics -----------------------------------------------------------------------------------

ONES = [1.0] * 7


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (None, "suite has no action: add it"),
        ([], "suite: action holds a list"),
        ({"min": [0.0] * 7, "max": ONES}, "has no q01 and q99.*copy them to q01 and q99"),
        ({"q01": [0.0] * 7}, "suite: action has no q99: add it"),
        ({"q01": [0.0] * 7, "q99": ONES[1:]}, "has 7 numbers in q01, 6 in q99 and 7 in mask"),
        ({"q01": [0.0] * 7, "q99": ONES, "mask": [True]}, "and 1 in mask"),
        ({"q01": [], "q99": []}, "has 0 numbers in q01"),
        ({"q01": [0.0] * 7, "q99": ONES, "mask": [1] * 7}, "mask.0 = 1: expected true or false"),
        ({"q01": [0.0] * 6 + [None], "q99": ONES}, "q01.6 = None: expected a finite number"),
        ({"q01": [float("nan")] * 7, "q99": ONES}, "q01.0 = nan: expected a finite number"),
        ({"q01": [0.0] * 7, "q99": [float("inf")] * 7}, "q99.0 = inf: expected a finite number"),
        ({"q01": 0.0, "q99": ONES}, "q01 holds a float, expected a list"),
        ({"q01": ONES, "q99": [0.5] * 7}, "q01 is above q99 in dimension 0, 1 and 0.5"),
    ],
)
def test_statistics_that_cannot_un_normalise_are_named(action: object, message: str, copy: Path) -> None:
    path = copy / "dataset_statistics.json"
    path.write_text(json.dumps({"suite": {"action": action}}))
    with pytest.raises(RoveError, match=rf"dataset_statistics\.json: .*{message}"):
        OpenVLA.from_pretrained(copy)
    path.unlink()
    change(copy / "config.json", "norm_stats", {"suite": {"action": action}})
    with pytest.raises(RoveError, match=rf"config\.json: norm_stats: .*{message}"):
        OpenVLA.from_pretrained(copy)


def test_a_null_mask_is_none_and_an_unused_dimension_may_be_upside_down(copy: Path) -> None:
    action = {"q01": [0.0] * 6 + [1.0], "q99": [2.0] * 6 + [0.0], "mask": [True] * 6 + [False]}
    path = copy / "dataset_statistics.json"
    path.write_text(json.dumps({"suite": {"action": action}}))
    policy = OpenVLA.from_pretrained(copy)
    assert policy.unnormalize(torch.zeros(7)).tolist() == [1.0] * 6 + [0.0]
    path.write_text(json.dumps({"suite": {"action": {"q01": [0.0] * 7, "q99": [2.0] * 7, "mask": None}}}))
    assert OpenVLA.from_pretrained(copy).unnormalize(torch.zeros(7)).tolist() == [1.0] * 7
    path.unlink()
    with pytest.raises(RoveError, match=r"'suite'. The checkpoint has none: add dataset_statistics\.json"):
        OpenVLA.from_pretrained(copy)


def test_a_dimension_that_hardly_moves_is_imitated_within_its_range_and_preflight_warns() -> None:
    from rove.envs import conventions

    still = {"q01": [0.5] * 2 + [-1.0] * 5, "q99": [0.5] * 2 + [1.0] * 5}
    policy = build(L1)
    policy.normalizer = bins.Normalizer(still)
    assert policy.normalize(torch.full((1, 7), 0.75)).tolist() == [[1.0, 1.0] + [0.75] * 5]
    policy.unnorm_key, wanted = "libero:spatial", conventions.of("libero:spatial")
    found = next(f for f in policy.preflight(wanted, rl=False) if f.name == "statistics")
    assert found.status == "warn" and "hardly move in a, b" in found.detail


# --- weights --------------------------------------------------------------------------------------


def test_weights_that_are_no_numbers_are_named(base: Path, tmp_path: Path) -> None:
    for name, value in (("nan", float("nan")), ("inf", -float("inf"))):
        directory = Path(shutil.copytree(base, tmp_path / name))
        state = load_file(directory / "model.safetensors")
        key = "language_model.model.layers.1.mlp.up_proj.weight"
        state[key][3, 5] = value
        save_file(state, directory / "model.safetensors")
        with pytest.raises(RoveError, match=rf"model\.safetensors: {key} holds NaN or infinity"):
            OpenVLA.from_pretrained(directory)
    state[key] = torch.zeros(state[key].shape, dtype=torch.int8)
    save_file(state, directory / "model.safetensors")
    with pytest.raises(RoveError, match=rf"{key} is stored as int8: expected floating-point"):
        OpenVLA.from_pretrained(directory)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_floating_point_format_is_looked_at(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    value = torch.tensor([largest, -largest, 0.0], dtype=dtype)
    assert files.checked(value, "x") is value
    assert files.checked(value[:0], "x").numel() == 0
    for bad in (float("nan"), float("inf"), -float("inf")):
        with pytest.raises(RoveError, match="x holds NaN or infinity"):
            files.checked(torch.cat((value, value.new_tensor([bad]))), "x")


def test_weights_that_were_not_fetched_or_lie_twice_are_named(base: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(base, tmp_path / "copy"))
    weights = copy / "model.safetensors"
    whole = weights.read_bytes()
    for content, message in ((POINTER, "is a Git LFS pointer"), (b"", "is empty"), (whole[:50], "truncated")):
        weights.write_bytes(content)
        with pytest.raises(RoveError, match=rf"model\.safetensors {message}|model\.safetensors is {message}"):
            OpenVLA.from_pretrained(copy)
    weights.unlink()
    with pytest.raises(RoveError, match=r"lacks the weights file model\.safetensors\.$"):
        OpenVLA.from_pretrained(copy)
    sharded(tmp_path / "shards")
    weights = tmp_path / "shards" / "model.safetensors"
    weights.write_bytes(whole)
    with pytest.raises(RoveError, match=r"has its weights twice, in model\.safetensors and in the shards"):
        OpenVLA.from_pretrained(tmp_path / "shards")
    weights.unlink()
    index = tmp_path / "shards" / files.INDEX
    index.write_text('{"metadata": {}}')
    with pytest.raises(RoveError, match="it has no weight_map"):
        OpenVLA.from_pretrained(tmp_path / "shards")
    index.write_text('{"weight_map": {"a": 1}}')
    with pytest.raises(RoveError, match="weight_map: a = 1: expected text"):
        OpenVLA.from_pretrained(tmp_path / "shards")
    index.unlink()
    with pytest.raises(RoveError, match="There are shards, such as model-00001-of-.* not their index"):
        OpenVLA.from_pretrained(tmp_path / "shards")


def test_parts_that_were_not_fetched_or_have_diverged_are_named(tmp_path: Path) -> None:
    published_oft(tmp_path)
    head = next(tmp_path.glob("action_head--*"))
    state = torch.load(head, weights_only=True)
    name = next(iter(state))
    state[name].view(-1)[0] = float("nan")
    torch.save(state, head)
    with pytest.raises(RoveError, match=rf"{head.name}: {name} holds NaN"):
        OpenVLA.from_pretrained(tmp_path)
    for content, message in ((POINTER, "is a Git LFS pointer"), (b"", "is empty"), (b"\x80\x04junk", "")):
        head.write_bytes(content)
        with pytest.raises(RoveError, match=f"{head.name} {message}"):
            OpenVLA.from_pretrained(tmp_path)
    head.unlink()
    change(tmp_path / "config.json", "rove.head", "l1")
    with pytest.raises(RoveError, match=r"was trained with an L1 head .* action_head--\*\.pt is not there"):
        OpenVLA.from_pretrained(tmp_path)


# --- tokenizers and words -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "alter",
    [lambda t: t.enable_padding(length=12), lambda t: t.enable_truncation(2)],
    ids=["padding", "truncation"],
)
def test_padding_and_truncation_of_a_saved_tokenizer_are_off(
    alter: Callable[[Tokenizer], None], base: Path, copy: Path
) -> None:
    tokenizer = Tokenizer.from_file(str(copy / "tokenizer.json"))
    alter(tokenizer)
    tokenizer.save(str(copy / "tokenizer.json"))
    assert tokenizer.encode("pick the red cube").ids != [1, 5, 7, 6, 4]
    read = OpenVLA.from_pretrained(copy)
    assert read.tokenizer is not None
    assert read.tokenizer.encode("pick the red cube") == [1, 5, 7, 6, 4, 2]
    read.save_pretrained(copy)
    assert (copy / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()


def test_a_tokenizer_of_another_model_is_named(copy: Path) -> None:
    path = copy / "tokenizer.json"
    word_tokenizer(["one", "more", "than", "the", "others"]).save(str(path))
    with pytest.raises(RoveError, match=r"tokenizer\.json has a token 264, beyond the 264 of the model"):
        OpenVLA.from_pretrained(copy)
    tokenizer = word_tokenizer([])
    content = json.loads(tokenizer.to_str())
    content["model"]["unk_token"] = "<absent>"
    path.write_text(json.dumps(content))
    with pytest.raises(RoveError, match=r"tokenizer\.json is damaged, or of another version of tokenizers"):
        OpenVLA.from_pretrained(copy)


@pytest.mark.parametrize(
    "text",
    [
        "don't put the well-known 2nd cube (red) on it.",
        "Put the RED cube",
        "лОЖИ ΟΔΟΣ İstanbul STRASSE ß",
        "赤い 立方体 を取る",
        "लाल घन उठाओ",
        "e\u0301tat and \u00e9tat",
        "50% of it: 1.5m, x_1 & y!",
    ],
)
def test_a_vocabulary_of_words_is_cut_as_instructions_are(text: str) -> None:
    tokenizer = word_tokenizer(text.split())
    prompt = text.strip().lower()
    assert unknown_word(tokenizer, prompt) is None
    ids = tokenizer.encode(prompt).ids
    assert 3 not in ids and len(ids) > 1
    assert OpenVLA.unknown_word(text.split(), [text, f"{text} gizmo"]) == "gizmo"
    again = Tokenizer.from_str(tokenizer.to_str())
    assert again.encode(prompt).ids == ids


def test_a_suite_whose_vocabulary_lacks_a_word_is_refused_before_anything_is_collected(monkeypatch) -> None:
    from rove import preflight, recipes
    from rove.envs import registry as envs

    run = recipes.get("demo").build()
    suite = envs.suite(run.env)
    preflight.before_loading(run)
    lacking = tuple(word for word in suite.vocabulary if word != "cube")
    monkeypatch.setattr(type(suite), "vocabulary", lacking)
    with pytest.raises(RoveError, match="vocabulary of tabletop.* lacks 'cube'.*add the word"):
        preflight.before_loading(run)


# --- adapters -------------------------------------------------------------------------------------


def published_adapter(directory: Path, base: Path, **about: Any) -> Path:
    """Write a plain LoRA of the published layout, with changes of its configuration."""
    directory.mkdir(exist_ok=True)
    key = "base_model.model.language_model.model.layers.1.mlp.up_proj"
    state = {f"{key}.lora_A.weight": torch.ones(2, 32), f"{key}.lora_B.weight": torch.ones(48, 2)}
    save_file(state, directory / "adapter_model.safetensors")
    plain = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": str(base)}
    content = {key: value for key, value in (plain | about).items() if value != "absent"}
    (directory / "adapter_config.json").write_text(json.dumps(content))
    return directory


@pytest.mark.parametrize(
    ("about", "message"),
    [
        ({"use_dora": True}, "has use_dora; only a plain LoRA"),
        ({"fan_in_fan_out": True}, "has fan_in_fan_out; only"),
        ({"modules_to_save": ["lm_head"]}, r"has modules_to_save \['lm_head'\]; only"),
        ({"rank_pattern": {"q_proj": 4}}, "has rank_pattern"),
        ({"alpha_pattern": {"q_proj": 4}}, "has alpha_pattern"),
        ({"bias": "lora_only"}, "has bias 'lora_only'"),
        ({"lora_bias": True}, "has lora_bias"),
        ({"init_lora_weights": "pissa"}, "has init_lora_weights 'pissa'"),
        ({"layer_replication": [[0, 2]]}, "has layer_replication"),
        ({"revision": "abc"}, "has revision 'abc'"),
        ({"peft_type": "IA3"}, "has peft_type 'IA3'"),
        ({"peft_type": "absent"}, "has no peft_type"),
        ({"r": "absent"}, "has no r: add it"),
        ({"r": 0}, "r = 0: expected a number at least 1"),
        ({"r": 4}, r"has matrices \[2, 32\] and \[48, 2\] for .*which do not fit its shape \[48, 32\]"),
        ({"lora_alpha": "4"}, "lora_alpha = '4': expected a finite number"),
        ({"lora_alpha": float("nan")}, "lora_alpha = nan"),
        ({"base_model_name_or_path": None}, "has no base_model_name_or_path"),
        ({"base_model_name_or_path": "/nowhere"}, "/nowhere"),
    ],
)
def test_an_adapter_that_is_more_than_a_plain_lora_is_refused(
    about: dict[str, Any], message: str, base: Path, tmp_path: Path
) -> None:
    with pytest.raises(RoveError, match=message):
        registry.load(published_adapter(tmp_path / "adapter", base, **about))


@pytest.mark.parametrize(
    ("about", "scale"),
    [
        ({}, 2.0),
        ({"use_rslora": True}, 4 / 2**0.5),
        ({"init_lora_weights": "gaussian", "bias": "none", "rank_pattern": {}, "modules_to_save": None}, 2.0),
    ],
)
def test_a_plain_lora_is_merged_with_its_scale(
    about: dict[str, Any], scale: float, base: Path, tmp_path: Path
) -> None:
    policy = registry.load(published_adapter(tmp_path / "adapter", base, **about))
    assert isinstance(policy, OpenVLA)
    key = "language_model.model.layers.1.mlp.up_proj.weight"
    before = load_file(base / "model.safetensors")[key]
    after = policy.vlm.language_model.layers[1].mlp.up_proj.weight
    torch.testing.assert_close(after.detach(), before + 2 * scale)


def test_an_adapter_beside_the_weights_of_a_model_is_not_ignored(copy: Path, base: Path) -> None:
    published_adapter(copy, base)
    with pytest.raises(
        RoveError, match="weights of a whole model and a LoRA adapter.*merged already, remove"
    ):
        registry.load(copy)
    (copy / "adapter_config.json").unlink()
    with pytest.raises(RoveError, match="a LoRA adapter that config.json does not mention"):
        registry.load(copy)


def test_files_of_an_adapter_beside_it_go_before_those_of_its_base(base: Path, tmp_path: Path) -> None:
    directory = published_adapter(tmp_path / "adapter", base)
    own = {"libero_spatial": {"action": {"q01": [0.0] * 7, "q99": [4.0] * 7}}}
    shutil.copy(base / "config.json", directory)
    rewrite(directory, norm_stats=own)
    change(directory / "config.json", "rove.unnorm_key", None)
    policy = OpenVLA.from_pretrained(directory)
    assert policy.unnorm_key == "libero_spatial"
    assert policy.unnormalize(torch.zeros(7)).tolist() == [2.0] * 7
    assert policy.tokenizer is not None
    (directory / "adapter_model.safetensors").rename(directory / "adapter_model.bin")
    with pytest.raises(RoveError, match=r"adapter_model\.bin is pickled, which is refused"):
        OpenVLA.from_pretrained(directory)


def test_the_base_of_an_adapter_is_a_whole_model(base: Path, tmp_path: Path) -> None:
    one = published_adapter(tmp_path / "one", base)
    (one / "adapter_config.json").write_text(
        (one / "adapter_config.json").read_text().replace(str(base), str(one))
    )
    with pytest.raises(RoveError, match=r"names .*one as its base, which has no config\.json"):
        registry.load(one)
    with pytest.raises(RoveError, match=r"holds adapters of .*one, which has no config\.json"):
        OpenVLA.from_pretrained(one)


def test_adapters_of_another_rank_than_config_says_are_named(base: Path, tmp_path: Path) -> None:
    OpenVLA.from_pretrained(base, lora=LORA).save_pretrained(tmp_path / "own")
    change(tmp_path / "own" / "config.json", "rove.lora.rank", 9_000)
    with pytest.raises(RoveError, match="has shape .*but config.json says rank 9000"):
        registry.load(tmp_path / "own")


# --- paths ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "runs/vla--image_aug--5000_chkpt",
        "runs/.hidden",
        "runs/name-",
        "runs/a..b",
        "runs/name.git",
        "runs/name/",
        f"runs/{'x' * 100}",
        "/abs/olute",
        "openvla-7b",
        "a/b/c",
    ],
)
def test_a_path_that_is_no_name_on_the_hub_is_not_asked_for_there(name: str, monkeypatch) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    assert not hub.is_hub_name(name)
    with pytest.raises(RoveError, match="is not a checkpoint directory: there is no such folder") as caught:
        registry.load(Path(name) if name.endswith("x") else name)
    assert str(caught.value).startswith(name) and "\n" not in str(caught.value)


def test_what_the_hub_raises_is_named_whatever_it_is(monkeypatch) -> None:
    def fail(*_: Any, **__: Any) -> str:
        raise RuntimeError("proxy")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(RoveError, match=r"^'runs/mine' is no directory here, .*\(RuntimeError\)"):
        registry.load(Path("runs/mine"))


def test_a_directory_that_is_no_checkpoint_names_those_within(base: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "run.json").write_text("{}")
    with pytest.raises(RoveError, match=r"has no config\.json, and the run in it has saved no policy yet"):
        registry.load(run)
    for place in ("best", "sft", "checkpoints/iteration_000002/policy"):
        shutil.copytree(base, run / place)
    listed = ", ".join(f"{run}/{p}" for p in ("sft", "best", "checkpoints/iteration_000002/policy"))
    with pytest.raises(RoveError) as caught:
        registry.load(run)
    assert str(caught.value) == (
        f"{run} is not a checkpoint directory but a run's directory: give a policy in it, {listed}."
    )
    with pytest.raises(RoveError, match=f"give a policy in it, {run}/checkpoints/iteration_000002/policy"):
        registry.load(run / "checkpoints")
    with pytest.raises(RoveError, match="not a checkpoint directory but a file: give the folder"):
        registry.load(run / "best" / "config.json")
    (run / "empty").mkdir()
    with pytest.raises(RoveError, match=r"empty is not a checkpoint directory: it has no config\.json\."):
        registry.load(run / "empty")


# --- anything -------------------------------------------------------------------------------------

VALUES = (None, True, 0, -1, 2.5, float("nan"), 1e308, 10**12, "", "x", [], [None], {}, {"a": 1}, [[1]])


def spots(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths to the values within a JSON value."""
    yield path
    if isinstance(value, dict):
        for key in value:
            yield from spots(value[key], (*path, key))
    elif isinstance(value, list):
        for index in range(min(len(value), 2)):
            yield from spots(value[index], (*path, index))


def put(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    """A copy of a JSON value with what is at `path` replaced."""
    if not path:
        return new
    if isinstance(value, dict):
        return value | {path[0]: put(value[path[0]], path[1:], new)}
    return [put(item, path[1:], new) if index == path[0] else item for index, item in enumerate(value)]


def damage(path: Path, draw: random.Random) -> str:
    """Damage a file: cut it, turn bits, remove it, or replace a value of its JSON."""
    content = bytearray(path.read_bytes())
    how = draw.choice(("cut", "turn", "remove", "replace", "replace", "replace"))
    if how == "cut":
        path.write_bytes(content[: draw.randrange(len(content))])
    elif how == "remove":
        path.unlink()
    elif how == "replace" and path.suffix == ".json":
        value = json.loads(content)
        where, new = draw.choice(list(spots(value))), draw.choice(VALUES)
        path.write_text(json.dumps(put(value, where, new)))
        how += f" {where} by {new!r}"
    else:
        for _ in range(draw.choice((1, 4))):
            content[draw.randrange(min(len(content), 4000))] ^= 1 << draw.randrange(8)
        path.write_bytes(content)
    return f"{path.name}: {how}"


def test_whatever_happens_to_a_file_the_checkpoint_is_read_or_refused(tmp_path: Path) -> None:
    draw = random.Random(0)
    small = replace(
        L1,
        towers=(TowerConfig(kind="siglip", width=16, depth=2, heads=2, patch=8, mlp=24),),
        llama=replace(CONFIG.llama, depth=1),
    )
    build(replace(small, head="discrete", value_head=ValueHeadConfig(hidden=(8,)))).save_pretrained(
        tmp_path / "plain", max_shard_bytes=30_000
    )
    build(small).save_pretrained(tmp_path / "oft")
    adapted = OpenVLA.from_pretrained(tmp_path / "plain", lora=LORA)
    adapted.save_pretrained(tmp_path / "own")
    refused, read = 0, 0
    for _ in range(100):
        kind = draw.choice(("plain", "oft", "own"))
        directory = Path(shutil.copytree(tmp_path / kind, tmp_path / "damaged"))
        what = damage(draw.choice(sorted(directory.iterdir())), draw)
        try:
            policy = registry.load(directory)
            assert isinstance(policy, OpenVLA)
            if policy.tokenizer is not None:
                policy.tokenizer(("pick the red cube", "pick"))
            read += 1
        except RoveError as error:
            refused += "\n" not in str(error)
        except Exception as error:
            raise AssertionError(f"{kind}, {what}: {type(error).__name__}: {error}") from error
        shutil.rmtree(directory)
    assert refused + read == 100 and read > 10
