"""EDM preconditioning, training loss and denoising: one object for training and for sampling (SPEC.md sections 3 and 6).

Axes: B clips, F frames of a window, C H W latent channels, height and width, D cross-attention width, K audio tokens per frame,
E CLIP width.
Noisy latents are x = x0 + sigma · noise, with x0 the VAE's latents times its scaling factor.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sonic.adapters import AudioBucket, AudioToken, bucket_targets
from sonic.unet import Conditions, SonicUNet


class Scalings(NamedTuple):
    """EDM's four functions of sigma for v-prediction, each of sigma's shape."""

    skip: Tensor
    out: Tensor
    into: Tensor
    noise: Tensor


def scalings(sigma: Tensor) -> Scalings:
    """c_skip = 1/(s²+1), c_out = -s/sqrt(s²+1), c_in = 1/sqrt(s²+1), c_noise = ln(s)/4 (SPEC.md section 6)."""
    variance = sigma**2 + 1
    return Scalings(1 / variance, -sigma / variance.sqrt(), 1 / variance.sqrt(), 0.25 * sigma.log())


def draw_sigma(count: int, mean: float, std: float, generator: torch.Generator | None = None) -> Tensor:
    """One sigma per clip, [count]: ln sigma ~ Normal(mean, std), EDM's P_mean and P_std."""
    return (mean + std * torch.randn(count, generator=generator)).exp()


def per_clip(values: Tensor, like: Tensor) -> Tensor:
    """[B] -> [B, 1, 1, ...], to multiply a tensor of `like`'s rank."""
    return values.view(-1, *[1] * (like.ndim - 1))


def denoised(x: Tensor, sigma: Tensor, velocity: Tensor) -> Tensor:
    """The estimate of x0 that a velocity stands for, c_out v + c_skip x; sigma broadcasts to x."""
    scale = scalings(sigma)
    return scale.out * velocity + scale.skip * x


@dataclass
class Portrait:
    """The still side of a condition: reference latent [B, C, H, W] (the VAE's mode, *not* scaled), CLIP embedding [B, E],
    face mask [B or 1, 1, h, w] in 0..1 at any size."""

    latent: Tensor
    clip: Tensor
    mask: Tensor | None

    def kept(self, keep: Tensor) -> Portrait:
        """Latent and CLIP embedding times keep [B]: zeros where the image is dropped (SPEC.md section 4)."""
        return Portrait(self.latent * per_clip(keep, self.latent), self.clip * keep[:, None], self.mask)


@dataclass
class ClipBatch:
    """Clips as the frozen encoders leave them.

    latents [B, F, C, H, W]; short windows [B, F, 10, S, W']; long windows [B, F, 50, 1, W']; buckets [B, 2]; fps [B].
    """

    latents: Tensor
    portrait: Portrait
    short_windows: Tensor
    long_windows: Tensor
    buckets: Tensor
    fps: Tensor


@dataclass
class TrainingBatch(ClipBatch):
    """Clips with noise: everything one loss needs.

    sigma [B]; noise like latents; keep_audio and keep_image [B] are 0 where that condition is dropped.
    """

    sigma: Tensor
    noise: Tensor
    keep_audio: Tensor
    keep_image: Tensor


class Losses(NamedTuple):
    """velocity_map [B, F, H, W]: squared error of v, mean over channels; bucket and token_spread: scalars."""

    velocity_map: Tensor
    bucket: Tensor
    token_spread: Tensor

    @property
    def velocity(self) -> Tensor:
        return self.velocity_map.mean()


def token_spread(tokens: Tensor) -> Tensor:
    """How much audio tokens [B, F, K, D] vary over time: their standard deviation over frames, over their deviation overall.

    Near 0 the UNet hears the same thing in every frame, whatever is spoken.
    """
    tokens = tokens.float()
    return tokens.std(dim=1, correction=0).square().mean().sqrt() / tokens.std(correction=0).clamp_min(1e-12)


class Denoiser(nn.Module):
    """UNet and both adapters: what is trained, saved, and asked for velocities."""

    def __init__(self, unet: SonicUNet, audio2token: AudioToken, audio2bucket: AudioBucket):
        super().__init__()
        self.unet, self.audio2token, self.audio2bucket = unet, audio2token, audio2bucket

    @property
    def dtype(self) -> torch.dtype:
        """What to compute in unless autocast says otherwise. A run may hold frozen weights of the UNet in half precision, and
        that should not become the precision of its input; the adapters are always trained."""
        return self.audio2token.norm.weight.dtype

    def velocity(
        self, x: Tensor, sigma: Tensor, portrait: Portrait, tokens: Tensor, buckets: Tensor, fps: Tensor
    ) -> Tensor:
        """x [B, F, C, H, W], sigma [B], tokens [B, F, K, D], buckets [B, 2], fps [B] -> v like x."""
        frames, dtype = x.shape[1], self.dtype
        image = portrait.clip[:, None, None].expand(-1, frames, -1, -1)  # the CLIP embedding is the one image token
        conditions = Conditions(image.to(dtype), tokens.to(dtype), portrait.mask)
        time_ids = torch.cat([fps[:, None], buckets], dim=1)  # fps as it is, where SVD's own pipeline passes fps - 1
        return self.predict(x, sigma, portrait.latent, conditions, time_ids)

    def predict(self, x: Tensor, sigma: Tensor, reference: Tensor, conditions: Conditions, time_ids: Tensor) -> Tensor:
        """x [B, F, C, H, W], reference [B, C, H, W] -> v for every clip of the conditions (`Conditions.fork`); sigma [B] and
        time_ids [B, 3], or one for all clips."""
        scale = scalings(sigma)
        reference = reference[:, None].expand(-1, x.shape[1], -1, -1, -1)
        sample = torch.cat([x * per_clip(scale.into, x), reference], dim=2)
        return self.unet(sample.to(self.dtype), scale.noise, conditions, time_ids, return_dict=False)[0]

    def forward(self, batch: TrainingBatch) -> Losses:
        """The training loss. It is `forward`, so that wrappers for many GPUs see every parameter used."""
        sigma = per_clip(batch.sigma, batch.latents)
        x = batch.latents + sigma * batch.noise
        windows = batch.short_windows * per_clip(
            batch.keep_audio, batch.short_windows
        )  # no audio is audio2token(zeros)
        tokens = self.audio2token(windows)
        portrait = batch.portrait.kept(batch.keep_image)
        v = self.velocity(x, batch.sigma, portrait, tokens, batch.buckets, batch.fps)
        # (1+s²)/s² (c_out v + c_skip x - x0)² of SPEC.md section 6 is the plain squared error on this v.
        target = (batch.noise - sigma * batch.latents) / (sigma**2 + 1).sqrt()
        velocity_map = (v.float() - target.float()).square().mean(dim=2)

        clip = batch.portrait.clip[:, None].expand(-1, batch.long_windows.shape[1], -1)
        predicted = self.audio2bucket(batch.long_windows, clip)[..., :2]  # [B, F, 2]
        bucket = (predicted.float() - bucket_targets(batch.buckets)[:, None]).square().mean()
        return Losses(velocity_map, bucket, token_spread(tokens.detach()))
