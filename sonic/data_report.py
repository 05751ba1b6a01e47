"""What a preparation kept and dropped, for a person: report.html, one page without a server, and report.json.

Numbers come from the pieces' records alone; pictures and curves of the examples are read from the videos.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import av
import cv2
import numpy as np
from tqdm import tqdm

from sonic.config import UserError
from sonic.judging import speech_curve
from sonic.measuring import Measured
from sonic.media import VideoReader
from sonic.motion import mouth_opening
from sonic.pieces import STEPS, Piece, Screening
from sonic.report_page import page
from sonic.track_cache import load_measured, make_folder, write_whole
from sonic.workers import in_workers

EXAMPLES = 50  # of kept pieces, and as many of dropped ones
MANY = 10  # examples whose drawing takes longer than the start of processes
PICTURES = 6  # of an example
PICTURE_SIDE = 144  # pixels, the longer one
JPEG_QUALITY = 70
SHORTEST_CURVE = 5  # ticks; the speech's is smoothed over three
CURVE_POINTS = 200  # of an example's curves; more would not be seen
BINS = 24

# What is drawn first, in this order, with what it is called; whatever else was measured follows under its own name.
MEASURES = {
    "seconds": "duration (s)",
    "face_size": "face size (pixels)",
    "sync_offset": "sync offset (ticks of 1/25 s)",
    "sync_confidence": "sync confidence",
    "sync_r": "correlation of mouth and speech",
    "translation_bucket": "translation bucket",
    "expression_bucket": "expression bucket",
}


@dataclass(frozen=True)
class Example:
    """A piece that is shown: a strip of pictures as JPEG, and two curves over its time, each None where there is none."""

    piece: Piece
    strip: bytes | None = None
    width: int = 0  # of the strip in pixels
    mouth: list[float] | None = None  # opening in distances between the eyes
    speech: list[float] | None = None  # energy in 0..1
    trouble: str | None = None  # why there is nothing to see


# -------------------------------------------------------------------------------------------------------------- numbers


def summary(pieces: Sequence[Piece], screening: Screening) -> dict:
    """Counts, steps and histograms of a preparation, as report.json has them."""
    kept = [piece for piece in pieces if piece.kept]
    dropped = [piece for piece in pieces if not piece.kept]
    return {
        "videos": len({piece.video for piece in pieces}),
        "videos_used": len({piece.video for piece in kept}),
        "kept": {"pieces": len(kept), "seconds": _seconds(kept)},
        "dropped": {"pieces": len(dropped), "seconds": _seconds(dropped)},
        "annotated": sum(piece.step is not None for piece in kept),  # by --keep_all: kept in spite of a step
        "steps": {step: _step([piece for piece in pieces if piece.step == step]) for step in STEPS},
        "histograms": {name: histogram(name, pieces) for name in _measures(pieces)},
        "thresholds": asdict(screening),
    }


def _seconds(pieces: Sequence[Piece]) -> float:
    return round(sum(piece.seconds for piece in pieces), 2)


def _step(pieces: Sequence[Piece]) -> dict:
    return {"pieces": len(pieces), "seconds": _seconds(pieces), "kept": sum(piece.kept for piece in pieces)}


def _measures(pieces: Sequence[Piece]) -> list[str]:
    measured = {name for piece in pieces for name in piece.numbers} - MEASURES.keys()
    return [*MEASURES, *sorted(measured)]


def _value(name: str, piece: Piece) -> float | None:
    """What a piece was measured at; None if it was not, or at nothing that is a number."""
    value = (piece.seconds or None) if name == "seconds" else piece.numbers.get(name)
    return value if value is not None and math.isfinite(value) else None


def histogram(name: str, pieces: Sequence[Piece]) -> dict:
    """Smallest and largest value, edges [bins + 1], pieces kept and dropped in each bin, thresholds."""
    values = [(_value(name, piece), piece.kept) for piece in pieces]
    known = np.array([value for value, _ in values if value is not None])
    if not known.size:
        return {"range": [], "edges": [], "kept": [], "dropped": [], "thresholds": [], "unmeasured": len(values)}
    low, high = float(known.min()), float(known.max())
    whole = bool((known == np.round(known)).all()) and high - low < BINS
    ends = (low, high) if high > low else (low, low + 1)
    edges = np.arange(low, high + 2) - 0.5 if whole else np.linspace(*ends, BINS + 1)  # ticks: one bar each
    counts = [
        np.histogram([value for value, kept in values if value is not None and kept is side], edges)[0].tolist()
        for side in (True, False)
    ]
    thresholds = {piece.threshold for piece in pieces if piece.measure == name and piece.threshold is not None}
    return {
        "range": [low, high],
        "edges": [float(f"{edge:.6g}") for edge in edges],
        "kept": counts[0],
        "dropped": counts[1],
        "thresholds": sorted(thresholds),
        "unmeasured": len(values) - len(known),
    }


def choose(pieces: Sequence[Piece], count: int = EXAMPLES) -> list[Piece]:
    """`count` pieces at random, the same ones for the same pieces, in their order."""
    numbers = sorted(random.Random(0).sample(range(len(pieces)), min(count, len(pieces))))
    return [pieces[number] for number in numbers]


# ------------------------------------------------------------------------------------------------------------- examples


def example(piece: Piece, data_root: Path, measured: Measured | None) -> Example:
    """What of a piece can be seen and heard. Whatever is wrong with its file is told in place of it."""
    shown = Example(piece)
    if piece.num_ticks == 0:
        return replace(shown, trouble=piece.reason or "nothing could be read")
    boxes, landmarks = _track(piece, measured)
    if landmarks is not None:
        shown = replace(shown, mouth=_thinned(mouth_opening(landmarks)))
    if measured is not None and "speech" in measured.curves and piece.num_ticks >= SHORTEST_CURVE:
        shown = replace(shown, speech=_thinned(speech_curve(measured, piece.start, piece.start + piece.num_ticks)))
    try:
        strip = _strip(piece, data_root / piece.video, boxes)
        shown = replace(shown, strip=_jpeg(strip), width=strip.shape[1])
    # The pieces that are shown are also those that were dropped because their files are broken.
    except (UserError, av.error.FFmpegError, OSError, ValueError, IndexError, MemoryError) as error:
        path = str((data_root / piece.video).absolute())
        return replace(shown, trouble=str(error).removeprefix(path).lstrip(" :") or type(error).__name__)
    return shown


def _track(piece: Piece, measured: Measured | None) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Boxes [T, 4] and landmarks [T, 68, 2] over a piece, if a face was followed all through it."""
    for start, boxes, landmarks in measured.tracks if measured else ():
        first = piece.start - start
        if first >= 0 and first + piece.num_ticks <= len(boxes):
            return boxes[first : first + piece.num_ticks], landmarks[first : first + piece.num_ticks]
    return None, None


def _strip(piece: Piece, path: Path, boxes: np.ndarray | None) -> np.ndarray:
    """Pictures of a piece side by side, uint8 RGB [h, PICTURES * w, 3], with the face's box drawn in."""
    ticks = np.linspace(0, piece.num_ticks - 1, PICTURES).round().astype(int)
    pictures = {}
    with VideoReader(path) as reader:
        scale = PICTURE_SIDE / max(reader.info.width, reader.info.height)
        for tick, picture in reader.frames(piece.start + ticks, max_side=PICTURE_SIDE):
            picture = picture.copy()
            tick -= piece.start
            if boxes is not None:
                x0, y0, x1, y1 = (round(float(value) * min(scale, 1)) for value in boxes[tick])
                cv2.rectangle(picture, (x0, y0), (x1, y1), (255, 255, 255), 1)
            pictures[tick] = picture
    return np.hstack([pictures[int(tick)] for tick in ticks])


def _jpeg(picture: np.ndarray) -> bytes:
    _, encoded = cv2.imencode(".jpg", picture[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
    return encoded.tobytes()


def _thinned(curve: np.ndarray) -> list[float]:
    """A curve with no more points than can be seen; the peaks stay."""
    if not len(curve):
        return []
    pieces = np.array_split(np.nan_to_num(np.asarray(curve, dtype=float)), min(len(curve), CURVE_POINTS))
    return [round(float(piece.max()), 3) for piece in pieces]


# ---------------------------------------------------------------------------------------------------------------- files


def write_report(
    pieces: Sequence[Piece], screening: Screening, data_root, cache_dir, num_workers: int = 0, progress: bool = True
) -> Path:
    """Writes report.html and report.json into the cache's folder, each whole or not at all; gives the page's path."""
    data_root, folder = Path(data_root), Path(cache_dir)
    make_folder(folder)
    numbers = summary(pieces, screening)
    sides = {
        "kept": choose([piece for piece in pieces if piece.kept]),
        "dropped": choose([piece for piece in pieces if not piece.kept]),
    }
    examples = _examples(sides, data_root, folder / "tracks", num_workers, progress)
    listed = ("video", "start", "seconds", "kept", "step", "reason", "measure", "measured", "threshold")
    left_out = [piece for piece in pieces if piece.step is not None]
    rows = [{name: (piece.to_json() | {"seconds": piece.seconds})[name] for name in listed} for piece in left_out]
    shown = {name: [[one.piece.video, one.piece.start] for one in some] for name, some in examples.items()}
    content = json.dumps(numbers | {"dropped_pieces": rows, "examples": shown}, indent=1) + "\n"
    write_whole(folder / "report.json", content.encode())
    names = MEASURES | {name: name for name in numbers["histograms"] if name not in MEASURES}
    write_whole(folder / "report.html", page(numbers, names, left_out, examples, str(data_root)).encode())
    return folder / "report.html"


def _examples(
    sides: dict[str, list[Piece]], data_root: Path, tracks: Path, num_workers: int, progress: bool
) -> dict[str, list[Example]]:
    """The examples of each side, in the order of its pieces. A file that kills the process that draws it is told as well."""
    chosen = [piece for some in sides.values() for piece in some]
    shown = [Example(piece, trouble="killed the process that drew it") for piece in chosen]
    tasks = [(piece, data_root, tracks) for piece in chosen]
    helpers = num_workers if sum(piece.num_ticks > 0 for piece in chosen) >= MANY else 0
    with tqdm(total=len(chosen), desc="report", unit="piece", disable=None if progress else True) as bar:
        for number, drawn, _ in in_workers(_draw, tasks, helpers):
            shown[number] = drawn or shown[number]
            bar.update()
    return {side: [shown.pop(0) for _ in some] for side, some in sides.items()}


def _draw(piece: Piece, data_root: Path, tracks: Path) -> Example:
    """A worker's task."""
    measured = load_measured(tracks / f"{piece.entry}.safetensors") if piece.entry and piece.num_ticks else None
    return example(piece, data_root, measured)
