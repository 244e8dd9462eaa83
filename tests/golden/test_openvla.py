"""Against the answers of the reference implementations, on tiny random weights in the published layout."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from rove.policies.openvla import OpenVLA

GOLDEN = Path(os.environ.get("ROVE_GOLDEN", Path(__file__).parents[2] / ".." / "shared" / "golden"))
pytestmark = pytest.mark.skipif(
    not GOLDEN.is_dir(), reason=f"no golden data at {GOLDEN}; ROVE_GOLDEN says where they are"
)
FIRST = 31744


def relative(actual: Tensor, expected: np.ndarray) -> float:
    """Norm of the difference over norm."""
    reference = torch.from_numpy(expected).double()
    return float((actual.double() - reference).norm() / reference.norm())


def load(name: str, **settings) -> OpenVLA:
    return OpenVLA.from_pretrained(GOLDEN / name, **settings)


@pytest.fixture(scope="module")
def answers() -> dict[str, np.ndarray]:
    return dict(np.load(GOLDEN / "openvla-tiny" / "golden.npz"))


@pytest.fixture(scope="module")
def policy() -> OpenVLA:
    return load("openvla-tiny", decoding="autoregressive")


def test_pixel_values(policy: OpenVLA, answers: dict[str, np.ndarray]) -> None:
    pixels = policy.process_images(torch.from_numpy(answers["images"])[:, None])
    assert relative(pixels, answers["pixel_values"]) < 2e-3


@torch.no_grad()
def test_vision_and_projector(policy: OpenVLA, answers: dict[str, np.ndarray]) -> None:
    features = policy.vlm.vision(torch.from_numpy(answers["pixel_values"][:1]))
    assert relative(features[0], answers["patch_features_0"]) < 1e-5
    assert relative(policy.vlm.project(features)[0], answers["projected_0"]) < 1e-5


@pytest.mark.parametrize("i", range(3))
@torch.no_grad()
def test_autoregressive(policy: OpenVLA, answers: dict[str, np.ndarray], i: int) -> None:
    ids = torch.from_numpy(answers[f"input_ids_{i}"])[None]
    pixels = torch.from_numpy(answers["pixel_values"][i : i + 1])
    forced = torch.from_numpy(answers["greedy_tokens"][i]).view(1, 1, 7)
    logits, hidden = policy.action_logits(ids, torch.ones_like(ids), pixels, forced, return_hidden=True)
    assert relative(logits[0, 0], answers[f"step_logits_{i}"][:, :256]) < 2e-4
    assert relative(hidden[0, 0], answers[f"last_hidden_{i}"]) < 2e-4
    tokens = policy.action_logits(ids, None, pixels).argmax(-1) + FIRST
    assert np.array_equal(tokens[0, 0].numpy(), answers[f"restricted_tokens_{i}"])
    normalized = policy.detokenize(tokens)
    assert np.abs(normalized[0, 0].numpy() - answers[f"normalized_{i}"]).max() < 1e-6
    assert np.abs(policy.unnormalize(normalized)[0, 0].numpy() - answers[f"action_{i}"]).max() < 1e-6


@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
@torch.no_grad()
def test_parallel(attention) -> None:
    policy = load("openvla-oft-tiny", decoding="parallel", attention=attention)
    answers = dict(np.load(GOLDEN / "openvla-oft-tiny" / f"golden_{attention}.npz"))
    pixels = torch.from_numpy(answers["pixel_values"])
    rows = [torch.from_numpy(answers[f"input_ids_{i}"]) for i in range(3)]
    for i, ids in enumerate(rows):
        logits, hidden = policy.action_logits(ids[None], None, pixels[i : i + 1], return_hidden=True)
        assert relative(logits[0].flatten(0, 1), answers[f"logits_{i}"][:, :256]) < 2e-4
        assert relative(hidden[0], answers[f"hidden_{i}"]) < 2e-4
        logp, tokens = logits.log_softmax(-1).max(-1)
        assert np.array_equal(tokens.flatten().numpy() + FIRST, answers[f"tokens_{i}"])
        assert np.abs(logp.flatten().numpy() - answers[f"logprobs_{i}"]).max() < 1e-4
        actions = policy.unnormalize(policy.detokenize(tokens + FIRST))
        assert np.abs(actions[0].numpy() - answers[f"actions_{i}"]).max() < 1e-6
    ids = padded(rows)
    batched = policy.action_logits(ids, ids != 32000, pixels)
    for i in range(3):
        assert relative(batched[i].flatten(0, 1), answers[f"logits_{i}"][:, :256]) < 2e-4


def padded(rows: list[Tensor]) -> Tensor:
    """[B, L], padded on the left, before BOS."""
    longest = max(map(len, rows))
    return torch.stack([torch.cat((row.new_full((longest - len(row),), 32000), row)) for row in rows])


@torch.no_grad()
def test_autoregressive_prompts_of_different_lengths_in_one_batch(
    policy: OpenVLA, answers: dict[str, np.ndarray]
) -> None:
    ids = padded([torch.from_numpy(answers[f"input_ids_{i}"]) for i in range(3)])
    pixels = torch.from_numpy(answers["pixel_values"])
    forced = torch.from_numpy(answers["greedy_tokens"])[:, None]
    logits = policy.action_logits(ids, ids != 32000, pixels, forced)
    tokens = policy.action_logits(ids, ids != 32000, pixels).argmax(-1) + FIRST
    for i in range(3):
        assert relative(logits[i, 0], answers[f"step_logits_{i}"][:, :256]) < 2e-4
        assert np.array_equal(tokens[i, 0].numpy(), answers[f"restricted_tokens_{i}"])


@torch.no_grad()
def test_several_pictures_follow_each_other(policy: OpenVLA, answers: dict[str, np.ndarray]) -> None:
    images = torch.from_numpy(answers["images"])
    pixels = policy.process_images(torch.stack((images[:2], images[1:]), dim=1))
    assert pixels.shape == (2, 12, 224, 224)
    features = policy.vlm.vision(pixels)
    assert features.shape == (2, 512, 80)
    alone = policy.vlm.vision(policy.process_images(images[:1, None]))
    torch.testing.assert_close(features[:1, :256], alone)


@pytest.mark.parametrize("name", ["openvla-tiny", "openvla-oft-tiny"])
@torch.no_grad()
def test_a_saved_checkpoint_answers_the_same(name: str, tmp_path: Path) -> None:
    policy = load(name, decoding="parallel")
    policy.save_pretrained(tmp_path, max_shard_bytes=1_000_000)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    answers = np.load(GOLDEN / "openvla-oft-tiny" / "golden_causal.npz")
    ids, pixels = (torch.from_numpy(answers[key]) for key in ("input_ids_0", "pixel_values"))
    before, after = (
        one.action_logits(ids[None], None, pixels[:1]) for one in (policy, OpenVLA.from_pretrained(tmp_path))
    )
    # The class token is stored with its position added, which may round differently.
    torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_text_and_merged_adapters_do_not_change_the_answers(tmp_path: Path) -> None:
    """New adapters are no change, merged or not; without a tokenizer, text is refused."""
    from rove.config.schema import LoraConfig
    from rove.errors import RoveError
    from rove.types import Observation

    plain = load("openvla-oft-tiny", decoding="parallel")
    adapted = load("openvla-oft-tiny", decoding="parallel", lora=LoraConfig(rank=4))
    answers = np.load(GOLDEN / "openvla-oft-tiny" / "golden_causal.npz")
    ids, pixels = (torch.from_numpy(answers[key]) for key in ("input_ids_0", "pixel_values"))
    for policy in (plain, adapted, adapted.merge()):
        logits = policy.action_logits(ids[None], None, pixels[:1])
        assert relative(logits[0].flatten(0, 1), answers["logits_0"][:, :256]) < 2e-4
    images = torch.from_numpy(answers["images"])[:1, None]
    with pytest.raises(RoveError, match=r"no tokenizer\.json"):
        plain.act(Observation(images, ("pick",)), "greedy")


def test_saving_keeps_every_published_key(policy: OpenVLA, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    policy.save_pretrained(tmp_path)
    saved, original = (load_file(d / "model.safetensors") for d in (tmp_path, GOLDEN / "openvla-tiny"))
    assert saved.keys() == original.keys()
    assert all(torch.equal(saved[key], original[key].float()) for key in saved)
