"""CelebV-HQ's annotations: exactly the annotated clips are cut, with their sound, and every other entry is named."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

import sonic.prepare
from sonic import celebvhq
from sonic.celebvhq import clip_box, cut_clips, read_annotations
from sonic.config import UserError
from sonic.media import VideoReader
from sonic.pieces import read_pieces
from sonic.sound import load_audio
from sonic.workers import Share

DATA = Path(__file__).parent / "data"
RAW = "M2Ohb0FAaJU"


def entry(start=0.8, end=1.64, box=(0.1, 0.7, 0.25, 0.75), video=RAW) -> dict:
    """One clip as celebvhq_info.json has it."""
    return {
        "ytb_id": video,
        "duration": {"start_sec": start, "end_sec": end},
        "bbox": dict(zip(("top", "bottom", "left", "right"), box, strict=True)),
        "attributes": {"appearance": [0, 1], "action": [1], "emotion": {"sep_flag": False, "labels": "neutral"}},
        "version": "v0.1",
    }


def write_info(path: Path, clips: dict) -> Path:
    path.write_text(json.dumps({"meta_info": {"appearance_mapping": ["Blurry"]}, "clips": clips}))
    return path


@pytest.fixture(scope="module")
def raw(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("raw")
    (folder / "part").mkdir()
    shutil.copy(DATA / "talking_head_1.mp4", folder / "part" / f"{RAW}.mp4")
    return folder


VIDEOS = [f"part/{RAW}.mp4"]


def test_a_clip_holds_the_annotated_pictures_and_their_sound(raw, tmp_path):
    info = write_info(tmp_path / "info.json", {f"{RAW}_1": entry()})
    assert cut_clips(info, raw, VIDEOS, tmp_path / "clips", Share(), progress=False) == []
    with VideoReader(raw / VIDEOS[0]) as source, VideoReader(tmp_path / "clips" / f"{RAW}_1.mp4") as clip:
        x0, y0, x1, y1 = clip_box((0.1, 0.7, 0.25, 0.75), source.info.width, source.info.height)
        assert (clip.info.width, clip.info.height, clip.num_ticks) == (x1 - x0, y1 - y0, 21)
        told = source.read(range(20, 41))[:, y0:y1, x0:x1].astype(float)
        cut = clip.read(range(21)).astype(float)
    # Each picture is its own time's, nearer to it than to its neighbours, and as good as the same.
    errors = np.array([[np.abs(a - b).mean() for b in told] for a in cut])
    assert (errors.argmin(1) == np.arange(21)).all() and errors.diagonal().max() < 2
    heard, said = load_audio(tmp_path / "clips" / f"{RAW}_1.mp4"), load_audio(raw / VIDEOS[0])[20 * 640 : 41 * 640]
    assert len(heard) == len(said)
    assert np.corrcoef(heard, said)[0, 1] > 0.95


def test_the_square_is_the_one_of_the_datasets_own_tool():
    # bbox of M2Ohb0FAaJU_1 in the dataset's README, in a 1920 x 1080 video: rows 0 to 974, columns 339 to 1367.
    assert clip_box((0.0, 0.8815, 0.1964, 0.6922), 1920, 1080) == (366, 0, 1340, 974)
    assert clip_box((0.0, 1.0, 0.0, 1.0), 641, 361) == (140, 0, 500, 360)


def test_broken_entries_are_named_and_the_others_cut(raw, tmp_path):
    clips = {
        "good": entry(),
        "elsewhere": entry(video="not_downloaded"),
        "backwards": entry(start=3, end=2),
        "nan": entry(end=float("nan")),
        "text": entry(start="soon"),
        "outside": entry(box=(0.1, 1.2, 0.2, 0.5)),
        "late": entry(start=5000, end=5003),
        "../escape": entry(),
        "no_box": {name: value for name, value in entry().items() if name != "bbox"},
        "list": [1, 2],
    }
    out = tmp_path / "clips"
    reasons = dict(cut_clips(write_info(tmp_path / "info.json", clips), raw, VIDEOS, out, Share(), progress=False))
    assert [path.name for path in out.iterdir()] == ["good.mp4"]
    wanted = {
        "elsewhere": "not_downloaded is not among the videos",
        "backwards": "from 3 s to 2 s",
        "nan": "from 0.8 s to nan s",
        "text": "could not convert",
        "outside": "does not lie in 0 to 1",
        "late": "ends at 5003 s, but its video lasts",
        "../escape": "name of a file",
        "no_box": "no 'bbox'",
        "list": "broken entry",
    }
    assert reasons.keys() == wanted.keys()
    for name, words in wanted.items():
        assert words in reasons[name]


def test_a_broken_video_names_its_clips_and_harms_no_other(raw, tmp_path):
    broken = tmp_path / "raw"
    shutil.copytree(raw, broken)
    (broken / "cut.mp4").write_bytes((raw / VIDEOS[0]).read_bytes()[:20_000])
    os.mkfifo(broken / "pipe.mp4")
    clips = {"whole": entry(), "broken": entry(video="cut"), "waiting": entry(video="pipe")}
    info = write_info(tmp_path / "info.json", clips)
    left_out = cut_clips(
        info, broken, [*VIDEOS, "cut.mp4", "pipe.mp4"], tmp_path / "clips", Share(), num_workers=2, progress=False
    )
    assert sorted(name for name, _ in left_out) == ["broken", "waiting"]
    assert (tmp_path / "clips" / "whole.mp4").exists()


def test_a_second_call_cuts_only_what_has_changed(raw, tmp_path, monkeypatch):
    out, info = tmp_path / "clips", tmp_path / "info.json"
    write_info(info, {"one": entry(), "two": entry(start=2, end=2.2)})
    cut_clips(info, raw, VIDEOS, out, Share(), progress=False)
    (out / "two.mp4").write_bytes(b"damaged")
    write_info(info, {"one": entry(), "two": entry(start=2, end=2.2), "three": entry(start=1, end=1.2)})
    cut, plain = [], celebvhq._cut
    monkeypatch.setattr(celebvhq, "_cut", lambda *args: cut.append(args[2].name) or plain(*args))
    cut_clips(info, raw, VIDEOS, out, Share(), progress=False)
    assert sorted(cut) == ["three", "two"]
    assert sorted(path.name for path in out.iterdir()) == ["one.mp4", "three.mp4", "two.mp4"]


@pytest.mark.parametrize("text", ["no json", "[]", "{}", '{"clips": 3}'])
def test_a_file_that_is_not_the_annotations_is_one_sentence(tmp_path, text):
    (tmp_path / "info.json").write_text(text)
    with pytest.raises(UserError, match="celebvhq_info"):
        read_annotations(tmp_path / "info.json")
    with pytest.raises(UserError, match="No such file"):
        read_annotations(tmp_path / "missing.json")


def test_the_command_cuts_the_clips_prepares_them_and_reports_those_it_could_not_cut(raw, tmp_path, capsys):
    clips = {f"{RAW}_0": entry(start=0.4, end=3.4, box=(0, 1, 0, 1)), "elsewhere": entry(video="not_downloaded")}
    info, cache = write_info(tmp_path / "info.json", clips), tmp_path / "cache"
    command = ["--data_root", str(raw), "--cache_dir", str(cache), "--celebvhq", str(info), "--num_workers", "0"]
    sonic.prepare.main([*command, "--keep_all", "--min_seconds", "2"])
    assert "1 clips of CelebV-HQ cannot be cut, 'elsewhere'" in capsys.readouterr().out
    pieces = read_pieces(cache / "prepared.json")
    assert [(piece.video, piece.kept) for piece in pieces] == [(f"{RAW}_0.mp4", True)]
    report = json.loads((cache / "report.json").read_text())
    assert [row["video"] for row in report["dropped_pieces"] if not row["kept"]] == ["elsewhere.mp4"]
    assert "data:image/jpeg" in (cache / "report.html").read_text()
