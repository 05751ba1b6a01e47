"""Media files: time stamps rule, seeking is cheap, what is written can be read, and bad files say what is wrong."""

import struct
from fractions import Fraction
from pathlib import Path

import av
import librosa
import numpy as np
import pytest
import soundfile
from PIL import Image

from sonic.config import SAMPLE_RATE, UserError
from sonic.media import VideoReader, VideoWriter, load_audio, load_image, save_video

TALKING = Path(__file__).parent / "data" / "talking_head_1.mp4"


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


# ---------------------------------------------------------------------------------------------------------------- audio


@pytest.mark.parametrize("rate", [8000, 16000, 22050, 44100, 48000, 96000])
@pytest.mark.parametrize("channels", [1, 2, 6])
def test_audio_equals_librosa(tmp_path, rate, channels):
    samples = np.random.default_rng(rate + channels).normal(scale=0.1, size=(rate, channels))
    soundfile.write(tmp_path / "a.wav", samples, rate)
    expected = librosa.load(tmp_path / "a.wav", sr=SAMPLE_RATE, mono=True)[0]
    found = load_audio(tmp_path / "a.wav")
    assert found.dtype == np.float32
    assert np.array_equal(found, expected)


def test_audio_of_files_that_only_ffmpeg_reads(tmp_path):
    sound = tone(1.0)
    with av.open(str(tmp_path / "a.m4a"), "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=48000, layout="5.1")
        frame = av.AudioFrame.from_ndarray(np.tile(tone(1.0, 48000), (6, 1)), format="fltp", layout="5.1")
        frame.sample_rate, frame.pts, frame.time_base = 48000, 0, Fraction(1, 48000)
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    found = load_audio(tmp_path / "a.m4a")
    assert len(found) == len(sound)
    assert np.abs(found - sound)[800:-800].mean() < 0.08  # the low-frequency channel loses the tone


def test_sound_keeps_its_place_beside_the_pictures(tmp_path):
    """A click 1.0 s into the file and a flash at the same moment, in files where either stream starts later."""
    click = np.zeros(2 * SAMPLE_RATE, np.float32)
    for video_start, sound_start in ((0.0, 0.0), (0.4, 0.0), (0.0, 0.4)):
        sound = click.copy()
        sound[round((1.0 - sound_start) * SAMPLE_RATE)] = 0.9
        times = np.arange(video_start, 2.0, 0.04)
        levels = [200 if abs(time - 1.0) < 0.02 else 30 for time in times]
        path = make_video(tmp_path / "click.mkv", levels, times, sound=sound, sound_start=sound_start)
        flash = int(np.argmax(shown(path, range(len(times)))))
        heard = int(np.argmax(np.abs(load_audio(path)))) / 640
        assert abs(flash - heard) < 1, (video_start, sound_start, flash, heard)


def test_broken_samples_are_silence_but_not_all_of_them(tmp_path):
    samples = tone(0.5)
    samples[100:200] = np.nan
    soundfile.write(tmp_path / "some.wav", samples, SAMPLE_RATE, subtype="FLOAT")
    found = load_audio(tmp_path / "some.wav")
    assert np.isfinite(found).all() and not found[100:200].any() and found[300] == samples[300]
    soundfile.write(tmp_path / "all.wav", np.full(16000, np.nan), SAMPLE_RATE, subtype="FLOAT")
    with pytest.raises(UserError, match="every sample is NaN"):
        load_audio(tmp_path / "all.wav")


def test_bad_audio_says_why(tmp_path):
    (tmp_path / "empty.wav").touch()
    (tmp_path / "text.wav").write_text("hello, I am no sound" * 100)
    soundfile.write(tmp_path / "short.wav", tone(0.19), SAMPLE_RATE)
    soundfile.write(tmp_path / "none.wav", tone(0.0), SAMPLE_RATE)
    make_video(tmp_path / "mute.mp4", [9] * 10, np.arange(10) / 25)
    reasons = {
        "missing.wav": "does not exist",
        "empty.wav": "empty",
        "text.wav": "no readable audio",
        "short.wav": "shorter than 0.2 s",
        "none.wav": "shorter than 0.2 s",
        "mute.mp4": "no audio stream",
        ".": "folder",
    }
    for name, reason in reasons.items():
        with pytest.raises(UserError, match=reason):
            load_audio(tmp_path / name)


@pytest.mark.parametrize(
    ("channels", "rate"), [(1, 0), (1, 1), (1, 999), (1, 768_001), (1, 2**31 - 1), (1, 2**32 - 1), (0, 16000)]
)
def test_a_header_that_claims_an_absurd_rate_is_refused(tmp_path, channels, rate):
    soundfile.write(tmp_path / "a.wav", tone(0.5), SAMPLE_RATE)
    content = bytearray((tmp_path / "a.wav").read_bytes())
    struct.pack_into("<HI", content, 22, channels, rate)  # the WAV header's places for them
    (tmp_path / "a.wav").write_bytes(content)
    with pytest.raises(UserError, match=r"which no sound has|no readable audio"):
        load_audio(tmp_path / "a.wav")


@pytest.mark.parametrize(("rate", "reason"), [(500, "500 Hz"), (1_000_000, "1000000 Hz"), (48_000, None)])
def test_a_header_that_only_ffmpeg_reads_is_checked_too(tmp_path, rate, reason):
    with av.open(str(tmp_path / "a.mka"), "w", format="matroska") as container:
        stream = container.add_stream("pcm_s16le", rate=rate, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, rate), np.int16), format="s16", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = rate, 0, Fraction(1, rate)
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    if reason is None:
        assert len(load_audio(tmp_path / "a.mka")) == SAMPLE_RATE
    else:
        with pytest.raises(UserError, match=reason):
            load_audio(tmp_path / "a.mka")


# ---------------------------------------------------------------------------------------------------------- video, read


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_pictures_are_found_by_time_stamp(tmp_path, suffix):
    """Variable frame rate: each tick shows the last picture that is not after it, gaps hold the picture before."""
    times = np.array([0, 0.02, 0.04, 0.05, 0.3, 0.301, 0.4, 0.75, 0.9, 0.94])
    levels = [20 + 22 * i for i in range(len(times))]
    path = make_video(tmp_path / f"vfr.{suffix}", levels, times)
    ticks = list(range(21))
    expected = [levels[np.flatnonzero(times <= tick / 25 + 1e-3)[-1]] for tick in ticks]
    assert np.abs(np.subtract(shown(path, ticks), expected)).max() <= 3
    assert shown(path, [18, 3, 3, 0]) == [shown(path, [tick])[0] for tick in (18, 3, 3, 0)]


@pytest.mark.parametrize("fps", [12, 24, 30, 50, 60])
def test_any_frame_rate_gives_25_ticks_a_second(tmp_path, fps):
    count = 2 * fps
    levels = [20 + round(200 * i / count) for i in range(count)]
    path = make_video(tmp_path / "v.mp4", levels, np.arange(count) / fps, rate=fps)
    with VideoReader(path) as reader:
        assert reader.num_ticks == 50
        found = [picture.mean() for _, picture in reader.scan()]
    expected = [levels[int((tick / 25 + 1e-3) * fps)] for tick in range(50)]
    assert np.abs(np.subtract(found, expected)).max() <= 3


def test_a_window_decodes_from_its_keyframe_only(tmp_path):
    for suffix in ("mp4", "mkv"):
        levels = [(i * 7) % 200 + 20 for i in range(750)]
        path = make_video(tmp_path / f"long.{suffix}", levels, np.arange(750) / 25, keyframes=25)
        with VideoReader(path) as reader:
            for first in (700, 333, 0, 512):
                before = reader.frames_decoded
                found = reader.read(range(first, first + 25)).mean(axis=(1, 2, 3))
                assert np.abs(found - levels[first : first + 25]).max() <= 3
                # Up to a group of pictures before the window, and one more where an index is coarse.
                assert reader.frames_decoded - before <= 25 + 2 * 25 + 3
            before = reader.frames_decoded
            assert sum(1 for _ in reader.scan()) == 750
            assert reader.frames_decoded - before <= 750 + 40


def test_pictures_are_turned_as_they_are_to_be_seen(tmp_path):
    picture = grey(40)
    picture[:16, :16] = (250, 30, 30)  # red, top left of the stored picture
    corners = {0: (0, 0), 90: (-1, 0), 180: (-1, -1), 270: (0, -1)}  # counter-clockwise, where it is to be seen
    for rotation, (row, column) in corners.items():
        path = make_video(tmp_path / "r.mp4", [picture] * 10, np.arange(10) / 25, rotation=rotation)
        with VideoReader(path) as reader:
            seen = reader.read([5])[0]
            small = next(iter(reader.scan(max_side=32)))[1]
            info = reader.info
        assert info.rotation == rotation
        assert seen.shape[:2] == (info.height, info.width) == ((64, 48) if rotation % 180 else (48, 64))
        assert max(small.shape[:2]) == 32
        for image in (seen, small):
            corner = image[row, column]
            assert corner[0] > 180 and corner[1] < 90, (rotation, corner)


def test_truncated_and_false_videos_say_so(tmp_path):
    whole = TALKING.read_bytes()
    for share in (0.3, 0.6, 0.95):
        (tmp_path / "cut.mp4").write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(UserError, match="truncated"), VideoReader(tmp_path / "cut.mp4") as reader:
            reader.read([reader.num_ticks - 1])
    levels = [(i * 37) % 200 for i in range(250)]
    matroska = make_video(tmp_path / "whole.mkv", levels, np.arange(250) / 25).read_bytes()
    (tmp_path / "cut.mkv").write_bytes(matroska[: len(matroska) // 2])
    with pytest.raises(UserError, match="truncated"):
        VideoReader(tmp_path / "cut.mkv")
    (tmp_path / "text.mp4").write_text("not a video" * 50)
    (tmp_path / "empty.mp4").touch()
    soundfile.write(tmp_path / "sound.wav", tone(1.0), SAMPLE_RATE)
    for name, reason in {
        "text.mp4": "cannot be opened as a video",
        "empty.mp4": "empty",
        "sound.wav": "no video stream",
        "missing.mp4": "does not exist",
    }.items():
        with pytest.raises(UserError, match=reason):
            VideoReader(tmp_path / name)
    with VideoReader(TALKING) as reader, pytest.raises(IndexError):
        reader.read([reader.num_ticks])


# --------------------------------------------------------------------------------------------------------- video, write


@pytest.mark.parametrize("fps", [25, 12.5, 30])
def test_written_video_and_sound_are_of_equal_length(tmp_path, fps):
    rng = np.random.default_rng(0)
    base = np.kron(rng.integers(30, 220, (9, 11, 3)), np.ones((8, 8, 1))).astype(np.uint8)
    frames = np.stack([np.roll(base, i, axis=1) for i in range(31)])
    for seconds in (0.5, 31 / fps, 9.0):  # too short is padded, too long is cut
        save_video(frames, tmp_path / "o.mp4", fps, tone(seconds), metadata={"comment": "made by Sonic"})
        with av.open(str(tmp_path / "o.mp4")) as container:
            video, sound = container.streams.video[0], container.streams.audio[0]
            assert (video.codec_context.name, sound.codec_context.name) == ("h264", "aac")
            assert video.codec_context.pix_fmt == "yuv420p"
            assert float(video.duration * video.time_base) == pytest.approx(31 / fps, abs=1e-3)
            assert abs(float(sound.duration * sound.time_base) - 31 / fps) < 1 / fps
            assert container.metadata["comment"] == "made by Sonic"
            found = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video)])
        assert found.shape == frames.shape
        assert np.abs(found.astype(int) - frames).mean() < 6
        heard = load_audio(tmp_path / "o.mp4")
        assert abs(len(heard) / SAMPLE_RATE - 31 / fps) < 1 / fps
        clear = slice(800, int(min(seconds, 31 / fps) * SAMPLE_RATE) - 800)
        assert np.abs(heard[clear] - tone(seconds)[clear]).mean() < 0.02
    content = (tmp_path / "o.mp4").read_bytes()
    assert 0 < content.find(b"moov") < content.find(b"mdat")  # faststart


def test_odd_sizes_repeat_the_edge(tmp_path):
    frames = np.full((5, 51, 65, 3), 90, np.uint8)
    save_video(frames, tmp_path / "odd.mp4", 25)
    with VideoReader(tmp_path / "odd.mp4") as reader:
        found = reader.read([2])[0].astype(int)
    assert found.shape == (52, 66, 3)
    assert np.abs(found - 90).max() <= 3


def test_the_same_pictures_give_the_same_bytes(tmp_path):
    """x264's default settings do not: the memory's content moves its rate control."""
    with VideoReader(TALKING) as reader:
        frames = reader.read(range(30))
    sound, files = load_audio(TALKING), []
    for attempt in range(4):
        np.random.default_rng(attempt).integers(0, 255, (attempt + 1) * 900_000)  # another layout of memory
        save_video(frames, tmp_path / "o.mp4", 12.5, sound)
        files.append((tmp_path / "o.mp4").read_bytes())
    assert len(set(files)) == 1


def test_nothing_half_written_is_left(tmp_path):
    target = tmp_path / "new folder" / "o.mp4"
    with pytest.raises(RuntimeError), VideoWriter(target, 25, 64, 48) as writer:
        writer.write(grey(9)[None])
        raise RuntimeError("the model failed")
    with pytest.raises(ValueError, match="No frames"), VideoWriter(target, 25, 64, 48):
        pass
    with pytest.raises(ValueError, match="uint8"), VideoWriter(target, 25, 64, 48) as writer:
        writer.write(np.zeros((1, 48, 64, 3)))
    assert list(target.parent.iterdir()) == []
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "o.mp4", tmp_path):
        with pytest.raises(UserError), VideoWriter(path, 25, 64, 48):
            pass


# ------------------------------------------------------------------------------------------------------------- pictures


def test_every_kind_of_picture_becomes_rgb(tmp_path):
    colour = Image.new("RGB", (80, 70), (200, 40, 40))
    colour.paste((20, 20, 220), (0, 0, 40, 70))
    colour.save(tmp_path / "rgb.png")
    colour.convert("L").save(tmp_path / "grey.png")
    colour.convert("P", palette=Image.Palette.ADAPTIVE).save(tmp_path / "palette.png")
    colour.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=95)
    Image.fromarray(np.full((70, 80), 40000, np.uint16)).save(tmp_path / "deep.png")
    for name in ("rgb.png", "grey.png", "palette.png", "cmyk.jpg", "deep.png"):
        image = load_image(tmp_path / name)
        assert (image.mode, image.size) == ("RGB", (80, 70)), name
    for name in ("rgb.png", "palette.png", "cmyk.jpg"):
        found = np.asarray(load_image(tmp_path / name)).astype(int)
        assert np.abs(found - np.asarray(colour)).mean() < 6, name
    half = Image.new("RGBA", (80, 70), (0, 0, 0, 0))
    half.save(tmp_path / "clear.png")
    assert np.asarray(load_image(tmp_path / "clear.png")).min() == 255  # nothing, over white
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright
    colour.save(tmp_path / "exif.jpg", exif=exif, quality=95)
    turned = load_image(tmp_path / "exif.jpg")
    assert turned.size == (70, 80)
    assert turned.getpixel((35, 5))[2] > 150 and turned.getpixel((35, 75))[0] > 150


def test_bad_pictures_say_why(tmp_path, monkeypatch):
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.jpg").write_text("no picture")
    Image.new("RGB", (63, 200)).save(tmp_path / "small.png")
    Image.effect_noise((300, 300), 50).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:9000])
    for name, reason in {
        "missing.png": "does not exist",
        "empty.png": "empty",
        "text.jpg": "cannot be read as an image",
        "cut.png": "cannot be read as an image",
        "small.png": "63 x 200",
    }.items():
        with pytest.raises(UserError, match=reason):
            load_image(tmp_path / name)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(UserError, match="too large"):
        load_image(tmp_path / "whole.png")
