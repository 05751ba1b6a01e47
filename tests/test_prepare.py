"""Preparation: every file is used or named with its reason, work is never done twice, and clips are held out fairly."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import sonic.measuring
import sonic.prepare
import sonic.track_cache
from sonic.clips import Clip, hold_out
from sonic.config import UserError
from sonic.media import VideoReader, save_video
from sonic.prepare import find_videos, prepare
from sonic.prepared import PreparedData
from sonic.sound import load_audio

DATA = Path(__file__).parent / "data"
SIZES = {"num_frames": 10, "frame_step": 2, "progress": False}


class Loudness:
    """A stand-in for Whisper: the level of each 1/50 s."""

    name, layers, width = "loudness-1", 2, 3

    def __call__(self, speech: np.ndarray) -> torch.Tensor:
        count = 2 * (len(speech) // 640)
        level = torch.from_numpy(speech[: count * 320]).view(count, 320).pow(2).mean(1).sqrt()
        return level[:, None, None] * torch.arange(1.0, 7.0).view(1, 2, 3)


@pytest.fixture(scope="module")
def pieces(tmp_path_factory) -> Path:
    """One file of every kind, made once."""
    folder = tmp_path_factory.mktemp("pieces")
    with VideoReader(DATA / "talking_head_2.mp4") as reader:
        frames = reader.read(range(40))
    sound = load_audio(DATA / "talking_head_2.mp4")
    save_video(frames[:25], folder / "good.mp4", 25, sound)
    save_video(frames[:15], folder / "short.mp4", 25, sound)
    save_video(frames[:25], folder / "mute.mp4", 25)
    save_video(frames[:25], folder / "silent.mp4", 25, np.full(16000, 1e-4, np.float32))
    save_video(np.full((30, 64, 64, 3), 99, np.uint8), folder / "faceless.mp4", 25, sound)
    (folder / "truncated.mp4").write_bytes((folder / "good.mp4").read_bytes()[:-9000])
    (folder / "text.mp4").write_text("not a video")
    (folder / "empty.mp4").touch()
    return folder


def corpus(pieces: Path, folder: Path) -> Path:
    """The pieces in nested folders with awkward names, a loop of links and files that are not meant."""
    (folder / "deep" / "er").mkdir(parents=True)
    for piece in pieces.iterdir():
        shutil.copy(piece, folder / piece.name)
    shutil.copy(pieces / "good.mp4", folder / "deep" / "er" / "with 'quotes' \n and 😀.MOV")
    (folder / "deep" / "loop").symlink_to(folder, target_is_directory=True)
    (folder / "gone.mkv").symlink_to(folder / "nowhere.mkv")
    (folder / "._shadow.mp4").write_text("macOS")
    (folder / "notes.txt").write_text("notes")
    return folder


REASONS = {
    "empty.mp4": "empty",
    "faceless.mp4": "no face",
    "gone.mkv": "cannot be read",
    "mute.mp4": "no audio stream",
    "short.mp4": "too short: 15 ticks",
    "silent.mp4": "silent (-80 dBFS",
    "text.mp4": "no video",
    "truncated.mp4": "truncated",
}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_every_file_is_used_or_named_with_its_reason(pieces, tmp_path, num_workers, monkeypatch):
    monkeypatch.setattr(sonic.prepare, "MANY", 1)  # workers judge as well
    root, cache = corpus(pieces, tmp_path / "data"), tmp_path / "cache"
    before = sorted((path, path.lstat().st_mtime_ns) for path in root.rglob("*"))
    data = prepare(root, cache, Loudness(), num_workers=num_workers, **SIZES)
    monkeypatch.undo()
    assert sorted((path, path.lstat().st_mtime_ns) for path in root.rglob("*")) == before  # may be read-only

    assert [clip.name for clip in data.clips] == ["deep/er/with 'quotes' \n and 😀.MOV@0", "good.mp4@0"]
    assert sorted(name for name, _ in data.left_out) == sorted(REASONS)
    table = data.table()
    for name, reason in data.left_out:
        assert REASONS[name] in reason and str(root) not in reason
        assert any(name in line and REASONS[name] in line for line in table.splitlines())
    assert len(table.splitlines()) == 1 + len(REASONS)

    clip = data.clips[1]
    assert (clip.num_ticks, clip.width, clip.height) == (25, 360, 640)
    features = load_file(clip.features)["features"]
    assert features.dtype == torch.float16
    assert torch.equal(features, Loudness()(load_audio(root / "good.mp4")).half())  # though heard block by block

    listing = json.loads((cache / "prepared.json").read_text())
    assert len(listing["videos"]) == 10
    assert len(listing["pieces"]) == 10 and listing["screening"]["min_seconds"] == 3
    assert {row["video"] for row in listing["videos"] if not row["used"]} == set(REASONS)
    assert all(row.get("reason") or row["clips"][0]["num_ticks"] == 25 for row in listing["videos"])
    assert not list(cache.rglob("*.partial"))

    again = prepare(root, cache, Loudness(), num_workers=num_workers, **SIZES)
    assert (again.report.tracks_made, again.report.features_made) == (0, 0)
    assert (again.report.tracks_reused, again.report.features_reused) == (9, 2)
    assert again.left_out == data.left_out
    for one, other in zip(again.clips, data.clips, strict=True):
        assert one.name == other.name and np.array_equal(one.landmarks, other.landmarks)


def test_an_interrupted_run_continues_and_a_changed_file_is_done_again(pieces, tmp_path):
    root, cache = tmp_path / "data", tmp_path / "cache"
    root.mkdir()
    for name in ("a.mp4", "b.mp4", "c.mp4"):
        shutil.copy(pieces / "good.mp4", root / name)

    class Interrupted(Loudness):
        calls = 0

        def __call__(self, speech):
            self.calls += 1
            if self.calls == 2:
                raise KeyboardInterrupt
            return super().__call__(speech)

    with pytest.raises(KeyboardInterrupt):
        prepare(root, cache, Interrupted(), **SIZES)
    data = prepare(root, cache, Loudness(), **SIZES)
    assert (data.report.tracks_made, data.report.tracks_reused) == (0, 3)
    assert (data.report.features_made, data.report.features_reused) == (2, 1)

    shutil.copy(pieces / "mute.mp4", root / "b.mp4")
    entry = next(path for path in (cache / "tracks").iterdir() if path.name.startswith("c-"))
    entry.write_bytes(b"damaged")
    data = prepare(root, cache, Loudness(), **SIZES)
    assert (data.report.tracks_made, data.report.tracks_reused) == (2, 1)
    assert data.left_out == [("b.mp4", "no audio stream")]

    class Other(Loudness):
        name = "loudness-2"

    data = prepare(root, cache, Other(), **SIZES)
    assert (data.report.tracks_made, data.report.features_made) == (0, 2)


def damage_of_tracks(entry: Path):
    """Ways in which a cache entry can be damaged or not ours, each as (name, a function that does it)."""
    tensors = {name: tensor.clone() for name, tensor in load_file(entry).items()}  # load_file's lie in the file itself
    with safe_open(entry, "np") as file:
        facts = json.loads(file.metadata()["video"])

    def rewrite(changes=None, metadata=None, without=(), **more):
        kept = {name: tensor for name, tensor in (tensors | more).items() if name not in without}
        save_file(kept, entry, metadata if metadata is not None else {"video": json.dumps(facts | (changes or {}))})

    yield "junk", lambda: entry.write_bytes(b"damaged")
    yield "empty", lambda: entry.write_bytes(b"")
    yield "cut", lambda: (rewrite(), os.truncate(entry, entry.stat().st_size - 9))
    yield "no metadata", lambda: save_file(tensors, entry)
    yield "other metadata", lambda: rewrite(metadata={"format": "pt"})
    yield "bad JSON", lambda: rewrite(metadata={"video": "{"})
    yield "a list", lambda: rewrite(metadata={"video": "[]"})
    yield "missing keys", lambda: rewrite(metadata={"video": json.dumps({"starts": [0]})})
    yield "starts that are no list", lambda: rewrite({"starts": 3})
    yield "starts that are no numbers", lambda: rewrite({"starts": [None]})
    yield "no tracks", lambda: rewrite({"starts": []})
    yield "no width", lambda: rewrite({"width": None})
    yield "too few ticks", lambda: rewrite({"num_ticks": 5})
    yield "a reason that is no text", lambda: rewrite({"reason": 7})
    yield "a missing tensor", lambda: rewrite(without=["0.landmarks"])
    yield "another shape", lambda: rewrite(**{"0.boxes": torch.zeros(25, 3)})
    yield "a missing curve", lambda: rewrite(without=["shot"])
    yield "a short curve", lambda: rewrite(level=torch.zeros(9, dtype=torch.float16))
    yield "another type", lambda: rewrite(**{"0.boxes": torch.zeros(25, 4, dtype=torch.float64)})


def damage_of_features(entry: Path):
    """The same for features, fp16 [50, 2, 3]."""
    right = load_file(entry)["features"].clone()
    yield "junk", lambda: entry.write_bytes(b"damaged")
    yield "cut", lambda: (save_file({"features": right}, entry), os.truncate(entry, entry.stat().st_size - 9))
    yield "another tensor", lambda: save_file({"states": right}, entry)
    yield "fp32", lambda: save_file({"features": right.float()}, entry)
    yield "too short", lambda: save_file({"features": right[:40].clone()}, entry)
    yield "half a tick", lambda: save_file({"features": torch.zeros(51, 2, 3).half()}, entry)
    yield "other layers", lambda: save_file({"features": right[:, :1].clone()}, entry)
    yield "other width", lambda: save_file({"features": right[..., :2].clone()}, entry)
    yield "one number", lambda: save_file({"features": torch.tensor(1.0).half()}, entry)


@pytest.mark.parametrize("part", ["tracks", "features"])
def test_a_damaged_or_foreign_entry_is_made_again(pieces, tmp_path, monkeypatch, part):
    root, cache = tmp_path / "data", tmp_path / "cache"
    root.mkdir()
    shutil.copy(pieces / "good.mp4", root / "good.mp4")
    fresh = prepare(root, cache, Loudness(), **SIZES).clips[0]
    measured = sonic.measuring.measure(root / "good.mp4")
    monkeypatch.setattr(sonic.prepare, "measure", lambda path: measured)  # following the face takes its time
    (entry,) = (path for path in (cache / part).rglob("*.safetensors"))
    whole = entry.read_bytes()
    for name, damage in (damage_of_tracks if part == "tracks" else damage_of_features)(entry):
        damage()
        assert entry.read_bytes() != whole, name
        data = prepare(root, cache, Loudness(), **SIZES)
        made = (data.report.tracks_made, data.report.features_made)
        assert made == ((1, 0) if part == "tracks" else (0, 1)), name
        assert entry.read_bytes() == whole, name
        assert len(data.clips) == 1 and np.array_equal(data.clips[0].landmarks, fresh.landmarks), name


def test_the_table_counts_seconds_by_the_clock():
    assert "3 clips, 20.4 s" in PreparedData([clip("a", 400), clip("a", 100, 400), clip("b", 10)]).table()


def test_nothing_usable_stops_with_the_table(pieces, tmp_path):
    (tmp_path / "data").mkdir()
    with pytest.raises(UserError, match="holds no video"):
        prepare(tmp_path / "data", tmp_path / "cache", Loudness(), **SIZES)
    with pytest.raises(UserError, match="not a folder"):
        prepare(tmp_path / "missing", tmp_path / "cache", Loudness(), **SIZES)
    shutil.copy(pieces / "mute.mp4", tmp_path / "data" / "mute.mp4")
    with pytest.raises(UserError, match=r"mute\.mp4 +no audio stream"):
        prepare(tmp_path / "data", tmp_path / "cache", Loudness(), **SIZES)
    assert json.loads((tmp_path / "cache" / "prepared.json").read_text())["videos"][0]["reason"] == "no audio stream"
    shutil.copy(pieces / "good.mp4", tmp_path / "data" / "good.mp4")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="--cache_dir"):
        prepare(tmp_path / "data", tmp_path / "file" / "cache", Loudness(), **SIZES)


def test_videos_are_found_in_order_and_the_cache_is_not_searched(tmp_path):
    for name in ("b/z.MP4", "b/a.webm", "a.mkv", "cache/x.mp4", "c.avi", ".hidden.mp4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert find_videos(tmp_path, tmp_path / "cache") == ["a.mkv", "b/a.webm", "b/z.MP4"]


# --------------------------------------------------------------------------------------------------------- holding out


def clip(name: str, ticks: int, start: int = 0) -> Clip:
    boxes = np.arange(ticks * 4, dtype=np.float32).reshape(ticks, 4)
    landmarks = np.zeros((ticks, 68, 2), np.float32)
    return Clip(f"{name}@{start}", Path(name), start, boxes, landmarks, Path("f"), 64, 64)


def test_many_videos_hold_out_whole_videos_by_name():
    clips = [clip(f"{i}.mp4", 100, start) for i in range(60) for start in (0, 200)]
    train, validation = hold_out(clips)
    held = {c.video for c in validation}
    assert 2 <= len(held) <= 8 and not held & {c.video for c in train}
    assert len(train) + len(validation) == len(clips)
    assert {c.video for c in hold_out(clips[::-1])[1]} == held
    assert len({c.video for c in hold_out(clips[:20])[1]}) == 2


def test_a_held_out_video_stays_so_when_others_are_added():
    clips = [clip(f"{i}.mp4", 100) for i in range(400)]
    few, many = ({c.video for c in hold_out(clips[:count])[1]} for count in (200, 400))
    assert len(few) > 2 and few <= many and not (many - few) & {c.video for c in clips[:200]}


def test_few_videos_hold_out_their_last_fifth():
    train, validation = hold_out([clip("a.mp4", 500, 40), clip("b.mp4", 60), clip("c.mp4", 51)], window=26)
    assert [(c.name, c.num_ticks) for c in train] == [("a.mp4@40", 400), ("b.mp4@0", 34), ("c.mp4@0", 51)]
    assert [(c.name, c.num_ticks) for c in validation] == [("a.mp4@440", 100), ("b.mp4@34", 26)]
    assert np.array_equal(validation[0].boxes[0], clip("a.mp4", 500).boxes[400])


def test_something_is_held_out_where_possible():
    train, validation = hold_out([clip("a.mp4", 30), clip("b.mp4", 30), clip("c.mp4", 30)])
    assert len(train) == 2 and len(validation) == 1
    train, validation = hold_out([clip("a.mp4", 30)])
    assert len(train) == 1 and validation == []
