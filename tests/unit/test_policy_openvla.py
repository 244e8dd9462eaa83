"""The OpenVLA policy: act and evaluate agree, whatever the decoding, the temperature or the batch."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._pytree import tree_map_only

from rove.config.schema import LlamaConfig, PolicyConfig, TowerConfig, ValueHeadConfig
from rove.errors import RoveError
from rove.policies import registry
from rove.policies.base import Policy, SamplingNoise
from rove.policies.openvla import OpenVLA, bins
from rove.types import ActionSpec, Observation

C, A = 3, 2
SPEC = ActionSpec(("x", "gripper"), ("m", "1"), (-0.05, -1.0), (0.05, 1.0))
SIGLIP = TowerConfig(kind="siglip", width=16, depth=2, heads=2, patch=8, mlp=24)
DINO = TowerConfig(kind="dinov2", width=16, depth=2, heads=2, patch=8, mlp=32)
CONFIG = PolicyConfig(
    towers=(SIGLIP,),
    llama=LlamaConfig(width=16, depth=2, heads=2, mlp=32),
    temperature=1.7,
    value_head=ValueHeadConfig(hidden=(8,)),
)
TEXTS = ("pick the red cube", "pick red", "put the red cube on the blue plate", "stack")
VOCABULARY = tuple(sorted({word for text in TEXTS for word in text.split()}))
AUTOREGRESSIVE = replace(CONFIG, decoding="autoregressive")
BIDIRECTIONAL = replace(CONFIG, attention="bidirectional")
EVERY_DECODING = pytest.mark.parametrize(
    "config", [CONFIG, BIDIRECTIONAL, AUTOREGRESSIVE], ids=["parallel", "bidirectional", "autoregressive"]
)


def build(config: PolicyConfig, seed: int = 0, statistics: dict | None = None) -> OpenVLA:
    policy = OpenVLA.build(
        config,
        chunk=C,
        action_spec=SPEC,
        image_size=16,
        vocabulary=VOCABULARY,
        statistics=statistics,
        seed=seed,
    )
    if policy.value_head is not None:  # values start at zero, which would hide mistakes
        torch.nn.init.normal_(policy.value_head.layers[-1].weight, generator=torch.Generator().manual_seed(5))
    return policy


@pytest.fixture(scope="module")
def observation() -> Observation:
    generator = torch.Generator().manual_seed(3)
    images = torch.randint(0, 256, (4, 1, 16, 16, 3), dtype=torch.uint8, generator=generator)
    return Observation(images, TEXTS)


def noise(rows: int = 4, seed: int = 7) -> SamplingNoise:
    return SamplingNoise(seed, torch.arange(rows), torch.zeros(rows, dtype=torch.int64))


@EVERY_DECODING
def test_act_and_evaluate_agree(config: PolicyConfig, observation: Observation) -> None:
    policy = build(config)
    chunk = policy.act(observation, "sample", noise())
    output = policy.evaluate(observation, chunk.sample)
    assert chunk.sample.shape == chunk.actions.shape == chunk.logprob.shape == (4, C, A)
    assert output.value is not None and chunk.value is not None
    torch.testing.assert_close(output.logprob, chunk.logprob, atol=1e-5, rtol=0)
    torch.testing.assert_close(output.value, chunk.value, atol=1e-5, rtol=0)
    torch.testing.assert_close(policy.value(observation), chunk.value, atol=1e-5, rtol=0)
    assert chunk.value.std() > 1e-3


@EVERY_DECODING
@pytest.mark.parametrize("samples", [None, 2])
def test_what_is_done_on_the_device_can_be_captured(
    config: PolicyConfig, samples: int | None, observation: Observation
) -> None:
    """It runs on tensors that have shapes and no numbers: a look at one, or a shape that depends on one,
    raises."""
    policy = build(config)
    uniform = noise().uniform((samples or 1) * C * A).unflatten(1, (-1, C * A))
    given = policy._inputs(observation, uniform, multiple=16)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        seen, drawn = tree_map_only(torch.Tensor, mode.from_tensor, given)
        actions, tokens, logprob, value = policy._choose(seen, drawn, samples)
        with pytest.raises(DataDependentOutputException):
            tokens.sum().item()
    assert value is not None and actions.shape == tokens.shape == logprob.shape


@EVERY_DECODING
def test_many_samples_of_a_row_are_as_single_ones(config: PolicyConfig, observation: Observation) -> None:
    policy = build(config)
    one, many = (policy.act(observation, "sample", noise(), samples) for samples in (None, 5))
    for name in ("actions", "sample", "logprob"):
        torch.testing.assert_close(getattr(many, name)[:, 0], getattr(one, name))
    assert many.sample.shape == (4, 5, C, A) and many.value.shape == one.value.shape
    assert (many.sample[:, 1] != many.sample[:, 0]).any()
    together = policy.evaluate(observation, many.sample)
    torch.testing.assert_close(together.logprob, many.logprob, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(together.value, many.value, atol=1e-5, rtol=1e-5)
    for g in range(5):
        alone = policy.evaluate(observation, many.sample[:, g])
        torch.testing.assert_close(together.logprob[:, g], alone.logprob, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(together.entropy[:, g], alone.entropy, atol=1e-5, rtol=1e-5)


def test_smoothing_spreads_a_label_over_its_neighbours() -> None:
    logp = torch.randn(7, 256, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    column = torch.tensor([[0], [3], [100], [101], [200], [254], [255]])
    torch.testing.assert_close(bins.smooth(logp, column, 1e-3), logp.gather(-1, column))
    flat = torch.full((7, 256), -5.0)
    torch.testing.assert_close(bins.smooth(flat, column, 4.0), torch.full((7, 1), -5.0))  # weights sum to 1
    ramp = torch.arange(256.0).expand(7, -1)
    middle = bins.smooth(ramp, column, 2.0)
    torch.testing.assert_close(middle[2:5], column[2:5].float())
    assert middle[0] > 0 and middle[-1] < 255  # nothing lies beyond the ends


@EVERY_DECODING
def test_a_row_does_not_depend_on_its_batch(config: PolicyConfig, observation: Observation) -> None:
    policy = build(config)
    tokens = policy.act(observation, "sample", noise()).sample
    together = policy.evaluate(observation, tokens).logprob
    for i in range(4):
        alone = policy.evaluate(observation.select([i]), tokens[[i]]).logprob
        torch.testing.assert_close(alone, together[[i]], atol=1e-5, rtol=0)


def test_logprob_is_of_the_tempered_softmax_over_action_tokens(observation: Observation) -> None:
    policy = build(CONFIG)
    (ids, mask), pixels = policy._prompt(observation), policy.process_images(observation.images)
    logits = policy.action_logits(ids, mask, pixels)
    chunk = policy.act(observation, "greedy")
    output = policy.evaluate(observation, chunk.sample)
    probability = (logits / CONFIG.temperature).softmax(-1)
    torch.testing.assert_close(output.logprob, probability.amax(-1).log(), atol=1e-5, rtol=0)
    entropy = torch.distributions.Categorical(probability).entropy()
    torch.testing.assert_close(output.entropy, entropy, atol=1e-5, rtol=0)


def test_sampling_follows_the_distribution() -> None:
    policy = build(CONFIG)
    rows = 4000
    observation = Observation(torch.zeros(rows, 1, 16, 16, 3, dtype=torch.uint8), ("stack",) * rows)
    tokens = policy.act(observation, "sample", noise(rows)).sample
    one = observation.select([0])
    (ids, mask), pixels = policy._prompt(one), policy.process_images(one.images)
    probability = (policy.action_logits(ids, mask, pixels)[0] / CONFIG.temperature).softmax(-1)
    first = policy.vlm.vocab_size - 256
    for c in range(C):
        for a in range(A):
            share = torch.bincount(tokens[:, c, a] - first, minlength=256) / rows
            assert (share - probability[c, a]).abs().sum() < 0.25  # total variation, about 2·sqrt(256/N/2π)
    assert (tokens[:, 0, 0] != tokens[:, 1, 1]).any()


def test_noise_decides_and_is_keyed_by_episode(observation: Observation) -> None:
    policy = build(CONFIG)
    first = policy.act(observation, "sample", noise()).sample
    assert torch.equal(first, policy.act(observation, "sample", noise()).sample)
    assert not torch.equal(first, policy.act(observation, "sample", noise(seed=8)).sample)
    flipped = SamplingNoise(7, torch.tensor([3, 2, 1, 0]), torch.zeros(4, dtype=torch.int64))
    reverse = policy.act(observation.select([3, 2, 1, 0]), "sample", flipped).sample
    assert torch.equal(reverse.flip(0), first)
    with pytest.raises(RoveError, match="SamplingNoise"):
        policy.act(observation, "sample")


def test_instruction_and_picture_matter(observation: Observation) -> None:
    policy = build(CONFIG)
    logprob = policy.act(observation, "greedy").logprob
    black = Observation(torch.zeros_like(observation.images), observation.instruction)
    other = Observation(observation.images, ("pick blue", *observation.instruction[1:]))
    assert not torch.allclose(policy.act(black, "greedy").logprob, logprob, atol=1e-3)
    changed = (policy.act(other, "greedy").logprob - logprob).abs().flatten(1).amax(1) > 1e-4
    assert changed.tolist() == [True, False, False, False]


def test_causal_attention_does_not_look_ahead_and_bidirectional_does() -> None:
    """The first placeholder must not notice how many follow, unless attention is bidirectional."""
    observation = Observation(torch.full((1, 1, 16, 16, 3), 90, dtype=torch.uint8), ("stack",))
    for config, same in ((CONFIG, True), (BIDIRECTIONAL, False)):
        policy = build(config)
        (ids, mask), pixels = policy._prompt(observation), policy.process_images(observation.images)
        short = policy.action_logits(ids, mask, pixels)
        policy.chunk = C + 4
        long = policy.action_logits(ids, mask, pixels)
        assert torch.allclose(short[:, 0], long[:, 0], atol=1e-6) is same


def test_critic_options(observation: Observation) -> None:
    for level, width in (("action", C), ("chunk", 1)):
        for source in ("first", "mean"):
            head = ValueHeadConfig(level=level, source=source, hidden=(8, 4))
            policy = build(replace(CONFIG, value_head=head))
            value = policy.act(observation, "greedy").value
            assert value is not None and value.shape == (4, width)
            torch.testing.assert_close(policy.value(observation), value, atol=1e-5, rtol=0)
    with pytest.raises(RoveError, match=r"policy\.value_head"):
        build(replace(CONFIG, value_head=None)).value(observation)


def test_values_start_near_zero_and_detach_stops_the_gradient(observation: Observation) -> None:
    for detach in (False, True):
        head = ValueHeadConfig(hidden=(8,), detach=detach)
        policy = OpenVLA.build(
            replace(CONFIG, value_head=head),
            chunk=C,
            action_spec=SPEC,
            image_size=16,
            vocabulary=VOCABULARY,
            statistics=None,
            seed=0,
        )
        assert policy.value(observation).abs().max() == 0
        torch.nn.init.ones_(policy.value_head.layers[-1].weight)  # pyright: ignore
        policy.value(observation).sum().backward()
        assert (policy.vlm.lm_head.weight.grad is None) and (
            policy.vlm.language_model.norm.weight.grad is None
        ) is detach


@EVERY_DECODING
def test_gradients_reach_every_trainable_weight(config: PolicyConfig, observation: Observation) -> None:
    policy = build(replace(config, towers=(DINO, SIGLIP)))
    tokens = policy.act(observation, "sample", noise()).sample
    output = policy.evaluate(observation, tokens)
    assert output.value is not None
    (output.logprob.sum() + output.value.sum()).backward()
    missing = [n for n, p in policy.named_parameters() if p.requires_grad and p.grad is None]
    assert missing == []
    frozen = [n for n, p in policy.named_parameters() if not p.requires_grad]
    assert frozen and all(part.startswith("vlm.towers.") for part in frozen)


def test_same_seed_same_weights() -> None:
    states = [build(CONFIG, seed).state_dict() for seed in (1, 1, 2)]
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    assert not torch.equal(states[0]["vlm.lm_head.weight"], states[2]["vlm.lm_head.weight"])


def test_neighbouring_bins_start_alike() -> None:
    rows = build(replace(CONFIG, llama=LlamaConfig(width=64, depth=1, heads=2, mlp=64))).vlm.lm_head.weight[
        -256:
    ]
    similarity = torch.nn.functional.cosine_similarity(rows[:-1], rows[1:], dim=1)
    assert similarity.min() > 0.9
    assert torch.nn.functional.cosine_similarity(rows[:128], rows[128:], dim=1).abs().mean() < 0.5


def test_learned_placeholders(observation: Observation, tmp_path) -> None:
    policy = build(replace(CONFIG, placeholders="learned"))
    zero = build(CONFIG).act(observation, "greedy").logprob
    learned = policy.act(observation, "greedy")
    assert not torch.allclose(learned.logprob[:, 1:], zero[:, 1:], atol=1e-2)
    policy.save_pretrained(tmp_path)
    torch.testing.assert_close(registry.load(tmp_path).act(observation, "greedy").logprob, learned.logprob)


STATISTICS = {
    "s": {"action": {"q01": [-0.05, -1], "q99": [0.05, 1]}, "proprio": {"q01": [0, -2, 1], "q99": [1, 2, 3]}}
}


@EVERY_DECODING
@pytest.mark.parametrize("pointed", [1, 2])
def test_the_state_is_read_where_asked_for(
    config: PolicyConfig, pointed: int, observation: Observation, tmp_path
) -> None:
    observation = replace(observation, images=observation.images[:, :1].expand(-1, pointed, -1, -1, -1))
    policy = build(replace(config, proprio=True, pointers=2, pointed=pointed), statistics=STATISTICS)
    state = torch.tensor([[0.2, 0.0, 1.5]]).expand(4, -1)
    here = replace(observation, state=state)
    tokens = policy.act(here, "sample", noise()).sample
    there = policy.evaluate(replace(here, state=state + 0.3), tokens).logprob
    policy.save_pretrained(tmp_path)
    again = OpenVLA.from_pretrained(tmp_path)
    for one in (policy, again):
        seen = one.evaluate(here, tokens).logprob
        torch.testing.assert_close(seen, again.act(here, "sample", noise()).logprob)
        assert (seen - there).abs().max() > 1e-3
    with pytest.raises(RoveError, match="reads 3 numbers of the robot's state"):
        policy.act(observation, "greedy")
    with pytest.raises(RoveError, match=r"policy\.proprio"):
        build(replace(config, proprio=True))


@pytest.mark.parametrize("tower", [SIGLIP, DINO], ids=["siglip", "dinov2"])
def test_film(tower: TowerConfig, observation: Observation, tmp_path) -> None:
    policy = build(replace(CONFIG, towers=(tower,), film=True))
    sampled = policy.act(observation, "sample", noise())
    evaluated = policy.evaluate(observation, sampled.sample)
    torch.testing.assert_close(evaluated.logprob, sampled.logprob, atol=1e-5, rtol=0)
    alone = policy.evaluate(observation.select([1]), sampled.sample[1:2])
    torch.testing.assert_close(alone.logprob, sampled.logprob[1:2], atol=1e-5, rtol=0)
    policy.save_pretrained(tmp_path)
    torch.testing.assert_close(
        registry.load(tmp_path).evaluate(observation, sampled.sample).logprob, evaluated.logprob
    )

    pixels, vlm = policy.process_images(observation.images), policy.vlm
    text = torch.randn(2, 4, CONFIG.llama.width, generator=torch.Generator().manual_seed(1))
    assert not torch.allclose(vlm.vision(pixels, text[0]), vlm.vision(pixels, text[1]), atol=1e-2)
    assert vlm.film is not None
    with torch.no_grad():  # a modulation of nothing leaves the tower as it is
        for parameter in vlm.film.parameters():
            parameter.zero_()
        neutral = vlm.vision(pixels, text[0])
        vlm.film = None
        torch.testing.assert_close(neutral, vlm.vision(pixels))


def test_tokens_and_actions_are_inverse() -> None:
    statistics = {"demo": {"action": {"q01": [-0.02, 0.0], "q99": [0.04, 1.0], "mask": [True, False]}}}
    policy = build(CONFIG, statistics=statistics)
    actions = torch.tensor([[[-0.02, -1.0], [0.01, 0.25], [0.04, 1.0]]])
    tokens = policy.tokenize(actions)
    low, high = policy.vlm.vocab_size - 256, policy.vlm.vocab_size - 1
    # The higher the id, the lower the value; 0.04 in float32 may fall one bin short.
    assert tokens[0, 0, 0] == high and low <= tokens[0, 2, 0] <= low + 1
    back = policy.unnormalize(policy.detokenize(tokens))
    assert ((back - actions) * torch.tensor([1 / 0.06, 0.5])).abs().max() < 1.01 / 255


def test_actions_stay_inside_the_bounds(observation: Observation) -> None:
    statistics = {"demo": {"action": {"q01": [-0.3, -1.0], "q99": [0.3, 1.0]}}}
    policy = build(CONFIG, statistics=statistics)
    x = policy.act(observation, "sample", noise()).actions[..., 0]
    assert x.abs().max() == pytest.approx(0.05)


@pytest.mark.parametrize("towers", [(SIGLIP,), (DINO,), (DINO, SIGLIP)], ids=["siglip", "dinov2", "both"])
def test_checkpoint_round_trip(towers: tuple, observation: Observation, tmp_path) -> None:
    policy = build(replace(CONFIG, towers=towers))
    with torch.no_grad():  # as after training: nothing is at its initial value any more
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05)
    policy.save_pretrained(tmp_path)
    before, after = policy.act(observation, "greedy"), registry.load(tmp_path).act(observation, "greedy")
    assert torch.equal(before.sample, after.sample)
    torch.testing.assert_close(before.logprob, after.logprob, atol=1e-5, rtol=0)
    torch.testing.assert_close(before.value, after.value, atol=1e-5, rtol=0)
    keys = load_file(tmp_path / "model.safetensors").keys()
    assert "vision_backbone.featurizer.blocks.0.attn.qkv.weight" in keys
    assert "language_model.model.layers.1.mlp.up_proj.weight" in keys


def test_checkpoint_overrides(observation: Observation, tmp_path) -> None:
    build(CONFIG).save_pretrained(tmp_path)
    config = replace(AUTOREGRESSIVE, checkpoint=str(tmp_path), value_head=None, temperature=0.5)
    policy = registry.build(
        config, chunk=C, action_spec=SPEC, image_size=16, vocabulary=(), statistics=None, seed=0
    )
    assert isinstance(policy, Policy)
    chunk = policy.act(observation, "sample", noise())
    assert chunk.value is None
    torch.testing.assert_close(
        policy.evaluate(observation, chunk.sample).logprob, chunk.logprob, atol=1e-5, rtol=0
    )
    other = ValueHeadConfig(level="chunk", hidden=(4,))
    fresh = OpenVLA.from_pretrained(tmp_path, value_head=other).value(observation)
    assert fresh.shape == (4, 1) and fresh.abs().max() == 0


def test_damaged_checkpoints_are_named(tmp_path) -> None:
    build(CONFIG).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    whole = load_file(path)
    name = "projector.fc1.weight"
    for state, message in (
        ({k: v for k, v in whole.items() if k != name}, f"missing {name}"),
        (whole | {"projector.fc9.weight": torch.zeros(1)}, r"unexpected projector\.fc9\.weight"),
        (whole | {name: torch.zeros(2, 2)}, rf"{name} has shape \[2, 2\]"),
    ):
        save_file(state, path)
        with pytest.raises(RoveError, match=message):
            OpenVLA.from_pretrained(tmp_path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(RoveError, match="truncated"):
        OpenVLA.from_pretrained(tmp_path)
    path.unlink()
    with pytest.raises(RoveError, match=r"model\.safetensors"):
        OpenVLA.from_pretrained(tmp_path)


def test_foreign_directories(tmp_path, observation: Observation) -> None:
    build(CONFIG).save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(RoveError, match=r"tokenizer\.json"):
        OpenVLA.from_pretrained(tmp_path).act(observation, "greedy")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "opnvla"}))
    with pytest.raises(RoveError, match="Did you mean 'openvla'"):
        registry.load(tmp_path)
    with pytest.raises(RoveError, match="not a checkpoint"):
        registry.load(tmp_path / "absent")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"towers": (replace(SIGLIP, patch=5),)}, "does not divide the image size 16"),
        ({"towers": (DINO, replace(SIGLIP, patch=4))}, "same patch size"),
        ({"towers": (replace(DINO, mlp=24),)}, "multiple of its width"),
        ({"llama": LlamaConfig(width=16, depth=1, heads=3, mlp=8)}, "multiple of 2 x heads"),
        ({"decoding": "autoregressive", "attention": "bidirectional"}, "attention='causal'"),
    ],
)
def test_sizes_that_do_not_fit(change: dict, message: str) -> None:
    with pytest.raises(RoveError, match=message):
        build(replace(CONFIG, **change))


def test_registry_names() -> None:
    assert "openvla" in registry.kinds()
    with pytest.raises(RoveError, match="Did you mean 'openvla'"):
        registry.build(
            replace(CONFIG, kind="openvl"),
            chunk=C,
            action_spec=SPEC,
            image_size=16,
            vocabulary=(),
            statistics=None,
            seed=0,
        )
    with pytest.raises(RoveError, match="already registered"):
        registry.register("openvla", "somewhere.else:Policy")
