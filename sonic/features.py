"""A video's audio features in the cache, heard stretch by stretch, so that a long sound is never in memory as a whole.

CACHE/features/EXTRACTOR/VIDEO-HASH.safetensors
    features [2 * ticks, layers, width], fp16
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from sonic.config import FEATURES_PER_TICK, SAMPLES_PER_TICK, UserError
from sonic.files import whole_file
from sonic.sound import scan_audio
from sonic.track_cache import make_folder, told

HEADER = 128  # bytes of JSON in front of the features, which the format lets end in spaces


def features_fit(path: Path, extractor, num_ticks: int) -> bool:
    """Whether a cached file holds this extractor's features for at least so many ticks; only its header is read."""
    if not path.exists():
        return False
    try:
        with safe_open(path, "np") as file:
            features = file.get_slice("features")
            length, *rest = features.get_shape()
            kind = features.get_dtype()
    except (SafetensorError, OSError, ValueError):  # damaged, another tensor's file, a single number
        return False
    whole = length % FEATURES_PER_TICK == 0 and length >= FEATURES_PER_TICK * num_ticks
    return whole and rest == [extractor.layers, extractor.width] and kind == "F16"


def make_features(video: Path, extractor, num_ticks: int, path: Path) -> None:
    """Writes the features of a video's sound, whole or not at all.

    UserError: it has no sound, or less than the num_ticks it was measured at; the features are not what the extractor
    promises; the file cannot be written.
    """
    from sonic.audio import check_features  # here, because it brings torch, which worker processes do without

    make_folder(path.parent)
    length = 0

    def write(content: bytes, mode: str) -> None:
        with told(path), partial.open(mode) as file:
            file.write(content)

    with whole_file(path) as partial:
        write(bytes(8 + HEADER), "wb")  # the length is not known yet
        for speech in stretches(scan_audio(video), getattr(extractor, "stretch", None)):
            features = check_features(extractor(speech), extractor, len(speech))
            write(features.half().cpu().contiguous().numpy().tobytes(), "ab")
            length += len(features)
        if length < FEATURES_PER_TICK * num_ticks:
            raise UserError(f"{video} has less sound than before: it was changed while it was prepared, try again.")
        write(_header([length, extractor.layers, extractor.width]), "r+b")


def stretches(blocks: Iterator[np.ndarray], length: int | None) -> Iterator[np.ndarray]:
    """A sound that comes in blocks as stretches of `length` samples, the last one shorter; as one with None.

    What fills no tick at the end is left away.
    """
    pending: list[np.ndarray] = []
    heard = 0
    for block in blocks:
        pending.append(block)
        heard += len(block)
        while length and heard >= length:
            sound = np.concatenate(pending)
            yield sound[:length]
            pending, heard = [sound[length:]], heard - length
    if heard >= SAMPLES_PER_TICK:
        yield np.concatenate(pending)


def _header(shape: list[int]) -> bytes:
    """How a safetensors file of fp16 `features` begins."""
    facts = {"features": {"dtype": "F16", "shape": shape, "data_offsets": [0, 2 * math.prod(shape)]}}
    return struct.pack("<Q", HEADER) + json.dumps(facts).encode().ljust(HEADER)
