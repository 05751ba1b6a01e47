"""The data-dependent start of audio2token: what varies from frame to frame must get through, whatever stands beside it."""

import torch

from sonic.adapters import AudioToken
from sonic.denoiser import token_spread


def drowned_speech(count):
    """Windows [n, 10, 2, 8] whose sound is a hundredth of a constant: as if positions and biases were all one heard."""
    generator = torch.Generator().manual_seed(1)
    sound = torch.randn(count, 10, 2, 8, generator=generator) * torch.linspace(0.2, 2, 8)
    return sound + 100 * torch.randn(10, 2, 8, generator=torch.Generator().manual_seed(2))


def spread(adapter, windows):
    with torch.no_grad():
        return token_spread(adapter(windows)[None]).item()


def test_fitted_tokens_follow_what_varies():
    torch.manual_seed(0)
    adapter = AudioToken(layers=2, width=8, hidden=48, token_width=16, tokens=4)
    before = spread(adapter, drowned_speech(200))
    adapter.fit(drowned_speech(2000))
    assert spread(adapter, drowned_speech(200)) > 0.3 > 10 * before


def test_first_layer_gives_every_direction_the_same_variance():
    torch.manual_seed(0)
    adapter = AudioToken(layers=2, width=8, hidden=200, token_width=16, tokens=4)
    windows = drowned_speech(3000)
    adapter.fit(windows)
    with torch.no_grad():
        first = adapter.proj1(windows.flatten(1))
    assert first.mean(0).abs().max() < 0.02
    assert abs(first.var(0).mean() - 1) < 0.05  # 160 directions spread over 200 outputs, mean variance 1
    deviation = torch.linalg.svdvals(first - first.mean(0)) / 3000**0.5
    assert deviation[0] < 1.05 * deviation[159] and deviation[160] < 1e-2 * deviation[0]


def test_fit_keeps_form_and_survives_features_that_never_vary():
    torch.manual_seed(0)
    adapter = AudioToken(layers=2, width=8, hidden=48, token_width=16, tokens=4)
    shapes = {name: tensor.shape for name, tensor in adapter.state_dict().items()}
    windows = drowned_speech(100)
    windows[:, :, :, 3:] = 7.0  # fewer directions than outputs
    adapter.fit(windows)
    assert {name: tensor.shape for name, tensor in adapter.state_dict().items()} == shapes
    assert all(tensor.isfinite().all() for tensor in adapter.state_dict().values())
