from itertools import pairwise

import pytest
import torch
from diffusers import EulerDiscreteScheduler

from sonic.config import SCHEDULER
from sonic.sampling import branch_shares, euler_step, noise_levels, ramp, sample, windows


@pytest.mark.parametrize("frames", [1, 2, 5, 7, 25, 26, 49])
@pytest.mark.parametrize(("window", "overlap"), [(5, 0), (5, 2), (25, 0), (25, 10)])
@pytest.mark.parametrize("shift", [0, 3, 14, 1000])
def test_every_frame_is_in_a_window(frames, window, overlap, shift):
    found = windows(frames, window, overlap, shift)
    assert {index for indices in found for index in indices} == set(range(frames))
    assert all(len(indices) == len(set(indices)) == min(window, frames) for indices in found)
    for indices in found:  # consecutive on the ring
        assert all((a + 1) % frames == b for a, b in pairwise(indices))


def test_windows_move_back_on_the_ring():
    assert windows(9, 5, 0, 0) == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 0]]
    assert windows(9, 5, 0, 2) == [[7, 8, 0, 1, 2], [3, 4, 5, 6, 7]]
    assert windows(12, 5, 2, 0) == [[0, 1, 2, 3, 4], [3, 4, 5, 6, 7], [6, 7, 8, 9, 10], [9, 10, 11, 0, 1]]
    assert windows(3, 5, 2, 1) == [[2, 0, 1], [0, 1, 2], [1, 2, 0]]


def test_overlap_must_leave_a_way_forward():
    with pytest.raises(ValueError, match="overlap 5"):
        windows(9, 5, 5, 0)


def test_guidance():
    u, m, c = 1.0, 2.0, 4.0
    shares = branch_shares(2.0, 7.5)
    assert shares[0] * u + shares[1] * m + shares[2] * c == u + 2.0 * (m - u) + 7.5 * (c - m)
    # A scale of 1 or 0 needs fewer branches.
    assert branch_shares(1.0, 3.0) == {1: -2.0, 2: 3.0}
    assert branch_shares(2.0, 0.0) == {0: -1.0, 1: 2.0}
    assert branch_shares(1.0, 1.0) == {2: 1.0} and branch_shares(0.0, 0.0) == {0: 1.0}
    assert [ramp((1.0, 3.0), step, 5) for step in range(5)] == [1.0, 1.5, 2.0, 2.5, 3.0]
    assert ramp((2.0, 5.0), 0, 1) == 2.0
    assert [ramp(2.0, step, 5) for step in range(5)] == [2.0] * 5


def test_euler_step_is_the_schedulers():
    scheduler = EulerDiscreteScheduler.from_config(SCHEDULER)
    sigmas = noise_levels(scheduler, 6)
    x, v = torch.randn(2, 4, 8, 8, dtype=torch.float64) * 700, torch.randn(2, 4, 8, 8, dtype=torch.float64)
    for step, timestep in enumerate(scheduler.timesteps):
        expected = scheduler.step(v, timestep, x).prev_sample
        found = euler_step(x, v, sigmas[step], sigmas[step + 1])
        assert torch.allclose(found, expected, atol=1e-4), step
        x = expected


def exact(target):
    """Branches whose guided velocity always points at `target`, so that sampling must end there."""

    def velocities(x, sigma, indices, wanted):
        x0 = target[indices]
        v = (x / (sigma**2 + 1) - x0) * (sigma**2 + 1).sqrt() / sigma
        return v.expand(len(wanted), *v.shape)

    return velocities


@pytest.mark.parametrize(("overlap", "shift"), [(0, 0), (0, 3), (2, 3)])
def test_sampling_reaches_what_the_model_knows(overlap, shift):
    sigmas = noise_levels(EulerDiscreteScheduler.from_config(SCHEDULER), 8)
    target = torch.randn(11, 4, 2, 2)
    start = target + sigmas[0] * torch.randn(11, 4, 2, 2)
    *_, found = sample(exact(target), start, sigmas, window=5, overlap=overlap, shift_offset=shift)
    assert torch.allclose(found, target, atol=2e-3)


def test_only_the_branches_that_count_are_asked_for():
    asked = []

    def velocities(x, sigma, indices, wanted):
        asked.append(wanted)
        return torch.stack([torch.full_like(x, float(branch)) for branch in wanted])

    sigmas, x = torch.tensor([3.0, 2.0, 1.0]), torch.ones(2, 1, 1, 1)
    seen = [
        latents.clone()
        for latents in sample(velocities, x.clone(), sigmas, window=2, image_scale=(1.0, 2.0), audio_scale=(3.0, 0.0))
    ]
    assert asked == [[1, 2], [0, 1]]
    assert torch.equal(seen[0], euler_step(x, torch.full_like(x, 1 - 3 + 3 * 2), *sigmas[:2]))  # m + 3 (c - m)


def test_seams_lie_elsewhere_at_every_step():
    sigmas = noise_levels(EulerDiscreteScheduler.from_config(SCHEDULER), 4)
    seen = []

    def velocities(x, sigma, indices, wanted):
        seen.append(indices[0])
        return x.expand(len(wanted), *x.shape)

    list(sample(velocities, torch.randn(10, 1, 1, 1), sigmas, window=5, shift_offset=3))
    assert seen == [0, 5, 7, 2, 4, 9, 1, 6]


def test_overlapping_windows_are_averaged():
    """Two windows that disagree about their common frame leave it in the middle."""
    sigmas = torch.tensor([1.0, 0.5])

    def velocities(x, sigma, indices, wanted):
        v = torch.full_like(x, 1.0 if indices[0] == 0 else 3.0)
        return v.expand(len(wanted), *v.shape)

    x = torch.zeros(4, 1, 1, 1)
    (found,) = sample(velocities, x.clone(), sigmas, window=3, overlap=1)
    one, three = (euler_step(x[:1], torch.full((1, 1, 1, 1), v), *sigmas).item() for v in (1.0, 3.0))
    # windows 0 1 2 and 2 3 0: frames 0 and 2 lie in both
    assert found.flatten().tolist() == pytest.approx([(one + three) / 2, one, (one + three) / 2, three])
