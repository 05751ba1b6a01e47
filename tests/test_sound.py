"""The sound of files: equal to librosa's, in its place beside the pictures, and bad files say what is wrong."""

import struct
from fractions import Fraction

import av
import librosa
import numpy as np
import pytest
import soundfile
from media_files import make_video, shown, tone

from sonic.config import SAMPLE_RATE, UserError
from sonic.sound import load_audio


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
