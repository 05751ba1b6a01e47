"""Sounds and videos whose every sample and time stamp is known, as files for the tests of what reads them."""

from fractions import Fraction

import av
import numpy as np

from sonic.config import SAMPLE_RATE
from sonic.media import VideoReader


def grey(level: int, width: int = 64, height: int = 48) -> np.ndarray:
    return np.full((height, width, 3), level, np.uint8)


def tone(seconds: float, rate: int = SAMPLE_RATE, hertz: float = 440.0) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def make_video(
    path, levels, times, *, sound=None, sound_start=0.0, keyframes=12, rotation=None, rate=25, codec="libx264"
):
    """Grey pictures of these levels at these times (seconds), with exact time stamps of 1/1000 s."""
    with av.open(str(path), "w") as container:
        video = container.add_stream(codec, rate=rate, options={"g": str(keyframes)})
        video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
        video.codec_context.time_base = Fraction(1, 1000)
        if rotation is not None:
            video.set_display_rotation(rotation)
        if sound is not None:
            stream = container.add_stream("aac", rate=SAMPLE_RATE, layout="mono")
        for level, time in zip(levels, times, strict=True):
            picture = level if isinstance(level, np.ndarray) else grey(level)
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = round(time * 1000), Fraction(1, 1000)
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
        if sound is not None:
            frame = av.AudioFrame.from_ndarray(sound[None], format="fltp", layout="mono")
            frame.sample_rate, frame.pts = SAMPLE_RATE, round(sound_start * SAMPLE_RATE)
            frame.time_base = Fraction(1, SAMPLE_RATE)
            container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
    return path


def shown(path, ticks) -> list[int]:
    with VideoReader(path) as reader:
        return [round(float(picture.mean())) for picture in reader.read(ticks)]
