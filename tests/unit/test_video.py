import io

import pytest
import torch
from PIL import Image
from synthetic import frames

from rove.errors import RoveError
from rove.reporting import video

INSTRUCTION = "put the red cube on the blue plate"


def picture(instruction=INSTRUCTION, success=True, form="WEBP"):
    return Image.open(io.BytesIO(video.animate(frames(0), instruction, success, form)))


@pytest.mark.parametrize("form", ["WEBP", "GIF"])
def test_an_animation_shows_every_frame_and_holds_the_last(form):
    shown = picture(form=form)
    assert shown.n_frames == 25
    assert shown.width == 192
    shown.seek(24)
    shown.load()
    assert shown.info["duration"] >= 1000


def test_the_outcome_colours_the_last_frame():
    corners = []
    for success in (True, False):
        shown = picture(success=success)
        shown.seek(24)
        corners.append(shown.convert("RGB").getpixel((1, 1)))
    (dark_red, green, _), (red, dark_green, _) = corners
    assert green > 120 > dark_red
    assert red > 150 > dark_green


def test_the_instruction_is_wrapped_below_the_picture():
    short, long = picture("lift it"), picture(" ".join([INSTRUCTION] * 3))
    assert short.width == long.width == 192
    assert 192 < short.height < long.height


def test_a_large_frame_is_not_enlarged():
    large = torch.zeros(2, 224, 224, 3, dtype=torch.uint8)
    assert Image.open(io.BytesIO(video.animate(large, "lift it", True))).width == 224


def test_an_episode_is_small(tmp_path):
    video.write_webp(tmp_path / "0.webp", frames(0, 32), INSTRUCTION, True)
    assert (tmp_path / "0.webp").stat().st_size < 60_000


@pytest.mark.parametrize("bad", [torch.zeros(0, 8, 8, 3, dtype=torch.uint8), torch.zeros(2, 8, 8, 3)])
def test_bad_frames_are_refused(bad):
    with pytest.raises(RoveError, match="uint8"):
        video.animate(bad, INSTRUCTION, True)
