from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.sound import decode_sound, missing_bytes, resample


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


def written(samples: np.ndarray, kind: str, rate: int = 16000) -> bytes:
    soundfile = pytest.importorskip("soundfile")
    out = io.BytesIO()
    soundfile.write(out, samples, rate, format=kind)
    return out.getvalue()


@pytest.mark.parametrize("kind", ["WAV", "AIFF", "FLAC", "MP3"])
def test_a_sound_that_is_cut_off_is_refused(kind: str) -> None:
    raw = written(tone(16000, 440), kind)
    assert len(decode_sound(raw, 16000)) == 8000
    for share in (0.3, 0.9):
        with pytest.raises(ValueError, match=r"is cut off|no sound that can be read"):
            decode_sound(raw[: int(share * len(raw))], 16000)


def test_a_wav_whose_header_knows_no_length_and_one_with_chunks_around_are_whole() -> None:
    raw = written(tone(16000, 440), "WAV")
    place = raw.index(b"data")
    for unknown in (0, 0x7FFF_FFFF, 0xFFFF_FFFF):
        streamed = raw[: place + 4] + unknown.to_bytes(4, "little") + raw[place + 8 :]
        assert missing_bytes(streamed) == 0
    assert len(decode_sound(streamed, 16000)) == 8000
    note = b"note" + (3).to_bytes(4, "little") + b"abc\0"
    noted = raw[:place] + note + raw[place:] + note
    assert len(decode_sound(noted, 16000)) == 8000
    assert missing_bytes(noted[: -len(note) - 2]) == 2
    assert [missing_bytes(other) for other in (b"", b"RIFF", written(tone(16000, 440), "FLAC")[:500])] == [0, 0, 0]


def test_a_sound_that_is_no_clip_is_refused_before_it_is_decoded() -> None:
    silence = written(np.zeros((200_000, 2), np.float32), "FLAC", 8000)  # a few kB
    assert len(decode_sound(silence, 8000, 1 << 21)) == 200_000
    for rate, most in ((8000, 1 << 20), (48000, 1 << 22)):
        with pytest.raises(ValueError, match=rf"more than {most >> 20} MB, which is no clip"):
            decode_sound(silence, rate, most)
    piped = silence[:21] + bytes([silence[21] & 0xF0, 0, 0, 0, 0]) + silence[26:]
    with pytest.raises(ValueError, match=r"does not say how long it is.*convert it to WAV"):
        decode_sound(piped, 8000, 1 << 21)
