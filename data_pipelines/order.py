"""Which sample stands at which position of the global order: computed, never stored.

Each epoch is another permutation of the sample ids: a Feistel network (Luby and Rackoff 1988) on pairs of digits in
base ceil(sqrt(n)), walked until the value is below n (cycle walking: Black and Rogaway 2002). It is a bijection for any
n, takes O(1) memory and the same time for any position, so a run resumes at once wherever it stopped.
"""

from __future__ import annotations

import math

import numpy as np

from data_pipelines.mixing import mix

_ROUNDS = 6
_GOLDEN = 0x9E3779B97F4A7C15
_MULTIPLIER = np.uint64(0x94D049BB133111EB)
_HALF = np.uint64(32)


def sample_ids(seed: int, num_examples: int, positions: np.ndarray) -> np.ndarray:
    """Sample ids, (n,) int64 in [0, num_examples), at global positions, (n,) int64 >= 0; any integer is a seed.

    Position p is example p % num_examples of epoch p // num_examples; in an epoch each id comes exactly once.
    """
    assert num_examples >= 1, num_examples
    positions = np.asarray(positions, np.int64)
    assert positions.size == 0 or positions.min() >= 0, positions.min()
    epochs, places = np.divmod(positions, np.int64(num_examples))
    ids = places.astype(np.uint64)
    keys = _keys(seed, epochs)
    base = np.uint64(max(1, math.isqrt(num_examples - 1) + 1))  # base ** 2 >= num_examples
    ids = _permute(ids, keys, base)
    while len(outside := np.flatnonzero(ids >= num_examples)):
        ids[outside] = _permute(ids[outside], keys[:, outside], base)
    return ids.astype(np.int64)


def _permute(values: np.ndarray, keys: np.ndarray, base: np.uint64) -> np.ndarray:
    """One bijection of [0, base ** 2) for each value: (n,) uint64 with keys (rounds, n) uint64."""
    left, right = np.divmod(values, base)
    for key in keys:
        scattered = (right ^ key) * _MULTIPLIER
        scattered ^= scattered >> _HALF
        scattered *= _MULTIPLIER
        scattered >>= _HALF
        scattered += left
        scattered %= base
        left, right = right, scattered
    left *= base
    left += right
    return left


def _keys(seed: int, epochs: np.ndarray) -> np.ndarray:
    """The key of each round in each epoch: (rounds, n) uint64."""
    seed_key = mix(np.array([seed & 0xFFFFFFFFFFFFFFFF], np.uint64) + np.uint64(_GOLDEN))
    epoch_keys = mix(seed_key ^ mix(epochs.astype(np.uint64) + np.uint64(1)))  # (n,)
    steps = np.arange(1, _ROUNDS + 1, dtype=np.uint64)[:, None] * np.uint64(_GOLDEN)  # (rounds, 1)
    return mix(epoch_keys + steps)
