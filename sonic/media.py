"""Video, audio and picture files in and out. One clock: second 0 is the first picture, a tick is 1/25 s after it."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
import soundfile
import soxr
from av.video.reformatter import Interpolation
from PIL import Image, ImageOps

from sonic.config import SAMPLE_RATE, TICK_RATE, UserError

MIN_AUDIO_SECONDS = 0.2  # less than one short context window of SPEC section 2
MIN_RATE, MAX_RATE = 1_000, 768_000  # Hz; what recorders know. From 1 Hz, a second would be resampled to hours
MAX_CHANNELS, MAX_STRANGE_RATE = 8, 192_000  # of a stranger's sound: eight channels of a second take 6 MB
# What FFmpeg may take a stranger's file for: containers of sound. A playlist or a script would have it open other files.
CONTAINERS = "wav,w64,mp3,flac,ogg,aac,mov,matroska,webm,aiff,caf,amr,asf,avi,mpeg,mpegts"
PICTURES = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")  # Pillow would hand others, as EPS, to other programs
MIN_IMAGE_SIDE = 64  # pixels; one latent cell of the coarsest UNet level
MAX_CODER_PADDING = 4096  # samples; the longest block of the common coders
TIME_TOLERANCE = Fraction(1, 1000)  # seconds; Matroska and WebM round time stamps to a millisecond
TRUNCATED_AFTER = 0.5  # seconds of promised pictures that may be missing before a file counts as truncated
# swscale's fast paths darken RGB by one level and a half of 255 on a way there and back; these are its exact ones,
# SWS_ACCURATE_RND and SWS_FULL_CHR_H_INT, as numbers, because PyAV before 18 has no names for them.
EXACT = 0x40000 | 0x2000
ALWAYS_ROLL = Fraction(1, 2)  # seconds to decode forward rather than ask where the keyframes are
LONGEST_ROLL = 2  # seconds to decode forward rather than seek, in files that do not list their keyframes


def _readable(path, kind: str) -> Path:
    """The absolute path (FFmpeg would take `a:b.mp4` for a protocol), or a UserError that says why it is no use."""
    path = Path(path).absolute()
    if not path.exists():
        raise UserError(f"{path} does not exist: check the path of the {kind}.")
    if path.is_dir():
        raise UserError(f"{path} is a folder: give one {kind} file.")
    if path.stat().st_size == 0:
        raise UserError(f"{path} is empty (0 bytes): give another {kind} file.")
    if not os.access(path, os.R_OK):
        raise UserError(f"{path} cannot be read: give yourself read permission or another {kind} file.")
    return path


def first_video_stream(container: av.container.InputContainer) -> av.VideoStream | None:
    """The first stream that moves; cover art in a music file is a video stream too, and is none to us."""
    for stream in container.streams.video:
        if not stream.disposition & av.stream.Disposition.attached_pic:
            return stream
    return None


def clock_zero(container: av.container.InputContainer, stream: av.stream.Stream) -> Fraction:
    """Time of second 0 of the shared clock: the first picture, or the first sample where there are no pictures."""
    anchor = first_video_stream(container) or stream
    return (anchor.start_time or 0) * anchor.time_base


# ---------------------------------------------------------------------------------------------------------------- audio


def load_audio(path, max_seconds: float | None = None) -> np.ndarray:
    """Any audio file, or the sound of a video, as float32 [samples] mono at 16 kHz in [-1, 1].

    Equal to `librosa.load(path, sr=16000, mono=True)` where libsndfile reads the file; sound of a video starts with its
    first picture. UserError: missing, empty, no sound in it, shorter than 0.2 s, all NaN, an absurd sampling rate.

    max_seconds is for files of strangers: what is longer, has more than 8 channels or 192 kHz, or is no plain container of
    sound is refused, and never read further than that, whatever its header says.
    """
    path = _readable(path, "audio")
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
    for rate, block in _audio_blocks(_readable(path, "audio")):
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
            raise UserError(f"{path} holds no readable audio ({_why(error)}): give a WAV, MP3, FLAC or MP4.") from error
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


def _why(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


# ---------------------------------------------------------------------------------------------------------- video, read


@dataclass(frozen=True)
class VideoInfo:
    """What a file says about its pictures. Width and height in pixels as shown: rotated, and with square pixels."""

    width: int
    height: int
    rotation: int  # degrees counter-clockwise that the stored pictures are turned by: 0, 90, 180, 270
    duration: float  # seconds of pictures
    fps: float  # the average; nothing here counts frames by it
    has_audio: bool
    codec: str


class VideoReader:
    """Random access to the pictures of a file by tick (25 per second), uint8 RGB, rotated as they are to be seen.

    Every tick shows the last picture whose time stamp is not after it. Seeks, so a read costs at most the way from the
    keyframe before it; `frames_decoded` counts. Holds one open file: use as a context manager. UserError: no video.
    late: seconds from the first picture to tick 0, for files that were cut out of a longer one between two of its ticks.
    """

    def __init__(self, path, threads: int = 1, late: Fraction | int = 0):
        self.path = _readable(path, "video")
        self._late = Fraction(late)
        self.frames_decoded = 0
        try:
            self._container = av.open(str(self.path))
        except (av.error.FFmpegError, OSError) as error:
            raise UserError(
                f"{self.path} cannot be opened as a video ({_why(error)}): it is truncated or no video, give another."
            ) from error
        try:
            self._open_stream(threads)
        except BaseException:
            self.close()
            raise

    def _open_stream(self, threads: int) -> None:
        stream = first_video_stream(self._container)
        if stream is None:
            raise UserError(f"{self.path} has no video stream: give a file with moving pictures.")
        if stream.codec_context is None:
            raise UserError(f"{self.path} holds pictures in a format that cannot be decoded: convert it to H.264.")
        self._stream = stream
        self._zero = clock_zero(self._container, stream) + self._late
        stream.thread_type = "AUTO"
        stream.codec_context.thread_count = threads
        index = stream.index_entries
        if len(index) and index[-1].pos + index[-1].size > self.path.stat().st_size:
            raise UserError(f"{self.path} is truncated: the file ends before its last picture, copy it again.")
        self._seek(self._zero)
        first = self._ahead
        if first is None:
            raise UserError(f"{self.path} holds no picture that can be decoded: it is truncated, give another file.")
        self._aspect = Fraction(stream.sample_aspect_ratio or 1)
        rotation = round(first.rotation / 90) % 4 * 90
        width, height = round(first.width * self._aspect), first.height
        self.info = VideoInfo(
            width=height if rotation in (90, 270) else width,
            height=width if rotation in (90, 270) else height,
            rotation=rotation,
            duration=self._duration(),
            fps=float(stream.average_rate or stream.guessed_rate or 0),
            has_audio=bool(self._container.streams.audio),
            codec=stream.codec_context.name,
        )

    def _duration(self) -> float:
        """Seconds of pictures. Matroska knows only the whole file's, which may be a longer sound's: look at the end."""
        stream, container = self._stream, self._container
        if stream.duration:
            return float(stream.duration * stream.time_base - self._late)
        promised = Fraction(container.duration or 0, av.time_base) + Fraction(container.start_time or 0, av.time_base)
        ends = {stream.index: self._zero}
        try:
            container.seek(max(0, int(promised - 1) * av.time_base))
        except av.error.FFmpegError:  # no list of keyframes (it stands at the end of the file, and may be cut off)
            self._seek(self._zero)
        try:
            for packet in container.demux(stream, *container.streams.audio):
                if packet.pts is not None:
                    length = packet.duration or 1 / (Fraction(stream.guessed_rate or TICK_RATE) * packet.time_base)
                    end = (packet.pts + length) * packet.time_base
                    ends[packet.stream_index] = max(ends.get(packet.stream_index, end), end)
        except av.error.InvalidDataError:
            pass  # then what was found so far is all there is
        if promised - max(ends.values()) > TRUNCATED_AFTER:
            raise self._truncated(max(ends.values()) - self._zero, promised)
        self._seek(self._zero)
        return float(ends[stream.index] - self._zero)

    def _truncated(self, found, promised) -> UserError:
        return UserError(
            f"{self.path} is truncated, it ends at {float(found):.2f} s of {float(promised):.2f} s: copy it again."
        )

    def __enter__(self) -> VideoReader:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        self._decoder = None
        self._container.close()

    @property
    def num_ticks(self) -> int:
        """Ticks of pictures: the duration to the nearest whole tick, at least one."""
        return max(1, int(self.info.duration * TICK_RATE + 0.5))

    def read(self, ticks: Sequence[int]) -> np.ndarray:
        """The pictures shown at these ticks, uint8 [n, H, W, 3]; any order, repeats allowed. UserError: truncated."""
        shown = dict(self.frames(ticks))
        return np.stack([shown[int(tick)] for tick in ticks])

    def frames(self, ticks: Sequence[int], max_side: int | None = None) -> Iterator[tuple[int, np.ndarray]]:
        """Yields (tick, uint8 [H, W, 3]) for each different tick, ascending, one picture in memory at a time."""
        for tick in sorted({int(tick) for tick in ticks}):
            if not 0 <= tick < self.num_ticks:
                raise IndexError(f"{self.path} has ticks 0 to {self.num_ticks - 1}, not {tick}.")
            yield tick, self._show(tick, max_side)

    def scan(self, step: int = 1, max_side: int | None = None) -> Iterator[tuple[int, np.ndarray]]:
        """Yields (tick, uint8 [h, w, 3]) over the whole file, shrunk to a longer side of `max_side` pixels."""
        return self.frames(range(0, self.num_ticks, step), max_side)

    def _show(self, tick: int, max_side: int | None) -> np.ndarray:
        wanted = self._zero + Fraction(tick, TICK_RATE) + TIME_TOLERANCE
        if not self._reaches(wanted):
            self._seek(wanted)
        while self._ahead is not None and self._time(self._ahead) <= wanted:
            self._advance()
        if self._ahead is None:
            last = self._current
            if last is None:
                raise self._truncated(0, self.info.duration)
            held = max((last.duration or 0) * last.time_base, 1 / Fraction(self.info.fps or TICK_RATE))
            if wanted - self._time(last) - held > TRUNCATED_AFTER:
                raise self._truncated(self._time(last) + held - self._zero, self.info.duration)
        frame = self._current or self._ahead
        key = (frame.pts, max_side)
        if self._converted[0] != key:  # a slow video shows one picture for several ticks
            self._converted = (key, self._to_rgb(frame, max_side))
        return self._converted[1]

    def _reaches(self, wanted: Fraction) -> bool:
        """Whether decoding on from here is the shortest way to that time."""
        if self._current is None and self._ahead is None:
            return False
        here = self._time(self._current or self._ahead)
        if here > wanted:
            return self._current is None and self._from_start  # before the first picture, the first one is held
        if self._ahead is None or wanted - here < ALWAYS_ROLL:
            return True
        index = self._stream.index_entries
        if len(index):
            # The index of an MP4 lists decoding times, which run ahead of the times of showing.
            ahead = (self._stream.start_time or 0) - index[0].timestamp
            keyframe = index.search_timestamp(int(wanted / self._stream.time_base) - ahead, backward=True)
            return keyframe < 0 or (index[keyframe].timestamp + ahead) * self._stream.time_base <= here
        return wanted - here < LONGEST_ROLL

    def _seek(self, wanted) -> None:
        """Puts the decoder on the last keyframe that is not after `wanted` (seconds on the file's own clock)."""
        back = Fraction(0)
        while True:
            target = wanted - back
            self._from_start = target <= self._zero
            try:
                self._container.seek(int(max(target, self._zero) / self._stream.time_base), stream=self._stream)
            except av.error.FFmpegError as error:
                raise UserError(f"{self.path} is truncated or damaged, it has no keyframe: copy it again.") from error
            self._decoder = self._container.decode(self._stream)
            self._current = self._ahead = None
            self._converted = (None, None)
            self._advance()
            if self._from_start or (self._ahead is not None and self._time(self._ahead) <= wanted):
                return
            back = back * 2 or Fraction(1)  # an index by decoding time, or a bad one, can land too late

    def _advance(self) -> None:
        """One picture on: `_current` is the one shown now, `_ahead` the next one, None behind the last."""
        self._current = self._ahead or self._current
        self._ahead = None
        try:
            for frame in self._decoder:
                self.frames_decoded += 1
                if frame.pts is not None and (self._current is None or frame.pts > self._current.pts):
                    self._ahead = frame
                    return
        except (av.error.InvalidDataError, av.error.EOFError):
            return  # broken data ends the pictures; `_show` says so if more were promised

    @staticmethod
    def _time(frame: av.VideoFrame) -> Fraction:
        return frame.pts * frame.time_base

    def _to_rgb(self, frame: av.VideoFrame, max_side: int | None) -> np.ndarray:
        width, height = round(frame.width * self._aspect), frame.height
        if max_side and max(width, height) > max_side:
            scale = max_side / max(width, height)
            width, height = max(1, round(width * scale)), max(1, round(height * scale))
        # Pictures without a colour tag: high definition is BT.709 by custom, swscale would take BT.601 for all.
        untagged = frame.colorspace == av.video.reformatter.Colorspace.DEFAULT or frame.colorspace == 2
        picture = frame.reformat(
            width,
            height,
            "rgb24",
            src_colorspace="ITU709" if untagged and frame.height >= 720 else None,
            interpolation="AREA" if height < frame.height else int(Interpolation.BILINEAR) | EXACT,
            threads=1,
        ).to_ndarray()
        return np.ascontiguousarray(np.rot90(picture, self.info.rotation // 90))


# --------------------------------------------------------------------------------------------------------- video, write


class VideoWriter:
    """Writes H.264 + AAC (yuv420p, faststart) as a context manager; the file appears whole at the end or not at all.

    fps: 25, 12.5 ...; audio: float32 [samples] at 16 kHz, cut or padded with silence to the pictures' length. Odd sizes
    repeat the last row or column. crf: x264's, lower is better and larger. The same input gives the same bytes.
    UserError: the folder cannot be written to.
    """

    def __init__(
        self,
        path,
        fps: float,
        width: int,
        height: int,
        audio=None,
        metadata: dict[str, str] | None = None,
        crf: int = 18,
    ):
        self.path = Path(path).absolute()
        self._partial = self.path.with_name(f".{self.path.stem}.partial{self.path.suffix or '.mp4'}")
        self._size = (width, height)
        self._fps = Fraction(fps).limit_denominator(1001)
        self._audio = None if audio is None else np.asarray(audio, dtype=np.float32).reshape(-1)
        self._metadata = metadata or {}
        self._crf = crf
        self._frames = self._samples = 0

    def __enter__(self) -> VideoWriter:
        if self.path.is_dir():
            raise UserError(f"{self.path} is a folder: give the name of a video file to write.")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._container = av.open(
                str(self._partial), "w", format="mp4", options={"movflags": "+faststart", "fflags": "+bitexact"}
            )
        except (av.error.FFmpegError, OSError) as error:
            raise UserError(
                f"{self.path} cannot be written ({_why(error)}): choose a folder you may write to."
            ) from error
        try:
            self._add_streams()
        except BaseException:
            self._discard()
            raise
        return self

    def _add_streams(self) -> None:
        self._container.metadata.update(self._metadata)
        # Without cpu-independent, x264's macroblock tree gives other bytes from run to run for the same pictures.
        options = {"crf": str(self._crf), "preset": "medium", "x264-params": "cpu-independent=1"}
        video = self._container.add_stream("libx264", rate=self._fps, options=options)
        video.width, video.height = (side + side % 2 for side in self._size)  # yuv420p halves both sides
        video.pix_fmt = "yuv420p"
        context = video.codec_context
        context.time_base = 1 / self._fps
        context.colorspace = context.color_primaries = context.color_trc = 1  # BT.709, as players expect
        context.color_range = 1  # 16 to 235
        context.flags |= av.codec.context.Flags.bitexact
        self._video = video
        self._sound = None
        if self._audio is not None:
            self._sound = self._container.add_stream("aac", rate=SAMPLE_RATE, layout="mono")
            self._sound.bit_rate = 96_000
            self._sound.codec_context.flags |= av.codec.context.Flags.bitexact

    def write(self, frames: np.ndarray) -> None:
        """Appends uint8 RGB [n, H, W, 3]."""
        width, height = self._size
        if frames.dtype != np.uint8 or frames.shape[1:] != (height, width, 3):
            raise ValueError(
                f"frames must be uint8 [n, {height}, {width}, 3], not {frames.dtype} {list(frames.shape)}."
            )
        for picture in frames:
            even = np.pad(picture, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(even), format="rgb24")
            frame = frame.reformat(
                format="yuv420p",
                dst_colorspace="ITU709",
                dst_color_range="MPEG",
                interpolation=int(Interpolation.BICUBIC) | EXACT,
                threads=1,
            )
            frame.pts, frame.time_base = self._frames, 1 / self._fps
            self._container.mux(self._video.encode(frame))
            self._frames += 1
            self._write_sound()

    def _write_sound(self) -> None:
        """Sound up to the last written picture, second by second with it, so that the file plays while it loads."""
        if self._sound is None:
            return
        until = math.floor(self._frames / self._fps * SAMPLE_RATE)
        piece = self._audio[self._samples : until]
        piece = np.pad(piece, (0, until - self._samples - len(piece)))
        frame = av.AudioFrame.from_ndarray(piece[None], format="fltp", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = SAMPLE_RATE, self._samples, Fraction(1, SAMPLE_RATE)
        self._container.mux(self._sound.encode(frame))
        self._samples = until

    def __exit__(self, kind, error, trace) -> None:
        if kind is not None:
            self._discard()
            return
        try:
            if self._frames == 0:
                raise ValueError(f"No frames were written to {self.path}.")
            for stream in filter(None, (self._video, self._sound)):
                self._container.mux(stream.encode(None))
            self._container.close()
            self._partial.replace(self.path)
        except (av.error.FFmpegError, OSError) as failure:
            self._discard()
            raise UserError(f"{self.path} could not be written ({_why(failure)}): is the disk full?") from failure
        except BaseException:
            self._discard()
            raise

    def _discard(self) -> None:
        try:
            self._container.close()
        finally:
            self._partial.unlink(missing_ok=True)


def save_video(frames: np.ndarray, path, fps: float, audio=None, metadata: dict[str, str] | None = None) -> None:
    """Writes uint8 RGB [n, H, W, 3] and optional 16 kHz mono audio as one MP4; see `VideoWriter`."""
    height, width = frames.shape[1:3]
    with VideoWriter(path, fps, width, height, audio, metadata) as writer:
        writer.write(frames)


def read_metadata(path) -> dict[str, str]:
    """What a video file says of itself, by key. UserError: missing, empty, or no video that can be opened."""
    path = _readable(path, "video")
    try:
        with av.open(str(path)) as container:
            return dict(container.metadata)
    except (av.error.FFmpegError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as a video: give a whole MP4.") from error


# ------------------------------------------------------------------------------------------------------------- pictures


def load_image(path, max_pixels: int | None = None) -> Image.Image:
    """A picture as RGB, turned as its EXIF says, transparency over white.

    UserError: missing, empty, not an image, under 64 pixels on a side, over max_pixels or too large to be meant
    (decompression bomb); its size is known before it is decoded.
    """
    path = _readable(path, "image")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=PICTURES) as file:
                if max_pixels is not None and file.width * file.height > max_pixels:
                    raise UserError(
                        f"{path} is too large an image ({file.width} x {file.height} pixels, at most {max_pixels} are "
                        "taken here): scale it down."
                    )
                image = ImageOps.exif_transpose(file)
                image.load()
    except UserError:
        raise
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise UserError(
            f"{path} is too large an image (over {Image.MAX_IMAGE_PIXELS} pixels): scale it down."
        ) from error
    except (OSError, ValueError, SyntaxError) as error:  # Pillow raises SyntaxError for broken PNG chunks
        raise UserError(f"{path} cannot be read as an image: give a whole PNG, JPEG or WebP file.") from error
    return to_rgb(image, str(path))


def to_rgb(image: Image.Image, where: str) -> Image.Image:
    """Any mode as RGB, transparency over white. UserError, naming `where` it came from: under 64 pixels on a side."""
    if min(image.size) < MIN_IMAGE_SIDE:
        raise UserError(
            f"{where} is {image.width} x {image.height} pixels: give at least {MIN_IMAGE_SIDE} on each side."
        )
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    if image.mode.startswith("I") or image.mode == "F":  # 16-bit grey: Pillow's own conversion would clip it at 255
        values = np.asarray(image, dtype=np.float64)
        image = Image.fromarray((values / max(values.max(), 1) * 255).round().astype(np.uint8))
    return image.convert("RGB")


def resize_square(image: np.ndarray, size: int) -> np.ndarray:
    """uint8 [s, s, 3] to [size, size, 3]: area average down, Lanczos up."""
    if image.shape[0] == size:
        return image
    filter_ = cv2.INTER_AREA if image.shape[0] > size else cv2.INTER_LANCZOS4
    return cv2.resize(image, (size, size), interpolation=filter_)
