"""Pieces of videos: what each was measured at, whether it is kept, and the thresholds that decide it.

A piece is one person's unbroken stretch of one video, or, where nothing of a file can be used, the whole file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from sonic.config import TICK_RATE, UserError
from sonic.flags import Checked, flag, number, one_of

STEPS = ("probe", "shots", "faces", "picture", "sound", "sync", "motion", "crop")

HEADING = "screening: which pieces of the videos are used (docs/data.md)"  # heading of --help

SHARE = number(float, low=0, high=1)
LEVEL = number(float, low=0, high=255)
SIZE = number(float, low=0)


@dataclass(frozen=True)
class Piece:
    """One piece, kept or dropped. Times are ticks of 1/25 s on the video's own clock."""

    video: str  # path below data_root
    start: int  # first tick
    num_ticks: int  # 0 for a file that could not be looked at
    kept: bool
    step: str | None = None  # of STEPS: what dropped it, or would have without keep_all; None for a good piece
    reason: str | None = None  # one sentence, for a piece with a step
    measure: str | None = (
        None  # the name in `numbers` of what dropped it; None where nothing is measured (a broken file)
    )
    measured: float | None = None
    threshold: float | None = None
    numbers: dict[str, float] = field(default_factory=dict)  # everything that was measured; see docs/data.md
    entry: str = ""  # name of the video's entry in the cache, "" where it has none

    @property
    def seconds(self) -> float:
        return self.num_ticks / TICK_RATE

    def to_json(self) -> dict:
        """What json can hold: numbers that are none (NaN) are None."""
        facts = asdict(self)
        facts["numbers"] = {name: _or_none(value) for name, value in self.numbers.items()}
        return facts | {name: _or_none(facts[name]) for name in ("measured", "threshold")}

    @classmethod
    def from_json(cls, facts: dict) -> Piece:
        """The piece that `to_json` wrote. Entries it does not know are left out. TypeError: one it needs is missing."""
        known = {one.name for one in fields(cls)}
        return cls(**{name: value for name, value in facts.items() if name in known})


def _or_none(value: float | None) -> float | None:
    return value if value is None or math.isfinite(value) else None


@dataclass(frozen=True)
class Screening(Checked):
    """What a piece must be to be trained on. `keep_all` only says what would have been dropped."""

    min_seconds: float = flag(
        3.0,
        "shortest piece; a file that is shorter itself is taken as cut already: three quarters of it will do",
        SIZE,
        group=HEADING,
    )
    max_seconds: float = flag(30.0, "longest piece; what is longer is cut into equal parts", number(float, above=0))
    shot_threshold: float = flag(
        27.0, "PySceneDetect's content value (0 to 255) from which a change of picture is a cut", LEVEL
    )
    min_face: float = flag(64.0, "smallest face, in pixels of the video between chin and hairline", SIZE)
    max_second_face: float = flag(0.6, "size of another face, as a share of the speaker's, that is too much", SIZE)
    max_yaw: float = flag(40.0, "degrees that a head may be turned to the side", number(float, low=0, high=90))
    max_outside: float = flag(0.05, "share of the face that may lie outside the picture", SHARE)
    min_sharpness: float = flag(0.02, "sharpness of the face; lower is blurred (docs/data.md)", SIZE)
    min_brightness: float = flag(30.0, "mean brightness of the face, 0 to 255; darker is underexposed", LEVEL)
    max_brightness: float = flag(230.0, "the same; brighter is overexposed", LEVEL)
    min_expression: float = flag(
        15.0, "expression bucket of the whole piece; below it the face is a photograph with a voice-over", SIZE
    )
    min_level: float = flag(-50.0, "level of the sound in dBFS", number(float, high=0))
    max_clipping: float = flag(0.01, "share of the sound's ticks that hold clipped samples in a row", SHARE)
    min_swing: float = flag(
        6.0, "decibels between the loudest and the quietest speech band levels: noise has few", SIZE
    )
    min_speech: float = flag(0.3, "share of ticks in which somebody speaks", SHARE)
    max_music: float = flag(
        0.3, "share of ticks within a second of sound whose tones stand still, as those of music do", SHARE
    )
    min_sync_r: float = flag(0.2, "correlation of mouth and speech at the best offset", SHARE)
    min_sync_confidence: float = flag(0.15, "how far that correlation stands out from those at other offsets", SIZE)
    min_sync_seconds: float = flag(
        8.0, "pieces that are shorter tell too little to be dropped for their sync: chance alone reaches 0.3", SIZE
    )
    syncnet_path: str | None = flag(
        None,
        "SyncNet's released weights, syncnet_v2.model: its offset and confidence decide instead of the three above",
    )
    min_syncnet_confidence: float = flag(
        3.0, "SyncNet's confidence below which a mouth does not follow its sound", SIZE
    )
    max_motion_bucket: float = flag(128.0, "windows with more motion are not sampled", SIZE)
    max_path: float = flag(
        1.0, "sides of the largest square of the picture that the face may go through in a piece", SIZE
    )
    crop: str = flag(
        "face",
        "face trains on a square around the face, none on the largest square of the picture",
        one_of("face", "none"),
    )
    crop_expand: float = flag(0.5, "margin of that square on each side, in face sizes (released: 0.5)", SIZE)
    keep_all: bool = flag(False, "drop nothing that has a face and sound, only write down what is wrong with it")

    def __post_init__(self):
        super().__post_init__()
        for low, high in (("min_seconds", "max_seconds"), ("min_brightness", "max_brightness")):
            if getattr(self, low) > getattr(self, high):
                raise UserError(f"{low} is above {high}: no piece could be kept, lower it")


def read_pieces(path: Path) -> list[Piece]:
    """The pieces in a cache's prepared.json. UserError: there is none, or an old or broken one."""
    try:
        return [Piece.from_json(facts) for facts in json.loads(Path(path).read_text())["pieces"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not a list of prepared videos: run python -m sonic.prepare first") from error


def by_step(pieces: Sequence[Piece]) -> dict[str, int]:
    """How many pieces were dropped (or annotated) at each step, in the order of the steps."""
    return {step: sum(piece.step == step for piece in pieces) for step in STEPS}
