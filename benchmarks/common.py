"""What benchmarks share: models at several sizes, and clocks. Import it after the repository's folder is on the path."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from sonic.checkpoints import Architecture
from sonic.denoiser import Denoiser
from sonic.presets import PRESETS, Preset

MATRIX = 4096  # rows and columns of the product that the device's rate is measured with


class Size(NamedTuple):
    """A preset, with other sizes where it is too large for a CPU."""

    preset: Preset
    resolution: int
    frames: int
    clips: int
    checkpointing: bool


def sizes() -> dict[str, Size]:
    real, mini = PRESETS["svd-xt"], PRESETS["mini"]
    # Cross-attention as wide as the real one's, so that audio costs here what it costs there.
    unet = real.unet | {"block_out_channels": [64, 128, 256, 256], "num_attention_heads": [2, 4, 8, 8], "num_frames": 8}
    between = dataclasses.replace(real, unet=unet, vae=mini.vae | {"latent_channels": 4})
    return {
        "release": Size(real, 576, 25, 1, checkpointing=True),
        "cpu": Size(between, 256, 8, 1, checkpointing=False),
        "mini": Size(mini, 128, 10, 2, checkpointing=False),
    }


def denoiser_of(preset: Preset) -> Denoiser:
    """The preset's UNet and adapters, with random weights."""
    whisper = preset.whisper
    return Architecture(
        preset.unet,
        "whisper",
        whisper["encoder_layers"] + 1,
        whisper["d_model"],
        preset.image_encoder["projection_dim"],
        preset.adapter_hidden,
        preset.audio_tokens,
    ).build()


def timed(work: Callable, device: torch.device) -> float:
    """Seconds."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    begin = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - begin


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second in products of large square matrices; the best of some."""
    size = MATRIX if device.type == "cuda" else MATRIX // 4
    a, b = torch.randn(size, size, device=device, dtype=dtype), torch.randn(size, size, device=device, dtype=dtype)
    return 2 * size**3 / min(timed(lambda: a @ b, device) for _ in range(20))
