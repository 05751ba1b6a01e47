"""Prepared clips to training samples. A sample's content follows from (seed, number) alone, whoever computes it.

Axes: F frames of a window, R resolution, L layers and W width of the audio features.
"""

from __future__ import annotations

import math
import os
from collections import OrderedDict
from collections.abc import Callable, Sequence

import cv2
import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor

from sonic.audio import long_windows, short_windows
from sonic.clips import Clip
from sonic.config import FEATURES_PER_TICK, TICK_RATE
from sonic.faces import MASK_GROWTH, square_crop, union_box
from sonic.media import VideoReader
from sonic.motion import MOUTH, motion_buckets, window_buckets
from sonic.pictures import resize_square
from sonic.portrait import clip_pixels, resized_mask

CROP_EXPAND = 0.5  # of the face's size on each side, as in the released preprocessing
CALM_DRAWS = 20  # windows that are drawn, at most, until one moves little enough
OPEN_READERS = 4  # per worker; each holds a file handle and a decoder's pictures
REFERENCE_DISTANCE = TICK_RATE  # ticks; a second away the mouth has said something else
VAE_FACTOR = 8  # pixels of a picture per latent pixel
LIP_MARGIN = 0.25  # of the mouth's width around the lips' outline: where an opening mouth moves chin and cheeks
PART_TICKS = 60 * TICK_RATE  # of a clip in one file of cached latents
WINDOW_REACH = 100  # features read on both sides of a window: more than the 26 that the long context reaches to


class SonicDataset(torch.utils.data.Dataset):
    """Windows of F frames at `frame_step` ticks, each with one reference frame of the same clip (SPEC section 6).

    `dataset[n]` works for any n >= 0: every clip once per len(clips) samples, in an order drawn anew each time. `length`
    is what len() says, by default the number of clips. `crop_per` window cuts each window with its own square, clip all
    windows and references of a clip with one. A share `flip` of the samples is mirrored left to right. ValueError: a clip
    shorter than a window. UserError: a file that has changed since it was prepared.
    """

    def __init__(
        self,
        clips: Sequence[Clip],
        *,
        num_frames: int,
        frame_step: int,
        resolution: int,
        clip_size: int = 224,
        crop_per: str = "window",
        flip: float = 0.0,
        seed: int = 0,
        length: int | None = None,
    ):
        self.clips = list(clips)
        self.num_frames, self.frame_step = num_frames, frame_step
        self.resolution, self.clip_size = resolution, clip_size
        self.crop_per, self.flip = crop_per, flip
        self.seed = seed
        self.length = len(self.clips) if length is None else length
        self._span = (num_frames - 1) * frame_step + 1  # ticks from a window's first frame to its last
        self._readers: OrderedDict[str, VideoReader] = OrderedDict()
        self._process = os.getpid()
        if not self.clips:
            raise ValueError("A dataset needs at least one clip.")
        for clip in self.clips:
            if clip.num_ticks < self._span:
                raise ValueError(f"Clip {clip.name} has {clip.num_ticks} ticks, a window needs {self._span}.")

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, number: int) -> dict[str, Tensor | str]:
        """Sample `number`: frames [F, 3, R, R] and reference [3, R, R] in [-1, 1], clip_pixels [3, S, S], mask [1, R, R],
        lips [F, R/8, R/8] (how much of each latent pixel is mouth, 0 to 1),
        audio_windows [F, 10, L, W], bucket_windows [F, 50, 1, W], buckets [2], fps [], ticks int64 [F], name.
        """
        clip, window, reference = self._draw(int(number))
        square, mirrored = self._square(clip, window), self._mirrored(int(number))
        corner, side = np.array([square[0], square[1]] * 2), square[2] - square[0]
        size = (self.resolution, self.resolution)
        mask = resized_mask(union_box(clip.boxes[window]) - corner, (side, side), size)
        lips = lip_mask((clip.landmarks[window] - corner[:2]) / side, self.resolution // VAE_FACTOR)
        ticks = torch.from_numpy(clip.start + window)
        audio_windows, bucket_windows = self._hear(clip, ticks)
        return {
            **self._look(clip, window, reference, square, mirrored),
            "mask": mask.flip(-1) if mirrored else mask,
            "lips": torch.from_numpy(lips).flip(-1) if mirrored else torch.from_numpy(lips),
            "audio_windows": audio_windows,
            "bucket_windows": bucket_windows,
            "buckets": torch.tensor(motion_buckets(clip.landmarks[window])),  # a mirror image moves as much
            "fps": torch.tensor(TICK_RATE / self.frame_step),
            "ticks": ticks,
            "name": clip.name,
        }

    def frames(self, number: int) -> Tensor:
        """The pictures of sample `number` alone, [F, 3, R, R] in [-1, 1]."""
        clip, window, reference = self._draw(number)
        pictures, _ = self._read(clip, window, reference, self._square(clip, window))
        return pixels(mirror(pictures) if self._mirrored(number) else pictures)

    def _look(self, clip: Clip, window: np.ndarray, reference: int, square, mirrored: bool) -> dict[str, Tensor]:
        """What of a sample is seen: frames, reference and clip_pixels."""
        pictures, portrait = self._read(clip, window, reference, square)
        if mirrored:
            pictures, portrait = mirror(pictures), mirror(portrait)
        return {
            "frames": pixels(pictures),
            "reference": pixels(portrait),
            "clip_pixels": clip_pixels(Image.fromarray(portrait), self.clip_size),
        }

    def _square(self, clip: Clip, window: np.ndarray) -> tuple[int, int, int, int]:
        if self.crop_per == "clip":
            return clip_square(clip)
        return square_of(clip, clip.boxes[window])

    def _mirrored(self, number: int) -> bool:
        return bool(np.random.default_rng([self.seed, number, 2]).random() < self.flip)

    def _draw(self, number: int) -> tuple[Clip, np.ndarray, int]:
        """The clip, the window's ticks int64 [F] and the reference's tick, both counted from the clip's start."""
        if number < 0:
            raise IndexError(f"Samples are numbered from 0, not {number}.")
        lap, position = divmod(number, len(self.clips))
        order = np.random.default_rng([self.seed, lap, 0]).permutation(len(self.clips))
        clip = self.clips[order[position]]
        rng = np.random.default_rng([self.seed, number, 1])
        for _ in range(CALM_DRAWS):
            first = int(rng.integers(clip.num_ticks - self._span + 1))
            window = first + self.frame_step * np.arange(self.num_frames, dtype=np.int64)
            if not any(bucket > clip.max_bucket for bucket in window_buckets(clip.landmarks[window])):
                break

        # The reference, in falling order of preference: a second away and seen whole in the window's own square; outside
        # the window; anywhere (a clip of just one window has nothing else).
        ticks = np.arange(clip.num_ticks)
        away = np.maximum(first - ticks, ticks - (first + self._span - 1))
        seen = inside(clip.boxes, self._square(clip, window))
        for choice in ((away >= REFERENCE_DISTANCE) & seen, (away > 0) & seen, away > 0, ticks >= 0):
            if choice.any():
                return clip, window, int(rng.choice(ticks[choice]))
        raise AssertionError("a clip has ticks")

    def _read(self, clip: Clip, window: np.ndarray, reference: int, square) -> tuple[np.ndarray, np.ndarray]:
        """uint8 [F, R, R, 3] and [R, R, 3]; pictures are cut and shrunk one by one, full-size ones are not kept."""
        own = square
        if self.crop_per != "clip" and not inside(clip.boxes[reference][None], square)[0]:
            own = _in_area(clip, clip.boxes[reference], lambda *box: _around(box[0], square[2] - square[0], *box[1:]))
        wanted = {int(tick): None for tick in window}
        portrait = None
        for tick, picture in self._reader(clip).frames([clip.start + t for t in (*wanted, reference)]):
            tick -= clip.start
            if tick in wanted:
                wanted[tick] = resize_square(cut(picture, square), self.resolution)
            if tick == reference:
                portrait = resize_square(cut(picture, own), self.resolution)
        return np.stack(list(wanted.values())), portrait

    def _hear(self, clip: Clip, ticks: Tensor) -> tuple[Tensor, Tensor]:
        """Short and long windows, cut from the whole video's features as inference does, reading only those around."""
        heard = ticks - clip.offset
        with safe_open(clip.features, "pt") as file:
            features = file.get_slice("features")
            low = max(0, FEATURES_PER_TICK * int(heard[0]) - WINDOW_REACH)  # even, so that it is a whole tick
            high = min(features.get_shape()[0], FEATURES_PER_TICK * int(heard[-1]) + WINDOW_REACH)
            near = features[low:high].float()
        ticks = heard - low // FEATURES_PER_TICK
        return short_windows(near, ticks), long_windows(near, ticks)

    def _reader(self, clip: Clip) -> VideoReader:
        """An open reader from a small store, one store per process: a decoder must not be shared by a fork."""
        if self._process != os.getpid():
            self._readers, self._process = OrderedDict(), os.getpid()
        path = str(clip.path)
        if path not in self._readers:
            while len(self._readers) >= OPEN_READERS:
                self._readers.popitem(last=False)[1].close()
            self._readers[path] = VideoReader(clip.path, late=clip.late)
        self._readers.move_to_end(path)
        return self._readers[path]

    def close(self) -> None:
        """Lets go of the files that are open in this process."""
        while self._readers:
            self._readers.popitem()[1].close()

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_readers": OrderedDict()}


# ------------------------------------------------------------------------------------------------------------- pictures


def pixels(pictures: np.ndarray) -> Tensor:
    """uint8 [..., R, R, 3] -> float32 [..., 3, R, R] in [-1, 1]."""
    return torch.from_numpy(pictures).movedim(-1, -3).float() / 127.5 - 1


def mirror(pictures: np.ndarray) -> np.ndarray:
    """Pictures [..., H, W, 3] with left and right exchanged."""
    return np.ascontiguousarray(pictures[..., ::-1, :])


# -------------------------------------------------------------------------------------------------------------- squares


def clip_square(clip: Clip) -> tuple[int, int, int, int]:
    """The square for the face's path through the whole clip, the same for every part of it."""
    return square_of(clip, clip.whole.boxes)


def latent_parts(clip: Clip) -> range:
    """The first ticks, counted from the whole clip's start, of the files that cached latents of a clip lie in."""
    return range(0, clip.whole.num_ticks, PART_TICKS)


def latent_name(clip: Clip, part: int, mirrored: bool) -> str:
    """The name of a file of cached latents: of the ticks from `part` on, of the pictures or of their mirror images."""
    whole = clip.whole
    x0, y0, x1, _ = clip_square(clip)
    # Features are named after the video as preparation knows it: its name, size and time.
    name = f"{whole.features.stem}@{whole.start}+{whole.num_ticks}-{x0}_{y0}_{x1 - x0}.{part}"
    return f"{name}{'.mirrored' if mirrored else ''}.safetensors"


def square_of(clip: Clip, boxes: np.ndarray) -> tuple[int, int, int, int]:
    """`window_square` of a clip's face boxes [T, 4], with its margin and without its picture's borders."""
    return _in_area(clip, boxes, lambda *window: window_square(*window, clip.expand))


def _in_area(clip: Clip, boxes: np.ndarray, square: Callable) -> tuple[int, int, int, int]:
    """A square that is found within the picture less its borders, in pixels of the whole picture."""
    x0, y0, x1, y1 = clip.area or (0, 0, clip.width, clip.height)
    corner = np.array([x0, y0, x0, y0], np.float32)
    found = square(boxes - corner, x1 - x0, y1 - y0)
    return found[0] + x0, found[1] + y0, found[2] + x0, found[3] + y0


def window_square(boxes: np.ndarray, width: int, height: int, expand: float = CROP_EXPAND) -> tuple[int, int, int, int]:
    """One square x0, y0, x1, y1 that holds the face's whole path, boxes [T, 4], in a picture of that width and height.

    The released crop around a face of usual size in the path's middle, so that a lively head has no more room around it
    than a calm one, and neither more than a portrait that is to be animated; where that does not hold the path, a larger
    one. Lies inside the picture unless the path is longer than the picture's shorter side; then it reaches over the edge,
    and `cut` repeats the edge. (ours)
    """
    boxes = np.clip(boxes, 0, [width, height, width, height])
    union, size = union_box(boxes), np.median(boxes[:, 2:] - boxes[:, :2], axis=0)
    middle = (union[:2] + union[2:]) / 2
    x0, y0, x1, y1 = square_crop(np.concatenate([middle - size / 2, middle + size / 2]), expand, width, height)
    side = min(max(x1 - x0, y1 - y0), width, height)  # the crop may be a pixel off square
    x0, y0 = min(x0, width - side), min(y0, height - side)
    square = (x0, y0, x0 + side, y0 + side)
    if inside(union[None], square)[0]:
        return square
    path = math.ceil(max(union[2:] - union[:2])) + 1  # a pixel more: the corner is rounded
    side = max(path, min(math.ceil(MASK_GROWTH * path), width, height))
    return _around(union, side, width, height)


def inside(boxes: np.ndarray, square) -> np.ndarray:
    """Which boxes [T, 4] lie wholly in the square, bool [T]."""
    return (boxes[:, :2] >= square[:2]).all(axis=1) & (boxes[:, 2:] <= square[2:]).all(axis=1)


def lip_mask(landmarks: np.ndarray, side: int) -> np.ndarray:
    """How much of each of side x side pixels the mouth's box covers, float32 [T, side, side] in 0..1.

    Landmarks [T, 68, 2] are in picture widths; the box is that of the outer lips, grown by a quarter of its width.
    """
    lips = np.asarray(landmarks)[:, MOUTH]
    low, high = lips.min(axis=1) * side, lips.max(axis=1) * side  # [T, 2]
    margin = LIP_MARGIN * (high - low)[:, :1]
    begin = np.arange(side, dtype=np.float32)
    share = np.minimum((high + margin)[..., None], begin + 1) - np.maximum((low - margin)[..., None], begin)
    share = np.clip(share, 0, 1).astype(np.float32)  # [T, 2, side]
    return share[:, 1, :, None] * share[:, 0, None, :]


def _around(box: np.ndarray, side: int, width: int, height: int) -> tuple[int, int, int, int]:
    """A square of that side centred on the box, moved into the picture where it is not larger than the picture."""
    corner = []
    for low, high, limit in ((box[0], box[2], width), (box[1], box[3], height)):
        start = round(float(low + high) / 2 - side / 2)
        corner.append(min(max(start, 0), limit - side) if side <= limit else (limit - side) // 2)
    return corner[0], corner[1], corner[0] + side, corner[1] + side


def cut(picture: np.ndarray, square) -> np.ndarray:
    """The square of a picture [H, W, 3]; what lies over the edge repeats the edge."""
    height, width = picture.shape[:2]
    x0, y0, x1, y1 = square
    part = picture[max(y0, 0) : min(y1, height), max(x0, 0) : min(x1, width)]
    over = (max(-y0, 0), max(y1 - height, 0), max(-x0, 0), max(x1 - width, 0))
    return cv2.copyMakeBorder(part, *over, cv2.BORDER_REPLICATE) if any(over) else part
