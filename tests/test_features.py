"""Audio features in the cache: the same whether a sound is heard at once or in stretches, and never read as a whole."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_prepare import Loudness

import sonic.features
from sonic.audio import load_extractor
from sonic.checkpoints import load_whisper
from sonic.config import SAMPLE_RATE, SAMPLES_PER_TICK, UserError
from sonic.features import features_fit, make_features, stretches

STRETCH = 20 * SAMPLES_PER_TICK


class Stretched(Loudness):
    """The same features, heard in stretches; it counts what is in memory."""

    stretch = STRETCH

    def __init__(self):
        self.heard = []

    def __call__(self, speech):
        self.heard.append(len(speech))
        return super().__call__(speech)


@pytest.fixture
def sound(monkeypatch):
    """Stands in for a video's sound: makes it be of so many samples, in blocks of about a second, and gives it whole."""

    def be(samples: int) -> np.ndarray:
        whole = np.random.default_rng(samples).normal(scale=0.1, size=samples).astype(np.float32)
        blocks = np.array_split(whole, max(samples // SAMPLE_RATE, 1))
        monkeypatch.setattr(sonic.features, "scan_audio", lambda path: iter(blocks))
        return whole

    return be


@pytest.mark.parametrize("samples", [3 * STRETCH, 3 * STRETCH + 700, 2 * STRETCH + 639, STRETCH // 2, 5 * SAMPLE_RATE])
def test_stretches_give_what_the_whole_gives(sound, tmp_path, samples):
    whole, extractor, path = sound(samples), Stretched(), tmp_path / "deep" / "a.safetensors"
    make_features(tmp_path / "a.mp4", extractor, samples // SAMPLES_PER_TICK, path)
    features = load_file(path)["features"]
    assert torch.equal(features, Loudness()(whole).half()) and len(features) == 2 * (samples // SAMPLES_PER_TICK)
    assert max(extractor.heard) <= STRETCH and sum(extractor.heard) >= samples - SAMPLES_PER_TICK
    assert features_fit(path, extractor, samples // SAMPLES_PER_TICK)
    assert [one.name for one in path.parent.iterdir()] == ["a.safetensors"]
    make_features(tmp_path / "a.mp4", Loudness(), 1, tmp_path / "b.safetensors")  # one that has to hear all of it
    assert (tmp_path / "b.safetensors").read_bytes() == path.read_bytes()


def test_an_hour_is_never_in_memory_as_a_whole():
    second, held, most = np.zeros(SAMPLE_RATE, np.float32), 0, 0

    def hour():
        nonlocal held, most
        for _ in range(3600):
            held += 1
            most = max(most, held)
            yield second

    ticks = 0
    for stretch in stretches(hour(), 30 * SAMPLE_RATE):
        ticks, held = ticks + len(stretch) // SAMPLES_PER_TICK, 0
    assert ticks == 3600 * 25 and most <= 30


def test_whisper_hears_stretches_as_the_whole(tiny):
    whisper = load_whisper(tiny / "whisper")
    sound = np.random.default_rng(0).normal(scale=0.1, size=31 * SAMPLE_RATE + 5).astype(np.float32)
    parts = [whisper(part) for part in stretches(iter([sound]), whisper.stretch)]
    assert [len(part) for part in parts] == [1500, 50] and torch.equal(torch.cat(parts), whisper(sound))


def test_a_sound_that_became_shorter_is_no_cache_entry(sound, tmp_path):
    sound(STRETCH)
    with pytest.raises(UserError, match="less sound than before"):
        make_features(tmp_path / "a.mp4", Stretched(), 21, tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_disk_that_refuses_is_one_sentence(sound, tmp_path):
    sound(STRETCH)
    with pytest.raises(UserError, match=r"too long.*--cache_dir"):
        make_features(tmp_path / "a.mp4", Stretched(), 20, tmp_path / f"{'a' * 300}.safetensors")
    assert not list(tmp_path.iterdir())


def test_odd_stretches_of_an_own_extractor_are_refused(tmp_path):
    (tmp_path / "own.py").write_text(
        "class Odd:\n    name, layers, width, stretch = 'odd', 1, 1, 1000\n    def __call__(self, speech): pass\n"
    )
    with pytest.raises(UserError, match="multiple of 640"):
        load_extractor(f"{tmp_path}/own.py:Odd")
