"""Adapters: what they change, what is trained, and how they are kept, merged and read from others."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.unit.test_openvla_checkpoints import CONFIG, SPEC, A, C, build, observe

from rove.config.schema import LoraConfig, OptimConfig, ValueHeadConfig
from rove.errors import RoveError
from rove.policies import registry
from rove.policies.openvla import OpenVLA
from rove.training.optim import make_optimizer
from rove.training.parallel import recompute

LORA = LoraConfig(rank=2, alpha=4.0)
CRITIC = ValueHeadConfig(hidden=(8,))


@pytest.fixture
def base(tmp_path: Path) -> Path:
    build().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def load(path: Path | str, **settings) -> OpenVLA:
    return OpenVLA.from_pretrained(path, **({"decoding": "parallel", "chunk": C} | settings))


def train_a_little(policy: OpenVLA) -> None:
    """Move everything that is trained off its start."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


def logits(policy: OpenVLA) -> torch.Tensor:
    seen = observe()
    with torch.no_grad():
        return policy.action_logits(*policy._prompt(seen), policy.process_images(seen.images))


def test_adapters_start_as_no_change_and_only_they_and_the_critic_are_trained(base: Path) -> None:
    plain, policy = load(base), load(base, lora=LORA, value_head=CRITIC)
    torch.testing.assert_close(logits(policy), logits(plain))
    trained = {name for name, p in policy.named_parameters() if p.requires_grad}
    assert all(".lora_" in name or name.startswith("value_head.") for name in trained)
    for part in ("towers.0", "towers.1", "projector", "language_model.layers.1", "lm_head"):
        assert any(f"vlm.{part}." in name for name in trained), part
    unused = ("layer.2.", "layers.2.", ".head.")  # the towers' last blocks, and SigLIP's pooling
    assert not [name for name in trained if "towers" in name and any(part in name for part in unused)]
    chunk = policy.act(observe(), "greedy")
    output = policy.evaluate(observe(), chunk.sample)
    torch.testing.assert_close(output.logprob, chunk.logprob, atol=1e-5, rtol=0)
    assert output.value is not None
    (output.logprob.sum() + output.value.sum()).backward()
    assert {name for name, p in policy.named_parameters() if p.grad is not None} == trained


def test_each_has_a_learning_rate_of_its_own(base: Path) -> None:
    policy = load(base, lora=LORA, value_head=CRITIC)
    optimizer = make_optimizer(policy, OptimConfig(lr=1e-4, value_lr=3e-3), policy.value_head)
    assert policy.value_head is not None
    critic = {id(p) for p in policy.value_head.parameters()}
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert {rate for p, rate in rates.items() if p in critic} == {3e-3}
    assert {rate for p, rate in rates.items() if p not in critic} == {1e-4}
    assert len(rates) == sum(p.requires_grad for p in policy.parameters())


def test_targets(base: Path) -> None:
    policy = load(base, lora=LoraConfig(rank=2, targets=("q_proj", "projector")))
    adapted = {n.split(".lora_A")[0] for n, _ in policy.named_parameters() if ".lora_A." in n}
    assert all(name.endswith("q_proj") or ".projector." in name for name in adapted)
    assert "vlm.language_model.layers.0.self_attn.q_proj" in adapted and "vlm.projector.fc3" in adapted
    with pytest.raises(RoveError, match="no linear layer is 'q_porj'. Did you mean 'q_proj'"):
        load(base, lora=LoraConfig(targets=("q_porj",)))
    with pytest.raises(RoveError, match=r"targets is empty"):
        load(base, lora=LoraConfig(targets=()))


def test_seeds_decide_the_start(base: Path) -> None:
    one, same, other = (load(base, lora=LORA, seed=seed).state_dict() for seed in (1, 1, 2))
    name = "vlm.projector.fc1.lora_A.default.weight"
    assert torch.equal(one[name], same[name]) and not torch.equal(one[name], other[name])


def test_adapters_are_kept_alone_and_go_on_exactly(base: Path, tmp_path: Path) -> None:
    policy = load(base, lora=LORA, value_head=CRITIC)
    train_a_little(policy)
    policy.save_pretrained(tmp_path / "adapters")
    names = {path.name for path in (tmp_path / "adapters").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "rove.safetensors"} <= names
    assert not any(name.startswith("model") for name in names)
    size = sum(path.stat().st_size for path in (tmp_path / "adapters").glob("*.safetensors"))
    trained = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    assert size < 4 * trained + 40_000  # names take the rest
    again = load(tmp_path / "adapters")
    state, other = policy.state_dict(), again.state_dict()
    assert state.keys() == other.keys() and all(torch.equal(state[k], other[k]) for k in state)
    assert again.lora == LORA and again.value_head is not None
    # As a run does it, and a second time from there.
    config = replace(CONFIG, checkpoint=str(tmp_path / "adapters"), lora=LORA, value_head=CRITIC)
    resumed = registry.build(
        config, chunk=C, action_spec=SPEC, image_size=16, vocabulary=(), statistics=None, seed=0
    )
    resumed.save_pretrained(tmp_path / "later")
    assert torch.equal(logits(load(tmp_path / "later")), logits(policy))


def test_base_and_adapters_may_move_together_but_not_part(base: Path, tmp_path: Path) -> None:
    policy = load(base, lora=LORA)
    train_a_little(policy)
    policy.save_pretrained(tmp_path / "adapters")
    expected = logits(policy)
    (tmp_path / "there").mkdir()
    for name in ("base", "adapters"):
        shutil.move(tmp_path / name, tmp_path / "there" / name)
    assert torch.equal(logits(load(tmp_path / "there" / "adapters")), expected)
    shutil.rmtree(tmp_path / "there" / "base")
    with pytest.raises(RoveError, match=r"holds adapters of .*base, which is not to be had"):
        load(tmp_path / "there" / "adapters")


def test_merging_is_exact_and_stands_alone(base: Path, tmp_path: Path) -> None:
    policy = load(base, lora=LORA)
    train_a_little(policy)
    beside, plain = logits(policy), logits(load(base))
    assert (beside - plain).abs().max() > 1e-2
    policy.save_pretrained(tmp_path / "adapters")
    policy.merge().save_pretrained(tmp_path / "merged")
    assert not (tmp_path / "merged" / "adapter_config.json").exists()
    published = load_file(base / "model.safetensors")
    assert load_file(tmp_path / "merged" / "model.safetensors").keys() == published.keys()
    for merged in (policy, load(tmp_path / "merged"), load(tmp_path / "adapters", lora=None)):
        torch.testing.assert_close(logits(merged), beside, atol=1e-4, rtol=1e-4)
        assert merged.lora is None
        assert {n for n, p in merged.named_parameters() if p.requires_grad} == {
            n for n, p in load(base).named_parameters() if p.requires_grad
        }


def test_other_adapters_start_from_the_merged_ones(base: Path, tmp_path: Path) -> None:
    policy = load(base, lora=LORA)
    train_a_little(policy)
    policy.save_pretrained(tmp_path / "adapters")
    more = load(tmp_path / "adapters", lora=LoraConfig(rank=3))
    torch.testing.assert_close(logits(more), logits(policy), atol=1e-4, rtol=1e-4)
    train_a_little(more)
    more.save_pretrained(tmp_path / "more")  # no checkpoint holds its weights, so this one has to
    assert (tmp_path / "more" / "model.safetensors").is_file()
    shutil.rmtree(base)
    shutil.rmtree(tmp_path / "adapters")
    again = load(tmp_path / "more")
    assert torch.equal(logits(again), logits(more)) and again.lora == LoraConfig(rank=3)
    again.save_pretrained(tmp_path / "once_more")
    assert (tmp_path / "once_more" / "model.safetensors").is_file()


def test_the_base_is_not_overwritten(base: Path) -> None:
    with pytest.raises(RoveError, match="save them elsewhere"):
        load(base, lora=LORA).save_pretrained(base)


def test_damaged_adapters_are_named(base: Path, tmp_path: Path) -> None:
    load(base, lora=LORA).save_pretrained(tmp_path / "adapters")
    path = tmp_path / "adapters" / "adapter_model.safetensors"
    state = load_file(path)
    name = next(iter(state))
    for broken, message in (
        ({k: v for k, v in state.items() if k != name}, "missing"),
        (state | {"other": torch.zeros(1)}, "unexpected other"),
        (state | {name: torch.zeros(3, 3)}, r"has shape \[3, 3\]"),
    ):
        save_file(broken, path)
        with pytest.raises(RoveError, match=message):
            load(tmp_path / "adapters")


def test_adapters_of_the_published_layout_are_merged(base: Path, tmp_path: Path) -> None:
    """As `peft` writes them for the reference class, where query, key and value are one matrix."""
    directory = tmp_path / "theirs"
    directory.mkdir()
    weights = load_file(base / "model.safetensors")
    keys = (
        "vision_backbone.featurizer.blocks.0.attn.qkv.weight",
        "language_model.model.layers.1.mlp.up_proj.weight",
        "language_model.lm_head.weight",
    )
    generator = torch.Generator().manual_seed(4)
    state, expected = {}, dict(weights)
    for key in keys:
        a = torch.randn(2, weights[key].shape[1], generator=generator)
        b = torch.randn(weights[key].shape[0], 2, generator=generator)
        stem = f"base_model.model.{key.removesuffix('.weight')}"
        state |= {f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b}
        expected[key] = weights[key] + 2.0 * b @ a
    save_file(state, directory / "adapter_model.safetensors")
    about = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "bias": "none"}
    about |= {"base_model_name_or_path": str(base)}
    (directory / "adapter_config.json").write_text(json.dumps(about))
    load(directory).save_pretrained(tmp_path / "merged")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    for key, value in expected.items():
        torch.testing.assert_close(merged[key], value, msg=key)
    assert isinstance(registry.load(directory), OpenVLA)
    theirs = json.loads((base / "config.json").read_text())
    del theirs["rove"]
    (directory / "config.json").write_text(json.dumps(theirs))  # some publish it, too
    assert isinstance(registry.load(directory), OpenVLA)
    (directory / "config.json").unlink()
    (directory / "adapter_config.json").write_text(json.dumps(about | {"use_dora": True}))
    with pytest.raises(RoveError, match="use_dora; only a plain LoRA"):
        load(directory)
    (directory / "adapter_config.json").write_text(json.dumps(about))
    save_file(
        {k.replace("lm_head", "lm_haed"): v for k, v in state.items()},
        directory / "adapter_model.safetensors",
    )
    with pytest.raises(RoveError, match="adapts language_model.lm_haed.weight"):
        load(directory)


@pytest.mark.parametrize("decoding", ["parallel", "autoregressive"])
def test_half_precision_weights_with_adapters(base: Path, decoding) -> None:
    policy = load(
        base, lora=LORA, decoding=decoding, dtype=torch.bfloat16, value_head=replace(CRITIC, source="first")
    )
    dtypes = {p.dtype for n, p in policy.named_parameters() if p.requires_grad}
    assert dtypes == {torch.float32}
    train_a_little(policy)
    seen = observe()
    chunk = policy.act(seen, "greedy")
    output = policy.evaluate(seen, chunk.sample)
    assert chunk.sample.shape == (2, C, A)
    # Eight bits: one pass and one with a cache round differently.
    torch.testing.assert_close(output.logprob, chunk.logprob, atol=0.15, rtol=0)
    output.logprob.sum().backward()
    gradients = [p.grad for n, p in policy.named_parameters() if ".lora_B." in n and "language_model" in n]
    assert gradients and all(g is not None and torch.isfinite(g).all() for g in gradients)


def test_gradient_checkpointing_changes_memory_only(base: Path) -> None:
    gradients = []
    for frugal in (False, True):
        policy = load(base, lora=LORA)
        if frugal:
            recompute(policy)
        train_a_little(policy)
        tokens = policy.act(observe(), "greedy").sample
        policy.evaluate(observe(), tokens).logprob.sum().backward()
        gradients.append({n: p.grad for n, p in policy.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and gradients[0]
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name])
