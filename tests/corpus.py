"""Every kind of file that a folder of videos may hold, made from a puppet: `python tests/corpus.py FOLDER`.

`make_corpus` gives each file's name with the words that its reason must hold, or None for those that must be used.
"""

from __future__ import annotations

import os
import shutil
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from sonic.config import SAMPLE_RATE, SAMPLES_PER_TICK
from sonic.media import VideoReader
from sonic.sound import load_audio

PUPPET = Path(__file__).parent.parent / "examples/clips/puppet_0000.mp4"
TICKS = 40
TRUNCATIONS = 20


def puppet(ticks: int = TICKS, number: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """uint8 RGB [T, 256, 256, 3], and its speech, float32 [640 T]."""
    path = PUPPET.with_name(f"puppet_{number:04d}.mp4")
    with VideoReader(path) as reader:
        return reader.read(range(ticks)), load_audio(path)[: ticks * SAMPLES_PER_TICK]


def write(
    path: Path,
    frames: np.ndarray | None,
    sound: np.ndarray | None = None,
    *,
    fps: float = 25,
    times: np.ndarray | None = None,
    rate: int = SAMPLE_RATE,
    layout: str = "mono",
    pix_fmt: str = "yuv420p",
    rotation: int = 0,
    codec: str = "libx264",
    **options: str,
) -> Path:
    """A video of frames [T, H, W, 3] at `times` (seconds; by default even) with 16 kHz sound, stored as it is told to be."""
    with av.open(str(path), "w") as container:
        if frames is not None:
            video = container.add_stream(
                codec, rate=round(fps), options={"preset": "ultrafast", "crf": "12", **options}
            )
            video.height, video.width, video.pix_fmt = *frames.shape[1:3], pix_fmt
            video.codec_context.time_base = Fraction(1, 12_000)
            if rotation:
                video.set_display_rotation(rotation)
        if sound is not None:
            stream = container.add_stream("aac", rate=rate, layout=layout)
            stream.bit_rate = 256_000
        if frames is not None:
            times = np.arange(len(frames)) / fps if times is None else times
            for picture, time in zip(frames, times, strict=True):
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
                frame.pts, frame.time_base = round(time * 12_000), Fraction(1, 12_000)
                container.mux(video.encode(frame))
            container.mux(video.encode(None))
        if sound is not None:
            frame = av.AudioFrame.from_ndarray(
                np.ascontiguousarray(sound[None], np.float32), format="fltp", layout="mono"
            )
            frame.sample_rate, frame.pts, frame.time_base = SAMPLE_RATE, 0, Fraction(1, SAMPLE_RATE)
            for part in av.AudioResampler(format="fltp", layout=layout, rate=rate).resample(frame):
                container.mux(stream.encode(part))
            container.mux(stream.encode(None))
    return path


def make_corpus(folder: Path) -> dict[str, str | None]:
    """Writes all of them below an empty folder."""
    expected: dict[str, str | None] = {}
    frames, speech = puppet()

    def put(name: str, reason: str | None, *content, **how) -> Path:
        expected[name] = reason
        return write(folder / name, *(content or (frames, speech)), **how)

    good = put("good.mp4", None)

    # ---- broken files
    matroska = write(folder / "whole.mkv", frames, speech)
    for number in range(TRUNCATIONS):
        whole = (good, matroska)[number % 2]  # one has its index at the end, the other can be read up to the break
        name, content = f"truncated_{number:02d}{whole.suffix}", whole.read_bytes()
        (folder / name).write_bytes(content[: max(1, len(content) * number // TRUNCATIONS)])
        # Matroska that lacks less than half a second is used up to the break.
        nearly_whole = whole is matroska and TICKS / 25 * (1 - number / TRUNCATIONS) < 0.5
        expected[name] = None if nearly_whole else "truncated"
    (folder / "zero.mp4").touch()
    (folder / "text.mp4").write_text("This is a letter, not a video.\n" * 50)
    (folder / "growing.mkv").write_bytes(matroska.read_bytes()[: matroska.stat().st_size // 2])
    matroska.unlink()
    os.mkfifo(folder / "pipe.mp4")
    (folder / "gone.mp4").symlink_to(folder / "nowhere.mp4")
    expected |= {
        "zero.mp4": "empty",
        "text.mp4": "no video",
        "growing.mkv": "truncated",
        "pipe.mp4": "no regular file",
        "gone.mp4": "cannot be read",
    }
    if os.geteuid():  # root reads everything
        shutil.copy(good, folder / "secret.mp4").chmod(0)
        expected["secret.mp4"] = "read permission"

    # ---- streams and times
    put("audio_only.mp4", "no video stream", None, speech)
    put("video_only.mp4", "no audio stream", frames)
    put("sound_longer.mp4", None, frames, np.pad(speech, (0, 3 * SAMPLE_RATE)))
    put("sound_shorter.mp4", None, np.concatenate([frames, frames]), speech)
    put("one_frame.mp4", "too short", frames[:1], speech[: SAMPLE_RATE // 4])
    uneven = np.cumsum(np.random.default_rng(0).choice([0.02, 0.04, 0.06], TICKS))
    put("uneven.mp4", None, frames, speech, times=uneven - uneven[0])
    for fps in (12, 15, 24, 30, 50, 60):
        shown = np.minimum((np.arange(TICKS * fps // 25) * 25) // fps, TICKS - 1)
        put(f"{fps}_fps.mp4", None, frames[shown], speech, fps=fps)

    # ---- pictures
    for turns in (1, 2, 3):
        turned = np.rot90(frames, -turns, axes=(1, 2))
        put(f"rotated_{90 * turns}.mp4", None, turned, speech, rotation=90 * turns)
    large = frames[:16].repeat(9, axis=1).repeat(9, axis=2)[:, 72:2232]
    put("uhd.mp4", None, np.pad(large, [(0, 0), (0, 0), (768, 768), (0, 0)], mode="edge"), speech)
    put("64_x_64.mp4", "face", frames[:, ::4, ::4], speech)
    put("odd_size.mp4", None, frames[:, :253, :255], speech, pix_fmt="yuv444p")
    put("ten_bit.mp4", None, pix_fmt="yuv420p10le")
    put("grey.mp4", None, pix_fmt="gray")
    put("interlaced.mp4", None, **{"x264-params": "interlaced=1"})
    put("hevc.mp4", None, codec="libx265", **{"x265-params": "log-level=none"})
    put("letterbox.mp4", None, np.pad(frames, [(0, 0), (48, 48), (0, 0), (0, 0)]), speech)

    # ---- faces
    wall = np.full_like(frames, 120)
    put("two_faces.mp4", "another face", np.concatenate([frames, puppet(number=1)[0]], axis=2), speech)
    put("no_face.mp4", "no face found", wall, speech)
    put(
        "face_at_the_end.mp4",
        "too short",
        np.concatenate([wall, frames[:25]]),
        np.concatenate([speech, speech[:16_000]]),
    )
    put("photograph.mp4", "photograph", frames[:1].repeat(TICKS, axis=0), speech)

    # ---- sound
    put("8_khz.mp4", None, rate=8000)
    put("surround_96_khz.mp4", None, rate=96_000, layout="5.1")
    put("stereo.mp4", None, rate=44_100, layout="stereo")
    put("silence.mp4", "silent", frames, np.zeros_like(speech))
    noise = np.random.default_rng(1).normal(scale=0.1, size=len(speech))
    put("noise.mp4", "as even as noise", frames, noise)
    put("clipped.mp4", "cut off", frames, np.clip(speech * 40, -1, 1))
    put("quiet.mp4", "too quiet", frames, speech / 50)

    # ---- names and links
    for name in (
        "with spaces.mp4",
        'quote\'s "double".MP4',
        "line\nbreak.mp4",
        "emoji 😀.mov",
        "--flag.mp4",
        "ünï.webm",
    ):
        (folder / "names").mkdir(exist_ok=True)
        # FFmpeg looks into a file, not at its name.
        shutil.copy(good, folder / "names" / name)
        expected[f"names/{name}"] = None
    (folder / "names" / "loop").symlink_to(folder, target_is_directory=True)
    (folder / "link.mp4").symlink_to(good)
    (folder / "circle.mp4").symlink_to(folder / "circle.mp4")
    return expected | {"link.mp4": None, "circle.mp4": "cannot be read"}


if __name__ == "__main__":
    target = Path(sys.argv[1])
    target.mkdir(parents=True)
    for name, reason in make_corpus(target).items():
        print(repr(name), "must be used" if reason is None else f"must be left out: {reason}")
