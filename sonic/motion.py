"""How much a face moves: tracks to motion buckets, and the mouth's opening and width. Landmarks are dlib's 68 points."""

from __future__ import annotations

import numpy as np

MAX_BUCKET = 128.0  # SPEC section 6

RIGID = [27, 28, 29, 30, 33, 36, 39, 42, 45]  # nose bridge, base of the nose, eye corners: what no muscle moves
EXPRESSIVE = [*range(17, 27), 37, 38, 40, 41, 43, 44, 46, 47, *range(48, 68)]  # brows, lids, mouth
MOUTH = slice(48, 68)
INNER_LIPS = ([61, 62, 63], [67, 66, 65])  # upper, lower

# A bucket is a constant times a standard deviation (in inter-ocular distances), so twice the bucket is twice the motion.
# The constants bring ordinary talking between 32 and 96 (SPEC section 6), in windows of 2 s as the released model has
# them. Measured on the two talking heads of the trial videos, lowest / 10 % / median / 90 % / highest:
#   head position  0.093 / 0.15 / 0.23 / 0.34 / 0.38     ->  25 / 41 / 63 / 92 / 103
#   expression     0.030 / 0.036 / 0.052 / 0.065 / 0.077  ->  39 / 46 / 68 / 85 / 101
NOSE_DEPTH = 2.0  # length of the line between the eyes' outer corners over how far the nose's tip lies before it
TRANSLATION_SCALE = 270.0
EXPRESSION_SCALE = 1300.0


def motion_buckets(landmarks: np.ndarray) -> tuple[float, float]:
    """(translation, expression) of a window, each in [0, 128] (SPEC section 6), from landmarks [T, 68, 2]."""
    return spread_to_buckets(*motion_spread(landmarks))


def motion_spread(landmarks: np.ndarray) -> tuple[float, float]:
    """How far head and face move about their mean, (translation, expression) from landmarks [T, 68, 2].

    translation: standard deviation of the head's position; expression: that of brows, lids and mouth after each tick is
    aligned on the rigid points. Both over the inter-ocular distance, so neither depends on resolution, face size or rate.
    """
    points = np.asarray(landmarks, dtype=np.float64)
    size = np.median(face_size(points))
    head = points[:, RIGID].mean(axis=1) / size  # [T, 2]; the box would move with an opening mouth, these do not
    translation = np.sqrt(head.var(axis=0).sum())
    faces = _align(points)[:, EXPRESSIVE] / size
    expression = np.sqrt(faces.var(axis=0).sum(axis=-1).mean())
    return float(translation), float(expression)


def spread_to_buckets(translation: float, expression: float) -> tuple[float, float]:
    """The buckets of a window whose head and face move so far (`motion_spread`)."""
    return (
        float(min(TRANSLATION_SCALE * translation, MAX_BUCKET)),
        float(min(EXPRESSION_SCALE * expression, MAX_BUCKET)),
    )


def window_buckets(landmarks: np.ndarray) -> tuple[float, float]:
    """`motion_buckets` not cut off at 128: what tells a lively window from a wild one."""
    translation, expression = motion_spread(landmarks)
    return TRANSLATION_SCALE * translation, EXPRESSION_SCALE * expression


def head_yaw(landmarks: np.ndarray) -> np.ndarray:
    """Degrees [T] that the head is turned to the side, from landmarks [T, 68, 2]; positive to the picture's right.

    The nose's tip lies before the line through the eyes' outer corners by half of that line's length (about 45 of 90 mm in
    adults). Turned by an angle, seen from afar, the line shrinks with the cosine, and the tip goes to the side with the sine:
    tangent = 2 * the tip's way from the line's middle, along the line, over the line's length. Tilting the head in the
    picture changes neither.
    """
    points = np.asarray(landmarks, dtype=np.float64)
    right, left, tip = points[:, 36], points[:, 45], points[:, 30]
    line = left - right
    along = ((tip - (right + left) / 2) * line).sum(axis=1) / np.maximum((line**2).sum(axis=1), 1e-9)
    return np.degrees(np.arctan(NOSE_DEPTH * along))


def face_size(landmarks: np.ndarray) -> np.ndarray:
    """Inter-ocular distance [T] of landmarks [T, 68, 2], in their unit: between the middles of the eyes' corners."""
    right, left = landmarks[:, [36, 39]].mean(axis=1), landmarks[:, [42, 45]].mean(axis=1)
    return np.linalg.norm(left - right, axis=-1)


def mouth_opening(landmarks: np.ndarray) -> np.ndarray:
    """Gap between the inner lips over the inter-ocular distance, [T], from landmarks [T, 68, 2]."""
    upper, lower = INNER_LIPS
    gap = np.linalg.norm(landmarks[:, lower] - landmarks[:, upper], axis=-1).mean(axis=-1)
    return gap / face_size(landmarks)


def mouth_width(landmarks: np.ndarray) -> np.ndarray:
    """Distance between the mouth's corners over the inter-ocular distance, [T], from landmarks [T, 68, 2]."""
    return np.linalg.norm(landmarks[:, 54] - landmarks[:, 48], axis=-1) / face_size(landmarks)


def _align(points: np.ndarray) -> np.ndarray:
    """Landmarks [T, 68, 2] with each tick moved, turned and scaled onto the mean of the rigid points."""
    # A plane as complex numbers: turning and scaling is one multiplication, and least squares one division.
    plane = points[..., 0] + 1j * points[..., 1]
    plane = plane - plane[:, RIGID].mean(axis=1, keepdims=True)
    size = np.sqrt((abs(plane[:, RIGID]) ** 2).mean(axis=1, keepdims=True))
    plane = plane / size
    target = plane[0, RIGID]
    for _ in range(3):  # the mean depends on the alignment and the other way round; this settles at once
        rigid = plane[:, RIGID]
        turn = (target * rigid.conj()).sum(axis=1) / (abs(rigid) ** 2).sum(axis=1)
        plane = plane * turn[:, None]
        target = plane[:, RIGID].mean(axis=0)
        target = target / np.sqrt((abs(target) ** 2).mean())
    plane = plane * np.median(size)
    return np.stack([plane.real, plane.imag], axis=-1)
