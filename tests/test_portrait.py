import numpy as np
import pytest
import torch
from conftest import EXAMPLES
from PIL import Image

from sonic.config import UserError
from sonic.portrait import clip_pixels, fitted_size, parse_face_box, prepare_portrait, to_tensor


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


INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize(
    ("box", "reason"),
    [
        ("1,2,3", "--face_box '1,2,3' is neither"),
        ("face", "--face_box 'face' is neither"),
        ("", "neither"),
        ("1,2,inf,4", "finite"),
        ((1, 2, 3), "neither 'full' nor four numbers"),
        (7, "neither 'full' nor four numbers"),
        ((1, 2, 3, None), "neither 'full' nor four numbers"),
        ([10, 20, 5, 6], "needs X0 < X1"),
        ((10, 20, 10, 30), "needs X0 < X1"),
        ((NAN, 2, 30, 40), "finite"),
        (np.array([1, 2, INF, 40]), "finite"),
        ((-1e308, 2, 1.7e308, 40), "finite"),
        ((-100, 10, -1, 30), "outside"),  # the mask, grown by 1.1, would reach the picture
        ((10, -100, 30, 0), "outside"),
        ((100, 10, 120, 30), "outside"),
        ((10, 99.5, 30, 130), "outside"),
        ((10, 10, 10.2, 10.2), "outside"),
    ],
)
@pytest.mark.parametrize("crop", [None, 0, 0.5])
def test_a_face_box_that_is_none(box, reason, crop):
    with pytest.raises(UserError) as failure:
        prepare_portrait(Image.new("RGB", (100, 90)), 64, box, crop, where="cat.png")
    assert reason in str(failure.value)
    if not isinstance(box, str):
        assert "cat.png of 100 × 90 pixels" in str(failure.value)
        assert all(str(side) in str(failure.value) for side in np.ravel(box))


def test_face_boxes_of_the_api():
    image = Image.new("RGB", (100, 90))
    for box in (
        "10,20,50,60",
        (10, 20, 50, 60),
        [10.0, 20, 50, 60],
        np.float32([10, 20, 50, 60]),
        torch.tensor([10, 20, 50, 60]),
    ):
        assert prepare_portrait(image, 64, box).face_box == (10, 20, 50, 60)
    over = prepare_portrait(image, 64, (-20, -30, 40, 50))  # a face may reach over the picture's edge
    assert over.face_box == (-20, -30, 40, 50) and over.mask[0, 0, 0] == 1


def test_a_crop_of_a_few_pixels_is_refused():
    image = Image.new("RGB", (100, 90))
    for box, crop in (((10, 10, 14, 14), 0), ((10, 10, 14, 14), 0.5), ((-200, 10, 10, 80), 0), ((30, 40, 33, 80), 0.5)):
        with pytest.raises(UserError, match=r"leaves a crop of \d+ × \d+: give a larger box") as failure:
            prepare_portrait(image, 64, box, crop)
        assert "100 × 90" in str(failure.value)
    assert prepare_portrait(image, 64, (10, 10, 26, 26), 0).pixels.shape == (3, 64, 64)


def test_any_crop_that_is_taken_shows_its_face():
    rng, taken = np.random.default_rng(0), 0
    for _ in range(300):
        low = rng.integers(-80, 90, 2)
        box, crop = (*low, *(low + rng.integers(1, 150, 2))), float(rng.choice([0, 0.1, 0.5, 2]))
        try:
            portrait = prepare_portrait(Image.new("RGB", (100, 90)), 64, box, crop, clip_size=16)
        except UserError:
            continue
        taken += 1
        assert portrait.pixels.shape == (3, 64, 64) and portrait.mask.max() > 0.5, (box, crop)
    assert taken > 100


def test_a_crop_may_be_a_pixel_off_square():
    """As in the released preprocessing, whose edges are rounded one by one: 21 x 22 pixels here, resized to a square."""
    noise = np.random.default_rng(0).integers(0, 255, (90, 100, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    found = prepare_portrait(image, 64, (10, 10, 31, 40), crop=0).pixels
    expected = image.crop((10, 14, 31, 36)).resize((64, 64), Image.Resampling.LANCZOS)
    assert torch.allclose(found, to_tensor(expected) * 2 - 1)


def test_a_strip_has_to_be_cropped():
    for size in ((64, 5000), (500, 120)):
        with pytest.raises(UserError, match=rf"strip\.png is {size[0]} × {size[1]} pixels, .*--crop 0\.5"):
            prepare_portrait(Image.new("RGB", size), 512, "full", where="strip.png")
    assert prepare_portrait(Image.new("RGB", (64, 5000)), 64, (10, 90, 50, 130), crop=0.5).pixels.shape == (3, 64, 64)
    assert prepare_portrait(Image.new("RGB", (400, 100)), 64, "full").pixels.shape == (3, 64, 256)


def test_face_box_flag():
    assert parse_face_box(None) is None and parse_face_box("full") == "full"
    assert parse_face_box("1,2,30,40.5") == (1, 2, 30, 40.5)
    for wrong in (
        "1,2,3",
        "a,b,c,d",
        "10,10,5,20",
        "-5,0,10,10",
        "",
        "1,2,3,4,5",
        "nan,0,1,1",
        "0,0,inf,9",
        "0,0,9,1e999",
    ):
        with pytest.raises(UserError, match="--face_box"):
            parse_face_box(wrong)
