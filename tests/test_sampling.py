from itertools import pairwise

import pytest
import torch
from diffusers import EulerDiscreteScheduler

from sonic.denoiser import denoised
from sonic.presets import SCHEDULER
from sonic.sampling import branch_shares, euler_step, in_interval, noise_levels, ramp, sample, two_step, windows


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
        found = euler_step(x, denoised(x, sigmas[step], v), sigmas[step], sigmas[step + 1])
        assert torch.allclose(found, expected, atol=1e-4), step
        x = expected


def test_euler_step_loses_no_digits_at_high_noise():
    """From the highest level to almost none, where x is a thousand times what is left of it."""
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 1000, generator=generator)
    x, sigmas = x0 + 700 * noise, torch.tensor([700.0, 0.002])
    expected = euler_step(x.double(), x0.double(), *sigmas.double())
    assert (euler_step(x, x0, *sigmas) - expected).abs().max() < 1e-6


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
    x0 = denoised(x, sigmas[0], torch.full_like(x, 1 - 3 + 3 * 2))  # m + 3 (c - m)
    assert torch.equal(seen[0], euler_step(x, x0, *sigmas[:2]))


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
    one, three = (
        euler_step(x[:1], denoised(x[:1], sigmas[0], torch.full((1, 1, 1, 1), v)), *sigmas).item() for v in (1.0, 3.0)
    )
    # windows 0 1 2 and 2 3 0: frames 0 and 2 lie in both
    assert found.flatten().tolist() == pytest.approx([(one + three) / 2, one, (one + three) / 2, three])


def test_two_steps_see_further_than_one():
    """Where x0 goes on in a straight line over the log of the noise level, DPM-Solver++(2M) is nearly exact, Euler is not."""
    sigmas = torch.tensor([10.0, 6.0, 3.0], dtype=torch.float64)
    x = start = torch.tensor(20.0, dtype=torch.float64)
    for sigma, following in pairwise(torch.linspace(6.0, 3.0, 10001, dtype=torch.float64)):
        x = euler_step(x, ((sigma + following) / 2).log(), sigma, following)
    euler = euler_step(start, sigmas[1].log(), *sigmas[1:])
    better = two_step(start, sigmas[1].log(), sigmas[0].log(), *sigmas)
    assert abs(better - x) < 0.2 * abs(euler - x)


def test_the_last_step_ends_at_the_estimate():
    sigmas = torch.tensor([2.0, 1.0, 0.0])
    x, x0, last = torch.randn(3, 1, 2, 2, 2)
    assert torch.equal(two_step(x, x0, last, *sigmas), x0)
    assert torch.allclose(euler_step(x, x0, *sigmas[1:]), x0, atol=1e-6)


@pytest.mark.parametrize("solver", ["euler", "dpmpp_2m"])
def test_every_solver_reaches_what_the_model_knows(solver):
    """A model that knows the target only roughly where there is much noise: with windows that move and overlap."""
    sigmas = noise_levels(EulerDiscreteScheduler.from_config(SCHEDULER), 5)
    target = torch.randn(11, 4, 2, 2)
    start = target + sigmas[0] * torch.randn(11, 4, 2, 2)
    *_, found = sample(exact(target), start, sigmas, window=5, overlap=2, shift_offset=3, solver=solver)
    assert torch.allclose(found, target, atol=2e-3)


def test_what_a_solver_remembers_belongs_to_frames():
    """Each frame's x0 depends on itself alone, so windows that move must give what one window of all frames gives."""
    sigmas = noise_levels(EulerDiscreteScheduler.from_config(SCHEDULER), 6)
    bias = torch.linspace(-1, 1, 10)[:, None, None, None]

    def velocities(x, sigma, indices, wanted):
        x0 = bias[indices] * sigma.log()
        v = (x / (sigma**2 + 1) - x0) * (sigma**2 + 1).sqrt() / sigma
        return v.expand(len(wanted), *v.shape)

    start = sigmas[0] * torch.randn(10, 1, 2, 2)

    # The last step ends at the model's estimate with any solver: look at the one before it.
    def before_the_last(**arguments):
        return [x.clone() for x in sample(velocities, start.clone(), sigmas, **arguments)][-2]

    whole = before_the_last(window=10, solver="dpmpp_2m")
    moving = before_the_last(window=4, overlap=1, shift_offset=3, solver="dpmpp_2m")
    euler = before_the_last(window=10)
    assert torch.allclose(whole, moving, atol=1e-4)
    assert (whole - euler).abs().max() > 0.1


def test_a_solver_goes_on_with_what_it_remembers():
    sigmas = noise_levels(EulerDiscreteScheduler.from_config(SCHEDULER), 6)
    bias = torch.linspace(-1, 1, 10)[:, None, None, None]

    def velocities(x, sigma, indices, wanted):
        v = (x / (sigma**2 + 1) - bias[indices] * sigma.log()) * (sigma**2 + 1).sqrt() / sigma
        return v.expand(len(wanted), *v.shape)

    start = sigmas[0] * torch.randn(10, 1, 2, 2)
    options = {"window": 4, "overlap": 1, "shift_offset": 3, "solver": "dpmpp_2m"}
    whole = [x.clone() for x in sample(velocities, start.clone(), sigmas, **options)]
    x, memory = start.clone(), torch.zeros_like(start)
    steps = sample(velocities, x, sigmas, memory=memory, **options)
    for _ in range(3):
        next(steps)
    kept, memory = x.clone(), memory.clone()
    found = [x.clone() for x in sample(velocities, kept.clone(), sigmas, first=3, memory=memory, **options)]
    assert all(torch.equal(one, other) for one, other in zip(found, whole[3:], strict=True))
    # The last step ends at the model's estimate with any memory: look at the one before it.
    *_, forgetful, _ = [x.clone() for x in sample(velocities, kept.clone(), sigmas, first=3, **options)]
    assert not torch.allclose(forgetful, whole[-2], atol=1e-3)


def test_guidance_within_an_interval():
    assert in_interval(5.0, None) and in_interval(5.0, (5.0, 6.0)) and in_interval(6.0, (5.0, 6.0))
    assert not in_interval(4.9, (5.0, 6.0)) and not in_interval(6.1, (5.0, 6.0))
    asked = []

    def velocities(x, sigma, indices, wanted):
        asked.append((float(sigma), wanted))
        return x.expand(len(wanted), *x.shape)

    list(
        sample(
            velocities, torch.ones(2, 1, 1, 1), torch.tensor([8.0, 4.0, 2.0, 1.0]), window=2, guidance_interval=(3, 5)
        )
    )
    assert asked == [(8.0, [2]), (4.0, [0, 1, 2]), (2.0, [2])]
