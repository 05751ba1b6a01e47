"""Prepared clips to tar files in WebDataset's layout, which training streams (`shard_stream`) and the webdataset library reads.

FOLDER/shard-000000.tar    of each clip, under one key:
    KEY.json                  name, sizes, and where on the clocks of video and features the clip begins
    KEY.mp4                   the clip's stretch of its video, not encoded again, from the keyframe before it
    KEY.boxes.npy             float32 [T, 4], pixels of the video
    KEY.landmarks.npy         float32 [T, 68, 2]
    KEY.features.safetensors  fp16 [2 * ticks, layers, width], those that windows of the clip reach to
    KEY.latents.PART.safetensors, KEY.mirrored.PART.safetensors   if asked for: cached latents, a minute of the clip in each
FOLDER/shard-000000.json   what the tar was made of: it is not made again as long as that is the same
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import tarfile
import tempfile
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from tqdm import tqdm

from sonic.clips import Clip
from sonic.config import FEATURES_PER_TICK, TICK_RATE, UserError
from sonic.dataset import WINDOW_REACH, latent_name, latent_parts
from sonic.files import whole_file
from sonic.media import VideoReader, clock_zero, first_video_stream
from sonic.track_cache import make_folder, write_whole
from sonic.workers import Share

VERSION = 1  # of what is in a shard
AS_THEY_ARE = ("width", "height", "area", "expand", "max_bucket")  # fields of a Clip that its stretch shares
NAME = "shard-{:06d}"
LATENTS = {False: "latents.{}.safetensors", True: "mirrored.{}.safetensors"}  # endings of the parts' files


def export_shards(
    clips: Sequence[Clip],
    extractor_name: str,
    folder,
    shard_size: int,
    share: Share,
    latents: Path | None = None,
    progress: bool = True,
) -> list[tuple[str, str]]:
    """Writes clips into tar files of `shard_size` clips each; gives name and reason of each that cannot be read.

    A tar appears whole or not at all, and one that is there and made of the same clips stays. Of several processes each
    writes its share. latents: the folder of the cache with those that go in as well; a clip that has none there is left out.
    UserError: the folder cannot be written, or holds shards beyond these; no folder of latents.
    """
    folder = Path(folder)
    if latents and not latents.is_dir():
        raise UserError(f"{latents} is no folder of latents: give one of those in CACHE/latents")
    make_folder(folder)
    shards = [clips[first : first + shard_size] for first in range(0, len(clips), shard_size)]
    names = [NAME.format(number) for number in range(len(shards))]
    more = sorted(path.name for path in folder.glob("shard-*.tar") if path.stem not in names)
    if more:
        raise UserError(f"{folder} holds {more[0]} of an earlier, larger export: remove it, or give another folder")
    left_out, tasks = [], share.of(list(zip(names, shards, strict=True)))
    for name, own in tqdm(tasks, desc="shards", unit="shard", disable=None if progress else True):
        left_out += _write_shard(folder / f"{name}.tar", own, extractor_name, latents)
    return share.gather(left_out)


def _write_shard(path: Path, clips: Sequence[Clip], extractor_name: str, latents: Path | None) -> list[tuple[str, str]]:
    kinds = {"version": VERSION, "extractor": extractor_name, "latents": latents and latents.name}
    encoded = [sum(path.exists() for path in _latents(clip, latents).values()) for clip in clips] if latents else []
    made_of = kinds | {"clips": [_identity(clip) for clip in clips], "encoded": encoded}
    listing = path.with_suffix(".json")
    if path.exists() and (before := _read_listing(listing)) and before["made_of"] == made_of:
        return [(name, reason) for name, reason in before["left_out"]]
    listing.unlink(missing_ok=True)  # it would speak of another tar
    left_out = []
    try:
        with (
            whole_file(path) as partial,
            tarfile.open(partial, "w", format=tarfile.PAX_FORMAT) as tar,
            tempfile.TemporaryDirectory() as scratch,
        ):
            for number, clip in enumerate(clips):
                key = f"{path.stem}-{number:04d}"
                try:
                    members = _members(clip, kinds, latents, Path(scratch) / "stretch.mp4")
                except (UserError, av.error.FFmpegError, SafetensorError, ValueError, IndexError) as error:
                    left_out.append((clip.name, str(error) or type(error).__name__))
                    continue
                for ending, content in members.items():
                    member = tarfile.TarInfo(
                        f"{key}.{ending}"
                    )  # no times, no owners: the same clips give the same bytes
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}): give another --export_shards") from error
    write_whole(listing, (json.dumps({"made_of": made_of, "left_out": left_out}, indent=1) + "\n").encode())
    return left_out


def _identity(clip: Clip) -> list:
    """What says whether a clip is still the one that a shard holds: the entry of its file, its place, its tracks, its settings."""
    tracks = hashlib.sha256(clip.boxes.tobytes() + clip.landmarks.tobytes()).hexdigest()[:16]
    settings = json.loads(json.dumps([getattr(clip, name) for name in (*AS_THEY_ARE, "offset")]))
    return [clip.name, clip.features.stem, clip.num_ticks, tracks, settings]


def _read_listing(path: Path) -> dict | None:
    try:
        listing = json.loads(path.read_text())
        return listing if {"made_of", "left_out"} <= listing.keys() else None
    except (OSError, ValueError, AttributeError):
        return None


# --------------------------------------------------------------------------------------------------------- one clip


def _members(clip: Clip, kinds: dict, latents: Path | None, scratch: Path) -> dict[str, bytes]:
    """The files of a clip by their endings. In its stretch the clip begins at tick 0."""
    encoded = {ending: _read(path) for ending, path in _latents(clip, latents).items()} if latents else {}
    video, late = _stretch(clip, scratch)
    first, features = _features(clip)
    facts = {name: getattr(clip, name) for name in AS_THEY_ARE} | kinds
    facts |= {
        "name": clip.name,
        "start": clip.start,  # on the clock of the whole video
        "num_ticks": clip.num_ticks,
        "offset": clip.offset
        + first
        - clip.start,  # picture t of the stretch is heard at tick t - offset of its features
        "late": [late.numerator, late.denominator],
    }
    return {
        "json": (json.dumps(facts) + "\n").encode(),
        "mp4": video,
        "boxes.npy": _npy(clip.boxes),
        "landmarks.npy": _npy(clip.landmarks),
        "features.safetensors": save({"features": features}),
        **encoded,
    }


def _latents(clip: Clip, folder: Path) -> dict[str, Path]:
    """The files of a clip's latents by their endings: those of its pictures, and of mirror images if they are there."""
    kinds = {
        LATENTS[kind].format(part): latent_name(clip, part, kind) for kind in LATENTS for part in latent_parts(clip)
    }
    files = {ending: folder / name for ending, name in kinds.items()}
    return {ending: path for ending, path in files.items() if path.exists() or not ending.startswith("mirrored")}


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def _features(clip: Clip) -> tuple[int, np.ndarray]:
    """The first tick of the features that windows of a clip reach to, on the sound's clock, and these features."""
    heard, reach = clip.start - clip.offset, WINDOW_REACH // FEATURES_PER_TICK
    first = max(0, heard - reach)
    with safe_open(clip.features, "np") as file:
        rows = file.get_slice("features")
        last = min(rows.get_shape()[0], FEATURES_PER_TICK * (heard + clip.num_ticks + reach))
        return first, np.ascontiguousarray(rows[FEATURES_PER_TICK * first : last])


def _stretch(clip: Clip, scratch: Path) -> tuple[bytes, Fraction]:
    """An MP4 that holds a clip's pictures, and how many seconds after its first picture the clip's tick 0 comes.

    Packets are copied, and the pictures compared with the video's own; where they differ, or MP4 cannot hold them, it is
    the whole file, whatever it is: training looks at the content and not at the name.
    """
    whole = clip.late + Fraction(clip.start, TICK_RATE)
    try:
        late = _copy_packets(clip.path, whole, clip.num_ticks, scratch)
        if late is not None and _same_pictures(clip, scratch, late):
            return scratch.read_bytes(), late
    except (UserError, av.error.FFmpegError, ValueError):  # ValueError: PyAV cannot write such a stream
        pass
    finally:
        scratch.unlink(missing_ok=True)
    return _read(clip.path), whole


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from error


def _copy_packets(path: Path, begin: Fraction, num_ticks: int, target: Path) -> Fraction | None:
    """Copies pictures and sound from the keyframe before `begin`, seconds after the file's first picture, on.

    Gives the seconds from that keyframe to `begin`, or None if there is no keyframe to begin with.
    """
    with av.open(str(path)) as source, av.open(str(target), "w", format="mp4") as copy:
        pictures = first_video_stream(source)
        begin = clock_zero(source, pictures) + begin
        end = begin + Fraction(num_ticks, TICK_RATE)
        streams = [pictures, *source.streams.audio[:1]]
        copies = {stream.index: copy.add_stream_from_template(stream) for stream in streams}
        source.seek(int(begin / pictures.time_base), stream=pictures)
        origin, waiting = None, []  # waiting: sound that stands in the file before the keyframe it belongs to
        for packet in source.demux(streams):
            if packet.pts is None or packet.dts is None:
                continue
            if origin is None:
                if packet.stream is not pictures:
                    waiting.append(packet)
                    continue
                if not packet.is_keyframe:
                    continue
                origin = packet.pts * packet.time_base
                if origin > begin:
                    return None
            now = packet.pts * packet.time_base
            if packet.dts * packet.time_base > end:
                if packet.stream is pictures:
                    break
                continue
            if now < origin:  # a picture that needs the keyframe before, or sound from before
                continue
            for one in (*waiting, packet):
                if one.pts * one.time_base >= origin:
                    shift = round(origin / one.time_base)
                    one.pts, one.dts = one.pts - shift, one.dts - shift
                    one.stream = copies[one.stream.index]
                    copy.mux(one)
            waiting = []
    return None if origin is None else begin - origin


def _same_pictures(clip: Clip, copy: Path, late: Fraction) -> bool:
    """Whether a stretch shows what the video shows, in the clip's first, middle and last picture and at its size."""
    ticks = [0, clip.num_ticks // 2, clip.num_ticks - 1]
    with VideoReader(clip.path, late=clip.late) as original, VideoReader(copy, late=late) as cut:
        if dataclasses.replace(original.info, duration=0) != dataclasses.replace(
            cut.info, duration=0, fps=original.info.fps
        ):
            return False
        if cut.num_ticks < clip.num_ticks:
            return False
        return np.array_equal(original.read([clip.start + tick for tick in ticks]), cut.read(ticks))
