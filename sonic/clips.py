"""A clip: what training reads of a prepared video, and which clips are held out from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path

import numpy as np

from sonic.track_cache import text_hash

HELD_OUT_SHARE = 0.05  # of the videos, where there are enough of them
ENOUGH_VIDEOS = 10
HELD_OUT_TAIL = 0.2  # of every clip's time, where there are not


@dataclass(frozen=True)
class Clip:
    """One person speaking without a break: consecutive ticks of one video. Boxes and landmarks in its pixels."""

    name: str  # relative path @ first tick, unique
    path: Path
    start: int  # first tick, on the video's clock
    boxes: np.ndarray  # float32 [T, 4]
    landmarks: np.ndarray  # float32 [T, 68, 2]
    features: Path  # safetensors: the whole video's audio features, fp16 [2 * ticks, layers, width]
    width: int
    height: int
    offset: int = 0  # ticks that the pictures come after their sound: picture t is heard at t - offset
    area: tuple[int, int, int, int] | None = (
        None  # the picture without burnt-in borders, x0, y0, x1, y1; None is all of it
    )
    expand: float = 0.5  # margin of the square around the face, in its sizes (released: 0.5)
    max_bucket: float = 128.0  # windows with more motion are not sampled
    late: Fraction = Fraction(0)  # seconds from the file's first picture to tick 0, in what was cut out of a longer one
    part_of: Clip | None = field(default=None, repr=False, compare=False)

    @property
    def num_ticks(self) -> int:
        return len(self.boxes)

    @property
    def whole(self) -> Clip:
        """The clip as it was prepared, if this is a part of one."""
        return self.part_of or self

    @property
    def video(self) -> str:
        """The video's path below the data folder."""
        return self.name.rpartition("@")[0]

    def part(self, first: int, last: int) -> Clip:
        """The clip's ticks [first, last), counted from its own start."""
        start = self.start + first
        name = f"{self.video}@{start}"
        boxes, landmarks = self.boxes[first:last], self.landmarks[first:last]
        return replace(self, name=name, start=start, boxes=boxes, landmarks=landmarks, part_of=self.whole)


def hold_out(clips: Sequence[Clip], window: int = 26) -> tuple[list[Clip], list[Clip]]:
    """(training clips, validation clips), nothing in both. `window`: the fewest ticks that make a clip (num_frames *
    frame_step + 1).

    From 10 videos on, those whose name's hash lies in the lowest 5 %, so that a video never moves when others are added,
    but the two lowest at least; with fewer videos the last fifth of every clip that is long enough for both parts, or else
    one whole clip.
    """
    videos = sorted({clip.video for clip in clips}, key=text_hash)
    if len(videos) >= ENOUGH_VIDEOS:
        held = {video for video in videos if int(text_hash(video), 16) < HELD_OUT_SHARE * 16 ** len(text_hash(video))}
        held |= set(videos[:2])
        return [c for c in clips if c.video not in held], [c for c in clips if c.video in held]
    train, validation = [], []
    for clip in clips:
        tail = max(round(clip.num_ticks * HELD_OUT_TAIL), window)
        if clip.num_ticks - tail >= window:
            train.append(clip.part(0, clip.num_ticks - tail))
            validation.append(clip.part(clip.num_ticks - tail, clip.num_ticks))
        else:
            train.append(clip)
    if not validation and len(clips) > 1:
        held = min(clips, key=lambda clip: text_hash(clip.name))
        return [clip for clip in clips if clip is not held], [held]
    return train, validation
