"""The sound of files, as mono samples at 16 kHz on the clock of `media`; what a model hears of it is `audio`'s."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import av
import numpy as np
import soundfile
import soxr

from sonic.config import SAMPLE_RATE, UserError
from sonic.media import clock_zero, readable_file, why

MIN_AUDIO_SECONDS = 0.2  # less than one short context window of SPEC section 2
MIN_RATE, MAX_RATE = 1_000, 768_000  # Hz; what recorders know. From 1 Hz, a second would be resampled to hours
MAX_CHANNELS, MAX_STRANGE_RATE = 8, 192_000  # of a stranger's sound: eight channels of a second take 6 MB
# What FFmpeg may take a stranger's file for: containers of sound. A playlist or a script would have it open other files.
CONTAINERS = "wav,w64,mp3,flac,ogg,aac,mov,matroska,webm,aiff,caf,amr,asf,avi,mpeg,mpegts"
MAX_CODER_PADDING = 4096  # samples; the longest block of the common coders


def load_audio(path, max_seconds: float | None = None) -> np.ndarray:
    """Any audio file, or the sound of a video, as float32 [samples] mono at 16 kHz in [-1, 1].

    Equal to `librosa.load(path, sr=16000, mono=True)` where libsndfile reads the file; sound of a video starts with its
    first picture. UserError: missing, empty, no sound in it, shorter than 0.2 s, all NaN, an absurd sampling rate.

    max_seconds is for files of strangers: what is longer, has more than 8 channels or 192 kHz, or is no plain container of
    sound is refused, and never read further than that, whatever its header says.
    """
    path = readable_file(path, "audio")
    try:
        with soundfile.SoundFile(str(path)) as file:
            rate = _checked_rate(file.samplerate, file.channels, path, max_seconds)
            if not file.seekable():  # GSM in a bare file: libsndfile cannot tell its length
                raise soundfile.LibsndfileError(0)
            if max_seconds is not None and file.frames > max_seconds * rate:
                raise _too_long(path, file.frames / rate, max_seconds)
            samples = file.read(dtype="float32", always_2d=True)
        samples = _finite(samples.T, path).mean(axis=0)
    except soundfile.LibsndfileError:
        samples, rate = _decode_audio(path, max_seconds)
    if len(samples) < MIN_AUDIO_SECONDS * rate:
        raise UserError(f"{path}: audio shorter than {MIN_AUDIO_SECONDS} s ({len(samples) / rate:.3f} s): give more.")
    return _at_our_rate(samples, rate)


def _at_our_rate(samples: np.ndarray, rate: int) -> np.ndarray:
    """What `librosa.resample` does with "soxr_hq", without the seconds that importing librosa takes."""
    if rate == SAMPLE_RATE:
        return samples
    length = math.ceil(len(samples) * (SAMPLE_RATE / rate))
    resampled = soxr.resample(samples, rate, SAMPLE_RATE, quality="HQ")[:length]
    return np.pad(resampled, (0, length - len(resampled)))


def _too_long(path: Path, seconds: float, max_seconds: float) -> UserError:
    return UserError(f"{path} lasts {seconds:.1f} s, more than the {max_seconds:g} s that are taken here: cut it.")


def _checked_rate(rate: int, channels: int, path: Path, max_seconds: float | None = None) -> int:
    """The rate, unless the file's header claims what no recording has, or a stranger's more than one voice needs."""
    if channels < 1 or not MIN_RATE <= rate <= MAX_RATE:
        raise UserError(f"{path} claims {channels} channels of {rate} Hz, which no sound has: export the audio again.")
    if max_seconds is not None and (channels > MAX_CHANNELS or rate > MAX_STRANGE_RATE):
        raise UserError(
            f"{path} has {channels} channels of {rate} Hz, at most {MAX_CHANNELS} of {MAX_STRANGE_RATE} Hz are taken here: "
            "export it as stereo of 48000 Hz."
        )
    return rate


def _finite(samples: np.ndarray, path: Path) -> np.ndarray:
    """Broken samples become silence, as a gap in the sound would; nothing but broken samples is an error."""
    if samples.size and np.isnan(samples).all():
        raise UserError(f"{path} holds no sound, every sample is NaN: export the audio again.")
    return np.nan_to_num(samples, nan=0.0, posinf=0.0, neginf=0.0)


def scan_audio(path) -> Iterator[np.ndarray]:
    """The sound of a video as `load_audio` gives it, float32 [n] of about a second at a time, whatever its length.

    Soxr works on a stream here: samples are those of `load_audio` to 1e-4, and as many. UserError: no sound in it.
    """
    heard = made = 0  # samples of the file's rate in, of ours out
    resampler, rate = None, SAMPLE_RATE
    for rate, block in _audio_blocks(readable_file(path, "audio")):
        resampler = resampler or soxr.ResampleStream(rate, SAMPLE_RATE, 1, dtype="float32", quality="HQ")
        resampled = resampler.resample_chunk(np.nan_to_num(block, nan=0.0, posinf=0.0, neginf=0.0))
        heard, made = heard + len(block), made + len(resampled)
        yield resampled
    if resampler:
        rest = resampler.resample_chunk(np.zeros(0, np.float32), last=True)
        wanted = max(math.ceil(heard * SAMPLE_RATE / rate) - made, 0)
        yield np.pad(rest[:wanted], (0, max(wanted - len(rest), 0)))


def audio_stretches(path, ends: Sequence[tuple[int, int]]) -> list[np.ndarray]:
    """The samples [first, last) of a video's sound for each pair, float32 at 16 kHz, shorter where the sound ends.

    The sound is read once, up to the last of them, and never in memory as a whole. UserError: no sound in it.
    """
    parts: list[list[np.ndarray]] = [[] for _ in ends]
    position = 0
    for block in scan_audio(path):
        for part, (first, last) in zip(parts, ends, strict=True):
            if first < position + len(block) and position < last:
                part.append(block[max(first - position, 0) : last - position].copy())
        position += len(block)
        if position >= max(last for _, last in ends):
            break
    return [np.concatenate([*part, np.zeros(0, np.float32)]) for part in parts]


def _decode_audio(path: Path, max_seconds: float | None = None) -> tuple[np.ndarray, int]:
    """Mono float32 [samples] at the file's own rate through FFmpeg, laid out by time stamp (gaps are silence)."""
    rates, pieces = zip(*_audio_blocks(path, max_seconds), strict=True)
    return _finite(np.concatenate(pieces), path), rates[0]


def _audio_blocks(path: Path, max_seconds: float | None = None) -> Iterator[tuple[int, np.ndarray]]:
    """The same in blocks of about a second, each with the rate; at least one, which may be empty."""
    tail, position, rate = np.zeros(0, np.float32), 0, 0  # position: samples laid out so far
    options = {} if max_seconds is None else {"format_whitelist": CONTAINERS, "protocol_whitelist": "file"}
    try:
        with av.open(str(path), options=options) as container:
            if not container.streams.audio:
                raise UserError(f"{path} has no audio stream: give a file with sound.")
            stream = container.streams.audio[0]
            if stream.codec_context is None:
                raise UserError(f"{path} holds sound in a format that cannot be decoded: convert it to AAC or WAV.")
            zero, coder = clock_zero(container, stream), stream.codec_context
            rate = _checked_rate(coder.sample_rate, coder.channels, path, max_seconds)
            start = (stream.start_time or 0) * stream.time_base
            to_float = av.AudioResampler(format="fltp")
            for frame in _decode_what_can_be(container, stream):
                planes = [plane.to_ndarray() for plane in to_float.resample(frame)]
                mono = np.concatenate(planes, axis=1).mean(axis=0)
                if frame.pts is not None:
                    starts_at = round((frame.pts * frame.time_base - zero) * rate)
                    if starts_at < 0 and position == 0:  # sound from before the first picture
                        mono = mono[-starts_at:]
                    if max_seconds is not None and starts_at > max_seconds * rate:
                        raise _too_long(path, starts_at / rate, max_seconds)
                    # Half a frame's slack: time stamps are coarser than samples, only real gaps are filled.
                    if starts_at - position > max(len(mono) // 2, rate // 100):
                        mono = np.concatenate([np.zeros(starts_at - position, np.float32), mono])
                tail = np.concatenate([tail, mono])
                position += len(mono)
                if max_seconds is not None and position > max_seconds * rate:
                    raise _too_long(path, position / rate, max_seconds)
                if len(tail) > rate + MAX_CODER_PADDING:
                    yield rate, tail[:-MAX_CODER_PADDING]
                    tail = tail[-MAX_CODER_PADDING:]
    except (av.error.FFmpegError, OSError) as error:
        if not position:  # sound that breaks off is used up to there
            raise UserError(f"{path} holds no readable audio ({why(error)}): give a WAV, MP3, FLAC or MP4.") from error
    if stream.duration:  # coders fill their last block with silence, and the container knows the true end
        end = round((stream.duration * stream.time_base + start - zero) * rate)
        if 0 < position - end < MAX_CODER_PADDING:
            tail = tail[: max(len(tail) - (position - end), 0)]
    yield rate, tail


def _decode_what_can_be(container: av.container.InputContainer, stream: av.AudioStream) -> Iterator[av.AudioFrame]:
    """The frames of every packet that is not broken; the time stamps tell where one is missing."""
    for packet in container.demux(stream):
        try:
            yield from packet.decode()
        except av.error.InvalidDataError:
            continue
