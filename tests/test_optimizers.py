"""Muon: what its updates are, who gets them, and that it learns and resumes."""

import pytest
import torch
from torch import nn

from sonic import optimizers
from sonic.optimizers import ADAM_RMS, Muon, is_matrix, orthogonal


@pytest.mark.parametrize("shape", [(20, 50), (50, 20)])
def test_updates_have_singular_values_near_one(shape):
    matrices = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.1, 10, shape[1])
    updates = orthogonal(matrices)
    for matrix, update in zip(matrices, updates, strict=True):
        before, after = torch.linalg.svdvals(matrix), torch.linalg.svdvals(update)
        assert before[0] > 3 * before[-1]
        assert after[-1] > 0.6 and after[0] < 1.3
        assert (update * matrix).sum() > 0  # still downhill
        assert torch.allclose(orthogonal(matrix[None])[0], update, atol=1e-5)


def test_matrices_of_one_shape_move_the_same_together_or_one_by_one(monkeypatch):
    def moved(at_once):
        monkeypatch.setattr(optimizers, "AT_ONCE", at_once)
        torch.manual_seed(0)
        layers = nn.Sequential(*(nn.Linear(12, 12) for _ in range(5)), nn.Conv1d(12, 12, 1), nn.Linear(12, 20))
        values = [layer.weight for layer in layers]
        optimizer = Muon(values, lr=0.1)
        for _ in range(3):
            for value in values:
                value.grad = torch.randn_like(value)
            optimizer.step()
        return torch.cat([value.detach().flatten() for value in values])

    assert torch.allclose(moved(2**22), moved(1), atol=1e-5) and torch.allclose(moved(2**22), moved(300), atol=1e-5)


def test_small_and_flat_weights_are_left_to_adamw():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.GroupNorm(4, 16), nn.Conv2d(16, 16, 3), nn.Conv2d(16, 3, 3))
    optimizer = Muon(model.parameters(), lr=1e-2, weight_decay=0.0)
    before = [value.detach().clone() for value in model.parameters()]
    model(torch.randn(2, 3, 9, 9)).square().mean().backward()
    optimizer.step()
    moved = {tuple(value.shape): (value - old).detach() for value, old in zip(model.parameters(), before, strict=True)}
    muon = {shape for shape, change in moved.items() if change.abs().max() > 1.05e-2 or change.abs().min() < 0.9e-2}
    # AdamW's first step is the learning rate in every number; Muon's has that size only in the mean.
    assert muon == {(16, 3, 3, 3), (16, 16, 3, 3)}
    assert moved[16, 16, 3, 3].square().mean().sqrt() == pytest.approx(ADAM_RMS * 1e-2, rel=0.3)
    assert not is_matrix(torch.zeros(3, 144)) and is_matrix(torch.zeros(16, 3, 3, 3))


def quadratic(optimizer_of, steps, resume_at=None):
    """Loss of a badly conditioned linear fit after so many steps, at a rate that falls to zero."""
    generator = torch.Generator().manual_seed(0)
    mixed = torch.linalg.qr(torch.randn(20, 20, generator=generator)).Q
    x = torch.randn(200, 20, generator=generator) * torch.logspace(-1.5, 0.5, 20) @ mixed
    y = x @ torch.randn(20, 12, generator=generator)
    torch.manual_seed(0)
    layer = nn.Linear(20, 12)
    optimizer = optimizer_of(layer.parameters())
    for step in range(steps):
        if step == resume_at:
            state = optimizer.state_dict()
            optimizer = optimizer_of(layer.parameters())
            optimizer.load_state_dict(state)
        loss = (layer(x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = 0.1 * (1 - step / steps)
        optimizer.step()
    return loss.item()


def test_it_learns():
    def make(values):
        return Muon(values, lr=0.1)

    assert quadratic(make, 200) < 0.01 * quadratic(make, 1)


def test_resumed_equals_unbroken():
    def make(values):
        return Muon(values, lr=0.1, weight_decay=0.01)

    assert quadratic(make, 20, resume_at=9) == quadratic(make, 20)
