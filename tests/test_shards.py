"""Shards: what streams out of them is what the folder gives, bit for bit; what is broken in them is named and skipped."""

import functools
import http.server
import importlib.util
import io
import itertools
import json
import shutil
import sys
import tarfile
import threading
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from sonic import shards
from sonic.clips import Clip
from sonic.config import UserError
from sonic.dataset import SonicDataset, latent_name
from sonic.faces import landmark_box
from sonic.media import VideoReader
from sonic.shard_stream import Reader, ShardStream, read_shards, shard_list, shuffled, stream_loader, unpack
from sonic.shards import export_shards
from sonic.workers import Share

DATA = Path(__file__).parent / "data"
EARS = "ears-1"
SETTINGS = {"num_frames": 4, "frame_step": 2, "resolution": 64, "clip_size": 28, "seed": 3}
needs_library = pytest.mark.skipif(not importlib.util.find_spec("webdataset"), reason="pip install webdataset")


def write_video(path: Path, codec="libx264", fps=30, ticks=110, format=None) -> Path:
    """A video of moving noise whose time stamps lie beside the ticks, with keyframes every 12 pictures, and sound."""
    rng = np.random.default_rng(0)
    base = rng.integers(0, 255, (96, 400, 3), np.uint8)
    with av.open(str(path), "w", format=format) as container:
        stream = container.add_stream(codec, rate=fps, options={"g": "12", "bf": "2"} if codec == "libx264" else {})
        stream.width, stream.height = 128, 96
        stream.pix_fmt = "yuv420p"
        sound = container.add_stream("aac", rate=16000, layout="mono")
        for number in range(ticks * fps // 25):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(base[:, number : number + 128]), format="rgb24")
            container.mux(stream.encode(frame))
        samples = (rng.normal(0, 2000, (1, ticks * 640))).astype(np.int16)
        frame = av.AudioFrame.from_ndarray(samples, format="s16", layout="mono")
        frame.sample_rate = 16000
        for one in av.AudioResampler(sound.format, "mono", 16000, frame_size=1024).resample(frame):
            container.mux(sound.encode(one))
        container.mux(sound.encode(None))
        container.mux(stream.encode(None))
    return path


def make_clip(path: Path, start: int, ticks: int, features: Path, offset=0, area=None, video=None) -> Clip:
    """A clip with a face that wanders, and features of noise for its whole video."""
    with VideoReader(path) as reader:
        width, height, total = reader.info.width, reader.info.height, reader.num_ticks
    rng = np.random.default_rng(start)
    centre = np.array([width / 2, height / 2]) + np.cumsum(rng.normal(0, 0.3, (ticks, 2)), axis=0)
    points = (centre[:, None] + rng.normal(0, height / 12, (68, 2))).astype(np.float32)
    if not features.exists():
        save_file(
            {"features": torch.randn(2 * total, 2, 3, generator=torch.Generator().manual_seed(1)).half()}, features
        )
    name = f"{video or path.name}@{start}"
    return Clip(name, path, start, landmark_box(points), points, features, width, height, offset=offset, area=area)


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> list[Clip]:
    """Clips of an MP4 with pictures before and after each tick, of one with a time stamp per tick, and one of Matroska."""
    folder = tmp_path_factory.mktemp("videos")
    fast, plain = write_video(folder / "fast.mp4"), DATA / "talking_head_2.mp4"
    odd = write_video(folder / "odd.mkv", codec="libvpx", fps=25, ticks=40, format="matroska")
    return [
        make_clip(fast, 0, 30, folder / "fast.safetensors"),
        make_clip(fast, 41, 60, folder / "fast.safetensors", offset=3, area=(4, 0, 128, 90)),
        make_clip(plain, 13, 40, folder / "plain.safetensors", offset=-2),
        make_clip(odd, 7, 20, folder / "odd.safetensors", video="deep/with 'quotes' \n 😀.mkv"),
    ]


@pytest.fixture(scope="module")
def exported(clips, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    assert export_shards(clips, EARS, folder, 3, Share(), progress=False) == []
    return folder


def stream_of(folder: Path, extractor=EARS, **settings) -> ShardStream:
    settings = {"needed": 8, "buffer": 1} | settings
    return ShardStream(sorted(str(path) for path in folder.glob("*.tar")), extractor, SETTINGS, **settings)


def packed_clips(folder: Path) -> list[dict]:
    """Every packed clip, read without the webdataset library."""
    packed = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, ending = member.name.partition(".")
                packed.setdefault(key, {"__url__": str(path), "__key__": key})[ending] = tar.extractfile(member).read()
    return list(packed.values())


def test_a_sample_from_shards_is_that_of_the_folder_bit_for_bit(clips, exported, tmp_path):
    packed = packed_clips(exported)
    assert len(packed) == len(clips)
    for clip, one in zip(clips, packed, strict=True):
        copy, start = unpack(one, tmp_path, EARS)
        assert start == clip.start and copy.name == clip.name
        for number in (0, 7, 23):
            told = SonicDataset([clip], **SETTINGS)[number]
            streamed = SonicDataset([copy], **SETTINGS)
            sample = streamed[number]
            streamed.close()
            sample["ticks"] += start
            assert sample.keys() == told.keys()
            for name, value in told.items():
                assert value == sample[name] if isinstance(value, str) else torch.equal(value, sample[name]), (
                    clip.name,
                    name,
                )


def test_a_stretch_is_smaller_than_its_video_and_starts_at_a_keyframe(clips, exported):
    for clip, one in zip(clips, packed_clips(exported), strict=True):
        facts = json.loads(one["json"])
        whole = len(one["mp4"]) == clip.path.stat().st_size
        assert whole == (clip.path.suffix == ".mkv")  # MP4 does not hold VP8
        late = Fraction(*facts["late"])
        assert late == Fraction(clip.start, 25) if whole else 0 <= late <= Fraction(clip.start, 25)
        with av.open(io.BytesIO(one["mp4"])) as container:
            assert container.streams.audio


def test_features_hold_all_that_windows_reach_to_and_no_more(clips, exported):
    for clip, one in zip(clips, packed_clips(exported), strict=True):
        rows = len(one["features.safetensors"]) // (2 * 2 * 3)
        assert rows < 2 * (clip.num_ticks + 100) + 20


def test_a_second_export_makes_only_what_has_changed(clips, exported, monkeypatch):
    made, plain = [], shards._members
    monkeypatch.setattr(shards, "_members", lambda clip, *rest: made.append(clip.name) or plain(clip, *rest))
    before = (exported / "shard-000000.tar").read_bytes()
    export_shards(clips, EARS, exported, 3, Share(), progress=False)
    assert made == []
    (exported / "shard-000001.json").write_text("damaged")
    export_shards(clips, EARS, exported, 3, Share(), progress=False)
    assert made == [clips[3].name]
    (exported / "shard-000000.tar").unlink()
    export_shards(clips, EARS, exported, 3, Share(), progress=False)
    assert (exported / "shard-000000.tar").read_bytes() == before  # the same clips, the same bytes
    assert sorted(path.suffix for path in exported.iterdir()) == [".json", ".json", ".tar", ".tar"]
    with pytest.raises(UserError, match="earlier, larger export"):
        export_shards(clips[:2], EARS, exported, 3, Share(), progress=False)


def test_latents_that_are_not_there_are_told_and_taken_when_they_are(clips, tmp_path):
    with pytest.raises(UserError, match="is no folder of latents"):
        export_shards(clips, EARS, tmp_path / "out", 3, Share(), tmp_path / "none", progress=False)
    (tmp_path / "empty").mkdir()
    left_out = export_shards(clips[:1], EARS, tmp_path / "out", 3, Share(), tmp_path / "empty", progress=False)
    assert [name for name, _ in left_out] == [clips[0].name] and "cannot be read" in left_out[0][1]
    for kind in (False, True):
        (tmp_path / "empty" / latent_name(clips[0], 0, kind)).write_text(f"latents {kind}")
    assert not export_shards(clips[:1], EARS, tmp_path / "out", 3, Share(), tmp_path / "empty", progress=False)
    (packed,) = packed_clips(tmp_path / "out")
    assert packed["latents.0.safetensors"] == b"latents False" and packed["mirrored.0.safetensors"] == b"latents True"


def test_processes_share_the_shards_and_a_clip_that_is_gone_is_named(clips, tmp_path):
    shutil.copy(clips[0].path, tmp_path / "gone.mp4")
    gone = make_clip(tmp_path / "gone.mp4", 2, 30, tmp_path / "gone.safetensors")
    (tmp_path / "gone.mp4").unlink()
    some = [clips[0], gone, clips[3]]
    export_shards(some, EARS, tmp_path / "out", 1, Share(0, 2), progress=False)
    assert sorted(path.name for path in (tmp_path / "out").glob("*.tar")) == ["shard-000000.tar", "shard-000002.tar"]
    left_out = export_shards(some, EARS, tmp_path / "out", 1, Share(1, 2), progress=False)
    assert [name for name, _ in left_out] == ["gone.mp4@2"] and "cannot be read" in left_out[0][1]
    again = export_shards(some, EARS, tmp_path / "out", 1, Share(), progress=False)
    assert [tuple(one) for one in again] == left_out


@needs_library
def test_the_webdataset_library_reads_them(clips, exported):
    import webdataset

    samples = list(webdataset.WebDataset(str(exported / "shard-{000000..000001}.tar"), shardshuffle=False).decode())
    assert [sample["json"]["name"] for sample in samples] == [clip.name for clip in clips]
    assert (samples[1]["boxes.npy"] == clips[1].boxes).all() and len(samples[0]["mp4"]) > 1000


@needs_library
def test_every_lap_holds_every_clip_once_under_numbers_of_its_own(clips, exported):
    stream = stream_of(exported, buffer=3, first=100)
    samples = list(itertools.islice(iter(stream), 8))
    names = {clip.name for clip in clips}
    assert {one["name"] for one in samples[:4]} == names == {one["name"] for one in samples[4:]}
    assert [one["number"] for one in samples] == list(range(100, 108))
    again = list(itertools.islice(iter(stream_of(exported, buffer=3, first=100)), 8))
    assert all(torch.equal(a["frames"], b["frames"]) for a, b in zip(samples, again, strict=True))
    by_name = {clip.name: clip for clip in clips}
    for one in samples:
        told = SonicDataset([by_name[one["name"]]], **SETTINGS)[one["number"]]
        assert torch.equal(told["frames"], one["frames"]) and torch.equal(told["ticks"], one["ticks"])


@needs_library
def test_processes_and_workers_read_different_clips(clips, exported):
    laps = [{one["__key__"] for one in stream_of(exported)._lap(Reader(index, 2), 0)} for index in (0, 1)]
    assert not laps[0] & laps[1] and len(laps[0] | laps[1]) == 4
    two = [list(itertools.islice(iter(stream_of(exported, rank=rank, world=2)), 4)) for rank in (0, 1)]
    numbers = [one["number"] for part in two for one in part]
    assert len(set(numbers)) == 8
    loader = stream_loader(stream_of(exported), 2, batch_size=2, num_workers=1, multiprocessing_context="spawn")
    batches = list(loader)
    assert len(loader) == len(batches) == 2 and batches[0]["frames"].shape == (2, 4, 3, 64, 64)


def test_readers_share_shards_and_where_there_are_too_few_the_clips():
    seven = [f"{number}.tar" for number in range(7)]
    parts = [Reader(index, 3).shards(seven) for index in range(3)]
    assert sorted(itertools.chain(*parts)) == seven and all(parts)
    few = [list(Reader(index, 3).samples(range(10), shards=2)) for index in range(3)]
    assert Reader(1, 3).shards(seven[:2]) == seven[:2]
    assert sorted(itertools.chain(*few)) == list(range(10))


def test_the_buffer_mixes_and_loses_nothing():
    mixed = list(shuffled(range(100), 10, np.random.default_rng(0)))
    assert sorted(mixed) == list(range(100)) and mixed != sorted(mixed)
    assert max(number - place for place, number in enumerate(mixed)) < 10  # nothing comes before it was read
    assert list(shuffled(range(5), 1, np.random.default_rng(0))) == list(range(5))


@needs_library
def test_what_is_broken_is_named_and_skipped(clips, exported, tmp_path, capsys):
    shutil.copytree(exported, tmp_path, dirs_exist_ok=True)
    whole = (tmp_path / "shard-000000.tar").read_bytes()
    (tmp_path / "shard-000000.tar").write_bytes(whole[: int(len(whole) * 0.9)])  # ends within the third clip
    (tmp_path / "shard-000002.tar").write_text("no tar")
    with tarfile.open(tmp_path / "shard-000003.tar", "w") as tar:
        for packed in packed_clips(exported)[3:]:
            for ending, content in (packed | {"mp4": b"no video"}).items():
                if not ending.startswith("__"):
                    member = tarfile.TarInfo(f"broken.{ending}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    names = {one["name"] for one in itertools.islice(iter(stream_of(tmp_path)), 9)}
    assert names == {clips[0].name, clips[1].name, clips[3].name}
    said = capsys.readouterr().out
    for skipped in ("shard-000000.tar", "shard-000002.tar", "shard-000003.tar: broken is skipped"):
        assert skipped in said
    assert said.count("broken is skipped") == 1  # though there were three laps


@needs_library
def test_nothing_but_broken_clips_and_features_of_another_model_end_the_run(exported, tmp_path):
    (tmp_path / "shard-000000.tar").write_text("no tar")
    with pytest.raises(UserError, match="no clip in 1 shards"):
        next(iter(stream_of(tmp_path)))
    with pytest.raises(UserError, match="no clip in 2 shards"):
        next(iter(stream_of(exported, needed=1000)))
    with pytest.raises(UserError, match=f"features of {EARS}, and this model hears by other"):
        next(iter(stream_of(exported, extractor="other")))


@needs_library
def test_shards_are_listed_by_braces_and_stars(exported):
    both = [str(exported / "shard-000000.tar"), str(exported / "shard-000001.tar")]
    assert shard_list(str(exported / "shard-*.tar")) == both
    assert shard_list(str(exported / "shard-{000000..000001}.tar")) == both
    assert shard_list("http://host/{00..02}.tar") == [f"http://host/0{number}.tar" for number in range(3)]
    with pytest.raises(UserError, match=r"shard-000002\.tar is not there"):
        shard_list(str(exported / "shard-{000000..000002}.tar"))


def test_without_the_library_the_command_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "webdataset.shardlists", None)
    with pytest.raises(UserError, match="pip install webdataset"):
        shard_list("x.tar")


@needs_library
@pytest.mark.skipif(not shutil.which("curl"), reason="webdataset reads URLs by curl, which is not installed")
def test_shards_stream_over_http_and_a_missing_one_is_named(clips, exported):
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(exported))
    handler.log_message = lambda *_: None
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        said = []
        urls = shard_list(f"http://127.0.0.1:{server.server_port}/shard-{{000000..000002}}.tar")
        packed = list(read_shards(urls, lambda what, error: said.append(what)))
    finally:
        server.shutdown()
    assert [json.loads(one["json"])["name"] for one in packed] == [clip.name for clip in clips]
    assert said and all("shard-000002" in what for what in said)
