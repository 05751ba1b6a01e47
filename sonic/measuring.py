"""One file's measurement: everything that decides over its pieces, read in one pass and judged elsewhere (`judging`).

Measuring takes most of a preparation's time and depends on no threshold, so that it is done once and kept (`track_cache`).
Neither a picture nor the sound is in memory as a whole. No torch here: this is what worker processes do.

Axes: T ticks (1/25 s) that have both picture and sound, P points of sound (1/200 s).
"""

from __future__ import annotations

import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import av
import cv2
import numpy as np
from scenedetect.detectors import ContentDetector
from scenedetect.stats_manager import StatsManager

from sonic.config import SAMPLE_RATE, SAMPLES_PER_TICK, UserError
from sonic.faces import FaceTrack, second_face, track_face
from sonic.media import VideoReader
from sonic.sound import scan_audio
from sonic.sync import HOP, speech_levels, speech_power

SILENCE = -60.0  # dBFS; below lies the hiss of an empty track
LOOK_EVERY = 5  # ticks between two looks at brightness and sharpness
SECOND_EVERY = 25  # ticks between two looks for another face, and for borders
SHOT_SIDE = (
    160  # pixels of the longer side, in which PySceneDetect compares pictures (it would shrink them to 256 itself)
)
LOOK_SIDE = 96  # pixels of a face whose sharpness is measured; smaller ones are not enlarged
BORDER_DARK = 24  # of 255; a burnt-in border is darker
BORDER_SPREAD = 8  # of 255; and as even
BORDER_BEHIND = (
    0.5  # share of the first line behind a border that is not dark: a dark room has a face there and no edge
)

STRETCH = 10 * SAMPLE_RATE  # samples that are measured at once; their spectra take 40 MB
CLIPPED, CLIPPED_SAMPLES = (
    0.98,
    7,
)  # full scale, and how many samples of a tick's 640 reach it only where they are cut off
LINES, LINE_HERTZ = 2048, (100, 4000)  # samples of a spectrum that shows single tones, and where they are looked for
LINES_SMOOTH = 31  # bins, 240 Hz: what is left when this is taken away are the tones
LINES_APART = 8  # ticks, 0.32 s: longer than a spoken vowel holds its pitch


@dataclass
class Measured:
    """What is known of one file: why it is no use, or its tracks and curves."""

    reason: str | None = None
    width: int = 0  # pixels as shown
    height: int = 0
    num_ticks: int = 0  # ticks that have both picture and sound
    facts: dict = field(default_factory=dict)  # of the container: fps, rotation, codec, seconds of picture and of sound
    tracks: list[tuple[int, np.ndarray, np.ndarray]] = field(default_factory=list)  # start, boxes, landmarks
    curves: dict[str, np.ndarray] = field(default_factory=dict)  # see CURVES
    key: str = ""  # of its entry in the cache


# Name -> (values per 1000 ticks, columns); 0 columns is a plain curve. All are float16.
CURVES = {
    "shot": (1000, 0),  # PySceneDetect's content value: change from the tick before, 0 to 255
    "brightness": (200, 0),  # mean of the face, 0 to 255; NaN without a face
    "sharpness": (200, 0),  # variance of the face's Laplacian over the face's own variance; NaN without a face
    "second_face": (40, 0),  # size of the largest other face as a share of the speaker's; NaN without a face
    "borders": (40, 4),  # left, top, right, bottom: share of width or height that is a dark border
    "level": (1000, 0),  # dBFS of each tick's sound
    "clipped": (1000, 0),  # 1 where the tick's sound is cut off at full scale
    "lines": (1000, 0),  # how much of the spectrum's tones have stood still for 0.32 s, -1 to 1; 0 in silence
    "speech": (8000, 2),  # `sync.speech_levels`, dB
}


def curve_length(name: str, num_ticks: int) -> int:
    """How many values a curve has for so many ticks."""
    return -(-num_ticks * CURVES[name][0] // 1000)


def measure(path: Path) -> Measured:
    """Opens, listens, watches. Whatever is wrong with the file becomes its reason; nothing else is caught."""
    try:
        before = path.stat()
        if not stat.S_ISREG(before.st_mode):
            return Measured(reason="no regular file (a pipe or a device): give a video file")
        measured = _measure(path)
        after = path.stat()
        if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
            return Measured(reason="changed while it was read: it is still being written, try again")
        return measured
    # The one place where a file's failure becomes a row of the table: what readers and decoders raise on bad files.
    except (UserError, av.error.FFmpegError, OSError, ValueError, MemoryError) as error:
        return Measured(reason=str(error).removeprefix(f"{Path(path).absolute()}").lstrip(" :") or type(error).__name__)


def _measure(path: Path) -> Measured:
    with VideoReader(path) as reader:
        info = reader.info
        if not info.has_audio:
            return Measured(reason="no audio stream")
        curves, sound_ticks = measure_sound(scan_audio(path))
        level = _mean_level(curves["level"])
        if level < SILENCE:
            return Measured(reason=f"silent ({level:.0f} dBFS, needs {SILENCE:.0f})")
        num_ticks = min(reader.num_ticks, sound_ticks)
        if num_ticks < 1:
            return Measured(reason="no sound to its pictures")
        watcher = PictureWatcher()
        tracks = [found for track in track_face(reader, watcher.see) if (found := _cut(track, num_ticks))]
        curves |= watcher.curves()
        curves = {
            name: np.asarray(curve[: curve_length(name, num_ticks)], np.float16) for name, curve in curves.items()
        }
        facts = {
            "fps": info.fps,
            "rotation": info.rotation,
            "codec": info.codec,
            "picture_seconds": info.duration,
            "sound_seconds": sound_ticks * SAMPLES_PER_TICK / SAMPLE_RATE,
        }
        if not tracks:
            return Measured("no face found", info.width, info.height, num_ticks, facts)
        return Measured(None, info.width, info.height, num_ticks, facts, tracks, curves)


def _cut(track: FaceTrack, num_ticks: int) -> tuple[int, np.ndarray, np.ndarray] | None:
    """What of a track has sound."""
    length = min(len(track.boxes), num_ticks - track.start)
    return (track.start, track.boxes[:length], track.landmarks[:length]) if length > 0 else None


def _mean_level(levels: np.ndarray) -> float:
    """The level in dBFS of ticks' levels together."""
    return float(10 * np.log10(max(np.mean(10 ** (np.asarray(levels, float) / 10)), 1e-20))) if len(levels) else -200.0


# ------------------------------------------------------------------------------------------------------------ pictures


class PictureWatcher:
    """Measures every tick's picture as it passes."""

    def __init__(self):
        self.detector = ContentDetector()
        self.detector.stats_manager = StatsManager()
        self.shot: list[float] = []
        self.looks: list[tuple[float, float]] = []
        self.second: list[float] = []
        self.borders: list[tuple[float, float, float, float]] = []

    def see(self, tick: int, picture: np.ndarray, landmarks: np.ndarray | None) -> None:
        """The next tick's uint8 RGB [h, w, 3] picture and the face in it, [68, 2], if there is one."""
        self.shot.append(self._content_value(picture))
        if tick % LOOK_EVERY == 0:
            self.looks.append((np.nan, np.nan) if landmarks is None else face_look(picture, landmarks))
        if tick % SECOND_EVERY == 0:
            self.second.append(np.nan if landmarks is None else second_face(picture, landmarks))
            self.borders.append(find_borders(picture))

    def _content_value(self, picture: np.ndarray) -> float:
        scale = SHOT_SIDE / max(picture.shape[:2])
        size = [max(1, round(side * scale)) for side in picture.shape[1::-1]]
        small = cv2.resize(picture, size, interpolation=cv2.INTER_AREA)
        # Always number 0, so that its statistics of a two-hour video do not pile up: only the value is wanted.
        self.detector.process_frame(0, cv2.cvtColor(small, cv2.COLOR_RGB2BGR))
        stats = self.detector.stats_manager
        known = stats.metrics_exist(0, ["content_val"])  # not for the very first picture
        return float(stats.get_metrics(0, ["content_val"])[0]) if known else 0.0

    def curves(self) -> dict[str, np.ndarray]:
        looks = np.array(self.looks).reshape(-1, 2)
        return {
            "shot": np.array(self.shot),
            "brightness": looks[:, 0],
            "sharpness": looks[:, 1],
            "second_face": np.array(self.second),
            "borders": np.array(self.borders).reshape(-1, 4),
        }


def face_look(picture: np.ndarray, landmarks: np.ndarray) -> tuple[float, float]:
    """(mean brightness 0 to 255, sharpness) of the face at landmarks [68, 2]; NaN outside of the picture.

    Sharpness is the variance of the Laplacian over that of the picture itself, on a face of 96 pixels at most: neither
    contrast nor size of a large face matters.
    """
    low, high = np.floor(landmarks.min(axis=0)).astype(int), np.ceil(landmarks.max(axis=0)).astype(int)
    face = picture[max(low[1], 0) : max(high[1], 0), max(low[0], 0) : max(high[0], 0)]
    if min(face.shape[:2]) < 8:
        return np.nan, np.nan
    grey = cv2.cvtColor(face, cv2.COLOR_RGB2GRAY)
    scale = LOOK_SIDE / max(grey.shape)
    if scale < 1:
        grey = cv2.resize(grey, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    grey = grey.astype(np.float32)
    return float(grey.mean()), float(cv2.Laplacian(grey, cv2.CV_32F).var() / max(grey.var(), 1.0))


def find_borders(picture: np.ndarray) -> tuple[float, float, float, float]:
    """Dark even bars at the edges of uint8 RGB [h, w, 3]: left, top, right, bottom as shares of width and height, 0 to 0.4."""
    grey = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)
    rows, columns = _bars(grey), _bars(grey.T)
    return columns[0], rows[0], columns[1], rows[1]


def _bars(grey: np.ndarray) -> tuple[float, float]:
    """Share of the rows of [h, w] that are a dark bar at the top, and at the bottom."""
    dark = (grey.mean(axis=1) < BORDER_DARK) & (grey.std(axis=1) < BORDER_SPREAD)
    lit = (grey > BORDER_DARK).mean(axis=1) > BORDER_BEHIND
    shares = []
    for edge, behind in ((dark, lit), (dark[::-1], lit[::-1])):
        length = len(edge) if edge.all() else int(np.argmin(edge))
        # A row or two of the edge are mixed of both by the coder.
        clear = 0 < length <= 0.4 * len(edge) and behind[length : length + 4].any()
        shares.append((length + 2) / len(edge) if clear else 0.0)
    return shares[0], shares[1]


# --------------------------------------------------------------------------------------------------------------- sound


def measure_sound(blocks: Iterator[np.ndarray]) -> tuple[dict[str, np.ndarray], int]:
    """Curves of a sound that comes in blocks of 16 kHz samples, and its whole ticks. Holds some ten seconds of it."""
    parts: dict[str, list[np.ndarray]] = {name: [] for name in ("level", "clipped", "lines", "speech")}
    before, waiting = np.zeros(LINES_APART * SAMPLES_PER_TICK + LINES, np.float32), np.zeros(0, np.float32)
    num_ticks, after = 0, LINES  # samples that the last tick's spectra reach beyond it

    def take(count: int, end: bool) -> None:
        nonlocal before, waiting, num_ticks
        ticks = (count - (0 if end else after)) // SAMPLES_PER_TICK
        if ticks > 0:
            for name, curve in _sound_curves(before, waiting, ticks).items():
                parts[name].append(curve.astype(np.float16))
            used = ticks * SAMPLES_PER_TICK
            before = np.concatenate([before, waiting[:used]])[-len(before) :]
            waiting, num_ticks = waiting[used:], num_ticks + ticks

    pending, length = [], 0
    for block in blocks:
        pending.append(block)
        length += len(block)
        if length >= STRETCH:
            waiting, pending, length = np.concatenate([waiting, *pending]), [], 0
            take(len(waiting), end=False)
    waiting = np.concatenate([waiting, *pending])
    take(len(waiting), end=True)
    return {name: np.concatenate(curves) for name, curves in parts.items() if curves} or _no_sound(), num_ticks


def _no_sound() -> dict[str, np.ndarray]:
    return {name: np.zeros((0, 2) if name == "speech" else 0) for name in ("level", "clipped", "lines", "speech")}


def _sound_curves(before: np.ndarray, samples: np.ndarray, ticks: int) -> dict[str, np.ndarray]:
    """Curves of the first `ticks` ticks of samples, `before` being the sound that leads to them."""
    own = samples[: ticks * SAMPLES_PER_TICK].reshape(ticks, SAMPLES_PER_TICK)
    level = 10 * np.log10(np.mean(own.astype(np.float64) ** 2, axis=1) + 1e-20)
    clipped = (np.abs(own) >= CLIPPED).sum(axis=1) >= CLIPPED_SAMPLES
    lead = SAMPLES_PER_TICK  # the spectra of speech reach half a tick to both sides
    near = np.concatenate([before[-lead:], samples[: (ticks + 1) * SAMPLES_PER_TICK]])
    points = slice(lead // HOP, lead // HOP + ticks * SAMPLES_PER_TICK // HOP)
    speech = speech_levels(speech_power(near, ticks + 2)[points])
    lines = _standing_lines(np.concatenate([before, samples, np.zeros(LINES, np.float32)]), ticks)
    return {"level": level, "clipped": clipped, "lines": np.where(level < SILENCE, 0, lines), "speech": speech}


def _standing_lines(samples: np.ndarray, ticks: int) -> np.ndarray:
    """How alike the tones at each tick and 0.32 s before are: the correlation [ticks] of spectra without their envelope.

    Music holds its notes, a voice glides and changes; noise has no tones. Samples begin LINES_APART ticks and LINES samples
    before the first tick.
    """
    starts = LINES + np.arange(-LINES_APART, ticks)[:, None] * SAMPLES_PER_TICK + LINES_APART * SAMPLES_PER_TICK
    hertz = np.fft.rfftfreq(LINES, 1 / SAMPLE_RATE)
    band = (hertz >= LINE_HERTZ[0]) & (hertz < LINE_HERTZ[1])
    window, tones = np.hanning(LINES).astype(np.float32), np.empty((ticks + LINES_APART, band.sum()), np.float32)
    slices = np.lib.stride_tricks.sliding_window_view(samples, LINES)
    for row, start in enumerate(starts[:, 0]):
        power = np.abs(np.fft.rfft(slices[start] * window))[band] ** 2
        tones[row] = 10 * np.log10(power + 1e-9)
    tones -= cv2.blur(tones, (LINES_SMOOTH, 1))
    now, then = tones[LINES_APART:], tones[:-LINES_APART]
    spread = np.sqrt((now**2).mean(axis=1) * (then**2).mean(axis=1))
    return (now * then).mean(axis=1) / np.maximum(spread, 1e-3)
