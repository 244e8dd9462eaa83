"""The parts of a policy that need no model: tokens, images, statistics, the action converter."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from rove.errors import RoveError
from rove.policies.actions import ActionConverter
from rove.policies.openvla import bins, images
from rove.policies.openvla.tokenizer import word_tokenizer
from rove.types import ActionSpec

VOCAB = 32000


def test_bins_follow_the_published_definition() -> None:
    values = np.concatenate([np.linspace(-1.2, 1.2, 997), np.linspace(-1, 1, 256)])
    expected = VOCAB - np.digitize(np.clip(values, -1, 1), np.linspace(-1, 1, 256))
    tokens = bins.tokenize(torch.from_numpy(values), VOCAB)
    assert np.array_equal(tokens.numpy(), expected)
    assert tokens.min() == 31744 and tokens.max() == 31999


def test_detokenize_clips_and_the_two_lowest_ids_share_a_centre() -> None:
    centres = bins.detokenize(torch.tensor([31999, 31745, 31744, 5, 32010]), VOCAB)
    assert centres[0] == pytest.approx(-254 / 255) and centres[1] == pytest.approx(254 / 255)
    assert centres[2] == centres[1] == centres[3] and centres[4] == centres[0]


def test_unnormalize_uses_percentiles_where_masked() -> None:
    normalizer = bins.Normalizer({"q01": [-2.0, 0.0], "q99": [4.0, 1.0], "mask": [True, False]})
    out = normalizer.unnormalize(torch.tensor([[-1.0, 0.5], [0.0, 0.25], [1.0, -1.0]]))
    assert out.tolist() == [[-2.0, 0.5], [1.0, 0.25], [4.0, -1.0]]
    assert normalizer.normalize(out).tolist() == [[-1.0, 0.5], [0.0, 0.25], [1.0, -1.0]]


def test_statistics_key() -> None:
    statistics = {"libero_spatial_no_noops": {}, "bridge": {}}
    assert bins.choose_key(statistics, "libero_spatial") == "libero_spatial_no_noops"
    assert bins.choose_key(statistics, "bridge_no_noops") == "bridge"
    with pytest.raises(RoveError, match="Did you mean 'bridge'"):
        bins.choose_key(statistics, "bridgge")
    assert bins.choose_key(statistics, None) is None
    assert bins.choose_key({"bridge": {}}, None) == "bridge"
    with pytest.raises(RoveError, match="bridge, libero_spatial_no_noops"):
        raise bins.no_key(statistics)


def test_word_tokenizer() -> None:
    tokenizer = word_tokenizer(["Red", "cube"])
    assert tokenizer.encode("Cube RED purple").ids == [1, 4, 5, 3]
    assert tokenizer.get_vocab_size() == 4 + 2 + 256


def pictures(size: int) -> torch.Tensor:
    return torch.randint(
        0, 256, (2, 2, size, size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )


def test_images_are_normalized_per_tower_in_channel_order() -> None:
    raw = pictures(8)
    mean, std = torch.arange(1.0, 7.0), torch.arange(2.0, 8.0)
    pixels = images.process(raw, 8, mean, std, center_crop=False)
    assert pixels.shape == (2, 12, 8, 8)
    for view in range(2):
        for channel in range(6):
            expected = (raw[:, view, :, :, channel % 3].float() - mean[channel]) / std[channel]
            torch.testing.assert_close(pixels[:, 6 * view + channel], expected)


def test_resize_is_that_of_pil() -> None:
    raw = pictures(32)
    pixels = images.process(raw, 20, torch.zeros(3), torch.ones(3), center_crop=False)
    expected = np.asarray(Image.fromarray(raw[1, 0].numpy()).resize((20, 20), Image.Resampling.BICUBIC))
    assert np.abs(pixels[1, :3].permute(1, 2, 0).numpy() - expected).max() <= 1


@pytest.mark.parametrize("name", ["bicubic", "lanczos"])
def test_other_devices_resize_as_pil_does(name: str) -> None:
    """What a GPU runs; exact but where an intermediate rounds the other way."""
    raw = pictures(256)[0]
    chosen = {"bicubic": Image.Resampling.BICUBIC, "lanczos": Image.Resampling.LANCZOS}[name]
    expected = np.stack([np.asarray(Image.fromarray(one.numpy()).resize((224, 224), chosen)) for one in raw])
    channels = raw.permute(0, 3, 1, 2)
    ours = images.resize_by_matrix(channels, 224, name).permute(0, 2, 3, 1).numpy()
    assert np.abs(ours - expected).max() <= 1 and (ours != expected).mean() < 0.01
    here = images.process(
        raw[None], 224, torch.zeros(3), torch.ones(3), center_crop=False, interpolation=name
    )
    here = here.view(2, 3, 224, 224).permute(0, 2, 3, 1).numpy()
    assert np.abs(here - expected).max() <= 1


def test_center_crop_comes_after_the_resize_and_rounds() -> None:
    """`crop_and_resize` of a 0.9 share of the area, bilinear with corners aligned, as the reference does."""
    raw = pictures(256)
    size, side = 224, 0.9**0.5
    resized = images.process(raw, size, torch.zeros(3), torch.ones(3), center_crop=False)
    cropped = images.process(raw, size, torch.zeros(3), torch.ones(3), center_crop=True)
    place = (1 - side) / 2 * (size - 1) + torch.arange(size) * side
    low, part = place.floor().long(), place - place.floor()
    lines = resized[:, :, low] * (1 - part[:, None]) + resized[:, :, low + 1] * part[:, None]
    expected = lines[..., low] * (1 - part) + lines[..., low + 1] * part
    assert (cropped - expected).abs().max() <= 0.51


def test_center_crop_keeps_nine_tenths_of_the_area() -> None:
    ramp = torch.arange(101, dtype=torch.uint8)[None, None, None, :, None].expand(1, 1, 101, 101, 3)
    row = images.process(ramp, 101, torch.zeros(3), torch.ones(3), center_crop=True)[0, 0, 50]
    side = 0.9**0.5
    assert row[0] == round(50 - 50 * side) and row[-1] == round(50 + 50 * side) and row[50] == 50


def test_images_of_another_kind_are_refused() -> None:
    with pytest.raises(RoveError, match="uint8"):
        images.process(pictures(8).float(), 8, torch.zeros(3), torch.ones(3), center_crop=False)


POLICY = ActionSpec(
    ("x", "y", "yaw", "gripper"), ("m", "m", "rad", "1"), (-0.05, -0.05, -1, 0), (0.05, 0.05, 1, 1)
)
ENV = ActionSpec(
    ("y", "x", "yaw", "gripper"),
    ("cm", "cm", "deg", "1"),
    (-4, -4, -90, -1),
    (4, 4, 90, 1),
    gripper="open_low",
)


def test_converter_reorders_scales_mirrors_and_clips() -> None:
    convert = ActionConverter(POLICY, ENV)
    out = convert(torch.tensor([[0.01, -0.02, torch.pi / 4, 1.0], [0.05, 0.0, 0.0, 0.25]]))
    torch.testing.assert_close(out, torch.tensor([[-2.0, 1.0, 45.0, -1.0], [0.0, 4.0, 0.0, 0.5]]))


def test_converter_leaves_equal_conventions_alone() -> None:
    actions = torch.tensor([[0.01, -0.02, 0.3, 1.0]])
    assert torch.equal(ActionConverter(POLICY, POLICY)(actions), actions)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"frame": "end_effector"}, "frame='world'.*expects 'end_effector'"),
        ({"control": "absolute"}, "control='delta'"),
        ({"names": ("yy", "x", "yaw", "gripper")}, "Did you mean 'y'"),
        ({"units": ("cm", "rad", "deg", "1")}, "'x' is in 'm'"),
        ({"units": ("cm", "metre", "deg", "1")}, "Unknown unit 'metre'"),
    ],
)
def test_converter_refuses_what_no_factor_maps(change: dict, message: str) -> None:
    with pytest.raises(RoveError, match=message):
        ActionConverter(POLICY, replace(ENV, **change))
