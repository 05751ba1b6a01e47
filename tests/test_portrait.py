import numpy as np
import pytest
import torch
from conftest import EXAMPLES
from PIL import Image

from sonic.config import UserError
from sonic.portrait import clip_pixels, fitted_size, parse_face_box, prepare_portrait


@pytest.mark.parametrize(
    ("width", "height", "image_size", "expected"),
    [
        (512, 512, 512, (512, 512)),
        (300, 420, 128, (128, 192)),
        (512, 288, 64, (128, 64)),
        (1080, 1920, 512, (512, 896)),
        (1000, 1000, 500, (512, 512)),
        (640, 480, 576, (768, 576)),
        (200, 200, 64, (64, 64)),
    ],
)
def test_size(width, height, image_size, expected):
    assert fitted_size(width, height, image_size) == expected


def test_found_face_box_and_full():
    image = Image.open(EXAMPLES / "portrait.jpg")
    found = prepare_portrait(image, 128)
    assert found.pixels.shape == (3, 128, 128) and found.mask.shape == (1, 128, 128)
    assert found.pixels.min() >= -1 and found.pixels.max() <= 1
    x0, y0, x1, y1 = found.face_box
    assert 0 < x0 < 256 < x1 < 512 and 0 < y0 < y1 < 512
    assert 0.05 < found.mask.mean() < 0.6
    centre = int((y0 + y1) / 2 / 4), int((x0 + x1) / 2 / 4)
    assert found.mask[0, centre[0], centre[1]] == 1 and found.mask[0, 0, 0] == 0
    assert prepare_portrait(image, 128, "full").mask.mean() == 1


def test_crop_is_square_around_the_face():
    image = Image.open(EXAMPLES / "portrait.jpg").resize((512, 768))
    plain = prepare_portrait(image, 128, (150, 300, 350, 500))
    cropped = prepare_portrait(image, 128, (150, 300, 350, 500), crop=0.5)
    assert plain.pixels.shape == (3, 192, 128)
    assert cropped.pixels.shape == (3, 128, 128)
    assert cropped.mask.mean() > 2 * plain.mask.mean()
    assert cropped.mask[0, 64, 64] == 1


def test_clip_pixels_are_normalised():
    grey = clip_pixels(Image.new("RGB", (90, 40), (128, 128, 128)), 28)
    expected = (torch.full((3,), 128 / 255) - torch.tensor([0.4815, 0.4578, 0.4082])) / torch.tensor(
        [0.2686, 0.2613, 0.2758]
    )
    assert grey.shape == (3, 28, 28)
    assert torch.allclose(grey.mean((1, 2)), expected, atol=1e-3)


def test_no_face_says_how_to_go_on():
    noise = np.random.default_rng(0).integers(0, 255, (128, 128, 3), dtype=np.uint8)
    with pytest.raises(UserError, match=r"no face was found in cat\.png: .*--face_box X0.*--face_box full"):
        prepare_portrait(Image.fromarray(noise), 64, where="cat.png")


def test_box_outside_the_picture():
    with pytest.raises(UserError, match="outside"):
        prepare_portrait(Image.new("RGB", (100, 100)), 64, (120, 10, 150, 40))


def test_face_box_flag():
    assert parse_face_box(None) is None and parse_face_box("full") == "full"
    assert parse_face_box("1,2,30,40.5") == (1, 2, 30, 40.5)
    for wrong in ("1,2,3", "a,b,c,d", "10,10,5,20", "-5,0,10,10", "", "1,2,3,4,5", "nan,0,1,1"):
        with pytest.raises(UserError, match="--face_box"):
            parse_face_box(wrong)
