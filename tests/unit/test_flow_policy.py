"""Flow policies from scratch: they act and evaluate alike, learn, and train what they should."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import Tensor

from rove.config.schema import (
    FlowPolicyConfig,
    FlowSampling,
    FlowSizes,
    LoraConfig,
    PolicyConfig,
    SFTConfig,
    ValueHeadConfig,
)
from rove.errors import RoveError
from rove.policies.base import SamplingNoise
from rove.policies.flow import FlowVLA
from rove.policies.flow.config import FAMILIES, Family
from rove.types import ActionSpec, Observation

C, H, A, P = 3, 4, 5, 6
SPEC = ActionSpec(tuple("abcde"), ("1",) * A, (-1.0,) * A, (1.0,) * A)
WORDS = ("pick", "up", "the", "red", "cube", "push")
STATISTICS = {
    "suite": {
        "action": {"q01": [-1.0] * A, "q99": [1.0] * A},
        "proprio": {"q01": [-1.0] * P, "q99": [1.0] * P},
    }
}
SIZES = FlowSizes(
    layers=2,
    shuffle=2,
    vision_width=16,
    vision_layers=2,
    vision_mlp=32,
    width=32,
    mlp=48,
    expert_mlp=48,
    max_dim=8,
)
ONE = FlowSampling(steps=3)
SAMPLINGS = {
    "sde": ONE,
    "cps": FlowSampling(steps=3, sampler="flow_cps"),
    "last": FlowSampling(steps=3, stochastic="last"),
    "last of cps": FlowSampling(steps=3, sampler="flow_cps", stochastic="last"),
    "all": FlowSampling(steps=3, stochastic="all"),
    "learned": FlowSampling(steps=3, sampler="flow_noise", hidden=(8,)),
}
CRITIC = ValueHeadConfig(level="chunk", hidden=(8,))


def build(
    family: Family = "smolvla",
    sampling: FlowSampling = ONE,
    critic: ValueHeadConfig | None = CRITIC,
    seed: int = 0,
) -> FlowVLA:
    flow = FlowPolicyConfig(sampling=sampling, horizon=H, cameras=2, sizes=SIZES)
    config = PolicyConfig(kind=family, flow=flow, value_head=critic)
    return FlowVLA.build(
        config,
        chunk=C,
        action_spec=SPEC,
        image_size=32,
        vocabulary=WORDS,
        statistics=STATISTICS,
        seed=seed,
    )


def observe(rows: int = 3) -> Observation:
    generator = torch.Generator().manual_seed(3)
    images = torch.randint(0, 256, (rows, 2, 40, 48, 3), dtype=torch.uint8, generator=generator)
    state = torch.rand(rows, P, generator=generator) * 2 - 1
    return Observation(images, ("pick up the red cube", "push", "push the cube")[:rows], state)


def chance(rows: int = 3, seed: int = 5) -> SamplingNoise:
    return SamplingNoise(seed, torch.arange(10, 10 + rows), torch.arange(rows))


def close(a: Tensor | None, b: Tensor | None, atol: float = 1e-4) -> None:
    assert a is not None and b is not None
    torch.testing.assert_close(a, b, atol=atol, rtol=1e-5)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Family:
    return request.param


@pytest.mark.parametrize("kind", SAMPLINGS)
def test_act_and_evaluate_agree(family: Family, kind: str) -> None:
    policy = build(family, SAMPLINGS[kind])
    seen = observe()
    drawn = policy.act(seen, "sample", chance())
    assert drawn.actions.shape == drawn.logprob.shape == (3, C, A)
    assert drawn.sample.shape == (3, *policy.sample_shape) and drawn.sample.dtype == torch.float32
    again = policy.evaluate(seen, drawn.sample)
    close(drawn.logprob, again.logprob)
    close(drawn.value, again.value)
    assert again.entropy.shape == (3, C, A)
    several = policy.act(seen, "sample", chance(), samples=2)
    assert several.actions.shape == (3, 2, C, A)
    close(several.sample[:, 0], drawn.sample)
    close(several.actions[:, 0], drawn.actions)
    assert not torch.allclose(several.sample[:, 1], drawn.sample)
    close(policy.evaluate(seen, several.sample).logprob, several.logprob)
    # Whatever the batch around a row.
    close(policy.evaluate(seen.select([1]), several.sample[1:2]).logprob, several.logprob[1:2])


@pytest.mark.parametrize("kind", SAMPLINGS)
def test_chunks_that_are_compared_differ_by_what_has_a_density_alone(family: Family, kind: str) -> None:
    policy = build(family, SAMPLINGS[kind])
    alone, several = policy.noise(chance()), policy.noise(chance(), 4)
    start, steps, k = (x.unflatten(0, (-1, 4)) for x in several)
    assert torch.equal(start, alone.start[:, None].expand_as(start))
    assert torch.equal(k, alone.k[:, None].expand_as(k))
    assert torch.equal(steps[:, 0], alone.steps)
    assert len(steps.flatten(2).unique(dim=1)[0]) == 4


def test_the_step_that_has_noise_is_any_or_the_last(family: Family) -> None:
    """Of three steps; the last of Flow-CPS has none."""
    drawn = {kind: build(family, SAMPLINGS[kind]).noise(chance(), 64).k for kind in ("last", "last of cps")}
    assert drawn["last"].unique().tolist() == [2] and drawn["last of cps"].unique().tolist() == [1]
    many = SamplingNoise(5, torch.arange(64), torch.arange(64))
    assert build(family, SAMPLINGS["sde"]).noise(many).k.unique().tolist() == [0, 1, 2]
    assert build(family, SAMPLINGS["cps"]).noise(many).k.unique().tolist() == [0, 1]


def test_the_same_noise_draws_the_same_sample(family: Family) -> None:
    policy, seen = build(family), observe()
    first = policy.act(seen, "sample", chance())
    assert torch.equal(first.sample, policy.act(seen, "sample", chance()).sample)
    assert torch.equal(first.sample, build(family).act(seen, "sample", chance()).sample)
    assert not torch.equal(first.sample, policy.act(seen, "sample", chance(seed=6)).sample)
    alone = policy.act(seen.select([2]), "sample", SamplingNoise(5, torch.tensor([12]), torch.tensor([2])))
    close(alone.sample, first.sample[2:])


def test_greedy_follows_the_flow(family: Family) -> None:
    policy, seen = build(family), observe()
    greedy = policy.act(seen, "greedy")
    assert torch.equal(greedy.actions, policy.act(seen, "greedy").actions)
    given = policy.act(seen, "greedy", chance())
    prefix = policy.observe(seen)
    end = policy.denoise(prefix, policy.noise(chance()).start, 3)
    close(given.actions, policy.unnormalize(end)[:, :C].clamp(-1, 1).detach())
    assert not torch.equal(given.actions, greedy.actions)
    with pytest.raises(RoveError, match="needs noise"):
        policy.act(seen, "sample")


def test_a_chain_starts_from_as_much_noise_as_is_asked_for(family: Family, tmp_path: Path) -> None:
    whole = build(family)
    half, none = (build(family, replace(ONE, start=share)) for share in (0.5, 0.0))
    seen, other = observe(), chance(seed=6)
    close(half.noise(chance()).start, 0.5 * whole.noise(chance()).start)
    assert torch.equal(none.act(seen, "greedy", chance()).actions, none.act(seen, "greedy", other).actions)
    assert not torch.equal(none.act(seen, "sample", chance()).sample, none.act(seen, "sample", other).sample)
    # Of a checkpoint it can be set alone.
    whole.save_pretrained(tmp_path / "policy")
    read = FlowVLA.from_pretrained(tmp_path / "policy", sampling={"start": 0.5})
    assert read.sampling == replace(ONE, start=0.5)


def test_one_prefix_serves_all_steps(family: Family) -> None:
    policy, seen = build(family), observe()
    with torch.no_grad():
        start = policy.noise(chance()).start
        cached = policy.denoise(policy.observe(seen), start, 3)
        x = start
        for k in range(3):
            x = (
                x
                - policy.velocity(policy.observe(seen), x, torch.full((3,), 1 - k / 3, dtype=torch.float64))
                / 3
            )
    close(cached, x, atol=1e-5)


@pytest.mark.parametrize("source", ["mean", "first"])
def test_the_critic_reads_what_is_there(family: Family, source: Literal["mean", "first"]) -> None:
    """Padding, which is there for the longer prompts beside, changes nothing."""
    policy, seen = build(family, critic=replace(CRITIC, source=source)), observe()
    assert policy.value_head is not None
    with torch.no_grad():
        policy.value_head.layers[-1].weight.normal_(generator=torch.Generator().manual_seed(1))  # pyright: ignore
    values = policy.value(seen)
    assert values.shape == (3, 1) and len(set(values.flatten().tolist())) == 3
    for row in range(3):
        close(policy.value(seen.select([row])), values[row : row + 1], atol=1e-5)
    prefix = policy.observe(seen)
    assert prefix.output is not None
    for row, there in enumerate(prefix.pad_mask):
        tokens = prefix.output[row, there]
        read = tokens[-1] if source == "first" else tokens.mean(0)
        close(policy.value_head(read[None, None])[0], values[row], atol=1e-5)
    with pytest.raises(RoveError, match="no critic"):
        build(family, critic=None).value(seen)


def trained(policy: FlowVLA) -> set[str]:
    """Names of the parameters that a step of RL moves."""
    policy.zero_grad()
    seen = observe()
    output = policy.evaluate(seen, policy.act(seen, "sample", chance()).sample)
    assert output.value is not None
    (output.logprob.sum() + output.value.sum()).backward()
    return {n for n, p in policy.named_parameters() if p.grad is not None and bool(p.grad.any())}


def test_frozen_parts_get_no_gradient(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = build(family)
    with torch.no_grad():  # the critic's last layer starts at zero and would let nothing through
        assert policy.value_head is not None
        policy.value_head.layers[-1].weight.fill_(0.1)  # pyright: ignore
    vlm = {
        f"model.{n}"
        for n, p in policy.model.named_parameters()
        if any(p is q for q in policy.model.vlm.parameters())
    }
    tower = {n for n in vlm if ".vision_model." in n}
    expert = {n for n, _ in policy.named_parameters() if "expert.l" in n or "gemma_expert" in n}
    calls = 0
    suffix = policy.model.suffix

    def counted(*args: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return suffix(*args)  # pyright: ignore[reportArgumentType]

    everything = trained(policy)
    assert tower and tower <= everything | {n for n in tower if "k_proj.bias" in n}
    policy.freeze = "vision"
    policy.thaw()
    assert not trained(policy) & tower and vlm - tower & everything
    policy.freeze = "vlm"
    policy.thaw()
    moved = trained(policy)
    heads = {n for n in moved if n.startswith("value_head.")}
    assert heads and moved - heads
    assert not moved & vlm and moved & expert
    assert all("expert" in n or "action" in n or "time" in n or "state_proj" in n for n in moved - heads)
    sample = policy.act(observe(), "sample", chance()).sample
    monkeypatch.setattr(policy.model, "suffix", counted)
    policy.evaluate(observe(), sample)
    assert calls == 1


def test_adapters_are_trained_beside_the_projections(family: Family) -> None:
    policy, seen = build(family), observe()
    before = policy.act(seen, "sample", chance())
    policy.adapt(LoraConfig(rank=2), torch.Generator().manual_seed(0))
    close(policy.act(seen, "sample", chance()).sample, before.sample)
    with torch.no_grad():
        for layer in policy.adapters:
            layer.pair[1].fill_(0.05)
    moved = trained(policy)
    assert all("lora" in n or not n.startswith(("model.vlm", "model.pali")) for n in moved)
    assert any("lora" in n for n in moved) and any("action_out_proj" in n for n in moved)
    drawn = policy.act(seen, "sample", chance())
    close(policy.merge().evaluate(seen, drawn.sample).logprob, drawn.logprob, atol=1e-3)


def test_recomputing_activations_changes_nothing(family: Family) -> None:
    policy, seen = build(family), observe()
    drawn = policy.act(seen, "sample", chance())

    def gradient() -> Tensor:
        policy.zero_grad()
        policy.evaluate(seen, drawn.sample).logprob.sum().backward()
        grad = policy.model.action_in_proj.weight.grad
        assert grad is not None
        return grad.clone()

    plain = gradient()
    for module in policy.modules():
        if isinstance(module, torch.nn.ModuleList):
            for block in module:
                block.recompute = True  # pyright: ignore[reportArgumentType]
    close(gradient(), plain, atol=1e-5)


def test_one_batch_can_be_imitated(family: Family) -> None:
    """After enough steps on three demonstrations the policy repeats them."""
    policy, seen = build(family, FlowSampling(steps=10), critic=None), observe()
    generator = torch.Generator().manual_seed(0)
    actions = torch.rand(3, H, A, generator=generator) * 1.6 - 0.8
    mask = torch.ones(3, H, dtype=torch.bool)
    mask[1, 2:] = False
    actions[1, 2:] = 1e6  # what does not count, does not matter
    often = 8
    again, known, counts = seen.select([0, 1, 2] * often), actions.repeat(often, 1, 1), mask.repeat(often, 1)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-2)
    for step in range(100):
        rows = torch.arange(len(again)) + len(again) * step
        loss = policy.imitation_loss(again, known, counts, SFTConfig(), SamplingNoise(0, rows, rows)).loss
        optimizer.zero_grad()
        (loss / (counts.sum() * A)).backward()
        optimizer.step()
    made = policy.act(seen, "greedy").actions
    error = (made - actions[:, :C]).abs()[mask[:, :C]].mean()
    assert error < 0.2  # 0.8 before


def test_losses_count_what_the_mask_says() -> None:
    policy, seen = build(), observe()
    actions = torch.zeros(3, H, A)
    whole = torch.ones(3, H, dtype=torch.bool)
    one = torch.zeros(3, H, dtype=torch.bool)
    one[0, 0] = True
    with torch.no_grad():
        losses = [
            float(policy.imitation_loss(seen, actions, m, SFTConfig(), chance()).loss)
            for m in (whole, one, ~one)
        ]
    assert losses[1] > 0 and losses[0] == pytest.approx(losses[1] + losses[2], rel=1e-4)


def test_a_policy_from_scratch_is_read_again(family: Family, tmp_path: Path) -> None:
    policy, seen = build(family, SAMPLINGS["learned"]), observe()
    policy.save_pretrained(tmp_path)
    copy = FlowVLA.from_pretrained(tmp_path)
    a, b = (one.act(seen, "sample", chance()) for one in (policy, copy))
    assert torch.equal(a.sample, b.sample) and torch.equal(a.actions, b.actions)
    assert torch.equal(a.logprob, b.logprob)
    assert (copy.chunk, copy.horizon, copy.action_spec) == (C, H, SPEC)
    sized = FlowVLA.from_pretrained(tmp_path, chunk=1, horizon=2, sampling=ONE, value_head=None)
    assert sized.act(seen, "sample", chance()).actions.shape == (3, 1, A)


def test_lower_precision_keeps_tail_and_density_in_float32(family: Family, tmp_path: Path) -> None:
    """The noise of a chunk's log-ratio stays below what a clipped ratio hides."""
    build(family).save_pretrained(tmp_path)
    policy, seen = FlowVLA.from_pretrained(tmp_path, dtype=torch.bfloat16), observe()
    assert policy.model.tower.post_layernorm.weight.dtype == torch.bfloat16  # pyright: ignore
    assert policy.model.action_out_proj.weight.dtype == torch.float32
    drawn = policy.act(seen, "sample", chance())
    rows = [policy.evaluate(seen.select([i]), drawn.sample[i : i + 1]).logprob for i in range(3)]
    assert drawn.logprob.dtype == rows[0].dtype == torch.float32
    noise = (torch.cat(rows) - drawn.logprob).sum((1, 2)).abs().max()
    assert noise < 0.1


def test_another_seed_gives_other_weights() -> None:
    first, second = build(seed=0), build(seed=1)
    assert torch.equal(first.model.action_in_proj.weight, build(seed=0).model.action_in_proj.weight)
    assert not torch.equal(first.model.action_in_proj.weight, second.model.action_in_proj.weight)
