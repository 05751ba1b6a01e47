"""What a video will take, said before it is begun: frames, windows, memory; what cannot fit is refused then.

The passes of UNet and VAE are counted on tensors without storage (sonic/counting.py), unless they are surely small.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import psutil
import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKLTemporalDecoder
from torch._subclasses.fake_tensor import FakeTensorMode

from sonic import sampling
from sonic.checkpoints import Architecture
from sonic.config import Settings, UserError
from sonic.counting import Live, default_type
from sonic.denoiser import Portrait

LONG = 1 << 28  # bytes of latents or tokens from which they are not kept on the device
ROOM = 0.9  # share of the free memory that is used: the gaps between blocks take the rest
# For passes that need not be counted: fp32 maps alive at once at full width and resolution. The real ones need fewer.
UNET_MAPS, VAE_MAPS = 40, 1200


@dataclass(frozen=True)
class Forecast:
    """A video before it is made: `calls` of the UNet, bytes that it will take on the device and in RAM beyond what is taken."""

    frames: int
    fps: float
    windows: int
    steps: int
    chunk: int  # frames that are decoded at once
    device_bytes: int
    ram_bytes: int

    @property
    def calls(self) -> int:
        return self.windows * self.steps

    def __str__(self) -> str:
        on_device = f"{self.device_bytes / 1e9:.1f} GB on the device and " if self.device_bytes else ""
        return (
            f"{self.frames} frames at {self.fps:g} fps ({self.frames / self.fps:.1f} s): {self.windows} windows, {self.steps} "
            f"steps, {self.calls} calls of the UNet; memory beside the models at most {on_device}"
            f"{self.ram_bytes / 1e9:.1f} GB of RAM"
        )


class Forecaster:
    """Forecasts for one model on one device; `weights` are the bytes that will still be fetched there (sonic/offload.py)."""

    def __init__(
        self,
        architecture: Architecture,
        vae: AutoencoderKLTemporalDecoder,
        dtype: torch.dtype,
        device: torch.device,
        weights: int = 0,
    ):
        self.architecture, self.dtype, self.device, self.weights = architecture, dtype, device, weights
        self.vae_config, self.vae_dtype = dict(vae.config), vae.dtype
        self.window_bytes, self.decode_bytes = cache(self._window_bytes), cache(self._decode_bytes)

    def __call__(
        self, size: tuple[int, int], settings: Settings, frames: int, fps: float, held: int, keys: int, chosen: bool
    ) -> Forecast:
        """size: latent height and width; held: bytes of conditions, and of frames that are kept; keys: of keys and values;
        chosen: whether the chunk size was given, and must not be lowered. Raises UserError if it cannot fit."""
        height, width = size
        windows = len(sampling.windows(frames, settings.num_frames, settings.overlap, 0))
        latents = 4 * self.architecture.unet["out_channels"] * height * width * frames
        on_gpu, on_device = self.device.type == "cuda", latents <= LONG
        latents *= 1 if settings.solver == "euler" else 2  # the others remember a step
        free = room(self.device)
        stays = self.weights + keys + (latents if on_device or not on_gpu else 0) + (0 if on_gpu else held)
        window, chunk = min(settings.num_frames, frames), min(settings.decode_chunk_size, frames)
        clips = max(
            len(sampling.branch_shares(*(sampling.ramp(scale, step, 2) for scale in scales)))
            for step in (0, 1)
            for scales in [(settings.guidance_scale_image, settings.guidance_scale_audio)]
        )
        passing = self._pass(
            self._unet_bound(clips, window, height, width), free, self.window_bytes, clips, window, height, width
        )
        while True:
            decoding = self._pass(self._vae_bound(chunk, height, width), free, self.decode_bytes, chunk, height, width)
            if chosen or chunk == 1 or stays + decoding <= ROOM * free:
                break
            chunk = (chunk + 1) // 2
        needed = stays + max(passing, decoding)
        if needed > free:
            raise UserError(self._refusal(needed, free, frames / fps, stays, keys, passing, decoding))
        ram = held + (0 if on_device else latents) if on_gpu else needed
        if on_gpu and ram > psutil.virtual_memory().available:
            raise UserError(f"this video takes {ram / 1e9:.1f} GB of RAM, more than is free: use shorter speech")
        return Forecast(frames, fps, windows, settings.num_inference_steps, chunk, needed if on_gpu else 0, ram)

    def _pass(self, bound: int, free: int, count, *sizes: int) -> int:
        """Bytes of a pass: the bound if that is small beside what is free, else the count."""
        return bound if bound < free / 4 else count(*sizes)

    def _unet_bound(self, clips: int, frames: int, height: int, width: int) -> int:
        return 4 * UNET_MAPS * max(self.architecture.unet["block_out_channels"]) * clips * frames * height * width

    def _vae_bound(self, chunk: int, height: int, width: int) -> int:
        return 4 * VAE_MAPS * chunk * 64 * height * width

    def _window_bytes(self, clips: int, frames: int, height: int, width: int) -> int:
        """The peak of one call of the UNet."""
        sizes = self.architecture
        with torch.inference_mode(False), torch.no_grad():
            with init_empty_weights():
                model = sizes.build().eval().to(self.dtype)
            with FakeTensorMode(allow_non_fake_inputs=True):
                model.to_empty(device="cpu")
                x = torch.zeros(clips, frames, sizes.unet["out_channels"], height, width)
                portrait = Portrait(
                    x[:, 0], torch.zeros(clips, sizes.clip_width), torch.ones(1, 1, 8 * height, 8 * width)
                )
                tokens = torch.zeros(
                    clips, frames, sizes.audio_tokens, sizes.unet["cross_attention_dim"], dtype=self.dtype
                )
                with Live([*model.parameters(), *model.buffers()], self.device.type == "cuda") as live:
                    model.velocity(x, torch.ones(clips), portrait, tokens, torch.zeros(clips, 2), torch.ones(clips))
        return live.peak

    def _decode_bytes(self, chunk: int, height: int, width: int) -> int:
        """The peak of decoding so many frames at once."""
        with torch.inference_mode(False), torch.no_grad(), FakeTensorMode(), default_type(self.vae_dtype):
            vae = AutoencoderKLTemporalDecoder.from_config(self.vae_config).eval()
            latents = torch.zeros(chunk, vae.config.latent_channels, height, width)
            with Live([*vae.parameters(), *vae.buffers()], self.device.type == "cuda") as live:
                vae.decode(latents, num_frames=chunk)
        return live.peak

    def _refusal(
        self, needed: int, free: int, seconds: float, stays: int, keys: int, passing: int, decoding: int
    ) -> str:
        """One sentence: what it would take, what there is, and what to change."""
        where = "the GPU" if self.device.type == "cuda" else "RAM"
        says = (
            f"this video of {seconds:.1f} s takes about {needed / 1e9:.1f} GB beside the models, but {free / 1e9:.1f} GB of "
            f"{where} are free"
        )
        if keys > needed - free:
            return f"{says}: use --key_memory 0, which computes some things again at every step"
        if stays > max(passing, decoding):
            return f"{says}: use shorter speech, or a lower --resolution"
        ways = ["a lower --resolution"]
        if decoding > passing:
            ways.insert(0, "a lower --decode_chunk_size")
        if self.device.type == "cuda" and not self.weights:
            ways.insert(0, "--offload model or sequential")
        return f"{says}: use {', '.join(ways)}"


def room(device: torch.device) -> int:
    """Bytes that are free on a device, those included that torch keeps for itself."""
    if device.type == "cuda":
        return (
            torch.cuda.mem_get_info(device)[0]
            + torch.cuda.memory_reserved(device)
            - torch.cuda.memory_allocated(device)
        )
    return psutil.virtual_memory().available
