"""Verdicts: each step keeps what it must keep and drops what it must drop, and another threshold needs no measuring."""

import dataclasses
import json

import numpy as np
import pytest
from corpus import PUPPET, puppet, write

import sonic.measuring
from sonic.config import SAMPLE_RATE, SAMPLES_PER_TICK, UserError
from sonic.dataset import SonicDataset, square_of
from sonic.faces import square_crop
from sonic.judging import FACE_CHECKS, PIECE_CHECKS, judge
from sonic.measuring import CURVES, Measured, curve_length, face_look, find_borders, measure, measure_sound
from sonic.motion import head_yaw, window_buckets
from sonic.pieces import STEPS, Piece, Screening, by_step
from sonic.prepare import main, prepare, screening_for
from sonic.track_cache import load_measured, save_measured

NEEDED = 11


@pytest.fixture(scope="module")
def talking() -> Measured:
    """A puppet that talks for 4 s, measured."""
    return measure(PUPPET)


def longer(measured: Measured, times: int) -> Measured:
    """The same again and again, as one video."""
    start, boxes, landmarks = measured.tracks[0]
    assert (start, len(boxes)) == (0, measured.num_ticks)
    curves = {}
    for name, (_, columns) in CURVES.items():
        repeated = np.tile(measured.curves[name], (times, 1) if columns else times)
        curves[name] = repeated[: curve_length(name, times * measured.num_ticks)]
    track = (0, np.tile(boxes, (times, 1)), np.tile(landmarks, (times, 1, 1)))
    return dataclasses.replace(measured, num_ticks=times * measured.num_ticks, tracks=[track], curves=curves)


def changed(measured: Measured, **curves) -> Measured:
    """With other curves: an array, or a number for all of it."""
    full = {
        name: np.full_like(measured.curves[name], value) if np.isscalar(value) else value
        for name, value in curves.items()
    }
    return dataclasses.replace(measured, curves=measured.curves | full)


def moved(measured: Measured, function) -> Measured:
    """With other landmarks."""
    start, boxes, landmarks = measured.tracks[0]
    points = function(landmarks.astype(float)).astype(np.float32)
    shift = (points - landmarks).mean(axis=1)
    return dataclasses.replace(measured, tracks=[(start, boxes + np.tile(shift, 2), points)])


def verdict(measured: Measured, **thresholds) -> list[tuple[int, int, bool, str | None]]:
    pieces = judge("a.mp4", measured, Screening(**thresholds), NEEDED)
    assert [piece.start for piece in pieces] == sorted(piece.start for piece in pieces)
    for piece in pieces:
        assert piece.step is None or (piece.step in STEPS and piece.reason)
    return [(piece.start, piece.num_ticks, piece.kept, piece.measure) for piece in pieces]


def test_a_good_piece_is_kept_with_all_its_numbers(talking):
    (piece,) = judge("a.mp4", talking, Screening(), NEEDED)
    assert piece.kept and piece.step is None and (piece.start, piece.num_ticks) == (0, 100)
    numbers = piece.numbers
    assert numbers["sync_r"] > 0.8 and numbers["sync_offset"] == 0 and numbers["yaw"] < 10
    assert 40 < numbers["expression_bucket"] < 80 and 100 < numbers["face_size"] < 140
    assert Piece.from_json(json.loads(json.dumps(piece.to_json()))) == piece


def test_shots_cut_and_short_ones_are_dropped(talking):
    long = longer(talking, 3)
    cut = long.curves["shot"].copy()
    cut[[100, 120]] = 40
    assert verdict(changed(long, shot=cut)) == [
        (0, 100, True, None),
        (100, 20, False, "seconds"),
        (120, 180, True, None),
    ]
    assert len(verdict(changed(long, shot=cut), shot_threshold=41)) == 1
    assert verdict(long, max_seconds=5) == [(0, 100, True, None), (100, 100, True, None), (200, 100, True, None)]
    assert verdict(talking, min_seconds=4.1)[0][2]  # a file shorter than that has been cut already
    assert verdict(long, min_seconds=4.1, max_seconds=4.1)[0][2]


FACES = {
    "face_size": lambda points: (
        points.mean(axis=1, keepdims=True) + 0.4 * (points - points.mean(axis=1, keepdims=True))
    ),
    "outside": lambda points: points - [points[:, :, 0].min() + 40, 0],
}


@pytest.mark.parametrize("name", FACES)
def test_an_unfit_face_is_dropped_or_split_off(talking, name):
    bad = moved(talking, FACES[name])
    if name == "face_size":
        bad.tracks[0][1][:, 3] = bad.tracks[0][1][:, 1] + 50
    assert verdict(bad) == [(0, 100, False, name)]
    long = longer(talking, 3)
    for value, expected in ((bad.tracks[0], [(0, 100, False, name), (100, 200, True, None)]),):
        long.tracks[0][1][:100], long.tracks[0][2][:100] = value[1], value[2]
        assert verdict(long) == expected


def test_a_second_face_and_a_turned_head_split(talking):
    long = longer(talking, 3)
    second = long.curves["second_face"].copy()
    second[4:6] = 0.8
    pieces = verdict(changed(long, second_face=second))
    assert [piece[2:] for piece in pieces] == [(True, None), (False, "seconds"), (True, None)]
    assert verdict(changed(long, second_face=0.5)) == [(0, 300, True, None)]
    assert verdict(changed(long, second_face=0.8), max_second_face=1) == [(0, 300, True, None)]
    turned = long.tracks[0][2]
    turned[150:250, 30, 0] += 40
    assert [piece[2:] for piece in verdict(long)] == [(True, None), (False, "yaw"), (False, "seconds")]
    turned[150:250, 30, 0] -= 40
    turned[150:153, 30, 0] += 40  # three ticks are a landmark's mistake
    assert verdict(long) == [(0, 300, True, None)]


def test_yaw_follows_its_geometry():
    """A head of flat eyes and a nose before them, turned, tilted and scaled."""
    head = np.zeros((68, 3))
    head[36], head[45], head[30] = (-45, 0, 0), (45, 0, 0), (0, 35, 45)
    for yaw in (-60, -20, 0, 35):
        angle, tilt = np.radians(yaw), np.radians(17)
        turned = np.stack([head[:, 0] * np.cos(angle) + head[:, 2] * np.sin(angle), head[:, 1]], axis=1)
        tilted = 3 * turned @ np.array([[np.cos(tilt), np.sin(tilt)], [-np.sin(tilt), np.cos(tilt)]]) + 100
        assert head_yaw(turned[None])[0] == pytest.approx(yaw)
        if not yaw:
            assert abs(head_yaw(turned[None])[0]) < 1e-6
        assert np.sign(head_yaw(tilted[None])[0] + 40) == np.sign(yaw + 40)


@pytest.mark.parametrize(
    ("measure", "curve", "value", "thresholds"),
    [
        ("brightness", "brightness", 12.0, {"min_brightness": 10}),
        ("brightness", "brightness", 250.0, {"max_brightness": 255}),
        ("sharpness", "sharpness", 0.01, {"min_sharpness": 0}),
        ("level", "level", -55.0, {"min_level": -58}),
        ("clipping", "clipped", 1.0, {"max_clipping": 1}),
        ("swing", "speech", -30.0, {"min_swing": 0, "max_music": 1}),
        ("music", "lines", 0.7, {"max_music": 1}),
    ],
)
def test_picture_and_sound_drop(talking, measure, curve, value, thresholds):
    bad = changed(talking, **{curve: value})
    ((_, _, kept, found),) = verdict(bad)
    assert not kept and found == measure
    assert verdict(bad, **thresholds) == [(0, 100, True, None)]
    (piece,) = judge("a.mp4", bad, Screening(keep_all=True), NEEDED)
    assert piece.kept and piece.measure == measure and "(--m" in piece.reason


def test_a_still_face_and_a_silent_one_drop(talking):
    still = moved(talking, lambda points: np.tile(points[:1], (len(points), 1, 1)))
    assert verdict(still) == [(0, 100, False, "expression")]
    pauses = talking.curves["speech"].copy()
    pauses[160:] = -90
    assert verdict(changed(talking, speech=pauses)) == [(0, 100, False, "speech")]


def test_sync_drops_only_what_is_long_enough_to_tell(talking):
    long = longer(talking, 4)
    foreign = changed(long, speech=long.curves["speech"][::-1].copy())
    assert verdict(long, min_sync_r=0.6)[0][2]
    assert verdict(foreign, min_sync_r=0.6) == [(0, 400, False, "sync_r")]
    assert verdict(foreign, min_sync_r=0.6, min_sync_seconds=20) == [(0, 400, True, None)]


def test_a_stable_offset_becomes_a_shift(talking):
    for late in (-7, 4):  # ticks the mouth is late
        speech = np.roll(talking.curves["speech"], -8 * late, axis=0)
        (piece,) = judge("a.mp4", changed(talking, speech=speech), Screening(), NEEDED)
        assert piece.kept and piece.numbers["sync_shift"] == late
        assert (piece.start, piece.num_ticks) == (max(late, 0), 100 - abs(late))


def test_wild_motion_and_long_paths_drop(talking):
    sway = 40 * np.sin(np.arange(100) / 2)[:, None, None] * np.array([1.0, 0.0])
    wild = moved(talking, lambda points: points + sway)
    assert verdict(wild, max_outside=1) == [(0, 100, False, "calmest_bucket")]
    assert verdict(wild, max_outside=1, max_motion_bucket=1000)[0][2]
    assert verdict(talking, max_path=0.3) == [(0, 100, False, "path")]


# Whose numbers a puppet has above 0; the others' thresholds are in the tests above.
DECIDING = [
    check
    for check in PIECE_CHECKS
    if check.flag not in ("max_clipping", "max_music", "min_syncnet_confidence")  # the last one: test_syncnet.py
]


@pytest.mark.parametrize("check", DECIDING, ids=lambda check: check.flag)
def test_a_threshold_on_either_side_of_a_number_decides(talking, check):
    (piece,) = judge("a.mp4", talking, Screening(), NEEDED)
    value = piece.numbers[check.measure]
    low, high = value - 0.02 * abs(value), value + 0.02 * abs(value)
    if value < 1:
        high = min(high, (value + 1) / 2)  # correlations and shares end at 1
    passing, failing = (low, high) if check.flag.startswith("min_") else (high, low)
    others = {"min_sync_seconds": 0, "min_sync_r": 0}
    assert verdict(talking, **others | {check.flag: passing}) == [(0, 100, True, None)]
    assert verdict(talking, **others | {check.flag: failing}) == [(0, 100, False, check.measure)]


def test_face_thresholds_decide(talking):
    for flag, passing, failing in (("min_face", 0, 1000), ("max_yaw", 90, 0)):
        assert verdict(talking, **{flag: passing})[0][2]
        assert verdict(talking, **{flag: failing})[0][2:] == (False, {"min_face": "face_size", "max_yaw": "yaw"}[flag])


def test_every_threshold_belongs_to_a_check_or_is_known_otherwise():
    others = "min_seconds max_seconds shot_threshold min_sync_seconds syncnet_path crop crop_expand keep_all"
    flags = {check.flag for check in (*FACE_CHECKS, *PIECE_CHECKS)} | set(others.split())
    assert flags == {one.name for one in dataclasses.fields(Screening)}
    for low, high in (("min_seconds", "max_seconds"), ("min_brightness", "max_brightness")):
        with pytest.raises(UserError, match=f"{low} is above {high}"):
            Screening(**{low: 99, high: 98})


def test_files_that_are_no_use_are_pieces_too():
    (piece,) = judge("a.mp4", Measured(reason="is empty"), Screening(keep_all=True), NEEDED)
    assert (piece.kept, piece.step, piece.reason) == (False, "probe", "is empty")
    assert by_step([piece])["probe"] == 1


def test_the_cache_gives_back_what_was_measured(talking, tmp_path):
    save_measured(talking, tmp_path / "a.safetensors")
    again = load_measured(tmp_path / "a.safetensors")
    assert judge("a", again, Screening(), NEEDED) == [
        dataclasses.replace(piece, entry="a") for piece in judge("a", talking, Screening(), NEEDED)
    ]


# ------------------------------------------------------------------------------------------------------- measurements


def test_sound_is_measured_in_stretches_as_in_one_piece(monkeypatch):
    sound = puppet(100)[1]
    whole, ticks = measure_sound(iter([sound]))
    monkeypatch.setattr("sonic.measuring.STRETCH", SAMPLE_RATE)
    longest = 0

    def count(before, samples, ticks, original=sonic.measuring._sound_curves):
        nonlocal longest
        longest = max(longest, len(samples))
        return original(before, samples, ticks)

    monkeypatch.setattr("sonic.measuring._sound_curves", count)
    parts, same = measure_sound(iter(np.array_split(sound, 37)))
    assert ticks == same == 100 and longest < 2 * SAMPLE_RATE
    for name in whole:
        assert whole[name].shape == parts[name].shape and np.allclose(whole[name], parts[name], atol=0.02), name


def test_notes_stand_still_and_voices_do_not():
    time = np.arange(4 * SAMPLE_RATE) / SAMPLE_RATE
    chords = [[262, 330, 392], [349, 440, 523]]
    notes = sum(np.sin(2 * np.pi * np.where(time % 2 < 1, low, high) * time) for low, high in zip(*chords, strict=True))
    music = measure_sound(iter([(0.1 * notes).astype(np.float32)]))[0]["lines"]
    voice = measure_sound(iter([puppet(100)[1]]))[0]["lines"]
    noise = measure_sound(iter([np.random.default_rng(0).normal(scale=0.1, size=64_000).astype(np.float32)]))[0][
        "lines"
    ]
    assert np.median(music) > 0.6 and np.median(voice) < 0.2 and np.median(noise) < 0.1


def test_blur_lowers_sharpness_and_bars_are_found():
    import cv2

    (frames, _), landmarks = puppet(1), np.array([[80.0, 60.0], [180.0, 190.0]])
    sharp = face_look(frames[0], landmarks)
    blurred = face_look(cv2.GaussianBlur(frames[0], (0, 0), 6), landmarks)
    assert blurred[1] < 0.02 < sharp[1] and blurred[0] == pytest.approx(sharp[0], abs=3)
    barred = np.pad(frames[0], [(30, 30), (0, 0), (0, 0)])
    left, top, right, bottom = find_borders(barred)
    assert (left, right) == (0, 0) and 30 <= top * 316 <= 34 and 30 <= bottom * 316 <= 34
    dark = np.zeros_like(frames[0])
    dark[100:200, 100:180] = frames[0][100:200, 100:180]  # a face in a dark room
    assert find_borders(dark) == (0, 0, 0, 0)


# ---------------------------------------------------------------------------------------------- what training makes of it


class Level:
    """A stand-in for Whisper: the level of each 1/50 s."""

    name, layers, width = "level", 1, 1

    def __call__(self, speech):
        import torch

        count = 2 * (len(speech) // SAMPLES_PER_TICK)
        return torch.from_numpy(speech[: count * 320]).view(count, 320).pow(2).mean(1).sqrt()[:, None, None]


SIZES = {"num_frames": 10, "frame_step": 1, "progress": False}


def test_late_sound_is_heard_with_its_picture(tmp_path):
    """The same clip with its sound in place and 6 ticks late: a window's pictures come with the same features."""
    frames, speech = puppet(100)
    late = np.pad(speech, (6 * SAMPLES_PER_TICK, 0))[: len(speech)]
    samples = {}
    for name, sound in (("right", speech), ("late", late)):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "a.mp4", frames, sound)
        (clip,) = prepare(tmp_path / name, tmp_path / f"{name}-cache", Level(), **SIZES).clips
        assert clip.offset == (0 if name == "right" else -6)
        assert (clip.start, clip.num_ticks) == (0, 100 if name == "right" else 94)
        dataset = SonicDataset([clip.part(0, 94)], num_frames=10, frame_step=1, resolution=64)
        samples[name] = dataset[3]
    assert np.array_equal(samples["right"]["ticks"], samples["late"]["ticks"])
    for windows in ("audio_windows", "bucket_windows"):
        right, heard = samples["right"][windows], samples["late"][windows]
        assert right.std() > 0.02 and (right - heard).abs().mean() < 0.05 * right.std()
        unshifted = SonicDataset([dataclasses.replace(clip, offset=0)], num_frames=10, frame_step=1, resolution=64)
        assert (unshifted[3][windows] - right).abs().mean() > 0.3 * right.std()


def test_crop_borders_and_calm_windows(tmp_path, talking):
    frames, speech = puppet(100)
    (tmp_path / "videos").mkdir()
    write(tmp_path / "videos/a.mp4", np.pad(frames, [(0, 0), (40, 40), (0, 0), (0, 0)]), speech)

    def clip(**thresholds):
        return prepare(
            tmp_path / "videos", tmp_path / "cache", Level(), screening=Screening(**thresholds), **SIZES
        ).clips[0]

    square = square_of(clip(), clip().boxes)
    assert square[1] >= 40 and square[3] <= 296
    whole = square_of(clip(crop="none"), clip().boxes)
    assert whole[2] - whole[0] == pytest.approx(252, abs=4) and whole[1] >= 40
    wide, narrow = (square_of(clip(crop_expand=expand), clip().boxes) for expand in (0.5, 0.1))
    assert narrow[2] - narrow[0] < wide[2] - wide[0] == square[2] - square[0]
    assert square_crop(clip().boxes[0], 0.5, 256, 336)  # the released rule itself

    buckets = [max(window_buckets(clip().landmarks[first : first + 10])) for first in range(90)]
    limit = float(np.percentile(buckets, 40))
    calm = SonicDataset([clip(max_motion_bucket=limit)], num_frames=10, frame_step=1, resolution=64)
    drawn = [calm._draw(number)[1][0] for number in range(40)]
    assert all(buckets[first] <= limit + 1e-6 for first in drawn)
    plain = SonicDataset([clip()], num_frames=10, frame_step=1, resolution=64)
    assert any(buckets[plain._draw(number)[1][0]] > limit for number in range(40))


def test_training_takes_the_thresholds_of_the_preparation(tmp_path, capsys):
    (tmp_path / "videos").mkdir()
    write(tmp_path / "videos/a.mp4", *puppet(40))
    flags = f"--data_root {tmp_path}/videos --cache_dir {tmp_path}/cache --num_frames 10 --frame_step 1 --num_workers 0"
    main([*flags.split(), "--min_face", "30", "--crop_expand", "0.7"])
    assert "1 videos used: 1 clips, 1.6 s" in capsys.readouterr().out
    chosen = screening_for({"min_face": 20}, tmp_path / "cache")
    assert (chosen.min_face, chosen.crop_expand, chosen.max_yaw) == (20, 0.7, 40)
    assert screening_for({}, tmp_path / "elsewhere") == Screening()
    with pytest.raises(UserError, match="No video"):
        main([*flags.split(), "--min_face", "300"])
    assert screening_for({}, tmp_path / "cache").min_face == 300
    (tmp_path / "cache/screening.json").write_text("{")
    with pytest.raises(UserError, match=r"screening\.json cannot be read"):
        screening_for({}, tmp_path / "cache")


def test_thresholds_are_checked():
    with pytest.raises(UserError, match="min_seconds is above max_seconds"):
        Screening(min_seconds=40)
    with pytest.raises(UserError, match="crop must be one of"):
        Screening(crop="half")
    with pytest.raises(UserError, match="max_yaw"):
        Screening(max_yaw=100)


def test_a_file_that_is_still_being_written_is_looked_at_again(tmp_path, monkeypatch):
    (tmp_path / "videos").mkdir()
    video = write(tmp_path / "videos/a.mp4", *puppet(40))
    whole = video.read_bytes()
    look = sonic.measuring._measure

    def grows(path):
        path.write_bytes(whole + b"\0")
        return look(path)

    with monkeypatch.context() as patch:
        patch.setattr("sonic.measuring._measure", grows)
        with pytest.raises(UserError, match="still being written"):
            prepare(tmp_path / "videos", tmp_path / "cache", Level(), **SIZES)
    assert len(prepare(tmp_path / "videos", tmp_path / "cache", Level(), **SIZES).clips) == 1
