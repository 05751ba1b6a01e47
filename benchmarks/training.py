"""What an optimizer step costs: a plain loop, ours with its default flags, and ours with everything on, in turns in one run.

    python benchmarks/training.py --size release --mixed_precision bf16      # on a GPU: 576 px, 25 frames
    python benchmarks/training.py --size mini                                # whole steps on a CPU
    python benchmarks/training.py --size cpu --calls                         # the UNet alone, forward and backward

plain    VAE, CLIP and Whisper in every step; diffusers' own UNet, which hears nothing; eager; AdamW as torch makes it
default  ours: VAE and CLIP in every step, Whisper's features from the cache, audio attention, fused AdamW
all on   ours with --cache_latents --compile

Weights are random and data are noise: both cost the same as real ones. Reading data is not part of it; `data_wait` in a run's log
tells of that. Prints medians, clips per second, the ratio to the plain loop, the share of the device's rate of matrix products
(measured in the same run; operations counted by torch's FlopCounterMode) and the peak of memory.
"""

from __future__ import annotations

import argparse
import sys
from contextlib import nullcontext
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from anywhere, without an install

import numpy as np
import torch
from common import Size, denoiser_of, matrix_rate, sizes, timed
from diffusers import AutoencoderKLTemporalDecoder, UNetSpatioTemporalConditionModel
from einops import rearrange
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection, WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from sonic.audio import LONG_LENGTH, SHORT_LENGTH
from sonic.checkpoints import BaseModels
from sonic.denoiser import per_clip, scalings
from sonic.flags import run
from sonic.memory import used_memory
from sonic.optimizers import make_optimizer
from sonic.run_setup import fused_is_faster
from sonic.trainable import PRECISIONS
from sonic.training import Draw, EncodedClip, Encoders, total_loss
from sonic.training_config import TrainingConfig

VAE_BATCH = 8  # frames that the plain loop encodes at once
MEL_FRAMES = 3000  # of 10 ms: what Whisper takes at once


class Models:
    """The frozen encoders at one size, and a batch of noise in the form of everything that training reads."""

    def __init__(self, size: Size, device: torch.device, dtype: torch.dtype):
        preset = size.preset
        self.size, self.device, self.dtype = size, device, dtype
        vae = AutoencoderKLTemporalDecoder(**preset.vae).to(device, dtype)
        clip = CLIPVisionModelWithProjection(CLIPVisionConfig(**preset.image_encoder)).to(device, dtype)
        self.base = BaseModels(vae.eval().requires_grad_(False), clip.eval().requires_grad_(False), None)
        self.whisper = WhisperEncoder(WhisperConfig(**preset.whisper)).to(device, dtype).eval().requires_grad_(False)
        self.layers, self.width = preset.whisper["encoder_layers"] + 1, preset.whisper["d_model"]
        side, image = size.resolution, preset.image_encoder["image_size"]
        b, f = size.clips, size.frames
        self.mel = torch.randn(b, WhisperConfig(**preset.whisper).num_mel_bins, MEL_FRAMES, device=device, dtype=dtype)
        self.samples = {
            "frames": torch.randn(b, f, 3, side, side).clamp(-1, 1),
            "reference": torch.randn(b, 3, side, side).clamp(-1, 1),
            "clip_pixels": torch.randn(b, 3, image, image),
            "mask": torch.ones(b, 1, side, side),
            "audio_windows": torch.randn(b, f, SHORT_LENGTH, self.layers, self.width),
            "bucket_windows": torch.randn(b, f, LONG_LENGTH, 1, self.width),
            "buckets": torch.full((b, 2), 32.0),
            "fps": torch.full((b,), 12.5),
        }
        channels, latent = preset.vae["latent_channels"], side // 8
        self.draw = Draw(torch.ones(b), torch.randn(b, f, channels, latent, latent), torch.ones(b), torch.ones(b))

    def autocast(self):
        on = self.dtype != torch.float32
        return torch.autocast(self.device.type, self.dtype) if on else nullcontext()


class Plain:
    """The loop that one would write first, around diffusers' UNet."""

    name = "plain"

    def __init__(self, models: Models):
        self.models, size = models, models.size
        self.unet = UNetSpatioTemporalConditionModel(**size.preset.unet).to(models.device).train()
        if size.checkpointing:
            self.unet.enable_gradient_checkpointing()
        self.parameters = list(self.unet.parameters())
        self.optimizer = torch.optim.AdamW(self.parameters, 1e-5)

    def encode(self) -> tuple[Tensor, Tensor, Tensor]:
        models, samples = self.models, self.models.samples
        with torch.no_grad():
            models.whisper(models.mel)
            frames = rearrange(samples["frames"], "b f c h w -> (b f) c h w").split(VAE_BATCH)
            latents = torch.cat([models.base.latents(part) for part in frames])
            latents = rearrange(latents, "(b f) c h w -> b f c h w", b=models.size.clips)
            return latents, models.base.latents(samples["reference"]), models.base.embeddings(samples["clip_pixels"])

    def loss(self, latents: Tensor, reference: Tensor, embedding: Tensor) -> Tensor:
        models = self.models
        sigma, noise = models.draw.sigma.to(models.device), models.draw.noise.to(models.device)
        x = latents + per_clip(sigma, latents) * noise
        scale = scalings(sigma)
        sample = torch.cat([per_clip(scale.into, x) * x, reference[:, None].expand_as(x)], dim=2)
        ids = torch.tensor([[12.0, 32.0, 32.0]], device=models.device).expand(len(x), -1)
        with models.autocast():
            v = self.unet(sample, scale.noise, embedding[:, None], ids, return_dict=False)[0]
        target = (noise - per_clip(sigma, x) * latents) / per_clip((sigma**2 + 1).sqrt(), x)
        return (v.float() - target).square().mean()

    def step(self) -> None:
        self.update(self.loss(*self.encode()))

    def update(self, loss: Tensor) -> None:
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def call(self) -> None:
        """The UNet's forward and backward pass alone."""
        models, channels = self.models, self.models.size.preset.vae["latent_channels"]
        b, side = models.size.clips, models.size.resolution // 8
        width = models.size.preset.unet["cross_attention_dim"]
        self.loss(
            models.draw.noise.to(models.device),
            torch.zeros(b, channels, side, side, device=models.device),
            torch.zeros(b, width, device=models.device),
        ).backward()


class Ours(Plain):
    """Our loss and our UNet, with the default flags."""

    name = "default"

    def __init__(self, models: Models, model=None):
        self.models, size = models, models.size
        self.model = model or denoiser_of(size.preset).to(models.device).train()
        self.model.unet.freeze_unused()
        if size.checkpointing:
            self.model.unet.enable_gradient_checkpointing()
        self.parameters = [value for value in self.model.parameters() if value.requires_grad]
        precision = next(name for name, dtype in PRECISIONS.items() if dtype == models.dtype)
        config = TrainingConfig(data_root="noise", mixed_precision=precision, resolution=size.resolution)
        self.model.unet.fuse_attention(fused_is_faster(config, models.device))
        self.optimizer = make_optimizer(config, self.parameters)
        self.encoders = Encoders(models.base, models.device)
        self.forward, self.velocity = self.model, self.model.velocity
        self.encoded = self.encoders(models.samples)
        with torch.no_grad():
            self.tokens = self.model.audio2token(self.encoded.short_windows)

    def encode(self) -> EncodedClip:
        return self.encoders(self.models.samples)

    def loss(self, clip: EncodedClip) -> Tensor:
        with self.models.autocast():
            losses = self.forward(clip.with_noise(self.models.draw))
        return total_loss(losses)

    def step(self) -> None:
        self.update(self.loss(self.encode()))

    def call(self) -> None:
        models, draw, clip = self.models, self.models.draw, self.encoded
        noise = draw.noise.to(models.device)
        with models.autocast():
            v = self.velocity(noise, draw.sigma.to(models.device), clip.portrait, self.tokens, clip.buckets, clip.fps)
        (v.float() - noise).square().mean().backward()


class AllOn(Ours):
    """Ours with cached latents, compiled; the weights are those of `Ours`."""

    name = "all on"

    def __init__(self, models: Models, ours: Ours):
        super().__init__(models, ours.model)
        self.forward, self.velocity = torch.compile(self.model), torch.compile(self.model.velocity)

    def encode(self) -> EncodedClip:
        return self.encoded


def held(case: Plain) -> int:
    """Bytes of a case's weights, gradients and optimizer state."""
    state = [value for one in case.optimizer.state.values() for value in one.values() if isinstance(value, Tensor)]
    return sum(value.nbytes for value in [*case.parameters, *state])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=sizes(), default="mini", help="of models and batch (default: %(default)s)")
    parser.add_argument("--mixed_precision", choices=PRECISIONS, default="no", help="(default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each case (default: %(default)s)")
    parser.add_argument("--warmup", type=int, default=2, help="steps of each before that (default: %(default)s)")
    parser.add_argument("--calls", action="store_true", help="time the UNet's forward and backward pass alone")
    parser.add_argument(
        "--without", nargs="*", default=[], choices=["plain", "default", "all on"], help="cases to leave out"
    )
    flags = parser.parse_args()
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size, dtype = sizes()[flags.size], PRECISIONS[flags.mixed_precision]
    models = Models(size, device, dtype)
    ours = Ours(models)
    cases = [case for case in (Plain(models), ours, AllOn(models, ours)) if case.name not in flags.without]
    with FlopCounterMode(display=False) as counter:
        ours.call() if flags.calls else ours.loss(ours.encode()).backward()
    ours.optimizer.zero_grad()
    operations = counter.get_total_flops()

    seconds: dict[str, list[float]] = {case.name: [] for case in cases}
    peaks = dict.fromkeys(seconds, 0.0)
    rates = []
    for turn in range(flags.warmup + flags.rounds):
        for case in cases:
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
                before = torch.cuda.memory_allocated(device)
            took = timed(case.call if flags.calls else case.step, device)
            if turn >= flags.warmup:
                seconds[case.name].append(took)
            if device.type == "cuda":
                peaks[case.name] = held(case) / 1e9 + used_memory(device) - before / 1e9
        rates.append(matrix_rate(device, dtype))

    rate, what = max(rates), "call of the UNet" if flags.calls else "step"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(
        f"{name}, torch {torch.__version__}, {flags.size}, {flags.mixed_precision}: {size.clips} clips of {size.frames} "
        f"frames at {size.resolution} px; {operations / 1e12:.2f} T operations a {what} of ours, {rate / 1e12:.2f} T/s in matrices"
    )
    print(f"| case | seconds a {what}: median (all) | clips/s | against plain | share of the matrix rate | peak GB |")
    print("|---|---|---|---|---|---|")
    for case in cases:
        found = seconds[case.name]
        middle = float(np.median(found))
        ratio = f"{np.median(seconds['plain']) / middle:.2f} ×" if "plain" in seconds else "–"
        share = f"{operations / middle / rate:.0%}" if case.name == "default" else "–"
        peak = f"{peaks[case.name]:.1f}" if device.type == "cuda" else "–"
        print(
            f"| {case.name} | {middle:.3f} ({min(found):.3f} … {max(found):.3f}) | {size.clips / middle:.2f} | {ratio} "
            f"| {share} | {peak} |"
        )


if __name__ == "__main__":
    run(main)
