"""Video files: time stamps rule, seeking is cheap, what is written can be read, and bad files say what is wrong."""

from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
from media_files import grey, make_video, shown, tone

from sonic.config import SAMPLE_RATE, UserError
from sonic.media import VideoReader, VideoWriter, save_video
from sonic.sound import load_audio

TALKING = Path(__file__).parent / "data" / "talking_head_1.mp4"

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
