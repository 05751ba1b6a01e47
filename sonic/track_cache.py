"""The cache of measurements: one safetensors file per video, whole or not at all, checked before it is believed.

CACHE/tracks/VIDEO-HASH.safetensors
    N.boxes [T, 4] and N.landmarks [T, 68, 2] of the N-th track, and the curves of `measuring`; the rest as JSON
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from sonic.config import UserError
from sonic.files import whole_file
from sonic.measuring import CURVES, Measured, curve_length

VERSION = 2  # of measurements; raise it when they would come out otherwise, and cached ones are made anew


def text_hash(text: str) -> str:
    """Of names, which may hold bytes that are no text."""
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


def entry_key(path: Path, name: str) -> str:
    """The cache entry's name: readable, and another one when the file or this code's results change."""
    status = path.stat()
    readable = re.sub(r"[^A-Za-z0-9._-]+", "_", Path(name).stem)[:40]
    return f"{readable}-{text_hash(f'{name}|{status.st_size}|{status.st_mtime_ns}|{VERSION}')[:16]}"


def make_folder(folder: Path) -> None:
    """UserError: it cannot be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder} cannot be made ({error.strerror}): give another --cache_dir.") from error


@contextmanager
def told(path: Path) -> Iterator[None]:
    """Makes a failure to write a file, in the block, a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}): give another --cache_dir.") from error


def write_whole(path: Path, content: bytes) -> None:
    """Whole or not at all, also when two runs write the same file. UserError: it cannot be written."""
    with told(path), whole_file(path) as partial:
        partial.write_bytes(content)


def save_measured(measured: Measured, entry: Path) -> None:
    """Writes a measurement to its place in the cache."""
    tensors = dict(measured.curves)
    for number, (_, boxes, landmarks) in enumerate(measured.tracks):
        tensors |= {f"{number}.boxes": boxes, f"{number}.landmarks": landmarks}
    names = ("reason", "width", "height", "num_ticks", "facts")
    facts = {name: getattr(measured, name) for name in names} | {"starts": [start for start, _, _ in measured.tracks]}
    tensors = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    write_whole(entry, save(tensors, metadata={"video": json.dumps(facts)}))


def load_measured(entry: Path) -> Measured | None:
    """A cached measurement, or None where there is none, or one that is damaged or not ours: it is made again."""
    if not entry.exists():
        return None
    try:
        with safe_open(entry, "np") as file:
            facts = json.loads(file.metadata()["video"])
            tracks = [
                (int(start), file.get_tensor(f"{n}.boxes"), file.get_tensor(f"{n}.landmarks"))
                for n, start in enumerate(facts["starts"])
            ]
            curves = {name: file.get_tensor(name) for name in CURVES} if tracks else {}
        sizes = [int(facts[name]) for name in ("width", "height", "num_ticks")]
        measured = Measured(facts["reason"], *sizes, dict(facts["facts"]), tracks, curves, key=entry.stem)
    # No metadata at all is a TypeError, a missing entry a KeyError, bad JSON a ValueError.
    except (SafetensorError, OSError, KeyError, TypeError, ValueError):
        return None
    return measured if _plausible(measured) else None


def _plausible(measured: Measured) -> bool:
    """Whether a result read from the cache is one that `measure` can have given."""
    if measured.reason is not None:
        return isinstance(measured.reason, str) and not measured.tracks
    if not measured.tracks or min(measured.width, measured.height) < 1:
        return False
    whole_curves = all(
        curve.shape == (curve_length(name, measured.num_ticks), *([columns] if columns else []))
        and curve.dtype == np.float16
        for name, (_, columns) in CURVES.items()
        for curve in [measured.curves[name]]
    )
    return whole_curves and all(
        start >= 0
        and 0 < len(boxes) <= measured.num_ticks - start
        and boxes.shape == (len(boxes), 4)
        and landmarks.shape == (len(boxes), 68, 2)
        and boxes.dtype == landmarks.dtype == np.float32
        for start, boxes, landmarks in measured.tracks
    )
