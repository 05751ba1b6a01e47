"""What a loaded model does to tensors: conditions in, latents and frames out (SPEC.md sections 4 and 5).

Axes: N frames of the video, W frames of a window, K audio tokens, D their width, C H W latent channels, height and width.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

import cv2
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from sonic import sampling
from sonic.checkpoints import BaseModels
from sonic.config import KEY_MEMORY, Settings, UserError
from sonic.denoiser import Denoiser, Portrait, denoised
from sonic.forecast import LONG
from sonic.guided import Branches, Speech
from sonic.portrait import PortraitPixels
from sonic.processes import Processes
from sonic.unfinished import Unfinished

# The temporal decoder's norms and convolutions see the frames of their chunk alone, so neighbouring chunks differ in brightness.
# With three frames in common, one fading into the other, the step is gone (docs/inference.md); its convolutions reach 29 frames.
DECODE_OVERLAP = 3
PREVIEW_SIDE = 128  # pixels


@dataclass(frozen=True)
class Progress:
    """How far a video is: stage "listening", "denoising" or "decoding"; UNet calls or frames done, of how many; seconds left
    in this stage, None while nothing is known. `preview()` draws a frame as it would become now, uint8 [h, w, 3]."""

    stage: str
    done: int
    total: int
    seconds_left: float | None = None
    preview: Callable[[], np.ndarray] | None = None


OnProgress = Callable[[Progress], None]


class Stage:
    """One stage's bar, and its news for the caller, who may raise to stop."""

    def __init__(
        self, name: str, total: int, unit: str, on_progress: OnProgress | None, done: int = 0, show: bool = True
    ):
        self.name, self.total, self.first, self.done = name, total, done, done
        self.on_progress, self._begin = on_progress, time.perf_counter()
        self._bar = tqdm(total=total, initial=done, desc=name, unit=unit, disable=None if show else True, leave=False)

    def __enter__(self) -> Stage:
        return self

    def __exit__(self, *_) -> None:
        self._bar.close()

    @property
    def seconds_left(self) -> float | None:
        made = self.done - self.first
        return (time.perf_counter() - self._begin) / made * (self.total - self.done) if made else None

    def advance(self, count: int = 1, preview: Callable[[], np.ndarray] | None = None) -> None:
        self.done += count
        self._bar.update(count)
        if self.on_progress is not None:
            self.on_progress(Progress(self.name, self.done, self.total, self.seconds_left, preview))


class Told:
    """A caller's `on_progress`, and whether it raised. After two calls of the UNet it says how long all of them will take."""

    def __init__(self, on_progress: OnProgress | None, say: Callable[[str], None]):
        self.on_progress, self.say, self.stopped, self._calls = on_progress, say, False, 0

    def __call__(self, progress: Progress) -> None:
        self._calls += progress.stage == "denoising"
        if self._calls == 2 and progress.seconds_left is not None and progress.stage == "denoising":
            self.say(f"about {duration(progress.seconds_left)} to denoise")
        if self.on_progress is None:
            return
        try:
            self.on_progress(progress)
        except Exception:
            self.stopped = True
            raise


def duration(seconds: float) -> str:
    """45 s, 3 min, 2 h 05 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def to_pictures(pixels: Tensor) -> np.ndarray:
    """Pixels [n, 3, H, W] in about -1..1 -> uint8 [n, H, W, 3]."""
    pictures = ((pixels.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return pictures.permute(0, 2, 3, 1).cpu().numpy()


class Animator:
    """The models of a pipeline and what they do to tensors: conditions in, frames out. Training validates with it too."""

    def __init__(
        self,
        denoiser: Denoiser,
        base: BaseModels,
        device: torch.device,
        autocast: Callable[[], AbstractContextManager] = nullcontext,
        processes: Processes = Processes(),  # noqa: B008 (it holds nothing that could change)
        previews: bool = True,
        key_memory: float = KEY_MEMORY,
    ):
        """Everything must already be on `device`, or be fetched there by hooks. `autocast` is for the denoiser alone: the VAE
        overflows in fp16. `previews` are drawn by the VAE, for which hooks may have to move the UNet away.
        Keys and values of a video are kept if they take at most `key_memory` GB."""
        self.key_memory = key_memory
        self.denoiser, self.device, self.autocast = denoiser, device, autocast
        self.base, self.processes, self.previews = base, processes, previews

    def encode_portrait(self, portrait: PortraitPixels) -> Portrait:
        """Reference latent [1, C, H, W] (the VAE's mode, not scaled), CLIP embedding [1, E] and face mask [1, 1, h, w]."""
        latent = self.base.latents(portrait.pixels[None])
        if not torch.isfinite(latent).all():
            raise UserError(
                f"the VAE turned the portrait into numbers that are none, in {self.base.vae.dtype}: use --dtype fp32"
            )
        return Portrait(
            latent=latent,
            clip=self.base.embeddings(portrait.clip_pixels[None]),
            mask=portrait.mask[None].to(self.device),
        )

    def branches(self, still: Portrait, speech: Speech, settings: Settings) -> sampling.Branches:
        """Guidance branches as one UNet call of as many clips: nothing; the image; image and audio (SPEC.md section 5)."""
        contrast = settings.translation_contrast, settings.expression_contrast
        with self.autocast():
            branches = Branches(self.denoiser, still, speech, self.key_memory, contrast, settings.expression_floor)

        def velocities(x: Tensor, sigma: Tensor, indices: list[int], wanted: list[int]) -> Tensor:
            with self.autocast():
                return branches(x, sigma, indices, wanted)

        return velocities

    def start(self, still: Portrait, frames: int, seed: int) -> Tensor:
        """Noise [N, C, H, W], on the CPU if it is long. Drawn there, so that a seed means the same on every device."""
        noise = torch.randn((frames, *still.latent.shape[1:]), generator=torch.Generator().manual_seed(seed))
        return noise if noise.nbytes > LONG else noise.to(self.device)

    def animate(
        self,
        still: Portrait,
        speech: Speech,
        settings: Settings,
        seed: int,
        on_progress: OnProgress | None = None,
    ) -> np.ndarray:
        """A portrait and speech for N frames -> frames uint8 [N, 8 H, 8 W, 3]."""
        latents = self.latents(still, speech, self.start(still, len(speech), seed), settings, on_progress)
        return np.concatenate(list(self.decode(latents, settings.decode_chunk_size, on_progress)))

    def latents(
        self,
        still: Portrait,
        speech: Speech,
        noise: Tensor,
        settings: Settings,
        on_progress: OnProgress | None = None,
        unfinished: Unfinished | None = None,
    ) -> Tensor:
        """The denoised latents [N, C, H, W] that start from `noise`, like them; they are made in its place.

        With `unfinished`, what was kept of an earlier run is gone on from, and what is made is kept now and then.
        """
        sigmas = sampling.noise_levels(self.base.scheduler, settings.num_inference_steps).to(noise.device)
        factor = self.base.vae.config.scaling_factor
        kept, first = (unfinished.load() if unfinished else None) or ((), 0)
        x, memory = (*(latents.to(noise.device) for latents in kept), None, None)[:2]
        if x is None:
            x = noise.mul_(sigmas[0]).add_(still.latent.to(noise.device) * factor)
        del noise
        if memory is None and settings.solver != "euler":
            memory = torch.zeros_like(x)
        velocities = self.branches(still, speech, settings)
        windows = len(sampling.windows(len(speech), settings.num_frames, settings.overlap, 0))
        preview = None

        def checked(x: Tensor, sigma: Tensor, indices: list[int], wanted: list[int]) -> Tensor:
            nonlocal preview
            found = velocities(x.to(self.device), sigma.to(self.device), indices, wanted)
            if not torch.isfinite(found).all():
                step = int((sigmas == sigma).nonzero()[0, 0]) + 1
                raise UserError(f"{self._not_finite(settings)} (in step {step} of {len(sigmas) - 1})")
            if self.previews:
                middle = len(indices) // 2
                at = slice(middle, middle + 1)
                preview = partial(self._preview, denoised(x[at], sigma, found[-1, at].to(x.device)))
            return found.to(x.device)

        show = self.processes.main
        done, total = first * windows, windows * settings.num_inference_steps
        with Stage("denoising", total, "window", on_progress, done, show) as stage:

            def spread(work: Callable, jobs: list) -> Iterator:
                for result in self.processes.spread(work, jobs):
                    yield result
                    stage.advance(preview=preview)

            steps = sampling.sample(
                checked,
                x,
                sigmas,
                window=settings.num_frames,
                overlap=settings.overlap,
                shift_offset=settings.shift_offset,
                image_scale=settings.guidance_scale_image,
                audio_scale=settings.guidance_scale_audio,
                solver=settings.solver,
                guidance_interval=settings.guidance_interval,
                first=first,
                memory=memory,
                spread=spread,
            )
            for step, x in enumerate(steps, start=first + 1):
                if unfinished and self.processes.main:
                    unfinished.keep([x] if memory is None else [x, memory], step)
        return x

    @property
    def computes_in(self) -> torch.dtype:
        """The precision of the UNet."""
        return self.denoiser.dtype

    def _not_finite(self, settings: Settings) -> str:
        """What to do about latents that are no numbers any more."""
        if self.computes_in == torch.float16:
            return "the latents hold NaN or infinity, which fp16 overflows to: use --dtype bf16, or fp32"
        scales = f"--guidance_scale_image {settings.guidance_scale_image}, --guidance_scale_audio "
        return (
            "the latents hold NaN or infinity: the weights are broken, or the guidance is too strong, lower "
            f"{scales}{settings.guidance_scale_audio}"
        )

    @torch.inference_mode()
    def _preview(self, latent: Tensor) -> np.ndarray:
        """One latent [1, C, H, W] -> a small picture."""
        (picture,) = to_pictures(self._decoded(latent))
        scale = PREVIEW_SIDE / max(picture.shape[:2])
        return cv2.resize(picture, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA) if scale < 1 else picture

    def decode(self, latents: Tensor, chunk: int, on_progress: OnProgress | None = None) -> Iterator[np.ndarray]:
        """Latents [N, C, H, W] -> frames uint8 [n, 8 H, 8 W, 3], a chunk at a time, without a seam between chunks."""
        overlap = min(DECODE_OVERLAP, chunk // 2)
        with Stage("decoding", len(latents), "frame", on_progress, show=self.processes.main) as stage:
            for part in self.decode_pixels(latents, chunk, overlap):
                yield to_pictures(part)
                stage.advance(len(part))

    def decode_pixels(self, latents: Tensor, chunk: int, overlap: int = 0) -> Iterator[Tensor]:
        """Latents [N, C, H, W] -> pixels [n, 3, 8 H, 8 W] in about -1..1, `chunk` at a time.

        Without an overlap as the published implementation does it. With one, a chunk fades into the next over those frames.
        """
        pieces = decode_pieces(len(latents), chunk, overlap)

        def work(piece: range) -> Tensor:
            return self._decoded(latents[piece.start : piece.stop])

        spread = self.processes.spread if overlap else sampling.one_by_one  # only then have all pieces one length
        starts = [*[piece.start for piece in pieces[1:]], len(latents)]
        common = None
        for (piece, pixels), following in zip(spread(work, pieces), starts, strict=True):
            if common is not None and len(common):
                share = torch.arange(1, len(common) + 1, device=pixels.device) / (len(common) + 1)
                pixels[: len(common)] = torch.lerp(
                    common, pixels[: len(common)], share.view(-1, 1, 1, 1).to(pixels.dtype)
                )
            yield pixels[: following - piece.start]
            common = pixels[following - piece.start :]

    def _decoded(self, latents: Tensor) -> Tensor:
        """Latents [n, C, H, W] of one chunk -> pixels [n, 3, 8 H, 8 W]."""
        vae = self.base.vae
        part = (latents.to(self.device) / vae.config.scaling_factor).to(vae.dtype)
        return vae.decode(part, num_frames=len(part)).sample


def decode_pieces(frames: int, chunk: int, overlap: int) -> list[range]:
    """The chunks that frames are decoded in. With an overlap all are of one length, the last one moved back for it."""
    chunk = min(chunk, frames)
    if not overlap or chunk == frames:
        return [range(start, min(start + chunk, frames)) for start in range(0, frames, chunk)]
    starts = range(0, frames - overlap, chunk - overlap)
    return [range(min(start, frames - chunk), min(start, frames - chunk) + chunk) for start in starts]
