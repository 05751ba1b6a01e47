"""What the training loop in `sonic_training.py` is made of: batches, noise, frozen encoders, losses,
checkpoints of a run.

Everything random is drawn per sample from (seed, sample number), never from a global generator, and a run counts the samples
it has seen. So a run that is cut and resumed, also with other numbers of workers or processes, goes through the same samples
with the same noise and dropout, none twice and none left out.

Axes: B clips, F frames of a window, R pixels of a side, C H W latent channels, height and width (R / 8).
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from einops import rearrange
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from sonic.audio import short_windows
from sonic.checkpoints import BaseModels, training_checkpoints
from sonic.clips import Clip
from sonic.config import Settings, UserError
from sonic.dataset import SonicDataset
from sonic.denoiser import ClipBatch, Losses, Portrait, TrainingBatch, draw_sigma
from sonic.files import remove_folder
from sonic.run_log import PROVENANCE, RunState
from sonic.trainable import Trained
from sonic.training_config import TrainingConfig

# The bucket predictor shares no weights with the UNet, so this only decides how much of the clipped gradient norm is its
# own: raw, its error of 10 to 40 at the start would take nearly all of it.
BUCKET_LOSS_WEIGHT = 0.05

# What torch.save says of a full disk, depending on where it meets the end of it.
TORCH_CANNOT_WRITE = ("failed writing", "unexpected pos", "iostream error")


# ---------------------------------------------------------------------------------------------- samples and noise


class SampleNumbers:
    """The batches of one process, as lists of global sample numbers: batch i of process r begins at sample
    first + (i · world + r) · B, so that together the processes go through the samples in order."""

    def __init__(self, first: int, batches: int, batch_size: int, rank: int = 0, world: int = 1):
        self.first, self.batches, self.batch_size, self.rank, self.world = first, batches, batch_size, rank, world

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[list[int]]:
        for batch in range(self.batches):
            start = self.first + (batch * self.world + self.rank) * self.batch_size
            yield list(range(start, start + self.batch_size))


class Numbered(torch.utils.data.Dataset):
    """A dataset whose samples carry their number, from which their noise is drawn."""

    def __init__(self, samples: torch.utils.data.Dataset):
        self.samples = samples

    def __getitem__(self, number: int) -> dict:
        return {**self.samples[number], "number": number}


def readable(loader: Iterable[dict]) -> Iterator[dict]:
    """The loader's batches. torch wraps a worker's error into a page of text, of which the last sentence is ours."""
    try:
        yield from loader
    except UserError as error:
        raise UserError(str(error).strip().rpartition("UserError: ")[2]) from None


@dataclass
class Draw:
    """sigma [B], noise [B, F, C, H, W], and what is kept of the conditions, [B] each."""

    sigma: Tensor
    noise: Tensor
    keep_audio: Tensor
    keep_image: Tensor


def generator_for(seed: int, *numbers: int) -> torch.Generator:
    """A generator that depends on the run's seed and these numbers and on nothing else."""
    words = np.random.SeedSequence([seed, *numbers]).generate_state(2, np.uint32)
    return torch.Generator().manual_seed(int(words[0]) << 32 | int(words[1]))


def draw(config: TrainingConfig, numbers: list[int], shape: tuple[int, ...]) -> Draw:
    """Noise level, noise of this shape per sample, and dropout: audio, image and both exclude each other (SPEC.md section 6).

    `config.p_mean` must be one number here; a run replaces a ramp by what it has come to at its step.
    With several `noise_draws`, all samples' first draws come first, then their second ones, and so on.
    """
    sigmas, noises, audio, image = [], [], [], []
    no_audio = config.audio_drop_prob
    no_image = no_audio + config.image_drop_prob
    neither = no_image + config.both_drop_prob
    for turn, number in itertools.product(range(config.noise_draws), numbers):
        generator = generator_for(config.seed, number, *[turn] * (turn > 0))
        sigmas.append(draw_sigma(1, config.p_mean, config.p_std, generator))
        noises.append(torch.randn(shape, generator=generator))
        chance = torch.rand((), generator=generator).item()
        # In this order along 0..1: no audio, no image, neither, and the rest with both.
        audio.append(not (chance < no_audio or no_image <= chance < neither))
        image.append(not no_audio <= chance < neither)
    return Draw(torch.cat(sigmas), torch.stack(noises), torch.tensor(audio).float(), torch.tensor(image).float())


# ---------------------------------------------------------------------------------------------- frozen encoders


class EncodedClip(ClipBatch):
    """What is left of a batch of samples when the frozen encoders have seen it: all that `TrainingBatch` needs but noise."""

    def repeated(self, times: int) -> EncodedClip:
        """The batch that many times in a row, for as many draws of noise."""
        if times == 1:
            return self

        def again(parts: dict[str, Tensor]) -> dict[str, Tensor]:
            return {name: value.repeat(times, *[1] * (value.ndim - 1)) for name, value in parts.items()}

        clip = dict(vars(self))
        return EncodedClip(portrait=Portrait(**again(vars(clip.pop("portrait")))), **again(clip))

    def with_noise(self, noise: Draw) -> TrainingBatch:
        """A batch for the loss, on this clip's device."""
        here = {name: value.to(self.latents.device) for name, value in vars(noise).items()}
        return TrainingBatch(**vars(self), **here)


class Encoders:
    """The frozen VAE and CLIP encoder, which must already be on the training device, and the samples that they read."""

    def __init__(self, base: BaseModels, device: torch.device):
        self.base, self.device = base, device

    def models(self) -> BaseModels:
        """What a validation video is decoded with."""
        return self.base

    def dataset(self, clips: Sequence[Clip], config: TrainingConfig) -> SonicDataset:
        """The samples that a call takes, collated."""
        return SonicDataset(clips, clip_size=self.base.image_encoder.config.image_size, **sample_settings(config))

    @torch.no_grad()
    def __call__(self, samples: dict) -> EncodedClip:
        """Collated samples of `SonicDataset` -> latents [B, F, C, H, W] (scaled) and conditions."""
        frames = rearrange(samples["frames"], "b f c h w -> (b f) c h w")
        latents = rearrange(encode_frames(self.base, frames), "(b f) c h w -> b f c h w", b=len(samples["frames"]))
        latents = latents * self.base.vae.config.scaling_factor
        reference, clip = encode_frames(self.base, samples["reference"]), self.base.embeddings(samples["clip_pixels"])
        return encoded_clip(samples, latents, reference, clip, self.device)


def encode_frames(base: BaseModels, frames: Tensor) -> Tensor:
    """Pixels [n, 3, R, R] -> latents, not scaled, float32 [n, C, H, W], one by one: a frame's are then the same to the bit
    whatever it is encoded with. Of several at once the kernels round otherwise, and on a CPU they take longer."""
    # Contiguous, as workers deliver them: another memory layout would round differently too.
    return torch.cat([base.latents(frame) for frame in frames.contiguous().split(1)])


def encoded_clip(samples: dict, latents: Tensor, reference: Tensor, clip: Tensor, device: torch.device) -> EncodedClip:
    """Collated samples and what the encoders made of their pictures: scaled latents [B, F, C, H, W], latents of the
    reference [B, C, H, W], not scaled, and CLIP embeddings [B, E]."""
    return EncodedClip(
        latents=latents,
        portrait=Portrait(reference, clip, samples["mask"].to(device)),
        short_windows=samples["audio_windows"].to(device),
        long_windows=samples["bucket_windows"].to(device),
        buckets=samples["buckets"].to(device).float(),
        fps=samples["fps"].to(device).float(),
    )


def sample_settings(config: TrainingConfig) -> dict:
    """What a run's flags say of its samples, as `SonicDataset` takes it."""
    names = ("num_frames", "frame_step", "resolution", "crop_per", "flip", "seed")
    return {name: getattr(config, name) for name in names}


def face_share(mask: Tensor, shape: torch.Size) -> Tensor:
    """The share of each cell that lies in the face: mask [B, 1, h, w] of any size to [B, 1, H, W], `shape` being [..., H, W]."""
    return F.interpolate(mask.float(), size=shape[-2:], mode="area")


def loss_weight(config: TrainingConfig, lips: Tensor, faces: Tensor) -> Tensor:
    """How much the loss counts where: [B, F, H, W], from lips [B, F, H, W] and faces [B, 1, h, w] of any size, both in 0..1.

    1 outside of the face; what the flags give to the face and to the lips on top of that adds up where they are.
    """
    faces = face_share(faces, lips.shape)
    return 1 + (config.face_loss_weight - 1) * faces + (config.lip_loss_weight - 1) * lips


def total_loss(losses: Losses, weight: Tensor | float = 1.0) -> Tensor:
    """What is differentiated: the UNet's loss, weighted [B, F, H, W], plus the bucket predictor's."""
    return (weight * losses.velocity_map).mean() + BUCKET_LOSS_WEIGHT * losses.bucket


def lip_loss(losses: Losses, lips: Tensor) -> float:
    """Mean squared error of v around the lips alone."""
    return ((losses.velocity_map.detach() * lips).sum() / lips.sum().clamp_min(1e-6)).item()


def audio_windows(clips: Sequence[Clip], count: int, seed: int) -> Tensor:
    """Short windows at random ticks of the clips, about `count` of them: [n, 10, S, W]."""
    rng, each, found = np.random.default_rng([seed, 0]), math.ceil(count / len(clips)), []
    for clip in clips:
        features = load_file(clip.features)["features"]
        ticks = clip.start - clip.offset + rng.integers(clip.num_ticks, size=each)
        found.append(short_windows(features, torch.from_numpy(ticks)))
    return torch.cat(found)[:count]


# ---------------------------------------------------------------------------------------------- checkpoints of a run


def resume_state(accelerator: Accelerator, folder: Path) -> None:
    """Restores optimizer, scheduler, scaler, random states and `RunState`. Raises UserError if the state is damaged."""
    try:
        accelerator.load_state(str(folder / "state"))
    except Exception as error:  # junk can make the unpickler fail in any way
        what = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"the training state in '{folder}' is damaged ({what}): resume from an earlier checkpoint"
        ) from error


def keep_model_out_of_state(accelerator: Accelerator) -> None:
    """Weights are saved once, in our own form, and loaded from there before accelerate restores the rest."""
    accelerator.register_save_state_pre_hook(lambda models, weights, folder: weights.clear())
    accelerator.register_load_state_pre_hook(lambda models, folder: models.clear())


def save_training_checkpoint(
    folder: Path, accelerator: Accelerator, trained: Trained, state: RunState, made_of: dict
) -> None:
    """Model in our form, in the released form, all that a resumed run needs, and what the run is made of. Called by every
    process."""
    state.share(accelerator)
    accelerator.save_state(str(folder / "state"), safe_serialization=True)
    trained.save(folder, accelerator.is_main_process)
    if accelerator.is_main_process:
        (folder / PROVENANCE).write_text(json.dumps(made_of, indent=1) + "\n")


def keep_checkpoints(output_dir: Path, limit: int | None) -> None:
    """Deletes a run's oldest checkpoints beyond the limit. The newest, which has just been written whole, always stays."""
    for folder in training_checkpoints(output_dir)[: -limit if limit else 0]:
        remove_folder(folder)


@contextlib.contextmanager
def saved_or_said(target: Path) -> Iterator[None]:
    """Raises UserError, with the folder and what is left to resume from, when a checkpoint cannot be written."""
    full_disk = (OSError, RuntimeError, SafetensorError)  # as Python, torch and safetensors tell of it
    try:
        yield
    except full_disk as error:
        if isinstance(error, RuntimeError) and not any(words in str(error) for words in TORCH_CANNOT_WRITE):
            raise
        kept = training_checkpoints(target.parent)
        before = f"the last complete checkpoint is {kept[-1]}" if kept else "there is no earlier checkpoint"
        free = shutil.disk_usage(target.parent).free / 1e9
        raise UserError(
            f"cannot write {target} ({str(error).splitlines()[0]}; {free:.1f} GB are free there): {before}; make room and "
            "go on with --resume_from_checkpoint latest"
        ) from error


# ---------------------------------------------------------------------------------------------- what is trained, and how long


def optimizer_steps(config: TrainingConfig, clips: int, world: int) -> tuple[int, int]:
    """Optimizer steps per epoch and in all; an epoch is one window of every clip."""
    per_epoch = math.ceil(clips / (config.train_batch_size * config.gradient_accumulation_steps * world))
    return per_epoch, config.max_train_steps or per_epoch * config.num_train_epochs


def with_model_defaults(config: TrainingConfig, settings: Settings) -> TrainingConfig:
    """Window length, frame step and resolution that no flag gave are the model's own; latents in a cache need clip squares."""
    own = {name: getattr(settings, name) for name in ("num_frames", "frame_step", "resolution")}
    own["crop_per"] = "clip" if config.cache_latents else "window"
    return replace(config, **{name: value for name, value in own.items() if getattr(config, name) is None})
