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


def in_interval(sigma: float, interval: tuple[float, float] | None) -> bool:
    """Whether guidance is on at this noise level (Kynkäänniemi et al. 2024, "Applying guidance in a limited interval")."""
    return interval is None or interval[0] <= sigma <= interval[1]


def euler_step(x: Tensor, x0: Tensor, sigma: Tensor, next_sigma: Tensor) -> Tensor:
    """One Euler step of dx/dsigma = (x - x0)/sigma."""
    return x + (x - x0) / sigma * (next_sigma - sigma)


def two_step(x: Tensor, x0: Tensor, last_x0: Tensor, last_sigma: Tensor, sigma: Tensor, next_sigma: Tensor) -> Tensor:
    """One step of DPM-Solver++(2M) (Lu et al. 2022, algorithm 2): x0 goes on in a straight line over the log of the noise level,
    as from the step before to this one. The last step, to 0, ends at x0, where the line would lead anywhere."""
    if next_sigma == 0:
        return x0
    way, last_way = (sigma / next_sigma).log(), (last_sigma / sigma).log()
    ahead = x0 + (x0 - last_x0) * way / (2 * last_way)
    return next_sigma / sigma * x + (1 - next_sigma / sigma) * ahead


def estimate(branches: Branches, x: Tensor, sigma: Tensor, places: list[list[int]], shares: dict[int, float]) -> Tensor:
    """The guided estimate of x0, [N, C, H, W], out of those of the windows at these places, averaged where they overlap."""
    total, count = torch.zeros_like(x), torch.zeros(len(x), 1, 1, 1, dtype=x.dtype, device=x.device)
    for indices in places:
        velocities = branches(x[indices], sigma, indices, list(shares))
        v = sum(share * velocity for share, velocity in zip(shares.values(), velocities, strict=True))
        total[indices] += denoised(x[indices], sigma, v.to(x.dtype))
        count[indices] += 1
    return total / count


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
    solver: str = "euler",
    guidance_interval: tuple[float, float] | None = None,
) -> Iterator[Tensor]:
    """Denoises x [N, C, H, W] (start latents plus sigmas[0] · noise) and yields it after every step; the last one is the result.

    The windows' seams move by `shift_offset` frames per step. Estimates of x0 are averaged where windows overlap, which is for a
    step the same as averaging stepped latents; what `dpmpp_2m` remembers of the step before belongs to frames, not to windows.
    Noise levels outside `guidance_interval` are denoised by the branch with image and audio alone.
    """
    steps, last_x0 = len(sigmas) - 1, None
    for step in range(steps):
        sigma, next_sigma = sigmas[step], sigmas[step + 1]
        shares = branch_shares(1.0, 1.0)
        if in_interval(float(sigma), guidance_interval):
            shares = branch_shares(ramp(image_scale, step, steps), ramp(audio_scale, step, steps))
        x0 = estimate(branches, x, sigma, windows(len(x), window, overlap, step * shift_offset), shares)
        if solver == "euler" or last_x0 is None:
            x = euler_step(x, x0, sigma, next_sigma)
        else:
            x = two_step(x, x0, last_x0, sigmas[step - 1], sigma, next_sigma)
        last_x0 = x0
        yield x
