"""Signatures of texts: they are alike where the texts are nearly the same (duplicates.py groups them).

MinHash (Broder 1997, https://doi.org/10.1109/SEQUEN.1997.666900) of the set of shingles of a text, with banding to
find candidates (Leskovec, Rajaraman, Ullman, Mining of Massive Datasets, chapter 3). A shingle is SHINGLE_TOKENS
tokens in a row; a token is a run of word bytes, or one other byte that is no space. Two texts are near-duplicates
when their shingle sets overlap by MIN_SIMILARITY (intersection / union) as estimated from NUM_HASHES hashes.

Shape legend: B bytes of a text, N its tokens, S its different shingles, H = NUM_HASHES.
"""

from __future__ import annotations

import numpy as np

from data_pipelines.mixing import mix

SHINGLE_TOKENS = 5
NUM_HASHES = 128
ROWS_PER_BAND = 4
MIN_SIMILARITY = 0.5

_CHUNK = 1024  # shingles hashed at once: the (H, chunk) table stays in the processor's cache
_BASE = 0x9E3779B97F4A7C15  # odd, so it has an inverse modulo 2**64
_BASE_INVERSE = pow(_BASE, -1, 1 << 64)

_parameters = np.random.default_rng(0x5AAD).integers(0, 1 << 63, size=(2, NUM_HASHES, 1), dtype=np.uint64)
_MULTIPLIERS = _parameters[0] * np.uint64(2) + np.uint64(1)  # (H, 1)
_INCREMENTS = _parameters[1]  # (H, 1)

_KIND = np.ones(256, np.uint8)  # 0 space, 1 a mark (a token by itself), 2 a byte of a word
_KIND[list(b" \t\r\n\x0b\x0c")] = 0
_KIND[list(b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_")] = 2
_KIND[128:] = 2


def signature(text: bytes) -> np.ndarray:
    """MinHash values of a text, (H,) uint32. A text shorter than a shingle is one shingle; an empty one gives zeros."""
    tokens = _token_hashes(np.frombuffer(text, np.uint8))  # (N,)
    if not len(tokens):
        return np.zeros(NUM_HASHES, np.uint32)
    width = min(SHINGLE_TOKENS, len(tokens))
    shingles = np.zeros(len(tokens) - width + 1, np.uint64)  # (N - width + 1,)
    for offset in range(width):
        shingles *= np.uint64(_BASE)
        shingles += tokens[offset : offset + len(shingles)]
    shingles = np.unique(mix(shingles))  # (S,)
    smallest = np.full(NUM_HASHES, np.iinfo(np.uint32).max, np.uint32)
    for start in range(0, len(shingles), _CHUNK):
        table = shingles[None, start : start + _CHUNK] * _MULTIPLIERS + _INCREMENTS  # (H, chunk)
        smallest = np.minimum(smallest, (table.min(axis=1) >> np.uint64(32)).astype(np.uint32))
    return smallest


def _token_hashes(data: np.ndarray) -> np.ndarray:
    """A hash of each token, (B,) uint8 -> (N,) uint64: a difference of prefix sums of byte * BASE**position."""
    kind = _KIND[data]
    before = np.concatenate([[np.uint8(0)], kind[:-1]])
    after = np.concatenate([kind[1:], [np.uint8(0)]])
    starts = np.flatnonzero((kind == 1) | ((kind == 2) & (before != 2)))  # (N,)
    ends = np.flatnonzero((kind == 1) | ((kind == 2) & (after != 2))) + 1  # (N,)
    powers = np.full(len(data), _BASE, np.uint64).cumprod()
    sums = np.zeros(len(data) + 1, np.uint64)
    np.cumsum((data.astype(np.uint64) + np.uint64(1)) * powers, out=sums[1:])
    inverse_powers = np.full(len(data), _BASE_INVERSE, np.uint64).cumprod()
    return mix((sums[ends] - sums[starts]) * inverse_powers[starts])
