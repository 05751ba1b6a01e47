"""CelebV-HQ: its annotation file and raw videos that the user has downloaded -> one MP4 per annotated clip.

celebvhq_info.json lists `clips`: an id -> `ytb_id` (the raw video), `duration` {start_sec, end_sec} in it, and `bbox` {top,
bottom, left, right} as shares of the picture. A clip is the square that the dataset's own tool cuts (download_tools.py of
github.com/CelebV-HQ/CelebV-HQ), at the pictures of 25 ticks per second that training reads, with the sound of the same time.
"""

from __future__ import annotations

import json
import math
import re
import stat
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import av
import numpy as np
from tqdm import tqdm

from sonic.config import SAMPLES_PER_TICK, TICK_RATE, UserError
from sonic.files import whole_file
from sonic.media import VideoReader, VideoWriter
from sonic.sound import audio_stretches
from sonic.track_cache import make_folder
from sonic.workers import Share, in_workers

MARGIN = 0.02  # of the picture, on each side of the annotated box
OVERRUN = TICK_RATE // 2  # ticks that a clip may reach beyond the end of its video, which differs from copy to copy
CRF = 12  # x264's; what it loses of an already compressed video is not seen, at two to three times the size of 18
NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,199}")  # of a clip: it becomes a file's name

# What readers, decoders and writers raise on files that are no use.
BROKEN = (UserError, av.error.FFmpegError, OSError, ValueError, IndexError, MemoryError)


@dataclass(frozen=True)
class Annotated:
    """One clip of the annotation file."""

    name: str
    video: str  # the raw file's name without its ending
    start: int  # ticks of the raw video, [start, end)
    end: int
    box: tuple[float, float, float, float]  # top, bottom, left, right in 0..1


def read_annotations(path) -> tuple[list[Annotated], list[tuple[str, str]]]:
    """The clips of celebvhq_info.json, and the name and reason of each entry that is broken. UserError: no such file."""
    try:
        entries = json.loads(Path(path).read_text(encoding="utf-8"))["clips"].items()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): give CelebV-HQ's celebvhq_info.json") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} has no 'clips' as celebvhq_info.json has them: download it again") from error
    clips, broken = [], []
    for name, entry in entries:
        try:
            clips.append(_annotated(name, entry))
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            missing = isinstance(error, KeyError)
            broken.append((name, f"broken entry: {f'it has no {error}' if missing else error}"))
    return clips, broken


def _annotated(name: str, entry: dict) -> Annotated:
    if not NAME.fullmatch(name):
        raise ValueError("its id cannot be the name of a file")
    start, end = (float(entry["duration"][key]) for key in ("start_sec", "end_sec"))
    if not 0 <= start < end < math.inf:
        raise ValueError(f"it lasts from {start:g} s to {end:g} s")
    box = top, bottom, left, right = tuple(float(entry["bbox"][key]) for key in ("top", "bottom", "left", "right"))
    if not (0 <= top < bottom <= 1 and 0 <= left < right <= 1):
        raise ValueError(f"its box {box} does not lie in 0 to 1")
    first = round(start * TICK_RATE)
    return Annotated(name, str(entry["ytb_id"]), first, max(round(end * TICK_RATE), first + 1), box)


def clip_box(box: Sequence[float], width: int, height: int) -> tuple[int, int, int, int]:
    """The square x0, y0, x1, y1 that the dataset's own tool cuts for an annotated box (top, bottom, left, right in 0..1)."""
    top, bottom = round(max(box[0] - MARGIN, 0) * height), round(min(box[1] + MARGIN, 1) * height)
    left, right = round(max(box[2] - MARGIN, 0) * width), round(min(box[3] + MARGIN, 1) * width)
    half = min(bottom - top, right - left) // 2
    x0, y0 = (left + right) // 2 - half, (top + bottom) // 2 - half
    return x0, y0, x0 + 2 * half, y0 + 2 * half


# ------------------------------------------------------------------------------------------------------------- cutting


def cut_clips(
    info, data_root, videos: Sequence[str], folder, share: Share, num_workers: int = 0, progress: bool = True
) -> list[tuple[str, str]]:
    """Cuts all clips of an annotation file out of `videos` (paths below data_root) into FOLDER/ID.mp4.

    Gives the name and the reason of each clip that cannot be cut. What an earlier call has cut stays; each file appears
    whole or not at all, so that several calls may work side by side. Of several processes each cuts its share of the videos,
    and waits for the others. UserError: the annotations, or a folder to write to.
    """
    data_root, folder = Path(data_root), Path(folder)
    clips, left_out = read_annotations(info)
    raw = {Path(video).stem: data_root / video for video in reversed(videos)}  # of two copies the first one counts
    by_video: dict[str, list[Annotated]] = {}
    for clip in clips:
        if clip.video in raw:
            by_video.setdefault(clip.video, []).append(clip)
        else:
            left_out.append((clip.name, f"{clip.video} is not among the videos"))
    make_folder(folder)
    tasks = [(raw[video], sorted(own, key=lambda clip: clip.start), folder) for video, own in by_video.items()]
    tasks, uncut = share.of(tasks), []
    total = sum(len(own) for _, own, _ in tasks)
    with tqdm(total=total, desc="CelebV-HQ clips", unit="clip", disable=None if progress else True) as bar:
        for number, outcomes, died in in_workers(_cut_video, tasks, num_workers):
            if died:
                outcomes = [(clip.name, "killed the process that cut it") for clip in tasks[number][1]]
            uncut += [(name, reason) for name, reason in outcomes if reason]
            bar.update(len(outcomes))
    return left_out + share.gather(uncut)


def _cut_video(path: Path, clips: Sequence[Annotated], folder: Path) -> list[tuple[str, str | None]]:
    """(name, None or the reason why it cannot be cut) of each clip of one raw video; the files of the others are there."""
    outcomes: dict[str, str | None] = {}
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # a pipe would be waited for
            raise ValueError("its video is no regular file")
        source = {"bytes": status.st_size, "time": status.st_mtime_ns, "crf": CRF}
        made_of = {clip: json.dumps(asdict(clip) | source) for clip in clips}
        todo = [clip for clip in clips if _made_of(folder / f"{clip.name}.mp4") != made_of[clip]]
        if todo:
            sounds = audio_stretches(path, [(c.start * SAMPLES_PER_TICK, c.end * SAMPLES_PER_TICK) for c in todo])
            with VideoReader(path) as reader:
                for clip, sound in zip(todo, sounds, strict=True):
                    try:
                        _cut(reader, sound, clip, folder / f"{clip.name}.mp4", made_of[clip])
                    except BROKEN as error:
                        outcomes[clip.name] = _why(error, path)
    except BROKEN as error:  # the video as a whole
        return [(clip.name, _why(error, path)) for clip in clips]
    return [(clip.name, outcomes.get(clip.name)) for clip in clips]


def _why(error: Exception, path: Path) -> str:
    return str(error).removeprefix(f"{path.absolute()}").lstrip(" :") or type(error).__name__


def _cut(reader: VideoReader, sound: np.ndarray, clip: Annotated, target: Path, made_of: str) -> None:
    """One clip to its file."""
    end = min(clip.end, reader.num_ticks)
    if end <= clip.start or clip.end - end > OVERRUN:
        seconds = reader.num_ticks / TICK_RATE
        raise ValueError(f"ends at {clip.end / TICK_RATE:g} s, but its video lasts {seconds:g} s")
    x0, y0, x1, y1 = clip_box(clip.box, reader.info.width, reader.info.height)
    if x1 <= x0:
        raise ValueError("its box has no pixels in this video")
    with (
        whole_file(target) as own,  # two runs may cut the same clip
        VideoWriter(own, TICK_RATE, x1 - x0, y1 - y0, sound, {"comment": made_of}, crf=CRF) as writer,
    ):
        for _, picture in reader.frames(range(clip.start, end)):
            writer.write(picture[None, y0:y1, x0:x1])


def _made_of(path: Path) -> str | None:
    """What a clip's file says that it was cut from."""
    if not path.exists():
        return None
    try:
        with av.open(str(path)) as container:
            return container.metadata.get("comment")
    except (av.error.FFmpegError, OSError):  # damaged, so it is cut again
        return None
