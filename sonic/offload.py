"""Large models on small cards: weights that wait in the CPU's memory (accelerate's hooks), and weights of 8 bits (torchao)."""

from __future__ import annotations

import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from torch import nn

from sonic.checkpoints import BaseModels
from sonic.config import UserError
from sonic.denoiser import Denoiser


def place(denoiser: Denoiser, base: BaseModels, device: torch.device, offload: str) -> None:
    """Moves the models to where they compute, or attaches the hooks that fetch them there when they are called.

    none: all of them at once. model: UNet, VAE and CLIP encoder in turn, each until another is called. sequential: layer by
    layer. Both adapters are small and stay on the device.
    """
    denoiser.audio2token.to(device)
    denoiser.audio2bucket.to(device)
    parts = [base.vae, base.image_encoder, denoiser.unet]  # in the order of their work
    if offload == "none":
        for part in parts:
            part.to(device)
    elif offload == "sequential":
        for part in parts:
            cpu_offload(part, device, offload_buffers=True)
    else:
        hooks = [cpu_offload_with_hook(part, device)[1] for part in parts]
        for before, hook in zip(hooks[-1:] + hooks[:-1], hooks, strict=True):
            hook.hook.prev_module_hook = before  # decoding comes after the UNet, so that they form a ring


def quantized(unet: nn.Module) -> None:
    """Turns the UNet's matrices into 8-bit integers with a scale per row; convolutions stay as they are. Changes the result."""
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ImportError:
        raise UserError("--quantize int8 needs torchao: pip install torchao") from None
    quantize_(unet, Int8WeightOnlyConfig())


def weight_bytes(*models: nn.Module) -> int:
    """Bytes of the parameters."""
    return sum(value.nbytes for model in models for value in model.parameters())


def bytes_to_come(denoiser: Denoiser, base: BaseModels, offload: str) -> int:
    """Bytes of weights that the device will hold at once and does not hold yet."""
    parts = [base.vae, base.image_encoder, denoiser.unet]
    if offload == "model":
        return max(weight_bytes(part) for part in parts)
    if offload == "sequential":
        return max(weight_bytes(layer) for part in parts for layer in part.modules() if not list(layer.children()))
    return 0
