"""What a run trains, run as a person runs it at the smallest size; the average; LoRA; the optimizers of the flags."""

import dataclasses
import importlib.util
import json
import re
import shutil

import pytest
import torch
from diffusers import UNetSpatioTemporalConditionModel
from runs import finish, fixed_batch, flags, fresh, losses, same, start, weights
from safetensors.torch import load_file

import sonic.lora
import sonic_training
from sonic.checkpoints import open_checkpoint
from sonic.config import UserError
from sonic.memory import Estimator
from sonic.optimizers import Muon, make_optimizer
from sonic.trainable import Trained, choose
from sonic.training import with_model_defaults
from sonic.training_config import TrainingConfig
from sonic.unet import SonicUNet
from sonic.validation import Validation

needs_peft = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed")
needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)
CPU = torch.device("cpu")

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


def is_trained(modules, name):
    """The answer by name, as it is written in docs/training.md; the module asks for classes."""
    if name.endswith("attn2.to_k.weight"):
        return False
    if modules == "all" or not name.startswith("unet.") or ".processor." in name:
        return True
    attention = ".attn1." in name or ".attn2." in name
    return attention and (modules == "attention" or (modules == "lora" and name.endswith("weight")))


@pytest.fixture(scope="module")
def run(tiny, clips, cache, tmp_path_factory):
    """Runs of four steps with checkpoints at 2 and 4, each made once: run(flag=value, ...) gives its folder."""
    made = {}

    def make(**more):
        key = json.dumps(more, sort_keys=True)
        if key not in made:
            made[key] = tmp_path_factory.mktemp("run")
            sonic_training.main(flags(tiny, clips, cache, made[key], **more))
            fresh()
        return made[key]

    return make


WAYS = {
    "attention": {"train_modules": "attention"},
    "audio": {"train_modules": "audio", "mixed_precision": "bf16", "ema_decay": 0.9, "ema_device": "cpu"},
    "lora": {"train_modules": "lora", "lora_rank": 3, "mixed_precision": "bf16", "ema_decay": 0.9},
    "lora in fp32": {"train_modules": "lora"},
    "8 bit": {"use_8bit_adam": True},
}
MARKS = {"lora": needs_peft, "lora in fp32": needs_peft, "8 bit": needs_bitsandbytes}
every_way = pytest.mark.parametrize("way", [pytest.param(way, marks=MARKS.get(way, ())) for way in WAYS])


@every_way
def test_what_is_trained_changes_and_nothing_else(run, tiny, way):
    start, end = weights(tiny), weights(run(**WAYS[way]) / "checkpoint-2")
    assert start.keys() == end.keys() and {tensor.dtype for tensor in end.values()} == {torch.float32}
    changed = {name for name in start if not torch.equal(start[name], end[name])}
    assert changed == {name for name in start if is_trained(WAYS[way].get("train_modules", "all"), name)}


@every_way
def test_the_optimizer_keeps_no_more(run, tiny, way):
    config = TrainingConfig(data_root="x", **WAYS[way])
    (path,) = (run(**WAYS[way]) / "checkpoint-4/state").glob("optimizer*")
    state = torch.load(path, weights_only=True)["state"]
    trained = Trained(open_checkpoint(tiny).load(), config, open_checkpoint(tiny), None, CPU)
    assert len(state) == len(trained.parameters)
    assert all(value.requires_grad == (name in trained.parameters) for name, value in trained.model.named_parameters())


@every_way
def test_resumed_equals_unbroken_bit_for_bit(run, tiny, clips, cache, tmp_path, way):
    unbroken = run(**WAYS[way])
    shutil.copytree(unbroken / "checkpoint-2", tmp_path / "checkpoint-2")
    shutil.copy(unbroken / "log.jsonl", tmp_path / "log.jsonl")
    sonic_training.main(flags(tiny, clips, cache, tmp_path, resume_from_checkpoint="latest", **WAYS[way]))
    assert losses(tmp_path) == losses(unbroken)
    files = [path.relative_to(unbroken) for path in unbroken.glob("checkpoint-4/**/*.safetensors")]
    assert len(files) == 3 + ("ema_decay" in WAYS[way]) + 2 * ("lora" in way)
    for file in files:
        assert same(load_file(tmp_path / file), load_file(unbroken / file)), file


@every_way
def test_both_forms_of_a_checkpoint_are_whole(run, tiny, way):
    checkpoint = run(**WAYS[way]) / "checkpoint-4"
    own = open_checkpoint(checkpoint).load().state_dict()
    released = open_checkpoint(checkpoint / "released", tiny / "base", tiny / "whisper").load().state_dict()
    assert same(own, released) and own.keys() == open_checkpoint(tiny).load().state_dict().keys()


@pytest.mark.parametrize("modules", ["attention", "audio", pytest.param("lora", marks=needs_peft)])
def test_frozen_weights_in_half_precision_give_the_same_losses(parts, modules, monkeypatch):
    """Bit for bit: autocast rounds the matrices to the same values."""
    start, config, _, _ = parts
    config = dataclasses.replace(config, train_modules=modules, mixed_precision="bf16")
    batch, noise = fixed_batch(parts)

    def gradients(half):
        monkeypatch.setattr("sonic.trainable.PRECISIONS", {"bf16": torch.bfloat16 if half else torch.float32})
        torch.manual_seed(0)
        trained = Trained(start.load(), config, start, None, CPU)
        with torch.autocast("cpu", torch.bfloat16):
            found = trained.model(batch.with_noise(noise))
        (found.velocity + found.bucket).backward()
        dtypes = {value.dtype for value in trained.model.parameters()}
        assert dtypes == ({torch.float32, torch.bfloat16} if half else {torch.float32})
        assert {value.dtype for value in trained.parameters.values()} == {torch.float32}
        return {"loss": found.velocity_map.detach()} | {name: value.grad for name, value in trained.parameters.items()}

    assert same(gradients(half=True), gradients(half=False))


def test_half_precision_is_not_the_input_of_the_unet(tiny):
    start, config = open_checkpoint(tiny), TrainingConfig(data_root="x", train_modules="audio", mixed_precision="bf16")
    model = Trained(start.load(), config, start, None, CPU).model
    assert model.unet.conv_in.weight.dtype == torch.bfloat16 and model.dtype == torch.float32
    assert start.load(torch.bfloat16).dtype == torch.bfloat16


def test_the_average_equals_one_by_hand(run, tiny, clips, cache, tmp_path):
    """Of the weights after each step, which a run without an average saves; and that one is not disturbed by it."""
    more = {"max_train_steps": 3, "save_steps": 1}
    sonic_training.main(flags(tiny, clips, cache, tmp_path / "raw", **more))
    fresh()
    sonic_training.main(flags(tiny, clips, cache, tmp_path / "averaged", ema_decay=0.25, **more))
    raw = [weights(tiny)] + [weights(tmp_path / f"raw/checkpoint-{step}") for step in (1, 2, 3)]
    for name, shipped in weights(tmp_path / "averaged/checkpoint-3").items():
        average = raw[0][name].double()
        for decay, step in zip((2 / 11, 3 / 12, 0.25), raw[1:], strict=True):  # warm-up, then the flag's
            average = decay * average + (1 - decay) * step[name].double()
        assert torch.allclose(shipped.double(), average, rtol=1e-5, atol=1e-7), name
    kept = load_file(tmp_path / "averaged/checkpoint-3/state/raw.safetensors")
    assert kept.keys() == {name for name in raw[3] if is_trained("all", name)}
    assert all(torch.equal(value, raw[3][name]) for name, value in kept.items())
    assert losses(tmp_path / "averaged") == losses(tmp_path / "raw")


def test_two_processes_keep_one_average(tiny, clips, cache, tmp_path):
    """With frozen weights in half precision, which DDP hands around as well."""
    more = WAYS["audio"] | {"max_train_steps": 2, "save_steps": 1}
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    finish(
        start(flags(tiny, clips, cache, tmp_path / "two", **more), tmp_path, torchrun, ACCELERATE_USE_CPU="1"),
        tmp_path,
    )
    sonic_training.main(flags(tiny, clips, cache, tmp_path / "one", train_batch_size=2, **more))
    for step, expected in losses(tmp_path / "one").items():
        assert losses(tmp_path / "two")[step] == pytest.approx(expected, rel=0.02)  # bf16
    first, second = (weights(tmp_path / f"two/checkpoint-{step}") for step in (1, 2))
    raw = load_file(tmp_path / "two/checkpoint-2/state/raw.safetensors")
    for name, value in raw.items():
        assert torch.allclose(second[name], first[name].lerp(value, 0.75), rtol=1e-5, atol=1e-7)
    frozen = first.keys() - raw.keys()
    assert frozen and all(torch.equal(second[name], weights(tiny)[name]) for name in frozen)


@pytest.mark.parametrize("device", ["auto", "cpu"])
def test_the_average_is_what_is_validated(tiny, clips, cache, tmp_path, monkeypatch, device):
    seen = []

    def measure(self, model):
        seen.append(model.audio2token.proj1.weight.detach().clone())
        return {"validation_loss": 1.0}

    monkeypatch.setattr(Validation, "measure", measure)
    monkeypatch.setattr(Validation, "video", lambda *_: None)
    more = {"max_train_steps": 2, "validation_steps": 1, "ema_decay": 0.5, "ema_device": device}
    sonic_training.main(flags(tiny, clips, cache, tmp_path, **more))
    name = "audio2token.proj1.weight"
    shipped, raw = weights(tmp_path / "checkpoint-2")[name], load_file(tmp_path / "checkpoint-2/state/raw.safetensors")
    assert torch.equal(seen[0], weights(tiny)[name]) and torch.equal(seen[-1], shipped)
    assert not torch.equal(shipped, raw[name])


def test_an_average_may_begin_or_end_when_a_run_is_resumed(run, tiny):
    averaged, plain = run(**WAYS["audio"]) / "checkpoint-2", run(**WAYS["attention"]) / "checkpoint-2"
    config = TrainingConfig(data_root="x", train_modules="audio")
    trained = Trained(open_checkpoint(averaged).load(), config, open_checkpoint(averaged), averaged, CPU)
    assert trained.average is None and same(trained.parameters, load_file(averaged / "state/raw.safetensors"))
    config = TrainingConfig(data_root="x", train_modules="attention", ema_decay=0.9)
    trained = Trained(open_checkpoint(plain).load(), config, open_checkpoint(plain), plain, CPU)
    assert same(dict(zip(trained.parameters, trained.average.values, strict=True)), trained.parameters)


def with_random_lora(start, **more):
    """A model whose adapters do something."""
    trained = Trained(
        start.load(), TrainingConfig(data_root="x", train_modules="lora", lora_rank=3, **more), start, None, CPU
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in trained.parameters.items():
            if "lora_B" in name:
                value.copy_(0.3 * torch.randn(value.shape, generator=generator))
    return trained


@needs_peft
def test_the_merged_model_does_what_base_and_lora_do(parts):
    start = parts[0]
    trained, (clip, noise) = with_random_lora(start), fixed_batch(parts)
    batch = clip.with_noise(noise)
    with torch.no_grad():
        layered, merged, without = (
            model(batch).velocity_map for model in (trained.model, trained.plain(), start.load())
        )
    assert torch.allclose(layered, merged, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(layered, without, rtol=1e-2)


@needs_peft
def test_peft_reads_the_lora_folder(tiny, tmp_path):
    """Its own loader puts the matrices into a stock UNet, where they do what they did here."""
    from peft import PeftModel

    start = open_checkpoint(tiny)
    trained = with_random_lora(start)
    trained.save(tmp_path)
    stock = UNetSpatioTemporalConditionModel(**start.architecture.unet)
    base = {name: value for name, value in start.load().unet.state_dict().items() if ".processor." not in name}
    stock.load_state_dict(base)
    merged = PeftModel.from_pretrained(stock, tmp_path / "lora").merge_and_unload().state_dict()
    expected = load_file(tmp_path / "unet.safetensors")
    assert any(not torch.equal(merged[name], base[name]) for name in base)
    assert all(torch.allclose(merged[name], expected[name], rtol=1e-5, atol=1e-6) for name in base)


@needs_peft
@pytest.mark.parametrize("way", ["lora", "lora in fp32"])
def test_merging_later_gives_the_checkpoints_weights(run, tiny, tmp_path, way):
    checkpoint = run(**WAYS[way]) / "checkpoint-4"
    sonic.lora.main(["--lora", str(checkpoint / "lora"), "--output", str(tmp_path / "merged")])
    assert same(weights(tmp_path / "merged"), weights(checkpoint))
    assert open_checkpoint(tmp_path / "merged").settings == open_checkpoint(checkpoint).settings
    released = open_checkpoint(tmp_path / "merged/released", tiny / "base", tiny / "whisper").load()
    assert same(released.state_dict(), open_checkpoint(checkpoint).load().state_dict())
    with pytest.raises(UserError, match="exists already"):
        sonic.lora.main(["--lora", str(checkpoint / "lora"), "--output", str(tmp_path / "merged")])


@needs_peft
def test_lora_on_a_base_folder_that_moved(tiny, clips, cache, tmp_path):
    """From Stable Video Diffusion's layout, which has no audio attention and no adapters: what these learn lies in lora/."""
    shutil.copytree(tiny / "base", tmp_path / "base")
    size = {"num_frames": 4, "frame_step": 1, "resolution": 64, "whisper_path": tiny / "whisper"}
    more = {"train_modules": "lora", "model_path": tmp_path / "base", **size}
    sonic_training.main(flags(tiny, clips, cache, tmp_path / "unbroken", **more))
    fresh()
    shutil.copytree(tmp_path / "unbroken/checkpoint-2", tmp_path / "resumed/checkpoint-2")
    (tmp_path / "base").rename(tmp_path / "moved")
    more |= {"resume_from_checkpoint": "latest", "base_model": tmp_path / "moved"}
    with pytest.raises(UserError, match=r"missing or has changed: give the same model with --model_path"):
        sonic_training.main(flags(tiny, clips, cache, tmp_path / "resumed", **more))
    more |= {"model_path": tmp_path / "moved"}
    sonic_training.main(flags(tiny, clips, cache, tmp_path / "resumed", **more))
    assert same(weights(tmp_path / "resumed/checkpoint-4"), weights(tmp_path / "unbroken/checkpoint-4"))

    other = load_file(tmp_path / "moved/unet/diffusion_pytorch_model.safetensors")
    next(iter(other.values())).add_(1)
    sonic.lora.digest.cache_clear()
    sonic.lora.save_file(other, tmp_path / "moved/unet/diffusion_pytorch_model.safetensors")
    with pytest.raises(UserError, match=r"missing or has changed"):
        sonic.lora.open_lora(tmp_path / "resumed/checkpoint-4/lora", tmp_path / "moved", tmp_path / "moved")


@needs_peft
def test_a_damaged_lora_folder_is_named(run, tiny, tmp_path):
    folder = shutil.copytree(run(**WAYS["lora"]) / "checkpoint-2/lora", tmp_path / "lora")
    whole = load_file(folder / "trained_whole.safetensors")
    whole.pop("audio2token.norm.bias")
    sonic.lora.save_file(whole, folder / "trained_whole.safetensors")
    trained = with_random_lora(open_checkpoint(tiny))
    with pytest.raises(UserError, match=r"trained_whole.*'audio2token.norm.bias' has shape None, expected"):
        sonic.lora.load_lora(folder, trained.model)
    (folder / "adapter_model.safetensors").write_bytes(b"junk")
    with pytest.raises(UserError, match=r"adapter_model.*cannot be read as weights"):
        sonic.lora.open_lora(folder)


def test_the_start_may_be_deleted_while_the_run_goes_on(tiny, tmp_path):
    folder = shutil.copytree(tiny, tmp_path / "start")
    start = open_checkpoint(folder)
    config = TrainingConfig(data_root="x", train_modules="audio", mixed_precision="bf16")
    trained = Trained(start.load(), config, start, None, CPU)
    (folder / "unet.safetensors").unlink()
    found, expected = trained.plain().state_dict(), open_checkpoint(tiny).load().state_dict()
    assert same(found, expected)


def test_memory_estimate_follows_what_is_trained(tiny):
    start = open_checkpoint(tiny)
    config = TrainingConfig(data_root="x", mixed_precision="bf16", validation_steps=0)
    config = with_model_defaults(config, start.settings)
    estimator = Estimator(start, choose, on_gpu=False)
    full, some = estimator(config), estimator(dataclasses.replace(config, train_modules="audio"))
    model = start.load()
    choose(model, dataclasses.replace(config, train_modules="audio"))
    own = sum(value.numel() for value in model.parameters() if value.requires_grad)
    assert some.parameters["trainable"] == own < full.parameters["trainable"]
    assert some.parameters["all"] == full.parameters["all"]
    assert some.parts["weights"] == sum(value.nbytes for value in model.parameters()) < 0.8 * full.parts["weights"]
    assert some.parts["optimizer"] == 8 * own


@needs_peft
def test_memory_estimate_with_lora(tiny):
    start = open_checkpoint(tiny)
    config = TrainingConfig(data_root="x", train_modules="lora", validation_steps=0)
    config = with_model_defaults(config, start.settings)
    trained = Trained(start.load(), config, start, None, CPU)
    found = Estimator(start, choose, on_gpu=False)(config).parameters["trainable"]
    assert found == sum(value.numel() for value in trained.parameters.values())


def test_the_optimizer_is_fused_unless_it_has_a_gradient_scaler():
    config = TrainingConfig(data_root="x")
    weight = [torch.nn.Parameter(torch.zeros(20, 20))]
    assert make_optimizer(config, weight).param_groups[0]["fused"] is True
    assert make_optimizer(dataclasses.replace(config, mixed_precision="fp16"), weight).param_groups[0]["fused"] is False
    assert isinstance(make_optimizer(dataclasses.replace(config, optimizer="muon"), weight), Muon)


def test_every_attention_layer_has_adapters_where_it_can_learn(tiny):
    """The pattern for peft against the modules themselves."""
    unet = SonicUNet(**open_checkpoint(tiny).architecture.unet)
    named = [name for name, _ in unet.named_modules() if re.fullmatch(sonic.lora.TARGETS, name)]
    assert len(named) == 7 * len(unet.cross_attentions())  # four of attn1, three of attn2


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"train_modules": "some"}, "must be one of all, attention, audio, lora"),
        ({"lora_rank": 4}, "lora_rank is for --train_modules lora"),
        ({"train_modules": "audio", "lora_rank": 4}, "lora_rank is for --train_modules lora"),
        ({"train_modules": "lora", "lora_rank": 0}, "must be a whole number at least 1"),
        ({"optimizer": "muon", "use_8bit_adam": True}, "leave it away with --optimizer muon"),
        ({"ema_device": "cpu"}, "give --ema_decay too"),
        ({"ema_decay": 1.5}, "at most 1"),
        ({"ema_decay": 0.9, "ema_device": "gpu"}, "must be one of auto, cpu"),
    ],
)
def test_bad_input(change, words):
    with pytest.raises(UserError, match=words):
        TrainingConfig(data_root="x", **change)


def test_the_rank_has_a_default():
    assert TrainingConfig(data_root="x", train_modules="lora").lora_rank == 16
    assert TrainingConfig(data_root="x").lora_rank is None


@pytest.mark.parametrize(
    ("change", "package"), [({"train_modules": "lora"}, "peft"), ({"use_8bit_adam": True}, "bitsandbytes")]
)
def test_a_missing_package_is_named_before_anything_is_done(tiny, clips, cache, tmp_path, monkeypatch, change, package):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=f"pip install {package}"):
        sonic_training.main(flags(tiny, clips, cache, tmp_path / "out", **change))
    assert not (tmp_path / "out").exists()


def test_resuming_with_other_flags_is_refused(run, tiny, clips, cache, tmp_path):
    shutil.copytree(run(**WAYS["attention"]) / "checkpoint-2", tmp_path / "checkpoint-2")
    with pytest.raises(UserError, match=r"cannot resume .* with --train_modules audio instead of attention"):
        sonic_training.main(flags(tiny, clips, cache, tmp_path, train_modules="audio", resume_from_checkpoint="latest"))
