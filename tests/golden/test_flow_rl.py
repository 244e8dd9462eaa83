"""Log-probabilities of flow policies against formulas in float64 and the code of others, on golden data."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from rove.config.schema import FlowSampling
from rove.policies.flow import FlowVLA, chain, images
from rove.policies.flow.chain import Step
from rove.policies.flow.heads import NoiseNetwork
from rove.policies.flow.network import Prefix
from rove.policies.flow.vla import Noise

GOLDEN = Path(os.environ.get("ROVE_GOLDEN", Path(__file__).parents[2] / ".." / "shared" / "golden")) / "flow"
pytestmark = pytest.mark.skipif(
    not GOLDEN.is_dir(), reason=f"no golden data at {GOLDEN}; ROVE_GOLDEN says where they are"
)
MODELS = {"smolvla": "smolvla-tiny", "pi0": "pi0-tiny", "pi05": "pi05-tiny"}
K, LEVEL = 4, 0.5


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual.detach(), expected, atol=1e-4, rtol=0)


@pytest.fixture(scope="module")
def arrays() -> dict[str, Tensor]:
    return {key: torch.from_numpy(value) for key, value in np.load(GOLDEN / "flow_rl.npz").items()}


@pytest.mark.parametrize("steps", [4, 10])
@pytest.mark.parametrize("level", [0.5, 0.2])
def test_formulas(arrays: dict[str, Tensor], steps: int, level: float) -> None:
    x, end = arrays["pure_x"], f"{steps}_{level}"
    close(chain.times(steps), arrays[f"pure_times_{steps}"])
    for k in range(steps):
        v = arrays["pure_v"].clone().requires_grad_()
        close(chain.ode(x, v, steps), arrays[f"pure_ode_{steps}"][k])
        mean, std = chain.sde(x, v, k, steps, level)
        close(mean, arrays[f"pure_sde_mean_{end}"][k])
        close(std, arrays[f"pure_sde_std_{end}"][k])
        close(std * steps**0.5, arrays[f"pure_sde_sigma_{end}"][k])
        close(mean + std * arrays["pure_eps"], arrays[f"pure_sde_next_{end}"][k])
        density = chain.logprob(arrays[f"pure_sde_next_{end}"][k], mean, std)
        close(density, arrays[f"pure_sde_logprob_{end}"][k])
        (gradient,) = torch.autograd.grad(density.sum(), v)
        close(gradient, arrays[f"pure_sde_dlogprob_dv_{end}"][k])
        by_rows = chain.sde(x, v, torch.tensor([k, (k + 1) % steps]), steps, level)
        close(by_rows[0][0], mean[0].detach())
        close(by_rows[1][0].flatten()[0], std.detach())
        mean, std = chain.cps(x, v, k, steps, level)
        close(mean, arrays[f"pure_cps_mean_{end}"][k])
        close(std, arrays[f"pure_cps_std_{end}"][k])


class Case:
    """A golden policy, its prefix, and its arrays of this file."""

    def __init__(self, name: str, arrays: dict[str, Tensor], sampling: FlowSampling) -> None:
        self.policy = FlowVLA.from_pretrained(GOLDEN / MODELS[name], sampling=sampling)
        golden = np.load(GOLDEN / MODELS[name] / "golden.npz")
        self.golden = {key: torch.from_numpy(golden[key]) for key in golden}
        self.arrays = {k.removeprefix(f"{name}_"): v for k, v in arrays.items() if k.startswith(f"{name}_")}

    def __getitem__(self, key: str) -> Tensor:
        return self.arrays[key]

    def prefix(self) -> Prefix:
        pixels = [v for k, v in self.golden.items() if k.startswith("pixel_values_")]
        names = ("image_masks", "lang_tokens", "lang_masks", "state_normalized")
        return self.policy.prefix(pixels, *(self.golden[name] for name in names))


@pytest.fixture(scope="module", params=MODELS)
def case(request: pytest.FixtureRequest, arrays: dict[str, Tensor]) -> Case:
    return Case(request.param, arrays, FlowSampling(steps=K, level=LEVEL))


@torch.no_grad()
def test_one_stochastic_step(case: Case) -> None:
    prefix, rows = case.prefix(), torch.arange(3)
    noise = Noise(case.golden["noise"], case["eps"], case["step"])
    drawn = case.policy.draw(prefix, noise)
    points, k = chain.unpack(drawn.sample, 10, 32)
    assert torch.equal(k, case["step"])
    close(points[:, 0], case["chain"][rows, k])
    close(points[:, 1], case["chain"][rows, k + 1])
    close(drawn.logprob, case["logprob"])
    close(drawn.logprob.sum(-1), case["logprob_action"])
    assert torch.allclose(drawn.logprob.sum((1, 2)), case["logprob_chunk"], atol=1e-3)
    close(drawn.actions, case.policy.unnormalize(case["chain"][:, -1])[:, :5].clamp(-1, 1))
    step = case.policy.step(prefix, case["chain"][rows, k], k)
    close(step.mean, case["mean"])
    close(step.std.flatten(), case["std"])


def test_density_gradient_and_ratio(case: Case) -> None:
    rows = torch.arange(3)
    points = torch.stack([case["chain"][rows, case["step"] + i] for i in (0, 1)], dim=1)
    sample = chain.pack(points, case["step"])
    logprob, entropy = case.policy.density(case.prefix(), sample)
    close(logprob, case["logprob"])
    close(entropy, chain.entropy(case["std"])[:, None, None].expand(3, 5, 7))
    weight = case.policy.model.action_out_proj.weight
    (gradient,) = torch.autograd.grad(logprob.sum(), weight)
    # Tolerance by size: gradients of a chunk's sum are as large as hundreds.
    expected = case["grad_action_out_proj_weight"]
    assert (gradient - expected).abs().max() < 1e-4 * expected.abs().max().clamp_min(1)
    with torch.no_grad():
        bias = case.policy.model.action_out_proj.bias
        bias.add_(0.02)
        after, _ = case.policy.density(case.prefix(), sample)
        bias.sub_(0.02)
    close(after, case["logprob_after"])
    ratio = (after - logprob).sum((1, 2)).exp()
    torch.testing.assert_close(ratio.detach(), case["ratio_chunk"], atol=1e-4, rtol=1e-3)


@torch.no_grad()
def test_critic_features(case: Case) -> None:
    prefix = case.prefix()
    close(case.policy.features(prefix), case["critic_vlm_masked"])
    for k in range(K):
        time = torch.full((3,), 1 - k / K)
        hidden = case.policy.model.suffix(prefix, case["chain"][:, k], time)
        close(hidden[:, :5].mean(1), case["critic_expert"][:, k])


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_every_step_stochastic(name: str, arrays: dict[str, Tensor]) -> None:
    case = Case(name, arrays, FlowSampling(steps=K, level=LEVEL, stochastic="all"))
    prefix = case.prefix()
    start, nothing = case.golden["noise"], torch.zeros(3, dtype=torch.int64)
    drawn = case.policy.draw(prefix, Noise(start, case["all_eps"], nothing))
    close(chain.unpack(drawn.sample, 10, 32)[0], case["all_chain"])
    of_start = chain.logprob(start, torch.zeros(()), torch.ones(()))[:, :5, :7]
    joint = case["all_logprob"].sum(1) + of_start
    close(drawn.logprob, joint)
    close(case.policy.density(prefix, drawn.sample)[0], joint)


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_learned_noise(name: str, arrays: dict[str, Tensor]) -> None:
    case = Case(name, arrays, FlowSampling(steps=K, sampler="flow_noise", hidden=(16, 8)))
    network = case.policy.noise_network
    assert isinstance(network, NoiseNetwork)
    for i, layer in enumerate(network.layers):
        layer.load_state_dict({"weight": case[f"noise_w{i}"], "bias": case[f"noise_b{i}"]})
    prefix, start = case.prefix(), case.golden["noise"]
    points, steps = chain.draw_all(lambda x, k: case.policy.step(prefix, x, k), start, case["noise_eps"], K)
    assert isinstance(steps, Step)
    close(points, case["noise_chain"])
    close(steps.std, case["noise_std"])
    close(chain.entropy(steps.std)[:, :, :5, :7], case["noise_entropy"])
    drawn = case.policy.draw(prefix, Noise(start, case["noise_eps"], torch.zeros(3, dtype=torch.int64)))
    close(drawn.logprob, case["noise_logprob_sum"])
    close(drawn.logprob / (K + 1), case["noise_logprob_rlinf"])
    logprob, entropy = case.policy.density(prefix, drawn.sample)
    close(logprob, case["noise_logprob_sum"])
    close(entropy, case["noise_entropy"].sum(1))


def test_resizers() -> None:
    arrays = np.load(GOLDEN / "resize.npz")
    compared = 0
    for key in arrays:
        shape, *words, size = key.split("_")
        if size == "images":
            continue
        pictures = torch.from_numpy(arrays[f"{shape}_images"])
        expected = torch.from_numpy(arrays[key])
        resizer = {"smolvla": "smolvla", "lerobot": "lerobot", "openpi": "openpi"}[words[0]]
        if resizer == "openpi":
            expected = expected.permute(0, 3, 1, 2).float() / 255 * 2 - 1
        tolerance = 2e-3 if expected.dtype == torch.float16 else 1e-4
        made = images.process(pictures, (int(size), int(size)), resizer)  # pyright: ignore[reportArgumentType]
        assert (made - expected.float()).abs().max() < tolerance, key
        compared += 1
    assert compared == 12
