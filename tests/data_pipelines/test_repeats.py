from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from data_pipelines import repeats as module
from data_pipelines.repeats import repeats, rows_at_once


@pytest.mark.parametrize("words", [1, 2])
@pytest.mark.parametrize("memory_rows", [1, 4, 50, 10**6])
@pytest.mark.parametrize("seed", range(3))
def test_first_and_last_earlier_rows_against_a_dictionary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: int, memory_rows: int, seed: int
) -> None:
    """Keys that come once, some times, and in half of the rows."""
    monkeypatch.setattr(module, "MEMORY_BYTES", memory_rows * 256)
    generator = np.random.default_rng(seed)
    pool = generator.integers(0, 1 << 64, (80, words), np.uint64)
    pool[40:, 0] = pool[:40, 0]  # the first word alone does not tell two-word keys apart
    keys = pool[np.where(generator.random(400) < 0.5, 7, generator.integers(0, 80, 400))]
    earlier: dict[tuple[int, ...], list[int]] = {}
    expected = []
    for row, key in enumerate(map(tuple, keys.tolist())):
        if key in earlier:
            expected.append((earlier[key][0], earlier[key][-1], row))
        earlier.setdefault(key, []).append(row)
    pieces = [keys[start : start + rows_at_once()] for start in range(0, 400, rows_at_once())]
    found = [
        row for part in repeats(pieces, 400, tmp_path) for row in zip(*(one.tolist() for one in part), strict=True)
    ]
    assert sorted(found, key=lambda row: row[2]) == expected
    assert list(tmp_path.iterdir()) == []
