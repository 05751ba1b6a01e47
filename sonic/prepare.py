"""A folder of videos to prepared clips: face tracks and audio features, cached, resumable, spread over processes.

Stage 1 (worker processes, no torch): probe, check the sound, track the face. Stage 2 (this process): audio features.
Several processes of one run each do their `Share` of the videos, and then all read the whole cache.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import re
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import astuple, dataclass, field, replace
from pathlib import Path

import av
import cv2
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from tqdm import tqdm

from sonic.config import FEATURES_PER_TICK, SAMPLES_PER_TICK, TICK_RATE, UserError
from sonic.faces import track_face
from sonic.media import VideoReader, load_audio

VIDEO_SUFFIXES = {".mp4", ".mov", ".mkv", ".webm"}
VERSION = 1  # of stage 1's results; raise it when tracks would come out otherwise, and cached ones are made anew
SILENCE = -60.0  # dBFS; below lies the hiss of an empty track

HELD_OUT_SHARE = 0.05  # of the videos, where there are enough of them
ENOUGH_VIDEOS = 10
HELD_OUT_TAIL = 0.2  # of every clip's time, where there are not


@dataclass(frozen=True)
class Clip:
    """One person speaking without a break: consecutive ticks of one video. Boxes and landmarks in its pixels."""

    name: str  # relative path @ first tick, unique
    path: Path
    start: int  # first tick, on the video's clock
    boxes: np.ndarray  # float32 [T, 4]
    landmarks: np.ndarray  # float32 [T, 68, 2]
    features: Path  # safetensors: the whole video's audio features, fp16 [2 * ticks, layers, width]
    width: int
    height: int
    part_of: Clip | None = field(default=None, repr=False, compare=False)

    @property
    def num_ticks(self) -> int:
        return len(self.boxes)

    @property
    def whole(self) -> Clip:
        """The clip as it was prepared, if this is a part of one."""
        return self.part_of or self

    @property
    def video(self) -> str:
        """The video's path below the data folder."""
        return self.name.rpartition("@")[0]

    def part(self, first: int, last: int) -> Clip:
        """The clip's ticks [first, last), counted from its own start."""
        start = self.start + first
        name = f"{self.video}@{start}"
        boxes, landmarks = self.boxes[first:last], self.landmarks[first:last]
        return replace(self, name=name, start=start, boxes=boxes, landmarks=landmarks, part_of=self.whole)


@dataclass(frozen=True)
class Share:
    """One process's share of work that `count` processes do together: every count-th item, from the index-th on.

    `gather` gives the items of all processes, in their order, and so waits for all; they are in one list.
    """

    index: int = 0
    count: int = 1
    gather: Callable[[list], list] = list

    def of(self, items: Sequence) -> list:
        return list(items[self.index :: self.count])


@dataclass
class Report:
    """How much work a preparation did, and how much of an earlier one it could use."""

    tracks_made: int = 0
    tracks_reused: int = 0
    features_made: int = 0
    features_reused: int = 0

    @staticmethod
    def sum(reports: Sequence[Report]) -> Report:
        """The work of several processes together."""
        return Report(*(sum(counts) for counts in zip(*(astuple(one) for one in reports), strict=True)))


@dataclass
class PreparedData:
    """What training reads: the usable clips, and each unusable video with its reason."""

    clips: list[Clip] = field(default_factory=list)
    left_out: list[tuple[str, str]] = field(default_factory=list)
    report: Report = field(default_factory=Report)

    def table(self) -> str:
        """One line per video that was left out, and a summary, as plain text."""
        videos = len({clip.video for clip in self.clips})
        seconds = sum(clip.num_ticks for clip in self.clips) / TICK_RATE
        lines = [
            f"{videos} videos used: {len(self.clips)} clips, {seconds:.1f} s; {len(self.left_out)} videos left out"
        ]
        # A name may hold a line break, which must not break the table.
        names = [repr(name)[1:-1] for name, _ in self.left_out]
        column = min(max(map(len, names), default=0), 60)
        lines += [f"  {name:<{column}}  {reason}" for name, (_, reason) in zip(names, self.left_out, strict=True)]
        return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------------ the doors


def prepare(
    data_root,
    cache_dir,
    extractor,
    *,
    num_frames: int,
    frame_step: int,
    num_workers: int = 0,
    progress: bool = True,
    share: Share | None = None,
) -> PreparedData:
    """Tracks and features for every video below `data_root`, from the cache where it has them; writes prepared.json.

    extractor: `sonic.audio.AudioExtractor`. A clip has at least num_frames * frame_step + 1 ticks: a window and a
    reference frame. With a `share` this process makes what is missing of its own videos only, and waits for the others;
    all get the same result. UserError, with the table: no video can be used.
    """
    share = share or Share()
    data_root, cache_dir = Path(data_root), Path(cache_dir)
    videos = find_videos(data_root, cache_dir)
    if not videos:
        wanted = " ".join(sorted(VIDEO_SUFFIXES))
        raise UserError(f"{data_root} holds no video ({wanted}): give the folder of your videos with --data_root.")
    data = PreparedData()
    tracks, features = cache_dir / "tracks", cache_dir / "features" / extractor.name
    _make_folder(tracks)
    own, needed = share.of(videos), num_frames * frame_step + 1
    entries = _track_all(data_root, own, tracks, num_workers, progress, data.report)
    outcomes = []
    for name in tqdm(own, desc="audio features", unit="video", disable=None if progress else True):
        video = entries[name]
        reason = video.reason or _too_short(video, needed)
        reason = reason or _listen(data_root / name, video, extractor, features, data.report)
        outcomes.append((name, video.key, reason))

    outcomes = {name: (key, reason) for name, key, reason in share.gather(outcomes)}
    data.report = Report.sum(share.gather([data.report]))
    for name in videos:
        key, reason = outcomes.get(name, ("", None))
        if reason is not None:
            data.left_out.append((name, reason))
            continue
        video = entries[name] = entries.get(name) or _load_video(tracks / f"{key}.safetensors")
        if video is None:  # another process has done it, elsewhere
            raise UserError(f"another process's results are not in {cache_dir}: give one that all machines see.")
        data.clips += _clips(data_root / name, name, video, features / f"{key}.safetensors", needed)
    if share.index == 0:
        _write(cache_dir / "prepared.json", _listing(data, videos, entries, extractor).encode())
    if not data.clips:
        raise UserError(f"No video in {data_root} can be used:\n{data.table()}")
    return data


def find_videos(data_root: Path, skip: Path | None = None) -> list[str]:
    """Paths below `data_root` of all its videos, nested folders and symbolic links included, sorted."""
    if not data_root.is_dir():
        raise UserError(f"{data_root} is not a folder: give the folder of your videos with --data_root.")
    found, seen = [], set()
    for folder, folders, files in os.walk(data_root, followlinks=True):
        status = Path(folder).stat()
        if (status.st_dev, status.st_ino) in seen or (skip and skip.exists() and Path(folder).samefile(skip)):
            folders.clear()  # a link back to a folder above would never end
            continue
        seen.add((status.st_dev, status.st_ino))
        folders.sort()
        # Names that start with a dot are half-written videos (ours too) and macOS's shadows of real ones.
        paths = [Path(folder, name) for name in files if not name.startswith(".")]
        found += [p.relative_to(data_root).as_posix() for p in paths if p.suffix.lower() in VIDEO_SUFFIXES]
    return sorted(found)


def hold_out(clips: Sequence[Clip], window: int = 26) -> tuple[list[Clip], list[Clip]]:
    """(training clips, validation clips), nothing in both. `window`: the fewest ticks that make a clip (num_frames *
    frame_step + 1).

    From 10 videos on, those whose name's hash lies in the lowest 5 %, so that a video never moves when others are added,
    but the two lowest at least; with fewer videos the last fifth of every clip that is long enough for both parts, or else
    one whole clip.
    """
    videos = sorted({clip.video for clip in clips}, key=_hash)
    if len(videos) >= ENOUGH_VIDEOS:
        held = {video for video in videos if int(_hash(video), 16) < HELD_OUT_SHARE * 16 ** len(_hash(video))}
        held |= set(videos[:2])
        return [c for c in clips if c.video not in held], [c for c in clips if c.video in held]
    train, validation = [], []
    for clip in clips:
        tail = max(round(clip.num_ticks * HELD_OUT_TAIL), window)
        if clip.num_ticks - tail >= window:
            train.append(clip.part(0, clip.num_ticks - tail))
            validation.append(clip.part(clip.num_ticks - tail, clip.num_ticks))
        else:
            train.append(clip)
    if not validation and len(clips) > 1:
        held = min(clips, key=lambda clip: _hash(clip.name))
        return [clip for clip in clips if clip is not held], [held]
    return train, validation


# ------------------------------------------------------------------------------------------------------ stage 1: tracks


@dataclass
class _Video:
    """Stage 1's result for one file: why it is no use, or its tracks as (start, boxes, landmarks)."""

    reason: str | None = None
    width: int = 0
    height: int = 0
    num_ticks: int = 0  # ticks that have both picture and sound
    tracks: list[tuple[int, np.ndarray, np.ndarray]] = field(default_factory=list)
    key: str = ""


def _look_at(path: Path) -> _Video:
    """Opens, listens, follows the face. Whatever is wrong with the file becomes its reason; nothing else is caught."""
    try:
        with VideoReader(path) as reader:
            video = _Video(width=reader.info.width, height=reader.info.height)
            if not reader.info.has_audio:
                return _Video(reason="no audio stream")
            speech = load_audio(path)
            level = 20 * np.log10(max(float(np.sqrt(np.mean(speech**2, dtype=np.float64))), 1e-10))
            if level < SILENCE:
                return _Video(reason=f"silent ({level:.0f} dBFS, needs {SILENCE:.0f})")
            video.num_ticks = min(reader.num_ticks, len(speech) // SAMPLES_PER_TICK)
            for track in track_face(reader):
                length = min(len(track.boxes), video.num_ticks - track.start)
                if length > 0:
                    video.tracks.append((track.start, track.boxes[:length], track.landmarks[:length]))
            return video if video.tracks else _Video(reason="no face found")
    # The one place where a file's failure becomes a row of the table: what readers and decoders raise on bad files.
    except (UserError, av.error.FFmpegError, OSError, ValueError, MemoryError) as error:
        return _Video(reason=str(error).removeprefix(f"{Path(path).absolute()}").lstrip(" :") or type(error).__name__)


def _work(path: Path, entry: Path) -> None:
    """One worker's task: the result goes to disk, not through the pipe, so that an interruption loses nothing done."""
    _save_video(_look_at(path), entry)


def _one_thread() -> None:
    cv2.setNumThreads(1)  # the processes are the parallelism
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C reaches the whole group: without each worker's traceback


def _track_all(
    data_root: Path, videos: list[str], folder: Path, num_workers: int, progress: bool, report: Report
) -> dict[str, _Video]:
    """Stage 1 for every video that the cache does not hold yet."""
    entries: dict[str, _Video] = {}
    todo: list[tuple[str, Path]] = []
    for name in videos:
        try:
            key = _key(data_root / name, name)
        except OSError as error:  # a link to nowhere, or gone since the folder was listed
            entries[name] = _Video(reason=f"cannot be read ({error.strerror})")
            continue
        entry = folder / f"{key}.safetensors"
        cached = _load_video(entry)
        if cached is None:
            todo.append((name, entry))
        else:
            entries[name] = cached
            report.tracks_reused += 1
    with tqdm(
        total=len(videos), initial=len(entries), desc="face tracks", unit="video", disable=None if progress else True
    ) as bar:
        for name, entry, reason in _run([(n, data_root / n, e) for n, e in todo], num_workers):
            # A worker's death is not written down: it may have been the machine's fault, and is tried again next time.
            entries[name] = _load_video(entry) if reason is None else _Video(reason=reason)
            report.tracks_made += reason is None
            bar.update()
    return entries


def _run(tasks: list[tuple[str, Path, Path]], num_workers: int) -> Iterator[tuple[str, Path, str | None]]:
    """Works through (name, path, entry), here or in processes; yields (name, entry, reason or None) as they finish."""
    if num_workers == 0:
        for name, path, entry in tasks:
            _work(path, entry)
            yield name, entry, None
        return
    waiting = list(reversed(tasks))
    while waiting:
        suspects = []
        with _pool(num_workers) as pool:
            running: dict[Future, tuple[str, Path, Path]] = {}
            while (waiting or running) and not suspects:
                # No more than one task per worker is handed out: when a worker dies, only these can have killed it.
                while waiting and len(running) < num_workers:
                    task = waiting.pop()
                    try:
                        running[pool.submit(_work, task[1], task[2])] = task
                    except BrokenProcessPool:
                        suspects.append(task)
                done, _ = wait(running, return_when=FIRST_COMPLETED) if running else ((), ())
                for future in done:
                    task = running.pop(future)
                    if isinstance(future.exception(), BrokenProcessPool):
                        suspects.append(task)
                    else:
                        future.result()  # any other exception is a mistake of ours and must be seen
                        yield task[0], task[2], None
            suspects += running.values()
        for name, path, entry in suspects:  # each alone, so that the innocent are not blamed
            with _pool(1) as pool:
                broke = isinstance(pool.submit(_work, path, entry).exception(), BrokenProcessPool)
            yield (
                name,
                entry,
                "killed the process that read it (out of memory, or the decoder crashed)" if broke else None,
            )


def _pool(size: int) -> ProcessPoolExecutor:
    # Forking a process that holds torch's threads and a CUDA context deadlocks; a spawned one starts clean.
    return _Pool(size, mp_context=multiprocessing.get_context("spawn"), initializer=_one_thread)


class _Pool(ProcessPoolExecutor):
    """Ends at once when it is interrupted: what a worker has not finished yet is made again next time."""

    def __exit__(self, kind, error, trace):
        if kind is not None and issubclass(kind, KeyboardInterrupt):
            for worker in multiprocessing.active_children():
                worker.terminate()
        return super().__exit__(kind, error, trace)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


def _key(path: Path, name: str) -> str:
    """The cache entry's name: readable, and another one when the file or this code's results change."""
    status = path.stat()
    readable = re.sub(r"[^A-Za-z0-9._-]+", "_", Path(name).stem)[:40]
    return f"{readable}-{_hash(f'{name}|{status.st_size}|{status.st_mtime_ns}|{VERSION}')[:16]}"


def _save_video(video: _Video, entry: Path) -> None:
    tensors = {}
    for number, (_, boxes, landmarks) in enumerate(video.tracks):
        tensors |= {f"{number}.boxes": boxes, f"{number}.landmarks": landmarks}
    facts = {"reason": video.reason, "width": video.width, "height": video.height, "num_ticks": video.num_ticks}
    facts["starts"] = [start for start, _, _ in video.tracks]
    _write(entry, save(tensors, metadata={"video": json.dumps(facts)}))


def _load_video(entry: Path) -> _Video | None:
    """A cached result, or None where there is none, or one that is damaged or not ours: it is made again."""
    if not entry.exists():
        return None
    try:
        with safe_open(entry, "np") as file:
            facts = json.loads(file.metadata()["video"])
            tracks = [
                (int(start), file.get_tensor(f"{n}.boxes"), file.get_tensor(f"{n}.landmarks"))
                for n, start in enumerate(facts["starts"])
            ]
        sizes = [int(facts[name]) for name in ("width", "height", "num_ticks")]
        video = _Video(facts["reason"], *sizes, tracks, key=entry.stem)
    # No metadata at all is a TypeError, a missing entry a KeyError, bad JSON a ValueError.
    except (SafetensorError, OSError, KeyError, TypeError, ValueError):
        return None
    return video if _plausible(video) else None


def _plausible(video: _Video) -> bool:
    """Whether a result read from the cache is one that `_look_at` can have given."""
    if video.reason is not None:
        return isinstance(video.reason, str) and not video.tracks
    if not video.tracks or min(video.width, video.height) < 1:
        return False
    return all(
        start >= 0
        and 0 < len(boxes) <= video.num_ticks - start
        and boxes.shape == (len(boxes), 4)
        and landmarks.shape == (len(boxes), 68, 2)
        and boxes.dtype == landmarks.dtype == np.float32
        for start, boxes, landmarks in video.tracks
    )


# ---------------------------------------------------------------------------------------------------- stage 2: features


def _long_enough(video: _Video, needed: int) -> list[tuple[int, np.ndarray, np.ndarray]]:
    return [track for track in video.tracks if len(track[1]) >= needed]


def _too_short(video: _Video, needed: int) -> str | None:
    """The reason to leave a tracked video out, if no track is long enough."""
    if _long_enough(video, needed):
        return None
    longest = max(len(boxes) for _, boxes, _ in video.tracks)
    return f"too short: {longest} ticks with a face and sound, needs {needed} ({TICK_RATE} per second)"


def _listen(path: Path, video: _Video, extractor, folder: Path, report: Report) -> str | None:
    """Makes a video's features where the cache has none; the reason if it cannot be heard."""
    features = folder / f"{video.key}.safetensors"
    if _features_fit(features, extractor, video.num_ticks):
        report.features_reused += 1
        return None
    try:
        speech = load_audio(path)
    except UserError as error:  # gone or changed since its faces were tracked
        return str(error)
    _save_features(extractor, speech, features)
    report.features_made += 1
    return None


def _clips(path: Path, name: str, video: _Video, features: Path, needed: int) -> list[Clip]:
    return [
        Clip(f"{name}@{start}", path, start, boxes, landmarks, features, video.width, video.height)
        for start, boxes, landmarks in _long_enough(video, needed)
    ]


def _features_fit(path: Path, extractor, num_ticks: int) -> bool:
    """Whether a cached file holds this extractor's features for at least so many ticks; only its header is read."""
    if not path.exists():
        return False
    try:
        with safe_open(path, "np") as file:
            features = file.get_slice("features")
            length, *rest = features.get_shape()
            kind = features.get_dtype()
    except (SafetensorError, OSError, ValueError):  # damaged, another tensor's file, a single number
        return False
    whole = length % FEATURES_PER_TICK == 0 and length >= FEATURES_PER_TICK * num_ticks
    return whole and rest == [extractor.layers, extractor.width] and kind == "F16"


def _save_features(extractor, speech: np.ndarray, path: Path) -> None:
    from sonic.audio import check_features  # here, because it brings torch, which the worker processes do without

    features = check_features(extractor(speech), extractor, len(speech))
    _make_folder(path.parent)
    _write(path, save({"features": features.half().cpu().contiguous().numpy()}))


# ---------------------------------------------------------------------------------------------------------------- files


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder} cannot be made ({error.strerror}): give another --cache_dir.") from error


def _write(path: Path, content: bytes) -> None:
    """Whole or not at all, also when two runs write the same entry."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise UserError(f"{path} cannot be written ({error.strerror}): give another --cache_dir.") from error


def _listing(data: PreparedData, videos: list[str], entries: dict[str, _Video], extractor) -> str:
    """prepared.json: every video, used or left out."""
    reasons = dict(data.left_out)
    clips: dict[str, list[dict]] = {}
    for clip in data.clips:
        facts = {"name": clip.name, "start": clip.start, "num_ticks": clip.num_ticks}
        clips.setdefault(clip.video, []).append(facts)
    rows = []
    for name in videos:
        row = {"video": name, "used": name not in reasons}
        if name in reasons:
            row["reason"] = reasons[name]
        else:
            video = entries[name]
            row |= {"width": video.width, "height": video.height, "num_ticks": video.num_ticks}
            row["clips"] = clips[name]
        rows.append(row)
    return json.dumps({"version": VERSION, "extractor": extractor.name, "videos": rows}, indent=1) + "\n"
