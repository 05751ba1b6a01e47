import dataclasses

import pytest
import torch
from conftest import TINY

from sonic.checkpoints import Architecture
from sonic.denoiser import Portrait, TrainingBatch, denoised, draw_sigma, per_clip, scalings, token_spread

CLIPS, FRAMES = 2, 4


@pytest.fixture(scope="module")
def denoiser():
    torch.manual_seed(0)
    return Architecture(TINY.unet, "whisper", 2, 16, 16, TINY.adapter_hidden, TINY.audio_tokens).build().eval()


@pytest.fixture
def batch():
    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    generator = torch.Generator().manual_seed(0)
    return TrainingBatch(
        latents=draw(CLIPS, FRAMES, 4, 8, 8),
        portrait=Portrait(draw(CLIPS, 4, 8, 8), draw(CLIPS, 16), torch.ones(CLIPS, 1, 64, 64)),
        short_windows=draw(CLIPS, FRAMES, 10, 2, 16),
        long_windows=draw(CLIPS, FRAMES, 50, 1, 16),
        buckets=torch.tensor([[40.0, 60.0], [16.0, 32.0]]),
        fps=torch.full((CLIPS,), 25.0),
        keep_audio=torch.ones(CLIPS),
        keep_image=torch.ones(CLIPS),
        sigma=torch.tensor([0.7, 4.0]),
        noise=draw(CLIPS, FRAMES, 4, 8, 8),
    )


def tokens_of(denoiser, batch):
    return denoiser.audio2token(batch.short_windows)


def test_scalings_are_edms():
    sigma = torch.tensor([0.5, 2.0])
    skip, out, into, noise = scalings(sigma)
    assert torch.allclose(skip, 1 / (sigma**2 + 1))
    assert torch.allclose(out, -sigma / (sigma**2 + 1).sqrt())
    assert torch.allclose(into, 1 / (sigma**2 + 1).sqrt())
    assert torch.allclose(noise, 0.25 * sigma.log())


def test_sigma_is_log_normal():
    logs = draw_sigma(20_000, 0.7, 1.6, torch.Generator().manual_seed(0)).log()
    assert logs.mean().item() == pytest.approx(0.7, abs=0.04)
    assert logs.std().item() == pytest.approx(1.6, abs=0.04)


@torch.no_grad()
def test_loss_is_the_weighted_error_of_x0(denoiser, batch):
    """(1 + s²)/s² (c_out v + c_skip x - x0)², SPEC.md section 6."""
    sigma = per_clip(batch.sigma, batch.latents)
    x = batch.latents + sigma * batch.noise
    v = denoiser.velocity(x, batch.sigma, batch.portrait, tokens_of(denoiser, batch), batch.buckets, batch.fps)
    error = denoised(x, sigma, v) - batch.latents
    expected = (1 + sigma**2) / sigma**2 * error**2
    assert torch.allclose(denoiser(batch).velocity_map, expected.mean(2), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_bucket_loss_is_on_scaled_buckets(denoiser, batch):
    clip = batch.portrait.clip[:, None].expand(-1, FRAMES, -1)
    predicted = denoiser.audio2bucket.buckets(batch.long_windows, clip)
    expected = ((predicted - batch.buckets[:, None]) / 16).square().mean()
    assert torch.allclose(denoiser(batch).bucket, expected)


@torch.no_grad()
def test_dropped_audio_is_silence(denoiser, batch):
    dropped = dataclasses.replace(batch, keep_audio=torch.zeros(CLIPS))
    silent = dataclasses.replace(batch, short_windows=torch.zeros_like(batch.short_windows))
    assert torch.equal(denoiser(dropped).velocity_map, denoiser(silent).velocity_map)
    assert not torch.allclose(denoiser(dropped).velocity_map, denoiser(batch).velocity_map)
    silence = denoiser.audio2token.silence()
    assert torch.allclose(denoiser.audio2token(silent.short_windows), silence.expand(CLIPS, FRAMES, -1, -1), atol=1e-6)


@torch.no_grad()
def test_dropped_image_is_zero_latent_and_zero_clip(denoiser, batch):
    dropped = dataclasses.replace(batch, keep_image=torch.tensor([0.0, 1.0]))
    latent, clip = batch.portrait.latent.clone(), batch.portrait.clip.clone()
    latent[0], clip[0] = 0, 0
    zeroed = dataclasses.replace(batch, portrait=Portrait(latent, clip, batch.portrait.mask))
    found, expected, plain = denoiser(dropped), denoiser(zeroed), denoiser(batch)
    assert torch.equal(found.velocity_map, expected.velocity_map)
    assert torch.equal(found.velocity_map[1], plain.velocity_map[1])
    assert not torch.allclose(found.velocity_map[0], plain.velocity_map[0])
    assert torch.equal(found.bucket, plain.bucket)  # the bucket predictor always sees the portrait


@torch.no_grad()
def test_buckets_and_fps_reach_the_unet(denoiser, batch):
    plain = denoiser(batch).velocity_map
    for change in ({"buckets": batch.buckets + 30}, {"fps": batch.fps / 2}):
        assert not torch.allclose(denoiser(dataclasses.replace(batch, **change)).velocity_map, plain, atol=1e-6)


def test_token_spread():
    constant = torch.randn(1, 1, 3, 8).expand(2, 5, 3, 8)
    assert token_spread(constant).item() == pytest.approx(0, abs=1e-5)
    assert token_spread(torch.randn(2, 500, 3, 8)).item() == pytest.approx(1, abs=0.05)
