import dataclasses
import json
import pickle
import shutil

import pytest
import torch
from conftest import TINY
from safetensors.torch import load_file, save_file
from transformers import WhisperConfig, WhisperForConditionalGeneration

from sonic.checkpoints import (
    PARTS,
    create_whisper,
    load_base,
    load_whisper,
    open_checkpoint,
    save_released,
    training_checkpoints,
)
from sonic.config import UserError
from sonic.files import atomic_folder
from sonic.weights import locate, read_tensors


@pytest.fixture
def copied(tiny, tmp_path):
    """A checkpoint that a test may damage."""
    return shutil.copytree(tiny, tmp_path / "copy")


def equal(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def test_own_form_and_released_form_give_the_same_model(tiny, tmp_path):
    own = open_checkpoint(tiny)
    denoiser = own.load()
    save_released(tmp_path, denoiser)
    released = open_checkpoint(tmp_path, tiny / "base", tiny / "whisper")
    assert released.architecture == own.architecture
    assert equal(released.load(), denoiser)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["audio2bucket.pth", "audio2token.pth", "unet.pth"]
    for part in PARTS:
        saved = torch.load(tmp_path / f"{part}.pth", weights_only=True)
        assert list(saved) == list(getattr(denoiser, part).state_dict())


def test_from_a_base_folder_alone(tiny):
    start = open_checkpoint(tiny / "base", whisper_path=tiny / "whisper")
    denoiser = start.load()
    base = load_file(tiny / "base/unet/diffusion_pytorch_model.safetensors")
    loaded = denoiser.unet.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in base.items())
    assert len(loaded) == len(base) + 2 * len(denoiser.unet.cross_attentions())
    for attn in denoiser.unet.cross_attentions():
        assert torch.equal(attn.processor.to_k_ip[0].weight, attn.to_k.weight)
    assert start.architecture.adapter_hidden == 1024 and start.architecture.audio_tokens == 32
    assert not any(parameter.is_meta for parameter in denoiser.parameters())


def test_fp16_variant_files(copied):
    expected = load_base(copied / "base")
    for stem in ("unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "image_encoder/model"):
        path = copied / "base" / f"{stem}.safetensors"
        save_file(
            {name: tensor.half() for name, tensor in load_file(path).items()}, path.with_suffix(".fp16.safetensors")
        )
        path.unlink()
    found = load_base(copied / "base")
    for part in ("vae", "image_encoder"):
        halved = getattr(expected, part).half().float()
        assert equal(getattr(found, part), halved)
        assert next(getattr(found, part).parameters()).dtype == torch.float32
    open_checkpoint(copied / "base", whisper_path=copied / "whisper").load()


def test_whisper_as_transformers_saves_it(tmp_path):
    config = WhisperConfig(
        **TINY.whisper, decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=16, vocab_size=64
    )
    config.pad_token_id = config.bos_token_id = config.eos_token_id = config.decoder_start_token_id = 0
    model = WhisperForConditionalGeneration(config)
    model.save_pretrained(tmp_path / "safe")
    config.save_pretrained(tmp_path / "bin")
    torch.save(model.state_dict(), tmp_path / "bin/pytorch_model.bin")
    for folder in ("safe", "bin"):
        assert equal(load_whisper(tmp_path / folder).encoder, model.model.encoder)


def test_base_is_frozen(tiny):
    base = load_base(tiny / "base")
    parameters = [parameter for part in (base.vae, base.image_encoder) for parameter in part.parameters()]
    assert not any(parameter.requires_grad or parameter.is_meta for parameter in parameters)


def test_a_vae_in_bf16_works_in_channels_last(tiny):
    """Twice as fast on CPUs. In float32 it is not, so weights lie as they come; pictures are the same but for rounding."""
    single, half = load_base(tiny / "base").vae, load_base(tiny / "base", vae_dtype=torch.bfloat16).vae
    for vae, laid_out in ((single, False), (half, True)):
        weight = vae.encoder.down_blocks[0].resnets[0].conv1.weight
        assert weight.is_contiguous(memory_format=torch.channels_last) == laid_out
    torch.manual_seed(0)
    pixels = torch.rand(2, 3, 64, 64) * 2 - 1
    expected = single.encode(pixels).latent_dist.mode()
    found = half.encode(pixels.bfloat16()).latent_dist.mode()
    assert (found - expected).norm() / expected.norm() < 0.03


@pytest.mark.parametrize("part", PARTS)
def test_a_missing_part_is_named(copied, part):
    (copied / f"{part}.safetensors").unlink()
    with pytest.raises(UserError, match=f"{part}.safetensors' is missing"):
        open_checkpoint(copied).load()


@pytest.mark.parametrize(
    ("path", "command"),
    [
        ("checkpoints/stable-video-diffusion-img2vid-xt", "hf download stabilityai/stable-video-diffusion-img2vid-xt"),
        ("checkpoints/Sonic", "hf download LeonJoe13/Sonic"),
        ("elsewhere/whisper-tiny", "hf download openai/whisper-tiny"),
    ],
)
def test_a_missing_folder_comes_with_its_download_command(path, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sonic.weights.ROOT", tmp_path)
    with pytest.raises(UserError, match=rf"{path}' does not exist; get it with: {command}"):
        locate(path, "model")
    (tmp_path / path).mkdir(parents=True)
    assert locate(path, "model").is_dir()


def test_missing_weights_say_where_they_were_looked_for(copied):
    (copied / "base/vae/diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"base/vae': looked for diffusion_pytorch_model\.safetensors, .*fp16"):
        load_base(copied / "base")


def test_an_empty_folder_is_no_checkpoint(tmp_path):
    with pytest.raises(UserError, match=r"neither sonic\.json nor unet\.pth nor a unet/ folder"):
        open_checkpoint(tmp_path, whisper_path=tmp_path)


def test_a_wrong_shape_names_tensor_expected_and_found(copied):
    tensors = load_file(copied / "audio2token.safetensors")
    tensors["proj2.weight"] = torch.zeros(5, 7)
    save_file(tensors, copied / "audio2token.safetensors")
    with pytest.raises(UserError, match=r"tensor 'proj2\.weight' has shape \(5, 7\), expected \(32, 32\)"):
        open_checkpoint(copied).load()


def test_missing_and_unknown_tensors(copied):
    tensors = load_file(copied / "unet.safetensors")
    kept = tensors.pop("conv_in.bias")
    save_file(tensors, copied / "unet.safetensors")
    with pytest.raises(UserError, match=r"has no tensor 'conv_in\.bias'"):
        open_checkpoint(copied).load()
    save_file({**tensors, "conv_in.bias": kept, "extra": kept.clone()}, copied / "unet.safetensors")
    with pytest.raises(UserError, match="1 tensors that do not belong here, 'extra'"):
        open_checkpoint(copied).load()


def test_broken_files(copied):
    whole = (copied / "unet.safetensors").read_bytes()
    (copied / "unet.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"unet\.safetensors' cannot be read as weights"):
        open_checkpoint(copied).load()
    (copied / "sonic.json").write_text("{not json")
    with pytest.raises(UserError, match=r"sonic\.json' is not a JSON file"):
        open_checkpoint(copied)


class Evil:
    def __reduce__(self):
        return (print, ("code from a checkpoint ran",))


def test_a_pth_file_cannot_run_code(tmp_path, capsys):
    torch.save({"weight": Evil()}, tmp_path / "unet.pth")
    with pytest.raises(UserError, match=r"unet\.pth' cannot be read as weights"):
        read_tensors(tmp_path / "unet.pth")
    (tmp_path / "raw.pth").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(UserError):
        read_tensors(tmp_path / "raw.pth")
    assert "ran" not in capsys.readouterr().out


def test_an_extractor_must_be_the_one_trained_with(tiny):
    class Other:
        name, layers, width = "other", 1, 2

    with pytest.raises(UserError, match="trained on audio features 'whisper', not 'other'"):
        open_checkpoint(tiny, extractor=Other)


def test_a_whisper_of_another_size_is_refused(tiny, tmp_path):
    create_whisper(tmp_path, dataclasses.replace(TINY, whisper={**TINY.whisper, "d_model": 8}))
    words = r"reads audio features of 2 layers and width 16, but 'whisper' \(.*\) gives 2 layers and width 8"
    with pytest.raises(UserError, match=words):
        open_checkpoint(tiny, whisper_path=tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"base_model": None}, "base_model and whisper_path must be paths"),
        ({"whisper_path": 7}, "base_model and whisper_path must be paths"),
        ({"architecture": {}}, r"sonic\.json' describes nothing that can be built"),
        ({"settings": {"num_frames": "four"}}, r"sonic\.json': num_frames must be a whole number"),
        ({"settings": {"frame_step": 1.5}}, "frame_step must be"),
        ({"settings": {"crop": "a"}}, "crop must be"),
        ({"settings": {"speed": 1}}, "describes nothing"),
        ({"format": 99}, "has format 99, this version reads 1"),
    ],
)
def test_a_broken_index_is_one_sentence(copied, change, words):
    path = copied / "sonic.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(UserError, match=words):
        open_checkpoint(copied).load()


@pytest.mark.parametrize(
    ("file", "change", "load"),
    [
        (
            "sonic.json",
            {"architecture": {"unet": {"num_attention_heads": [1]}}},
            lambda path: open_checkpoint(path).load(),
        ),
        ("base/vae/config.json", {"block_out_channels": [3, 5]}, lambda path: load_base(path / "base")),
        ("base/image_encoder/config.json", {"hidden_size": "x"}, lambda path: load_base(path / "base")),
        ("base/scheduler/scheduler_config.json", {"beta_schedule": "odd"}, lambda path: load_base(path / "base")),
        ("whisper/config.json", {"encoder_attention_heads": 7}, lambda path: load_whisper(path / "whisper")),
    ],
)
def test_a_broken_configuration_is_one_sentence(copied, file, change, load):
    content = json.loads((copied / file).read_text())
    for key, value in change.items():
        content[key] = {**content[key], **value} if isinstance(value, dict) else value
        if key == "architecture":
            content[key]["unet"] = {**json.loads((copied / "sonic.json").read_text())[key]["unet"], **value["unet"]}
    (copied / file).write_text(json.dumps(content))
    with pytest.raises(UserError, match="describes nothing that can be built"):
        load(copied)


def test_a_base_model_of_another_size_is_refused(tiny, copied):
    path = copied / "base/image_encoder/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "projection_dim": 24}))
    with pytest.raises(UserError, match=r"reads CLIP embeddings of width 16, but the base model .* gives 24"):
        open_checkpoint(tiny, base_model=copied / "base")


def test_a_crash_between_two_renames_loses_nothing(tmp_path):
    """Whatever moment it is: the old folder under its own or under its spare name, never none."""
    (tmp_path / ".checkpoint-5.old").mkdir()
    (tmp_path / ".checkpoint-5.old/a").write_text("old")
    assert [path.name for path in training_checkpoints(tmp_path)] == ["checkpoint-5"]
    assert (tmp_path / "checkpoint-5/a").read_text() == "old"

    class Stop(KeyboardInterrupt):
        pass

    def stop():
        calls.append(None)
        if len(calls) == 2:  # all is written; nothing has been renamed yet
            (tmp_path / "checkpoint-5").rename(tmp_path / ".checkpoint-5.old")
            raise Stop

    calls = []
    with pytest.raises(Stop), atomic_folder(tmp_path / "checkpoint-5", wait=stop) as folder:
        (folder / "a").write_text("new")
    assert (tmp_path / "checkpoint-5/a").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-5"]


def test_training_checkpoints_are_sorted_by_step(tmp_path):
    for name in ("checkpoint-100", "checkpoint-20", ".checkpoint-200.partial", "checkpoint-x"):
        (tmp_path / name).mkdir()
    assert [path.name for path in training_checkpoints(tmp_path)] == ["checkpoint-20", "checkpoint-100"]
