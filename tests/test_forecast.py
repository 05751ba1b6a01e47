"""What a video takes is told before, counted as it is, and refused where it cannot fit."""

import numpy as np
import pytest
import torch
from conftest import EXAMPLES

from sonic import forecast
from sonic.config import SonicConfig, UserError
from sonic.counting import Live
from sonic.pipeline import SonicPipeline
from sonic.presets import PRESETS

PORTRAIT = EXAMPLES / "portrait.jpg"


@pytest.fixture(scope="module")
def pipeline(tiny):
    return SonicPipeline(SonicConfig(checkpoint=str(tiny), device="cpu"))


@pytest.fixture
def features(pipeline):
    return pipeline.extract_audio_features(np.random.default_rng(0).normal(0, 0.1, 30 * 640).astype(np.float32))


def told(pipeline, frames=30, keys=0, **change):
    settings = pipeline._settings(pipeline._config(change, None))
    chosen = "decode_chunk_size" in change
    return pipeline.forecaster((8, 8), settings, frames, 25.0, held=1000, keys=keys, chosen=chosen)


def test_what_is_told(pipeline):
    found = told(pipeline, 30)
    assert (found.frames, found.windows, found.steps, found.calls, found.chunk) == (30, 8, 2, 16, 4)
    assert str(found).startswith("30 frames at 25 fps (1.2 s): 8 windows, 2 steps, 16 calls of the UNet; memory")
    assert told(pipeline, 3000).ram_bytes - found.ram_bytes == 2970 * 4 * 4 * 8 * 8  # the latents and nothing else
    assert told(pipeline, 30, keys=500).ram_bytes - found.ram_bytes == 500
    assert told(pipeline, 30, solver="dpmpp_2m").ram_bytes - found.ram_bytes == 30 * 4 * 4 * 8 * 8


def test_counts_are_what_real_calls_take(pipeline):
    """And the bounds that spare the counting lie above them."""
    forecaster, animator = pipeline.forecaster, pipeline.animator
    counted = forecaster.decode_bytes(4, 8, 8)
    vae = animator.base.vae
    with torch.no_grad(), Live([*vae.parameters(), *vae.buffers()], on_gpu=False) as live:
        vae.decode(torch.zeros(4, 4, 8, 8), num_frames=4)
    assert counted == pytest.approx(live.peak, rel=0.02)
    assert counted <= forecaster._vae_bound(4, 8, 8)
    assert 0 < forecaster.window_bytes(3, 4, 8, 8) <= forecaster._unet_bound(3, 4, 8, 8)
    assert forecaster.window_bytes(1, 4, 8, 8) < forecaster.window_bytes(3, 4, 8, 8)


def test_bound_of_the_real_vae_is_above_its_count(pipeline):
    from diffusers import AutoencoderKLTemporalDecoder

    with torch.device("meta"):
        vae = AutoencoderKLTemporalDecoder(**PRESETS["svd-xt"].vae)
    real = forecast.Forecaster(pipeline.forecaster.architecture, vae, torch.float32, torch.device("cpu"))
    assert real.decode_bytes(2, 32, 32) <= real._vae_bound(2, 32, 32)


def test_too_long_is_refused_before_it_begins(pipeline, features, tmp_path, monkeypatch):
    monkeypatch.setattr(forecast, "room", lambda device: 100_000)
    calls = []
    with pytest.raises(
        UserError, match=r"this video of 1\.2 s takes about .* GB beside the models, but 0\.0 GB of RAM"
    ):
        pipeline.generate(PORTRAIT, features, on_progress=calls.append)
    assert not calls
    with pytest.raises(UserError, match="use shorter speech"):
        monkeypatch.setattr(forecast, "room", lambda device: 10**9)
        told(pipeline, 10**6)


def test_chunks_shrink_to_what_is_free(pipeline, monkeypatch):
    needed = pipeline.forecaster.decode_bytes(4, 8, 8)
    monkeypatch.setattr(forecast, "room", lambda device: int(0.9 * needed))
    smaller = told(pipeline, 4)
    assert smaller.chunk == 2
    with pytest.raises(UserError, match="a lower --decode_chunk_size"):
        told(pipeline, 4, decode_chunk_size=4)
