"""Checkpoint directories: the published layout, shards, OpenVLA-OFT's parts, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rove.config.schema import LlamaConfig, PolicyConfig, TowerConfig, ValueHeadConfig
from rove.errors import RoveError
from rove.policies import hub, registry
from rove.policies.openvla import OpenVLA
from rove.policies.openvla.config import Checkpoint
from rove.policies.openvla.settings import Settings
from rove.policies.openvla.weights import to_reference
from rove.types import ActionSpec, Observation

C, A = 2, 7
SPEC = ActionSpec(tuple("abcdefg"), ("1",) * A, (-1.0,) * A, (1.0,) * A)
CONFIG = PolicyConfig(
    towers=(
        TowerConfig(kind="dinov2", width=16, depth=3, heads=2, patch=8, mlp=64),
        TowerConfig(kind="siglip", width=16, depth=3, heads=2, patch=8, mlp=40),
    ),
    llama=LlamaConfig(width=32, depth=2, heads=2, mlp=48),
)
STATISTICS = {
    "suite": {
        "action": {"q01": [-1.0] * A, "q99": [1.0] * A},
        "proprio": {"q01": [-1.0] * 8, "q99": [1.0] * 8},
    }
}


def build(config: PolicyConfig = CONFIG, seed: int = 0) -> OpenVLA:
    return OpenVLA.build(
        config,
        chunk=C,
        action_spec=SPEC,
        image_size=16,
        vocabulary=("pick", "the", "red", "cube"),
        statistics=STATISTICS,
        seed=seed,
    )


def observe(rows: int = 2, views: int = 1, state: bool = False) -> Observation:
    generator = torch.Generator().manual_seed(3)
    images = torch.randint(0, 256, (rows, views, 16, 16, 3), dtype=torch.uint8, generator=generator)
    robot = torch.rand(rows, 8, generator=generator) if state else None
    return Observation(images, ("pick the red cube", "pick")[:rows], robot)


def rewrite(directory: Path, **keys: object) -> None:
    """Change keys of config.json; None takes one away."""
    path = directory / "config.json"
    config = json.loads(path.read_text()) | keys
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


# --- the published 7B checkpoint, by shape --------------------------------------------------------


def published_keys() -> set[str]:
    """What model.safetensors.index.json of `openvla/openvla-7b` lists."""

    def ends(*stems: str) -> set[str]:
        return {f"{stem}.{end}" for stem in stems for end in ("weight", "bias")}

    def tower(prefix: str, depth: int, scaled: bool) -> set[str]:
        keys = {f"{prefix}.pos_embed"} | ends(f"{prefix}.patch_embed.proj", f"{prefix}.norm")
        for i in range(depth):
            block = f"{prefix}.blocks.{i}"
            parts = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
            keys |= ends(*(f"{block}.{part}" for part in parts))
            keys |= {f"{block}.ls{n}.scale_factor" for n in (1, 2)} if scaled else set()
        return keys

    dino, siglip = "vision_backbone.featurizer", "vision_backbone.fused_featurizer"
    keys = tower(dino, 24, True) | {f"{dino}.cls_token", f"{dino}.reg_token"} | tower(siglip, 27, False)
    pool = ("q", "kv", "proj", "norm", "mlp.fc1", "mlp.fc2")
    keys |= {f"{siglip}.attn_pool.latent"} | ends(*(f"{siglip}.attn_pool.{part}" for part in pool))
    keys |= ends("projector.fc1", "projector.fc2", "projector.fc3")
    for i in range(32):
        layer = f"language_model.model.layers.{i}"
        names = [f"self_attn.{name}_proj" for name in "qkvo"] + [
            f"mlp.{n}_proj" for n in ("gate", "up", "down")
        ]
        names += ["input_layernorm", "post_attention_layernorm"]
        keys |= {f"{layer}.{name}.weight" for name in names}
    whole = ("model.embed_tokens", "model.norm", "lm_head")
    return keys | {f"language_model.{name}.weight" for name in whole}


def test_the_published_7b_checkpoint_fits_by_key_shape_and_count() -> None:
    """Its index gives 15,082,474,368 bytes of bfloat16."""
    settings = Settings(
        checkpoint=Checkpoint({"model_type": "openvla"}, {}),
        decoding="autoregressive",
        chunk=1,
        num_images=1,
        action_spec=SPEC,
        statistics=STATISTICS,
    )
    policy = OpenVLA(settings)
    assert all(parameter.is_meta for parameter in policy.parameters())
    state = to_reference(policy.state_dict(), policy.checkpoint.towers)
    assert state.keys() == published_keys()
    assert 2 * sum(value.numel() for value in state.values()) == 15_082_474_368
    for key, shape in {
        "vision_backbone.featurizer.pos_embed": (1, 256, 1024),
        "vision_backbone.featurizer.reg_token": (1, 4, 1024),
        "vision_backbone.featurizer.blocks.23.attn.qkv.weight": (3072, 1024),
        "vision_backbone.fused_featurizer.pos_embed": (1, 256, 1152),
        "vision_backbone.fused_featurizer.blocks.26.mlp.fc1.weight": (4304, 1152),
        "vision_backbone.fused_featurizer.attn_pool.kv.weight": (2304, 1152),
        "projector.fc1.weight": (8704, 2176),
        "language_model.model.layers.31.mlp.down_proj.weight": (4096, 11008),
        "language_model.model.embed_tokens.weight": (32064, 4096),
        "language_model.lm_head.weight": (32064, 4096),
    }.items():
        assert tuple(state[key].shape) == shape, key


# --- shards ---------------------------------------------------------------------------------------


def sharded(directory: Path) -> OpenVLA:
    policy = build()
    policy.save_pretrained(directory, max_shard_bytes=40_000)
    return policy


def test_a_sharded_checkpoint_survives(tmp_path: Path) -> None:
    policy = sharded(tmp_path)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    names = sorted(set(index["weight_map"].values()))
    assert len(names) > 2 and names[0] == f"model-00001-of-{len(names):05}.safetensors"
    tensors = {k: v for name in names for k, v in load_file(tmp_path / name).items()}
    assert tensors.keys() == index["weight_map"].keys()
    assert index["metadata"]["total_size"] == sum(v.numel() * 4 for v in tensors.values())
    again = OpenVLA.from_pretrained(tmp_path)
    assert_same(policy.state_dict(), again.state_dict())
    again.save_pretrained(tmp_path)  # in one file, in place of the shards
    assert not (tmp_path / "model.safetensors.index.json").exists() and not list(tmp_path.glob("model-*"))
    assert_same(policy.state_dict(), OpenVLA.from_pretrained(tmp_path).state_dict())


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for key, value in one.items():
        # The class token and its position are stored as their sum, the mask token not at all.
        if key.endswith(("cls_token", "position_embeddings", "mask_token")):
            continue
        assert torch.equal(value, other[key]), key


def test_damaged_shards_are_named(tmp_path: Path) -> None:
    sharded(tmp_path)
    second = sorted(tmp_path.glob("model-*"))[1]
    whole = second.read_bytes()
    second.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(RoveError, match=rf"{second.name} is truncated"):
        OpenVLA.from_pretrained(tmp_path)
    second.unlink()
    with pytest.raises(RoveError, match=rf"lacks the weights file {second.name}"):
        OpenVLA.from_pretrained(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    listed = json.loads(index.read_text())
    for bad, message in (("../elsewhere.safetensors", "elsewhere"), ("model.bin", r"only \.safetensors")):
        index.write_text(json.dumps(listed | {"weight_map": {"a": bad}}))
        with pytest.raises(RoveError, match=message):
            OpenVLA.from_pretrained(tmp_path)
    index.write_text("{")
    with pytest.raises(RoveError, match="is damaged"):
        OpenVLA.from_pretrained(tmp_path)


def test_a_key_that_is_stored_twice_is_named(tmp_path: Path) -> None:
    sharded(tmp_path)
    first, second = sorted(tmp_path.glob("model-*"))[:2]
    state, key = load_file(second), next(iter(load_file(first)))
    save_file(state | {key: load_file(first)[key]}, second)
    with pytest.raises(RoveError, match=f"{key} is stored twice"):
        OpenVLA.from_pretrained(tmp_path)


# --- tolerance ------------------------------------------------------------------------------------


def test_both_names_of_layer_scale_are_read(tmp_path: Path) -> None:
    policy = build()
    policy.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    state = load_file(path)
    renamed = {key.replace(".scale_factor", ".gamma"): value for key, value in state.items()}
    assert renamed.keys() != state.keys()
    save_file(renamed, path)
    assert_same(policy.state_dict(), OpenVLA.from_pretrained(tmp_path).state_dict())


def test_statistics_come_from_the_file_and_the_key_may_wait(tmp_path: Path) -> None:
    build().save_pretrained(tmp_path)
    rewrite(tmp_path, rove=None, pad_to_multiple_of=0)
    one = {"action": {"q01": [-0.5] * A, "q99": [0.5] * A, "mask": [True] * 6 + [False]}}
    rewrite(tmp_path, norm_stats={"old": one})
    file = tmp_path / "dataset_statistics.json"
    file.write_text(json.dumps({"libero_spatial_no_noops": one, "bridge_orig": one}))
    tokens = torch.full((1, 1, A), 31, dtype=torch.int64)
    for key in ("libero_spatial", "libero_spatial_no_noops"):
        policy = OpenVLA.from_pretrained(tmp_path, unnorm_key=key)
        assert policy.unnorm_key == "libero_spatial_no_noops"
    with pytest.raises(RoveError, match="unnorm_key 'old'"):
        OpenVLA.from_pretrained(tmp_path, unnorm_key="old")
    undecided = OpenVLA.from_pretrained(tmp_path)
    with pytest.raises(RoveError, match="set unnorm_key to one of bridge_orig, libero_spatial_no_noops"):
        undecided.unnormalize(undecided.detokenize(tokens))
    file.unlink()
    assert OpenVLA.from_pretrained(tmp_path).unnorm_key == "old"
    rewrite(tmp_path, norm_stats={})
    with pytest.raises(RoveError, match=r"dataset_statistics\.json"):
        OpenVLA.from_pretrained(tmp_path).unnormalize(torch.zeros(1, 1, A))


def test_a_data_set_brings_its_convention(tmp_path: Path) -> None:
    build().save_pretrained(tmp_path)
    stats = {key: {"action": {"q01": [-0.5] * A, "q99": [0.5] * A}} for key in ("libero_10", "bridge_orig")}
    (tmp_path / "dataset_statistics.json").write_text(json.dumps(stats))
    rewrite(tmp_path, rove=None)
    libero = OpenVLA.from_pretrained(tmp_path, unnorm_key="libero_10").action_spec
    bridge = OpenVLA.from_pretrained(tmp_path, unnorm_key="bridge_orig").action_spec
    assert libero.units[:6] == ("1",) * 6 and bridge.units[:6] == ("m",) * 3 + ("rad",) * 3
    assert {(s.low[6], s.high[6], s.gripper) for s in (libero, bridge)} == {(0.0, 1.0, "open_high")}


def test_the_embeddings_are_never_tied(tmp_path: Path) -> None:
    """Published files say so of the whole model by default; what counts is the language model's own word."""
    build().save_pretrained(tmp_path)
    rewrite(tmp_path, tie_word_embeddings=True)
    vlm = OpenVLA.from_pretrained(tmp_path).vlm
    assert not torch.equal(vlm.lm_head.weight, vlm.language_model.embed_tokens.weight)
    text = json.loads((tmp_path / "config.json").read_text())["text_config"]
    rewrite(tmp_path, text_config=text | {"tie_word_embeddings": True})
    with pytest.raises(RoveError, match="text_config: tie_word_embeddings = True: Rove computes with false"):
        OpenVLA.from_pretrained(tmp_path)


def test_weights_are_converted_but_not_the_critic(tmp_path: Path) -> None:
    config = replace(CONFIG, value_head=ValueHeadConfig(hidden=(8,)))
    build(config).save_pretrained(tmp_path)
    policy = OpenVLA.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in policy.vlm.parameters()} == {torch.bfloat16}
    assert policy.value_head is not None and {p.dtype for p in policy.value_head.parameters()} == {
        torch.float32
    }
    chunk = policy.act(observe(), "greedy")
    again = policy.evaluate(observe(), chunk.sample)
    torch.testing.assert_close(again.logprob, chunk.logprob, atol=1e-5, rtol=0)
    assert chunk.value is not None and torch.isfinite(chunk.value).all()


def test_damaged_json_is_named(tmp_path: Path) -> None:
    build().save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text("[]")
    with pytest.raises(RoveError, match=r"preprocessor_config\.json holds a list"):
        OpenVLA.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{not json")
    with pytest.raises(RoveError, match=r"config\.json is damaged"):
        OpenVLA.from_pretrained(tmp_path)


# --- parts of OpenVLA-OFT -------------------------------------------------------------------------

L1 = replace(CONFIG, head="l1", proprio=True, attention="bidirectional")


def published_oft(directory: Path, module: str = "module.") -> OpenVLA:
    """A directory as OpenVLA-OFT leaves it: parts in `.pt` files, nothing of Rove's in config.json."""
    policy = build(L1)
    policy.save_pretrained(directory)
    for part in ("action_head", "proprio_projector"):
        state = torch.load(directory / f"{part}--latest_checkpoint.pt", weights_only=True)
        (directory / f"{part}--latest_checkpoint.pt").unlink()
        torch.save({module + k: v for k, v in state.items()}, directory / f"{part}--150000_checkpoint.pt")
    prompt = {"prompt": "{instruction}", "prompt_end": 2}
    rewrite(directory, rove=prompt)
    return policy


@pytest.mark.parametrize("module", ["module.", ""])
def test_oft_parts_are_found(module: str, tmp_path: Path) -> None:
    policy = published_oft(tmp_path, module)
    again = OpenVLA.from_pretrained(tmp_path, chunk=C, action_spec=SPEC)
    assert (again.decoding, again.attention, again.num_images) == ("parallel", "bidirectional", 2)
    assert again.action_head is not None and again.state_normalizer is not None
    assert_same(policy.state_dict(), again.state_dict())
    seen = observe(views=2, state=True)
    assert torch.equal(policy.act(seen, "greedy").actions, again.act(seen, "greedy").actions)
    keys = torch.load(next(tmp_path.glob("action_head--*")), weights_only=True).keys()
    assert f"{module}model.mlp_resnet_blocks.1.ffn.1.weight" in keys


def test_the_l1_head_reads_all_states_of_an_action(tmp_path: Path) -> None:
    policy = build(L1)
    hidden = torch.randn(3, C * A, CONFIG.llama.width, generator=torch.Generator().manual_seed(1))
    assert policy.action_head is not None
    together = policy.action_head(hidden)
    assert together.shape == (3, C, A)
    hidden[:, A:] += 1.0  # the second action's
    assert torch.equal(policy.action_head(hidden)[:, 0], together[:, 0])


def test_the_l1_head_cannot_be_trained_by_rl(tmp_path: Path) -> None:
    policy = build(L1)
    seen = observe(state=True)
    chunk = policy.act(seen, "greedy")
    expected = policy.unnormalize(policy.regress(seen).detach()).float().clamp(-1, 1)
    torch.testing.assert_close(chunk.actions, expected)
    noise = None
    for call in (lambda: policy.act(seen, "sample", noise), lambda: policy.evaluate(seen, chunk.sample)):
        with pytest.raises(RoveError, match="no likelihood"):
            call()
    with pytest.raises(RoveError, match="no likelihood"):
        build(replace(L1, value_head=ValueHeadConfig()))
    published_oft(tmp_path)
    with pytest.raises(RoveError, match="trained with an L1 head"):
        OpenVLA.from_pretrained(tmp_path, head="discrete")


def test_refused_parts(tmp_path: Path) -> None:
    published_oft(tmp_path)
    head = next(tmp_path.glob("action_head--*"))
    whole = head.read_bytes()
    (tmp_path / "action_head--50_checkpoint.pt").write_bytes(whole)
    with pytest.raises(RoveError, match="several files of one part"):
        OpenVLA.from_pretrained(tmp_path)
    (tmp_path / "action_head--50_checkpoint.pt").unlink()
    head.write_bytes(whole[:500])
    with pytest.raises(RoveError, match=f"{head.name} is truncated"):
        OpenVLA.from_pretrained(tmp_path)
    torch.save([1, 2], head)
    with pytest.raises(RoveError, match=f"{head.name} is a list"):
        OpenVLA.from_pretrained(tmp_path)
    torch.save({"model.fc1.weight": torch.zeros(1)}, head)
    with pytest.raises(RoveError, match=r"missing action_head\.model"):
        OpenVLA.from_pretrained(tmp_path, action_spec=SPEC)
    head.write_bytes(whole)
    torch.save({}, tmp_path / "vision_backbone--5_checkpoint.pt")
    with pytest.raises(RoveError, match="FiLM, which Rove does not read"):
        OpenVLA.from_pretrained(tmp_path)


class Trap:
    """Pickled, it would write a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (Path.write_text, (self.path, "executed"))


def test_pickled_code_is_refused_and_not_executed(tmp_path: Path) -> None:
    directory, proof = tmp_path / "oft", tmp_path / "proof"
    published_oft(directory)
    head = next(directory.glob("action_head--*"))
    torch.save({"model.fc1.weight": Trap(proof)}, head)
    with pytest.raises(RoveError, match=f"{head.name} holds pickled code"):
        OpenVLA.from_pretrained(directory)
    (directory / "model.safetensors").unlink()
    torch.save(Trap(proof), directory / "pytorch_model.bin")
    head.unlink()
    with pytest.raises(RoveError, match=r"pytorch_model\.bin is pickled"):
        OpenVLA.from_pretrained(directory)
    assert not proof.exists()


# --- the hub --------------------------------------------------------------------------------------


def test_a_name_on_the_hub_is_fetched_without_its_code(tmp_path: Path, monkeypatch) -> None:
    policy = build()
    policy.save_pretrained(tmp_path)
    asked = []

    def download(name: str, **settings) -> str:
        asked.append((name, settings["allow_patterns"]))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert_same(policy.state_dict(), OpenVLA.from_pretrained("owner/name").state_dict())
    assert isinstance(registry.load("owner/name"), OpenVLA)
    assert asked[0][0] == "owner/name" and not any(".py" in pattern for pattern in asked[0][1])


def test_what_cannot_be_had_is_named(monkeypatch, tmp_path: Path) -> None:
    def unreachable(name: str, **settings) -> str:
        raise ConnectionError

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    with pytest.raises(RoveError, match="'owner/name' is no directory here, and could not be had"):
        OpenVLA.from_pretrained("owner/name")
    with pytest.raises(RoveError, match="is not a checkpoint directory"):
        OpenVLA.from_pretrained(tmp_path / "nowhere")
    assert hub.is_hub_name("openvla/openvla-7b") and not hub.is_hub_name("./runs/demo")
    assert not hub.is_hub_name("runs/demo/sft")


# --- memory ---------------------------------------------------------------------------------------

_PEAK = """
import resource, sys, threading, time
import torch
from rove.policies.openvla import OpenVLA
OpenVLA.from_pretrained(sys.argv[1])  # what is imported and compiled on the way does not count

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()

before, peak, done = resident(), 0, False

def watch():
    global peak
    while not done:
        peak = max(peak, resident())
        time.sleep(0.002)

thread = threading.Thread(target=watch)
thread.start()
policy = OpenVLA.from_pretrained(sys.argv[2], dtype=torch.float32)
done = True
thread.join()
weights = sum(p.numel() * p.element_size() for p in policy.parameters())
print(weights, peak - before)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_loading_takes_little_more_memory_than_the_weights(tmp_path: Path) -> None:
    """Converted from float16, where two copies would be 1.5 times the weights."""
    build().save_pretrained(tmp_path / "small")
    big = build(replace(CONFIG, llama=LlamaConfig(width=512, depth=12, heads=4, mlp=2048)))
    big.half().save_pretrained(tmp_path / "big", max_shard_bytes=30_000_000)
    words = [sys.executable, "-c", _PEAK, str(tmp_path / "small"), str(tmp_path / "big")]
    output = subprocess.run(words, check=True, capture_output=True, text=True).stdout
    weights, peak = map(int, output.split())
    assert weights > 150_000_000
    assert peak < 1.25 * weights
