"""Speech -> audio features -> the short and long windows that the adapters read (SPEC.md section 2; paper section 3.2).

Axes: n samples at 16 kHz, T features at 50 per second, S hidden states per feature, W width, F video frames.

Other features plug in here: anything with the four members of `AudioExtractor` can be given to `SonicPipeline`, to
`extract_audio_features`, and to training (`--audio_extractor FILE.py:NAME`); docs/api.md has an example with MFCC and pitch.
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn
from transformers import WhisperFeatureExtractor

from sonic.config import FEATURES_PER_TICK, SAMPLE_RATE, SAMPLES_PER_TICK, UserError

CHUNK = 30 * SAMPLE_RATE  # Whisper hears 30 s at a time
SHORT_BEFORE, SHORT_LENGTH = 4, 10  # 0.2 s: 4 zero features in front, 6 behind
LONG_BEFORE, LONG_LENGTH = 24, 50  # 1 s: 24 in front, 26 behind


@runtime_checkable
class AudioExtractor(Protocol):
    """What the rest of the project asks of audio features.

    `name` identifies the features in caches and checkpoints (letters, digits, dot, dash, underscore); a call maps speech
    [n] float32 at 16 kHz to features [2 · (n // 640), layers, width]: 50 per second, never longer than the speech.

    One that hears a sound in stretches of so many samples (a multiple of 640), each for itself, may say so by a fifth member,
    `stretch`: preparation then gives it these one by one, and a sound of hours is not in memory as a whole.
    """

    name: str
    layers: int
    width: int

    def __call__(self, speech: np.ndarray) -> Tensor: ...


def num_ticks(samples: int) -> int:
    """How many ticks of 1/25 s this many samples fill."""
    return samples // SAMPLES_PER_TICK


class WhisperFeatures:
    """All hidden states of a Whisper encoder, 30 s at a time. `encoder` is transformers' WhisperEncoder."""

    stretch = CHUNK

    def __init__(self, encoder: nn.Module, name: str | None = None):
        self.encoder = encoder.eval().requires_grad_(False)
        self.layers, self.width = encoder.config.encoder_layers + 1, encoder.config.d_model
        self.name = name or f"whisper-{self.width}x{self.layers}-{_fingerprint(encoder)}"
        self._log_mel = WhisperFeatureExtractor(feature_size=encoder.config.num_mel_bins)

    def to(self, device: torch.device) -> WhisperFeatures:
        """The same, computing there; features still come out on the CPU."""
        self.encoder.to(device)
        return self

    @torch.no_grad()
    def __call__(self, speech: np.ndarray) -> Tensor:
        """Speech [n] -> float32 features [2 · (n // 640), layers, width] on the CPU."""
        weight = next(self.encoder.parameters())
        features = torch.empty(FEATURES_PER_TICK * num_ticks(len(speech)), self.layers, self.width)
        parts = features.split(FEATURES_PER_TICK * num_ticks(CHUNK))
        for start, part in zip(range(0, len(speech), CHUNK), parts, strict=False):  # a rest may be shorter than a tick
            chunk = speech[start : start + CHUNK]
            mel = self._log_mel(chunk, sampling_rate=SAMPLE_RATE, return_tensors="pt").input_features  # [1, mel, 3000]
            states = self.encoder(mel.to(weight.device, weight.dtype), output_hidden_states=True).hidden_states
            part.copy_(torch.stack(states, dim=2)[0, : len(part)])
        return features


def _fingerprint(module: nn.Module) -> str:
    """A few characters that differ when the weights do, so that cached features of another encoder are never reused."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()[:10]


def _windows(features: Tensor, ticks: Tensor, before: int, length: int) -> Tensor:
    """Features [T, ...] -> [F, length, ...]: tick i sees [2i - before, 2i - before + length), zeros beyond either end."""
    index = FEATURES_PER_TICK * ticks[:, None] - before + torch.arange(length)
    inside = (index >= 0) & (index < len(features))
    found = features[index.clamp(0, len(features) - 1)].float()
    return found * inside.view(*inside.shape, *[1] * (found.ndim - 2))


def short_windows(features: Tensor, ticks: Tensor) -> Tensor:
    """Features [T, S, W] of a whole recording, ticks [F] -> what `audio2token` reads, [F, 10, S, W]: 0.2 s around each tick."""
    return _windows(features, ticks, SHORT_BEFORE, SHORT_LENGTH)


def long_windows(features: Tensor, ticks: Tensor) -> Tensor:
    """Features [T, S, W], ticks [F] -> what `audio2bucket` reads, [F, 50, 1, W]: 1 s around each tick, last hidden state only."""
    return _windows(features[:, -1:], ticks, LONG_BEFORE, LONG_LENGTH)


def frame_ticks(features: Tensor, frame_step: int) -> Tensor:
    """The ticks that are video frames: 0, step, 2 · step ...; N = ticks // step of them (SPEC.md section 2)."""
    return torch.arange(len(features) // FEATURES_PER_TICK // frame_step) * frame_step


def check_features(features: Tensor, extractor: AudioExtractor, samples: int) -> Tensor:
    """Gives features back if they have the shape that their extractor promises; raises UserError with both shapes if not."""
    expected = (FEATURES_PER_TICK * num_ticks(samples), extractor.layers, extractor.width)
    if tuple(features.shape) != expected:
        raise UserError(
            f"audio extractor '{extractor.name}' gave features of shape {tuple(features.shape)} for {samples} samples, "
            f"expected {expected}: 2 features per 1/25 s, `layers`, `width`"
        )
    return features


def load_extractor(spec: str) -> AudioExtractor:
    """Makes the extractor that `FILE.py:NAME` names, by calling NAME(). The file is the user's own code and is run."""
    path, _, name = spec.rpartition(":")
    if not path.endswith(".py") or not Path(path).is_file():
        raise UserError(f"audio extractor '{spec}' is not FILE.py:NAME of an existing file")
    module_spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
        extractor = getattr(module, name)()
    except Exception as error:  # the user's own code may fail in any way, and it is the user who can mend it
        raise UserError(f"audio extractor '{spec}' cannot be made: {type(error).__name__}: {error}") from error
    if not isinstance(extractor, AudioExtractor):
        raise UserError(f"'{spec}' needs name, layers, width and a call: see sonic/audio.py, AudioExtractor")
    if not re.fullmatch(r"[\w.-]*\w", str(extractor.name)):
        raise UserError(f"'{spec}' is named {extractor.name!r}: use letters, digits, dots, dashes and underscores")
    if (stretch := getattr(extractor, "stretch", None)) and stretch % SAMPLES_PER_TICK:
        raise UserError(f"'{spec}' hears stretches of {stretch} samples: make that a multiple of {SAMPLES_PER_TICK}")
    return extractor
