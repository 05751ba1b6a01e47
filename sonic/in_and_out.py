"""What callers of the pipeline hand in and get out: portraits in any form, the features of a speech, a video with its speech."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from PIL import Image
from torch import Tensor

from sonic import media, pictures, sound
from sonic.audio import AudioExtractor, check_features, load_extractor
from sonic.checkpoints import load_whisper, whisper_folder
from sonic.config import TICK_RATE, SonicConfig, UserError
from sonic.record import to_metadata

ImageLike = str | Path | Image.Image | np.ndarray


@dataclass
class AudioFeatures:
    """features [2 · ticks, S, W] at 50 per second, the name of their extractor, and the speech they came from, [n] float32 at
    16 kHz. A pipeline that hears with another extractor listens to that speech again."""

    features: Tensor
    extractor: str
    speech: np.ndarray


@dataclass
class SonicVideo:
    """frames uint8 [N, H, W, 3] RGB, their rate, the speech that belongs to them, [n] float32 at 16 kHz, or None, and the
    record of how they were made (`sonic.record`), or None."""

    frames: np.ndarray
    fps: float
    speech: np.ndarray | None = None
    record: dict | None = None

    def __len__(self) -> int:
        return len(self.frames)


def extract_audio_features(
    audio: str | Path | np.ndarray, config: SonicConfig | None = None, extractor: AudioExtractor | None = None
) -> AudioFeatures:
    """Features of a sound file, or of speech [n] float32 at 16 kHz, by the Whisper (or own extractor) that the config names."""
    return extract(audio, extractor or make_extractor(config or SonicConfig()))


def make_extractor(config: SonicConfig) -> AudioExtractor:
    """The user's own audio extractor if the config names one, else the checkpoint's Whisper."""
    if config.audio_extractor:
        return load_extractor(config.audio_extractor)
    return load_whisper(whisper_folder(config.checkpoint, config.whisper_path))


def extract(audio: str | Path | np.ndarray, extractor: AudioExtractor) -> AudioFeatures:
    """The same by this extractor."""
    speech = audio if isinstance(audio, np.ndarray) else sound.load_audio(audio)
    if speech.ndim != 1 or speech.dtype.kind != "f":
        raise UserError(
            f"the speech is an array {speech.dtype} {speech.shape}, expected float32 [n] at 16 kHz, one channel"
        )
    return AudioFeatures(check_features(extractor(speech), extractor, len(speech)), extractor.name, speech)


def as_image(image: ImageLike) -> Image.Image:
    """A path, a PIL image, or an array as `cv2.imread` gives it (BGR, BGRA or grey, uint8) -> RGB. Raises UserError otherwise."""
    if isinstance(image, str | Path):
        return pictures.load_image(image)
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] not in (1, 3, 4)):
            raise UserError(
                f"the portrait is an array {image.dtype} {image.shape}, expected uint8 [H, W, 3] in BGR order"
            )
        if image.ndim == 2 or image.shape[2] == 1:
            image = Image.fromarray(image.reshape(image.shape[:2]))
        else:
            order = cv2.COLOR_BGRA2RGBA if image.shape[2] == 4 else cv2.COLOR_BGR2RGB
            image = Image.fromarray(cv2.cvtColor(image, order))
    elif not isinstance(image, Image.Image):
        raise UserError(f"the portrait must be a path, a PIL image or an array, not {type(image).__name__}")
    return pictures.to_rgb(image, "the portrait")


def save_video(
    video: SonicVideo | np.ndarray, path: str | Path, fps: float = TICK_RATE, speech: np.ndarray | None = None
) -> None:
    """Writes H.264 with AAC sound, and the record if there is one. Of a bare array uint8 [N, H, W, 3] RGB, `fps` and `speech`
    (16 kHz) must be said."""
    record = None
    if isinstance(video, SonicVideo):
        video, fps, speech, record = video.frames, video.fps, video.speech, video.record
    media.save_video(video, path, fps, speech, to_metadata(record))
