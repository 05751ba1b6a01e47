"""SonicPipeline: portrait + speech -> frames -> file (SPEC.md sections 2 to 5).

Axes: N frames of the video, W frames of a window, K audio tokens, D their width, C H W latent channels, height and width.
"""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from sonic import media
from sonic.animator import Animator, OnProgress, Stage, Told
from sonic.audio import (
    AudioExtractor,
    frame_ticks,
    load_extractor,
    long_windows,
    short_windows,
)
from sonic.blocks import compile_unet, lay_out
from sonic.checkpoints import load_base, load_whisper, open_checkpoint
from sonic.config import MOTION_SCALES, NO_CROP, POSITIVE, TICK_RATE, Settings, SonicConfig, UserError
from sonic.denoiser import Portrait
from sonic.forecast import LONG, Forecast, Forecaster
from sonic.guided import LongTokens, Speech, VideoKeys
from sonic.in_and_out import AudioFeatures, ImageLike, SonicVideo, as_image, extract, save_video
from sonic.interpolation import factor_for, interpolate, load_rife, rife_file
from sonic.offload import bytes_to_come, place, quantized
from sonic.portrait import prepare_portrait
from sonic.processes import Processes
from sonic.record import make_record, name_model, to_metadata
from sonic.streaming import in_background
from sonic.unfinished import Unfinished

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# What a pipeline is made of; everything else in SonicConfig may change from one call to the next.
FIXED = ("checkpoint", "base_model", "whisper_path", "audio_extractor", "device", "dtype")
FIXED += ("compile", "key_memory", "offload", "quantize")
TOKEN_BATCH = 256  # frames whose audio goes through the adapters at once

Result = TypeVar("Result")


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
class Job:
    """One video to make, its conditions ready: what the models are given, and what becomes of the frames."""

    still: Portrait
    speech: Speech
    settings: Settings
    config: SonicConfig
    factor: int  # pictures in the file per picture of the model
    forecast: Forecast
    record: dict  # how it is made, for the file

    @property
    def fps(self) -> float:
        return self.speech.fps * self.factor

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the pictures."""
        height, width = self.still.latent.shape[-2:]
        return 8 * width, 8 * height


class SonicPipeline:
    """A loaded model. Calls do not change it: overrides hold for one call."""

    def __init__(
        self,
        config: SonicConfig | None = None,
        audio_extractor: AudioExtractor | None = None,
        processes: Processes | None = None,
    ):
        """Loads the weights that the config names. `audio_extractor` is for models trained on other features than Whisper's.
        Several `processes` make each video together: all of them must make the same calls."""
        self.config, self.processes = config or SonicConfig(), processes or Processes()
        self.device = self.processes.device or pick_device(self.config.device)
        dtype = pick_dtype(self.config.dtype, self.device)
        if audio_extractor is None and self.config.audio_extractor:
            audio_extractor = load_extractor(self.config.audio_extractor)
        checkpoint = open_checkpoint(
            self.config.checkpoint, self.config.base_model, self.config.whisper_path, audio_extractor
        )
        self.settings = checkpoint.settings
        self.extractor = audio_extractor or load_whisper(checkpoint.whisper_path)
        self.model = name_model(
            self.config.checkpoint, checkpoint.tensors.get("audio2token", checkpoint.tensors["unet"])
        )
        denoiser = checkpoint.load(dtype).eval().requires_grad_(False)
        # SVD's VAE overflows in fp16 (force_upcast in its configuration): bf16 or fp32 only.
        base = load_base(checkpoint.base_model, dtype, dtype if dtype == torch.bfloat16 else torch.float32)
        lay_out(denoiser.unet)
        if self.config.quantize == "int8":
            quantized(denoiser.unet)
        offload = self.config.offload
        to_come = bytes_to_come(denoiser, base, offload)
        place(denoiser, base, self.device, offload)
        if self.config.compile:
            compile_unet(denoiser.unet, self.device)
        self.animator = Animator(
            denoiser,
            base,
            self.device,
            processes=self.processes,
            previews=offload == "none",
            key_memory=self.config.key_memory,
        )
        self.forecaster = Forecaster(checkpoint.architecture, base.vae, dtype, self.device, to_come)
        self._weights = [checkpoint.base_model, *checkpoint.tensors.values()]

    def extract_audio_features(self, audio: str | Path | np.ndarray) -> AudioFeatures:
        """Features of a sound file, or of speech [n] float32 at 16 kHz, as this model hears them."""
        return extract(audio, self.extractor)

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
        """Makes the portrait speak. All frames are in memory at the end; `generate_video` keeps no more than a few.

        Args:
            reference_image: path, PIL image, or an array in cv2's BGR order.
            audio_features: from `extract_audio_features`.
            num_frames: at most this many frames of the model's; without it, as many as the speech has.
            motion_buckets: `translation` and/or `expression`, 0 to 127; what is absent is predicted.
            face_box: x0, y0, x1, y1 in pixels, or "full"; without it the largest face is found.
            on_progress: called with a `Progress` after every call of the UNet and every chunk of frames. What it raises ends
                the call at once.
            overrides: any field of SonicConfig that is no part of the model, for this call alone.

        Raises UserError for a portrait without a face, for values out of range, and for what does not fit into memory.
        """

        def work() -> SonicVideo:
            config = self._config(overrides, motion_buckets)
            job = self._job(reference_image, audio_features, num_frames, face_box, config, kept_frames=True)
            chunks = self.animator.decode(self._latents(job, on_progress), job.settings.decode_chunk_size, on_progress)
            frames = np.concatenate(list(self._at_rate(job, chunks)))
            return SonicVideo(frames, job.fps, audio_features.speech, job.record)

        return self._within_memory(work)

    def save_video(self, video: SonicVideo, output_path: str | Path) -> None:
        """Writes H.264 with AAC sound."""
        save_video(video, output_path)

    def generate_video(
        self,
        image_path: ImageLike,
        audio_path: str | Path,
        output_path: str | Path,
        num_frames: int | None = None,
        motion_buckets: dict[str, float] | None = None,
        face_box: str | tuple[float, float, float, float] | None = None,
        on_progress: OnProgress | None = None,
        resume: bool = False,
        say: Callable[[str], None] = lambda sentence: None,
        **overrides,
    ) -> Path:
        """From files to a file, of any length: frames are written while the next ones are decoded. Returns the output's path.

        The other arguments are those of `generate`. A run of more than two minutes keeps its state in OUTPUT.partial/ until it
        is done; `resume` goes on from there. `say` is told what the video will take, in sentences.
        """
        as_image(image_path)  # a broken picture is refused before the speech is listened to
        output = Path(output_path)

        def work() -> Path:
            config = self._config(overrides, motion_buckets)
            with Stage("listening", 1, "file", on_progress, show=False) as stage:
                features = self.extract_audio_features(audio_path)
                stage.advance()
            job = self._job(image_path, features, num_frames, face_box, config)
            say(str(job.forecast))
            unfinished = Unfinished(output, self._key(job, features), resume, say)
            job.record["audio"] = Path(audio_path).name  # of the folders it lay in, nothing is told
            speech, told = features.speech, Told(on_progress, say)
            del features
            try:
                self._write(job, output, speech, told, unfinished)
            except Exception:
                if told.stopped:
                    unfinished.remove()
                raise
            if self.processes.main:
                unfinished.remove()
            return output

        return self._within_memory(work)

    def _within_memory(self, work: Callable[[], Result]) -> Result:
        """Does the work; where the device's memory is too small for it, what it held is let go and a UserError says what to do."""
        with torch.inference_mode():
            try:
                return work()
            except torch.OutOfMemoryError:
                pass  # only behind this block is everything let go that the exception's frames still hold
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        offloads = {"none": "--offload model, ", "model": "--offload sequential, "}
        raise UserError(
            f"the memory of {self.device} is full: use {offloads.get(self.config.offload, '')}--decode_chunk_size 1, "
            "a lower --resolution, or close other programs that use it"
        )

    def _job(
        self,
        reference_image: ImageLike,
        audio_features: AudioFeatures,
        num_frames: int | None,
        face_box: str | tuple[float, float, float, float] | None,
        config: SonicConfig,
        kept_frames: bool = False,
    ) -> Job:
        """The conditions of a video. Raises UserError for what cannot be made or does not fit into memory."""
        settings = self._settings(config)
        factor = factor_for(config.fps, TICK_RATE / settings.frame_step)
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

        height, width = portrait.pixels.shape[-2:]
        forecast = self.forecaster(
            (height // 8, width // 8),
            settings,
            len(ticks),
            TICK_RATE / settings.frame_step,
            held=features.nbytes
            + audio_features.speech.nbytes
            + 3 * height * width * len(ticks) * factor * kept_frames,
            keys=self._key_bytes(len(ticks)),
            chosen=config.decode_chunk_size is not None,
        )
        still = self.animator.encode_portrait(portrait)
        buckets, own_buckets = self.motion_buckets(features, ticks, still.clip, config)
        speech = Speech(
            self.audio_tokens(features, ticks),
            self.animator.denoiser.audio2token.silence(),
            buckets,
            TICK_RATE / settings.frame_step,
            own_buckets,
        )
        settings = dataclasses.replace(settings, decode_chunk_size=forecast.chunk)
        record = self._record(config, settings, reference_image, face_box)
        return Job(still, speech, settings, config, factor, forecast, record)

    def _key_bytes(self, frames: int) -> int:
        """What the keys and values of so many frames take, if they are kept."""
        denoiser = self.animator.denoiser
        element = denoiser.dtype.itemsize
        size = VideoKeys.gigabytes(denoiser.unet, frames, denoiser.audio2token.tokens, element)
        return round(1e9 * size) if size <= self.animator.key_memory else 0

    def _latents(self, job: Job, on_progress: OnProgress | None, unfinished: Unfinished | None = None) -> Tensor:
        noise = self.animator.start(job.still, len(job.speech), job.config.seed)
        return self.animator.latents(job.still, job.speech, noise, job.settings, on_progress, unfinished)

    def _at_rate(self, job: Job, chunks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """The model's frames -> as many per second as the call asks for."""
        path = rife_file() if job.factor > 1 else None
        between = load_rife(path, job.factor, self.device) if path else None
        return interpolate(chunks, job.factor, between, job.speech.fps)

    def _write(self, job: Job, output: Path, speech: np.ndarray, told: OnProgress, unfinished: Unfinished) -> None:
        """Denoises, decodes and writes; several processes compute, the main one writes."""
        if not self.processes.main:
            for _ in self.animator.decode(self._latents(job, None, unfinished), job.settings.decode_chunk_size):
                pass
            return
        # Opened first: a folder that cannot be written to should be known before hours of work.
        with media.VideoWriter(output, job.fps, *job.size, speech, to_metadata(job.record)) as writer:

            def write(chunks: Iterator[np.ndarray]) -> None:
                for part in self._at_rate(job, chunks):
                    writer.write(part)

            latents = self._latents(job, told, unfinished)
            with in_background(write) as put:
                for part in self.animator.decode(latents, job.settings.decode_chunk_size, told):
                    put(part)

    def _key(self, job: Job, features: AudioFeatures) -> str:
        """A name for all that decides a video's latents. How many frames are decoded at once is no part of it: that follows from
        free memory."""
        config, settings = self.config, dataclasses.asdict(job.settings)
        del settings["decode_chunk_size"]
        files = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in self._weights]
        said = [
            settings,
            job.config.seed,
            len(job.speech),
            config.dtype,
            config.quantize,
            files,
        ]
        digest = hashlib.sha256(json.dumps(said).encode())
        still, speech = job.still, job.speech
        for tensor in (still.latent, still.clip, still.mask, speech.buckets, speech.own_buckets, features.features):
            digest.update(tensor.float().cpu().contiguous().numpy().data)
        return digest.hexdigest()

    def audio_tokens(self, features: Tensor, ticks: Tensor) -> Tensor | LongTokens:
        """Features of the whole speech -> audio tokens [N, K, D] of these ticks; made later if they are very many."""
        audio2token = self.animator.denoiser.audio2token
        dtype = audio2token.proj1.weight.dtype

        def make(ticks: Tensor) -> Tensor:
            return audio2token(short_windows(features, ticks).to(self.device, dtype))

        if len(ticks) * audio2token.tokens * audio2token.token_width * dtype.itemsize > LONG:
            return LongTokens(ticks, make)
        return torch.cat([make(part) for part in ticks.split(TOKEN_BATCH)])

    def motion_buckets(
        self, features: Tensor, ticks: Tensor, clip: Tensor, config: SonicConfig
    ) -> tuple[Tensor, Tensor]:
        """Translation and expression bucket per frame [N, 2], as asked for (predicted or set by hand) and as predicted; both
        times the dynamic scale."""
        audio2bucket = self.animator.denoiser.audio2bucket
        dtype = audio2bucket.proj1.weight.dtype
        predicted = []
        for part in ticks.split(TOKEN_BATCH):
            windows = long_windows(features, part).to(self.device, dtype)
            predicted.append(audio2bucket.buckets(windows, clip.to(dtype).expand(len(part), -1)))
        own = torch.cat(predicted)[:, :2].float()
        buckets = own.clone()
        for column, by_hand in enumerate((config.translation_bucket, config.expression_bucket)):
            if by_hand is not None:
                buckets[:, column] = by_hand
        scale = MOTION_SCALES[config.motion] if config.dynamic_scale is None else config.dynamic_scale
        return buckets * scale, own * scale

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
        return extract(audio_features.speech, self.extractor).features
