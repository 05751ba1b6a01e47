"""More pictures per second: the model's own stay, those between move, and sound stays in step for ten minutes."""

import numpy as np
import pytest
import torch

from sonic.config import SAMPLE_RATE, UserError
from sonic.interpolation import factor_for, interpolate, load_rife, rife_file
from sonic.media import VideoReader, VideoWriter
from sonic.sound import load_audio


def moving_bar(count, side=64, step=4):
    frames = np.zeros((count, side, side, 3), np.uint8)
    for index in range(count):
        frames[index, 16:48, index * step : index * step + 16] = 200
    return frames


def middle(picture):
    row = picture[32, :, 0].astype(float)
    return (row * np.arange(len(row))).sum() / row.sum()


def chunks(frames, size):
    return [frames[start : start + size] for start in range(0, len(frames), size)]


@pytest.mark.parametrize("factor", [2, 3, 4])
def test_own_pictures_stay_and_those_between_move(factor):
    frames = moving_bar(10)
    made = np.concatenate(list(interpolate(chunks(frames, 4), factor, native=12.5)))
    assert made.shape == (10 * factor, 64, 64, 3)
    assert np.array_equal(made[::factor], frames)
    places = [middle(picture) for picture in made[: 9 * factor + 1]]
    assert np.diff(places) == pytest.approx(4 / factor, abs=0.5)  # pixels per new frame


@pytest.mark.parametrize("count", [1, 2, 3])
def test_short_videos(count):
    made = np.concatenate(list(interpolate([moving_bar(count)], 2)))
    assert len(made) == 2 * count and np.array_equal(made[::2], moving_bar(count))


def test_factor_1_changes_nothing():
    frames = moving_bar(3)
    assert [part is frames for part in interpolate([frames], 1)] == [True]


def test_factors():
    assert [factor_for(fps, native) for fps, native in (("native", 12.5), ("25", 12.5), ("50", 12.5))] == [1, 2, 4]
    assert [factor_for(fps, native) for fps, native in (("25", 25), ("50", 25 / 3), ("25", 5))] == [1, 6, 5]
    with pytest.raises(UserError, match="--fps 25 is no multiple of the 10 frames per second"):
        factor_for("25", 10)


class Blend(torch.nn.Module):
    def forward(self, first, second, time):
        return first * (1 - time) + second * time


class OnlyTwo(torch.nn.Module):
    def forward(self, first, second):
        return first


def saved(folder, module, name="rife.pt"):
    folder.mkdir(exist_ok=True)
    torch.jit.script(module).save(str(folder / name))
    return folder / name


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_model_of_the_users_own(tmp_path):
    assert rife_file(tmp_path / "nothing") is None
    path = saved(tmp_path / "RIFE", Blend())
    assert rife_file(tmp_path / "RIFE") == path
    frames = np.stack([np.full((64, 64, 3), value, np.uint8) for value in (0, 100, 200)])
    between = load_rife(path, 4, torch.device("cpu"))
    made = np.concatenate(list(interpolate([frames], 4, between)))
    assert made[:, 0, 0, 0].tolist() == [0, 25, 50, 75, 100, 125, 150, 175, 200, 200, 200, 200]
    saved(tmp_path / "RIFE", Blend(), "other.pt")
    with pytest.raises(UserError, match=r"holds 2 \.pt files"):
        rife_file(tmp_path / "RIFE")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_models_that_are_none(tmp_path):
    (tmp_path / "rife.pt").write_text("weights")
    with pytest.raises(UserError, match="is no TorchScript model"):
        load_rife(tmp_path / "rife.pt", 2, torch.device("cpu"))
    between = load_rife(saved(tmp_path / "two", OnlyTwo()), 2, torch.device("cpu"))
    with pytest.raises(UserError, match=r"failed as model\(first, second, time\)"):
        list(interpolate([moving_bar(2)], 2, between))


@pytest.mark.parametrize(("native", "factor"), [(12.5, 2), (25, 1)])
def test_sound_and_picture_stay_in_step_for_ten_minutes(tmp_path, native, factor):
    """A flash and a click every 30 s: in the file, both lie within one output frame of each other."""
    side, seconds, period = 32, 600, 30
    count = int(seconds * native)
    speech = np.zeros(seconds * SAMPLE_RATE, np.float32)
    for start in range(period, seconds, period):
        speech[start * SAMPLE_RATE : start * SAMPLE_RATE + 1600] = 0.5 * np.sin(np.arange(1600))
    flashes = {int(start * native) for start in range(period, seconds, period)}  # whole numbers

    def pictures():
        for first in range(0, count, 500):
            part = np.zeros((min(500, count - first), side, side, 3), np.uint8)
            for index in range(len(part)):
                part[index] = 255 if first + index in flashes else 20
            yield part

    path, fps = tmp_path / "long.mp4", native * factor
    with VideoWriter(path, fps, side, side, speech) as writer:
        for part in interpolate(pictures(), factor, native=native):
            writer.write(part)
    with VideoReader(path) as reader:
        assert reader.info.duration == pytest.approx(count / native, abs=0.001)
        bright = np.array([picture.mean() for _, picture in reader.scan()])
    starts = np.flatnonzero((bright[1:] > 240) & (bright[:-1] <= 240)) + 1
    seen = starts / 25
    sound = np.abs(load_audio(path)) > 0.1
    onsets = np.flatnonzero(sound)
    heard = onsets[np.concatenate([[True], np.diff(onsets) > SAMPLE_RATE])] / SAMPLE_RATE
    assert len(seen) == len(heard) == seconds // period - 1
    assert np.abs(seen - heard).max() <= 1 / fps
