"""SonicPipeline: portrait + speech -> frames -> file (SPEC.md sections 2 to 5).

Axes: N frames of the video, W frames of a window, K audio tokens, D their width, C H W latent channels, height and width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from sonic import media, sampling
from sonic.audio import (
    AudioExtractor,
    check_features,
    frame_ticks,
    load_extractor,
    long_windows,
    short_windows,
)
from sonic.checkpoints import BaseModels, load_base, load_whisper, open_checkpoint, whisper_folder
from sonic.config import MOTION_SCALES, NO_CROP, POSITIVE, TICK_RATE, Settings, SonicConfig, UserError
from sonic.denoiser import Denoiser, Portrait
from sonic.portrait import PortraitPixels, prepare_portrait
from sonic.record import make_record, name_model, to_metadata

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# What a pipeline is made of; everything else in SonicConfig may change from one call to the next.
FIXED = ("checkpoint", "base_model", "whisper_path", "audio_extractor", "device", "dtype")
TOKEN_BATCH = 256  # frames whose audio goes through the adapters at once

ImageLike = str | Path | Image.Image | np.ndarray


@dataclass
class Progress:
    """How far a video is: `done` of `total` UNet calls or frames of its stage; `preview` gives a small uint8 [h, w, 3] picture
    of it by now, or None."""

    stage: str  # listening, denoising or decoding
    done: int
    total: int
    seconds_left: float | None = None
    preview: Callable[[], np.ndarray | None] | None = None


OnProgress = Callable[[Progress], None]


@dataclass
class AudioFeatures:
    """features [2 · ticks, S, W] at 50 per second, the name of their extractor, and the speech they came from, [n] float32 at
    16 kHz. A pipeline that hears with another extractor listens to that speech again."""

    features: Tensor
    extractor: str
    speech: np.ndarray


@dataclass
class SonicVideo:
    """frames uint8 [N, H, W, 3] RGB, their rate, the speech that belongs to them, [n] float32 at 16 kHz, or None, and the
    record of how they were made (`sonic.record`), or None."""

    frames: np.ndarray
    fps: float
    speech: np.ndarray | None = None
    record: dict | None = None

    def __len__(self) -> int:
        return len(self.frames)


def extract_audio_features(
    audio: str | Path | np.ndarray, config: SonicConfig | None = None, extractor: AudioExtractor | None = None
) -> AudioFeatures:
    """Features of a sound file, or of speech [n] float32 at 16 kHz, by the Whisper (or own extractor) that the config names."""
    return _extract(audio, extractor or make_extractor(config or SonicConfig()))


def make_extractor(config: SonicConfig) -> AudioExtractor:
    """The user's own audio extractor if the config names one, else the checkpoint's Whisper."""
    if config.audio_extractor:
        return load_extractor(config.audio_extractor)
    return load_whisper(whisper_folder(config.checkpoint, config.whisper_path))


def _extract(audio: str | Path | np.ndarray, extractor: AudioExtractor) -> AudioFeatures:
    speech = audio if isinstance(audio, np.ndarray) else media.load_audio(audio)
    if speech.ndim != 1 or speech.dtype.kind != "f":
        raise UserError(
            f"the speech is an array {speech.dtype} {speech.shape}, expected float32 [n] at 16 kHz, one channel"
        )
    return AudioFeatures(check_features(extractor(speech), extractor, len(speech)), extractor.name, speech)


def as_image(image: ImageLike) -> Image.Image:
    """A path, a PIL image, or an array as `cv2.imread` gives it (BGR, BGRA or grey, uint8) -> RGB. Raises UserError otherwise."""
    if isinstance(image, str | Path):
        return media.load_image(image)
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] not in (1, 3, 4)):
            raise UserError(
                f"the portrait is an array {image.dtype} {image.shape}, expected uint8 [H, W, 3] in BGR order"
            )
        if image.ndim == 2 or image.shape[2] == 1:
            image = Image.fromarray(image.reshape(image.shape[:2]))
        else:
            order = cv2.COLOR_BGRA2RGBA if image.shape[2] == 4 else cv2.COLOR_BGR2RGB
            image = Image.fromarray(cv2.cvtColor(image, order))
    elif not isinstance(image, Image.Image):
        raise UserError(f"the portrait must be a path, a PIL image or an array, not {type(image).__name__}")
    return media.to_rgb(image, "the portrait")


def save_video(
    video: SonicVideo | np.ndarray, path: str | Path, fps: float = TICK_RATE, speech: np.ndarray | None = None
) -> None:
    """Writes H.264 with AAC sound, and the record if there is one. Of a bare array uint8 [N, H, W, 3] RGB, `fps` and `speech`
    (16 kHz) must be said."""
    record = None
    if isinstance(video, SonicVideo):
        video, fps, speech, record = video.frames, video.fps, video.speech, video.record
    media.save_video(video, path, fps, speech, to_metadata(record))


def pick_device(name: str) -> torch.device:
    """The device a flag names; `auto` takes cuda, then mps, then cpu. Raises UserError if it is not there."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(device for device, there in available.items() if there)
    if not available[name]:
        raise UserError(f"device '{name}' is not available here, use --device cpu")
    return torch.device(name)


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The precision a flag names; `auto` takes fp16 on cuda and fp32 elsewhere."""
    if name == "auto":
        name = "fp16" if device.type == "cuda" else "fp32"
    if name == "fp16" and device.type == "cpu":
        raise UserError("fp16 is too slow and too narrow on a CPU, use --dtype fp32 or --dtype bf16")
    return DTYPES[name]


@dataclass
class Speech:
    """The spoken side of a condition: audio tokens [N, K, D], those of silence [K, D], motion buckets [N, 2], frames per second."""

    tokens: Tensor
    silence: Tensor
    buckets: Tensor
    fps: float

    def __len__(self) -> int:
        return len(self.tokens)


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
    ):
        """Everything must already be on `device`. `autocast` is for the denoiser alone: the VAE overflows in fp16."""
        self.denoiser, self.device, self.autocast = denoiser, device, autocast
        self.base = base

    def encode_portrait(self, portrait: PortraitPixels) -> Portrait:
        """Reference latent [1, C, H, W] (the VAE's mode, not scaled), CLIP embedding [1, E] and face mask [1, 1, h, w]."""
        return Portrait(
            latent=self.base.latents(portrait.pixels[None]),
            clip=self.base.embeddings(portrait.clip_pixels[None]),
            mask=portrait.mask[None].to(self.device),
        )

    def branches(self, still: Portrait, speech: Speech) -> sampling.Branches:
        """Guidance branches as one UNet call of as many clips: nothing; the image; image and audio (SPEC.md section 5)."""
        keep_image = torch.tensor([0.0, 1.0, 1.0], device=self.device)
        stills = Portrait(still.latent.expand(3, -1, -1, -1), still.clip.expand(3, -1), still.mask).kept(keep_image)

        def velocities(x: Tensor, sigma: Tensor, indices: list[int], wanted: list[int]) -> Tensor:
            count = len(wanted)
            seen = Portrait(stills.latent[wanted], stills.clip[wanted], stills.mask)
            quiet = speech.silence.expand(len(indices), -1, -1)
            heard = torch.stack([quiet, quiet, speech.tokens[indices]])[wanted]
            bucket = speech.buckets[indices].mean(0).expand(count, -1)  # one pair per window: the mean of its frames'
            rate = torch.full((count,), speech.fps, device=self.device)
            clips = x.expand(count, -1, -1, -1, -1)
            with self.autocast():
                return self.denoiser.velocity(clips, sigma.expand(count), seen, heard, bucket, rate).float()

        return velocities

    def decode(self, latents: Tensor, chunk: int) -> Iterator[np.ndarray]:
        """Latents [N, C, H, W] -> frames uint8 [n, 8 H, 8 W, 3], `chunk` at a time."""
        for part in self.decode_pixels(latents, chunk):
            yield to_pictures(part)

    def decode_pixels(self, latents: Tensor, chunk: int) -> Iterator[Tensor]:
        """Latents [N, C, H, W] -> pixels [n, 3, 8 H, 8 W] in about -1..1, `chunk` at a time."""
        vae = self.base.vae
        for part in latents.split(chunk):
            part = (part / vae.config.scaling_factor).to(vae.dtype)
            yield vae.decode(part, num_frames=len(part)).sample

    def animate(
        self,
        still: Portrait,
        speech: Speech,
        settings: Settings,
        seed: int,
        on_progress: OnProgress | None = None,
    ) -> np.ndarray:
        """A portrait and speech for N frames -> frames uint8 [N, 8 H, 8 W, 3]."""
        # Drawn on the CPU, so that a seed means the same on every device.
        shape = (len(speech), *still.latent.shape[1:])
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(self.device)
        latents = self.latents(still, speech, noise, settings, on_progress)
        return np.concatenate(list(self.decode(latents, settings.decode_chunk_size)))

    def latents(
        self,
        still: Portrait,
        speech: Speech,
        noise: Tensor,
        settings: Settings,
        on_progress: OnProgress | None = None,
    ) -> Tensor:
        """The denoised latents [N, C, H, W] that start from `noise`, like them."""
        sigmas = sampling.noise_levels(self.base.scheduler, settings.num_inference_steps).to(self.device)
        velocities = self.branches(still, speech)
        windows = len(sampling.windows(len(speech), settings.num_frames, settings.overlap, 0))
        total, calls = windows * settings.num_inference_steps, count(1)

        shown: list[Tensor] = []

        def preview() -> np.ndarray | None:
            if not shown:
                return None
            middle = shown[0][len(shown[0]) // 2][None]
            return next(self.decode(middle / max(1.0, float(middle.std())), 1))[0]

        def counted(x: Tensor, sigma: Tensor, indices: list[int], wanted: list[int]) -> Tensor:
            result = velocities(x, sigma, indices, wanted)
            bar.update()
            if on_progress is not None:
                on_progress(Progress("denoising", next(calls), total, preview=preview))
            return result

        with tqdm(total=total, desc="denoising", unit="window", disable=None, leave=False) as bar:
            for latents in sampling.sample(
                counted,
                still.latent * self.base.vae.config.scaling_factor + sigmas[0] * noise,
                sigmas,
                window=settings.num_frames,
                overlap=settings.overlap,
                shift_offset=settings.shift_offset,
                image_scale=settings.guidance_scale_image,
                audio_scale=settings.guidance_scale_audio,
            ):
                shown.append(latents)
                del shown[:-1]
        return latents


class SonicPipeline:
    """A loaded model. Calls do not change it: overrides hold for one call."""

    def __init__(self, config: SonicConfig | None = None, audio_extractor: AudioExtractor | None = None):
        """Loads the weights that the config names. `audio_extractor` is for models trained on other features than Whisper's."""
        self.config = config or SonicConfig()
        self.device = pick_device(self.config.device)
        dtype = pick_dtype(self.config.dtype, self.device)
        if audio_extractor is None and self.config.audio_extractor:
            audio_extractor = load_extractor(self.config.audio_extractor)
        checkpoint = open_checkpoint(
            self.config.checkpoint, self.config.base_model, self.config.whisper_path, audio_extractor
        )
        self.settings = checkpoint.settings
        self.extractor = audio_extractor or load_whisper(checkpoint.whisper_path)
        denoiser = checkpoint.load(dtype).eval().requires_grad_(False).to(self.device)
        self.model = name_model(
            self.config.checkpoint, checkpoint.tensors.get("audio2token", checkpoint.tensors["unet"])
        )
        # SVD's VAE overflows in fp16 (force_upcast in its configuration): bf16 or fp32 only.
        base = load_base(checkpoint.base_model, dtype, dtype if dtype == torch.bfloat16 else torch.float32)
        self.animator = Animator(denoiser, base.to(self.device), self.device)

    def extract_audio_features(self, audio: str | Path | np.ndarray) -> AudioFeatures:
        """Features of a sound file, or of speech [n] float32 at 16 kHz, as this model hears them."""
        return _extract(audio, self.extractor)

    @torch.inference_mode()
    def generate(
        self,
        reference_image: ImageLike,
        audio_features: AudioFeatures,
        num_frames: int | None = None,
        motion_buckets: dict[str, float] | None = None,
        face_box: str | tuple[float, float, float, float] | None = None,
        on_progress: OnProgress | None = None,
        **overrides,
    ) -> SonicVideo:
        """Makes the portrait speak.

        Args:
            reference_image: path, PIL image, or an array in cv2's BGR order.
            audio_features: from `extract_audio_features`.
            num_frames: at most this many frames; without it, as many as the speech has.
            motion_buckets: `translation` and/or `expression`, 0 to 127; what is absent is predicted.
            face_box: x0, y0, x1, y1 in pixels, or "full"; without it the largest face is found.
            on_progress: called with the UNet calls done and their total.
            overrides: any field of SonicConfig that is no part of the model, for this call alone.

        Raises UserError for a portrait without a face and for values out of range.
        """
        config = self._config(overrides, motion_buckets)
        settings = self._settings(config)
        features = self._features(audio_features)
        if num_frames is not None:
            try:
                num_frames = POSITIVE(num_frames)
            except ValueError as error:
                raise UserError(f"num_frames {error}") from None
        portrait = prepare_portrait(
            as_image(reference_image),
            settings.resolution,
            face_box,
            settings.crop,
            self.animator.base.image_encoder.config.image_size,
            where=str(reference_image) if isinstance(reference_image, str | Path) else "the portrait",
        )
        ticks = frame_ticks(features, settings.frame_step)[:num_frames]
        if len(ticks) == 0:
            raise UserError(f"the speech is shorter than one video frame of {settings.frame_step / TICK_RATE:.2f} s")

        still = self.animator.encode_portrait(portrait)
        speech = Speech(
            self.audio_tokens(features, ticks),
            self.animator.denoiser.audio2token.silence(),
            self.motion_buckets(features, ticks, still.clip, config),
            fps=TICK_RATE / settings.frame_step,
        )
        frames = self.animator.animate(still, speech, settings, config.seed, on_progress)
        record = self._record(config, settings, reference_image, face_box)
        return SonicVideo(frames, speech.fps, audio_features.speech, record)

    def save_video(self, video: SonicVideo, output_path: str | Path) -> None:
        """Writes H.264 with AAC sound."""
        save_video(video, output_path)

    def generate_video(
        self, image_path: ImageLike, audio_path: str | Path, output_path: str | Path, **arguments
    ) -> Path:
        """From files to a file; `arguments` are those of `generate`. Returns the output's path."""
        as_image(image_path)  # a broken picture is refused before the speech is listened to
        features = self.extract_audio_features(audio_path)
        video = self.generate(image_path, features, **arguments)
        video.record["audio"] = Path(audio_path).name  # of the folders it lay in, nothing is told
        save_video(video, output_path)
        return Path(output_path)

    def audio_tokens(self, features: Tensor, ticks: Tensor) -> Tensor:
        """Features of the whole speech -> audio tokens [N, K, D] of these ticks."""
        audio2token = self.animator.denoiser.audio2token
        dtype = audio2token.proj1.weight.dtype
        return torch.cat(
            [audio2token(short_windows(features, part).to(self.device, dtype)) for part in ticks.split(TOKEN_BATCH)]
        )

    def motion_buckets(self, features: Tensor, ticks: Tensor, clip: Tensor, config: SonicConfig) -> Tensor:
        """Translation and expression bucket per frame [N, 2]: predicted or given by hand, times the dynamic scale."""
        audio2bucket = self.animator.denoiser.audio2bucket
        dtype = audio2bucket.proj1.weight.dtype
        predicted = []
        for part in ticks.split(TOKEN_BATCH):
            windows = long_windows(features, part).to(self.device, dtype)
            predicted.append(audio2bucket.buckets(windows, clip.to(dtype).expand(len(part), -1)))
        buckets = torch.cat(predicted)[:, :2].float()
        for column, by_hand in enumerate((config.translation_bucket, config.expression_bucket)):
            if by_hand is not None:
                buckets[:, column] = by_hand
        return buckets * (MOTION_SCALES[config.motion] if config.dynamic_scale is None else config.dynamic_scale)

    def _config(self, overrides: dict, motion_buckets: dict[str, float] | None) -> SonicConfig:
        """This call's configuration. A value of another model or device is refused, an unknown name too."""
        known = {field.name for field in dataclasses.fields(SonicConfig)} - set(FIXED)
        for name in overrides:
            if name not in known:
                raise UserError(f"'{name}' is no setting of one call; there are {', '.join(sorted(known))}")
        for name, value in (motion_buckets or {}).items():
            if name not in ("translation", "expression"):
                raise UserError(f"motion bucket '{name}' is unknown: there are translation and expression")
            overrides = {**overrides, f"{name}_bucket": value}
        return dataclasses.replace(self.config, **overrides)

    def _settings(self, config: SonicConfig) -> Settings:
        """The checkpoint's settings, with what the configuration says otherwise."""
        names = [field.name for field in dataclasses.fields(Settings) if hasattr(config, field.name)]
        said = {name: getattr(config, name) for name in names if getattr(config, name) is not None}
        if said.get("crop") == NO_CROP:
            said["crop"] = None
        settings = dataclasses.replace(self.settings, **said)
        if settings.overlap >= settings.num_frames:
            raise UserError(f"overlap {settings.overlap} must be below the window of {settings.num_frames} frames")
        return settings

    def _record(self, config: SonicConfig, settings: Settings, image: ImageLike, face_box) -> dict:
        """How a video was made: what the flags would be that give it again, and on what."""
        said = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
        said |= {name: value for name, value in dataclasses.asdict(settings).items() if name in said}
        said = {name: value for name, value in said.items() if name not in FIXED}
        said["crop"] = NO_CROP if settings.crop is None else settings.crop
        said["face_box"] = face_box if face_box is None or isinstance(face_box, str) else ",".join(map(str, face_box))
        return make_record(
            self.model,
            said,
            device=self.device.type,
            dtype=str(next(self.animator.denoiser.parameters()).dtype).removeprefix("torch."),
            torch=torch.__version__,
            image=Path(image).name if isinstance(image, str | Path) else None,
        )

    def _features(self, audio_features: AudioFeatures) -> Tensor:
        if audio_features.extractor == self.extractor.name:
            return audio_features.features
        return _extract(audio_features.speech, self.extractor).features
