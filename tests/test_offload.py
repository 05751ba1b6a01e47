"""Weights that wait elsewhere, or with 8 bits: the same video, or nearly; hooks run on a CPU as they do on a GPU."""

import importlib.util
import sys

import numpy as np
import pytest
import soundfile
import torch
from accelerate.hooks import AlignDevicesHook, CpuOffload
from conftest import EXAMPLES

from sonic.config import SonicConfig, UserError
from sonic.offload import bytes_to_come, quantized, weight_bytes
from sonic.pipeline import SonicPipeline

PORTRAIT = EXAMPLES / "portrait.jpg"


@pytest.fixture(scope="module")
def speech():
    return soundfile.read(EXAMPLES / "audio.wav", dtype="float32")[0][: 6 * 640]


def frames(pipeline, speech):
    return pipeline.generate(PORTRAIT, pipeline.extract_audio_features(speech)).frames


@pytest.fixture(scope="module")
def plain(tiny, speech):
    return frames(SonicPipeline(SonicConfig(checkpoint=str(tiny), device="cpu")), speech)


@pytest.mark.parametrize("offload", ["model", "sequential"])
def test_offloading_changes_nothing(tiny, speech, plain, monkeypatch, offload):
    fetched, kind = [], {"model": CpuOffload, "sequential": AlignDevicesHook}[offload]
    pre_forward = kind.pre_forward

    def watched(self, module, *arguments, **keywords):
        fetched.append(type(module).__name__)
        return pre_forward(self, module, *arguments, **keywords)

    monkeypatch.setattr(kind, "pre_forward", watched)
    pipeline = SonicPipeline(SonicConfig(checkpoint=str(tiny), device="cpu", offload=offload))
    if offload == "sequential":
        assert next(pipeline.animator.denoiser.unet.parameters()).is_meta
    news = []
    made = pipeline.generate(PORTRAIT, pipeline.extract_audio_features(speech), on_progress=news.append).frames
    assert np.array_equal(made, plain)
    expected = {
        "model": {"SonicUNet", "AutoencoderKLTemporalDecoder", "CLIPVisionModelWithProjection"},
        "sequential": {"Conv2d", "Linear", "AlphaBlender", "CLIPVisionEmbeddings"},
    }
    assert expected[offload] <= set(fetched)
    assert all(progress.preview is None for progress in news)  # it would fetch the VAE for every picture
    assert np.array_equal(frames(pipeline, speech), plain)  # and again


def test_models_take_turns(tiny):
    """UNet, VAE and CLIP encoder form a ring: whoever is called sends the one before it away."""
    animator = SonicPipeline(SonicConfig(checkpoint=str(tiny), device="cpu", offload="model")).animator
    parts = [animator.base.vae, animator.base.image_encoder, animator.denoiser.unet]
    sent = [part._hf_hook.prev_module_hook.model for part in parts]
    assert [id(part) for part in sent] == [id(parts[2]), id(parts[0]), id(parts[1])]


def test_bytes_to_come(tiny):
    animator = SonicPipeline(SonicConfig(checkpoint=str(tiny), device="cpu")).animator
    denoiser, base = animator.denoiser, animator.base
    assert bytes_to_come(denoiser, base, "none") == 0
    assert bytes_to_come(denoiser, base, "model") == weight_bytes(denoiser.unet)
    assert 0 < bytes_to_come(denoiser, base, "sequential") < weight_bytes(denoiser.unet) / 10


def test_without_torchao_the_command_is_said(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "torchao"] + ["torchao.quantization"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match="pip install torchao"):
        quantized(torch.nn.Linear(4, 4))


@pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="needs torchao (pip install torchao)")
def test_8_bits_are_nearly_the_same(speech):
    """Of the shipped model: half the bytes in its matrices, and latents within a few percent."""
    found = {}
    for quantize in ("none", "int8"):
        pipeline = SonicPipeline(SonicConfig(device="cpu", quantize=quantize, num_inference_steps=4))
        with torch.inference_mode():
            features = pipeline.extract_audio_features(speech)
            job = pipeline._job(PORTRAIT, features, None, None, pipeline.config)
            found[quantize] = pipeline._latents(job, None)
    error = (found["int8"] - found["none"]).norm() / found["none"].norm()
    print(f"relative error of the latents with int8: {error:.4f}")
    assert 0 < error < 0.1
