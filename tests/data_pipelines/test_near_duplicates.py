from __future__ import annotations

import random

import numpy as np
import pytest

from data_pipelines.near_duplicates import NUM_HASHES, SHINGLE_TOKENS, _token_hashes, signature

WORDS = [f"word{number}" for number in range(2000)]


def text(seed: int, length: int = 400) -> list[str]:
    return random.Random(seed).choices(WORDS, k=length)


def changed(words: list[str], count: int, seed: int) -> list[str]:
    generator = random.Random(seed)
    copy = list(words)
    for place in generator.sample(range(len(copy)), count):
        copy[place] = generator.choice(WORDS)
    return copy


def similarity(first: list[str], second: list[str]) -> float:
    """The exact intersection / union of the shingles."""
    one, other = (
        {tuple(words[start : start + SHINGLE_TOKENS]) for start in range(len(words) - SHINGLE_TOKENS + 1)}
        for words in (first, second)
    )
    return len(one & other) / len(one | other)


@pytest.mark.parametrize("changes", [0, 5, 20, 60, 200])
def test_signatures_estimate_the_similarity(changes: int) -> None:
    errors = []
    for seed in range(20):
        first = text(seed)
        second = changed(first, changes, seed + 100)
        agreeing = np.mean(signature(" ".join(first).encode()) == signature(" ".join(second).encode()))
        errors.append(agreeing - similarity(first, second))
    assert np.abs(errors).max() < 4 * 0.5 / NUM_HASHES**0.5  # 4 standard deviations
    assert abs(np.mean(errors)) < 0.04


def test_equal_tokens_have_equal_hashes_wherever_they_stand() -> None:
    hashes = _token_hashes(np.frombuffer("foo, bar_1 (foo) 日本 bar_1;foo".encode(), np.uint8)).tolist()
    foo, comma, bar, opening, foo_again, closing, nihon, bar_again, semicolon, foo_last = hashes
    assert foo == foo_again == foo_last and bar == bar_again
    assert len({foo, comma, bar, opening, closing, nihon, semicolon}) == 7
