"""Sound files to samples at the rate wanted: one channel, float32."""

from __future__ import annotations

import io
import math

import numpy as np

from configs.errors import UsageError

_ZERO_CROSSINGS = 16  # of the low-pass filter, on each side
_ROLL_OFF = 0.95  # its cut-off, as a share of the lower of both Nyquist frequencies
_BLOCK = 8192  # samples that are computed at once


def decode_sound(raw: bytes, sample_rate: int) -> np.ndarray:
    """The samples (n,) float32, about -1 to 1, of a WAV, FLAC, Ogg Vorbis, ... file; the mean of its channels.

    Raises:
        UsageError: soundfile is not installed.
        ValueError: the bytes are no sound that it can read.
    """
    try:
        import soundfile  # type: ignore[import-untyped]
    except (ImportError, OSError) as error:  # OSError: its library is not there
        raise UsageError(
            f"To read sound files, Shardyard needs the package soundfile ({error}). Run pip install 'shardyard[audio]'."
        ) from error
    try:
        samples, rate = soundfile.read(io.BytesIO(raw), dtype="float32", always_2d=True)
    except (soundfile.SoundFileError, RuntimeError, TypeError) as error:
        raise ValueError(f"no sound that can be read ({error})") from error
    return resample(samples.mean(axis=1, dtype=np.float32), int(rate), sample_rate)


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
