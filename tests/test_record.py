"""What a video says of how it was made, and making it again (sonic/record.py, `--config VIDEO.mp4`, `--json`)."""

import json

import numpy as np
import pytest
from conftest import EXAMPLES, voice

import sonic_demo
from sonic.config import UserError
from sonic.flags import run
from sonic.media import read_metadata, save_video
from sonic.record import make_record, read_record, to_metadata

PORTRAIT = EXAMPLES / "portrait.jpg"


@pytest.fixture(scope="module")
def speech(tmp_path_factory):
    """8 ticks, two windows of the tiny model."""
    return voice(tmp_path_factory, 8, 8000)


def demo(tiny, speech, *arguments):
    """The exit code of a clip of the tiny model."""
    given = ["--checkpoint", tiny, "--image", PORTRAIT, "--audio", speech, *arguments]
    with pytest.raises(SystemExit) as stopped:
        run(lambda: sonic_demo.main([str(word) for word in given]))
    return stopped.value.code


SETTINGS = ["--seed", 7, "--motion", "intense", "--guidance_scale_audio", "1,3", "--expression_bucket", 100]
SETTINGS += ["--crop", "none", "--face_box", "150,150,350,400", "--num_inference_steps", 3]


@pytest.fixture(scope="module")
def made(tiny, speech, tmp_path_factory):
    """A clip with many settings of its own."""
    path = tmp_path_factory.mktemp("made") / "first.mp4"
    assert demo(tiny, speech, "--output", path, *SETTINGS) == 0
    return path


def test_a_video_holds_its_settings_and_makes_itself_again(tiny, speech, made, tmp_path):
    settings = read_record(made)["settings"]
    assert (settings["seed"], settings["motion"], settings["guidance_scale_audio"]) == (7, "intense", [1.0, 3.0])
    assert (settings["expression_bucket"], settings["crop"], settings["num_inference_steps"]) == (100, "none", 3)
    assert settings["resolution"] == 64 and "translation_bucket" not in settings  # the checkpoint's; still predicted
    assert demo(tiny, speech, "--config", made, "--output", tmp_path / "again.mp4") == 0
    assert (tmp_path / "again.mp4").read_bytes() == made.read_bytes()


def test_the_command_line_wins_over_the_video(tiny, speech, made, tmp_path):
    assert demo(tiny, speech, "--config", made, "--seed", 8, "--output", tmp_path / "other.mp4") == 0
    settings = read_record(tmp_path / "other.mp4")["settings"]
    assert settings == read_record(made)["settings"] | {"seed": 8}


def test_no_folder_of_the_machine_is_told(tiny, speech, made):
    text = read_metadata(made)["comment"]
    record = json.loads(text)
    assert record["image"] == "portrait.jpg" and record["audio"] == "voice.wav"
    assert record["model"]["name"] == tiny.name and len(record["model"]["hash"]) == 12
    assert "/" not in text and str(speech.parent.name) not in text
    assert set(record) >= {"program", "version", "torch", "device", "dtype"}


def test_another_model_is_told(tiny, speech, made, tmp_path, capsys):
    record = read_record(made)
    record["model"] = {"name": "Sonic", "hash": "0" * 12}
    other = tmp_path / "other-model.mp4"
    save_video(np.zeros((2, 64, 64, 3), np.uint8), other, 25, metadata=to_metadata(record))
    assert demo(tiny, speech, "--config", other, "--output", tmp_path / "o.mp4", "--num_inference_steps", 1) == 0
    assert "was made with Sonic (000000000000)" in capsys.readouterr().err


@pytest.mark.parametrize("comment", [None, "a holiday", "[1]", '{"program": "other", "settings": {}}', "{" * 9999])
def test_a_foreign_video_has_no_settings(comment, tmp_path):
    path = tmp_path / "foreign.mp4"
    save_video(np.zeros((2, 64, 64, 3), np.uint8), path, 25, metadata={"comment": comment} if comment else None)
    with pytest.raises(UserError, match=r"foreign.mp4' holds no settings"):
        read_record(path)


def test_wrong_settings_in_a_video_name_it(tmp_path):
    path = tmp_path / "odd.mp4"
    record = make_record({"name": "x", "hash": "y"}, {"seed": -1, "crop": None})
    save_video(np.zeros((2, 64, 64, 3), np.uint8), path, 25, metadata=to_metadata(record))
    with pytest.raises(UserError, match=r"odd.mp4': seed must be a whole number at least 0"):
        sonic_demo.parse(["--config", str(path)])
    (tmp_path / "text.mp4").write_text("seed: 3\n")
    with pytest.raises(UserError, match="cannot be read as a video"):
        sonic_demo.parse(["--config", str(tmp_path / "text.mp4")])


# ------------------------------------------------------------------------------------------------------------------ --json


def test_json_of_a_clip(tiny, speech, tmp_path, capsys):
    path = tmp_path / "clip.mp4"
    assert demo(tiny, speech, "--output", path, "--json", "--num_inference_steps", 1) == 0
    printed = capsys.readouterr()
    result = json.loads(printed.out)
    assert (result["output"], result["frames"], result["fps"], result["seed"]) == (str(path), 8, 25.0, 42)
    assert result["seconds"] == pytest.approx(8 / 25) and result["settings"]["num_inference_steps"] == 1
    assert result["timings"]["load"] > 0 and result["timings"]["animate"] > 0
    assert str(path) in printed.err
    # the object is a settings file itself
    (tmp_path / "result.json").write_text(printed.out)
    assert sonic_demo.parse(["--config", str(tmp_path / "result.json")]).num_inference_steps == 1


def test_json_of_a_batch(tiny, speech, tmp_path, capsys):
    images = [str(tmp_path / "gone.png"), str(PORTRAIT)]
    code = demo(tiny, speech, "--image", *images, "--output", tmp_path, "--json", "--num_inference_steps", 1)
    result = json.loads(capsys.readouterr().out)
    assert code == 1 and [clip["frames"] for clip in result["clips"]] == [8]
    assert result["failures"][0]["image"].endswith("gone.png") and "does not exist" in result["failures"][0]["error"]


def test_json_of_an_error(tiny, speech, tmp_path, capsys):
    assert demo(tiny, speech, "--output", tmp_path / "o.avi", "--json") == 2
    printed = capsys.readouterr()
    assert "must end in .mp4" in json.loads(printed.out)["error"] and "must end in .mp4" in printed.err
    assert demo(tiny, speech, "--gradio", "--json") == 2
    assert capsys.readouterr().out == ""
