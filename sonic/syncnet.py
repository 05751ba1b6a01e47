"""SyncNet: how far a mouth is from its sound, by the network that the field measures lip sync with.

Chung & Zisserman, "Out of time: automated lip sync in the wild", 2016. The layers carry the names of the released weights,
`syncnet_v2.model`, which their authors' page offers; crop, sound features and distances are those of the published code
(joonson/syncnet_python), so that the numbers can be held against published ones.

Axes: T ticks of 1/25 s, W windows of five ticks, E = 1024 numbers of an embedding.
"""

from __future__ import annotations

import json
import math
import pickle
import zipfile
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

import av
import cv2
import numpy as np
import torch
from scipy.fft import dct
from scipy.ndimage import median_filter
from torch import Tensor, nn

from sonic.config import SAMPLE_RATE, SAMPLES_PER_TICK, UserError
from sonic.media import VideoReader
from sonic.sound import audio_stretches
from sonic.track_cache import make_folder, write_whole
from sonic.weights import content_hash

WINDOW = 5  # ticks that one embedding sees
SOUNDS_PER_TICK = 4  # rows of MFCCs, one per 10 ms
MAX_OFFSET = 15  # ticks
EMBEDDING = 1024
BATCH = 16  # windows at once: the first layer alone makes 4.6 MB of each

FACE_SIDE = 224  # pixels
FACE_MARGIN = 0.4  # of the face's half side, to the left and right; twice that below the chin, nothing above
STEADY = 13  # ticks of the median filter over the crop's path
GREY = 110  # what lies outside of the picture

# The MFCCs are those of python_speech_features with its defaults, on samples of 16 bits.
FRAME, HOP, FFT = 400, 160, 512  # samples: 25 ms every 10 ms
FILTERS, CEPSTRA, LIFTER = 26, 13, 22
PREEMPHASIS = 0.97
FULL_SCALE = 32768


class SyncNet(nn.Module):
    """Two embeddings of 0.2 s, one of lips and one of sound, which lie close together where both belong together."""

    def __init__(self):
        super().__init__()
        self.netcnnaud = nn.Sequential(
            *_convolution(nn.Conv2d, 1, 64, 3, padding=1),
            nn.Identity(),  # the released numbers count a pooling over 1 x 1 here
            *_convolution(nn.Conv2d, 64, 192, 3, padding=1),
            nn.MaxPool2d(3, (1, 2)),
            *_convolution(nn.Conv2d, 192, 384, 3, padding=1),
            *_convolution(nn.Conv2d, 384, 256, 3, padding=1),
            *_convolution(nn.Conv2d, 256, 256, 3, padding=1),
            nn.MaxPool2d(3, 2),
            *_convolution(nn.Conv2d, 256, 512, (5, 4)),
        )
        self.netfcaud = _head()
        flat = (0, 1, 1)  # only the first layer looks across time
        self.netcnnlip = nn.Sequential(
            *_convolution(nn.Conv3d, 3, 96, (WINDOW, 7, 7), stride=(1, 2, 2)),
            nn.MaxPool3d((1, 3, 3), (1, 2, 2)),
            *_convolution(nn.Conv3d, 96, 256, (1, 5, 5), stride=(1, 2, 2), padding=flat),
            nn.MaxPool3d((1, 3, 3), (1, 2, 2), flat),
            *_convolution(nn.Conv3d, 256, 256, (1, 3, 3), padding=flat),
            *_convolution(nn.Conv3d, 256, 256, (1, 3, 3), padding=flat),
            *_convolution(nn.Conv3d, 256, 256, (1, 3, 3), padding=flat),
            nn.MaxPool3d((1, 3, 3), (1, 2, 2)),
            *_convolution(nn.Conv3d, 256, 512, (1, 6, 6)),
        )
        self.netfclip = _head()

    def lips(self, pictures: Tensor) -> Tensor:
        """Embeddings [T - 4, E] of every five pictures in a row, [T, 3, 224, 224], BGR in 0..255."""
        seen = self.netcnnlip(pictures.movedim(0, 1)[None])  # [1, 512, T - 4, 1, 1]
        return self.netfclip(seen[0, :, :, 0, 0].T)

    def sound(self, cepstra: Tensor) -> Tensor:
        """Embeddings [W, E] of windows of MFCCs [W, 20, 13]."""
        return self.netfcaud(self.netcnnaud(cepstra.mT[:, None]).flatten(1))


def _convolution(kind: type[nn.Module], low: int, high: int, kernel, **settings) -> list[nn.Module]:
    norm = nn.BatchNorm2d if kind is nn.Conv2d else nn.BatchNorm3d
    return [kind(low, high, kernel, **settings), norm(high), nn.ReLU(inplace=True)]


def _head() -> nn.Sequential:
    return nn.Sequential(nn.Linear(512, 512), nn.BatchNorm1d(512), nn.ReLU(), nn.Linear(512, EMBEDDING))


@lru_cache(maxsize=1)
def load_syncnet(path: str) -> SyncNet:
    """SyncNet with the weights of a file, kept for the next call. UserError: missing, damaged, or another model's."""
    if not Path(path).is_file():
        raise UserError(f"'{path}' does not exist: give SyncNet's weights, syncnet_v2.model, with --syncnet_path")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    # What torch and its unpickler raise on files of all kinds, and on old ones that hold more than tensors.
    except (RuntimeError, OSError, EOFError, ValueError, KeyError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        raise _not_syncnet(path, str(error).splitlines()[0] if str(error) else type(error).__name__) from error
    if not isinstance(state, dict):
        raise _not_syncnet(path, f"it holds a {type(state).__name__}")
    model = SyncNet()
    # Counters of training, which files of old versions of torch do not hold; a plain dict may lack them.
    state = {name: value for name, value in state.items() if not str(name).endswith("num_batches_tracked")}
    try:
        model.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise _not_syncnet(path, " ".join(str(error).split())[:200]) from error
    return model.eval().requires_grad_(False)


def _not_syncnet(path: str, why: str) -> UserError:
    return UserError(f"'{path}' does not hold SyncNet's weights ({why}): give syncnet_v2.model with --syncnet_path")


class PieceSync:
    """`syncnet_offset` of pieces of videos, measured once for each and kept in a folder of the cache.

    UserError, at once: a file that does not hold SyncNet's weights.
    """

    def __init__(self, weights: Path, folder: Path):
        load_syncnet(str(weights))
        self.weights, self.folder = weights, folder / content_hash(weights)[:12]
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        make_folder(self.folder)

    def __call__(self, video: Path, key: str, start: int, end: int, boxes: np.ndarray) -> tuple[float, float]:
        """(offset, confidence) of the video's ticks [start, end); NaN if it cannot be read any more, or is too short.

        key: the name of the video's entry in the cache, which changes with the file.
        """
        entry = self.folder / f"{key}@{start}+{end - start}.json"
        try:
            offset, confidence = json.loads(entry.read_text())
            return float(offset), float(confidence)
        except (OSError, ValueError, TypeError):  # not there, or damaged
            pass
        try:
            (speech,) = audio_stretches(video, [(start * SAMPLES_PER_TICK, end * SAMPLES_PER_TICK)])
            with VideoReader(video) as reader:
                pictures = (picture for _, picture in reader.frames(range(start, end)))
                offset, confidence = syncnet_offset(self.weights, pictures, boxes, speech, self.device)
        except (UserError, av.error.FFmpegError, OSError, ValueError, IndexError):
            return math.nan, math.nan
        write_whole(entry, json.dumps([offset, confidence]).encode())
        return float(offset), confidence


# ------------------------------------------------------------------------------------------------------------ the measure


@torch.no_grad()
def syncnet_offset(
    weights_path, frames: Iterable[np.ndarray], boxes: np.ndarray, speech: np.ndarray, device: str = "cpu"
) -> tuple[int, float]:
    """(offset, confidence) of a piece: pictures uint8 RGB [H, W, 3], one per tick, as they come; face boxes [T, 4] in them,
    forehead to chin; speech [samples] of the same time at 16 kHz.

    The offset is in ticks, -15 to 15, positive when the mouth comes late, as in `sync.Sync`. A confidence near 0 says that no
    offset stands out. ValueError: fewer than 6 ticks. UserError: a file that does not hold SyncNet's weights.
    """
    model = load_syncnet(str(weights_path)).to(device)
    faces = face_crops(frames, boxes)
    ticks = min(len(faces), len(speech) // SAMPLES_PER_TICK)
    windows = ticks - WINDOW  # one less than there are: the last one's sound would end in the padding
    if windows < 1:
        raise ValueError(f"SyncNet needs at least {WINDOW + 1} ticks of pictures and sound, not {ticks}.")
    cepstra = torch.from_numpy(mfcc(speech[: ticks * SAMPLES_PER_TICK])).float()
    cepstra = cepstra.unfold(0, WINDOW * SOUNDS_PER_TICK, SOUNDS_PER_TICK).mT[:windows]  # [W, 20, 13]
    lips, sound = [], []
    for first in range(0, windows, BATCH):
        last = min(first + BATCH, windows)
        pictures = torch.from_numpy(faces[first : last + WINDOW - 1]).to(device)
        lips.append(model.lips(pictures.movedim(-1, 1).float()))
        sound.append(model.sound(cepstra[first:last].to(device)))
    return best_offset(torch.cat(lips), torch.cat(sound))


def best_offset(lips: Tensor, sound: Tensor) -> tuple[int, float]:
    """The offset at which embeddings [W, E] lie closest on average, and by how much: the median of all less the smallest.

    Where an offset reaches over the ends, the published code takes zeros for the sound, and so does this.
    """
    padded = nn.functional.pad(sound, (0, 0, MAX_OFFSET, MAX_OFFSET))
    distances = torch.stack(
        [nn.functional.pairwise_distance(lips, padded[k : k + len(lips)]).mean() for k in range(2 * MAX_OFFSET + 1)]
    )
    smallest, best = distances.min(0)
    return MAX_OFFSET - int(best), float(distances.median() - smallest)


# --------------------------------------------------------------------------------------------------------------- its input


def face_crops(frames: Iterable[np.ndarray], boxes: np.ndarray) -> np.ndarray:
    """Squares around faces, uint8 BGR [T, 224, 224, 3], from pictures uint8 RGB as they come and face boxes [T, 4]."""
    boxes = np.asarray(boxes, dtype=float)
    half = np.maximum(boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]) / 2
    path = np.stack([half, (boxes[:, 0] + boxes[:, 2]) / 2, (boxes[:, 1] + boxes[:, 3]) / 2], axis=1)
    # Zeros beyond the ends, as in the published code, would draw the crop into the picture's corner; this holds the ends.
    path = median_filter(path, size=(STEADY, 1), mode="nearest")
    crops = []
    for picture, (half, x, y) in zip(frames, path, strict=False):  # sound or pictures may end a tick earlier
        wide = half * (1 + FACE_MARGIN)
        x0, x1 = math.floor(x - wide), math.floor(x + wide)
        y0, y1 = math.floor(y - half), math.floor(y + half * (1 + 2 * FACE_MARGIN))
        height, width = picture.shape[:2]
        part = picture[max(y0, 0) : max(min(y1, height), 0), max(x0, 0) : max(min(x1, width), 0)]
        over = [max(-y0, 0), max(y1 - height, 0), max(-x0, 0), max(x1 - width, 0)]
        if not part.size:
            raise ValueError("a face box lies outside its picture.")
        part = cv2.copyMakeBorder(part, *over, cv2.BORDER_CONSTANT, value=(GREY,) * 3)
        crops.append(cv2.resize(part, (FACE_SIDE, FACE_SIDE))[..., ::-1])
    return np.ascontiguousarray(crops, dtype=np.uint8).reshape(-1, FACE_SIDE, FACE_SIDE, 3)


def mfcc(speech: np.ndarray) -> np.ndarray:
    """13 cepstral coefficients every 10 ms, [rows, 13], of speech at 16 kHz in [-1, 1]; the first is the log energy.

    Computed as python_speech_features.mfcc does with its defaults, of the samples as 16-bit numbers.
    """
    samples = np.clip(np.round(np.asarray(speech, dtype=float) * FULL_SCALE), -FULL_SCALE, FULL_SCALE - 1)
    samples = np.concatenate([samples[:1], samples[1:] - PREEMPHASIS * samples[:-1]])
    rows = 1 + max(0, math.ceil((len(samples) - FRAME) / HOP))
    samples = np.pad(samples, (0, max(0, (rows - 1) * HOP + FRAME - len(samples))))
    frames = np.lib.stride_tricks.sliding_window_view(samples, FRAME)[::HOP][:rows]
    power = np.abs(np.fft.rfft(frames, FFT)) ** 2 / FFT  # [rows, 257]
    energy, bands = power.sum(axis=1), power @ _mel_filters().T
    tiny = np.finfo(float).eps  # in place of zeros, whose logarithm there is not
    cepstra = dct(np.log(np.where(bands == 0, tiny, bands)), type=2, axis=1, norm="ortho")[:, :CEPSTRA]
    cepstra *= 1 + LIFTER / 2 * np.sin(np.pi * np.arange(CEPSTRA) / LIFTER)
    cepstra[:, 0] = np.log(np.where(energy == 0, tiny, energy))
    return cepstra


@lru_cache(maxsize=1)
def _mel_filters() -> np.ndarray:
    """26 triangles over the bins of the spectrum, [26, 257], evenly spaced on the mel scale from 0 to 8 kHz."""
    top = 2595 * math.log10(1 + SAMPLE_RATE / 2 / 700)
    hertz = 700 * (10 ** (np.linspace(0, top, FILTERS + 2) / 2595) - 1)
    corners = np.floor((FFT + 1) * hertz / SAMPLE_RATE)
    low, peak, high = corners[:-2, None], corners[1:-1, None], corners[2:, None]
    bins = np.arange(FFT // 2 + 1)
    return np.clip(np.minimum((bins - low) / (peak - low), (high - bins) / (high - peak)), 0, None)
