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


def inside(sigma: float, interval: tuple[float, float] | None) -> bool:
    """Whether guidance is on at this noise level (Kynkäänniemi et al. 2024, "Applying Guidance in a Limited Interval")."""
    return interval is None or interval[0] <= sigma <= interval[1]


# ---------------------------------------------------------------------------------------------- solvers
# A solver is a generator of one step after another: it is sent x0 wherever it asks for it. It yields (x, sigma, done), asks for
# the estimate of x0 there if not done, and has made a step if done. Tensors are whole videos [N, C, H, W].


def euler_step(x: Tensor, x0: Tensor, sigma: Tensor, next_sigma: Tensor) -> Tensor:
    """One Euler step of dx/dsigma = (x - x0)/sigma."""
    return x + (x - x0) / sigma * (next_sigma - sigma)
