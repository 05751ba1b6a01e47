"""Portrait image -> reference pixels, CLIP pixels, face mask (SPEC.md section 4).

Axes: H W pixels of the resized portrait, S side of the CLIP encoder's input. Boxes are
x0, y0, x1, y1 in pixels of the source image.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sonic.config import UserError
from sonic.faces import detect_faces, face_mask, square_crop

SIDE_MULTIPLE = 64  # pixels: 8 of the VAE times 8 of the UNet's three halvings
# CLIP's own normalisation, per RGB channel
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
MAX_ASPECT = 4  # longer side over shorter: at resolution 512, 64 x 5000 pixels would become 512 x 40000
MIN_CROP = 16  # pixels; a smaller crop is a slip in the face box
FAR = 1e6  # pixels; a face box that reaches so far is a slip too
FULL = "full"  # the face box that means: the whole picture


@dataclass
class PortraitPixels:
    """pixels [3, H, W] in -1..1, clip_pixels [3, S, S] normalised, mask [1, H, W] in 0..1, face_box in the source's pixels."""

    pixels: Tensor
    clip_pixels: Tensor
    mask: Tensor
    face_box: tuple[float, float, float, float]


def to_tensor(image: Image.Image) -> Tensor:
    """RGB image -> [3, H, W] in 0..1."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def fitted_size(width: int, height: int, image_size: int) -> tuple[int, int]:
    """Width and height with the short side near `image_size`, each side the nearest multiple of 64 (64 at least)."""
    scale = image_size / min(width, height)

    def fit(side: int) -> int:
        return max(round(side * scale / SIDE_MULTIPLE), 1) * SIDE_MULTIPLE

    return fit(width), fit(height)


def clip_pixels(image: Image.Image, size: int) -> Tensor:
    """What the CLIP encoder reads, [3, size, size]: squeezed to a square (Lanczos), then CLIP's own normalisation."""
    pixels = to_tensor(image.resize((size, size), Image.Resampling.LANCZOS))
    mean, std = torch.tensor(CLIP_MEAN)[:, None, None], torch.tensor(CLIP_STD)[:, None, None]
    return (pixels - mean) / std


def resized_mask(box, source: tuple[int, int], target: tuple[int, int]) -> Tensor:
    """The face mask of a box, drawn at the source's width and height and resized to the target's (Lanczos), [1, H, W] in 0..1."""
    mask = Image.fromarray(face_mask(box, *source)).resize(target, Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(mask)).float()[None] / 255


def find_face(image: Image.Image, where: str = "the portrait") -> tuple[float, float, float, float]:
    """The largest face's box. Raises UserError that says how to go on if there is none."""
    faces = detect_faces(np.array(image))
    if not faces:
        raise UserError(
            f"no face was found in {where}: give its box with --face_box X0,Y0,X1,Y1 (pixels), "
            "or take the whole picture with --face_box full"
        )
    return tuple(float(side) for side in faces[0].box)


def parse_face_box(text: str | None) -> str | tuple[float, float, float, float] | None:
    """`--face_box`: nothing, `full`, or four numbers x0,y0,x1,y1 with x0 < x1 and y0 < y1."""
    if text is None or text == FULL:
        return text
    try:
        x0, y0, x1, y1 = (float(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"--face_box '{text}' is neither 'full' nor four numbers X0,Y0,X1,Y1") from None
    if not (0 <= x0 < x1 < math.inf and 0 <= y0 < y1 < math.inf):
        raise UserError(f"--face_box '{text}' needs 0 <= X0 < X1 and 0 <= Y0 < Y1, all finite")
    return x0, y0, x1, y1


def checked_box(face_box, width: int, height: int, where: str) -> tuple[float, float, float, float]:
    """A face box as four floats. Raises UserError unless box and mask both cover a pixel of the picture of this size."""
    of = f"{where} of {width} × {height} pixels"
    try:
        x0, y0, x1, y1 = box = tuple(float(side) for side in face_box)
    except (TypeError, ValueError, OverflowError):
        raise UserError(f"the face box {face_box} for {of} is neither 'full' nor four numbers X0, Y0, X1, Y1") from None
    if not all(abs(side) < FAR for side in box):  # NaN is not either
        raise UserError(f"the face box {box} for {of} needs four finite numbers, in pixels")
    if not (x0 < x1 and y0 < y1):
        raise UserError(f"the face box {box} for {of} needs X0 < X1 and Y0 < Y1")
    if min(x1, width) - max(x0, 0) < 1 or min(y1, height) - max(y0, 0) < 1 or not face_mask(box, width, height).any():
        raise UserError(f"the face box {box} lies outside {of}, or holds less than one of them: give a larger one")
    return box


def prepare_portrait(
    image: Image.Image,
    image_size: int,
    face_box: str | Sequence[float] | None = None,
    crop: float | None = None,
    clip_size: int = 224,
    where: str = "the portrait",
) -> PortraitPixels:
    """Everything the sampler needs of a portrait. `image` is RGB; no `face_box` finds the largest face.

    `crop` cuts a square around the face first, the face box grown by that share of itself on each side, as the released
    preprocessing does with 0.5. `face_box` is also what `--face_box` takes. Raises UserError when no face is found, for a
    box that is none or lies outside the picture, for a crop of a few pixels, and for a picture that is a strip.
    """
    if crop is None and max(image.size) > MAX_ASPECT * min(image.size):
        raise UserError(
            f"{where} is {image.width} × {image.height} pixels, more than {MAX_ASPECT} times as long as wide: crop it, "
            "or cut a square around the face with --crop 0.5"
        )
    if isinstance(face_box, str):
        face_box = parse_face_box(face_box)
    if face_box is None:
        face_box = find_face(image, where)
    elif isinstance(face_box, str):  # full
        face_box = (0, 0, *image.size)
    x0, y0, x1, y1 = face_box = checked_box(face_box, *image.size, where)
    if crop is not None:
        left, top, right, bottom = square_crop(face_box, crop, *image.size)
        if min(right - left, bottom - top) < MIN_CROP:
            raise UserError(
                f"the face box {face_box} in {where} of {image.width} × {image.height} pixels leaves a crop of "
                f"{right - left} × {bottom - top}: give a larger box, or a --crop that makes it {MIN_CROP} × {MIN_CROP}"
            )
        image = image.crop((left, top, right, bottom))
        x0, y0, x1, y1 = x0 - left, y0 - top, x1 - left, y1 - top
    size = fitted_size(image.width, image.height, image_size)
    resized = image.resize(size, Image.Resampling.LANCZOS)
    return PortraitPixels(
        pixels=to_tensor(resized) * 2 - 1,
        clip_pixels=clip_pixels(resized, clip_size),
        mask=resized_mask((x0, y0, x1, y1), image.size, size),
        face_box=face_box,
    )
