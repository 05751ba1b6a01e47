"""Guidance and time-aware position shift fusion as pure functions (SPEC.md section 5; paper section 3.4).

Axes: N frames of the video, W frames of a window, C H W latent channels, height and width.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial

import torch
from diffusers import EulerDiscreteScheduler
from torch import Tensor

from sonic.denoiser import denoised

# (x [W, C, H, W], sigma scalar, frame indices, n of the three branches) -> their velocities [n, W, C, H, W].
# Branch 0 has neither image nor audio, 1 has the image, 2 has both.
Branches = Callable[[Tensor, Tensor, list[int], list[int]], Tensor]
# (what to do with a window, the windows) -> each window with its result, in order; several processes may share the work.
Spread = Callable[[Callable[[list[int]], Tensor], list[list[int]]], Iterable[tuple[list[int], Tensor]]]


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
    """One Euler step of dx/dsigma = (x - x0)/sigma, written so that at high noise no large number is taken from another."""
    return x0 + (x - x0) * (next_sigma / sigma)


def two_step(x: Tensor, x0: Tensor, last_x0: Tensor, last_sigma: Tensor, sigma: Tensor, next_sigma: Tensor) -> Tensor:
    """One step of DPM-Solver++(2M) (Lu et al. 2022, algorithm 2): x0 goes on in a straight line over the log of the noise level,
    as from the step before to this one. The last step, to 0, ends at x0, where the line would lead anywhere."""
    if next_sigma == 0:
        return x0
    way, last_way = (sigma / next_sigma).log(), (last_sigma / sigma).log()
    ahead = x0 + (x0 - last_x0) * way / (2 * last_way)
    return next_sigma / sigma * x + (1 - next_sigma / sigma) * ahead


def estimate(branches: Branches, x: Tensor, sigma: Tensor, shares: dict[int, float], indices: list[int]) -> Tensor:
    """The guided estimate of x0 for one window of x [N, C, H, W], [W, C, H, W]."""
    velocities = branches(x[indices], sigma, indices, list(shares))
    v = sum(share * velocity for share, velocity in zip(shares.values(), velocities, strict=True))
    return denoised(x[indices], sigma, v.to(x.dtype))


def one_by_one(work: Callable[[list[int]], Tensor], jobs: list[list[int]]) -> Iterator[tuple[list[int], Tensor]]:
    """The `Spread` of a process that works alone."""
    return ((job, work(job)) for job in jobs)


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
    first: int = 0,
    memory: Tensor | None = None,
    spread: Spread = one_by_one,
) -> Iterator[Tensor]:
    """Denoises x [N, C, H, W] (start latents plus sigmas[0] · noise) in place and yields it after every step.

    The windows' seams move by `shift_offset` frames per step. Estimates of x0 are averaged where windows overlap, which is for a
    step the same as averaging stepped latents. Noise levels outside `guidance_interval` are denoised by the branch with image
    and audio alone. `first` steps were made already.

    x is all that grows with the video: a frame is overwritten after its last window. `dpmpp_2m` remembers the estimates of the
    step before, of frames and not of windows, in `memory`, like x; whoever wants to go on later keeps both.
    """
    frames, steps = len(x), len(sigmas) - 1
    if memory is None and solver == "dpmpp_2m":
        memory = torch.zeros_like(x)
    for step in range(first, steps):
        shares = branch_shares(1.0, 1.0)
        if in_interval(float(sigmas[step]), guidance_interval):
            shares = branch_shares(ramp(image_scale, step, steps), ramp(audio_scale, step, steps))
        plan = windows(frames, window, overlap, step * shift_offset)
        visits = Counter(index for indices in plan for index in indices)
        left, sums = visits.copy(), {}

        for indices, result in spread(partial(estimate, branches, x, sigmas[step], shares), plan):
            for index, x0 in zip(indices, result, strict=True):
                sums[index] = sums[index] + x0 if index in sums else x0
                left[index] -= 1
                if not left[index]:
                    x0 = sums.pop(index) / visits[index]
                    if memory is None or step == 0:
                        x[index] = euler_step(x[index], x0, *sigmas[step : step + 2])
                    else:
                        x[index] = two_step(x[index], x0, memory[index], *sigmas[step - 1 : step + 2])
                    if memory is not None:
                        memory[index] = x0
        yield x
