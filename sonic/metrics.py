"""What can be measured of a talking portrait: lip sync, motion, identity, seams and picture quality of frames in memory.

Axes: T frames, H W pixels, n samples at 16 kHz; lengths in a face are over its inter-ocular distance (eyes), so that no
picture's size matters.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from sonic.config import TICK_RATE, UserError
from sonic.faces import TRACK_SIDE, FaceTrack, detect_faces, face_descriptor, follow_face
from sonic.motion import motion_spread, mouth_opening, mouth_width, spread_to_buckets
from sonic.sync import Sync, compare_curves, silent_frames, speech_energy

DESCRIBE_EVERY = 5  # frames between two face descriptors, which cost 0.1 s each
ENDS = 5.0  # seconds at the beginning and at the end of a clip that tell whether it drifts
STILL = 0.01  # of 255, the least frame difference; without it, seams in a still picture would divide by zero
BEST_PSNR = 100.0  # dB, given to equal pictures
SSIM_WINDOW, SSIM_SIGMA = 11, 1.5  # pixels; Wang et al. 2004, as K1 and K2 are
SSIM_K1, SSIM_K2 = 0.01, 0.03
TRUTH_CURVES = ("opening", "width")


@dataclass(frozen=True)
class PortraitFace:
    """What a video is held against: the face of the picture that it was made from."""

    opening: float  # of the mouth, eyes
    descriptor: np.ndarray  # [128]


@dataclass(frozen=True)
class MotionMeasure:
    """How much head and face move: the training buckets, and the standard deviations whose roots they are."""

    translation_bucket: float  # 0 … 128
    expression_bucket: float
    translation_spread: float  # eyes
    expression_spread: float


@dataclass(frozen=True)
class IdentityMeasure:
    """Distance of dlib's face descriptor to the portrait's; under 0.6 counts as the same person. NaN: clip too short."""

    distance: float  # mean
    slope: float  # per second
    first: float  # mean over the first 5 s of a clip of 10 s or more
    last: float  # and over its last 5 s
    seconds: np.ndarray  # [m], when it was measured
    distances: np.ndarray  # [m]


@dataclass(frozen=True)
class Seams:
    """Mean frame difference at the borders of windows over that elsewhere; 1 is seamless.

    Borders lie before frames phase, window + phase, 2 window + phase …: phase 0 is where windows meet that do not move.
    A near ratio takes for elsewhere only the steps before and after each border: in puppets without seams it strays a
    third as far from 1, for a head does not move evenly (30 s, window 10: standard deviation 0.014, the other 0.038).
    """

    window: int  # frames
    ratio: float  # at phase 0
    largest: float  # over all phases
    largest_phase: int
    near_ratio: float  # at phase 0
    near_largest: float
    near_largest_phase: int
    ratios: np.ndarray  # [window], by phase
    near_ratios: np.ndarray  # [window]


@dataclass(frozen=True)
class Quality:
    """Likeness to the truth's pictures."""

    psnr: float  # dB, from the mean squared error of the whole clip
    ssim: float  # mean over the frames
    masked_psnr: float  # dB, inside the mask; NaN without one


@dataclass(frozen=True)
class Evaluation:
    """Everything that was measured of one clip. What could not be measured is NaN or None; so are frames without a face."""

    fps: float
    landmarks: np.ndarray  # [T, 68, 2], pixels
    tracks: int  # unbroken stretches of one face; more than one after a cut or where the face was lost
    opening: np.ndarray  # [T] of the mouth, eyes
    width: np.ndarray  # [T]
    energy: np.ndarray  # [T] of the speech, 0 … 1
    silent: np.ndarray  # bool [T]
    truth_curves: dict[str, np.ndarray]  # opening and width [T] in the truth's own unit; empty without a truth
    opening_by_truth: Sync | None  # mouth against truth
    width_by_truth: Sync | None
    opening_by_speech: Sync  # mouth opening against the speech's energy
    portrait_opening: float  # eyes
    motion: MotionMeasure  # over the whole clip
    window_motion: MotionMeasure | None  # mean over windows
    identity: IdentityMeasure | None  # None without a portrait
    differences: np.ndarray  # [T - 1], mean absolute difference of neighbouring frames, of 255
    seams: Seams | None
    quality: Quality | None

    @property
    def num_frames(self) -> int:
        return len(self.opening)

    @property
    def face_share(self) -> float:
        """Frames in which the face was followed, of all."""
        return float(np.isfinite(self.opening).mean())

    @property
    def silent_opening(self) -> float:
        """Median mouth opening while nobody speaks, eyes."""
        return _percentile(self.opening[self.silent], 50)

    @property
    def median_opening(self) -> float:
        return _percentile(self.opening, 50)

    @property
    def wide_opening(self) -> float:
        """The 95th percentile of the mouth's opening, eyes."""
        return _percentile(self.opening, 95)


def measure(
    frames: Sequence[np.ndarray],
    speech: np.ndarray,
    fps: float = TICK_RATE,
    *,
    portrait: PortraitFace | None = None,
    truth_curves: Mapping[str, np.ndarray] | None = None,
    truth_frames: Sequence[np.ndarray] | None = None,
    mask: np.ndarray | None = None,
    window: int | None = None,
    describe_every: int = DESCRIBE_EVERY,
    name: str = "the video",
) -> Evaluation:
    """Measures frames uint8 [T, H, W, 3] (or what can be counted, indexed and gone through like them) with speech [n].

    portrait (`portrait_face`): identity. truth_curves (opening, width [T]): lip sync against the truth. truth_frames:
    picture quality; mask, bool [H, W] or [T, H, W]: where masked_psnr is taken. window: seams, motion per window.
    UserError: no face in any frame; a truth that is more than one frame longer or shorter.
    """
    count = len(frames)
    truth_curves = {key: _fitted(truth_curves[key], count, name) for key in TRUTH_CURVES} if truth_curves else {}
    if truth_frames is not None:
        check_length(len(truth_frames), count, name)
    landmarks, tracks = follow(frames)
    if not tracks:
        raise UserError(f"No face was found in any of the {count} frames of {name}: give a video of one face.")
    opening, width = mouth_opening(landmarks), mouth_width(landmarks)
    energy = speech_energy(speech, count, fps)
    differences = frame_differences(frames)
    return Evaluation(
        fps=float(fps),
        landmarks=landmarks,
        tracks=len(tracks),
        opening=opening,
        width=width,
        energy=energy,
        silent=silent_frames(energy, fps),
        truth_curves=truth_curves,
        opening_by_truth=compare_curves(opening, truth_curves["opening"]) if truth_curves else None,
        width_by_truth=compare_curves(width, truth_curves["width"]) if truth_curves else None,
        opening_by_speech=compare_curves(opening, energy),
        portrait_opening=portrait.opening if portrait else math.nan,
        motion=mean_motion([track.landmarks for track in tracks]),
        window_motion=window_motion(tracks, window) if window else None,
        identity=compare_identity(frames, landmarks, portrait, fps, describe_every) if portrait else None,
        differences=differences,
        seams=find_seams(differences, window) if window else None,
        quality=picture_quality(frames, truth_frames, mask) if truth_frames is not None else None,
    )


def portrait_face(image: np.ndarray, name: str = "the portrait") -> PortraitFace:
    """The largest face of a uint8 RGB [H, W, 3] picture. UserError: there is none."""
    faces = detect_faces(image)
    if not faces:
        raise UserError(f"No face was found in {name}: give a picture in which one face looks at the viewer.")
    landmarks = faces[0].landmarks
    return PortraitFace(float(mouth_opening(landmarks[None])[0]), face_descriptor(image, landmarks))


def follow(frames: Sequence[np.ndarray]) -> tuple[np.ndarray, list[FaceTrack]]:
    """Landmarks [T, 68, 2] of the largest face, NaN where there is none, and the tracks that they come from."""

    def pictures() -> Iterator[tuple[int, np.ndarray]]:
        for index, picture in enumerate(frames):
            scale = TRACK_SIDE / max(picture.shape[:2])
            if scale < 1:
                size = (round(picture.shape[1] * scale), round(picture.shape[0] * scale))
                picture = cv2.resize(picture, size, interpolation=cv2.INTER_AREA)
            yield index, picture

    tracks = follow_face(pictures(), frames[0].shape[1])
    landmarks = np.full((len(frames), 68, 2), np.nan)
    for track in tracks:
        landmarks[track.start : track.start + len(track.landmarks)] = track.landmarks
    return landmarks, tracks


def mean_motion(stretches: Sequence[np.ndarray]) -> MotionMeasure:
    """The mean motion of several stretches of landmarks [T, 68, 2], by their lengths."""
    spreads = np.array([motion_spread(stretch) for stretch in stretches])
    buckets = np.array([spread_to_buckets(*spread) for spread in spreads])
    means = np.average(np.hstack([buckets, spreads]), axis=0, weights=[len(stretch) for stretch in stretches])
    return MotionMeasure(*means.tolist())


def window_motion(tracks: Sequence[FaceTrack], window: int) -> MotionMeasure | None:
    """The mean motion of the windows of so many frames that one track fills; None if there is none."""
    stretches = []
    for track in tracks:
        first = -track.start % window  # windows start at multiples of their length, counted from the clip's start
        for start in range(first, len(track.landmarks) - window + 1, window):
            stretches.append(track.landmarks[start : start + window])
    return mean_motion(stretches) if stretches else None


def compare_identity(
    frames: Sequence[np.ndarray], landmarks: np.ndarray, portrait: PortraitFace, fps: float, every: int = DESCRIBE_EVERY
) -> IdentityMeasure:
    """The distance to the portrait in every so manieth frame that has a face."""
    seen = np.flatnonzero(np.isfinite(landmarks[:, 0, 0]))[::every]
    descriptors = np.stack([face_descriptor(frames[int(index)], landmarks[index]) for index in seen])
    distances = np.linalg.norm(descriptors - portrait.descriptor, axis=1)
    seconds = seen / fps
    slope = float(np.polyfit(seconds, distances, 1)[0]) if len(seen) > 1 else math.nan
    first = last = math.nan
    end = len(landmarks) / fps
    if end >= 2 * ENDS:
        first, last = _mean(distances[seconds < ENDS]), _mean(distances[seconds >= end - ENDS])
    return IdentityMeasure(float(distances.mean()), slope, first, last, seconds, distances)


def frame_differences(frames: Sequence[np.ndarray]) -> np.ndarray:
    """Mean absolute difference of neighbouring frames, [T - 1], of 255."""
    differences, before = [], None
    for picture in frames:
        if before is not None:
            differences.append(cv2.norm(picture, before, cv2.NORM_L1) / picture.size)
        before = picture
    return np.array(differences)


def find_seams(differences: np.ndarray, window: int) -> Seams | None:
    """Seams from `frame_differences` [T - 1]; None for a clip that is no longer than one window."""
    if len(differences) < window:
        return None
    differences = np.maximum(differences, STILL)
    mirrored = np.concatenate([differences[1:2], differences, differences[-2:-1]])
    near = (mirrored[:-2] + mirrored[2:]) / 2
    border = np.arange(1, len(differences) + 1) % window  # the phase of the border before each frame but the first
    at = [differences[border == phase].mean() for phase in range(window)]
    ratios = at / np.array([differences[border != phase].mean() for phase in range(window)])
    near_ratios = at / np.array([near[border == phase].mean() for phase in range(window)])

    def ends(ratios: np.ndarray) -> tuple[float, float, int]:
        return float(ratios[0]), float(ratios.max()), int(ratios.argmax())

    return Seams(window, *ends(ratios), *ends(near_ratios), ratios, near_ratios)


def picture_quality(
    frames: Sequence[np.ndarray], truth: Sequence[np.ndarray], mask: np.ndarray | None = None
) -> Quality:
    """PSNR and SSIM of frames against the truth's, as far as both go. ValueError: pictures or mask of another size."""
    errors, masked_errors, likenesses = [], [], []
    for index, (picture, true) in enumerate(zip(frames, truth, strict=False)):
        if picture.shape != true.shape:
            raise ValueError(f"pictures of one size are compared, not of {picture.shape} and {true.shape}.")
        squares = np.square(picture.astype(np.float32) - true)
        errors.append(squares.mean(dtype=np.float64))
        likenesses.append(_ssim(picture, true))
        if mask is not None:
            masked_errors.append(squares[mask[index] if mask.ndim == 3 else mask].mean(dtype=np.float64))
    return Quality(_psnr(errors), _mean(likenesses), _psnr(masked_errors))


def _psnr(errors: Sequence[float]) -> float:
    """PSNR in dB of mean squared errors of uint8 pictures."""
    if not errors:
        return math.nan
    return float(min(10 * np.log10(255**2 / max(np.mean(errors), 1e-12)), BEST_PSNR))


def _ssim(picture: np.ndarray, true: np.ndarray) -> float:
    """Structural similarity of the grey pictures, with the usual Gaussian window, where it lies wholly inside."""
    a, b = (cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(np.float64) for image in (picture, true))

    def blur(image: np.ndarray) -> np.ndarray:
        edge = SSIM_WINDOW // 2
        return cv2.GaussianBlur(image, (SSIM_WINDOW, SSIM_WINDOW), SSIM_SIGMA)[edge:-edge, edge:-edge]

    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b, covariance = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2, blur(a * b) - mean_a * mean_b
    c1, c2 = (SSIM_K1 * 255) ** 2, (SSIM_K2 * 255) ** 2
    likeness = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    return float((likeness / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))).mean())


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if len(values) else math.nan


def _percentile(curve: np.ndarray, percent: float) -> float:
    known = curve[np.isfinite(curve)]
    return float(np.percentile(known, percent)) if len(known) else math.nan


def check_length(length: int, count: int, name: str) -> None:
    """UserError unless a truth of `length` frames can be that of a clip of `count`."""
    if abs(length - count) > 1:
        raise UserError(f"The truth has {length} frames, {name} has {count}: give the truth of this video.")


def _fitted(curve: np.ndarray, count: int, name: str) -> np.ndarray:
    """A truth's curve as long as the clip: one frame may be missing at the end, or be one too many."""
    check_length(len(curve), count, name)
    fitted = np.full(count, np.nan)
    fitted[: len(curve)] = np.asarray(curve)[:count]
    return fitted
