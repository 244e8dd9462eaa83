"""SmolVLA, π0 and π0.5 against the answers of their reference implementations, on tiny random weights."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from rove.policies.flow import FlowVLA
from rove.policies.flow.network import Prefix

GOLDEN = Path(os.environ.get("ROVE_GOLDEN", Path(__file__).parents[2] / ".." / "shared" / "golden")) / "flow"
pytestmark = pytest.mark.skipif(
    not GOLDEN.is_dir(), reason=f"no golden data at {GOLDEN}; ROVE_GOLDEN says where they are"
)
MODELS = ("smolvla-tiny", "smolvla-tiny-cross", "pi0-tiny", "pi05-tiny")


def close(actual: Tensor, expected: np.ndarray | Tensor) -> None:
    torch.testing.assert_close(actual.detach(), torch.as_tensor(expected), atol=1e-4, rtol=0)


class Case:
    """A golden checkpoint, its arrays as tensors, and the policy that was read from it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.policy = FlowVLA.from_pretrained(GOLDEN / name)
        self.arrays = {k: torch.from_numpy(v) for k, v in np.load(GOLDEN / name / "golden.npz").items()}
        self.pixels = [v for k, v in self.arrays.items() if k.startswith("pixel_values_")]

    def __getitem__(self, key: str) -> Tensor:
        return self.arrays[key]

    def prefix(self) -> Prefix:
        names = ("image_masks", "lang_tokens", "lang_masks", "state_normalized")
        return self.policy.prefix(self.pixels, *(self[name] for name in names))


@pytest.fixture(scope="module", params=MODELS)
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


def test_inputs(case: Case) -> None:
    images = [case["images_0"], case["images_1"]]
    for made, expected in zip(case.policy.process_images(images), case.pixels, strict=True):
        close(made, expected)
    close(case.policy.normalize_state(case["state"]), case["state_normalized"])
    target = case.policy.normalize_actions(case["target_actions"])
    close(target[..., :7], case["target_normalized"])
    assert target.shape == (3, 10, 32) and not target[..., 7:].any()


@torch.no_grad()
def test_the_prefix(case: Case) -> None:
    for i, pixels in enumerate(case.pixels):
        close(case.policy.model.embed_images(pixels), case[f"image_embeddings_{i}"])
    names = ("image_masks", "lang_tokens", "lang_masks", "state_normalized")
    embedded = case.policy.model.embed_prefix(case.pixels, *(case[name] for name in names))
    close(embedded.embeddings, case["prefix_embeddings"])
    assert torch.equal(embedded.pad_mask, case["prefix_pad_mask"])
    assert torch.equal(embedded.starts.expand(3, -1), case["prefix_att_mask"])
    there = case["prefix_pad_mask"]
    assert torch.equal((embedded.pad_mask.cumsum(1) - 1)[there], case["prefix_position_ids"][there])
    prefix = case.prefix()
    assert prefix.output is not None
    close(prefix.output[there], case["prefix_output"][there])
    for i, (keys, values) in enumerate(zip(prefix.keys, prefix.values, strict=True)):
        for made, expected in ((keys, case["cache_keys"][i]), (values, case["cache_values"][i])):
            close(made.transpose(1, 2)[there], expected.transpose(1, 2)[there])


@torch.no_grad()
def test_the_expert(case: Case) -> None:
    prefix, x_t, time = case.prefix(), case["x_t"], case["time"]
    embedded, condition, _ = case.policy.model.embed_suffix(prefix.state, x_t, time)
    close(embedded, case["suffix_embeddings"])
    if condition is not None:
        close(condition, case["adarms_cond"])
    close(case.policy.model.suffix(prefix, x_t, time), case["suffix_output"])
    close(case.policy.velocity(prefix, x_t, time), case["velocity"])


@torch.no_grad()
def test_samples(case: Case) -> None:
    from rove.policies.flow import chain

    prefix = case.prefix()
    close(case.policy.denoise(prefix, case["noise"], 4), case["euler_4"])
    points = chain.integrate(lambda x, t: case.policy.velocity(prefix, x, t), case["noise"], 10)
    close(points, case["chain_10"])
    close(points[:, -1], case["euler_10"])
    close(case.policy.unnormalize(points[:, -1]), case["actions"])


def test_loss_and_gradients(case: Case) -> None:
    target = torch.nn.functional.pad(case["target_normalized"], (0, 25))
    elements = case.policy.loss_elements(case.prefix(), target, case["noise"], case["time"])
    close(elements, case["loss_elements"])
    real = elements[..., :7]
    close(real.mean(), case["loss"])
    if "loss_all_dims" in case.arrays:
        close(elements.mean(), case["loss_all_dims"])
    else:
        keep = ~case["target_is_pad"]
        close((real * keep[..., None]).sum() / (keep.sum() * 7), case["loss_padded"])
        rows = (real * keep[..., None]).sum((1, 2)) / (keep.sum(1) * 7)
        close(rows, case["loss_rows_padded"])
    case.policy.zero_grad()
    real.mean().backward()
    parameters = dict(case.policy.named_parameters())
    wanted = {k.removeprefix("grad_"): v for k, v in case.arrays.items() if k.startswith("grad_")}
    assert len(wanted) >= 5
    for name, expected in wanted.items():
        gradient = parameters[name].grad
        assert gradient is not None, name
        close(gradient, expected)


@torch.no_grad()
def test_absent_cameras_and_padding_may_be_left_out(case: Case) -> None:
    """The first row has all its cameras: what is absent for it changes nothing."""
    there = int(case["image_masks"][0].sum())
    length = int(case["lang_masks"][0].sum())
    short = case.policy.prefix(
        [pixels[:1] for pixels in case.pixels[:there]],
        case["image_masks"][:1, :there],
        case["lang_tokens"][:1, :length],
        case["lang_masks"][:1, :length],
        case["state_normalized"][:1],
        output=False,
    )
    assert short.output is None
    assert short.pad_mask.all() and short.pad_mask.shape[1] == case["prefix_pad_mask"][0].sum()
    velocity = case.policy.velocity(short, case["x_t"][:1], case["time"][:1])
    close(velocity, case["velocity"][:1])
