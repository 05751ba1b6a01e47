import numpy as np
import pytest
import torch
from conftest import OWN_FEATURES

from sonic.audio import (
    CHUNK,
    AudioExtractor,
    check_features,
    frame_ticks,
    load_extractor,
    long_windows,
    num_ticks,
    short_windows,
)
from sonic.checkpoints import load_whisper
from sonic.config import UserError


@pytest.fixture(scope="module")
def whisper(tiny):
    return load_whisper(tiny / "whisper")


def noise(seconds, seed=0):
    return (np.random.default_rng(seed).standard_normal(int(16000 * seconds)) * 0.1).astype(np.float32)


def test_short_window_is_the_padded_slice():
    """4 zero features in front, 6 behind; tick i sees [2i, 2i + 10), SPEC.md section 2."""
    features = torch.randn(40, 3, 8)
    padded = torch.cat([torch.zeros(4, 3, 8), features, torch.zeros(6, 3, 8)])
    found = short_windows(features, torch.arange(20))
    assert found.shape == (20, 10, 3, 8)
    assert torch.equal(found, torch.stack([padded[2 * i : 2 * i + 10] for i in range(20)]))


def test_long_window_is_the_padded_slice_of_the_last_state():
    features = torch.randn(40, 3, 8)
    padded = torch.cat([torch.zeros(24, 1, 8), features[:, -1:], torch.zeros(26, 1, 8)])
    found = long_windows(features, torch.arange(20))
    assert found.shape == (20, 50, 1, 8)
    assert torch.equal(found, torch.stack([padded[2 * i : 2 * i + 50] for i in range(20)]))


def test_any_ticks_and_half_precision():
    features = torch.randn(40, 3, 8).half()
    every = short_windows(features, torch.arange(20))
    assert every.dtype == torch.float32
    assert torch.equal(short_windows(features, torch.tensor([7, 2, 19])), every[[7, 2, 19]])


@pytest.mark.parametrize(
    ("samples", "step", "frames"), [(640 * 84 + 639, 2, 42), (640 * 47, 1, 47), (640 * 5, 2, 2), (639, 1, 0)]
)
def test_clock(samples, step, frames):
    assert num_ticks(samples) == samples // 640
    ticks = frame_ticks(torch.zeros(2 * num_ticks(samples), 1, 1), step)
    assert ticks.tolist() == list(range(0, frames * step, step))


def test_features_are_cut_to_the_clock(whisper):
    assert whisper(noise(1.03)).shape == (2 * 25, 2, 16)


def test_speech_beyond_thirty_seconds_is_heard_in_chunks(whisper):
    speech = noise(32)
    features = whisper(speech)
    assert len(features) == 2 * 800
    assert torch.allclose(features[:1500], whisper(speech[:CHUNK]))
    assert torch.allclose(features[1500:], whisper(speech[CHUNK:]))


def test_hidden_states_begin_with_the_stem_and_end_with_the_norm(whisper):
    features = whisper(noise(1))
    last = features[:, -1]
    assert not torch.allclose(features[:, 0], last)
    norm = whisper.encoder.layer_norm
    assert torch.allclose(last.mean(-1), norm.bias.mean().expand(50), atol=1e-5)  # fresh weights: a normed state
    assert torch.allclose(last.std(-1, correction=0), torch.ones(50), atol=1e-2)


def test_a_fresh_encoder_hears_the_same_in_a_short_and_in_a_long_sound(whisper):
    """What follows more than the convolutions' reach later changes nothing: sonic-mini is trained on clips of 2.4 s."""
    speech = noise(30)
    short, long = whisper(speech[: 16000 * 2]), whisper(speech)
    assert torch.allclose(short[:-2], long[: len(short) - 2], atol=1e-5)
    assert not torch.allclose(short[-2:], long[len(short) - 2 : len(short)], atol=1e-2)


def test_name_tells_weights_apart(whisper, tiny):
    again = load_whisper(tiny / "whisper")
    assert again.name == whisper.name
    with torch.no_grad():
        next(again.encoder.parameters()).add_(1)
    assert type(again)(again.encoder).name != whisper.name


def test_own_extractor(tmp_path):
    (tmp_path / "own.py").write_text(OWN_FEATURES)
    extractor = load_extractor(f"{tmp_path}/own.py:Energy")
    assert isinstance(extractor, AudioExtractor)
    assert check_features(extractor(noise(1)), extractor, 16000).shape == (50, 1, 2)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("nothing.py:Energy", "existing file"),
        ("own.py", "FILE.py:NAME"),
        ("own.py:Other", "'Other'"),
        ("own.py:np", "needs name, layers"),
    ],
)
def test_own_extractor_that_does_not_exist(tmp_path, monkeypatch, spec, words):
    (tmp_path / "own.py").write_text(OWN_FEATURES.replace("import numpy as np, torch", "import torch\nnp = dict"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=words):
        load_extractor(spec)


def test_own_features_of_the_wrong_length():
    class Broken:
        name, layers, width = "broken", 1, 2

    with pytest.raises(UserError, match=r"broken.*\(49, 1, 2\).*\(50, 1, 2\)"):
        check_features(torch.zeros(49, 1, 2), Broken, 16000)
