"""Puppets: the law of the mouth, what the parameters do, the pictures, the faces that dlib finds in them, the command."""

import dataclasses
import json

import cv2
import numpy as np
import pytest
import soundfile

from sonic import flags, puppets
from sonic.config import SAMPLE_RATE, UserError
from sonic.faces import detect_faces
from sonic.media import VideoReader
from sonic.metrics import follow
from sonic.motion import motion_spread
from sonic.puppets import (
    Identity,
    Motion,
    Pose,
    articulation,
    choose_excerpt,
    clip_truth,
    draw,
    main,
    make_clip,
    moods,
    random_motion,
    render_clip,
    speech_to_mouth,
)
from sonic.sound import load_audio


def identity(seed):
    return Identity.random(np.random.default_rng(seed))


def vowel(pitch, formants, seconds=1.0):
    """A harmonic tone whose spectrum peaks at the formants (Hz), fading in and out; float32 at 16 kHz."""
    time_axis = np.arange(round(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    sound = np.zeros_like(time_axis)
    for hertz in np.arange(pitch, 4000, pitch):
        gain = sum(0.5**order / (1 + ((hertz - formant) / 90) ** 2) for order, formant in enumerate(formants))
        sound += (gain + 1e-3) * np.sin(2 * np.pi * hertz * time_axis + hertz)
    return np.float32(0.2 * sound / np.abs(sound).max() * np.sin(np.pi * time_axis / seconds) ** 0.25)


AH, EE, OO = vowel(120, (700, 1200)), vowel(120, (280, 2250)), vowel(120, (310, 700))
SILENCE = np.zeros(SAMPLE_RATE, np.float32)


# --- the law ---


def test_silence_closes_the_mouth_and_sound_opens_it():
    noise = np.random.default_rng(0).normal(0, 3e-4, 3 * SAMPLE_RATE).astype(np.float32)
    opening, width = speech_to_mouth(np.concatenate([SILENCE, AH, SILENCE]) + noise, 75)
    assert opening.shape == width.shape == (75,) and opening.dtype == np.float32
    assert opening[:22].max() < 0.02 and opening[-22:].max() < 0.02
    assert opening[30:45].min() > 0.7 and opening.min() >= 0 and opening.max() <= 1


@pytest.mark.parametrize("clip", [SILENCE, np.random.default_rng(0).normal(0, 1e-4, SAMPLE_RATE).astype(np.float32)])
def test_a_clip_without_speech_stays_closed(clip):
    opening, width = speech_to_mouth(clip, 25)
    assert opening.max() < 0.05 and np.abs(width).max() < 0.05


def test_louder_opens_wider_and_the_recording_level_does_not_matter():
    speech = np.concatenate([0.1 * AH, AH])
    opening, _ = speech_to_mouth(speech, 50)
    assert opening[10:15].mean() + 0.4 < opening[35:40].mean()
    assert np.allclose(speech_to_mouth(speech * 0.05, 50)[0], opening, atol=0.05)


def test_vowels_differ_in_width():
    _, width = speech_to_mouth(np.concatenate([EE, OO]), 50)
    assert width[5:20].mean() > 0.2 and width[30:45].mean() < -0.2
    alone = [speech_to_mouth(sound, 25)[1][5:20].mean() for sound in (EE, OO)]
    assert alone[0] - alone[1] > 0.5  # also without the other in the clip


@pytest.mark.parametrize("fps", [25, 12.5])
def test_the_mouth_is_in_time(fps):
    """A sound that is symmetric about a tick's middle opens the mouth symmetrically about that tick."""
    middle, num_ticks = 11, 23
    speech = np.zeros(round(num_ticks / fps * SAMPLE_RATE), np.float32)
    centre = round((middle + 0.5) / fps * SAMPLE_RATE)
    tone = np.cos(2 * np.pi * 500 * np.arange(-1600, 1601) / SAMPLE_RATE) * np.hanning(3201)
    speech[centre - 1600 : centre + 1601] = tone
    opening, _ = speech_to_mouth(speech, num_ticks, fps)
    assert opening.argmax() == middle
    assert np.allclose(opening, opening[::-1], atol=0.02)


@pytest.mark.parametrize("num_samples", [0, 100, 640, 3200])
def test_very_short_speech_has_a_mouth_too(num_samples):
    opening, width = speech_to_mouth(AH[:num_samples], 1)
    assert opening.shape == width.shape == (1,) and np.isfinite([opening, width]).all()


def test_an_excerpt_has_speech_in_it():
    speech = np.concatenate([SILENCE] * 10 + [AH, EE] + [SILENCE] * 10)
    hits = 0
    for seed in range(20):
        excerpt, start = choose_excerpt(speech, SAMPLE_RATE, np.random.default_rng(seed))
        assert np.array_equal(excerpt, speech[start : start + SAMPLE_RATE])
        hits += np.abs(excerpt).max() > 0.1
    assert hits >= 10  # of 20; blind draws hit 3
    padded, start = choose_excerpt(AH, 2 * SAMPLE_RATE, np.random.default_rng(0))
    assert len(padded) == 2 * SAMPLE_RATE and np.array_equal(padded[-start : -start + SAMPLE_RATE], AH)


# --- who and what ---


def test_identities_do_not_repeat():
    looks = np.array([dataclasses.astuple(identity(seed)) for seed in range(50)])
    assert looks.shape[1] >= 10 and looks.min() >= 0 and looks.max() <= 1
    assert (looks.std(axis=0) > 0.05).all()
    pictures = np.stack([draw(identity(seed), Pose(), 64) for seed in range(8)]).astype(np.float32)
    for i in range(8):
        for j in range(i):
            assert np.abs(pictures[i] - pictures[j]).mean() > 4


def test_same_seed_same_pixels():
    clips = [render_clip(identity(3), random_motion(5, np.random.default_rng(4)), 64) for _ in range(2)]
    assert clips[0].shape == (5, 64, 64, 3) and clips[0].dtype == np.uint8
    assert np.array_equal(*clips)


def test_each_amplitude_moves_its_own_part():
    head, face = ("x", "y", "rotation", "scale"), ("brow", "smile", "gaze_x", "gaze_y")
    base, still_head, still_face, strong = (
        random_motion(200, np.random.default_rng(5), *amplitudes) for amplitudes in ((1, 1), (0, 1), (1, 0), (2, 2))
    )
    for name in head:
        assert np.ptp(getattr(still_head, name)) == 0 and np.ptp(getattr(base, name)) > 0
        assert np.array_equal(getattr(still_face, name), getattr(base, name))
        assert np.ptp(getattr(strong, name)) == pytest.approx(2 * np.ptp(getattr(base, name)), rel=1e-3)
    for name in (*face, "blink"):
        assert np.ptp(getattr(still_face, name)) == 0 and np.ptp(getattr(base, name)) > 0
        assert np.array_equal(getattr(still_head, name), getattr(base, name))
    for name in face:  # levels off at -1 and 1
        assert np.ptp(getattr(base, name)) < np.ptp(getattr(strong, name)) <= 2
        assert np.allclose(np.arctanh(getattr(strong, name)), 2 * np.arctanh(getattr(base, name)), atol=1e-2)


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Pose)])
def test_every_part_of_a_pose_is_seen(name):
    value = {"x": 0.05, "y": 0.05, "rotation": 5, "scale": 1.1}.get(name, 0.8)
    changed = np.abs(draw(identity(1), Pose(**{name: value}), 128).astype(int) - draw(identity(1), Pose(), 128))
    assert changed.max() > 30
    if name not in ("x", "y", "rotation", "scale"):  # a face that moves leaves hair, clothes and wall alone
        assert changed[:25].max() == changed[100:].max() == changed[:, :30].max() == 0


def test_a_motion_knows_only_what_a_pose_knows():
    assert Motion(3, opening=[0, 0.5, 1])[1] == Pose(opening=0.5)
    with pytest.raises(ValueError, match="ears"):
        Motion(3, ears=1)


# --- pictures ---


@pytest.mark.parametrize("size", [64, 128, 300])
def test_every_resolution_shows_the_same_antialiased_picture(size):
    for pose in (Pose(), Pose(opening=0.8, x=0.013, y=-0.017, rotation=4)):
        picture, fine = draw(identity(2), pose, size), draw(identity(2), pose, 512)
        assert picture.shape == (size, size, 3)
        reduced = cv2.resize(fine, (size, size), interpolation=cv2.INTER_AREA)
        assert cv2.PSNR(picture, reduced) > 28


def test_a_tenth_of_a_pixel_is_visible():
    still, moved = (draw(identity(2), Pose(x=x), 128).astype(int) for x in (0, 0.1 / 128))
    assert 0 < np.abs(moved - still).mean() < 1


def test_under_64_pixels_is_an_error():
    with pytest.raises(UserError, match="64"):
        draw(identity(0), Pose(), 63)


def test_what_does_not_move_is_painted_once(monkeypatch):
    """Once per identity and size, however many clips and frames are drawn; benchmarks/puppets.py times it."""
    painted = []

    def counted(name):
        paint = getattr(puppets.Puppet, name)
        return lambda puppet, look: painted.append((name, look, puppet.size)) or paint(puppet, look)

    layers = ("_paint_background", "_paint_body", "_paint_head")
    for name in layers:
        monkeypatch.setattr(puppets.Puppet, name, counted(name))
    who, motion = identity(123), random_motion(5, np.random.default_rng(0))
    for size in (64, 65, 64):
        first = render_clip(who, motion, size)[0]
        clip_truth(who, motion, size)
        assert np.array_equal(draw(identity(123), motion[0], size), first)
    assert painted == [(name, who, size) for size in (64, 65) for name in layers]


# --- what dlib sees ---


def lip_gap(landmarks):
    """Inner-lip gap over the distance between the eyes."""
    eyes = np.linalg.norm(landmarks[36:42].mean(0) - landmarks[42:48].mean(0))
    return (landmarks[[67, 66, 65], 1] - landmarks[[61, 62, 63], 1]).mean() / eyes


def test_dlib_finds_every_face():
    rng = np.random.default_rng(6)
    for seed in range(24):
        who, motion = identity(seed), random_motion(100, rng)
        motion.opening[:] = rng.uniform(0, 1, 100)
        for index in (0, 30, 60, 90):
            faces = detect_faces(draw(who, motion[index], 128))
            assert len(faces) == 1, f"identity {seed}, frame {index}"
            left, top, right, bottom = clip_truth(who, Motion(1, **dataclasses.asdict(motion[index])), 128)["face_box"][
                0
            ]
            x, y = (faces[0].box[:2] + faces[0].box[2:]) / 2
            assert left < x < right and top < y < bottom


def test_landmarks_follow_the_drawn_mouth():
    rs = []
    for seed in (11, 12, 13):
        motion = random_motion(24, np.random.default_rng(seed))
        motion.opening = np.float32(0.5 - 0.5 * np.cos(np.arange(24) * 0.9))
        motion.width = np.float32(0.6 * np.sin(np.arange(24) * 0.5))
        frames = render_clip(identity(seed), motion, 192)
        gaps = [lip_gap(detect_faces(frame)[0].landmarks) for frame in frames]
        rs.append(np.corrcoef(gaps, motion.opening)[0, 1])
    assert np.median(rs) >= 0.9, rs


def test_landmarks_follow_the_brows():
    """All the way: dlib takes the fold over the eye for a brow that rises too far, and the expression bucket with it."""
    for seed in range(6):
        motion = Motion(36, brow=np.sin(np.arange(36) * 0.35))
        landmarks, _ = follow(render_clip(identity(seed), motion, 192))
        height = (landmarks[:, [36, 39, 42, 45]].mean(1) - landmarks[:, 17:27].mean(1))[:, 1]
        assert np.corrcoef(height, motion.brow)[0, 1] > 0.9, f"identity {seed}"


def test_expression_amplitude_is_seen():
    """From 0 to 6, between which training puppets lie, the expression spread grows by more than the lab asks of the bucket."""
    spreads = []
    for amplitude in (0.0, 6.0):
        motion = random_motion(50, np.random.default_rng(3), 0.5, amplitude)
        motion.opening = articulation(amplitude) * np.float32(0.4 - 0.4 * np.cos(np.arange(50) * 0.9))
        spreads.append(motion_spread(follow(render_clip(identity(5), motion, 192))[0])[1])
    assert spreads[1] > 3.5 * spreads[0]
    assert articulation(1.0) == 1.0 and articulation(100.0) == 1.7


def test_truth_is_where_the_landmarks_are():
    motion = Motion(2, opening=[0.0, 0.8], x=[0, 0.04], rotation=[0, 5])
    who = identity(12)
    truth = clip_truth(who, motion, 256)
    assert truth["mouth"].shape == (2, 4, 2) and truth["opening"].shape == (2,)
    for frame, mouth in zip(render_clip(who, motion, 256), truth["mouth"], strict=True):
        landmarks = detect_faces(frame)[0].landmarks
        found = landmarks[[60, 64, 62, 66]]  # inner corners, middle of the inner lips
        assert np.abs(found - mouth).max() < 8


# --- the command ---


def command(*arguments):
    """Runs the command in this process and returns its exit code."""
    with pytest.raises(SystemExit) as stop:
        flags.run(lambda: main(list(map(str, arguments))))
    return stop.value.code


@pytest.fixture
def speech_folder(tmp_path):
    folder = tmp_path / "speech"
    folder.mkdir()
    soundfile.write(folder / "one.wav", np.concatenate([SILENCE, AH, EE, OO]), SAMPLE_RATE)
    soundfile.write(folder / "two.flac", np.concatenate([EE, AH]), SAMPLE_RATE)
    return folder


def test_between_two_amplitudes_looks_decide(speech_folder, monkeypatch):
    looks, moves = [], []
    monkeypatch.setattr(puppets, "USUALLY", 1)  # no face is other than its looks tell
    for seed in range(12):
        rng = np.random.default_rng(seed)
        _, _, _, about = make_clip(speech_folder / "one.wav", 1.0, rng, 64, 25, (0.25, 4), (0, 1))
        assert 0.25 <= about["head_amplitude"] <= 4 and 0 <= about["expression_amplitude"] <= 1
        looks.append(about["identity"]["background_lightness"])
        moves.append((about["head_amplitude"] ** 0.5 - 0.5) / 1.5)
        expressive = np.clip(2 * about["identity"]["clothes_lightness"] - 0.5, 0, 1)
        assert about["expression_amplitude"] ** 0.5 == pytest.approx(expressive)
    chance = np.array(moves) - 0.85 * np.array(looks)
    assert chance.min() >= -1e-9 and chance.max() <= 0.15 + 1e-9 and chance.std() > 0.02  # the rest


def test_a_mood_is_usually_what_the_looks_tell_and_comes_and_goes():
    curves = np.array([moods(2500, 25, np.random.default_rng(seed), usual=0.6) for seed in range(8)])
    assert curves.min() == 0 and curves.max() == 1
    usual = np.isclose(curves, 0.7)  # twice as far from the middle
    assert 0.5 < usual.mean() < 0.75  # three moods of four, less the ways between
    assert np.abs(np.diff(curves)).max() <= 0.13  # from calm to lively in 0.3 s
    changes = np.diff(usual, axis=1).sum(axis=1)
    assert (changes >= 10).all()  # within 100 s


@pytest.mark.parametrize(("usual", "ends"), [(0.1, 0), (0.25, 0), (0.5, 0.5), (0.75, 1), (0.9, 1)])
def test_moods_are_rather_at_an_end_than_in_the_middle(usual, ends):
    curve = moods(2500, 25, np.random.default_rng(1), usual)
    assert np.median(curve) == pytest.approx(ends)
    assert {0.0, 1.0} <= set(curve)  # and for a while, every face is quite calm, or as lively as any


def test_the_command_writes_clips_with_sound_and_truth(speech_folder, tmp_path):
    options = ["--speech", speech_folder, "--seconds", "1.2", "--size", "96", "--seed", "5"]
    assert command("--output", tmp_path / "a", "--clips", 2, *options) == 0
    assert command("--output", tmp_path / "b", "--clips", 1, *options, "--head_amplitude", 1, 1) == 0
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == [f"puppet_000{i}.{end}" for i in (0, 1) for end in ("json", "mp4", "truth.npz")]
    for end in ("mp4", "truth.npz", "json"):  # the first clip is the same, however many follow
        first, again = (tmp_path / folder / f"puppet_0000.{end}" for folder in "ab")
        assert first.read_bytes() == again.read_bytes()

    clip, truth = tmp_path / "a" / "puppet_0001.mp4", np.load(tmp_path / "a" / "puppet_0001.truth.npz")
    with VideoReader(clip) as video:
        assert (video.info.width, video.info.height) == (96, 96)
        assert video.info.duration == pytest.approx(1.2, abs=0.04)
    sound = load_audio(clip)
    assert len(sound) / SAMPLE_RATE == pytest.approx(1.2, abs=0.04)
    assert all(len(curve) == 30 for curve in truth.values())
    # The sound in the file opens the mouth that was drawn.
    assert np.corrcoef(speech_to_mouth(sound, 30)[0], truth["opening"])[0, 1] > 0.95
    about = json.loads((tmp_path / "a" / "puppet_0001.json").read_text())
    assert draw(Identity(**about["identity"]), Pose(), 64).shape == (64, 64, 3)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--size", "63"], "at least 64"),
        (["--clips", "-1"], "--clips"),
        (["--seconds", "-2"], "--seconds"),
        (["--seconds", "nan"], "--seconds"),
        (["--fps", "0"], "--fps"),
        (["--seed", "-1"], "--seed"),
        (["--seconds", "inf"], "--seconds"),
        (["--clips", "many"], "--clips"),
        (["--head_amplitude", "-1"], "--head_amplitude"),
        (["--expression_amplitude", "1", "2", "3"], "--expression_amplitude"),
    ],
)
def test_wrong_numbers_are_one_sentence(speech_folder, tmp_path, capsys, options, reason):
    assert command("--output", tmp_path / "out", "--speech", speech_folder, *options) == 2
    message = capsys.readouterr().err
    assert reason in message and message.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_speech_that_cannot_be_used_is_named(speech_folder, tmp_path, capsys):
    empty = tmp_path / "empty"
    empty.mkdir()
    for folder, reason in ((empty, "no recording"), (tmp_path / "nowhere", "not a folder")):
        assert command("--output", tmp_path / "out", "--speech", folder) == 2
        assert reason in capsys.readouterr().err
    (speech_folder / "broken.wav").write_bytes(b"not a sound")
    assert command("--output", tmp_path / "out", "--speech", speech_folder) == 2
    message = capsys.readouterr().err
    assert "broken.wav" in message and "one.wav" not in message
    assert not (tmp_path / "out").exists()
