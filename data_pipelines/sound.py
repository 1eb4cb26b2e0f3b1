"""Sound files to samples at the rate wanted: one channel, float32."""

from __future__ import annotations

import io
import math
from typing import Literal

import numpy as np

from configs.errors import UsageError

_ZERO_CROSSINGS = 16  # of the low-pass filter, on each side
_ROLL_OFF = 0.95  # its cut-off, as a share of the lower of both Nyquist frequencies
_BLOCK = 8192  # samples that are computed at once
_NO_LENGTH = 0x7FFF_0000  # a WAV's length from here on is that of a stream whose writer did not know it
_UNKNOWN_FRAMES = 1 << 60  # what libsndfile says of such a FLAC file


def decode_sound(raw: bytes, sample_rate: int, max_bytes: int | None = None) -> np.ndarray:
    """The samples (n,) float32, about -1 to 1, of a WAV, FLAC, Ogg Vorbis, ... file; the mean of its channels.

    max_bytes: that the file, and its samples as they are decoded and returned, may take.

    Raises:
        UsageError: soundfile is not installed.
        ValueError: the bytes are no sound that it can read, are cut off, or are more than max_bytes.
    """
    try:
        import soundfile  # type: ignore[import-untyped]
    except (ImportError, OSError) as error:  # OSError: its library is not there
        raise UsageError(
            f"To read sound files, Shardyard needs the package soundfile ({error}). Run pip install 'shardyard[audio]'."
        ) from error
    _refuse_more(len(raw), max_bytes)
    missing = missing_bytes(raw)
    if missing:
        raise ValueError(f"is cut off: its last {missing} bytes are missing")
    try:
        with soundfile.SoundFile(io.BytesIO(raw)) as file:
            frames, rate = file.frames, int(file.samplerate)
            if frames >= _UNKNOWN_FRAMES:
                raise ValueError("does not say how long it is, as what was written into a pipe; convert it to WAV")
            _refuse_more(4 * frames * max(file.channels, sample_rate / rate), max_bytes)
            samples = file.read(dtype="float32", always_2d=True)
    except (soundfile.SoundFileError, RuntimeError, TypeError) as error:
        raise ValueError(f"no sound that can be read ({error})") from error
    if len(samples) < frames:
        raise ValueError(f"is cut off or damaged: of its {frames} samples {len(samples)} can be read")
    return resample(samples.mean(axis=1, dtype=np.float32), rate, sample_rate)


def missing_bytes(raw: bytes) -> int:
    """How many bytes a WAV or AIFF file lacks of the sound that its header announces; 0 for other kinds of files.

    soundfile takes such a file for a shorter clip. Both are chunks: a name, a length, content, filled up to an even
    length. https://www.mmsp.ece.mcgill.ca/Documents/AudioFormats/WAVE/WAVE.html
    """
    if raw[:4] not in (b"RIFF", b"RIFX", b"FORM"):
        return 0
    order: Literal["little", "big"] = "little" if raw[:4] == b"RIFF" else "big"
    start = 12
    while start + 8 <= len(raw):
        size = int.from_bytes(raw[start + 4 : start + 8], order)
        if raw[start : start + 4] in (b"data", b"SSND"):
            return max(0, start + 8 + size - len(raw)) if size < _NO_LENGTH else 0
        start += 8 + size + size % 2
    return 0


def _refuse_more(num_bytes: float, max_bytes: int | None) -> None:
    if max_bytes is not None and num_bytes > max_bytes:
        raise ValueError(f"takes more than {max_bytes >> 20} MB, which is no clip")


def resample(samples: np.ndarray, rate: int, new_rate: int) -> np.ndarray:
    """The samples (n,) at a new rate, (ceil(n * new_rate / rate),) float32: a low-pass filter, then every place anew.

    A windowed sinc (Hann), computed once for each of the new_rate / gcd phases that a new place has between two old
    ones. Method: J. O. Smith, "Digital Audio Resampling", https://ccrma.stanford.edu/~jos/resample/.
    """
    if rate == new_rate or not len(samples):
        return np.asarray(samples, np.float32)
    common = math.gcd(rate, new_rate)
    up, down = new_rate // common, rate // common
    cutoff = _ROLL_OFF * min(1.0, up / down)  # in units of the old Nyquist frequency
    half = math.ceil(_ZERO_CROSSINGS / cutoff)
    taps = np.arange(-half, half + 1)
    distance = taps[None, :] - (np.arange(up) / up)[:, None]  # (up, taps), in old samples
    window = np.where(np.abs(distance) < half, 0.5 + 0.5 * np.cos(np.pi * distance / half), 0.0)
    kernels = cutoff * np.sinc(cutoff * distance) * window
    kernels = (kernels / kernels.sum(axis=1, keepdims=True)).astype(np.float32)
    around = np.lib.stride_tricks.sliding_window_view(np.pad(np.asarray(samples, np.float32), half), len(taps))
    out = np.empty(-(-len(samples) * up // down), np.float32)
    for start in range(0, len(out), _BLOCK):
        places = np.arange(start, min(start + _BLOCK, len(out))) * down
        out[start : start + len(places)] = np.einsum("nt,nt->n", around[places // up], kernels[places % up])
    return out
