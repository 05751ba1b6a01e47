"""Samples: the right pictures with the right sound, square and unstretched, the same for everyone who asks."""

import pickle
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_prepare import Loudness, clip

from sonic.audio import long_windows, short_windows
from sonic.clips import Clip, hold_out
from sonic.dataset import SonicDataset, clip_square, cut, inside, lip_mask, window_square
from sonic.faces import square_crop, union_box
from sonic.media import VideoReader, save_video
from sonic.motion import motion_buckets
from sonic.prepare import prepare

DATA = Path(__file__).parent / "data"
SIZES = {"num_frames": 6, "frame_step": 2, "resolution": 64, "clip_size": 32}


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    return prepare(DATA, cache, Loudness(), num_frames=25, frame_step=2, progress=False).clips


def assert_same(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    for key, value in one.items():
        assert torch.equal(value, other[key]) if isinstance(value, torch.Tensor) else value == other[key], key


def test_a_sample_is_what_it_says(clips):
    dataset = SonicDataset(clips, **SIZES)
    for number in range(6):
        sample = dataset[number]
        shapes = {key: tuple(value.shape) for key, value in sample.items() if key != "name"}
        assert shapes == {
            "frames": (6, 3, 64, 64),
            "reference": (3, 64, 64),
            "clip_pixels": (3, 32, 32),
            "mask": (1, 64, 64),
            "lips": (6, 8, 8),
            "audio_windows": (6, 10, 2, 3),
            "bucket_windows": (6, 50, 1, 3),
            "buckets": (2,),
            "fps": (),
            "ticks": (6,),
        }
        for key, value in sample.items():
            assert key in ("name", "ticks") or value.dtype == torch.float32
        assert sample["frames"].min() >= -1 and 0.2 < sample["frames"].max() <= 1
        assert sample["fps"] == 12.5
        assert sample["lips"].sum((1, 2)).min() > 0.5 and sample["lips"].mean() < 0.2 and sample["lips"].max() <= 1
        assert 0.05 < sample["mask"].mean() < 0.6 and set(sample["mask"].unique().tolist()) >= {0.0, 1.0}

        (source,) = (c for c in clips if c.name == sample["name"])
        ticks = sample["ticks"]
        assert ticks.dtype == torch.int64 and (ticks.diff() == 2).all()
        boxes, landmarks = source.boxes[ticks - source.start], source.landmarks[ticks - source.start]
        assert torch.allclose(sample["buckets"], torch.tensor(motion_buckets(landmarks)))
        square = window_square(boxes, source.width, source.height)
        low, high = np.split(union_box(boxes), 2)  # SPEC section 6: the union of the window's boxes, grown by 1.1
        grown = np.concatenate([low - 0.05 * (high - low), high + 0.05 * (high - low)])
        grown = (grown - np.array([square[0], square[1]] * 2)) * 64 / (square[2] - square[0])
        rows, columns = np.nonzero(sample["mask"][0].numpy() > 0.5)
        edges = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        assert np.abs(np.clip(grown, 0, 64) - edges).max() <= 1
        with VideoReader(source.path) as reader:
            pictures = [cut(picture, square) for picture in reader.read(ticks.tolist())]
        for picture, frame in zip(pictures, sample["frames"], strict=True):
            expected = cv2.resize(picture, (64, 64), interpolation=cv2.INTER_AREA) / 127.5 - 1
            assert np.abs(frame.permute(1, 2, 0).numpy() - expected).max() < 1e-5


def test_training_hears_what_inference_hears(clips):
    """Windows at the very start and end of a video, and between, equal those cut from the whole video's features."""
    dataset = SonicDataset(clips, **SIZES)
    for source in clips:
        features = load_file(source.features)["features"].float()
        last = len(features) // 2 - 1
        for ticks in (torch.arange(0, 12, 2), torch.arange(30, 42, 2), torch.arange(last - 10, last + 1, 2)):
            short, long = dataset._hear(source, ticks)
            assert torch.equal(short, short_windows(features, ticks))
            assert torch.equal(long, long_windows(features, ticks))


def test_the_same_seed_gives_the_same_samples(clips):
    dataset = SonicDataset(clips, seed=3, length=6, **SIZES)
    plain = [dataset[number] for number in range(6)]
    loader = torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=2)
    for one, other in zip(plain, loader, strict=True):
        assert_same(one, other)
    resumed = pickle.loads(pickle.dumps(dataset))
    for number in (5, 2):
        assert_same(resumed[number], plain[number])
    assert_same(SonicDataset(clips, seed=3, **SIZES)[100003], dataset[100003])
    other = SonicDataset(clips, seed=4, **SIZES)
    assert any(not torch.equal(other[n]["ticks"], plain[n]["ticks"]) for n in range(6))


def test_every_clip_comes_once_a_lap():
    dataset = SonicDataset([clip(f"{i}.mp4", 60) for i in range(7)], **SIZES)
    laps = [[dataset._draw(7 * lap + n)[0].name for n in range(7)] for lap in range(4)]
    assert all(len(set(lap)) == 7 for lap in laps) and len({tuple(lap) for lap in laps}) > 1
    assert len(dataset) == 7 and len(SonicDataset([clip("a", 60)], length=9, **SIZES)) == 9


def test_reference_lies_outside_the_window_where_there_is_room(clips):
    dataset = SonicDataset(clips, **SIZES)
    for number in range(50):
        source, window, reference = dataset._draw(number)
        assert window[0] >= 0 and window[-1] < source.num_ticks
        assert max(window[0] - reference, reference - window[-1]) >= 25
    tight = SonicDataset([clips[0].part(0, 12)], **SIZES)  # a window has 11 ticks
    for number in range(10):
        _, window, reference = tight._draw(number)
        assert reference in (0, 11) and reference not in window
    only = SonicDataset([clips[0].part(5, 16)], **SIZES)
    assert 0 <= only._draw(0)[2] < 11 and only[0]["ticks"][0] == 5


def test_held_out_time_is_never_seen(clips):
    train, validation = hold_out(clips, window=13)
    for part in (train, validation):
        dataset = SonicDataset(part, **SIZES)
        for number in range(30):
            source, window, reference = dataset._draw(number)
            limits = {c.name: (c.start, c.start + c.num_ticks) for c in part}[source.name]
            for tick in (*window, reference):
                assert limits[0] <= source.start + tick < limits[1]
    first, second = {c.video: c for c in train}, {c.video: c for c in validation}
    for video in first:
        assert first[video].start + first[video].num_ticks == second[video].start


def test_only_the_window_is_decoded(clips, tmp_path):
    """The shipped clips have a keyframe every second: a window and a reference cost two rides of a second each."""
    dataset = SonicDataset(clips, **SIZES)
    for number in range(6):
        source, *_ = dataset._draw(number)
        reader = dataset._reader(source)
        before = reader.frames_decoded
        dataset[number]
        assert reader.frames_decoded - before <= (25 + 11) + 25 + 2 * 13
    assert len(dataset._readers) == 2


def test_few_files_are_open_at_once(clips):
    dataset = SonicDataset([clips[0].part(i, i + 20) for i in range(0, 60, 10)], **SIZES)
    for number in range(12):
        dataset[number]
    assert len(dataset._readers) == 1


def test_one_square_per_clip(clips):
    """Windows and references of a clip, and of its parts, are cut alike: a tick has one picture, whatever it is drawn for."""
    part = clips[0].part(10, 60)
    square = window_square(clips[0].boxes, clips[0].width, clips[0].height)
    assert clip_square(part) == clip_square(clips[0]) == square
    dataset = SonicDataset([part], crop_per="clip", **SIZES)
    seen = {}
    for number in range(12):
        _, window, reference = dataset._draw(number)
        sample = dataset[number]
        for tick, frame in [*zip(window.tolist(), sample["frames"], strict=True), (reference, sample["reference"])]:
            assert torch.equal(seen.setdefault(tick, frame), frame)
        assert torch.equal(dataset.frames(number), sample["frames"])
    with VideoReader(part.path) as reader:
        (picture,) = reader.read([part.start + tick])
    expected = cv2.resize(cut(picture, square), (64, 64), interpolation=cv2.INTER_AREA) / 127.5 - 1
    assert np.abs(seen[tick].permute(1, 2, 0).numpy() - expected).max() < 1e-5


@pytest.mark.parametrize("crop_per", ["window", "clip"])
def test_mirrored_samples(clips, crop_per):
    """All that is seen changes sides, all that is heard stays; who is mirrored follows from the number."""
    plain, mirrored, some = (SonicDataset(clips, crop_per=crop_per, flip=share, **SIZES) for share in (0, 1, 0.3))
    for number in range(4):
        one, other = plain[number], mirrored[number]
        for name in ("frames", "reference", "mask", "lips"):
            assert torch.equal(one[name].flip(-1), other[name]), name
        assert not torch.equal(one["frames"], other["frames"]) and not torch.equal(one["lips"], other["lips"])
        # CLIP's pixels are resampled from the mirror image, which rounds otherwise.
        assert torch.allclose(one["clip_pixels"].flip(-1), other["clip_pixels"], atol=0.02)
        for name in ("audio_windows", "bucket_windows", "buckets", "fps", "ticks", "name"):
            assert_same({name: one[name]}, {name: other[name]})
        assert torch.equal(mirrored.frames(number), other["frames"])
        assert_same(some[number], other if some._mirrored(number) else one)
    assert 60 < sum(some._mirrored(number) for number in range(300)) < 120


def test_a_mirror_image_moves_as_much(clips):
    source = clips[0]
    turned = source.landmarks * [-1, 1] + [source.width, 0]
    pairs = [
        *range(16, -1, -1),
        *range(26, 16, -1),
        *range(27, 31),
        *range(35, 30, -1),
        45,
        44,
        43,
        42,
        47,
        46,
        39,
        38,
        37,
    ]
    pairs += [36, 41, 40, *range(54, 47, -1), *range(59, 54, -1), *range(64, 59, -1), *range(67, 64, -1)]
    assert sorted(pairs) == list(range(68))
    assert motion_buckets(turned[:, pairs]) == pytest.approx(motion_buckets(source.landmarks), rel=1e-5)


# -------------------------------------------------------------------------------------------------------------- squares


def test_squares_hold_the_path_and_lie_inside():
    rng = np.random.default_rng(0)
    for _ in range(500):
        width, height = rng.integers(60, 400, 2)
        low = rng.uniform(0, [width, height], (5, 2)) * rng.uniform(0, 0.8)
        boxes = np.concatenate([low, low + rng.uniform(5, 60, (5, 2))], axis=1)
        x0, y0, x1, y1 = square = window_square(boxes, width, height)
        assert x1 - x0 == y1 - y0
        visible = np.clip(boxes, 0, [width, height, width, height])
        assert inside(visible, square).all()
        if np.ptp(union_box(visible).reshape(2, 2), axis=0).max() + 1 <= min(width, height):
            assert x0 >= 0 and y0 >= 0 and x1 <= width and y1 <= height


def test_a_lively_head_has_no_more_room_than_a_calm_one_or_a_portrait():
    """Else the room would tell a model how much the head moves, and a portrait would always pass for a calm one."""
    face = np.array([250, 150, 330, 250], np.float32)
    portrait = square_crop(face, 0.5, 640, 400)
    for reach in (0, 10, 25):  # pixels to each side, of the 30 and more that the square has
        path = face + np.float32(reach) * np.array([[-1, -1, -1, -1], [0, 0, 0, 0], [1, 1, 1, 1]])
        assert window_square(path, 640, 400) == portrait
    far = window_square(face + np.float32(60) * np.array([[-1, 0, -1, 0], [1, 0, 1, 0]]), 640, 400)
    assert far[2] - far[0] > portrait[2] - portrait[0]  # a path that does not fit


def test_a_crop_that_is_a_pixel_off_square_is_made_square():
    rng, off_square = np.random.default_rng(1), 0
    for _ in range(1000):
        width, height = (int(side) for side in rng.integers(60, 400, 2))
        low = rng.integers(0, [width - 20, height - 20])
        box = np.concatenate([low, rng.integers(low + 10, [width + 1, height + 1])]).astype(np.float32)
        cropped = square_crop(box, 0.5, width, height)
        off_square += cropped[2] - cropped[0] != cropped[3] - cropped[1]
        x0, y0, x1, y1 = square = window_square(box[None], width, height)
        assert x1 - x0 == y1 - y0 and inside(box[None], square)[0]
        if np.ptp(box.reshape(2, 2), axis=0).max() + 1 <= min(width, height):
            assert x0 >= 0 and y0 >= 0 and x1 <= width and y1 <= height
        if inside(box[None], cropped)[0]:
            assert np.abs(np.subtract(square, cropped)).max() <= 1
    assert off_square > 100


def test_lip_mask_covers_the_lips_and_a_quarter_around():
    landmarks = np.full((2, 68, 2), 0.1)
    landmarks[0, 48:] = np.linspace([0.4, 0.5], [0.6, 0.56], 20)  # 0.2 wide: a margin of 0.05
    landmarks[1, 48:] = np.linspace([-0.1, 0.9], [0.02, 0.95], 20)  # half out of the picture
    mask = lip_mask(landmarks, 64)
    assert mask.shape == (2, 64, 64) and mask.dtype == np.float32
    assert mask[0].sum() == pytest.approx(0.3 * 64 * 0.16 * 64, rel=1e-4)  # fractions of pixels count
    rows, columns = np.nonzero(mask[0])
    assert (columns.min(), columns.max()) == (22, 41) and (rows.min(), rows.max()) == (28, 39)
    assert mask[0, 34, 30] == 1 and mask[0, 34, 22] == pytest.approx(0.6, abs=1e-4)
    assert mask[1].sum() == pytest.approx((0.02 + 0.03) * 64 * (0.98 - 0.87) * 64, rel=1e-3)


def test_over_the_edge_the_edge_is_repeated():
    picture = np.random.default_rng(0).integers(0, 255, (40, 100, 3), dtype=np.uint8)
    found = cut(picture, (10, -20, 90, 60))
    assert found.shape == (80, 80, 3)
    assert np.array_equal(found[20:60], picture[:, 10:90])
    assert (found[:20] == picture[0, 10:90]).all() and (found[60:] == picture[-1, 10:90]).all()
    assert np.array_equal(cut(picture, (5, 2, 25, 22)), picture[2:22, 5:25])


def test_nothing_is_stretched(tmp_path):
    """A disc in a wide, in a tall and in a too low picture is round in the sample; the reference too."""
    for width, height in ((200, 90), (90, 200), (150, 40)):
        picture = np.full((height, width, 3), 30, np.uint8)
        middle = (width // 2, height // 2)
        cv2.circle(picture, middle, 15, (220, 220, 220), -1)
        save_video(np.repeat(picture[None], 20, axis=0), tmp_path / "disc.mp4", 25)
        boxes = np.repeat([[middle[0] - 18, middle[1] - 18, middle[0] + 18, middle[1] + 18]], 20, axis=0).astype(
            np.float32
        )
        if height == 40:
            boxes[:10, 0] -= 40  # a path wider than the picture is high
        landmarks = np.random.default_rng(0).normal(size=(20, 68, 2)).astype(np.float32)
        features = tmp_path / "features.safetensors"
        save_file({"features": torch.zeros(40, 2, 3, dtype=torch.float16)}, features)
        source = Clip("disc.mp4@0", tmp_path / "disc.mp4", 0, boxes, landmarks, features, width, height)
        sample = SonicDataset([source], **{**SIZES, "resolution": 128})[0]
        for image in (sample["frames"][3], sample["reference"]):
            bright = image.mean(0).numpy() > 0
            rows, columns = bright.any(1).sum(), bright.any(0).sum()
            assert rows > 20 and abs(int(rows) - int(columns)) <= 2, (width, height)


def test_wrong_use_is_refused():
    with pytest.raises(ValueError, match="at least one clip"):
        SonicDataset([], **SIZES)
    with pytest.raises(ValueError, match="10 ticks, a window needs 11"):
        SonicDataset([clip("a.mp4", 10)], **SIZES)
    with pytest.raises(IndexError):
        SonicDataset([clip("a.mp4", 20)], **SIZES)[-1]
