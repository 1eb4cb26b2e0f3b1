from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines import filters
from data_pipelines.filters import FiltersConfig, Repetition, Text, reason_to_drop
from data_pipelines.sources import Row, SourceConfig

ENGLISH = (
    "The harbour was quiet in the morning, and the boats that had been out all night lay low in the water with their "
    "nets heaped on deck. A woman walked along the wall to count them. She knew each of the boats by its colour, and "
    "most of the men by their voices; when one was late she said nothing, but she would walk to the end of the wall "
    "and look out until a sail came round the point. Then she went home to make the fire."
)


def dropped(text: str, **rules: Any) -> str | None:
    config = SourceConfig(filters=FiltersConfig.model_validate(rules))
    return reason_to_drop(config, Row("k", {"text": text, "label": 1}))


def test_nothing_is_dropped_unless_a_filter_says_so() -> None:
    assert dropped("") is None and dropped("#" * 10_000) is None


def test_english_prose_passes_every_rule() -> None:
    assert dropped(ENGLISH, **{name: {} for name in FiltersConfig.model_fields if not name.endswith("_bytes")}) is None


def test_lengths_are_of_texts_in_utf8_and_of_arrays() -> None:
    assert dropped("éé", min_bytes=5) == "min_bytes" and dropped("éé", min_bytes=4) is None
    assert dropped("éé", max_bytes=3) == "max_bytes" and dropped("éé", max_bytes=4) is None
    config = SourceConfig(filters=FiltersConfig(max_bytes=15))
    values = {"audio": np.zeros(3, np.float32), "image": b"abc", "label": 3, "score": np.float32(1)}
    assert reason_to_drop(config, Row("k", values)) is None
    assert reason_to_drop(config, Row("k", {**values, "text": "x"})) == "max_bytes"


@pytest.mark.parametrize(
    ("rule", "kept", "gone"),
    [
        ({"num_words": {}}, "word " * 50, "word " * 49),
        ({"num_words": {"min": 0, "max": 3}}, "a b c", "a b c d"),
        ({"mean_word_length": {}}, "abc", "ab"),
        ({"mean_word_length": {"min": 0, "max": 4}}, "abcde abc", "abcde abcd"),
        ({"mean_word_length": {}}, "word", ""),
        ({"symbol_ratio": {}}, "# " + "word " * 9, "# one two three"),
        ({"symbol_ratio": {"max": 0.5}}, "one... two", "one... two..."),
        ({"symbol_ratio": {"max": 0.5}}, "one… two", "one… two…"),
        ({"bullet_share": {"max": 0.5}}, "- one\ntwo", "- one\n• two\n\nthree"),
        ({"ellipsis_share": {"max": 0.5}}, "one...\ntwo", "one...\n two… \nthree"),
        ({"alphabetic_share": {}}, "a b c d 5", "a b c 4 5"),
        ({"alphabetic_share": {}}, "ß", "123"),
        ({"stop_words": {}}, "The end of", "end of it"),
        ({"stop_words": {"min": 1}}, "'with'", "word"),
    ],
)
def test_each_rule_keeps_up_to_its_bound(rule: dict[str, Any], kept: str, gone: str) -> None:
    assert dropped(kept, **rule) is None
    assert dropped(gone, **rule) == next(iter(rule))


def test_all_texts_of_a_row_must_pass() -> None:
    config = SourceConfig(filters=FiltersConfig.model_validate({"alphabetic_share": {}}))
    assert reason_to_drop(config, Row("k", {"source": "good", "target": "1 2"})) == "alphabetic_share"


def test_repeated_lines_and_paragraphs_are_dropped() -> None:
    lines = [f"line number {n} with some words" for n in range(10)]
    only_lines = {"max_paragraphs": 1.0, "max_paragraph_characters": 1.0, "max_top_ngram": [1.0] * 3}
    only_lines |= {"max_duplicate_ngrams": [1.0] * 6}
    assert dropped("\n".join(lines), repetition=only_lines) is None
    assert dropped("\n".join(lines[:6] + lines[:4]), repetition=only_lines) == "repetition"
    long = "x" * 300
    assert dropped("\n".join([*lines, long, long]), repetition={**only_lines, "max_lines": 1.0}) == "repetition"
    only_paragraphs = {**only_lines, "max_lines": 1.0, "max_line_characters": 1.0, "max_paragraphs": 0.3}
    assert dropped("\n\n".join(lines[:6] + lines[:4]), repetition=only_paragraphs) == "repetition"
    assert dropped("\n".join(lines[:6] + lines[:4]), repetition=only_paragraphs) is None


def test_repeated_phrases_are_dropped() -> None:
    loose = {"max_lines": 1.0, "max_line_characters": 1.0, "max_paragraphs": 1.0, "max_paragraph_characters": 1.0}
    assert dropped("buy it now " * 20, repetition=loose) == "repetition"
    phrase = " ".join(f"w{n}" for n in range(12))
    filler = " ".join(f"x{n}" for n in range(40))
    only_long = {**loose, "max_top_ngram": [1.0] * 3}
    assert dropped(f"{phrase} {filler} {phrase}", repetition=only_long) == "repetition"
    assert dropped(f"{phrase} {filler}", repetition=only_long) is None


def plain_top_share(words: list[str], n: int) -> float:
    phrases = [tuple(words[start : start + n]) for start in range(len(words) - n + 1)]
    if not phrases:
        return 0.0
    counts = Counter(phrases)
    most = max(counts.values())
    if most < 2:
        return 0.0
    first = next(phrase for phrase in phrases if counts[phrase] == most)
    return most * sum(map(len, first)) / sum(map(len, words))


def plain_duplicate_share(words: list[str], n: int) -> float:
    phrases = [tuple(words[start : start + n]) for start in range(len(words) - n + 1)]
    counts = Counter(phrases)
    covered = {start + k for start, phrase in enumerate(phrases) if counts[phrase] > 1 for k in range(n)}
    return sum(len(words[place]) for place in covered) / max(1, sum(map(len, words)))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(["a", "bb", "ccc", "dddd"]), max_size=40))
def test_phrases_are_counted_as_by_hand(words: list[str]) -> None:
    counted = filters._Words(words)
    for n in (2, 3, 4):
        assert counted.top_share(n) == pytest.approx(plain_top_share(words, n))
    for n in (5, 6, 10):
        assert counted.duplicate_share(n) == pytest.approx(plain_duplicate_share(words, n))


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=200))
def test_any_text_is_judged(text: str) -> None:
    Repetition().keeps(Text(text))
    dropped(text, **{name: {} for name in FiltersConfig.model_fields if not name.endswith("_bytes")}, min_bytes=3)
