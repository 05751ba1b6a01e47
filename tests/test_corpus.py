"""The preparation over every kind of bad file: each is used or named with its reason, and no other one is harmed."""

import multiprocessing

from corpus import make_corpus

from sonic.pieces import read_pieces
from sonic.prepare import main

TIME_LIMIT = 240  # seconds for all files, on a busy machine; a hanging one would never end


def test_every_file_is_used_or_named(tmp_path):
    (tmp_path / "videos").mkdir()
    expected = make_corpus(tmp_path / "videos")
    cache = tmp_path / "cache"
    arguments = ["--data_root", str(tmp_path / "videos"), "--cache_dir", str(cache), "--num_workers", "0"]
    arguments += ["--num_frames", "10", "--frame_step", "1"]
    process = multiprocessing.get_context("spawn").Process(target=main, args=(arguments,))
    process.start()
    process.join(TIME_LIMIT)
    hangs = process.is_alive()
    process.kill()
    assert not hangs and process.exitcode == 0

    pieces = read_pieces(cache / "prepared.json")
    assert {piece.video for piece in pieces} == set(expected)
    outcomes = {}
    for name, reason in expected.items():
        own = [piece for piece in pieces if piece.video == name]
        if reason is None:
            outcomes[name] = [piece.reason for piece in own if not piece.kept] or None
        else:
            fits = not any(piece.kept for piece in own) and any(reason in piece.reason for piece in own)
            outcomes[name] = reason if fits else [(piece.kept, piece.reason) for piece in own]
    assert outcomes == expected
    by_name = {piece.video: piece for piece in pieces if piece.kept}
    assert 48 <= by_name["letterbox.mp4"].numbers["top"] <= 54
    for name in ("rotated_90.mp4", "rotated_180.mp4", "8_khz.mp4", "50_fps.mp4", "ten_bit.mp4"):
        assert abs(by_name[name].numbers["face_size"] / by_name["good.mp4"].numbers["face_size"] - 1) < 0.05, name
        assert by_name[name].numbers["sync_r"] > 0.6, name
