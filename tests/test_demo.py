"""sonic_demo.py and the Python API, as a person uses them, with a tiny random model."""

import subprocess
import sys
from functools import partialmethod

import cv2
import numpy as np
import pytest
import soundfile
import torch
from conftest import EXAMPLES, ROOT, voice
from PIL import Image

import sonic_demo
from sonic.flags import run
from sonic.media import VideoReader
from sonic.portrait import prepare_portrait
from sonic.sound import load_audio
from sonic_implementation import (
    AudioFeatures,
    SonicConfig,
    SonicPipeline,
    SonicVideo,
    UserError,
    extract_audio_features,
    save_video,
)

PORTRAIT = EXAMPLES / "portrait.jpg"


@pytest.fixture(scope="module")
def speech(tmp_path_factory):
    """A third of a second of the example speech: 8 ticks, two windows."""
    return voice(tmp_path_factory, 8, 8000)


@pytest.fixture(scope="module")
def config(tiny):
    return SonicConfig(checkpoint=str(tiny))


@pytest.fixture(scope="module")
def pipeline(config):
    return SonicPipeline(config)


def demo(tiny, *arguments):
    """Exit code of the script's main, as `run` gives it."""
    with pytest.raises(SystemExit) as stopped:
        run(lambda: sonic_demo.main(["--checkpoint", str(tiny), *map(str, arguments)]))
    return stopped.value.code


def test_command_as_written(tiny, speech, tmp_path, capsys):
    output = tmp_path / "new folder/output.mp4"
    code = demo(tiny, "--image", PORTRAIT, "--audio", speech, "--output", output, "--motion", "moderate", "--seed", 42)
    assert code == 0 and str(output) in capsys.readouterr().out
    with VideoReader(output) as reader:
        info = reader.info
        assert (info.width, info.height, info.fps, info.has_audio, info.codec) == (64, 64, 25, True, "h264")
        assert reader.num_ticks == 8
    assert len(load_audio(output)) / 16000 == pytest.approx(8 / 25, abs=0.04)
    assert [path.name for path in output.parent.iterdir()] == ["output.mp4"]


def test_seeds(tiny, speech, tmp_path):
    def made(name, *more):
        assert demo(tiny, "--image", PORTRAIT, "--audio", speech, "--output", tmp_path / name, *more) == 0
        return (tmp_path / name).read_bytes()

    assert made("a.mp4", "--seed", 0) == made("b.mp4", "--seed", 0)
    made("c.mp4")
    pictures = []
    for name in ("a.mp4", "c.mp4"):
        with VideoReader(tmp_path / name) as reader:
            pictures.append(reader.read([0]))
    assert not np.array_equal(*pictures)  # 0 is a seed, and not the default one


FLAGS = {
    "motion": "intense",
    "dynamic_scale": 0.3,
    "translation_bucket": 100,
    "expression_bucket": 5,
    "guidance_scale_image": 5.0,
    "guidance_scale_audio": 1.0,
    "shift_offset": 2,
    "overlap": 2,
    "num_inference_steps": 3,
    "resolution": 128,
    "frame_step": 2,
    "crop": 0.1,
    "decode_chunk_size": 2,
    "fps": "50",
    "seed": 7,
    "guidance_ramp": (0.5, 6.0),
    "guidance_interval": "0,1",
    "translation_contrast": 2.0,
    "expression_contrast": 2.0,
    "expression_floor": 120.0,
}


@pytest.fixture(scope="module")
def plain(pipeline, speech):
    """What the model makes without any setting."""
    return pipeline.generate(PORTRAIT, pipeline.extract_audio_features(speech))


FOR_BUCKETS_BY_HAND = ("translation_contrast", "expression_contrast", "expression_floor")


@pytest.mark.parametrize("name", FLAGS)
def test_every_setting_has_an_effect(pipeline, speech, plain, name):
    flag, features = (
        "guidance_scale_audio" if name == "guidance_ramp" else name,
        pipeline.extract_audio_features(speech),
    )
    other = pipeline.generate(PORTRAIT, features, **{flag: FLAGS[name]})
    if name in FOR_BUCKETS_BY_HAND:
        assert np.array_equal(other.frames, plain.frames)
        by_hand = {"translation_bucket": 100, "expression_bucket": 5}
        plain = pipeline.generate(PORTRAIT, features, **by_hand)
        other = pipeline.generate(PORTRAIT, features, **by_hand, **{name: FLAGS[name]})
    assert other.frames.shape != plain.frames.shape or not np.array_equal(other.frames, plain.frames)


def test_the_solver_has_an_effect_from_three_steps_on(pipeline, speech):
    """The first and the last step are Euler's with any solver."""
    features = pipeline.extract_audio_features(speech)
    euler, other = (
        pipeline.generate(PORTRAIT, features, num_inference_steps=3, solver=solver) for solver in ("euler", "dpmpp_2m")
    )
    assert not np.array_equal(euler.frames, other.frames)


def test_one_call_does_not_change_the_next(pipeline, speech, plain):
    features = pipeline.extract_audio_features(speech)
    pipeline.generate(PORTRAIT, features, seed=7, motion="intense", guidance_scale_image=5.0, num_inference_steps=1)
    assert np.array_equal(pipeline.generate(PORTRAIT, features).frames, plain.frames)


def test_face_box_and_crop_change_the_picture(tiny, speech, tmp_path):
    files = []
    for number, more in enumerate(([], ["--face_box", "200,200,300,330"], ["--crop", "0.1"], ["--crop", "none"])):
        files.append(tmp_path / f"{number}.mp4")
        assert demo(tiny, "--image", PORTRAIT, "--audio", speech, "--output", files[-1], *more) == 0
    pictures = set()
    for file in files:
        with VideoReader(file) as reader:
            pictures.add(reader.read([0]).tobytes())
    assert len(pictures) == len(files)


def test_snippet_as_written(config, speech, tmp_path, monkeypatch):
    monkeypatch.setattr(SonicConfig, "__init__", partialmethod(SonicConfig.__init__, checkpoint=config.checkpoint))
    config = SonicConfig()  # stands for the shipped model
    pipeline = SonicPipeline(config)
    image = cv2.imread(str(PORTRAIT))
    audio_features = extract_audio_features(str(speech))
    video = pipeline.generate(
        reference_image=image,
        audio_features=audio_features,
        num_frames=8,
        motion_buckets={"translation": 64, "expression": 96},
    )
    assert isinstance(video, SonicVideo) and video.frames.shape == (8, 64, 64, 3) and len(video) == 8
    save_video(video, tmp_path / "output.mp4")
    pipeline.save_video(video, tmp_path / "same.mp4")
    assert (tmp_path / "output.mp4").read_bytes() == (tmp_path / "same.mp4").read_bytes()
    # the same picture from a file, from PIL and from cv2 is the same portrait
    for same in (PORTRAIT, Image.open(PORTRAIT).convert("RGBA")):
        other = pipeline.generate(same, audio_features, 8, {"translation": 64, "expression": 96})
        assert np.array_equal(other.frames, video.frames)


def test_generate_video(pipeline, speech, tmp_path):
    calls = []
    made = pipeline.generate_video(
        image_path=str(PORTRAIT),
        audio_path=str(speech),
        output_path=str(tmp_path / "video.mp4"),
        on_progress=calls.append,
    )
    assert made.stat().st_size > 1000
    told = [(call.stage, call.done, call.total) for call in calls]
    # 8 frames are 2 windows, 2 steps; decoded 4 at a time of which neighbours share 2, the last frames when all is done
    denoising = [("denoising", done, 4) for done in range(1, 5)]
    assert told == [("listening", 1, 1), *denoising, *[("decoding", done, 8) for done in (2, 4, 8)]]
    assert calls[1].seconds_left > 0 and calls[4].seconds_left == 0
    picture = calls[3].preview()
    assert picture.dtype == np.uint8 and picture.shape == (64, 64, 3)


def test_reference_latent_is_the_vaes_mode_unscaled(pipeline):
    portrait = prepare_portrait(Image.open(PORTRAIT), 64, clip_size=28)
    with torch.no_grad():
        still = pipeline.animator.encode_portrait(portrait)
        expected = pipeline.animator.base.vae.encode(portrait.pixels[None]).latent_dist.mode()
    assert torch.equal(still.latent, expected)
    assert still.clip.shape == (1, 16) and torch.equal(still.mask, portrait.mask[None])


def test_buckets_by_hand_are_scaled(pipeline, speech):
    features = pipeline.extract_audio_features(speech)
    ticks, clip = torch.arange(5), torch.randn(1, 16)
    with torch.no_grad():
        asked, predicted = pipeline.motion_buckets(features.features, ticks, clip, SonicConfig(dynamic_scale=1))
        assert torch.equal(asked, predicted)
        by_hand, own = pipeline.motion_buckets(
            features.features, ticks, clip, SonicConfig(motion="intense", translation_bucket=30)
        )
    assert torch.equal(by_hand[:, 0], torch.full((5,), 60.0))
    assert torch.allclose(by_hand[:, 1], predicted[:, 1] * 2)
    assert torch.allclose(own, predicted * 2)


OWN = """
import librosa, numpy as np, torch

class MfccPitch:
    name, layers, width = "mfcc-pitch", 1, 14

    def __call__(self, speech):
        steps = 2 * (len(speech) // 640)
        mfcc = librosa.feature.mfcc(y=speech, sr=16000, n_mfcc=13, hop_length=320)[:, :steps]
        pitch = librosa.yin(speech, fmin=60, fmax=400, sr=16000, hop_length=320)[None, :steps]
        return torch.from_numpy(np.concatenate([mfcc, pitch]).T.astype(np.float32))[:, None]
"""


def test_own_audio_features(tiny, speech, tmp_path):
    """The extension point, from training's side to the command line."""
    import sonic_training

    (tmp_path / "own.py").write_text(OWN)
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips/one.mp4").write_bytes((EXAMPLES / "clips/puppet_0000.mp4").read_bytes())
    spec = f"{tmp_path}/own.py:MfccPitch"
    arguments = (
        f"--model_path {tiny}/base --data_root {tmp_path}/clips --output_dir {tmp_path}/out --audio_extractor {spec}"
    )
    small = "--num_frames 4 --frame_step 1 --resolution 64 --max_train_steps 1 --num_workers 0 --validation_steps 0"
    sonic_training.main(f"{arguments} {small}".split())
    checkpoint = tmp_path / "out/checkpoint-1"
    few = ["--num_inference_steps", 1, "--image", PORTRAIT, "--audio", speech, "--output", tmp_path / "own.mp4"]
    assert demo(checkpoint, "--audio_extractor", spec, *few) == 0
    assert demo(checkpoint, *few, "--whisper_path", tiny / "whisper") == 2

    own = sonic_training.load_extractor(spec)
    pipeline = SonicPipeline(SonicConfig(checkpoint=str(checkpoint), num_inference_steps=1), audio_extractor=own)
    features = extract_audio_features(speech, extractor=own)
    assert features.features.shape == (16, 1, 14)
    assert pipeline.generate(PORTRAIT, features).frames.shape == (8, 64, 64, 3)


# ---------------------------------------------------------------------------------------------- batches


def test_batch_of_a_folder_goes_on_after_a_failure(tiny, speech, tmp_path, capsys):
    faces = tmp_path / "faces"
    faces.mkdir()
    Image.open(PORTRAIT).resize((128, 128)).save(faces / "a.png")
    Image.new("RGB", (128, 128)).save(faces / "b.png")
    (faces / "c.jpg").write_bytes(b"no picture")
    Image.open(PORTRAIT).resize((200, 200)).save(faces / "d.webp")
    (faces / "notes.txt").write_text("not an image")
    output = tmp_path / "videos"
    assert demo(tiny, "--image", faces, "--audio", speech, "--output", output) == 1
    assert sorted(path.name for path in output.iterdir()) == ["a_voice.mp4", "d_voice.mp4"]
    printed = capsys.readouterr().out
    assert "2 of 4 clips made" in printed
    assert "b.png" in printed and "no face was found" in printed and "c.jpg" in printed


def test_batch_from_csv(tiny, speech, tmp_path):
    (tmp_path / "voice.wav").write_bytes(speech.read_bytes())
    (tmp_path / "face.jpg").write_bytes(PORTRAIT.read_bytes())
    table = tmp_path / "jobs.csv"
    table.write_text("image,audio,output\nface.jpg,voice.wav,first\nface.jpg,voice.wav,\nface.jpg,gone.wav,\n")
    assert demo(tiny, "--image", table, "--output", tmp_path / "videos", "--num_inference_steps", 1) == 1
    assert sorted(path.name for path in (tmp_path / "videos").iterdir()) == ["face_voice.mp4", "first.mp4"]


def plan(*arguments):
    return sonic_demo.plan(sonic_demo.parse([str(argument) for argument in arguments]))


def test_pairing(speech, tmp_path):
    images = [tmp_path / name for name in ("a.png", "b.png", "c.png")]
    for image in images:
        image.touch()
    jobs, batch = plan("--image", *images, "--audio", speech, "--output", tmp_path / "out")
    assert batch and [job.output.name for job in jobs] == ["a_voice.mp4", "b_voice.mp4", "c_voice.mp4"]
    jobs, _ = plan("--image", images[0], "--audio", speech, speech, "--output", tmp_path / "out")
    assert [job.output.name for job in jobs] == ["a_voice.mp4", "a_voice_2.mp4"]
    jobs, _ = plan("--image", *images[:2], "--audio", speech, speech, "--output", tmp_path / "out")
    assert [job.image for job in jobs] == images[:2]
    with pytest.raises(UserError, match="3 images and 2 sounds do not pair"):
        plan("--image", *images, "--audio", speech, speech, "--output", tmp_path / "out")
    jobs, batch = plan("--image", images[0], "--audio", speech, "--output", tmp_path)
    assert not batch and jobs[0].output == tmp_path / "a_voice.mp4"


def test_batch_goes_on_past_a_missing_file(tiny, speech, tmp_path, capsys):
    images = [tmp_path / "gone.png", PORTRAIT]
    assert demo(tiny, "--image", *images, "--audio", speech, "--output", tmp_path, "--num_inference_steps", 1) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["portrait_voice.mp4"]
    assert "gone.png does not exist" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------- bad input


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """Files that cannot be used."""
    folder = tmp_path_factory.mktemp("broken")
    (folder / "empty.png").touch()
    (folder / "empty.wav").touch()
    (folder / "text.jpg").write_text("this is text")
    (folder / "text.wav").write_text("this is text")
    Image.new("RGB", (63, 200)).save(folder / "small.png")
    Image.new("RGB", (128, 128), "green").save(folder / "faceless.png")
    soundfile.write(folder / "short.wav", np.zeros(3000), 16000)
    (folder / "nothing").mkdir()
    (folder / "file").touch()
    return folder


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"image": "gone.png"}, "gone.png does not exist"),
        ({"audio": "gone.wav"}, "gone.wav does not exist"),
        ({"image": "empty.png"}, "empty.png"),
        ({"audio": "empty.wav"}, "empty.wav"),
        ({"image": "text.jpg"}, "text.jpg cannot be read as an image"),
        ({"audio": "text.wav"}, "text.wav"),
        ({"image": "short.wav"}, "cannot be read as an image"),
        ({"audio": "faceless.png"}, "faceless.png"),
        ({"image": "small.png"}, "63 x 200 pixels: give at least 64"),
        ({"audio": "short.wav"}, "0.2 s"),
        ({"image": "faceless.png"}, "no face was found in faceless.png"),
        ({"crop": "some"}, "--crop: must be a number at least 0"),
        ({"image": "nothing"}, "holds no image files"),
        ({"output": "video.avi"}, "must end in .mp4"),
        ({"output": "file/video.mp4"}, "file"),
        ({"seed": "-1"}, "--seed: must be a whole number at least 0"),
        ({"dynamic_scale": "-0.5"}, "--dynamic_scale: must be a number at least 0"),
        ({"translation_bucket": "128"}, "--translation_bucket: must be a number at least 0 and at most 127"),
        ({"resolution": "32"}, "--resolution: must be a whole number at least 64"),
        ({"num_inference_steps": "0"}, "--num_inference_steps: must be a whole number at least 1"),
        ({"guidance_scale_audio": "nan"}, "--guidance_scale_audio: must be a number"),
        ({"motion": "wild"}, "--motion: must be one of mild, moderate, intense"),
        ({"dtype": "fp8"}, "--dtype: must be one of"),
        ({"dtype": "fp16", "device": "cpu"}, "use --dtype fp32 or --dtype bf16"),
        ({"overlap": "4"}, "overlap 4 must be below the window of 4 frames"),
        ({"face_box": "1,2,3"}, "--face_box '1,2,3'"),
        ({"face_box": "5000,5000,6000,6000"}, "outside"),
        ({"checkpoint": "nothing"}, "is no checkpoint"),
        ({"checkpoint": "gone"}, "gone' does not exist"),
        ({"share": ""}, "--gradio"),
    ],
    ids=lambda value: " ".join(value.values()) if isinstance(value, dict) else "",
)
def test_bad_input_is_one_sentence_and_exit_code_2(tiny, speech, broken, tmp_path, monkeypatch, capsys, change, words):
    monkeypatch.chdir(broken)
    before = sorted(broken.rglob("*"))
    given = {"image": PORTRAIT, "audio": speech, "output": tmp_path / "out.mp4", "checkpoint": tiny, **change}
    arguments = [part for name, value in given.items() for part in (f"--{name}", str(value)) if part]
    with pytest.raises(SystemExit) as stopped:
        run(lambda: sonic_demo.main(arguments))
    printed = capsys.readouterr().err
    assert stopped.value.code == 2
    assert words in printed and "Traceback" not in printed and len(printed.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir()) and sorted(broken.rglob("*")) == before


def test_checkpoint_of_another_architecture(tiny, speech, tmp_path, capsys):
    from sonic.checkpoints import open_checkpoint, save_released

    save_released(tmp_path / "other", open_checkpoint(tiny).load())
    preset = tmp_path / "base"
    preset.symlink_to(tiny / "base")
    tensors = torch.load(tmp_path / "other/unet.pth", weights_only=True)
    tensors["conv_in.weight"] = torch.zeros(320, 8, 3, 3)
    torch.save(tensors, tmp_path / "other/unet.pth")
    where = ["--base_model", preset, "--whisper_path", tiny / "whisper"]
    code = demo(tmp_path / "other", *where, "--image", PORTRAIT, "--audio", speech, "--output", tmp_path / "o.mp4")
    printed = capsys.readouterr().err
    assert code == 2 and "tensor 'conv_in.weight' has shape (320, 8, 3, 3), expected (64, 8, 3, 3)" in printed


@pytest.mark.parametrize("kind", ["exif", "L", "P", "RGBA", "CMYK", "LA", "I;16"])
def test_every_kind_of_portrait_works(pipeline, speech, tmp_path, kind):
    image = Image.open(PORTRAIT).resize((256, 256))
    path = tmp_path / ("portrait.jpg" if kind in ("exif", "CMYK") else "portrait.png")
    if kind == "exif":
        exif = Image.Exif()
        exif[0x0112] = 6  # the camera was turned: show it rotated by 90 degrees
        image.rotate(90, expand=True).save(path, exif=exif, quality=95)
    elif kind == "I;16":
        Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257).save(path)
    else:
        image.convert(kind).save(path)
    features = pipeline.extract_audio_features(speech)
    video = pipeline.generate(path, features, num_frames=2, num_inference_steps=1)  # a face must be found in it
    assert video.frames.shape == (2, 64, 64, 3)


@pytest.mark.parametrize(("rate", "channels"), [(8000, 1), (22050, 2), (44100, 1), (48000, 6), (96000, 2)])
def test_every_kind_of_sound_works(pipeline, tmp_path, rate, channels):
    path = tmp_path / "voice.wav"
    time = np.arange(rate // 2) / rate
    soundfile.write(path, np.repeat(np.sin(2 * np.pi * 220 * time)[:, None] * 0.3, channels, 1), rate)
    assert pipeline.extract_audio_features(path).features.shape == (24, 2, 16)


def test_api_refuses_what_makes_no_sense(pipeline, speech):
    features = pipeline.extract_audio_features(speech)
    for change, words in (
        ({"checkpoint": "other"}, "'checkpoint' is no setting of one call"),
        ({"speed": 2}, "'speed' is no setting"),
        ({"motion_buckets": {"nod": 3}}, "motion bucket 'nod' is unknown"),
        ({"motion_buckets": {"translation": 300}}, "translation_bucket must be a number at least 0 and at most 127"),
        ({"seed": -1}, "seed must be"),
        ({"num_frames": 0}, "num_frames must be a whole number at least 1"),
    ):
        with pytest.raises(UserError, match=words):
            pipeline.generate(PORTRAIT, features, **change)
    with pytest.raises(UserError, match=r"uint8 \[H, W, 3\]"):
        pipeline.generate(np.zeros((100, 100, 3)), features)
    for array in (np.zeros(16000, np.int16), np.zeros((2, 16000), np.float32)):
        with pytest.raises(UserError, match=r"expected float32 \[n\] at 16 kHz"):
            pipeline.extract_audio_features(array)
    with pytest.raises(UserError, match=r"num_frames must be a whole number"):
        pipeline.generate(PORTRAIT, features, num_frames=2.5)


def test_features_of_another_extractor_are_heard_again(pipeline, speech):
    """`extract_audio_features` without a config listens with the shipped model's Whisper, whatever the pipeline is."""
    own = pipeline.extract_audio_features(speech)
    foreign = AudioFeatures(torch.randn_like(own.features), "another-whisper", own.speech)
    found, expected = (pipeline.generate(PORTRAIT, features, num_inference_steps=1) for features in (foreign, own))
    assert np.array_equal(found.frames, expected.frames)


def test_script_works_from_any_folder(tiny, speech, tmp_path):
    command = [sys.executable, ROOT / "sonic_demo.py", "--checkpoint", tiny, "--image", PORTRAIT, "--audio", speech]
    finished = subprocess.run(
        [*command, "--output", "out.mp4"], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert finished.returncode == 0, finished.stderr
    assert (tmp_path / "out.mp4").stat().st_size > 1000
