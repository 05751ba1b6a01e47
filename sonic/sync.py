"""Mouth against speech: the curve of a speech's energy, and how well, how late and how surely a mouth follows a curve.

Axes: T frames, P points (one per 5 ms), n samples at 16 kHz.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from scipy.signal import butter, sosfiltfilt

from sonic.config import SAMPLE_RATE, TICK_RATE

POINT_RATE = 200  # Hz
HOP, WINDOW = SAMPLE_RATE // POINT_RATE, SAMPLE_RATE // 25  # samples: every 5 ms, 40 ms long
HERTZ = np.fft.rfftfreq(WINDOW, 1 / SAMPLE_RATE)
SPEECH_OCTAVES = (125, 250, 500, 1000, 2000, 4000)  # Hz, edges
# Anything under -60 dB is a recorder's noise, not a voice: without this, silence alone would open the mouth.
QUIETEST_SPEECH = -60
FLOOR, RANGE = 27, 30  # dB: energy is 0 so far under the speech level, and 1 so far above that
SMOOTHING = np.hanning(27)[1:-1]  # 25 points, 125 ms: what lips can follow

SILENT = 0.14  # energy, about 23 dB under the speech level, where a room's noise lies; under it nobody speaks
SILENCE = 0.2  # seconds; what is shorter is a closed lip's plosive, not a pause
SILENCE_MARGIN = 0.08  # seconds at both ends of a silence, in which a mouth may still be closing or open already

SYLLABLES = butter(2, (1, 8), "bandpass", fs=TICK_RATE, output="sos")  # Hz

MAX_OFFSET = 15  # frames
MIN_FRAMES = 10  # fewer pairs, or fewer than half of the clip's, say nothing about a correlation

# ------------------------------------------------------------------------------------------------------------- speech


def speech_energy(speech: np.ndarray, num_ticks: int, fps: float = TICK_RATE) -> np.ndarray:
    """Energy of speech [n] in the speech band, float32 [T] in 0 … 1 on a decibel scale, smoothed over 125 ms, no delay.

    The band's five octaves count alike (mean of their levels), so that an open vowel is more than a hum of the same power.
    0 at 27 dB under the clip's speech level (the 95th percentile) and below, 1 at 3 dB above it. Frame i is centred on
    sample (i + 0.5) 16000 / fps. It is the law by which puppets open their mouths (`puppets.speech_to_mouth`).
    """
    return at_ticks(band_energy(speech_power(speech, num_ticks, fps)), num_ticks, fps)


def speech_power(speech: np.ndarray, num_ticks: int, fps: float = TICK_RATE) -> np.ndarray:
    """Power spectra of speech [n] every 5 ms, [P, bins] at `HERTZ`; point k is centred on sample k * HOP."""
    # at least as long as the smoothing
    num_points = max(int(np.ceil(num_ticks / fps * POINT_RATE)) + 1, len(SMOOTHING))
    padded = np.zeros(num_points * HOP + WINDOW, np.float32)
    kept = speech[: len(padded) - WINDOW // 2]
    padded[WINDOW // 2 : WINDOW // 2 + len(kept)] = kept
    slices = np.lib.stride_tricks.sliding_window_view(padded, WINDOW)[::HOP][:num_points]
    return np.abs(np.fft.rfft(slices * np.hanning(WINDOW).astype(np.float32), axis=1)) ** 2 / WINDOW**2


def band_level(power: np.ndarray, low: float, high: float) -> np.ndarray:
    """Level in dB [P] of the band low … high Hz of power spectra [P, bins]."""
    return 10 * np.log10(power[:, (low <= HERTZ) & (high > HERTZ)].sum(axis=1) + 1e-12)


def band_energy(power: np.ndarray) -> np.ndarray:
    """Mean level of the speech band's octaves relative to the clip's speech level, [P] in 0 … 1; not smoothed."""
    return levels_energy(speech_levels(power))


def speech_levels(power: np.ndarray) -> np.ndarray:
    """What `band_energy` takes of power spectra [P, bins], in dB: mean level of the octaves, and that of the band, [P, 2]."""
    octaves = np.mean([band_level(power, *edges) for edges in pairwise(SPEECH_OCTAVES)], axis=0)
    return np.stack([octaves, band_level(power, SPEECH_OCTAVES[0], SPEECH_OCTAVES[-1])], axis=1)


def levels_energy(levels: np.ndarray) -> np.ndarray:
    """`band_energy` of the points whose `speech_levels` [P, 2] these are: any stretch of a longer sound."""
    level, loudest = levels[:, 0], np.percentile(levels[:, 1], 95)
    too_quiet = max(QUIETEST_SPEECH - loudest, 0)
    return np.clip((level - np.percentile(level, 95) - too_quiet + FLOOR) / RANGE, 0, 1)


def at_ticks(curve: np.ndarray, num_ticks: int, fps: float = TICK_RATE) -> np.ndarray:
    """A curve [P] smoothed symmetrically and read in the middle of each frame, float32 [T]."""
    smooth = np.convolve(curve, SMOOTHING / SMOOTHING.sum(), mode="same")
    ticks = (np.arange(num_ticks) + 0.5) / fps * POINT_RATE
    return np.interp(ticks, np.arange(len(curve)), smooth).astype(np.float32)


def silent_frames(energy: np.ndarray, fps: float = TICK_RATE) -> np.ndarray:
    """Where nobody speaks, bool [T]: stretches of 0.2 s in which `speech_energy` is below SILENT, less 0.08 s at both ends."""
    silent = np.zeros(len(energy), dtype=bool)
    edges = np.flatnonzero(np.diff(np.concatenate([[False], energy < SILENT, [False]])))
    margin = math.ceil(SILENCE_MARGIN * fps)
    for start, end in edges.reshape(-1, 2):
        if end - start >= SILENCE * fps:
            silent[start + margin : end - margin] = True
    return silent


# -------------------------------------------------------------------------------------------------------- two curves


@dataclass(frozen=True)
class Sync:
    """How a mouth's curve goes with another one. At an offset of k frames, frame t + k of the mouth meets frame t of the
    other: a positive offset says that the mouth comes late.

    A curve that stands still follows nothing: r is 0, and the offset NaN. Too few frames: everything is NaN.
    """

    r: float  # Pearson's correlation as it is, at offset 0
    offset: float  # frames, where the correlation is largest; a whole number
    best_r: float  # the correlation there
    confidence: float  # best_r less the median over all offsets; near 0 where no offset stands out
    r_by_offset: np.ndarray  # [31], at -15 … 15; NaN where less than half of the frames, or fewer than 10, meet


def at_syllable_rate(curve: np.ndarray) -> np.ndarray:
    """A curve [T] at 25 per second, its slow and its fast parts left out: what a turning head or a rising voice does over
    seconds says nothing about sync, and outweighs it in recorded people (docs/data.md). NaN stays where it is."""
    known = np.isfinite(curve)
    if known.sum() < MIN_FRAMES:
        return np.full(len(curve), np.nan)
    whole = np.interp(np.arange(len(curve)), np.flatnonzero(known), np.asarray(curve, float)[known])
    return np.where(known, sosfiltfilt(SYLLABLES, whole, padlen=min(15, len(whole) - 1)), np.nan)


def compare_curves(mouth: np.ndarray, other: np.ndarray) -> Sync:
    """A mouth's curve [T] (opening, width) against a speech's or a truth's [T]; frames where either is NaN are left out."""
    if len(mouth) != len(other):
        raise ValueError(f"two curves of one length are compared, not of {len(mouth)} and {len(other)} frames.")
    offsets = np.arange(-MAX_OFFSET, MAX_OFFSET + 1)
    rs = np.array([_correlation(mouth, other, offset) for offset in offsets])
    if np.isnan(rs).all():
        return Sync(np.nan, np.nan, np.nan, np.nan, rs)
    best = int(np.nanargmax(rs))
    offset = float(offsets[best]) if np.nanmax(np.abs(rs)) > 0 else np.nan
    confidence = float(rs[best] - np.nanmedian(rs))
    return Sync(float(rs[MAX_OFFSET]), offset, float(rs[best]), confidence, rs)


def _correlation(mouth: np.ndarray, other: np.ndarray, offset: int) -> float:
    """Pearson's r of mouth[t + offset] and other[t]; 0 if one stands still, NaN for too few pairs."""
    length = len(mouth) - abs(offset)
    if length < 1:
        return np.nan
    a = np.asarray(mouth, dtype=float)[max(offset, 0) :][:length]
    b = np.asarray(other, dtype=float)[max(-offset, 0) :][:length]
    both = np.isfinite(a) & np.isfinite(b)
    if both.sum() < max(MIN_FRAMES, len(mouth) / 2):
        return np.nan
    a, b = a[both], b[both]
    if any(np.ptp(curve) <= 1e-6 * np.abs(curve).max() for curve in (a, b)):
        return 0.0
    return float(np.corrcoef(a, b)[0, 1])
