"""What a training run measures on held-out clips, with the same windows and the same noise every time.

The number to watch is the audio gap: a model that does not listen has none, long before a loss or a video shows it.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate

from sonic import media, sound
from sonic.animator import Animator, to_pictures
from sonic.clips import Clip
from sonic.config import SAMPLES_PER_TICK, TICK_RATE, Settings, UserError
from sonic.denoiser import Denoiser, TrainingBatch
from sonic.guided import Speech
from sonic.training import Encoders, draw, face_share
from sonic.training_config import P_MEAN, P_STD, TrainingConfig

WINDOWS = 8  # fixed windows, spread over the clips
GAP_SIGMAS = (1.0, 3.0)  # where the noise hides the lips but not the face
VIDEO_WINDOWS = 3  # the sample video is at most this many training windows long
# Whatever a run trains with, it is measured without dropout and at the usual noise levels.
MEASURED_WITH = {
    "audio_drop_prob": 0.0,
    "image_drop_prob": 0.0,
    "both_drop_prob": 0.0,
    "noise_draws": 1,
    "flip": 0.0,
    "p_mean": P_MEAN,
    "p_std": P_STD,
}


def face_loss(velocity_map: Tensor, mask: Tensor) -> Tensor:
    """Mean of a loss map [B, F, H, W] inside the face masks [B, 1, h, w] of any size, per clip [B]."""
    weight = face_share(mask, velocity_map.shape)
    inside = (velocity_map * weight).sum((1, 2, 3))
    return inside / (weight.sum((1, 2, 3)) * velocity_map.shape[1]).clamp_min(1e-6)


class Validation:
    """Held-out clips, encoded once. Every process runs the same; only the main one writes."""

    def __init__(self, clips: list[Clip], config: TrainingConfig, settings: Settings, encoders: Encoders):
        self.config = replace(config, **MEASURED_WITH)
        self.settings, self.encoders, self.clips = settings, encoders, clips
        samples = encoders.dataset(clips, replace(self.config, seed=0))
        self.batches, self.names = [], []
        for number in range(WINDOWS):
            sample = samples[number]
            encoded = encoders(default_collate([sample]))
            self.batches.append((encoded, draw(self.config, [number], encoded.latents.shape[1:])))
            self.names.append(sample["name"])

    @torch.no_grad()
    def measure(self, model: Denoiser) -> dict[str, float]:
        """Validation loss, bucket loss, token spread, and the audio gap at each sigma (None without a second clip's audio)."""
        losses = [model(encoded.with_noise(noise)) for encoded, noise in self.batches]
        means = {
            "validation_loss": np.mean([one.velocity.item() for one in losses]),
            "validation_bucket_loss": np.mean([one.bucket.item() for one in losses]),
            "validation_token_spread": np.mean([one.token_spread.item() for one in losses]),
        }
        gaps = {f"audio_gap_sigma_{sigma:g}": self._gap(model, sigma) for sigma in GAP_SIGMAS}
        return {name: value if value is None else float(value) for name, value in {**means, **gaps}.items()}

    def _gap(self, model: Denoiser, sigma: float) -> float | None:
        """Loss inside the face with another clip's audio, minus that with the right one, same noise; the mean over windows."""
        gaps = []
        for index, (encoded, noise) in enumerate(self.batches):
            others = [
                batch[0] for batch, name in zip(self.batches, self.names, strict=True) if name != self.names[index]
            ]
            if not others:
                continue
            batch = encoded.with_noise(replace(noise, sigma=torch.full_like(noise.sigma, sigma)))
            wrong = replace(batch, short_windows=others[index % len(others)].short_windows)
            gaps.append(self._face(model, wrong) - self._face(model, batch))
        return float(np.mean(gaps)) if gaps else None

    @staticmethod
    def _face(model: Denoiser, batch: TrainingBatch) -> float:
        return face_loss(model(batch).velocity_map, batch.portrait.mask).item()

    @torch.no_grad()
    def video(self, animator: Animator, path: Path | None, trackers: list, step: int) -> None:
        """Animates a held-out clip's reference frame with its own speech and buckets; the left half is the truth.

        Written to `path` and to the trackers, unless `path` is None (a process that only takes part in the computing).
        """
        clip = max(self.clips, key=lambda clip: clip.num_ticks)
        wanted = VIDEO_WINDOWS * self.settings.num_frames
        frames = min(wanted, (clip.num_ticks - 1) // self.settings.frame_step)
        samples = self.encoders.dataset([clip], replace(self.config, num_frames=frames, seed=0))
        sample = samples[0]
        encoded = self.encoders(default_collate([sample]))
        audio2token = animator.denoiser.audio2token
        fps = TICK_RATE / self.settings.frame_step
        tokens, buckets = audio2token(encoded.short_windows)[0], encoded.buckets.expand(frames, -1)
        heard = Speech(tokens, audio2token.silence(), buckets, fps)
        try:
            made = animator.animate(encoded.portrait, heard, self.settings, seed=0)
        except UserError as error:  # NaN, early in a run: no reason to end it
            print(f"no sample video: {error}")
            return
        if path is None:
            return
        truth = to_pictures(samples.frames(0))
        first, last = int(sample["ticks"][0]), int(sample["ticks"][-1]) + self.settings.frame_step
        first, last = first - clip.offset, last - clip.offset  # where these pictures are heard
        (speech,) = sound.audio_stretches(clip.path, [(first * SAMPLES_PER_TICK, last * SAMPLES_PER_TICK)])
        beside = np.concatenate([truth, made], axis=2)
        media.save_video(beside, path, fps, speech)
        for tracker in trackers:
            if tracker.name == "wandb":
                import wandb  # only a run that reports there needs it

                tracker.log({"validation_video": wandb.Video(str(path))}, step=step)
            if tracker.name == "tensorboard":
                # Its own video writer wants an old moviepy; every fifth frame tells as much.
                tracker.writer.add_images("validation_frames", beside[::5], step, dataformats="NHWC")
