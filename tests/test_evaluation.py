"""The evaluation: what it says of puppets whose truth is known and of real clips, its files, and bad input."""

import json
import math
import shutil
from functools import lru_cache

import cv2
import numpy as np
import pytest
from conftest import EXAMPLES, ROOT
from PIL import Image
from scipy.ndimage import gaussian_filter

from sonic import flags
from sonic.config import SAMPLE_RATE, SAMPLES_PER_TICK, UserError
from sonic.evaluation import VideoFrames, as_dict, evaluate, main, table, write_report
from sonic.faces import FaceTrack, detect_faces
from sonic.media import VideoReader, save_video
from sonic.metrics import (
    BEST_PSNR,
    compare_identity,
    find_seams,
    follow,
    frame_differences,
    measure,
    picture_quality,
    portrait_face,
    window_motion,
)
from sonic.motion import motion_buckets, motion_spread
from sonic.puppets import Identity, Pose, clip_truth, draw, random_motion, render_clip, speech_to_mouth
from sonic.sound import load_audio

pytestmark = pytest.mark.filterwarnings("error")

NUM_TICKS, SIZE = 75, 128
FILE_TICKS = 50  # of the same, in files
HEADS = [ROOT / f"tests/data/talking_head_{number}.mp4" for number in (1, 2)]


@lru_cache
def spoken(number=0):
    """3 s of speech with a second of silence in the middle, float32 [n]."""
    speech = load_audio(EXAMPLES / f"clips/puppet_{number:04d}.mp4")[: NUM_TICKS * SAMPLES_PER_TICK].copy()
    speech[25 * SAMPLES_PER_TICK : 45 * SAMPLES_PER_TICK] = 0
    return speech


def identity(seed=0):
    return Identity.random(np.random.default_rng(seed))


def moving(head=1.0, expression=1.0, speech=None, seed=1):
    """A puppet's motion [NUM_TICKS] that says the speech."""
    motion = random_motion(NUM_TICKS, np.random.default_rng(seed), head, expression)
    motion.opening, motion.width = speech_to_mouth(spoken() if speech is None else speech, NUM_TICKS)
    return motion


@lru_cache
def puppet():
    """Frames [75, 128, 128, 3] and truth of one puppet."""
    motion = moving()
    return render_clip(identity(), motion, SIZE), clip_truth(identity(), motion, SIZE)


@lru_cache
def portrait(seed=0):
    return portrait_face(draw(identity(seed), Pose(), SIZE))


@lru_cache
def measured():
    """The puppet against all that is known of it."""
    frames, truth = puppet()
    return measure(frames, spoken(), portrait=portrait(), truth_curves=truth, truth_frames=frames, window=10)


# -------------------------------------------------------------------------------------------------------------- lip sync


def test_a_puppet_follows_its_own_truth():
    found = measured()
    assert found.face_share == 1 and found.tracks == 1 and found.num_frames == NUM_TICKS
    assert found.opening_by_truth.r > 0.9 and found.opening_by_truth.offset == 0
    assert found.width_by_truth.r > 0.7 and found.width_by_truth.offset == 0
    assert found.opening_by_truth.confidence > 0.6
    assert found.opening_by_speech.r > 0.9 and found.opening_by_speech.offset == 0


@pytest.mark.parametrize("late", [-6, 4])
def test_shifted_sound_is_an_offset(late):
    """Sound that is moved back by some frames leaves the mouth late, and the other way round."""
    found = measure(puppet()[0], np.roll(spoken(), -late * SAMPLES_PER_TICK))
    assert found.opening_by_speech.offset == late
    assert found.opening_by_speech.best_r > 0.9 > found.opening_by_speech.r + 0.3


def test_somebody_elses_speech_and_truth():
    other = spoken(1)[::-1].copy()
    opening, width = speech_to_mouth(other, NUM_TICKS)
    found = measure(puppet()[0], other, truth_curves={"opening": np.roll(opening, 20), "width": np.roll(width, 20)})
    for sync in (found.opening_by_truth, found.width_by_truth):
        assert abs(sync.r) < 0.5 < measured().opening_by_truth.r - 0.4
    assert found.identity is None and found.quality is None and found.seams is None
    assert math.isnan(found.portrait_opening)


def test_the_mouth_in_silence():
    closed = measured()
    assert closed.silent.sum() >= 10
    assert closed.silent_opening == pytest.approx(closed.portrait_opening, abs=0.02)
    assert closed.silent_opening < closed.median_opening < closed.wide_opening
    motion = moving()
    motion.opening = np.maximum(motion.opening, 0.5)  # a mouth that never closes
    opened = measure(render_clip(identity(), motion, SIZE), spoken())
    assert opened.silent_opening > closed.silent_opening + 0.1
    without = measure(puppet()[0][:25], np.sin(np.arange(SAMPLE_RATE, dtype=np.float32)))
    assert not without.silent.any() and math.isnan(without.silent_opening)


def test_other_frame_rates():
    """Every second frame at 12.5 frames per second is the same clip."""
    frames, truth = puppet()
    found = measure(frames[::2], spoken(), 12.5, truth_curves={name: truth[name][::2] for name in ("opening", "width")})
    assert found.opening_by_truth.r > 0.9 and found.opening_by_truth.offset == 0
    assert found.opening_by_speech.r > 0.9 and found.opening_by_speech.offset == 0
    assert found.motion.translation_spread == pytest.approx(measured().motion.translation_spread, rel=0.1)


def test_real_clips_are_measured():
    for path in HEADS:
        report = evaluate(path)
        found = report.result
        assert found.num_frames == 88 and found.face_share == 1 and found.tracks == 1
        assert 32 < found.motion.translation_bucket < 96 and 32 < found.motion.expression_bucket < 96
        assert np.isfinite([found.opening_by_speech.r, found.opening_by_speech.offset, found.silent_opening]).all()
        assert 0 < found.median_opening < found.wide_opening < 1


# ---------------------------------------------------------------------------------------------------------------- motion


@pytest.mark.parametrize(("part", "curves"), [("translation", ("x", "y")), ("expression", ("brow", "smile"))])
def test_motion_grows_as_the_puppets_does(part, curves):
    quiet = np.zeros(NUM_TICKS * SAMPLES_PER_TICK, np.float32)
    spreads, drawn = [], []
    for amplitude in (0.75, 1.5):
        both = (amplitude, 1) if part == "translation" else (1, amplitude)
        motion = moving(*both, speech=quiet)
        motion.blink[:] = 0  # an eye is shut or it is not
        spreads.append(measure(render_clip(identity(), motion, SIZE), quiet).motion)
        drawn.append([getattr(motion, name).std() for name in curves])
    grown = getattr(spreads[1], f"{part}_spread") / getattr(spreads[0], f"{part}_spread")
    assert grown == pytest.approx(np.mean(np.divide(*drawn[::-1])), rel=0.15)
    other = {"translation": "expression", "expression": "translation"}[part]
    assert getattr(spreads[1], f"{other}_spread") < 1.3 * getattr(spreads[0], f"{other}_spread")
    # A bucket is a spread times a constant.
    assert getattr(spreads[1], f"{part}_bucket") / getattr(spreads[0], f"{part}_bucket") == pytest.approx(grown)


def test_motion_is_that_of_the_training_buckets():
    found = measured()
    motion = found.motion
    assert (motion.translation_bucket, motion.expression_bucket) == pytest.approx(motion_buckets(found.landmarks))
    assert (motion.translation_spread, motion.expression_spread) == pytest.approx(motion_spread(found.landmarks))
    windows = [motion_buckets(found.landmarks[start : start + 10]) for start in range(0, 70, 10)]
    mean = np.mean(windows, axis=0)
    assert (found.window_motion.translation_bucket, found.window_motion.expression_bucket) == pytest.approx(mean)
    late = FaceTrack(5, np.zeros((25, 4)), found.landmarks[5:30])  # windows keep their places in the clip
    mean = np.mean([motion_buckets(found.landmarks[start : start + 10]) for start in (10, 20)], axis=0)
    assert window_motion([late], 10).translation_bucket == pytest.approx(mean[0])


def test_a_cut_is_no_motion():
    """Two still people: between them all moves, within each nothing."""
    pair = [draw(identity(seed), Pose(x=0.1 * seed, y=-0.05 * seed), SIZE) for seed in (0, 1)]
    pair[1] = 255 - (255 - pair[1]) // 2  # bright enough for a cut
    found = measure(np.repeat(pair, 20, axis=0), np.zeros(40 * SAMPLES_PER_TICK, np.float32), window=15)
    assert found.tracks == 2 and found.face_share == 1
    assert found.motion.translation_spread < 0.01
    assert found.window_motion.translation_spread < 0.01  # the window that the cut divides does not count
    assert window_motion(follow(puppet()[0][:8])[1], 10) is None


def test_large_pictures_are_followed_small():
    frames = puppet()[0][:10]
    large = [cv2.resize(frame, (1280, 1280), interpolation=cv2.INTER_CUBIC) for frame in frames]
    landmarks, _ = follow(large)
    assert np.abs(landmarks / 10 - follow(frames)[0]).mean() < 0.7


# -------------------------------------------------------------------------------------------------------------- identity


def test_another_puppet_is_farther():
    frames, _ = puppet()
    stranger = measure(frames, spoken(), portrait=portrait(3), describe_every=25)
    found = measured().identity
    assert found.distance < 0.8 * stranger.identity.distance
    assert found.distances.shape == found.seconds.shape == (15,) and found.seconds[1] == 0.2
    assert math.isnan(found.first) and math.isnan(found.last)
    assert abs(found.slope) < 0.05


def test_drift_has_a_slope():
    """12 s in which one puppet becomes another: the distance grows, and the last 5 s are farther than the first."""
    steps = np.linspace(0, 1, 12)
    one, two = (np.array([getattr(identity(seed), name) for name in vars(identity())]) for seed in (0, 3))
    stages = [draw(Identity(*(one + (two - one) * step)), Pose(), SIZE) for step in steps]
    landmarks = np.stack([detect_faces(stage)[0].landmarks for stage in stages])
    frames = [stage for stage in stages for _ in range(25)]
    found = compare_identity(frames, landmarks.repeat(25, axis=0), portrait(), 25, every=25)
    assert found.slope > 0.01
    assert found.last > found.first + 0.05
    assert found.first == pytest.approx(found.distances[:5].mean())
    assert found.last == pytest.approx(found.distances[-5:].mean())


# ------------------------------------------------------------------------------------------------------ seams and quality


@pytest.mark.parametrize("phase", [0, 3])
def test_a_seam_is_found_at_its_phase(phase):
    frames = puppet()[0].astype(int)
    for start in range(phase or 8, NUM_TICKS, 8):
        frames[start:] += 6 * (-1) ** (start // 8)
    seams = find_seams(frame_differences(np.clip(frames, 0, 255).astype(np.uint8)), 8)
    assert seams.largest_phase == seams.near_largest_phase == phase and min(seams.largest, seams.near_largest) > 1.5
    assert (seams.ratio > 1.5) == (seams.near_ratio > 1.5) == (phase == 0)
    assert seams.largest == seams.ratios[phase] and seams.ratio == seams.ratios[0] and len(seams.ratios) == 8
    assert measured().seams.near_largest < 1.2


def test_seams_in_numbers():
    differences = np.array([1, 1, 4, 1, 1, 4, 1.0])  # 8 frames, borders before frames 3 and 6
    seams = find_seams(differences, 3)
    assert seams.ratio == 4 and seams.ratios.tolist() == pytest.approx([4, 1 / 2.5, 1 / 2.2])
    assert seams.near_ratios.tolist() == pytest.approx([4, 1 / 2.5, 1 / 2.5]) and seams.near_ratio == 4
    assert find_seams(differences, 8) is None and find_seams(differences, 7).ratio == pytest.approx(1 / 2)
    assert (
        find_seams(np.zeros(20), 5).ratios.tolist() == find_seams(np.zeros(20), 5).near_ratios.tolist() == [1] * 5
    )  # a still picture has none


def test_picture_quality():
    rng = np.random.default_rng(0)
    truth = puppet()[0][:3]
    noisy = np.clip(truth + rng.normal(0, 10, truth.shape), 0, 255).astype(np.uint8)
    mask = np.zeros(truth.shape[1:3], bool)
    mask[:20] = True
    noisy[:, :20] = truth[:, :20]
    found = picture_quality(noisy, truth, mask)
    assert found.psnr == pytest.approx(10 * np.log10(255**2 / np.mean((noisy - truth.astype(float)) ** 2)))
    assert found.masked_psnr == BEST_PSNR and picture_quality(noisy, truth, ~mask).masked_psnr < found.psnr
    assert picture_quality(noisy, truth, np.stack([mask] * 3)).masked_psnr == BEST_PSNR
    same = picture_quality(truth, truth)
    assert (same.psnr, same.ssim) == (BEST_PSNR, pytest.approx(1)) and math.isnan(same.masked_psnr)

    def blur(image):  # as scikit-image computes it
        return gaussian_filter(image, 1.5, truncate=3.5)[5:-5, 5:-5]

    a, b = (cv2.cvtColor(clip[0], cv2.COLOR_RGB2GRAY).astype(float) for clip in (noisy, truth))
    spread_a, spread_b, both = blur(a * a) - blur(a) ** 2, blur(b * b) - blur(b) ** 2, blur(a * b) - blur(a) * blur(b)
    likeness = (2 * blur(a) * blur(b) + 6.5025) / (blur(a) ** 2 + blur(b) ** 2 + 6.5025)
    likeness *= (2 * both + 58.5225) / (spread_a + spread_b + 58.5225)
    assert picture_quality(noisy[:1], truth[:1]).ssim == pytest.approx(likeness.mean(), abs=1e-9)
    with pytest.raises(ValueError, match="one size"):
        picture_quality(truth, truth[:, :64])


# ------------------------------------------------------------------------------------------------------------- very short


def test_three_frames_are_measured_as_far_as_they_go():
    frames, truth = puppet()
    found = measure(
        frames[:3],
        spoken()[: 3 * SAMPLES_PER_TICK],
        portrait=portrait(),
        truth_curves={name: truth[name][:4] for name in ("opening", "width")},  # one frame more is forgiven
        truth_frames=frames[:2],
        window=10,
    )
    assert math.isnan(found.opening_by_truth.r) and found.seams is None and found.window_motion is None
    assert math.isnan(found.identity.slope) and found.quality.psnr == BEST_PSNR
    assert measure(frames[:1], spoken()).differences.shape == (0,)


# -------------------------------------------------------------------------------------------------------- files and command


def command(*arguments):
    """Runs the command in this process and returns its exit code."""
    with pytest.raises(SystemExit) as stop:
        flags.run(lambda: main(list(map(str, arguments))))
    return stop.value.code


def strict(path):
    """JSON without the NaN and Infinity that Python would let through."""

    def refuse(constant):
        raise AssertionError(f"{constant} in {path}")

    return json.loads(path.read_text(), parse_constant=refuse)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """puppet.mp4 with its truth beside it, generated.mp4 (a little noisy), portrait.png."""
    folder = tmp_path_factory.mktemp("evaluation")
    frames, truth = filmed()
    save_video(frames, folder / "puppet.mp4", 25, audio=said())
    np.savez(folder / "puppet.truth.npz", **truth)
    noise = np.random.default_rng(0).integers(-6, 7, frames.shape)
    save_video(np.clip(frames + noise, 0, 255).astype(np.uint8), folder / "generated.mp4", 25, audio=said())
    Image.fromarray(draw(identity(), Pose(), SIZE)).save(folder / "portrait.png")
    return folder


def filmed():
    frames, truth = puppet()
    return frames[:FILE_TICKS], {name: curve[:FILE_TICKS] for name, curve in truth.items()}


def said():
    return spoken()[: FILE_TICKS * SAMPLES_PER_TICK]


def test_the_command_writes_numbers_plot_and_video(folder, tmp_path, capsys):
    flagged = ("--portrait", folder / "portrait.png", "--truth", folder / "puppet.mp4", "--window", 10)
    assert command(folder / "generated.mp4", *flagged, "--output", tmp_path / "out") == 0
    printed = capsys.readouterr().out
    document, clip, plot = sorted((tmp_path / "out").iterdir())
    assert [path.name for path in (document, clip, plot)] == [f"generated.{end}" for end in ("json", "mp4", "png")]

    found = strict(document)
    assert found["truth_curves"] == "drawn" and found["frames"] == FILE_TICKS and found["fps"] == 25
    sync = found["lip_sync"]["opening_by_truth"]
    assert sync["r"] > 0.9 and sync["offset"] == 0 and len(sync["r_by_offset"]) == 31
    assert f"{sync['r']:.3f}" in printed and str(document) in printed and "PSNR (dB)" in printed
    assert 25 < found["quality"]["psnr"] < 45 and found["quality"]["masked_psnr"] is None
    assert found["identity"]["distance"] < 0.4 and found["of_truth_video"]["identity"]["distance"] < 0.4
    assert found["of_truth_video"]["motion"]["translation_spread"] > 0.05
    assert found["seams"]["window"] == 10 and len(found["seams"]["ratios"]) == 10
    for curve in ("opening", "width", "speech_energy", "silent", "truth_opening", "truth_width"):
        assert len(found["curves"][curve]) == FILE_TICKS

    image = np.asarray(Image.open(plot).convert("RGB"))
    assert min(image.shape[:2]) > 600 and 5 < image.std() < 120
    with VideoReader(clip) as video:
        assert video.info.has_audio and video.num_ticks == FILE_TICKS
        assert video.info.width > 2 * 384 and video.info.height > 384
        first, last = video.read([0, FILE_TICKS - 1]).astype(int)
    strips = first[-150:], last[-150:]
    line = np.flatnonzero((np.abs(strips[0] - strips[1]).max(axis=2) > 40).sum(axis=0) > 60)
    assert line.min() < 30 and line.max() > video.info.width - 30  # the cursor went from one end to the other
    dots = [(np.abs(strip - [31, 111, 196]).max(axis=2) < 40)[:, -24:].sum() for strip in strips]
    assert dots[1] > dots[0] + 20
    left, right = first[60:400, 40:380], first[60:400, 440:780]
    assert np.abs(left - right).mean() < 12 < left.std()  # the truth beside the video
    assert len(load_audio(clip)) == pytest.approx(FILE_TICKS * SAMPLES_PER_TICK, abs=SAMPLE_RATE // 20)


def test_a_video_alone(folder, tmp_path, capsys):
    """Neither portrait nor truth; the results lie beside it."""
    shutil.copy(folder / "puppet.mp4", tmp_path / "talk.mp4")
    assert command(tmp_path / "talk.mp4") == 0
    found = strict(tmp_path / "talk.evaluation" / "talk.json")
    assert found["lip_sync"]["opening_by_truth"] is None and found["lip_sync"]["opening_by_speech"]["r"] > 0.9
    assert found["identity"] is found["seams"] is found["quality"] is found["truth"] is None
    assert found["mouth_opening"]["portrait"] is None
    assert (tmp_path / "talk.evaluation" / "talk.png").exists() and (tmp_path / "talk.evaluation" / "talk.mp4").exists()
    assert "portrait" not in capsys.readouterr().out


def test_every_form_of_truth(folder, tmp_path):
    frames, truth = filmed()
    by_curves = evaluate(folder / "generated.mp4", truth=folder / "puppet.truth.npz")
    assert by_curves.truth_video == folder / "puppet.mp4" and by_curves.truth_kind == "drawn"
    assert by_curves.result.quality.psnr > 25

    np.savez(tmp_path / "alone.npz", opening=truth["opening"], width=truth["width"])
    alone = evaluate(folder / "generated.mp4", truth=tmp_path / "alone.npz")
    assert alone.truth_result is None and alone.truth_video is None
    assert alone.result.opening_by_truth.r == by_curves.result.opening_by_truth.r

    small = np.stack([cv2.resize(frame, (96, 96), interpolation=cv2.INTER_AREA) for frame in frames])
    save_video(small, tmp_path / "small.mp4", 25)  # another size, no sound, no drawn curves
    measured_truth = evaluate(folder / "generated.mp4", truth=tmp_path / "small.mp4")
    assert measured_truth.truth_kind == "measured" and measured_truth.result.opening_by_truth.r > 0.9
    assert measured_truth.result.quality is None and "96 × 96" in table(measured_truth)


def test_half_the_frame_rate_of_the_truth(folder, tmp_path):
    """A video of 12.5 frames per second, as the released weights make it, against a truth of 25."""
    save_video(filmed()[0][::2], tmp_path / "half.mp4", 12.5, audio=said())
    report = evaluate(tmp_path / "half.mp4", truth=folder / "puppet.truth.npz", window=5)
    found = report.result
    assert found.fps == 12.5 and found.num_frames == 25
    assert found.opening_by_truth.r > 0.9 and found.opening_by_truth.offset == 0
    assert found.quality.psnr > 30
    write_report(report, tmp_path / "out")
    with VideoReader(tmp_path / "out" / "half.mp4") as video:
        assert video.info.fps == 12.5


def test_frames_of_a_file_are_those_of_the_reader(tmp_path):
    save_video(puppet()[0][:21:2], tmp_path / "half.mp4", 12.5)
    with VideoReader(tmp_path / "half.mp4") as reader:
        frames = VideoFrames(reader)
        assert len(frames) == len(list(frames)) == 11
        assert np.array_equal(frames[3], reader.read([6])[0])


# ------------------------------------------------------------------------------------------------------------- bad input


def test_videos_that_cannot_be_measured(folder, tmp_path, capsys):
    grey = np.full((20, 96, 96, 3), 128, np.uint8)
    save_video(grey, tmp_path / "grey.mp4", 25, audio=spoken()[: 20 * SAMPLES_PER_TICK])
    save_video(puppet()[0][:20], tmp_path / "mute.mp4", 25)
    save_video(puppet()[0][:30], tmp_path / "thirty.mp4", 30, audio=spoken()[:SAMPLE_RATE])
    (tmp_path / "text.mp4").write_text("not a video")
    Image.fromarray(grey[0]).save(tmp_path / "grey.png")
    generated = folder / "generated.mp4"
    for arguments, reason in (
        ([tmp_path / "grey.mp4"], "No face was found in any of the 20 frames"),
        ([tmp_path / "mute.mp4"], "has no sound"),
        ([tmp_path / "text.mp4"], "cannot be opened"),
        ([tmp_path / "nowhere.mp4"], "does not exist"),
        ([tmp_path / "thirty.mp4", "--window", 10], "has 30 of them per second"),
        ([generated, "--window", 1], "--window"),
        ([generated, "--window", "many"], "--window"),
        ([generated, "--portrait", tmp_path / "grey.png"], "No face was found in"),
        ([generated, "--portrait", tmp_path / "nowhere.png"], "does not exist"),
        ([generated, "--output", folder], "would be written over"),
        (
            [tmp_path / "puppet.mp4", "--truth", folder / "puppet.truth.npz", "--output", folder],
            "would be written over",
        ),
    ):
        assert command(*arguments) == 2, reason
        message = capsys.readouterr().err
        assert reason in message and message.count("\n") == 1
    assert not list(tmp_path.glob("*.evaluation")) and not list(folder.glob("*.evaluation"))


def test_truths_that_cannot_be_used(folder, tmp_path, capsys):
    _, truth = filmed()
    curves = {"opening": truth["opening"], "width": truth["width"]}
    for name, arrays in (
        ("short", {key: curve[:-2] for key, curve in curves.items()}),
        ("half", {"opening": truth["opening"]}),
        ("flat", {key: curve[:, None] for key, curve in curves.items()}),
        ("uneven", curves | {"width": truth["width"][:-1]}),
        ("holes", curves | {"width": truth["width"] * np.nan}),
        ("words", {"opening": np.array(["a"]), "width": np.array(["b"])}),
        ("pickled", {"opening": np.array([{}]), "width": np.array([None])}),
    ):
        np.savez(tmp_path / f"{name}.truth.npz", **arrays)
    (tmp_path / "broken.truth.npz").write_bytes((tmp_path / "short.truth.npz").read_bytes()[:300])
    (tmp_path / "empty.truth.npz").touch()
    np.save(tmp_path / "array.npy", truth["opening"])
    (tmp_path / "array.npy").rename(tmp_path / "array.truth.npz")
    save_video(puppet()[0][:40], tmp_path / "clip.mp4", 25)
    shutil.copy(folder / "puppet.mp4", tmp_path / "pair.mp4")
    shutil.copy(tmp_path / "short.truth.npz", tmp_path / "pair.truth.npz")
    for name, reason in (
        ("short.truth.npz", "48 frames, .* has 50"),
        ("pair.mp4", "48 frames, .* has 50"),
        ("clip.mp4", "40 frames, .* has 50"),
        ("half.truth.npz", "lacks an array"),
        ("flat.truth.npz", "one finite number per frame"),
        ("uneven.truth.npz", "one finite number per frame"),
        ("holes.truth.npz", "one finite number per frame"),
        ("words.truth.npz", "cannot be read as a truth"),
        ("pickled.truth.npz", "cannot be read as a truth"),
        ("broken.truth.npz", "cannot be read as a truth"),
        ("empty.truth.npz", "cannot be read as a truth"),
        ("array.truth.npz", "cannot be read as a truth"),
        ("nowhere.truth.npz", "does not exist"),
        ("nowhere.mp4", "does not exist"),
    ):
        with pytest.raises(UserError, match=reason):
            evaluate(folder / "generated.mp4", truth=tmp_path / name)
    for given in ({"truth_frames": puppet()[0][:3]}, {"truth_curves": {name: curves[name][:3] for name in curves}}):
        with pytest.raises(UserError, match=r"3 frames, .* has 75"):
            measure(puppet()[0], spoken(), **given)


def test_output_that_cannot_be_written(folder, tmp_path):
    (tmp_path / "file").touch()
    report = evaluate(folder / "puppet.mp4", window=FILE_TICKS)
    assert report.result.seams is None and "no seams" in table(report)
    with pytest.raises(UserError, match="--output"):
        write_report(report, tmp_path / "file")
    assert as_dict(report)["identity"] is None
