from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.sound import decode_sound, resample


def tone(rate: int, frequency: float, seconds: float = 0.5) -> np.ndarray:
    return np.sin(2 * np.pi * frequency * np.arange(int(rate * seconds)) / rate).astype(np.float32)


@settings(deadline=None, max_examples=30)
@given(st.sampled_from([8000, 11025, 22050, 44100, 48000]), st.sampled_from([8000, 16000]), st.floats(50, 3000))
def test_a_tone_keeps_its_shape(rate: int, new_rate: int, frequency: float) -> None:
    out = resample(tone(rate, frequency), rate, new_rate)
    expected = tone(new_rate, frequency)
    assert out.dtype == np.float32 and abs(len(out) - len(expected)) <= 1
    middle = slice(400, -400)
    assert np.abs(out[: len(expected)] - expected[: len(out)])[middle].max() < 2e-3


def test_what_the_new_rate_cannot_hold_is_removed() -> None:
    assert np.abs(resample(tone(44100, 6000), 44100, 8000))[400:-400].max() < 1e-2


def test_levels_short_sounds_and_the_same_rate() -> None:
    assert resample(np.ones(50_000, np.float32), 44100, 8000)[200:-200] == pytest.approx(1.0, abs=1e-5)
    assert len(resample(np.ones(1, np.float32), 44100, 8000)) == 1
    assert len(resample(np.zeros(0, np.float32), 44100, 8000)) == 0
    assert np.array_equal(resample(tone(8000, 100), 8000, 8000), tone(8000, 100))


def test_channels_become_one() -> None:
    soundfile = pytest.importorskip("soundfile")
    out = io.BytesIO()
    soundfile.write(out, np.stack([tone(8000, 100), np.zeros(4000)], axis=1), 8000, format="WAV", subtype="FLOAT")
    assert decode_sound(out.getvalue(), 8000) == pytest.approx(tone(8000, 100) / 2, abs=1e-6)
    with pytest.raises(ValueError, match="no sound"):
        decode_sound(b"no sound at all", 8000)
