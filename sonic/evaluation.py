"""How good is a talking portrait? Files in, a report out; what is measured stands in `sonic/metrics.py`.

    python -m sonic.evaluation VIDEO --portrait portrait.jpg --truth puppet_0000.mp4 --window 10

works on any video of one face with sound, and writes VIDEO.evaluation/NAME.json (all numbers and curves), NAME.png (the
plot) and NAME.mp4 (portrait or truth beside the video, with sound).
"""

from __future__ import annotations

import dataclasses
import json
import math
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sonic import flags
from sonic.config import TICK_RATE, UserError
from sonic.evaluation_drawing import draw_plot, text, write_side_by_side
from sonic.media import VideoReader
from sonic.metrics import TRUTH_CURVES, Evaluation, check_length, measure, portrait_face
from sonic.pictures import load_image
from sonic.sound import load_audio

TRUTH_SUFFIX = ".truth.npz"

# ----------------------------------------------------------------------------------------------------------------- files


class VideoFrames:
    """A video's pictures as a sequence that is read when it is asked for, at the video's own rate if that divides 25.

    Any other rate is seen at the nearest one that does: 30 at 25, 15 at 12.5 frames per second.
    """

    def __init__(self, reader: VideoReader, step: int | None = None):
        own = reader.info.fps or TICK_RATE
        self.step = step or max(1, round(TICK_RATE / own))  # ticks per frame
        self.fps = TICK_RATE / self.step
        self.as_stored = abs(self.fps - own) < 0.01 * own
        self._reader = reader

    def __len__(self) -> int:
        return math.ceil(self._reader.num_ticks / self.step)

    def __getitem__(self, index: int) -> np.ndarray:
        return self._reader.read([index * self.step])[0]

    def __iter__(self) -> Iterator[np.ndarray]:
        return (picture for _, picture in self._reader.scan(self.step))


@dataclass(frozen=True)
class Report:
    """The evaluation of a video file, and what it was held against."""

    video: Path
    portrait: Path | None
    truth: Path | None  # as it was given
    truth_video: Path | None
    result: Evaluation
    truth_result: Evaluation | None  # the truth's video, measured likewise
    truth_kind: str | None  # where the truth's curves come from: drawn or measured
    notes: list[str]


def evaluate(
    video: Path | str, portrait: Path | str | None = None, truth: Path | str | None = None, window: int | None = None
) -> Report:
    """Measures a video file with sound; see `measure`.

    truth: an MP4, whose drawn curves NAME.truth.npz are taken as well if they lie beside it, or such a file of curves,
    whose MP4 is. Without drawn curves the mouth in the truth's video is the truth. UserError: bad files, no sound.
    """
    video, notes = Path(video), []
    with ExitStack() as stack:
        reader = stack.enter_context(VideoReader(video))
        if not reader.info.has_audio:
            raise UserError(f"{video} has no sound, which lip sync is measured by: give a video with sound.")
        speech, frames = load_audio(video), VideoFrames(reader)
        if window and not frames.as_stored:
            raise UserError(
                f"--window counts frames, but {video} has {reader.info.fps:g} of them per second and is seen at "
                f"{frames.fps:g}: leave --window out, or give a video of 25 or 12.5 frames per second."
            )
        if window and window >= len(frames):
            notes.append(f"a window of {window} frames leaves no border in {len(frames)}: no seams")
        face = portrait_face(np.array(load_image(portrait)), str(portrait)) if portrait else None
        truth_video, truth_frames, curves = _open_truth(truth, reader, frames, stack) if truth else (None, None, None)
        truth_result, same_size = None, False
        if truth_frames:
            truth_result = measure(
                truth_frames, speech, frames.fps, portrait=face, window=window, name=str(truth_video)
            )
            same_size = truth_frames[0].shape == frames[0].shape
            if not same_size:
                sizes = (f"{f[0].shape[1]} × {f[0].shape[0]}" for f in (truth_frames, frames))
                notes.append("truth and video have {} and {} pixels: no PSNR, no SSIM".format(*sizes))
        result = measure(
            frames,
            speech,
            frames.fps,
            portrait=face,
            truth_curves=curves or (truth_result and {"opening": truth_result.opening, "width": truth_result.width}),
            truth_frames=truth_frames if same_size else None,
            window=window,
            name=str(video),
        )
    kind = "drawn" if curves else "measured" if truth_result else None
    portrait, truth = (Path(path) if path else None for path in (portrait, truth))
    return Report(video, portrait, truth, truth_video, result, truth_result, kind, notes)


def _open_truth(truth: Path | str, reader: VideoReader, frames: VideoFrames, stack: ExitStack):
    """The truth's video, its frames at the clip's times, and its drawn curves at these, each None if there is none."""
    video, curves_file = _truth_files(Path(truth))
    curves = _load_curves(curves_file) if curves_file else None
    rate, pictures = reader.info.fps, None  # curves alone are taken for one number per frame of the clip
    if video:
        truth_reader = stack.enter_context(VideoReader(video))
        rate, pictures = truth_reader.info.fps, VideoFrames(truth_reader, frames.step)
        check_length(len(pictures), len(frames), str(reader.path))
    if curves:
        curves = {name: _at_rate(curve, rate, frames.fps) for name, curve in curves.items()}
        check_length(len(curves["opening"]), len(frames), str(reader.path))
    return video, pictures, curves


def _truth_files(truth: Path) -> tuple[Path | None, Path | None]:
    """The truth's video and its file of drawn curves, one of which was given; None for the other if it is not there."""
    if truth.suffix.lower() != ".npz":
        curves = truth.with_name(truth.stem + TRUTH_SUFFIX)
        return truth, curves if curves.exists() else None
    if not truth.is_file():
        raise UserError(f"{truth} does not exist: check the path of the truth.")
    video = truth.with_name(truth.name.removesuffix(".npz").removesuffix(".truth") + ".mp4")
    return video if video.exists() else None, truth


def _load_curves(path: Path) -> dict[str, np.ndarray]:
    """Opening and width [T] out of a puppet's truth. UserError: not such a file."""
    try:
        with path.open("rb") as stream, np.load(stream) as file:
            curves = {name: np.asarray(file[name], dtype=float) for name in TRUTH_CURVES}
    except KeyError:
        raise UserError(
            f"{path} lacks an array '{TRUTH_CURVES[0]}' or '{TRUTH_CURVES[1]}': give a puppet's truth."
        ) from None
    # What numpy raises for files that are empty, broken, pickled, or one array.
    except (OSError, EOFError, ValueError, TypeError, AttributeError, zipfile.BadZipFile):
        raise UserError(f"{path} cannot be read as a truth: give the .truth.npz of a puppet or its video.") from None
    lengths = {curve.shape for curve in curves.values()}
    if len(lengths) > 1 or len(curves["opening"].shape) != 1 or not all(np.isfinite(c).all() for c in curves.values()):
        raise UserError(f"{path} must hold one finite number per frame in 'opening' and in 'width': make it again.")
    return curves


def _at_rate(curve: np.ndarray, rate: float, fps: float) -> np.ndarray:
    """A curve of `rate` frames per second, read at those that are shown at the beginning of each frame of a clip."""
    if abs(rate - fps) < 0.01 * fps:
        return curve
    shown = np.arange(round(len(curve) / rate * fps)) / fps * rate
    return curve[np.minimum(np.floor(shown + 0.01).astype(int), len(curve) - 1)]


# --------------------------------------------------------------------------------------------------------------- reports


def as_dict(report: Report) -> dict:
    """The report for JSON, with curves; what is not known is None."""
    found, truth = report.result, report.truth_result
    return _plain(
        {
            "video": str(report.video),
            "portrait": report.portrait and str(report.portrait),
            "truth": report.truth and str(report.truth),
            "truth_curves": report.truth_kind,
            "notes": report.notes,
            "frames": found.num_frames,
            "fps": found.fps,
            **_numbers(found),
            "of_truth_video": truth and _numbers(truth),
            "curves": {
                "opening": found.opening,
                "width": found.width,
                "speech_energy": found.energy,
                "silent": found.silent,
                **{f"truth_{name}": curve for name, curve in found.truth_curves.items()},
                "frame_difference": found.differences,
            },
        }
    )


def _numbers(found: Evaluation) -> dict:
    syncs = ("opening_by_truth", "width_by_truth", "opening_by_speech")
    return {
        "face_share": found.face_share,
        "tracks": found.tracks,
        "lip_sync": {name: getattr(found, name) for name in syncs},
        "mouth_opening": {
            "silent_frames": int(found.silent.sum()),
            "in_silence": found.silent_opening,
            "portrait": found.portrait_opening,
            "median": found.median_opening,
            "percentile_95": found.wide_opening,
        },
        "motion": found.motion,
        "window_motion": found.window_motion,
        "identity": found.identity,
        "seams": found.seams,
        "quality": found.quality,
    }


def _plain(value):
    """Dataclasses, arrays and NaN as JSON knows them."""
    if dataclasses.is_dataclass(value):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return round(value, 6) if math.isfinite(value) else None
    return value


def table(report: Report) -> str:
    """The numbers with their units as plain text; a second column holds those of the truth's video."""
    found, truth = report.result, report.truth_result
    lines = [
        f"{report.video}: {found.num_frames} frames, {found.num_frames / found.fps:.2f} s at {found.fps:g} fps, "
        f"face in {found.face_share:.1%} of them{f', in {found.tracks} stretches' if found.tracks > 1 else ''}"
    ]
    lines += [f"note: {note}" for note in report.notes]
    rows = [("lip sync", ("r", "offset", "best r", "confidence"))]
    for title, sync in (
        (f"opening with the {report.truth_kind} truth", found.opening_by_truth),
        (f"width with the {report.truth_kind} truth", found.width_by_truth),
        ("opening with the speech's energy", found.opening_by_speech),
    ):
        if sync:
            rows.append(
                (f"  {title}", (text(sync.r), text(sync.offset, "+.0f"), text(sync.best_r), text(sync.confidence)))
            )
    rows.append(("", ("video", "truth") if truth else ("video",)))
    columns = [_rows(result) for result in (found, truth) if result]
    for cells in zip(*columns, strict=True):
        numbers = tuple(number for _, number in cells)
        if set(numbers) != {"-"}:
            rows.append((cells[0][0], numbers))
    lines += [f"{title:<44}" + "".join(f"{number:>12}" for number in numbers) for title, numbers in rows]
    lines.append("offset: frames, + when the mouth comes late; eyes: distances between the eyes")
    return "\n".join(lines)


def _rows(found: Evaluation) -> list[tuple[str, str]]:
    """Title and number of every row that a video has by itself."""
    motion, windows, identity = found.motion, found.window_motion, found.identity
    seams, quality = found.seams, found.quality
    return [
        ("mouth opening in silence (eyes)", text(found.silent_opening)),
        ("  of the portrait", text(found.portrait_opening)),
        ("  median", text(found.median_opening)),
        ("  95th percentile", text(found.wide_opening)),
        ("head motion (bucket)", text(motion.translation_bucket, ".0f")),
        ("  standard deviation (eyes)", text(motion.translation_spread)),
        ("  windows' mean (bucket)", text(windows and windows.translation_bucket, ".0f")),
        ("expression (bucket)", text(motion.expression_bucket, ".0f")),
        ("  standard deviation (eyes)", text(motion.expression_spread)),
        ("  windows' mean (bucket)", text(windows and windows.expression_bucket, ".0f")),
        ("distance to the portrait's face", text(identity and identity.distance)),
        ("  slope (per s)", text(identity and identity.slope, "+.4f")),
        ("  first 5 s", text(identity and identity.first)),
        ("  last 5 s", text(identity and identity.last)),
        ("seams at multiples of the window", text(seams and seams.ratio, ".2f")),
        ("  largest, of all phases", text(seams and seams.largest, ".2f")),
        ("  over the steps beside them only", text(seams and seams.near_ratio, ".2f")),
        ("  largest, of all phases", text(seams and seams.near_largest, ".2f")),
        ("PSNR (dB)", text(quality and quality.psnr, ".1f")),
        ("SSIM", text(quality and quality.ssim)),
    ]


def write_report(report: Report, folder: Path | str) -> list[Path]:
    """Writes NAME.json, NAME.png and NAME.mp4 into a folder; UserError: not writable, or one of them is an input."""
    paths = output_files(report.video, folder, (report.portrait, report.truth, report.truth_video))
    document, plot, clip = paths
    try:
        document.parent.mkdir(parents=True, exist_ok=True)
        document.write_text(json.dumps(as_dict(report), indent=1, allow_nan=False) + "\n")
        draw_plot(report, plot)
    except OSError as error:
        raise UserError(f"{folder} cannot be written to ({error.strerror}): choose another --output.") from error
    with ExitStack() as stack:
        frames = VideoFrames(stack.enter_context(VideoReader(report.video)))
        sources = {"video": frames}
        if report.truth_video:
            reader = stack.enter_context(VideoReader(report.truth_video))
            sources = {"truth": VideoFrames(reader, frames.step)} | sources
        elif report.portrait:
            sources = {"portrait": [np.array(load_image(report.portrait))] * len(frames)} | sources
        write_side_by_side(report, sources, load_audio(report.video), clip)
    return paths


def output_files(video: Path | str, folder: Path | str, inputs: Sequence[Path | str | None] = ()) -> list[Path]:
    """The three files of a report. UserError: one of them is the video or another input."""
    video, folder = Path(video), Path(folder)
    paths = [folder / f"{video.stem}.{suffix}" for suffix in ("json", "png", "mp4")]
    taken = {Path(path).resolve() for path in (video, *inputs) if path}
    for path in paths:
        if path.resolve() in taken:
            raise UserError(f"{path} would be written over: choose another folder with --output.")
    return paths


# --------------------------------------------------------------------------------------------------------------- command


def main(arguments: list[str] | None = None) -> None:
    parser = flags.Parser("Measure a talking portrait: lip sync, motion, identity, seams, picture quality.")
    files = parser.group("input and output")
    files.add_argument("video", type=Path, help="any video with sound and one face")
    files.add_argument("--portrait", type=Path, help="the picture that it was made from: identity, closed mouth")
    files.add_argument("--truth", type=Path, help="what it should look like: a video, or a puppet's NAME.truth.npz")
    files.add_argument(
        "--output", type=Path, help="folder for the results (default: VIDEO.evaluation beside the video)"
    )
    parser.group("what was made").add_argument(
        "--window", type=int, help="frames of the model's window: measures its seams"
    )
    args = parser.parse_args(arguments)
    if args.window is not None and args.window < 2:
        raise UserError(f"--window must be at least 2 frames, not {args.window}.")
    folder = args.output or args.video.with_name(f"{args.video.stem}.evaluation")
    truth_files = _truth_files(args.truth) if args.truth else ()
    output_files(args.video, folder, (args.portrait, *truth_files))  # before the work, not after it
    report = evaluate(args.video, args.portrait, args.truth, args.window)
    print(table(report))
    for path in write_report(report, folder):
        print(f"written: {path}")


if __name__ == "__main__":
    flags.run(main)
