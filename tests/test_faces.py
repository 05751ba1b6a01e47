"""Faces: found at any size, followed as one person, and the mask and crop of the released preprocessing."""

import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import cv2
import numpy as np
import pytest

import sonic.faces
from sonic.config import UserError
from sonic.faces import (
    BLOCK,
    MAX_GAP,
    SMOOTH_FACE,
    SMOOTH_MOUTH,
    Face,
    Trail,
    _Follower,
    detect_faces,
    face_descriptor,
    face_mask,
    follow_face,
    landmark_box,
    overlap,
    square_crop,
    track_face,
    union_box,
)
from sonic.media import VideoReader, save_video

DATA = Path(__file__).parent / "data"


@lru_cache
def talking(number: int) -> np.ndarray:
    """uint8 [88, 640, 360, 3]; faces of about 90 and 130 pixels."""
    with VideoReader(DATA / f"talking_head_{number}.mp4") as reader:
        return reader.read(range(reader.num_ticks))


@lru_cache
def tracked(number: int):
    with VideoReader(DATA / f"talking_head_{number}.mp4") as reader:
        return track_face(reader)


def track(frames: np.ndarray, path: Path):
    save_video(frames, path, 25)
    with VideoReader(path) as reader:
        return track_face(reader)


def extent(mask: np.ndarray) -> tuple[int, int, int, int]:
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


# ------------------------------------------------------------------------------------------------------ boxes and masks


def test_mask_is_rounded_as_in_the_released_preprocessing():
    # The first two are the boxes of the reference tensors; the third has an odd width and height.
    for box, size, expected in (
        ((90, 110, 210, 260), (300, 420), (84, 103, 216, 267)),
        ((200, 60, 310, 190), (512, 288), (195, 54, 315, 196)),
        ((90, 110, 211, 261), (300, 420), (84, 102, 216, 268)),
        ((-10, 5, 60, 90), (64, 64), (0, 1, 63, 64)),
    ):
        mask = face_mask(np.array(box), *size)
        assert mask.shape == (size[1], size[0]) and mask.dtype == np.uint8
        assert set(np.unique(mask)) == {0, 255}
        assert extent(mask) == expected
        assert (mask > 0).sum() == (expected[2] - expected[0]) * (expected[3] - expected[1])
    assert not face_mask(np.array([70, 0, 90, 20]), 64, 64).any()


def test_square_crop_is_that_of_the_released_preprocessing():
    assert square_crop((90, 110, 210, 260), 0.5, 300, 420) == (30, 65, 270, 305)
    assert square_crop((200, 60, 310, 190), 0.5, 512, 288) == (145, 15, 365, 235)


def released_crop(box, width: int, height: int) -> tuple[int, ...]:
    """The same for `expand` 0.5, in whole quarters of a pixel, which need no rounding on the way."""
    sides = []
    for low, high, limit in ((box[0], box[2], width), (box[1], box[3], height)):
        low, high, limit = 4 * low, 4 * high, 4 * limit
        sides.append((max(low - (high - low) // 2, 0), min(high + (high - low) // 2, limit), (low + high) // 2))
    side = min(end - start for start, end, _ in sides)
    starts = [min(max(middle - side / 2, start), end - side) for start, end, middle in sides]
    return tuple(round(edge / 4) for edge in (*starts, *(start + side for start in starts)))


def test_square_crop_rounds_each_edge_by_itself():
    """Odd boxes, also at and over the edges of the picture; a good part of these crops is a pixel off square."""
    assert square_crop((10, 10, 31, 40), 0.0, 100, 100) == (10, 14, 31, 36)  # edges 14.5 and 35.5 go to the even
    rng, off_square = np.random.default_rng(0), 0
    for _ in range(5000):
        width, height = (int(side) for side in rng.integers(64, 900, 2))
        x0, y0 = int(rng.integers(-20, width - 20)), int(rng.integers(-20, height - 20))
        box = (x0, y0, int(rng.integers(max(x0, 0) + 1, width + 20)), int(rng.integers(max(y0, 0) + 1, height + 20)))
        left, top, right, bottom = found = square_crop(box, 0.5, width, height)
        assert found == released_crop(box, width, height), (box, width, height)
        assert found == square_crop(np.array(box, dtype=np.float32), 0.5, np.int64(width), np.int64(height))
        assert 0 <= left <= right <= width and 0 <= top <= bottom <= height
        off_square += right - left != bottom - top
    assert off_square > 500


def test_square_crop_is_inside_whatever_the_box():
    rng = np.random.default_rng(0)
    for _ in range(500):
        width, height = rng.integers(64, 500, 2)
        low = rng.uniform(0, [width - 20, height - 20])
        box = np.concatenate([low, low + rng.uniform(10, [width, height] - low)])
        x0, y0, x1, y1 = square_crop(box, rng.uniform(0, 1), width, height)
        assert abs((x1 - x0) - (y1 - y0)) <= 1 and min(x1 - x0, y1 - y0) >= 9
        assert x0 >= 0 and y0 >= 0 and x1 <= width and y1 <= height


def test_box_arithmetic():
    boxes = np.array([[10, 20, 30, 40], [5, 25, 20, 60]], dtype=np.float32)
    assert union_box(boxes).tolist() == [5, 20, 30, 60]
    assert overlap(np.array([0, 0, 10, 10]), np.array([5, 0, 15, 10])) == pytest.approx(1 / 3)
    assert overlap(np.array([0, 0, 10, 10]), np.array([20, 0, 30, 10])) == 0


# -------------------------------------------------------------------------------------------------------- in one picture


def test_faces_are_found_at_any_size():
    picture = talking(2)[0]
    whole = detect_faces(picture)
    assert len(whole) == 1
    assert whole[0].landmarks.shape == (68, 2)
    for scale in (0.2, 0.5, 3.0):
        resized = cv2.resize(picture, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
        found = detect_faces(resized)
        assert len(found) == 1, scale
        eyes = np.linalg.norm(whole[0].landmarks[36] - whole[0].landmarks[45])
        assert np.abs(found[0].landmarks / scale - whole[0].landmarks).mean() < 0.06 * eyes
        assert overlap(found[0].box / scale, whole[0].box) > 0.8
    portrait = cv2.resize(picture[80:380, 40:340], (128, 128), interpolation=cv2.INTER_AREA)
    assert len(detect_faces(portrait)) == 1


def test_largest_face_first_and_none_in_noise():
    pair = np.concatenate([talking(1)[0], talking(2)[0]], axis=1)
    faces = detect_faces(pair)
    assert len(faces) == 2
    assert faces[0].box[0] > 360 > faces[1].box[2]  # the man's is the larger one
    noise = np.random.default_rng(0).integers(0, 255, (200, 300, 3), dtype=np.uint8)
    assert detect_faces(noise) == []


def test_the_descriptor_tells_people_apart():
    smaller = cv2.resize(talking(2)[3], None, fx=0.6, fy=0.6, interpolation=cv2.INTER_AREA)
    pictures = (talking(1)[0], talking(2)[0], smaller)
    woman, man, small = (face_descriptor(picture, detect_faces(picture)[0].landmarks) for picture in pictures)
    assert woman.shape == (128,) and woman.dtype == np.float64
    assert np.linalg.norm(man - small) < 0.4 < 0.6 < np.linalg.norm(man - woman)
    near = face_descriptor(talking(1)[0], tracked(1)[0].landmarks[0])  # smoothed landmarks show the same face
    assert np.linalg.norm(near - woman) < 0.2
    with pytest.raises(ValueError, match="outside"):
        face_descriptor(talking(1)[0], tracked(1)[0].landmarks[0] + 5000)


# ---------------------------------------------------------------------------------------------------------- over a video


def test_pictures_are_followed_as_a_file_is():
    (found,) = follow_face(enumerate(talking(2)[:30]), width=720)
    assert np.array_equal(found.landmarks[:20], 2 * tracked(2)[0].landmarks[:20])
    (plain,) = follow_face(enumerate(talking(2)[:30]))
    assert np.array_equal(2 * plain.landmarks, found.landmarks)


@pytest.mark.parametrize("number", [1, 2])
def test_every_tick_of_a_talking_head_has_its_face(number):
    (found,) = tracked(number)
    assert found.start == 0
    assert found.boxes.shape == (88, 4) and found.landmarks.shape == (88, 68, 2)
    assert found.boxes.dtype == found.landmarks.dtype == np.float32
    low, high = found.landmarks.min(axis=1), found.landmarks.max(axis=1)
    assert (low[:, 0] >= found.boxes[:, 0]).all() and (high <= found.boxes[:, 2:]).all()
    for tick in (0, 31, 87):
        (face,) = detect_faces(talking(number)[tick])
        eyes = np.linalg.norm(face.landmarks[36] - face.landmarks[45])
        assert np.abs(face.landmarks - found.landmarks[tick]).mean() < 0.06 * eyes


def test_tracks_are_in_pixels_of_the_full_picture(tmp_path):
    large = np.stack([cv2.resize(f, (1080, 1920), interpolation=cv2.INTER_CUBIC) for f in talking(1)[:20]])
    (found,) = track(large, tmp_path / "large.mp4")
    assert np.abs(found.landmarks / 3 - tracked(1)[0].landmarks[:20]).mean() < 1.5


def test_short_gaps_are_filled_and_long_ones_split(tmp_path):
    frames = talking(2).copy()
    frames[30:38, 120:330, 100:270] = 128  # something before the face for 0.32 s
    (whole,) = track(frames, tmp_path / "short.mp4")
    assert (whole.start, len(whole.boxes)) == (0, 88)
    assert np.abs(whole.landmarks - tracked(2)[0].landmarks).mean() < 4
    frames[30 : 30 + MAX_GAP + 4, 120:330, 100:270] = 128
    first, second = track(frames, tmp_path / "long.mp4")
    assert first.start == 0 and 29 <= len(first.boxes) <= 31
    assert 43 <= second.start <= 49 and second.start + len(second.boxes) == 88


def test_it_stays_the_same_person(tmp_path):
    """The followed face goes away for a while and shrinks beside a larger one: the track never goes over to the other."""
    woman, man = talking(1).copy(), talking(2).copy()
    pair = np.concatenate([woman, man], axis=2)
    pair[25:33, 120:330, 460:630] = 128
    (found,) = track(pair, tmp_path / "pair.mp4")
    assert len(found.boxes) == 88 and (found.boxes[:, 0] > 360).all()
    for tick in range(30, 88):  # shrinks to half over 15 ticks, about the face
        scale = 1 - 0.5 * min((tick - 29) / 15, 1)
        matrix = np.array([[scale, 0, (1 - scale) * 185], [0, scale, (1 - scale) * 226]])
        man[tick] = cv2.warpAffine(talking(2)[tick], matrix, (360, 640), borderMode=cv2.BORDER_REPLICATE)
    (found,) = track(np.concatenate([woman, man], axis=2), tmp_path / "shrinks.mp4")
    assert len(found.boxes) == 88 and (found.boxes[:, 0] > 360).all()
    assert np.ptp(found.boxes[:, 2] - found.boxes[:, 0]) > 40


def test_landmarks_that_went_astray_are_caught():
    """A follower whose landmarks have slid off the face finds back to it within one round of verification."""
    follower = _Follower()
    for tick in range(20):
        follower.see(tick, talking(2)[tick])
        if tick == 7:
            follower.last = follower.last * 0.8 + 30
    (trail,) = follower.trails()
    eyes = np.linalg.norm(trail.point(36)[0] - trail.point(45)[0])
    assert trail.ticks[-1] == 19 and np.abs(trail.last - tracked(2)[0].landmarks[19]).mean() < 0.05 * eyes


def test_a_trail_gives_back_what_was_added_across_blocks():
    points = np.random.default_rng(0).normal(size=(2 * BLOCK + 3, 68, 2)).astype(np.float32)
    for count in (1, BLOCK - 1, BLOCK, 2 * BLOCK + 3):
        trail = Trail(7, points[0])
        for tick, one in enumerate(points[1:count], 9):
            trail.add(tick, one)
        assert list(trail.ticks) == [7, *range(9, 8 + count)]
        assert np.array_equal(trail.point(40), points[:count, 40]) and np.array_equal(trail.last, points[count - 1])


def test_a_cut_begins_another_person(tmp_path):
    """Both faces stand at the same place in the picture, so that only the cut tells them apart."""
    frames = np.concatenate([talking(1)[:43], talking(2)[:45]])
    first, second = track(frames, tmp_path / "cut.mp4")
    assert (first.start, len(first.boxes)) == (0, 43)
    assert (second.start, len(second.boxes)) == (43, 45)


def test_mouths_are_not_damped():
    """A mouth curve at 5 Hz keeps most of its swing through the smoothing."""
    for kernel, hertz, kept in ((SMOOTH_MOUTH, 5, 0.85), (SMOOTH_MOUTH, 8, 0.7), (SMOOTH_FACE, 2, 0.9)):
        phase = 2 * np.pi * hertz / 25 * (np.arange(len(kernel)) - len(kernel) // 2)
        assert kernel.sum() == pytest.approx(1)
        assert (kernel * np.cos(phase)).sum() > kept


def test_no_face_and_truncated(tmp_path):
    assert track(np.full((30, 96, 96, 3), 120, np.uint8), tmp_path / "grey.mp4") == []
    content = (DATA / "talking_head_1.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="truncated"), VideoReader(tmp_path / "cut.mp4") as reader:
        track_face(reader)


def test_threads_may_look_at_once():
    """As visitors of the page do; dlib itself would end the process."""
    pictures = [cv2.resize(frame, None, fx=size, fy=size) for frame in talking(1)[:4] for size in (1.0, 0.8)]
    alone = [detect_faces(picture)[0].landmarks for picture in pictures]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda picture: detect_faces(picture)[0].landmarks, pictures * 4))
    assert all(np.array_equal(one, other) for one, other in zip(alone * 4, together, strict=True))


def test_a_long_video_takes_memory_for_its_landmarks_alone(monkeypatch):
    """dlib stood in for: what is kept of a tick are 68 points in fp32, 544 bytes, twice while they are smoothed, and the two
    edges of their box."""
    still = np.random.default_rng(0).uniform(20, 100, (68, 2))
    monkeypatch.setattr(sonic.faces, "detect_faces", lambda picture: [Face(landmark_box(still), still)])
    monkeypatch.setattr(sonic.faces, "_predict", lambda picture, box: still.copy())
    monkeypatch.setattr(sonic.faces, "_find_near", lambda picture, box, least: box)
    picture, peaks = np.zeros((128, 128, 3), np.uint8), []
    for ticks in (500, 3500):
        tracemalloc.start()
        (track,) = follow_face((tick, picture) for tick in range(ticks))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert len(track.landmarks) == ticks
    assert (peaks[1] - peaks[0]) / 3000 < 1250
