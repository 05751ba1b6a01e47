"""The training loop, run as a person runs it, at the smallest size."""

import dataclasses
import json
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import OWN_FEATURES, ROOT
from runs import fixed_batch, flags, losses, same, weights
from torch.utils.data import DataLoader

import sonic_training
from sonic.checkpoints import load_whisper, open_checkpoint
from sonic.clips import hold_out
from sonic.config import Settings, UserError
from sonic.dataset import SonicDataset
from sonic.denoiser import Losses
from sonic.media import VideoReader
from sonic.pieces import Screening
from sonic.prepare import prepare
from sonic.run_log import Log, RunState
from sonic.run_setup import for_this_run, fused_is_faster
from sonic.training import (
    BUCKET_LOSS_WEIGHT,
    SampleNumbers,
    draw,
    lip_loss,
    loss_weight,
    optimizer_steps,
    readable,
    total_loss,
    with_model_defaults,
)
from sonic.training_config import TrainingConfig
from sonic.validation import Validation, face_loss

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


@pytest.fixture(scope="module")
def unbroken(tiny, clips, cache, tmp_path_factory):
    """Four steps in one go."""
    output = tmp_path_factory.mktemp("unbroken")
    sonic_training.main(flags(tiny, clips, cache, output, lr_scheduler="cosine", lr_warmup_steps=1))
    return output


def test_a_run_leaves_what_it_promises(unbroken, tiny):
    checkpoint = unbroken / "checkpoint-4"
    assert {path.name for path in checkpoint.iterdir()} == {
        "sonic.json",
        "unet.safetensors",
        "audio2token.safetensors",
        "audio2bucket.safetensors",
        "released",
        "run.json",
        "state",
    }
    assert not same(weights(checkpoint), weights(tiny))
    rows = [json.loads(line) for line in (unbroken / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    for row in rows:
        assert row["loss"] > 0 and row["bucket_loss"] > 0 and row["grad_norm"] > 0 and row["memory_gb"] > 0
        assert row["clips_per_second"] > 0 and 0 <= row["data_wait"] < 1
    trained = [row["trained_seconds"] for row in rows]
    assert trained[0] > 0 and trained == sorted(trained)
    assert rows[0]["learning_rate"] == pytest.approx(1e-3) and rows[-1]["learning_rate"] == pytest.approx(0, abs=1e-9)
    settings = open_checkpoint(checkpoint).settings
    assert settings == Settings(**{**dataclasses.asdict(open_checkpoint(tiny).settings), "shift_offset": 3})
    released = open_checkpoint(checkpoint / "released", tiny / "base", tiny / "whisper").load()
    own = open_checkpoint(checkpoint).load()
    assert same(released.state_dict(), own.state_dict())


def test_resumed_equals_unbroken_bit_for_bit(unbroken, tiny, clips, cache, tmp_path):
    shutil.copytree(unbroken / "checkpoint-2", tmp_path / "checkpoint-2")
    shutil.copy(unbroken / "log.jsonl", tmp_path / "log.jsonl")  # with lines beyond step 2, which must go
    more = {"lr_scheduler": "cosine", "lr_warmup_steps": 1, "resume_from_checkpoint": "latest"}
    sonic_training.main(flags(tiny, clips, cache, tmp_path, **more))
    assert losses(tmp_path) == losses(unbroken)
    assert same(weights(tmp_path / "checkpoint-4"), weights(unbroken / "checkpoint-4"))


def test_a_used_output_folder_is_not_overwritten(unbroken, tiny, clips, cache):
    before = (unbroken / "log.jsonl").read_text()
    with pytest.raises(UserError, match="already holds a run: go on with --resume_from_checkpoint latest"):
        sonic_training.main(flags(tiny, clips, cache, unbroken))
    assert (unbroken / "log.jsonl").read_text() == before


@pytest.mark.parametrize("file", ["optimizer.bin", "custom_checkpoint_1.pkl"])
def test_a_damaged_state_is_named(unbroken, tiny, clips, cache, tmp_path, file):
    shutil.copytree(unbroken / "checkpoint-2", tmp_path / "checkpoint-2")
    (tmp_path / "checkpoint-2/state" / file).write_bytes(b"junk")
    with pytest.raises(UserError, match=r"checkpoint-2' is damaged .*resume from an earlier checkpoint"):
        sonic_training.main(flags(tiny, clips, cache, tmp_path, resume_from_checkpoint="latest"))


def test_a_video_deleted_after_preparation(tiny, clips, cache, tmp_path):
    folder = shutil.copytree(clips, tmp_path / "videos")
    own = load_whisper(tiny / "whisper")
    data = prepare(folder, tmp_path / "cache", own, num_frames=4, frame_step=1, progress=False)
    for clip in data.clips:
        clip.path.unlink()
    dataset = SonicDataset(data.clips, num_frames=4, frame_step=1, resolution=64, clip_size=28)
    for workers in (0, 1):
        loader = DataLoader(dataset, num_workers=workers, multiprocessing_context="spawn" if workers else None)
        with pytest.raises(UserError) as stopped:
            list(readable(loader))
        assert str(stopped.value).endswith("does not exist: check the path of the video.")
        assert len(str(stopped.value).splitlines()) == 1


def test_model_inside_the_project_from_another_folder(tiny, clips, cache, tmp_path, monkeypatch):
    """Checkpoints store paths from the project's folder; a run must find them from wherever it is started."""
    monkeypatch.setattr("sonic.weights.ROOT", tiny.parent)
    monkeypatch.chdir(tmp_path)
    arguments = flags(tiny.name, clips, cache, tmp_path / "out", max_train_steps=1, save_steps=1)
    sonic_training.main(arguments)
    stored = json.loads((tmp_path / "out/checkpoint-1/sonic.json").read_text())
    assert (stored["base_model"], stored["whisper_path"]) == ("sonic-tiny/base", "sonic-tiny/whisper")
    assert open_checkpoint(tmp_path / "out/checkpoint-1").base_model == tiny / "base"


def test_workers_do_not_change_the_samples(unbroken, tiny, clips, cache, tmp_path):
    more = {"lr_scheduler": "cosine", "lr_warmup_steps": 1, "num_workers": 2}
    sonic_training.main(flags(tiny, clips, cache, tmp_path, **more))
    assert losses(tmp_path) == losses(unbroken)


def test_validation(tiny, clips, cache, tmp_path, capsys):
    sonic_training.main(
        flags(tiny, clips, cache, tmp_path, max_train_steps=2, validation_steps=1, report_to="tensorboard")
    )
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    measured = [row for row in rows if "validation_loss" in row]
    assert [row["step"] for row in measured] == [0, 1, 2]
    for row in measured:
        assert set(row) == {
            "step",
            "validation_loss",
            "validation_bucket_loss",
            "validation_token_spread",
            "audio_gap_sigma_1",
            "audio_gap_sigma_3",
        }
        assert row["validation_loss"] > 0 and row["validation_token_spread"] > 0
        assert row["audio_gap_sigma_1"] != 0 and row["audio_gap_sigma_3"] != 0
    with VideoReader(tmp_path / "validation/step-000002.mp4") as reader:
        assert (reader.info.width, reader.info.height, reader.info.has_audio) == (128, 64, True)
        assert reader.num_ticks == 12  # three windows
    videos = sorted(path.name for path in (tmp_path / "validation").iterdir())
    assert videos == ["step-000001.mp4", "step-000002.mp4"]
    assert list((tmp_path / "sonic").glob("events.*"))
    assert "audio_gap_sigma_1" in capsys.readouterr().out


def test_loss_on_a_fixed_batch_falls_under_half(parts):
    start = parts[0]
    clip, noise = fixed_batch(parts)
    batch = clip.with_noise(noise)
    torch.manual_seed(0)
    model = start.load().train()
    model.unet.freeze_unused()
    optimizer = torch.optim.AdamW([value for value in model.parameters() if value.requires_grad], 1e-3)
    history = []
    for _ in range(40):
        result = model(batch)
        optimizer.zero_grad()
        total_loss(result).backward()
        optimizer.step()
        history.append((result.velocity.item(), result.bucket.item()))
    assert history[-1][0] < history[0][0] / 2
    assert history[-1][1] < history[0][1] / 2


def test_latents_are_the_vaes_mode(parts):
    encoders = parts[-1]
    clip, _ = fixed_batch(parts)
    assert clip.latents.shape == (2, 4, 4, 8, 8)
    dataset = SonicDataset(parts[2].clips, num_frames=4, frame_step=1, resolution=64, clip_size=28, seed=0)
    sample = dataset[1]
    with torch.no_grad():
        mode = encoders.base.vae.encode(sample["frames"]).latent_dist.mode()
        reference = encoders.base.vae.encode(sample["reference"][None]).latent_dist.mode()
    assert torch.allclose(clip.latents[1], mode * 0.18215, atol=1e-5)
    assert torch.allclose(clip.portrait.latent[1], reference[0], atol=1e-5)  # not scaled


def test_gap_compares_with_another_clips_audio(parts):
    start, config, data, encoders = parts
    _, held_out = hold_out(data.clips)
    validation = Validation(held_out, config, start.settings, encoders)
    assert len(set(validation.names)) == len(held_out) == 3
    model = start.load().eval()
    values = validation.measure(model)
    assert values == validation.measure(model)  # the same noise every time
    with torch.no_grad():
        model.audio2token.proj1.weight.zero_()  # deaf
    assert validation.measure(model)["audio_gap_sigma_1"] == 0
    assert validation.measure(model)["validation_token_spread"] == pytest.approx(0, abs=1e-6)
    assert Validation(held_out[:1], config, start.settings, encoders).measure(model)["audio_gap_sigma_1"] is None


def test_face_loss_looks_inside_the_face_only():
    loss = torch.ones(1, 2, 8, 8)
    loss[:, :, 4:, :] = 5
    mask = torch.zeros(1, 1, 64, 64)
    mask[:, :, :32] = 1
    assert face_loss(loss, mask).item() == pytest.approx(1)
    assert face_loss(loss, 1 - mask).item() == pytest.approx(5)


def test_face_and_lips_count_more_where_they_are():
    lips = torch.zeros(1, 2, 8, 8)
    lips[:, :, 5, 3:5] = 1
    lips[:, :, 6, 3:5] = 0.5
    errors = torch.rand(1, 2, 8, 8)
    losses = Losses(errors, torch.tensor(2.0), torch.tensor(0.0))
    faces = torch.zeros(1, 1, 64, 64)
    faces[:, :, 16:] = 1
    config = TrainingConfig(data_root="x")
    assert loss_weight(config, lips, faces)[0, 0, 5, 3] == 12  # the default
    config = dataclasses.replace(config, lip_loss_weight=1)
    assert (loss_weight(config, lips, faces) == 1).all()
    config = dataclasses.replace(config, lip_loss_weight=4, face_loss_weight=2)
    weight = loss_weight(config, lips, faces)
    plain = total_loss(losses)
    assert plain.item() == pytest.approx(errors.mean().item() + 2 * BUCKET_LOSS_WEIGHT)
    expected = errors.clone()
    expected[:, :, 2:] *= 2
    expected[:, :, 5, 3:5] = errors[:, :, 5, 3:5] * 5
    expected[:, :, 6, 3:5] = errors[:, :, 6, 3:5] * 3.5
    assert (total_loss(losses, weight) - plain).item() == pytest.approx((expected - errors).mean().item(), rel=1e-4)
    inside = (errors[:, :, 5, 3:5].sum() + 0.5 * errors[:, :, 6, 3:5].sum()) / 6
    assert lip_loss(losses, lips) == pytest.approx(inside.item(), rel=1e-5)
    assert lip_loss(losses, torch.zeros_like(lips)) == 0  # a window without a mouth in the picture


def test_draws_depend_on_seed_and_number_only():
    config = TrainingConfig(data_root="x", seed=3)
    pair, single = draw(config, [7, 9], (2, 4, 8, 8)), draw(config, [9], (2, 4, 8, 8))
    assert torch.equal(pair.noise[1], single.noise[0]) and pair.sigma[1] == single.sigma[0]
    other = draw(dataclasses.replace(config, seed=4), [9], (2, 4, 8, 8))
    assert not torch.equal(other.noise, single.noise)
    zero = draw(dataclasses.replace(config, seed=0), [9], (2, 4, 8, 8))
    assert not torch.equal(zero.noise, single.noise)


def test_noise_levels_follow_p_mean_and_p_std():
    config = TrainingConfig(data_root="x")
    usual = draw(config, list(range(50)), (1, 1, 1, 1)).sigma.log()
    moved = draw(dataclasses.replace(config, p_mean=1.4, p_std=0.8), list(range(50)), (1, 1, 1, 1)).sigma.log()
    assert torch.allclose(moved - 1.4, (usual - 0.7) / 2, atol=1e-5)


def test_more_noise_draws_keep_the_first_and_repeat_the_clips(parts):
    config = TrainingConfig(data_root="x", noise_draws=3)
    drawn = draw(config, [5, 6], (2, 4, 8, 8))
    once = draw(dataclasses.replace(config, noise_draws=1), [5, 6], (2, 4, 8, 8))
    assert len(drawn.sigma) == len(drawn.noise) == len(drawn.keep_audio) == 6
    assert torch.equal(drawn.noise[:2], once.noise) and torch.equal(drawn.sigma[:2], once.sigma)
    assert len({round(value, 6) for value in drawn.sigma.tolist()}) == 6
    clip, _ = fixed_batch(parts)
    again = clip.repeated(3)
    assert torch.equal(again.latents[4:], clip.latents) and torch.equal(again.portrait.mask[2:4], clip.portrait.mask)
    assert {len(value) for name, value in vars(again).items() if name != "portrait"} == {6}


def test_dropout_shares_are_exclusive():
    config = TrainingConfig(data_root="x", audio_drop_prob=0.1, image_drop_prob=0.2, both_drop_prob=0.3)
    drawn = draw(config, list(range(3000)), (1,))
    audio, image = drawn.keep_audio.bool(), drawn.keep_image.bool()
    share = {
        "audio": (~audio & image).float().mean().item(),
        "image": (audio & ~image).float().mean().item(),
        "both": (~audio & ~image).float().mean().item(),
    }
    assert share == pytest.approx({"audio": 0.1, "image": 0.2, "both": 0.3}, abs=0.03)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_sample_numbers_do_not_depend_on_processes(world):
    """Together the processes see each number once, in order, from where the run goes on, however many there are."""
    shares = [list(SampleNumbers(10, 12 // world, 2, rank, world)) for rank in range(world)]
    together = [number for step in zip(*shares, strict=True) for share in step for number in share]
    assert together == list(range(10, 10 + 24))


def test_steps_of_an_epoch():
    config = TrainingConfig(data_root="x", train_batch_size=2, gradient_accumulation_steps=3, num_train_epochs=5)
    assert optimizer_steps(config, clips=25, world=2) == (3, 15)
    assert optimizer_steps(dataclasses.replace(config, max_train_steps=7), clips=25, world=2) == (3, 7)


def test_run_state_survives_with_its_sums():
    state = RunState(step=5, samples=40)
    state.add(loss=1.0)
    state.add(loss=2.0)
    copy = RunState()
    copy.load_state_dict(json.loads(json.dumps(state.state_dict())))
    copy.add(loss=6.0)
    assert (copy.step, copy.samples) == (5, 40) and copy.means() == {"loss": 3.0}
    copy.add(loss=4.0)
    assert copy.means() == {"loss": 4.0}


def test_log_drops_what_lies_ahead_and_what_was_cut(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\njunk}\n{"step": 3}\n{"step": 2, "lo')
    Log(path, 2).write(3, {"loss": 1.5})
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 3, "loss": 1.5}\n'


@pytest.mark.parametrize(("frame_step", "shift"), [(1, 3), (2, 7)])
def test_shift_of_a_run_follows_its_frame_rate(tiny, frame_step, shift):
    """SPEC.md section 5: 3 for 25 fps models, 7 for 12.5 fps as the released weights."""
    start = open_checkpoint(tiny)
    config = with_model_defaults(TrainingConfig(data_root="x", frame_step=frame_step), start.settings)
    assert for_this_run(start, config, Screening()).settings.shift_offset == shift


def test_dry_run_writes_nothing(tiny, clips, cache, tmp_path, capsys):
    output = tmp_path / "output"
    sonic_training.main(flags(tiny, clips, cache, output, dry_run=True))
    printed = capsys.readouterr().out
    assert "3 video files" in printed and '"learning_rate": 0.001' in printed and "activations" in printed
    assert '"num_frames": 4' in printed  # the model's own
    assert not output.exists()


def test_noise_levels_may_change_over_the_run(tiny, clips, cache, tmp_path, unbroken):
    own = {"p_mean": "0.7,-4", "lr_scheduler": "cosine", "lr_warmup_steps": 1}
    sonic_training.main(flags(tiny, clips, cache, tmp_path, **own))
    found, expected = losses(tmp_path), losses(unbroken)
    assert found[1] == pytest.approx(expected[1], rel=1e-4)  # it starts at the usual mean
    assert found[4][0] != pytest.approx(expected[4][0], rel=1e-3)


@pytest.mark.parametrize(
    "switch",
    [
        "gradient_checkpointing",
        "bf16",
        "lip_loss_weight",
        "face_loss_weight",
        "init_audio2token",
        "noise_draws",
        "muon",
    ],
)
def test_other_ways_to_train(tiny, clips, cache, tmp_path, unbroken, switch):
    more = {
        "gradient_checkpointing": {"gradient_checkpointing": True},
        "bf16": {"mixed_precision": "bf16"},
        "lip_loss_weight": {"lip_loss_weight": 10},
        "face_loss_weight": {"face_loss_weight": 10},
        "init_audio2token": {"init_audio2token": True},
        "noise_draws": {"noise_draws": 2},
        "muon": {"optimizer": "muon"},
    }[switch]
    sonic_training.main(flags(tiny, clips, cache, tmp_path, max_train_steps=1, save_steps=1, **more))
    found, expected = losses(tmp_path)[1], losses(unbroken)[1]
    if switch == "gradient_checkpointing":
        assert found == pytest.approx(expected, rel=1e-4)
    elif switch.endswith("loss_weight"):  # the reported losses stay the plain ones; what is learnt from them differs
        assert found[:2] == pytest.approx(expected[:2]) and found[2] != pytest.approx(expected[2], rel=1e-3)
    elif switch == "muon":  # the first losses are those before any update
        assert found == pytest.approx(expected, rel=1e-4)
        (state,) = (tmp_path / "checkpoint-1/state").glob("optimizer*")
        assert any("momentum" in own for own in torch.load(state, weights_only=True)["state"].values())
    elif switch == "noise_draws":  # the bucket predictor hears no noise
        assert found[0] != pytest.approx(expected[0], rel=1e-4) and found[1] == pytest.approx(expected[1])
    elif switch == "init_audio2token":  # it starts from other weights, which one step does not bring back
        name = "audio2token.proj1.weight"
        fitted, stock = weights(tmp_path / "checkpoint-1")[name], weights(tiny)[name]
        assert (fitted - stock).norm() > 0.5 * stock.norm()
        assert found[1] == pytest.approx(expected[1])
    else:
        assert found == pytest.approx(expected, rel=0.1) and found != expected
        saved = weights(tmp_path / "checkpoint-1").values()
        assert {tensor.dtype for tensor in saved} == {torch.float32}  # master weights stay in fp32
    assert (tmp_path / "checkpoint-1").is_dir()


@pytest.mark.parametrize(
    "precision, resolution, device, fused",
    [("bf16", 128, "cpu", False), ("no", 128, "cpu", True), ("bf16", 256, "cpu", True), ("bf16", 128, "cuda", True)],
)
def test_attention_is_fused_but_for_few_tokens_in_bf16_on_a_cpu(precision, resolution, device, fused):
    config = TrainingConfig(data_root="clips", mixed_precision=precision, resolution=resolution)
    assert fused_is_faster(config, torch.device(device)) == fused


def test_a_run_attends_as_is_faster(tiny, clips, cache, tmp_path, monkeypatch):
    monkeypatch.setattr(sonic_training.Run, "train", lambda run: runs.append(run))
    runs = []
    for precision in ("bf16", "no"):
        sonic_training.main(flags(tiny, clips, cache, tmp_path / precision, mixed_precision=precision))
    half, whole = (
        {module.fused_attention for module in run.model.unet.modules() if hasattr(module, "fused_attention")}
        for run in runs
    )
    assert half == {False} and whole == {True}


def test_accumulation_equals_a_larger_batch(tiny, clips, cache, tmp_path):
    for name, more in (("one", {"gradient_accumulation_steps": 2}), ("two", {"train_batch_size": 2})):
        sonic_training.main(flags(tiny, clips, cache, tmp_path / name, max_train_steps=2, **more))
    assert losses(tmp_path / "one").keys() == losses(tmp_path / "two").keys()
    for step, expected in losses(tmp_path / "two").items():
        assert losses(tmp_path / "one")[step] == pytest.approx(expected, rel=1e-3)


def test_training_on_own_audio_features(tiny, clips, cache, tmp_path):
    (tmp_path / "own.py").write_text(OWN_FEATURES)
    spec = f"{tmp_path}/own.py:Energy"
    base = {"model_path": tiny / "base", "audio_extractor": spec, "num_frames": 4, "frame_step": 1, "resolution": 64}
    sonic_training.main(flags(tiny, clips, cache, tmp_path / "out", max_train_steps=1, save_steps=1, **base))
    checkpoint = tmp_path / "out/checkpoint-1"
    architecture = open_checkpoint(checkpoint, extractor=sonic_training.load_extractor(spec)).architecture
    assert (architecture.audio_name, architecture.audio_layers, architecture.audio_width) == ("energy", 1, 2)
    with pytest.raises(UserError, match="trained on audio features 'energy'"):
        open_checkpoint(checkpoint, whisper_path=tiny / "whisper")


def run_script(*arguments):
    command = [sys.executable, ROOT / "sonic_training.py", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"mixed_precision": "fp16"}, "fp16 needs a CUDA GPU: use --mixed_precision bf16"),
        ({"data_root": "EMPTY"}, "EMPTY"),
        ({"data_root": "/nowhere"}, "/nowhere"),
        ({"model_path": "/nowhere"}, "/nowhere' does not exist"),
        ({"model_path": "checkpoints/whisper-tiny"}, "hf download openai/whisper-tiny"),
        ({"learning_rate": "-1"}, "--learning_rate: must be a number above 0"),
        ({"num_workers": "-1"}, "--num_workers: must be a whole number at least 0"),
        ({"train_batch_size": "1.5"}, "--train_batch_size: must be a whole number"),
        ({"resolution": 100}, "multiple of 64"),
        ({"report_to": "mail"}, "--report_to: must be one of none, wandb, tensorboard"),
        ({"lr_scheduler": "fast"}, "--lr_scheduler: must be one of"),
        ({"audio_drop_prob": "0.9", "both_drop_prob": "0.9"}, "must add up to 1 at most"),
        ({"resume_from_checkpoint": "/nowhere"}, "/nowhere"),
        ({"speed": "9"}, "there is no flag --speed"),
        ({"output_dir": "FILE/inside"}, "cannot write to output folder"),
        ({"learning_rate": "inf"}, "--learning_rate: must be a number"),
        ({"learning_rate": "1e30"}, "the last 3 steps had losses or gradients that are no number"),
        ({"data_root": "EMPTY", "dry_run": True}, "holds no video"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_input_is_one_sentence_and_exit_code_2(tiny, clips, cache, tmp_path, change, words, capsys):
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "FILE").write_text("")
    change = {
        name: value
        if value is True
        else str(value).replace("EMPTY", f"{tmp_path}/EMPTY").replace("FILE", f"{tmp_path}/FILE")
        for name, value in change.items()
    }
    arguments = flags(tiny, clips, cache, tmp_path / "output", **change)
    with pytest.raises(SystemExit) as stopped:
        sonic_training.run(lambda: sonic_training.main(arguments))
    printed = capsys.readouterr().err
    assert stopped.value.code == 2
    assert words in printed and "Traceback" not in printed
    assert not list((tmp_path / "output").glob("checkpoint-*"))


def test_the_script_itself_exits_with_2(tmp_path):
    finished = run_script("--data_root", tmp_path, "--model_path", "/nowhere", "--output_dir", tmp_path / "out")
    assert finished.returncode == 2
    lines = finished.stderr.splitlines()  # bitsandbytes, where it is installed, has a line of its own about CPUs
    assert lines[-1].startswith("error: checkpoint folder '/nowhere' does not exist")
    assert "Traceback" not in finished.stderr and not (tmp_path / "out").exists()
