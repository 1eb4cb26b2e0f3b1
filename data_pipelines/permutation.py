"""Keyed permutations of 0 .. n - 1, for any n, computed and never stored.

A Feistel network (Luby and Rackoff 1988) on pairs of digits in base b = ceil(sqrt(n)) permutes 0 .. b * b - 1; what
falls at n or beyond is permuted again until it is below n (cycle walking: Black and Rogaway 2002). It is a bijection
for any n, takes O(1) memory, and the same time for any place.

One round: (left, right) -> (right, (left + f(right)) mod b), where f multiplies, shifts and multiplies again, and then
scales the upper half of the word to 0 .. b - 1 (Lemire 2019), so that no division is needed.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from data_pipelines.mixing import mix

ROUNDS = 6
_GOLDEN = 0x9E3779B97F4A7C15
_MASK = 0xFFFFFFFFFFFFFFFF
_CHUNK = 1 << 13  # values at once: they stay in the nearest cache
# Per word: its type, half its bits, the shift between the two multipliers, and the multipliers
# (of MurmurHash3 and SplitMix64; the golden ratio).
_WORD_32 = (np.uint32, 16, 15, 0x9E3779B1, 0x85EBCA77)
_WORD_64 = (np.uint64, 32, 32, _GOLDEN, 0x94D049BB133111EB)


def keys(seed: int, *counters: np.ndarray | int) -> np.ndarray:
    """Keys of a permutation for each round, (ROUNDS, n) uint64: for a seed, any integer, and (n,) counters >= 0."""
    key = mix(np.array([(seed + _GOLDEN) & _MASK], np.uint64))
    for counter in counters:
        key = mix(key ^ mix(np.atleast_1d(np.asarray(counter)).astype(np.uint64) + np.uint64(1)))
    steps = np.arange(1, ROUNDS + 1, dtype=np.uint64)[:, None] * np.uint64(_GOLDEN)  # (ROUNDS, 1)
    return mix(key + steps)


def permute(places: np.ndarray, size: Any, round_keys: np.ndarray) -> np.ndarray:
    """Where each of (n,) int64 `places` in [0, size) goes, (n,) int64 in [0, size).

    size and round_keys (rounds, 1): one permutation for all; size (n,) < 2^32 and round_keys (rounds, n): one for each.
    """
    if np.ndim(size) == 0:
        values = places.astype(_word(size)[0])
        _permute_in_place(values, size, round_keys)
    else:
        kind = _WORD_32[0]
        base = np.ceil(np.sqrt(size)).astype(kind)  # exact: size < 2^32
        narrow = round_keys.astype(kind)
        values = _walk(places.astype(kind), (size - 1).astype(kind), base, narrow, _WORD_32)
    return values.astype(np.int64)


def permutation(size: int, round_keys: np.ndarray) -> np.ndarray:
    """Where each place of 0 .. size - 1 goes, (size,) uint32, or uint64 for a size above 2^32."""
    values = np.arange(size, dtype=_word(size)[0])
    _permute_in_place(values, size, round_keys)
    return values


def _word(size: int) -> Any:
    return _WORD_32 if size <= 1 << 32 else _WORD_64


def _permute_in_place(values: np.ndarray, size: int, round_keys: np.ndarray) -> None:
    word = _word(size)
    kind = word[0]
    last = kind(size - 1)
    base = kind(math.isqrt(int(size) - 1) + 1)
    narrow = round_keys.astype(kind)
    for start in range(0, len(values), _CHUNK):
        values[start : start + _CHUNK] = _walk(values[start : start + _CHUNK], last, base, narrow, word)


def _walk(values: np.ndarray, last: Any, base: Any, round_keys: np.ndarray, word: Any) -> np.ndarray:
    values = _feistel(values, base, round_keys, word)
    while len(outside := np.flatnonzero(values > last)):
        part = (base, round_keys) if np.ndim(base) == 0 else (base[outside], round_keys[:, outside])
        values[outside] = _feistel(values[outside], *part, word)
    return values


def _feistel(values: np.ndarray, base: Any, round_keys: np.ndarray, word: Any) -> np.ndarray:
    # Arrays without dimensions: numpy takes them in two thirds of the time that it takes for scalars.
    kind = word[0]
    half, shift, first, second = (np.array(value, kind) for value in word[1:])
    base = np.asarray(base)
    left = values // base
    right = values - left * base
    scattered, moved = np.empty_like(left), np.empty_like(left)
    for key in [key.reshape(()) for key in round_keys] if base.ndim == 0 else round_keys:
        np.add(right, key, out=scattered)
        scattered *= first
        np.right_shift(scattered, shift, out=moved)
        scattered ^= moved
        scattered *= second
        scattered >>= half
        scattered *= base
        scattered >>= half  # now in [0, base)
        scattered += left
        np.subtract(scattered, base, out=moved)  # wraps to a large number below base
        np.minimum(scattered, moved, out=left)
        left, right = right, left
    left *= base
    left += right
    return left
