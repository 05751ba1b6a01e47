"""Faces: boxes and 68 landmarks in a picture, one person's track through a video, the face mask and the square crop.

A box is x0, y0, x1, y1 in pixels. Landmarks are dlib's 68 points: 0-16 jaw, 17-26 brows, 27-35 nose, 36-47 eyes,
48-67 mouth.
"""

from __future__ import annotations

import importlib.util
import math
import threading
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import cv2
import dlib
import numpy as np
from scipy.ndimage import convolve1d

from sonic.media import VideoReader

MASK_GROWTH = 1.1  # SPEC section 4
FOREHEAD = 0.35  # height from brows to hairline over that from brows to chin; face detectors' boxes hold the forehead

DETECT_SIDES = (
    640,
    1280,
)  # pixels; the longer side at which faces are looked for, the second only if the first finds none
TRACK_SIDE = 960  # pixels; the longer side at which a video is tracked: landmarks good to about a pixel of 1080p
TRACK_FACE = 100  # pixels; a followed face is shrunk to this before it is verified. dlib's detector needs 80
VERIFY_MARGIN = 0.6  # of the face's side, how far around it is looked for
PREDICT_FACE = 256  # pixels; landmarks are predicted on a face of this size, for dlib rounds them to whole pixels
PREDICT_MARGIN = 0.4
CHIP_MARGIN = 0.6  # of the face's side; what the descriptor sees of a face's surroundings, also of a tilted one
VERIFY_EVERY = 5  # ticks between two detections of a followed face
VERIFY_SCORE = -0.3  # a face that is known to be here may score lower than one that is searched for (0)
BLOCK = 1500  # ticks of landmarks that are kept as one array
MAX_GAP = 10  # ticks, 0.4 s: longer gaps split a track (issue 2, section 4)
DETECTABLE = 80  # pixels; the smallest face that dlib's detector finds
OTHER_OVERLAP = 0.2  # intersection over union under which a box is another face's
LOOKS_LOST, LOOK_AGAIN = 10, 25  # looks that find nothing, after which only every 25th tick is looked at
SAME_OVERLAP = 0.55  # intersection over union of landmarks' and detection's box; 0.74 to 0.86 on the trial videos
BACK_OVERLAP = 0.3  # the same for a face that comes back after a gap, for it may have moved
MAX_JUMP = 0.35  # of the face's size per tick: no head moves so fast, another face takes its place so
CUT = (
    25.0  # of 255, mean change from tick to tick of a 32 x 32 thumbnail; talking heads change by 1, camera shake by 10
)

# dlib's detector box from the 68 points, measured over detections in both trial videos: the landmark predictor was
# trained on such boxes, and one that follows from the last landmarks has none of the detector's 8 % steps in size.
BOX_SIDE = 2.89  # times the points' root mean square distance from their mean
BOX_SHIFT = -0.15  # times the same, downwards, from the points' mean

# Zero-phase smoothing over time. The mouth moves at up to 8 Hz: of 5 Hz it keeps 89 %, the rest of the face 84 %; the
# noise of the landmarks falls to 84 % and to 70 %. The face's kernel fits a parabola to 5 ticks (Savitzky-Golay).
SMOOTH_FACE = np.array([-3.0, 12.0, 17.0, 12.0, -3.0]) / 35
SMOOTH_MOUTH = np.array([1.0, 10.0, 1.0]) / 12
MOUTH_AND_CHIN = [*range(5, 12), *range(48, 68)]


@dataclass
class Face:
    """One face in a picture, in its pixels."""

    box: np.ndarray  # float32 [4], forehead to chin
    landmarks: np.ndarray  # float32 [68, 2]


@dataclass
class FaceTrack:
    """One person's face over consecutive ticks from `start`, in pixels of the full-size picture."""

    start: int
    boxes: np.ndarray  # float32 [T, 4]
    landmarks: np.ndarray  # float32 [T, 68, 2]


# -------------------------------------------------------------------------------------------------------- in one picture


# dlib's models keep what they are computing in themselves: two threads in one of them end the process.
_ONE_AT_A_TIME = threading.Lock()


@lru_cache(maxsize=1)
def _detector():
    return dlib.get_frontal_face_detector()


@lru_cache(maxsize=1)
def _predictor():
    return dlib.shape_predictor(_weights("shape_predictor_68_face_landmarks.dat"))


@lru_cache(maxsize=1)
def _recogniser():
    return dlib.face_recognition_model_v1(_weights("dlib_face_recognition_resnet_model_v1.dat"))


def _weights(name: str) -> str:
    # face_recognition_models is found, not imported: it needs pkg_resources, which new setuptools no longer have.
    spec = importlib.util.find_spec("face_recognition_models")
    if spec is None:
        raise ModuleNotFoundError("face_recognition_models is not installed: pip install -r requirements.txt")
    return str(Path(spec.submodule_search_locations[0]) / "models" / name)


def detect_faces(image: np.ndarray) -> list[Face]:
    """The faces in a uint8 RGB [H, W, 3] picture of any size, largest first; an empty list if there is none."""
    for side in DETECT_SIDES:
        scale = side / max(image.shape[:2])
        small = _resize(image, scale)
        boxes = _detect(small, 0.0)
        if boxes:
            points = [_predict(image, box / scale) for box in boxes]
            faces = [Face(landmark_box(p), p.astype(np.float32)) for p in points]
            return sorted(faces, key=lambda face: -_area(face.box))
    return []


def face_descriptor(image: np.ndarray, landmarks: np.ndarray) -> np.ndarray:
    """Who it is: dlib's face descriptor float [128] of the face at landmarks [68, 2] in a uint8 RGB [H, W, 3] picture.

    Euclidean distance tells people apart: dlib's authors take two photographs under 0.6 for one person.
    """
    near, corner, scale = _around(image, _detector_box(np.array(landmarks, float)), CHIP_MARGIN, PREDICT_FACE)
    if not near.size:
        raise ValueError("the landmarks lie outside the picture.")
    points = (landmarks - corner + 0.5) * scale - 0.5  # on a face of one size, for dlib takes whole pixels only
    shape = dlib.full_object_detection(
        dlib.rectangle(0, 0, near.shape[1] - 1, near.shape[0] - 1),
        dlib.points([dlib.point(round(float(x)), round(float(y))) for x, y in points]),
    )
    with _ONE_AT_A_TIME:
        return np.array(_recogniser().compute_face_descriptor(near, shape))


def landmark_box(landmarks: np.ndarray) -> np.ndarray:
    """Landmarks [..., 68, 2] to face boxes float32 [..., 4]: their bounds, up to the hairline."""
    low, high = landmarks.min(axis=-2), landmarks.max(axis=-2)
    top = low[..., 1] - FOREHEAD * (high[..., 1] - low[..., 1])
    return np.stack([low[..., 0], top, high[..., 0], high[..., 1]], axis=-1).astype(np.float32)


def _resize(image: np.ndarray, scale: float) -> np.ndarray:
    size = (max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale)))
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)


def _detect(image: np.ndarray, score: float) -> list[np.ndarray]:
    """dlib's detector boxes (brows to chin) float [4] that score at least so much."""
    with _ONE_AT_A_TIME:
        rectangles, _, _ = _detector().run(image, 0, score)
    return [np.array([r.left(), r.top(), r.right() + 1, r.bottom() + 1], dtype=float) for r in rectangles]


def _predict(image: np.ndarray, box: np.ndarray) -> np.ndarray:
    """Landmarks float [68, 2] for a detector box, predicted on the face at one fixed size."""
    near, corner, scale = _around(image, box, PREDICT_MARGIN, PREDICT_FACE)
    x0, y0, x1, y1 = (round(float(value)) for value in (box - np.tile(corner, 2)) * scale)
    with _ONE_AT_A_TIME:
        shape = _predictor()(near, dlib.rectangle(x0, y0, x1 - 1, y1 - 1))
    points = np.array([(point.x, point.y) for point in shape.parts()], dtype=float)
    return (points + 0.5) / scale - 0.5 + corner


def _around(image: np.ndarray, box: np.ndarray, margin: float, face: int) -> tuple[np.ndarray, np.ndarray, float]:
    """The picture around a box, `margin` box sides wide, resized so that the box is `face` pixels: with corner and scale."""
    side = float(box[2] - box[0])
    x0, y0 = (max(0, math.floor(value - margin * side)) for value in box[:2])
    x1, y1 = (max(0, math.ceil(value + margin * side)) for value in box[2:])
    near, scale = image[y0:y1, x0:x1], face / side
    if near.size:
        size = (max(1, round(near.shape[1] * scale)), max(1, round(near.shape[0] * scale)))
        near = cv2.resize(near, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
    return near, np.array([x0, y0], dtype=float), scale


def _detector_box(landmarks: np.ndarray) -> np.ndarray:
    """The box in which dlib's detector would see these landmarks, float [4]."""
    centre = landmarks.mean(axis=0)
    spread = math.sqrt(((landmarks - centre) ** 2).sum(axis=1).mean())
    centre[1] += BOX_SHIFT * spread
    half = BOX_SIDE * spread / 2
    return np.concatenate([centre - half, centre + half])


# ---------------------------------------------------------------------------------------------------------- over a video


# Called at every tick with the tick, the picture and its landmarks [68, 2], or None where no face is followed.
Watcher = Callable[[int, np.ndarray, np.ndarray | None], None]


def track_face(reader: VideoReader, watch: Watcher | None = None) -> list[FaceTrack]:
    """Follows the largest face through a video: a box and 68 landmarks for every tick of each track, smoothed.

    A track is one person without a break: gaps up to 0.4 s are interpolated, longer ones, jumps and cuts begin a new one.
    Memory does not grow with the picture. A video without faces gives an empty list. UserError: truncated.
    """
    return follow_face(reader.scan(max_side=TRACK_SIDE), reader.info.width, watch)


def follow_face(
    pictures: Iterable[tuple[int, np.ndarray]], width: int | None = None, watch: Watcher | None = None
) -> list[FaceTrack]:
    """The same for (tick, uint8 RGB [H, W, 3]) as they come, ticks ascending by one; in pixels of a picture `width` wide.

    `watch` sees every picture too, so that what else is measured needs no second decoding.
    """
    follower, scale = _Follower(), 1.0
    for tick, picture in pictures:
        follower.see(tick, picture)
        scale = (width or picture.shape[1]) / picture.shape[1]
        if watch:
            watch(tick, picture, None if follower.lost else follower.last)
    return [_finish(trail, scale) for trail in follower.trails()]


def second_face(picture: np.ndarray, landmarks: np.ndarray) -> float:
    """Size of the largest other face as a share of the face at landmarks [68, 2], in uint8 RGB [H, W, 3]; 0 if there is none.

    Finds faces of half that size, if they are 80 pixels large in a picture of 960 (what dlib's detector needs).
    """
    own = _detector_box(landmarks)
    side = own[2] - own[0]
    scale = min(2 * DETECTABLE / side, TRACK_SIDE / max(picture.shape[:2]), 1.0)
    found = [box / scale for box in _detect(_resize(picture, scale), 0.0)]
    return max((float((box[2] - box[0]) / side) for box in found if overlap(own, box) < OTHER_OVERLAP), default=0.0)


class Trail:
    """One person's landmarks at ascending ticks, of which a two-hour video has 180,000: small arrays, each by itself, would
    leave gaps in memory that take as much again."""

    def __init__(self, tick: int, points: np.ndarray):
        self.ticks, self._blocks, self._newest = array("l"), [], []
        self.add(tick, points)

    def add(self, tick: int, points: np.ndarray) -> None:
        """Landmarks [68, 2] of a later tick."""
        self.ticks.append(tick)
        self._newest.append(points.astype(np.float32))
        if len(self._newest) == BLOCK:
            self._blocks.append(np.stack(self._newest))
            self._newest.clear()

    @property
    def last(self) -> np.ndarray:
        """The landmarks that were added last, float64 [68, 2]."""
        return (self._newest[-1] if self._newest else self._blocks[-1][-1]).astype(float)

    def point(self, number: int) -> np.ndarray:
        """One of the 68 points over the ticks, float32 [n, 2]."""
        blocks = [*self._blocks, np.stack(self._newest)] if self._newest else self._blocks
        return np.concatenate([block[:, number] for block in blocks])


@dataclass
class _Follower:
    """The state of following one face. `known` holds what is verified, `pending` the ticks since the last detection."""

    known: list[Trail] = field(default_factory=list)  # one per person
    pending: list[tuple[int, np.ndarray, np.ndarray]] = field(default_factory=list)  # tick, picture, landmarks
    last: np.ndarray | None = None  # landmarks of the last tick, None while no face is followed
    lost: int = 0  # ticks since the face was last seen
    thumbnail: np.ndarray | None = None  # the last picture, small
    looks: int = 0  # in a row that found nothing

    def see(self, tick: int, picture: np.ndarray) -> None:
        """Takes in the next tick's picture."""
        before = self.thumbnail
        self.thumbnail = cv2.resize(picture[::4, ::4], (32, 32), interpolation=cv2.INTER_AREA).astype(float)
        if before is not None and np.abs(self.thumbnail - before).mean() > CUT:
            self._settle()
            self._begin(tick, picture)
            return
        if self.last is None:
            if tick % (VERIFY_EVERY if self.looks < LOOKS_LOST else LOOK_AGAIN) == 0:
                self._begin(tick, picture)
            return
        if self.lost:
            self._look_again(tick, picture)
            return
        points = _predict(picture, _detector_box(self.last))
        if _moved(points, self.last) > MAX_JUMP:
            self._settle()
            self._look_again(tick, picture)
            return
        self.pending.append((tick, picture, points))
        self.last = points
        if len(self.pending) >= VERIFY_EVERY:
            self._settle()

    def _begin(self, tick: int, picture: np.ndarray) -> None:
        """Starts a new person with the largest face, if there is one."""
        self.last, self.lost = None, 0
        faces = detect_faces(picture)
        self.looks = 0 if faces else self.looks + 1
        if faces:
            self.last = faces[0].landmarks.astype(float)
            self.known.append(Trail(tick, self.last))

    def _look_again(self, tick: int, picture: np.ndarray) -> None:
        """One tick of a gap: the face may come back where it was, and only for as long as a gap may last."""
        box = _find_near(picture, _detector_box(self.last), BACK_OVERLAP)
        if box is not None:
            self.last, self.lost = _predict(picture, box), 0
            self.known[-1].add(tick, self.last)
            return
        self.lost += 1
        if self.lost > MAX_GAP:
            self._begin(tick, picture)

    def _settle(self) -> None:
        """Verifies the pending ticks: the newest speaks for all; if it fails, each has to speak for itself."""
        if not self.pending:
            return
        tick, picture, points = self.pending[-1]
        confirmed = self.pending
        if _find_near(picture, _detector_box(points), SAME_OVERLAP) is None:
            confirmed = []
            for tick, picture, points in self.pending[:-1]:
                if _find_near(picture, _detector_box(points), SAME_OVERLAP) is None:
                    break
                confirmed.append((tick, picture, points))
            self.lost = len(self.pending) - len(confirmed)
        for tick, _, points in confirmed:
            self.known[-1].add(tick, points)
        self.last = self.known[-1].last
        self.pending = []

    def trails(self) -> Iterator[Trail]:
        """Each person's, in order, handed over once: the tracks made of them take their place in memory."""
        self._settle()
        while self.known:
            yield self.known.pop(0)


def _find_near(picture: np.ndarray, box: np.ndarray, least: float) -> np.ndarray | None:
    """The detector's box of the face that is expected at `box`, or None. Looks only there, at one small face size."""
    near, corner, scale = _around(picture, box, VERIFY_MARGIN, TRACK_FACE)
    if not near.size:  # the expected place has left the picture
        return None
    found = [other / scale + np.tile(corner, 2) for other in _detect(near, VERIFY_SCORE)]
    best = max(found, key=lambda other: overlap(box, other), default=None)
    return best if best is not None and overlap(box, best) >= least else None


def _moved(points: np.ndarray, before: np.ndarray) -> float:
    """How far the face's middle went, in units of its size."""
    box = _detector_box(before)
    return float(np.linalg.norm(points.mean(axis=0) - before.mean(axis=0)) / (box[2] - box[0]))


def _finish(trail: Trail, scale: float) -> FaceTrack:
    """Interpolates the ticks between, smooths without delay, and scales to the full-size picture."""
    ticks = np.array(trail.ticks)
    every = np.arange(ticks[0], ticks[-1] + 1)
    landmarks = np.empty((len(every), 68, 2), np.float32)
    for number in range(68):  # one by one, so that a long video needs no copies of all of them
        kernel = SMOOTH_MOUTH if number in MOUTH_AND_CHIN else SMOOTH_FACE
        filled = np.stack([np.interp(every, ticks, column) for column in trail.point(number).T], axis=1)
        landmarks[:, number] = scale * convolve1d(filled, kernel, axis=0, mode="nearest")
    return FaceTrack(int(ticks[0]), landmark_box(landmarks), landmarks)


# ----------------------------------------------------------------------------------------------------- boxes and the mask


def _area(box: np.ndarray) -> float:
    return float(max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1]))


def overlap(a: np.ndarray, b: np.ndarray) -> float:
    """Intersection over union of two boxes, 0 to 1."""
    inside = _area(np.concatenate([np.maximum(a[:2], b[:2]), np.minimum(a[2:], b[2:])]))
    union = _area(a) + _area(b) - inside
    return inside / union if union else 0.0


def union_box(boxes: np.ndarray) -> np.ndarray:
    """The smallest box [4] that holds all boxes [T, 4]."""
    return np.concatenate([boxes[:, :2].min(axis=0), boxes[:, 2:].max(axis=0)])


def face_mask(box: np.ndarray, width: int, height: int, growth: float = MASK_GROWTH) -> np.ndarray:
    """The face box grown by 1.1 about its centre, uint8 [H, W], 255 inside on black (SPEC section 4).

    The released preprocessing rounds the centre and the half sides down; the mask is then resized with Lanczos, like the
    picture. So written, it equals the reference tensors.
    """
    x0, y0, x1, y1 = (float(value) for value in box)
    centre_x, centre_y = (x0 + x1) // 2, (y0 + y1) // 2
    half_width, half_height = (x1 - x0) * growth // 2, (y1 - y0) * growth // 2
    mask = np.zeros((height, width), dtype=np.uint8)
    top, bottom = max(int(centre_y - half_height), 0), max(int(centre_y + half_height), 0)
    left, right = max(int(centre_x - half_width), 0), max(int(centre_x + half_width), 0)
    mask[top:bottom, left:right] = 255
    return mask


def square_crop(box: np.ndarray, expand: float, width: int, height: int) -> tuple[int, int, int, int]:
    """The released preprocessing's crop around a face: x0, y0, x1, y1 inside a picture of that width and height.

    The box is grown by `expand` times its size on each side and clipped to the picture; the crop has the shorter side of
    that, and lies as near to the face's own centre as it can within it. Each edge is rounded by itself, as it is there,
    so that the crop may be a pixel off square.
    """
    x0, y0, x1, y1 = (float(value) for value in box)
    grow_x, grow_y = expand * (x1 - x0), expand * (y1 - y0)
    left, right = max(x0 - grow_x, 0.0), min(x1 + grow_x, float(width))
    top, bottom = max(y0 - grow_y, 0.0), min(y1 + grow_y, float(height))
    centre_x, centre_y = (left + right) / 2, (top + bottom) / 2
    half = min(right - left, bottom - top) / 2
    spare = abs((bottom - top) - (right - left)) / 2  # how far the crop can go along the longer axis
    if right - left < bottom - top:
        centre_y += min(max((y0 + y1) / 2 - centre_y, -spare), spare)
    else:
        centre_x += min(max((x0 + x1) / 2 - centre_x, -spare), spare)
    return round(centre_x - half), round(centre_y - half), round(centre_x + half), round(centre_y + half)
