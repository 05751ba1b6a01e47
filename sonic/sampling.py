"""Guidance and time-aware position shift fusion as pure functions (SPEC.md section 5; paper section 3.4).

Axes: N frames of the video, W frames of a window, C H W latent channels, height and width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from diffusers import EulerDiscreteScheduler
from torch import Tensor

from sonic.denoiser import denoised

# (x [W, C, H, W], sigma scalar, frame indices, n of the three branches) -> their velocities [n, W, C, H, W].
# Branch 0 has neither image nor audio, 1 has the image, 2 has both.
Branches = Callable[[Tensor, Tensor, list[int], list[int]], Tensor]


def noise_levels(scheduler: EulerDiscreteScheduler, steps: int) -> Tensor:
    """The scheduler's sigmas for this many steps, [steps + 1], the last one 0."""
    scheduler.set_timesteps(steps)
    return scheduler.sigmas


def windows(frames: int, window: int, overlap: int, shift: int) -> list[list[int]]:
    """Frame indices of every window of one step: starts 0, W - overlap, ... < N, moved back by `shift`, modulo N (a ring).

    A video shorter than the window makes the window as short. Raises ValueError if the overlap leaves no way forward.
    """
    if not 0 <= overlap < window:
        raise ValueError(f"overlap {overlap} must be at least 0 and below the window of {window} frames")
    window = min(window, frames)
    overlap = min(overlap, window - 1)
    starts = range(0, frames, window - overlap)
    return [[(start - shift + i) % frames for i in range(window)] for start in starts]


def ramp(value: float | tuple[float, float], step: int, steps: int) -> float:
    """A number, or one that goes linearly from the first to the second of a pair over the steps."""
    first, last = value if isinstance(value, tuple) else (value, value)
    return first + (last - first) * step / max(steps - 1, 1)


def branch_shares(image_scale: float, audio_scale: float) -> dict[int, float]:
    """What the branches count for in v = u + s_image (m - u) + s_audio (c - m); those that count for nothing are left out."""
    shares = {0: 1 - image_scale, 1: image_scale - audio_scale, 2: audio_scale}
    return {branch: share for branch, share in shares.items() if share}


def euler_step(x: Tensor, velocity: Tensor, sigma: Tensor, next_sigma: Tensor) -> Tensor:
    """One Euler step of dx/dsigma = (x - x0)/sigma."""
    slope = (x - denoised(x, sigma, velocity)) / sigma
    return x + slope * (next_sigma - sigma)


def sample(
    branches: Branches,
    x: Tensor,
    sigmas: Tensor,
    *,
    window: int,
    overlap: int = 0,
    shift_offset: int = 0,
    image_scale: float | tuple[float, float] = 2.0,
    audio_scale: float | tuple[float, float] = 7.5,
) -> Iterator[Tensor]:
    """Denoises x [N, C, H, W] (start latents plus sigmas[0] · noise) and yields it after every step; the last one is the result.

    The windows' seams move by `shift_offset` frames per step; where windows overlap, their stepped latents are averaged.
    """
    frames, steps = len(x), len(sigmas) - 1
    for step in range(steps):
        sigma, next_sigma = sigmas[step], sigmas[step + 1]
        total, count = torch.zeros_like(x), torch.zeros(frames, 1, 1, 1, dtype=x.dtype, device=x.device)
        shares = branch_shares(ramp(image_scale, step, steps), ramp(audio_scale, step, steps))
        for indices in windows(frames, window, overlap, step * shift_offset):
            velocities = branches(x[indices], sigma, indices, list(shares))
            v = sum(share * velocity for share, velocity in zip(shares.values(), velocities, strict=True))
            total[indices] += euler_step(x[indices], v.to(x.dtype), sigma, next_sigma)
            count[indices] += 1
        x = total / count
        yield x
