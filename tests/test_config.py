"""Flags and the choices of SPEC.md that are defaults."""

import dataclasses

import pytest

import sonic_demo
import sonic_training
from sonic.config import Settings, SonicConfig, UserError
from sonic.flags import number, one_of
from sonic.presets import PRESETS
from sonic.training_config import TrainingConfig


def test_released_settings():
    """SPEC.md sections 2, 4 and 5: 12.5 fps, 512 pixels, windows of 25 frames, guidance 2.0 and 7.5, shift 7."""
    settings = Settings()
    assert (settings.frame_step, settings.resolution, settings.num_frames, settings.shift_offset) == (2, 512, 25, 7)
    assert (settings.guidance_scale_image, settings.guidance_scale_audio) == (2.0, 7.5)
    assert settings.translation_contrast == settings.expression_contrast == settings.expression_floor == 0
    assert settings.crop is None and settings.overlap == 0
    assert PRESETS["svd-xt"].settings == settings


def test_training_defaults():
    """SPEC.md section 6: AdamW at 1e-5, dropouts of 5 %; sizes are the model's own."""
    config = TrainingConfig(data_root="videos")
    assert (config.optimizer, config.learning_rate) == ("adamw", 1e-5)
    assert (config.p_mean, config.p_std) == (0.7, 1.6)
    assert (config.audio_drop_prob, config.image_drop_prob, config.both_drop_prob) == (0.05, 0.05, 0.05)
    assert (config.num_frames, config.frame_step, config.resolution) == (None, None, None)


@pytest.mark.parametrize("config", [SonicConfig, TrainingConfig])
def test_every_flag_has_help_and_a_default_that_passes_its_own_check(config):
    for field in dataclasses.fields(config):
        assert len(field.metadata["help"]) > 10, field.name
        if field.default not in (None, False, ""):
            assert field.metadata["check"](str(field.default)) == field.default


@pytest.mark.parametrize("script", [sonic_demo, sonic_training])
def test_help_lists_every_flag(script, capsys):
    with pytest.raises(SystemExit) as stopped:
        script.parse(["--help"])
    printed = capsys.readouterr().out
    config = SonicConfig if script is sonic_demo else TrainingConfig
    assert stopped.value.code == 0
    assert all(f"--{field.name}" in printed for field in dataclasses.fields(config))


@pytest.mark.parametrize("script", [sonic_demo, sonic_training])
def test_abbreviated_and_unknown_flags_are_refused(script, capsys):
    for flag in ("--see", "--nothing"):
        with pytest.raises(SystemExit) as stopped:
            script.parse([flag, "3"])
        assert stopped.value.code == 2 and flag in capsys.readouterr().err


def test_training_command_of_the_readme():
    text = """--model_path checkpoints/stable-video-diffusion-img2vid-xt --data_root VIDEOS --output_dir OUT --train_batch_size 1
        --num_train_epochs 100 --learning_rate 1e-5 --mixed_precision fp16 --num_frames 25 --resolution 576 --use_wandb"""
    config = sonic_training.parse(text.split())
    assert (config.num_frames, config.resolution, config.mixed_precision, config.report_to) == (
        25,
        576,
        "fp16",
        "wandb",
    )


@pytest.mark.parametrize("value", ["x", "", None, "2.5", 2.5, "nan", "inf", float("inf"), "-1", -1, 11])
def test_numbers_outside_their_range(value):
    with pytest.raises(ValueError, match="must be a whole number at least 0 and at most 10"):
        number(int, low=0, high=10)(value)


def test_numbers_inside_their_range():
    assert number(int, low=0)("7") == 7 and number(float, above=0)("1e-5") == 1e-5 and number(int)(3.0) == 3
    with pytest.raises(ValueError, match="above 0"):
        number(float, above=0)(0)
    assert one_of("a", "b")("b") == "b"
    with pytest.raises(ValueError, match="one of a, b"):
        one_of("a", "b")("c")


def test_guidance_may_ramp():
    for given in ("1.0,3.0", (1, 3), [1.0, 3.0]):
        assert SonicConfig(guidance_scale_audio=given).guidance_scale_audio == (1.0, 3.0)
    assert SonicConfig(guidance_scale_audio="2.5").guidance_scale_audio == 2.5
    for wrong in ("1,2,3", "1,", "-1,2", "a,b"):
        with pytest.raises(UserError, match="guidance_scale_audio must be"):
            SonicConfig(guidance_scale_audio=wrong)


def test_noise_level_may_ramp():
    assert TrainingConfig(data_root="x", p_mean="1.4,-0.2").p_mean == (1.4, -0.2)
    with pytest.raises(UserError, match="p_mean must be"):
        TrainingConfig(data_root="x", p_mean="1.4,b")


def test_python_values_are_checked_too():
    with pytest.raises(UserError, match="seed must be a whole number"):
        SonicConfig(seed=-3)
    with pytest.raises(UserError, match="use_wandb must be True or False"):
        TrainingConfig(data_root="videos", use_wandb="yes")
    with pytest.raises(UserError, match="data_root is missing"):
        TrainingConfig()


@pytest.mark.parametrize("other", [{"offload": "model"}, {"quantize": "int8"}])
def test_compiled_weights_stay_where_they_are(other):
    with pytest.raises(UserError, match="compile goes with whole weights"):
        SonicConfig(compile=True, **other)
