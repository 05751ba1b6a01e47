"""The estimate against what torch's allocator really gave out, and against the sizes that are to be reached."""

import dataclasses
import itertools
import json
import re

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import sonic_training
from sonic import memory
from sonic.checkpoints import Architecture, Checkpoint, open_checkpoint
from sonic.config import PRESETS, TrainingConfig, UserError
from sonic.memory import Estimator, Live, empty_batch, flags_that_fit, inside_kernel, surely_small, train_step
from sonic.optimizers import OPTIMIZERS
from sonic.training import choose_trainable, with_model_defaults

# What a full-size run is constructed with, in every combination; a value of these flags more is a word more here.
TRAIN_MODULES = ["all"]
PRECISIONS = ["no", "fp16", "bf16"]
CACHING = [False, True]
SVD = PRESETS["svd-xt"]


@pytest.fixture(scope="module")
def start(tiny):
    return open_checkpoint(tiny)


@pytest.fixture(scope="module")
def config(start):
    return with_model_defaults(TrainingConfig(data_root="x", validation_steps=0), start.settings)


@pytest.fixture(scope="module")
def full_size(tmp_path_factory):
    """Stable Video Diffusion's sizes without its weights."""
    base = tmp_path_factory.mktemp("svd")
    for part, values in (("vae", SVD.vae), ("image_encoder", SVD.image_encoder)):
        (base / part).mkdir()
        (base / part / "config.json").write_text(json.dumps(values))
    layers, width = SVD.whisper["encoder_layers"] + 1, SVD.whisper["d_model"]
    architecture = Architecture(SVD.unet, "whisper", layers, width, SVD.image_encoder["projection_dim"])
    return Checkpoint(architecture, SVD.settings, {}, base, None)


def audio_only(model, config):
    """What --train_modules audio trains."""
    choose_trainable(model, config)
    if config.train_modules == "audio":
        for name, parameter in model.unet.named_parameters():
            parameter.requires_grad_(".processor." in name)


def ready(start, config):
    model = start.load().train()
    choose_trainable(model, config)
    if config.gradient_checkpointing:
        model.unet.enable_gradient_checkpointing()
    return model


def allocated(step) -> int:
    """The most bytes that torch's CPU allocator had given out at once while `step` ran, by the profiler's record."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        step()
    now = peak = 0
    for event in record.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"train_batch_size": 3},
        {"gradient_checkpointing": True},
        {"mixed_precision": "bf16"},
        {"train_batch_size": 2, "noise_draws": 2, "mixed_precision": "bf16", "gradient_checkpointing": True},
        {"gradient_accumulation_steps": 2},
    ],
)
def test_a_step_without_storage_takes_what_a_real_one_is_given(start, config, flags):
    config = dataclasses.replace(config, **flags)
    estimator = Estimator(start, choose_trainable, on_gpu=False)
    estimate = estimator(config)
    expected = sum(estimator.step(config).at_peak.values())

    def step(model):
        train_step(model, empty_batch(start.architecture, config), lambda: estimator.precision(config))

    def steps(model):
        for _ in range(min(config.gradient_accumulation_steps, 2)):
            step(model)

    model = ready(start, config)
    real = allocated(lambda: steps(model))
    assert expected == pytest.approx(real, rel=0.02)
    assert estimate.parts["weights"] == sum(parameter.nbytes for parameter in model.parameters())
    if config.gradient_accumulation_steps == 1:
        model = ready(start, config)
        with Live([*model.parameters(), *model.buffers()], on_gpu=False) as live:
            step(model)
        assert live.peak == pytest.approx(real, rel=0.02)


def test_encoders_without_storage_take_what_real_ones_do(start, tiny, config):
    from sonic.checkpoints import load_base

    frozen, encoding, decoding = Estimator(start, choose_trainable, on_gpu=False).frozen(1, 4, 64, False)
    base = load_base(tiny / "base")
    assert sum(value.nbytes for value in frozen) == sum(
        value.nbytes for part in (base.vae, base.image_encoder) for value in part.parameters()
    )

    @torch.no_grad()
    def decode():
        base.vae.decode(torch.zeros(4, 4, 8, 8), num_frames=4)

    @torch.no_grad()
    def encode():
        base.latents(torch.zeros(4, 3, 64, 64))

    assert encoding == pytest.approx(allocated(encode), rel=0.05)
    assert decoding == pytest.approx(allocated(decode), rel=0.05)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_what_an_optimizer_remembers_and_takes(start, config, optimizer):
    config = dataclasses.replace(config, optimizer=optimizer)
    model = ready(start, config)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.grad = torch.ones_like(parameter)
    kind = OPTIMIZERS[optimizer](trainable, lr=1e-3, weight_decay=0.0)
    kind.step()
    state = sum(value.nbytes for held in kind.state.values() for value in held.values() if value.ndim)
    assert memory.optimizer_bytes(config, trainable) == state
    assert allocated(kind.step) <= 1.02 * memory.update_bytes(config, trainable, on_gpu=False) + 10_000
    if optimizer == "adamw":  # as on a GPU
        for group in kind.param_groups:
            group["foreach"] = True
        assert memory.update_bytes(config, trainable, on_gpu=True) == pytest.approx(allocated(kind.step), rel=0.02)


def test_the_flags_of_others_count(start, config):
    """8-bit Adam, the average's place, cached latents: each part that they change, and nothing else."""
    estimator = Estimator(start, choose_trainable, on_gpu=True)
    plain = estimator(config)

    def differs(**flags):
        other = estimator(dataclasses.replace(config, **flags)).parts
        return {name for name in {*plain.parts, *other} if plain.parts.get(name) != other.get(name)}

    assert differs(use_8bit_adam=True) == {"optimizer"}
    assert differs(ema_decay=0.99) == {"moving average"}
    assert differs(ema_decay=0.99, ema_device="cpu") == set()
    assert "encoders" in differs(cache_latents=True)
    assert "encoders" not in differs(cache_latents=True, validation_steps=5) - {"working space", "activations"}
    large = torch.empty(8192, device="meta")
    assert memory.optimizer_bytes(dataclasses.replace(config, use_8bit_adam=True), [large]) == 2 * 8192


def test_a_gpu_keeps_norms_in_fp32_and_takes_room_inside_its_kernels(start, config):
    half = dataclasses.replace(config, mixed_precision="bf16", cache_latents=True)
    cpu, gpu = (Estimator(start, choose_trainable, on_gpu).step(half).at_peak for on_gpu in (False, True))
    assert gpu["activations"] > 1.1 * cpu["activations"]
    query = torch.zeros(6, 5, 25, 64, dtype=torch.bfloat16, device="meta")
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
    assert inside_kernel(attention, (query, query), None) == 6 * 5 * 128 * 64 * 4
    assert inside_kernel(attention, (query.float(), query.float()), None) == 0
    picture = torch.zeros(1, 8, 16, 16, device="meta")
    assert inside_kernel(torch.ops.aten.convolution.default, (picture,), picture[:, :4]) == 12 * 256 * 4


def test_small_runs_are_let_through_without_an_estimate(start, config):
    for flags in ({}, {"train_batch_size": 2, "gradient_checkpointing": True}):
        config = dataclasses.replace(config, **flags)
        step = Estimator(start, choose_trainable, on_gpu=False).step(config)
        assert sum(step.at_peak.values()) < surely_small(start, config)


def test_flags_that_fit_are_found_by_trying(start, config):
    config = dataclasses.replace(config, train_batch_size=2)
    estimator = Estimator(start, choose_trainable, on_gpu=True)
    plain = estimator(config).total
    checkpointed = estimator(dataclasses.replace(config, gradient_checkpointing=True)).total
    assert checkpointed < plain
    flags, found = flags_that_fit(estimator, config, checkpointed)
    assert flags == "--gradient_checkpointing" and found.total == checkpointed
    flags, found = flags_that_fit(estimator, config, checkpointed - 1)
    assert "--gradient_checkpointing" in flags and "--" in flags[5:] and found.total < checkpointed
    assert flags_that_fit(estimator, config, 1000) is None


def command(tiny, clips, output, *flags):
    paths = ["--model_path", tiny, "--data_root", clips, "--output_dir", output]
    return [*map(str, paths), "--validation_steps", "0", "--num_workers", "0", *flags]


def test_dry_run_speaks_of_the_device_that_is_named(tiny, clips, tmp_path, capsys):
    sonic_training.main(command(tiny, clips, tmp_path / "out", "--dry_run", "--device_memory_gb", "24"))
    printed = capsys.readouterr().out
    assert "fits into a device of 24 GB" in printed and re.search(r"together +\d+\.\d\d GB per process", printed)
    for part in ("weights", "optimizer", "encoders", "trainable", "frozen encoders"):
        assert part in printed
    sonic_training.main(command(tiny, clips, tmp_path / "out", "--dry_run", "--device_memory_gb", "0.03"))
    assert re.search(r"this run needs about .* a device of 0.03 GB: ", capsys.readouterr().out)
    with pytest.raises(SystemExit):
        sonic_training.main(command(tiny, clips, tmp_path / "out", "--dry_run", "--device_memory_gb", "0"))


def test_a_run_that_cannot_fit_stops_before_it_starts(tiny, clips, tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "available_memory", lambda config, device: (10**6, "1 MB of free RAM"))
    with pytest.raises(UserError, match="needs about .* but has 1 MB of free RAM: no flag makes it fit"):
        sonic_training.main(command(tiny, clips, tmp_path / "out"))


@pytest.mark.parametrize(("modules", "most"), [("all", 40), ("audio", 20)])
def test_the_sizes_that_are_to_be_reached(full_size, modules, most):
    """576 x 576, 25 frames, batch 1, bf16 (issue: training at real size)."""
    flags = {"train_modules": modules, "mixed_precision": "bf16", "gradient_checkpointing": True}
    config = TrainingConfig(
        data_root="x", num_frames=25, frame_step=1, resolution=576, validation_steps=0, cache_latents=True, **flags
    )
    estimate = Estimator(full_size, audio_only, on_gpu=True)(config)
    assert estimate.parameters["all"] == pytest.approx(1.65e9, rel=0.01)
    assert estimate.total < most * 1e9


@pytest.mark.parametrize(("modules", "precision", "cached"), itertools.product(TRAIN_MODULES, PRECISIONS, CACHING))
def test_a_full_size_run_is_constructed(full_size, modules, precision, cached):
    """Model, what is trained, optimizer and encoders, on the meta device."""
    config = TrainingConfig(data_root="x", train_modules=modules, mixed_precision=precision, cache_latents=cached)
    with torch.device("meta"):
        model = full_size.architecture.build()
        choose_trainable(model, config)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = OPTIMIZERS[config.optimizer](trainable, lr=1e-5, weight_decay=0.0)
    optimizer.zero_grad()
    for parameter in trainable:
        parameter.grad = torch.empty_like(parameter)
    optimizer.step()
    state = sum(value.nbytes for held in optimizer.state.values() for value in held.values() if value.ndim)
    assert state == memory.optimizer_bytes(config, trainable) > 0
