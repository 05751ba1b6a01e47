"""The speech's curve, its silences, and the comparison of two curves: correlation, offset, confidence."""

import numpy as np
import pytest

from sonic.config import SAMPLE_RATE
from sonic.puppets import speech_to_mouth
from sonic.sync import MAX_OFFSET, at_syllable_rate, compare_curves, silent_frames, speech_energy

pytestmark = pytest.mark.filterwarnings("error")  # no empty mean, no division by zero on the way to a NaN


def tone(seconds, loudness=0.2, hertz=500):
    return np.float32(loudness * np.sin(2 * np.pi * hertz * np.arange(round(seconds * SAMPLE_RATE)) / SAMPLE_RATE))


def buzz(seconds, loudness=0.2):
    """What is in all octaves of the speech band, like a voice; symmetric about its middle."""
    angle = (
        2 * np.pi * 150 * (np.arange(round(seconds * SAMPLE_RATE)) - round(seconds * SAMPLE_RATE) // 2) / SAMPLE_RATE
    )
    return np.float32(loudness / 3 * sum(np.cos(order * angle) / order for order in range(1, 25)))


def syllables(num_ticks, seed=0):
    """A curve like a speech's: smooth, irregular, [num_ticks]."""
    noise = np.random.default_rng(seed).normal(size=num_ticks + 20)
    return np.convolve(noise, np.hanning(7), mode="same")[10:-10]


# --- speech ---


def test_energy_is_relative_to_the_speech_level():
    speech = np.concatenate([buzz(1), buzz(1, 0.02), buzz(1, 0)])
    energy = speech_energy(speech, 75)
    assert energy.shape == (75,) and energy.dtype == np.float32
    assert energy[5:20] == pytest.approx(27 / 30, abs=0.02)  # the speech level itself
    assert energy[30:45] == pytest.approx(7 / 30, abs=0.02)  # 20 dB below
    assert energy[55:].max() == 0
    assert np.allclose(speech_energy(speech * 0.05, 75), energy, atol=0.02)
    assert speech_energy(tone(1, hertz=6000) + np.concatenate([buzz(0.5), buzz(0.5, 0)]), 25)[15:].max() < 0.1


def test_energy_of_silence_of_nothing_and_beyond_the_end():
    assert speech_energy(tone(1, 0), 25).max() == 0
    assert speech_energy(np.zeros(0, np.float32), 3).tolist() == [0, 0, 0]
    assert speech_energy(buzz(1), 50)[28:].max() == 0  # a video that is longer than its sound ends in silence


@pytest.mark.parametrize("fps", [25, 12.5, 30])
def test_energy_is_in_time_and_is_the_puppets_law(fps):
    middle, num_ticks = 11, 23
    speech = np.zeros(round(num_ticks / fps * SAMPLE_RATE), np.float32)
    centre = round((middle + 0.5) / fps * SAMPLE_RATE)
    speech[centre - 1600 : centre + 1600] = buzz(0.2) * np.hanning(3200)
    energy = speech_energy(speech, num_ticks, fps)
    assert energy.argmax() == middle and np.allclose(energy, energy[::-1], atol=0.02)
    assert np.array_equal(energy, speech_to_mouth(speech, num_ticks, fps)[0])


def test_silences_are_long_enough_and_lose_their_ends():
    energy = np.full(60, 0.2)  # a whisper is no silence
    energy[10:14] = 0  # 0.16 s: a plosive
    energy[20:25] = 0.1  # 0.2 s
    energy[50:] = 0
    assert np.flatnonzero(silent_frames(energy)).tolist() == [22, *range(52, 58)]
    assert np.flatnonzero(silent_frames(energy, 12.5)).tolist() == [11, 12, *range(21, 24), *range(51, 59)]
    assert not silent_frames(np.full(60, 0.2)).any()
    assert silent_frames(np.zeros(60)).sum() == 56


# --- two curves ---


@pytest.mark.parametrize("offset", [-MAX_OFFSET, -4, 0, 1, 7, MAX_OFFSET])
def test_a_late_mouth_has_a_positive_offset(offset):
    curve = syllables(140)
    other, mouth = curve[20:120], curve[20 - offset : 120 - offset]  # mouth[t + offset] is other[t]
    found = compare_curves(3 * mouth + 5, other)  # neither unit nor zero matter
    assert found.offset == offset
    assert found.best_r == pytest.approx(1) and found.confidence > 0.7
    assert found.confidence == pytest.approx(1 - np.median(found.r_by_offset))
    assert found.r_by_offset.shape == (2 * MAX_OFFSET + 1,)
    assert found.r == found.r_by_offset[MAX_OFFSET] == pytest.approx(np.corrcoef(mouth, other)[0, 1])


def test_strangers_have_little_confidence():
    pairs = [compare_curves(syllables(250, seed), syllables(250, seed + 100)) for seed in range(20)]
    assert np.mean([abs(found.r) for found in pairs]) < 0.2
    assert max(found.confidence for found in pairs) < 0.6
    assert compare_curves(-syllables(250), syllables(250)).r == pytest.approx(-1)  # and the best is not the opposite
    assert compare_curves(-syllables(250), syllables(250)).offset != 0


def test_frames_without_a_face_are_left_out():
    other = syllables(100)
    mouth = other.copy()
    mouth[30:60] = np.nan
    found = compare_curves(mouth, other)
    assert found.r == pytest.approx(1) and found.offset == 0
    mouth[60:90] = np.nan
    assert np.isnan(compare_curves(mouth, other).r)  # less than half are left


@pytest.mark.parametrize("still", [0.0, 0.3])
def test_a_mouth_that_stands_still_follows_nothing(still):
    curve = syllables(100)
    for pair in ((np.full(100, still), curve), (curve, np.float32(np.full(100, still))), (np.full(100, still),) * 2):
        found = compare_curves(*pair)
        assert (found.r, found.best_r, found.confidence) == (0, 0, 0) and np.isnan(found.offset)


def test_short_clips():
    curve = syllables(20)
    found = compare_curves(curve, curve)
    assert found.r == pytest.approx(1) and found.offset == 0
    known = np.isfinite(found.r_by_offset)
    assert known.tolist() == [abs(offset) <= 10 for offset in range(-MAX_OFFSET, MAX_OFFSET + 1)]
    for length in (0, 1, 9):
        found = compare_curves(curve[:length], curve[:length])
        assert np.isnan([found.r, found.offset, found.best_r, found.confidence]).all()
    with pytest.raises(ValueError, match="19 and 20"):
        compare_curves(curve[1:], curve)


def test_a_turning_head_does_not_hide_the_syllables():
    speech = syllables(500)
    mouth = np.roll(speech, 3) + 20 * np.sin(np.arange(500) / 60)  # what a head does over seconds, and much more of it
    assert compare_curves(mouth, speech).best_r < 0.3
    found = compare_curves(at_syllable_rate(mouth), at_syllable_rate(speech))
    assert found.offset == 3 and found.best_r > 0.95
    gap = np.where(np.arange(500) // 20 == 7, np.nan, mouth)
    assert np.array_equal(np.isnan(at_syllable_rate(gap)), np.isnan(gap))
    assert compare_curves(at_syllable_rate(gap), at_syllable_rate(speech)).offset == 3
    assert np.isnan(at_syllable_rate(np.full(30, np.nan))).all() and len(at_syllable_rate(mouth[:11])) == 11
