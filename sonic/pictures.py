"""Picture files in, as RGB the way they are to be seen; pictures made larger and smaller."""

from __future__ import annotations

import warnings

import cv2
import numpy as np
from PIL import Image, ImageOps

from sonic.config import UserError
from sonic.media import readable_file

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")  # Pillow would hand others, as EPS, to other programs
MIN_IMAGE_SIDE = 64  # pixels; one latent cell of the coarsest UNet level


def load_image(path, max_pixels: int | None = None) -> Image.Image:
    """A picture as RGB, turned as its EXIF says, transparency over white.

    UserError: missing, empty, not an image, under 64 pixels on a side, over max_pixels or too large to be meant
    (decompression bomb); its size is known before it is decoded.
    """
    path = readable_file(path, "image")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=FORMATS) as file:
                if max_pixels is not None and file.width * file.height > max_pixels:
                    raise UserError(
                        f"{path} is too large an image ({file.width} x {file.height} pixels, at most {max_pixels} are "
                        "taken here): scale it down."
                    )
                image = ImageOps.exif_transpose(file)
                image.load()
    except UserError:
        raise
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise UserError(
            f"{path} is too large an image (over {Image.MAX_IMAGE_PIXELS} pixels): scale it down."
        ) from error
    except (OSError, ValueError, SyntaxError) as error:  # Pillow raises SyntaxError for broken PNG chunks
        raise UserError(f"{path} cannot be read as an image: give a whole PNG, JPEG or WebP file.") from error
    return to_rgb(image, str(path))


def to_rgb(image: Image.Image, where: str) -> Image.Image:
    """Any mode as RGB, transparency over white. UserError, naming `where` it came from: under 64 pixels on a side."""
    if min(image.size) < MIN_IMAGE_SIDE:
        raise UserError(
            f"{where} is {image.width} x {image.height} pixels: give at least {MIN_IMAGE_SIDE} on each side."
        )
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    if image.mode.startswith("I") or image.mode == "F":  # 16-bit grey: Pillow's own conversion would clip it at 255
        values = np.asarray(image, dtype=np.float64)
        image = Image.fromarray((values / max(values.max(), 1) * 255).round().astype(np.uint8))
    return image.convert("RGB")


def resize_square(image: np.ndarray, size: int) -> np.ndarray:
    """uint8 [s, s, 3] to [size, size, 3]: area average down, Lanczos up."""
    if image.shape[0] == size:
        return image
    filter_ = cv2.INTER_AREA if image.shape[0] > size else cv2.INTER_LANCZOS4
    return cv2.resize(image, (size, size), interpolation=filter_)
