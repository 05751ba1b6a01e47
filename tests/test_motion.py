"""Motion buckets and mouth curves: what they react to, and what they must not react to."""

from pathlib import Path

import numpy as np
import pytest

from sonic.config import MOTION_SCALES
from sonic.faces import track_face
from sonic.media import VideoReader
from sonic.motion import MAX_BUCKET, RIGID, face_size, motion_buckets, mouth_opening, mouth_width

TICKS = np.arange(50)


def plain_face() -> np.ndarray:
    """68 points with an inter-ocular distance of about 60 pixels; only their rough places matter here."""
    points = np.zeros((68, 2))
    angle = np.linspace(np.pi, 0, 17)
    points[0:17] = np.stack([70 * np.cos(angle), 20 + 75 * np.sin(angle)], axis=1)
    points[17:27] = np.stack([np.r_[np.linspace(-55, -12, 5), np.linspace(12, 55, 5)], np.full(10, -25.0)], axis=1)
    points[27:31] = np.stack([np.zeros(4), np.linspace(-5, 25, 4)], axis=1)
    points[31:36] = np.stack([np.linspace(-12, 12, 5), np.full(5, 33.0)], axis=1)
    for start, centre in ((36, -30), (42, 30)):
        x = [-12, -5, 5, 12, 5, -5]
        points[start : start + 6] = np.stack([np.add(x, centre), [0, -4, -4, 0, 4, 4]], axis=1)
    angle = np.linspace(np.pi, -np.pi, 12, endpoint=False)
    points[48:60] = np.stack([25 * np.cos(angle), 55 - 10 * np.sin(angle)], axis=1)
    angle = np.linspace(np.pi, -np.pi, 8, endpoint=False)
    points[60:68] = np.stack([20 * np.cos(angle), 55 - 3 * np.sin(angle)], axis=1)
    return points + np.array([200, 300])


def talking(opening: float, moves: float = 0.0, ticks=TICKS) -> np.ndarray:
    """Landmarks [T, 68, 2]: the lower lip and jaw go down by up to `opening` pixels, the head moves by `moves`."""
    points = np.repeat(plain_face()[None], len(ticks), axis=0)
    down = opening * (0.5 + 0.5 * np.sin(2 * np.pi * ticks / 7.3))
    points[:, [*range(4, 13), *range(55, 60), 65, 66, 67], 1] += down[:, None]
    points[..., 0] += moves * np.sin(2 * np.pi * ticks / 31)[:, None]
    return points


def buckets(points: np.ndarray) -> np.ndarray:
    return np.array(motion_buckets(points))


def similarity(points: np.ndarray, rng) -> np.ndarray:
    """Each tick turned in the plane, scaled and moved at random, as a restless camera would."""
    count = len(points)
    turn, scale = rng.uniform(-0.4, 0.4, count), rng.uniform(0.8, 1.25, count)
    matrix = scale[:, None, None] * np.stack([np.cos(turn), -np.sin(turn), np.sin(turn), np.cos(turn)], 1).reshape(
        -1, 2, 2
    )
    return np.einsum("tij,tpj->tpi", matrix, points) + rng.uniform(-50, 50, (count, 1, 2))


def test_buckets_are_proportional_to_motion():
    for side, swings in (
        (0, [talking(0, 4 * much) for much in range(4)]),
        (1, [talking(4 * much) for much in range(4)]),
    ):
        found = [buckets(swing)[side] for swing in swings]
        assert found[1] > 10 and np.allclose(found, found[1] * np.arange(4), rtol=0.02, atol=1e-3)
    assert buckets(talking(500, 2000)).tolist() == [MAX_BUCKET, MAX_BUCKET]


def test_neither_depends_on_resolution_or_place():
    expected = buckets(talking(12, 9))
    for scale, shift in ((0.13, 0), (1, [300, -40]), (7.5, 1000)):
        assert np.allclose(buckets(talking(12, 9) * scale + shift), expected, atol=1e-6)


def test_neither_depends_on_the_frame_rate():
    points = talking(12, 9, np.arange(100))
    for step in (2, 3):
        assert np.abs(buckets(points[::step]) - buckets(points)).max() < 2.5


def test_translation_ignores_the_mouth():
    assert buckets(talking(30))[0] < 1e-3
    assert buckets(talking(30, 9))[0] == pytest.approx(buckets(talking(0, 9))[0])


def test_expression_ignores_translation_scale_and_turn():
    still, mouth = plain_face()[None].repeat(50, axis=0), talking(12)
    for seed in range(5):
        rng = np.random.default_rng(seed)
        assert buckets(similarity(still, rng))[1] < 1e-3
        moved = similarity(mouth, rng)
        assert buckets(moved)[1] == pytest.approx(buckets(mouth)[1], rel=0.06)


def test_tracking_noise_is_a_low_bucket():
    rng = np.random.default_rng(0)
    noisy = plain_face() + rng.normal(scale=0.003 * 60, size=(50, 68, 2))
    assert (buckets(noisy) < 8).all()


@pytest.mark.parametrize("number", [1, 2])
def test_ordinary_talking_lies_between_32_and_96(number):
    with VideoReader(Path(__file__).parent / "data" / f"talking_head_{number}.mp4") as reader:
        (track,) = track_face(reader)
    found = np.array(
        [
            motion_buckets(track.landmarks[start : start + 50 : step])
            for step in (1, 2)
            for start in range(0, len(track.boxes) - 50, 4)  # windows of 2 s, at 25 and 12.5 frames per second
        ]
    )
    assert (np.percentile(found, 10, axis=0) > 32).all() and (np.percentile(found, 90, axis=0) < 96).all(), found


def test_mouth_curves():
    points = talking(12)
    opening, width = mouth_opening(points), mouth_width(points)
    assert opening.shape == width.shape == (50,)
    size = face_size(points)
    assert np.allclose(size, 60)
    expected = 12 * (0.5 + 0.5 * np.sin(2 * np.pi * TICKS / 7.3)) / 60
    assert np.allclose(opening - opening.min(), expected - expected.min(), atol=1e-9)
    assert np.allclose(width, 50 / 60)
    turned = similarity(points, np.random.default_rng(0))
    assert np.allclose(mouth_opening(turned), opening) and np.allclose(mouth_width(turned), width)


def test_scales_and_rigid_points():
    assert MOTION_SCALES == {"mild": 1.0, "moderate": 1.5, "intense": 2.0}
    assert not set(RIGID) & set(range(48, 68))
