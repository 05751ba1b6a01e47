"""Measurements and thresholds to pieces, kept or dropped: pure functions, so that another threshold costs no measuring.

A track of a face is cut at shots and where a face is unfit; what is left is measured as a whole and goes through the checks
in the order of the steps. The first that it does not pass is the piece's reason.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from scipy.ndimage import uniform_filter1d

from sonic.config import TICK_RATE
from sonic.faces import union_box
from sonic.measuring import LOOK_EVERY, SECOND_EVERY, SILENCE, Measured
from sonic.motion import head_yaw, mouth_opening, window_buckets
from sonic.pieces import Piece, Screening
from sonic.sync import POINT_RATE, SILENT, at_syllable_rate, at_ticks, compare_curves, levels_energy

WHOLE_FILE = 0.75  # share of a file that is shorter than min_seconds, which makes a piece all the same
FORGIVEN = 5  # ticks; landmarks err for a moment, and no head turns there and back so fast
MUSIC_LINES = 0.4  # mean standing of tones over a second: a voice has 0.1, notes have 0.6 (docs/data.md)
SECTION = 2 * TICK_RATE  # ticks of a section that has to have the offset of the whole piece; two of them at least
MOST_SECTIONS = 6
AGREEMENT = 0.75  # share of the sections that must do so, to a tick
# Foreign sound reaches a best correlation of 4.8 to 6.1 over the root of the number of ticks (95 % of some 250 pairs each of
# 3 to 10 s, out of two recorded people): only about there is an offset believed.
CHANCE_R = 6.0
BORDER_INSIDE = 0.02  # share of the face that a border may seem to cover; beyond it, it is none


@dataclass(frozen=True)
class Check:
    """One number against one threshold, whose name tells the direction: min_ or max_."""

    step: str
    measure: str
    flag: str
    fault: str  # the reason's first words

    def fails(self, value: float, screening: Screening) -> bool:
        threshold = getattr(screening, self.flag)
        return value < threshold if self.flag.startswith("min_") else value > threshold  # NaN fails neither

    def reason(self, value: float, screening: Screening) -> str:
        wanted = "needs" if self.flag.startswith("min_") else "at most"
        return f"{self.fault}: {self.measure} {value:.3g}, {wanted} {getattr(screening, self.flag):g} (--{self.flag})"


# In the order in which a tick's fault is named.
FACE_CHECKS = (
    Check("faces", "face_size", "min_face", "the face is too small"),
    Check("faces", "outside", "max_outside", "the face leaves the picture"),
    Check("faces", "yaw", "max_yaw", "the head is turned away"),
    Check("faces", "second_face", "max_second_face", "there is another face of comparable size"),
)
PIECE_CHECKS = (
    Check("picture", "brightness", "min_brightness", "the face is underexposed"),
    Check("picture", "brightness", "max_brightness", "the face is overexposed"),
    Check("picture", "sharpness", "min_sharpness", "the face is blurred"),
    Check("picture", "expression", "min_expression", "the face does not move, as in a photograph"),
    Check("sound", "level", "min_level", "the sound is too quiet"),
    Check("sound", "clipping", "max_clipping", "the sound is cut off at full scale"),
    Check("sound", "swing", "min_swing", "the sound is as even as noise"),
    Check("sound", "speech", "min_speech", "hardly anybody speaks"),
    Check("sound", "music", "max_music", "the sound is like music"),
    Check("sync", "sync_r", "min_sync_r", "the mouth does not follow the sound"),
    Check(
        "sync", "sync_confidence", "min_sync_confidence", "the mouth follows the sound at no offset more than at others"
    ),
    Check("sync", "syncnet_confidence", "min_syncnet_confidence", "SyncNet hears no sync"),
    Check("motion", "calmest_bucket", "max_motion_bucket", "every window moves too much"),
    Check("crop", "path", "max_path", "the face goes farther than a square of the picture reaches"),
)


# SyncNet's offset in ticks and confidence of a video's ticks [start, end), with the face's boxes [T, 4].
SyncNetOf = Callable[[int, int, np.ndarray], tuple[float, float]]


def judge(
    video: str, measured: Measured, screening: Screening, needed: int, syncnet: SyncNetOf | None = None
) -> list[Piece]:
    """All pieces of a video, kept and dropped, in order. `needed`: the fewest ticks that training can use.

    syncnet: takes the place of our own measure of sync, and is asked only where nothing else drops a piece before.
    """
    if measured.reason is not None:
        step = "faces" if measured.num_ticks else "sound" if measured.reason.startswith("silent") else "probe"
        return [Piece(video, 0, measured.num_ticks, False, step, measured.reason, entry=measured.key)]
    shortest = _shortest(measured, screening, needed)
    pieces = []
    for track in measured.tracks:
        for start, end, check in _cut(measured, track, screening):
            pieces += _pieces(video, measured, track, (start, end), check, screening, shortest, needed, syncnet)
    pieces += _faceless(video, measured, screening, shortest)
    return sorted(pieces, key=lambda piece: piece.start)


def _shortest(measured: Measured, screening: Screening, needed: int) -> int:
    """Ticks of the shortest piece of this video."""
    wanted = math.ceil(screening.min_seconds * TICK_RATE)
    if measured.num_ticks < wanted:  # whoever gives so short a file has cut it already
        wanted = math.ceil(WHOLE_FILE * measured.num_ticks)
    return max(wanted, needed)


# ---------------------------------------------------------------------------------------------------- where it is cut


def _cut(measured: Measured, track: tuple, screening: Screening) -> Iterator[tuple[int, int, Check | None]]:
    """(start, end, the check that fails all through) of a track's stretches, on the video's clock."""
    start, boxes, _ = track
    values = _face_values(measured, track)
    faults = np.zeros(len(boxes), np.int8)  # number of the check that fails, counted from 1
    for number, check in reversed(list(enumerate(FACE_CHECKS, 1))):
        threshold = getattr(screening, check.flag)
        curve = values[check.measure]
        failed = curve < threshold if check.flag.startswith("min_") else curve > threshold
        for low, high in _runs(failed):
            if failed[low] and (high - low >= FORGIVEN or high - low == len(failed)):
                faults[low:high] = number
    shots = np.flatnonzero(measured.curves["shot"][start + 1 : start + len(boxes)] >= screening.shot_threshold) + 1
    edges = sorted({0, len(boxes), *shots.tolist(), *(low for low, _ in _runs(faults))})
    for low, high in pairwise(edges):
        fault = int(faults[low])
        yield start + low, start + high, FACE_CHECKS[fault - 1] if fault else None


def _runs(values: np.ndarray) -> list[tuple[int, int]]:
    """(first, end) of the stretches of equal values."""
    edges = [0, *(np.flatnonzero(values[1:] != values[:-1]) + 1).tolist(), len(values)]
    return list(pairwise(edges))


def _face_values(measured: Measured, track: tuple) -> dict[str, np.ndarray]:
    """What the face checks look at, for each tick of a track."""
    start, boxes, landmarks = track
    low, high = landmarks.min(axis=1), landmarks.max(axis=1)  # without the forehead, which is an estimate
    limit = np.array([measured.width, measured.height])
    seen = np.clip(np.minimum(high, limit) - np.maximum(low, 0), 0, None)
    ticks = np.arange(start, start + len(boxes))
    # Seen once a second, and so for the half second on both sides.
    nearest = np.minimum((ticks + SECOND_EVERY // 2) // SECOND_EVERY, len(measured.curves["second_face"]) - 1)
    return {
        "face_size": boxes[:, 3] - boxes[:, 1],
        "outside": 1 - seen.prod(axis=1) / np.maximum((high - low).prod(axis=1), 1),
        "yaw": np.abs(head_yaw(landmarks)),
        "second_face": measured.curves["second_face"][nearest].astype(float),
    }


def _faceless(video: str, measured: Measured, screening: Screening, shortest: int) -> list[Piece]:
    """The stretches without a face that are long enough to be missed."""
    edges = [
        0,
        *(edge for start, boxes, _ in measured.tracks for edge in (start, start + len(boxes))),
        measured.num_ticks,
    ]
    gaps = [(low, high) for low, high in zip(edges[::2], edges[1::2], strict=True) if high - low >= shortest]
    settings = ("faces", "no face found", "face_size", 0.0, screening.min_face)
    return [Piece(video, low, high - low, False, *settings, entry=measured.key) for low, high in gaps]


# ---------------------------------------------------------------------------------------------------- what it is worth


def _pieces(
    video: str,
    measured: Measured,
    track: tuple,
    stretch: tuple[int, int],
    check: Check | None,
    screening: Screening,
    shortest: int,
    needed: int,
    syncnet: SyncNetOf | None,
) -> Iterator[Piece]:
    """The pieces of one stretch: measured, then judged."""
    start, end = stretch
    if end - start < shortest:
        reason = f"too short: {end - start} ticks with a face and sound, needs {shortest} ({TICK_RATE} per second)"
        facts = ("shots", reason, "seconds", (end - start) / TICK_RATE, shortest / TICK_RATE)
        yield Piece(video, start, end - start, screening.keep_all and end - start >= needed, *facts, entry=measured.key)
        return
    parts = math.ceil((end - start) / max(screening.max_seconds * TICK_RATE, needed))
    bounds = np.linspace(start, end, parts + 1).round().astype(int).tolist()
    for low, high in pairwise(bounds):
        numbers = measure_piece(measured, track, low, high, needed)
        if syncnet and not (
            check or any(_fails(one, numbers, screening) for one in PIECE_CHECKS if one.step != "sync")
        ):
            offset, confidence = syncnet(low, high, track[1][low - track[0] : high - track[0]])
            believed = confidence >= screening.min_syncnet_confidence
            numbers |= {"syncnet_offset": float(offset), "syncnet_confidence": round(confidence, 4)}
            numbers["sync_shift"] = float(offset) if believed else 0.0
        shift = int(numbers["sync_shift"])
        # Picture t is heard at t - shift, and both have to exist.
        low, high = max(low, shift), min(high, measured.num_ticks + shift)
        failed = check or next((one for one in PIECE_CHECKS if _fails(one, numbers, screening)), None)
        facts = ()
        if failed:
            value = numbers[failed.measure]
            facts = (
                failed.step,
                failed.reason(value, screening),
                failed.measure,
                value,
                getattr(screening, failed.flag),
            )
        kept = (failed is None or screening.keep_all) and high - low >= needed
        if not kept and not failed:
            reason = f"too short: {high - low} ticks are left when its sound is shifted, needs {needed}"
            facts = ("sync", reason, "seconds", (high - low) / TICK_RATE, needed / TICK_RATE)
        yield Piece(video, low, high - low, kept, *(facts or [None] * 5), numbers=numbers, entry=measured.key)


def _fails(check: Check, numbers: dict[str, float], screening: Screening) -> bool:
    if check.step == "sync":
        by_syncnet = check.measure == "syncnet_confidence"
        if by_syncnet != ("syncnet_confidence" in numbers):
            return False
        if not by_syncnet and (screening.syncnet_path or numbers["seconds"] < screening.min_sync_seconds):
            return False
    return check.fails(numbers[check.measure], screening)


def measure_piece(measured: Measured, track: tuple, start: int, end: int, window: int) -> dict[str, float]:
    """Every number of the piece [start, end) of a track; a window of `window` ticks is what training sees at once."""
    first, boxes, landmarks = track
    inside = slice(start - first, end - first)
    boxes, landmarks = boxes[inside], landmarks[inside]
    values = _face_values(measured, (start, boxes, landmarks))
    looks = slice(-(-start // LOOK_EVERY), max(-(-end // LOOK_EVERY), -(-start // LOOK_EVERY) + 1))
    numbers = {
        "seconds": (end - start) / TICK_RATE,
        "face_size": float(np.median(values["face_size"])),
        "outside": float(np.percentile(values["outside"], 95)),
        "yaw": float(np.percentile(values["yaw"], 95)),
        "second_face": _nan_of(np.max, values["second_face"]),
        "brightness": _nan_of(np.median, measured.curves["brightness"][looks]),
        "sharpness": _nan_of(np.median, measured.curves["sharpness"][looks]),
        **_motion_numbers(landmarks, window),
        **_sound_numbers(measured, start, end),
        **_sync_numbers(landmarks, speech_curve(measured, start, end)),
    }
    area = picture_area(measured, boxes, start, end)
    numbers |= {name: float(value) for name, value in zip(("left", "top", "right", "bottom"), area, strict=True)}
    union = union_box(boxes)
    numbers["path"] = float(max(union[2:] - union[:2]) / min(area[2] - area[0], area[3] - area[1]))
    return {name: round(value, 4) for name, value in numbers.items()}


def _nan_of(function, values: np.ndarray) -> float:
    """The function of the values that are numbers; NaN without any."""
    known = np.asarray(values, float)
    known = known[np.isfinite(known)]
    return float(function(known)) if len(known) else math.nan


def _motion_numbers(landmarks: np.ndarray, window: int) -> dict[str, float]:
    """Buckets, not cut off at 128: of the whole piece (expression), the median window, and the calmest one."""
    starts = range(0, max(len(landmarks) - window, 0) + 1, max(window // 2, 1))
    buckets = np.array([window_buckets(landmarks[start : start + window]) for start in starts])
    translation, expression = np.median(buckets, axis=0)
    return {
        "expression": float(window_buckets(landmarks)[1]),
        "translation_bucket": float(translation),
        "expression_bucket": float(expression),
        "calmest_bucket": float(buckets.max(axis=1).min()),
    }


def _sound_numbers(measured: Measured, start: int, end: int) -> dict[str, float]:
    curves = {name: measured.curves[name][start:end].astype(float) for name in ("level", "clipped", "lines")}
    per_tick = POINT_RATE // TICK_RATE
    octaves = measured.curves["speech"][start * per_tick : end * per_tick, 0].astype(float)
    low, high = np.percentile(octaves, [5, 95])
    heard = curves["level"] > SILENCE
    lines = uniform_filter1d(curves["lines"], TICK_RATE, mode="nearest")
    return {
        "level": float(10 * np.log10(max(np.mean(10 ** (curves["level"] / 10)), 1e-20))),
        "clipping": float(curves["clipped"].mean()),
        "swing": float(high - low),
        "speech": float((speech_curve(measured, start, end) > SILENT).mean()),
        "music": float((lines[heard] > MUSIC_LINES).mean()) if heard.any() else 0.0,
    }


def speech_curve(measured: Measured, start: int, end: int) -> np.ndarray:
    """`sync.speech_energy` of a video's ticks [start, end), [T]."""
    per_tick = POINT_RATE // TICK_RATE
    levels = measured.curves["speech"][start * per_tick : end * per_tick].astype(float)
    return at_ticks(levels_energy(levels), end - start)


def _sync_numbers(landmarks: np.ndarray, speech: np.ndarray) -> dict[str, float]:
    """How the mouth follows the speech: best correlation, its offset (ticks the mouth is late) and confidence, how many
    sections of the piece agree, and the shift that follows, 0 where the offset is not to be believed."""
    mouth, speech = at_syllable_rate(mouth_opening(landmarks)), at_syllable_rate(speech)
    whole = compare_curves(mouth, speech)
    count = min(max(len(mouth) // SECTION, 2), MOST_SECTIONS)
    sections = zip(np.array_split(mouth, count), np.array_split(speech, count), strict=True)
    offsets = np.array([compare_curves(*section).offset for section in sections])
    agreement = float((np.abs(offsets - whole.offset) <= 1).mean())  # NaN agrees with nothing
    believed = agreement >= AGREEMENT and whole.best_r > CHANCE_R / math.sqrt(len(mouth))
    return {
        "sync_r": whole.best_r,
        "sync_r_unshifted": whole.r,
        "sync_offset": whole.offset,
        "sync_confidence": whole.confidence,
        "sync_agreement": agreement,
        "sync_shift": whole.offset if believed else 0.0,
    }


def picture_area(measured: Measured, boxes: np.ndarray, start: int, end: int) -> tuple[int, int, int, int]:
    """The picture without burnt-in borders, x0, y0, x1, y1 in pixels; a border that reaches into the face is none."""
    seconds = slice(start // SECOND_EVERY, max(-(-end // SECOND_EVERY), start // SECOND_EVERY + 1))
    left, top, right, bottom = measured.curves["borders"][seconds].astype(float).min(axis=0)
    width, height = measured.width, measured.height
    area = (math.ceil(left * width), math.ceil(top * height), int(width - right * width), int(height - bottom * height))
    union = union_box(boxes)
    slack = BORDER_INSIDE * (union[2:] - union[:2])
    holds = (union[0] + slack[0] >= area[0] or not left) and (union[1] + slack[1] >= area[1] or not top)
    holds &= (union[2] - slack[0] <= area[2] or not right) and (union[3] - slack[1] <= area[3] or not bottom)
    return area if holds else (0, 0, width, height)
