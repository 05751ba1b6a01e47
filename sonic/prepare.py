"""A folder of videos to prepared clips: measured, judged, cached, resumable, spread over processes.

    python -m sonic.prepare --data_root VIDEOS --cache_dir CACHE --num_workers 16     # and training with the same --cache_dir
    accelerate launch --multi_gpu --num_machines 2 --num_processes 2 ... -m sonic.prepare ...   # docs/data.md
    python -m sonic.prepare ... --celebvhq celebvhq_info.json                         # VIDEOS: CelebV-HQ's raw videos
    python -m sonic.prepare ... --whisper_path WHISPER --export_shards SHARDS         # for training with --data_shards

Stage 1 (worker processes, no torch): `measuring`. Stage 2 (this process, with many videos also workers): the verdict,
`judging`. Stage 3 (this process): audio `features` of what is kept.
Several processes of one run each do their `Share` of the videos, and then all read the whole cache. Runs that share a cache
without knowing of each other only do some work twice: what is written is whole, and the same whoever writes it.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from sonic.celebvhq import cut_clips
from sonic.clips import Clip
from sonic.config import NO_CROP, POSITIVE, STEP, WHOLE, UserError
from sonic.data_report import write_report
from sonic.features import features_fit, make_features
from sonic.flags import Checked, Parser, config_from, flag, number, run
from sonic.judging import judge
from sonic.measuring import Measured, measure
from sonic.pieces import Piece, Screening
from sonic.prepared import NothingUsable, PreparedData, Report, listing
from sonic.track_cache import entry_key, load_measured, make_folder, save_measured, write_whole
from sonic.workers import Share, in_workers

VIDEO_SUFFIXES = {".mp4", ".mov", ".mkv", ".webm"}
SCREENING = "screening.json"  # in the cache: the thresholds that python -m sonic.prepare was given
MANY = 400  # videos whose judging takes longer than the start of processes
WHOLE_PICTURE = 1e6  # face sizes of margin, which the picture's edges limit


# ------------------------------------------------------------------------------------------------------------ the doors


def prepare(
    data_root,
    cache_dir,
    extractor=None,
    *,
    num_frames: int,
    frame_step: int,
    screening: Screening | None = None,
    num_workers: int = 0,
    progress: bool = True,
    share: Share | None = None,
) -> PreparedData:
    """Clips of every video below `data_root`, from the cache where it has them; writes prepared.json.

    extractor: `sonic.audio.AudioExtractor`; None makes no features, and gives no clips, only pieces. screening: default
    thresholds if None. A clip has at least num_frames * frame_step + 1 ticks: a window and a reference frame. With a `share`
    this process makes what is missing of its own videos only, and waits for the others; all get the same result.
    UserError, with the table: no video can be used.
    """
    share, screening = share or Share(), screening or Screening()
    data_root, cache_dir = Path(data_root), Path(cache_dir)
    videos = share.gather([find_videos(data_root, cache_dir)])[0]  # the first process's: a folder may still be growing
    if not videos:
        wanted = " ".join(sorted(VIDEO_SUFFIXES))
        raise UserError(f"{data_root} holds no video ({wanted}): give the folder of your videos with --data_root.")
    data, tracks = PreparedData(), cache_dir / "tracks"
    features = cache_dir / "features" / extractor.name if extractor else None
    make_folder(tracks)
    needed = num_frames * frame_step + 1
    syncnet = _syncnet(screening.syncnet_path, cache_dir) if screening.syncnet_path else None
    own = share.of(videos)
    entries, failed = _measure_all(data_root, own, tracks, num_workers, progress, data.report)
    asked = [functools.partial(syncnet, data_root / name) if syncnet else None for name in own]
    tasks = [
        (name, entries.get(name), failed.get(name), screening, needed, network)
        for name, network in zip(own, asked, strict=True)
    ]
    outcomes = _judge_all(tasks, 0 if syncnet else num_workers, progress)
    if extractor:
        _listen_all(data_root, outcomes, extractor, features, progress, data.report)

    outcomes = dict(share.gather(list(outcomes.items())))
    data.report = Report.sum(share.gather([data.report]))
    for name in videos:
        key, _, pieces = outcomes[name]
        data.pieces += pieces
        kept = [piece for piece in pieces if piece.kept]
        if pieces and not kept:
            data.left_out.append((name, _why(pieces)))
        elif extractor:
            measured = load_measured(tracks / f"{key}.safetensors")
            if measured is None:  # another process has done it, elsewhere
                raise UserError(f"another process's results are not in {cache_dir}: give one that all machines see.")
            data.clips += _clips(data_root / name, measured, kept, features / f"{key}.safetensors", screening)
    if share.index == 0:
        write_whole(cache_dir / "prepared.json", listing(data, videos, screening, extractor).encode())
    if not any(piece.kept for piece in data.pieces):
        raise NothingUsable(f"No video in {data_root} can be used:\n{data.table()}", data)
    return data


def _why(pieces: list[Piece]) -> str:
    """The reason of a video of which nothing is kept: its longest piece's."""
    longest = max(pieces, key=lambda piece: piece.num_ticks)
    return longest.reason if len(pieces) == 1 else f"{len(pieces)} pieces dropped, the longest: {longest.reason}"


def screening_for(given: dict, cache_dir: Path) -> Screening:
    """The thresholds of a run: those given by name, the others as python -m sonic.prepare left them in the cache, or defaults."""
    path, recorded = Path(cache_dir) / SCREENING, {}
    if path.exists():
        try:
            known = {one.name for one in dataclasses.fields(Screening)}
            recorded = {name: value for name, value in json.loads(path.read_text()).items() if name in known}
        except (OSError, ValueError, AttributeError) as error:
            raise UserError(f"{path} cannot be read: run python -m sonic.prepare again, or remove it") from error
    return Screening(**recorded | given)


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


# ----------------------------------------------------------------------------------------------------- stage 1: measuring


def _work(path: Path, entry: Path) -> None:
    """One worker's task: the result goes to disk, not through the pipe, so that an interruption loses nothing done."""
    save_measured(measure(path), entry)


def _measure_all(
    data_root: Path, videos: list[str], folder: Path, num_workers: int, progress: bool, report: Report
) -> tuple[dict[str, Path], dict[str, str]]:
    """Stage 1 for every video that the cache does not hold yet: each video's entry there, or why it has none."""
    entries: dict[str, Path] = {}
    failed: dict[str, str] = {}
    missing: list[str] = []
    for name in videos:
        try:
            entries[name] = folder / f"{entry_key(data_root / name, name)}.safetensors"
        except OSError as error:  # a link to nowhere, or gone since the folder was listed
            failed[name] = f"cannot be read ({error.strerror})"
            continue
        if load_measured(entries[name]) is None:
            missing.append(name)
    report.tracks_reused += len(entries) - len(missing)
    tasks = [(data_root / name, entries[name]) for name in missing]
    known = len(videos) - len(missing)
    with tqdm(
        total=len(videos), initial=known, desc="measuring", unit="video", disable=None if progress else True
    ) as bar:
        for number, _, died in in_workers(_work, tasks, num_workers):
            # A worker's death is not written down: it may have been the machine's fault, and is tried again next time.
            if died:
                failed[missing[number]] = "killed the process that read it (out of memory, or the decoder crashed)"
            report.tracks_made += not died
            bar.update()
    return entries, failed


# ----------------------------------------------------------------------------------------------------- stage 2: judging


def _judge_all(tasks: list[tuple], num_workers: int, progress: bool) -> dict[str, tuple[str, int, list[Piece]]]:
    """What `_judge` gives for each task, by the video's name. Processes help where there are many videos."""
    outcomes = {task[0]: None for task in tasks}
    with tqdm(total=len(tasks), desc="judging", unit="video", disable=None if progress else True) as bar:
        for number, outcome, died in in_workers(_judge, tasks, num_workers if len(tasks) >= MANY else 0):
            name, _, _, *settings = tasks[number]
            outcomes[name] = _judge(name, None, "killed the process that judged it", *settings) if died else outcome
            bar.update()
    return outcomes


def _judge(
    name: str, entry: Path | None, trouble: str | None, screening: Screening, needed: int, syncnet: Callable | None
) -> tuple[str, int, list[Piece]]:
    """A video's entry in the cache, "" without one, its ticks and pieces. trouble: why it could not be measured."""
    measured = None if trouble else load_measured(entry)
    measured = measured or Measured(reason=trouble or "changed or gone while it was prepared")
    asked = functools.partial(syncnet, measured.key) if syncnet else None
    return measured.key, measured.num_ticks, judge(name, measured, screening, needed, asked)


def _syncnet(weights: str, cache_dir: Path):
    """SyncNet's word on pieces of videos. Imported here: it brings torch."""
    from sonic.syncnet import PieceSync

    return PieceSync(Path(weights), cache_dir / "syncnet")


# ---------------------------------------------------------------------------------------------------- stage 3: features


def _listen_all(
    data_root: Path,
    outcomes: dict[str, tuple[str, int, list[Piece]]],
    extractor,
    folder: Path,
    progress: bool,
    report: Report,
) -> None:
    """Stage 3 for every video; changes the pieces of those that have no sound any more."""
    for name in tqdm(outcomes, desc="audio features", unit="video", disable=None if progress else True):
        key, num_ticks, pieces = outcomes[name]
        pieces = _listen(data_root / name, pieces, num_ticks, extractor, folder / f"{key}.safetensors", report)
        outcomes[name] = key, num_ticks, pieces


def _listen(path: Path, pieces: list[Piece], num_ticks: int, extractor, features: Path, report: Report) -> list[Piece]:
    """Makes a video's features where a piece is kept and the cache has none; without sound, no piece is kept."""
    if not any(piece.kept for piece in pieces):
        return pieces
    if features_fit(features, extractor, num_ticks):
        report.features_reused += 1
        return pieces
    try:
        make_features(path, extractor, num_ticks, features)
    except UserError as error:  # gone or changed since its faces were tracked
        return [replace(piece, kept=False, step="probe", reason=str(error)) for piece in pieces]
    report.features_made += 1
    return pieces


def _clips(path: Path, measured: Measured, pieces: list[Piece], features: Path, screening: Screening) -> list[Clip]:
    clips = []
    for piece in pieces:
        start, boxes, landmarks = _track_of(measured, piece)
        inside = slice(piece.start - start, piece.start - start + piece.num_ticks)
        numbers = piece.numbers
        clips.append(
            Clip(
                f"{piece.video}@{piece.start}",
                path,
                piece.start,
                boxes[inside].copy(),  # or the whole track would stay in memory
                landmarks[inside].copy(),
                features,
                measured.width,
                measured.height,
                offset=int(numbers["sync_shift"]),
                area=tuple(int(numbers[edge]) for edge in ("left", "top", "right", "bottom")),
                expand=WHOLE_PICTURE if screening.crop == NO_CROP else screening.crop_expand,
                max_bucket=screening.max_motion_bucket,
            )
        )
    return clips


def _track_of(measured: Measured, piece: Piece) -> tuple[int, np.ndarray, np.ndarray]:
    """The track that a piece was cut from."""
    return next(track for track in measured.tracks if track[0] <= piece.start < track[0] + len(track[1]))


# --------------------------------------------------------------------------------------------------- the command line


@dataclass(frozen=True)
class PrepareConfig(Checked):
    """One preparation."""

    data_root: str = flag(
        dataclasses.MISSING, "folder of .mp4 .mov .mkv .webm files with speech, also nested", group="data and output"
    )
    cache_dir: str = flag(dataclasses.MISSING, "where the preparation goes; give the same to training")
    num_frames: int = flag(25, "frames of a training window, which a piece has to hold", number(int, low=2))
    frame_step: int = flag(2, "ticks per frame: 1 trains 25 frames per second, 2 trains 12.5", STEP)
    whisper_path: str | None = flag(
        None, "Whisper folder: make the audio features now too (default: training makes them when it starts)"
    )
    audio_extractor: str | None = flag(None, "FILE.py:NAME of your own audio features, instead of --whisper_path")
    num_workers: int = flag(4, "processes that measure; 0 measures in the main process", WHOLE)
    celebvhq: str | None = flag(
        None, "CelebV-HQ's celebvhq_info.json: cut its clips out of the raw videos in --data_root, and prepare these"
    )
    export_shards: str | None = flag(
        None, "folder for the kept clips as tar files that training reads with --data_shards; needs --whisper_path"
    )
    shard_size: int = flag(64, "clips per tar file", POSITIVE)
    shard_latents: str | None = flag(
        None,
        "a folder in CACHE/latents, which --cache_latents of training has filled: put its latents into the shards too",
    )

    def __post_init__(self):
        super().__post_init__()
        if self.whisper_path and self.audio_extractor:
            raise UserError("whisper_path and audio_extractor are two kinds of features: give one of them")
        if self.export_shards and not (self.whisper_path or self.audio_extractor):
            raise UserError("shards hold audio features: give --whisper_path beside --export_shards")
        if self.shard_latents and not self.export_shards:
            raise UserError("shard_latents is for shards: give --export_shards too")


def main(arguments: list[str] | None = None) -> None:
    parser = Parser(__doc__)
    parser.add_config(PrepareConfig)
    parser.add_config(Screening)
    parsed = parser.parse_args(arguments)
    config, screening = config_from(PrepareConfig, parsed), config_from(Screening, parsed)
    share = _processes()
    cache_dir = Path(config.cache_dir)
    make_folder(cache_dir)
    if share.index == 0:
        write_whole(cache_dir / SCREENING, (json.dumps(dataclasses.asdict(screening), indent=1) + "\n").encode())
        if share.count > 1:  # not to be seen where a launcher was asked for several and has started one
            print(f"{share.count} processes share the videos")
    data_root, uncut = config.data_root, []
    if config.celebvhq:
        data_root, uncut = _cut_celebvhq(config, share)
    extractor = _extractor(config)

    def report(data: PreparedData) -> None:
        if share.index == 0:
            page = write_report([*data.pieces, *uncut], screening, data_root, cache_dir, config.num_workers)
            print(f"to look at: {page}\nall pieces with what was measured: {cache_dir / 'prepared.json'}")

    try:
        data = prepare(
            data_root,
            cache_dir,
            extractor,
            num_frames=config.num_frames,
            frame_step=config.frame_step,
            screening=screening,
            num_workers=config.num_workers,
            progress=share.index == 0,
            share=share,
        )
    except NothingUsable as nothing:
        report(nothing.data)
        raise
    if share.index == 0:
        print(data.table())
    report(data)
    if config.export_shards:
        from sonic.shards import export_shards  # brings torch

        left_out = export_shards(
            data.clips,
            extractor.name,
            config.export_shards,
            config.shard_size,
            share,
            config.shard_latents and Path(config.shard_latents),
            progress=share.index == 0,
        )
        if share.index == 0:
            print(f"shards of {len(data.clips) - len(left_out)} clips: {config.export_shards}")
            print("".join(f"  {name!r} left out: {reason}\n" for name, reason in left_out), end="")


def _cut_celebvhq(config: PrepareConfig, share: Share) -> tuple[Path, list[Piece]]:
    """The folder of CelebV-HQ's clips, and a dropped piece for each that cannot be cut."""
    folder = Path(config.cache_dir) / "celebvhq"
    left_out = cut_clips(
        config.celebvhq,
        config.data_root,
        find_videos(Path(config.data_root), Path(config.cache_dir)),
        folder,
        share,
        num_workers=config.num_workers,
        progress=share.index == 0,
    )
    if share.index == 0 and left_out:
        print(f"{len(left_out)} clips of CelebV-HQ cannot be cut, {left_out[0][0]!r} for one: {left_out[0][1]}")
    return folder, [Piece(f"{name}.mp4", 0, 0, False, "probe", reason) for name, reason in left_out]


def _processes() -> Share:
    """This process's share of the work where accelerate launch started several."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return Share()
    from datetime import timedelta

    from accelerate import PartialState
    from accelerate.utils import gather_object

    from sonic.processes import leave_at_exit  # brings torch

    state = PartialState(cpu=True, timeout=timedelta(days=7))  # a process waits for the slowest
    leave_at_exit()
    return Share(state.process_index, state.num_processes, gather_object)


def _extractor(config: PrepareConfig):
    """What makes the features now, if they are to be made: the user's own, or Whisper, which is loaded when the first are made.
    Imported here: they bring torch."""
    if config.audio_extractor:
        from sonic.audio import load_extractor

        return load_extractor(config.audio_extractor)
    if not config.whisper_path:
        return None
    import torch

    from sonic.checkpoints import LazyWhisper
    from sonic.weights import locate

    own = int(os.environ.get("LOCAL_RANK", 0))  # of the processes that a launcher has started on this machine
    device = torch.device("cuda", own % torch.cuda.device_count()) if torch.cuda.is_available() else torch.device("cpu")
    return LazyWhisper(locate(config.whisper_path, "Whisper"), Path(config.cache_dir) / "whisper.json", device)


if __name__ == "__main__":
    run(main)
