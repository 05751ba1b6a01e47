"""Picture files: every kind becomes RGB as it is to be seen, and bad files say what is wrong."""

import numpy as np
import pytest
from PIL import Image

from sonic.config import UserError
from sonic.pictures import load_image


def test_every_kind_of_picture_becomes_rgb(tmp_path):
    colour = Image.new("RGB", (80, 70), (200, 40, 40))
    colour.paste((20, 20, 220), (0, 0, 40, 70))
    colour.save(tmp_path / "rgb.png")
    colour.convert("L").save(tmp_path / "grey.png")
    colour.convert("P", palette=Image.Palette.ADAPTIVE).save(tmp_path / "palette.png")
    colour.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=95)
    Image.fromarray(np.full((70, 80), 40000, np.uint16)).save(tmp_path / "deep.png")
    for name in ("rgb.png", "grey.png", "palette.png", "cmyk.jpg", "deep.png"):
        image = load_image(tmp_path / name)
        assert (image.mode, image.size) == ("RGB", (80, 70)), name
    for name in ("rgb.png", "palette.png", "cmyk.jpg"):
        found = np.asarray(load_image(tmp_path / name)).astype(int)
        assert np.abs(found - np.asarray(colour)).mean() < 6, name
    half = Image.new("RGBA", (80, 70), (0, 0, 0, 0))
    half.save(tmp_path / "clear.png")
    assert np.asarray(load_image(tmp_path / "clear.png")).min() == 255  # nothing, over white
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright
    colour.save(tmp_path / "exif.jpg", exif=exif, quality=95)
    turned = load_image(tmp_path / "exif.jpg")
    assert turned.size == (70, 80)
    assert turned.getpixel((35, 5))[2] > 150 and turned.getpixel((35, 75))[0] > 150


def test_bad_pictures_say_why(tmp_path, monkeypatch):
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.jpg").write_text("no picture")
    Image.new("RGB", (63, 200)).save(tmp_path / "small.png")
    Image.effect_noise((300, 300), 50).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:9000])
    for name, reason in {
        "missing.png": "does not exist",
        "empty.png": "empty",
        "text.jpg": "cannot be read as an image",
        "cut.png": "cannot be read as an image",
        "small.png": "63 x 200",
    }.items():
        with pytest.raises(UserError, match=reason):
            load_image(tmp_path / name)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(UserError, match="too large"):
        load_image(tmp_path / "whole.png")
