"""SyncNet: the released file's names and shapes, its input as the published code makes it, and what its distances say."""

from pathlib import Path

import numpy as np
import pytest
import torch

from sonic import syncnet
from sonic.config import UserError
from sonic.media import VideoReader, save_video
from sonic.pieces import Screening
from sonic.prepare import prepare
from sonic.sound import load_audio
from sonic.syncnet import FACE_SIDE, GREY, SyncNet, best_offset, face_crops, load_syncnet, mfcc, syncnet_offset

# Rows 0 and 8 of what python_speech_features 0.6 makes of the speech in the test below, as 16-bit samples.
FIRST = [17.857154849393854, 31.83553069008592, 23.88844256005739, 16.84189508355253]
LAST = [16.56555733987498, 18.172233060081105, 12.247399766793169, 3.00974781990806]

# Of syncnet_v2.model, as the published model code defines it: one weight of every layer that has any.
RELEASED = {
    "netcnnaud.0.weight": (64, 1, 3, 3),
    "netcnnaud.1.running_var": (64,),
    "netcnnaud.4.weight": (192, 64, 3, 3),
    "netcnnaud.8.weight": (384, 192, 3, 3),
    "netcnnaud.11.weight": (256, 384, 3, 3),
    "netcnnaud.14.weight": (256, 256, 3, 3),
    "netcnnaud.18.weight": (512, 256, 5, 4),
    "netfcaud.0.weight": (512, 512),
    "netfcaud.1.weight": (512,),
    "netfcaud.3.weight": (1024, 512),
    "netcnnlip.0.weight": (96, 3, 5, 7, 7),
    "netcnnlip.4.weight": (256, 96, 1, 5, 5),
    "netcnnlip.8.weight": (256, 256, 1, 3, 3),
    "netcnnlip.11.weight": (256, 256, 1, 3, 3),
    "netcnnlip.14.weight": (256, 256, 1, 3, 3),
    "netcnnlip.18.weight": (512, 256, 1, 6, 6),
    "netcnnlip.19.running_mean": (512,),
    "netfclip.0.weight": (512, 512),
    "netfclip.3.bias": (1024,),
}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Random weights in the released form: a plain state dict without the counters that newer versions of torch add."""
    torch.manual_seed(0)
    state = {name: value for name, value in SyncNet().state_dict().items() if "num_batches" not in name}
    path = tmp_path_factory.mktemp("syncnet") / "syncnet_v2.model"
    torch.save(state, path)
    return path


def test_names_and_shapes_are_the_released_ones(weights):
    state = torch.load(weights)
    assert {name: tuple(state[name].shape) for name in RELEASED} == RELEASED
    # 12 convolutions and 4 linear layers of two tensors each, and 14 norms of four.
    assert len(state) == 2 * (12 + 4) + 4 * (12 + 2)


def test_embeddings_at_full_size_are_the_same_window_by_window(weights):
    model = load_syncnet(str(weights))
    pictures = torch.rand(7, 3, FACE_SIDE, FACE_SIDE) * 255
    with torch.no_grad():
        together = model.lips(pictures)
        alone = torch.cat([model.lips(pictures[first : first + 5]) for first in range(3)])
        sound = model.sound(torch.rand(2, 20, 13))
    assert together.shape == (3, 1024) and sound.shape == (2, 1024)
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_mfcc_equals_python_speech_features():
    speech = (0.3 * np.sin(np.arange(1600) ** 1.5 / 300)).astype(np.float32)
    ours = mfcc(speech)
    assert ours.shape == (9, 13)
    np.testing.assert_allclose(ours[0, :4], FIRST, rtol=1e-9)
    np.testing.assert_allclose(ours[8, -4:], LAST, rtol=1e-9)


def test_mfcc_against_the_library_itself():
    library = pytest.importorskip("python_speech_features", reason="pip install python_speech_features")
    speech = np.random.default_rng(0).normal(0, 0.1, 16000).astype(np.float32)
    speech[3000:5000] = 0
    samples = np.clip(np.round(speech.astype(float) * 32768), -32768, 32767).astype(np.int16)
    np.testing.assert_allclose(mfcc(speech), library.mfcc(samples, 16000), atol=1e-9)


@pytest.mark.parametrize("late", [-15, -3, 0, 4, 15])
def test_a_mouth_that_comes_late_has_a_positive_offset(late):
    torch.manual_seed(1)
    said = torch.randn(140, 8)
    offset, confidence = best_offset(lips=said[20 - late : 120 - late], sound=said[20:120])
    assert offset == late and confidence > 1


def test_embeddings_that_have_nothing_to_do_with_each_other_have_no_confidence():
    torch.manual_seed(2)
    assert best_offset(torch.randn(200, 1024), torch.randn(200, 1024))[1] < 1  # of distances of 45


def test_the_crop_reaches_below_the_chin_and_is_grey_outside_of_the_picture():
    picture = np.zeros((100, 200, 3), np.uint8)
    picture[..., 0] = 200  # red
    picture[60:80, 100:120] = (0, 0, 255)  # what lies right under the face's middle
    crop = face_crops([picture], [[90, 20, 130, 60]])[0]  # 56 pixels wide and high, from x 82 and y 20
    assert crop.shape == (FACE_SIDE, FACE_SIDE, 3)
    assert tuple(crop[10, 10]) == (0, 0, 200)  # BGR
    assert tuple(crop[4 * 45, 4 * 25]) == (255, 0, 0)
    edge = face_crops([picture], [[0, 20, 40, 60]])[0]
    assert tuple(edge[100, 5]) == (GREY,) * 3 and tuple(edge[100, 100]) == (0, 0, 200)
    with pytest.raises(ValueError, match="outside"):
        face_crops([picture], [[500, 20, 540, 60]])


def test_the_crop_does_not_follow_single_boxes_that_jump():
    picture = np.random.default_rng(0).integers(0, 255, (90, 160, 3), np.uint8)
    boxes = np.tile([50.0, 20, 90, 60], (20, 1))
    steady = face_crops([picture] * 20, boxes)
    boxes[7:9] += 30
    assert (face_crops([picture] * 20, boxes) == steady).all()


def test_a_piece_has_an_offset_and_a_confidence_that_depend_on_its_sound(weights):
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 255, (28, 80, 80, 3), np.uint8)
    boxes = np.tile([20.0, 10, 60, 50], (28, 1))
    speech = rng.normal(0, 0.1, 28 * 640).astype(np.float32)
    offset, confidence = syncnet_offset(weights, iter(frames), boxes, speech)
    assert -15 <= offset <= 15 and isinstance(offset, int) and confidence > 0
    assert syncnet_offset(weights, frames, boxes, 0.1 * speech)[1] != confidence
    with pytest.raises(ValueError, match="6 ticks"):
        syncnet_offset(weights, frames, boxes, speech[: 5 * 640])


def test_batches_do_not_show(weights, monkeypatch):
    rng = np.random.default_rng(0)
    piece = (
        rng.integers(0, 255, (28, 80, 80, 3), np.uint8),
        np.tile([20.0, 10, 60, 50], (28, 1)),
        rng.normal(0, 0.1, 28 * 640).astype(np.float32),
    )
    whole = syncnet_offset(weights, *piece)
    monkeypatch.setattr(syncnet, "BATCH", 9)
    batched = syncnet_offset(weights, *piece)
    assert batched == pytest.approx(whole, rel=1e-3)


def test_other_files_are_refused_with_one_sentence(weights, tmp_path):
    (tmp_path / "text.model").write_text("no weights")
    (tmp_path / "empty.model").touch()
    (tmp_path / "cut.model").write_bytes(weights.read_bytes()[:100_000])
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.model")
    torch.save(torch.zeros(3), tmp_path / "tensor.model")
    state = torch.load(weights)
    torch.save(state | {"netfclip.3.bias": torch.zeros(256)}, tmp_path / "small.model")
    for path in (*tmp_path.iterdir(), tmp_path / "missing.model", tmp_path):
        with pytest.raises(UserError, match="--syncnet_path") as error:
            load_syncnet(str(path))
        assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """A folder with two seconds of a talking head."""
    folder = tmp_path_factory.mktemp("videos")
    path = Path(__file__).parent / "data" / "talking_head_2.mp4"
    with VideoReader(path) as reader:
        save_video(reader.read(range(50)), folder / "talk.mp4", 25, load_audio(path)[: 50 * 640])
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def prepared(videos, cache, weights, **more):
    screening = Screening(syncnet_path=str(weights), **more)
    return prepare(videos, cache, num_frames=10, frame_step=1, screening=screening, progress=False)


def test_syncnet_decides_where_its_weights_are_given(videos, cache, weights, tmp_path, monkeypatch):
    said, asked = (3, 5.0), []

    def offset(path, frames, boxes, speech, device):
        asked.append((len(list(frames)), boxes.shape, len(speech)))
        return said

    monkeypatch.setattr(syncnet, "syncnet_offset", offset)
    (piece,) = prepared(videos, cache, weights).pieces
    numbers = piece.numbers
    assert piece.kept and (numbers["syncnet_offset"], numbers["syncnet_confidence"], numbers["sync_shift"]) == (3, 5, 3)
    assert asked == [(50, (50, 4), 50 * 640)] and (piece.start, piece.num_ticks) == (3, 47)

    said = (3, 1.0)
    (piece,) = prepared(videos, cache, weights).pieces  # what it said is kept
    assert piece.kept and len(asked) == 1
    for entry in (cache / "syncnet").rglob("*.json"):
        entry.write_text("damaged")
    with pytest.raises(UserError, match="SyncNet hears no sync"):
        prepared(videos, cache, weights)
    (piece,) = prepared(videos, cache, weights, keep_all=True).pieces
    assert piece.kept and piece.step == "sync" and piece.measured == 1 and piece.threshold == 3
    assert prepared(videos, cache, weights, min_syncnet_confidence=0.5).pieces[0].step is None
    assert len(asked) == 2


def test_syncnet_is_not_asked_about_what_is_dropped_before(videos, cache, weights, monkeypatch):
    monkeypatch.setattr(syncnet, "syncnet_offset", None)
    with pytest.raises(UserError, match="overexposed"):
        prepared(videos, cache, weights, max_brightness=31)


def test_wrong_weights_are_told_before_anything_is_measured(videos, tmp_path):
    with pytest.raises(UserError, match="syncnet_path"):
        prepared(videos, tmp_path, tmp_path / "missing.model")
    assert not list((tmp_path / "tracks").iterdir())
