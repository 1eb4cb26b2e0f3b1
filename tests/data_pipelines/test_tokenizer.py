from __future__ import annotations

import copy
import re

import numpy as np
import pytest
import tokenizers
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from tokenizers import models

from configs.errors import Damaged, UsageError
from data_pipelines import tokenizer as module
from data_pipelines.tokenizer import Tokenizer, TokenizerConfig, train_tokenizer

TEXTS = ["def f(self):\n    return self.value\n\n\n" * 3, "naïve 日本語 😀 word word word\r\n\ttab", "x" * 50] * 2
BPE = train_tokenizer(TokenizerConfig(vocab_size=300), TEXTS)
BYTES = train_tokenizer(TokenizerConfig(name="bytes"), [])
any_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=200) | st.sampled_from(TEXTS)


@settings(deadline=None, max_examples=200)
@given(st.lists(any_text | st.just("a<|endoftext|>b"), max_size=4))
def test_lossless_and_without_end_marks(texts: list[str]) -> None:
    for tokenizer in (BPE, BYTES):
        encoded = tokenizer.encode(texts)
        assert [tokenizer.decode(ids) for ids in encoded] == texts
        assert all(ids.dtype == np.uint16 and ids.min(initial=1) > 0 for ids in encoded)
        assert all(ids.max(initial=0) < tokenizer.vocab_size for ids in encoded)


@settings(deadline=None, max_examples=200)
@given(any_text)
def test_the_fast_way_gives_what_the_library_gives(text: str) -> None:
    assume(module.EOS not in text)  # the library takes it for the mark; here it is text
    assert BPE.encode([text])[0].tolist() == BPE._tokenizer.encode(text).ids
    assert BYTES.encode([text])[0].tolist() == BYTES._tokenizer.encode(text).ids


@given(any_text)
def test_words_cover_every_text(text: str) -> None:
    assert "".join(re.findall(module.WORDS, text)) == text


def test_bytes_are_their_value_plus_one() -> None:
    assert BYTES.encode(["aé"])[0].tolist() == [98, 0xC3 + 1, 0xA9 + 1]
    assert (BYTES.vocab_size, BYTES.eos_id) == (257, 0)


def test_frequent_code_becomes_few_tokens() -> None:
    assert len(BPE.encode(["\n    return self.value"])[0]) < 10
    assert BPE.vocab_size == 300


def test_a_tokenizer_survives_json_and_pickle_and_training_again() -> None:
    for tokenizer, config in ((BPE, TokenizerConfig(vocab_size=300)), (BYTES, TokenizerConfig(name="bytes"))):
        again = train_tokenizer(config, TEXTS)
        for other in (Tokenizer.from_json(tokenizer.to_json()), copy.deepcopy(tokenizer), again):
            assert other.to_json() == tokenizer.to_json()
            assert other.encode(TEXTS)[0].tolist() == tokenizer.encode(TEXTS)[0].tolist()
    with pytest.raises(Damaged, match="cannot be read"):
        Tokenizer.from_json("{}")


def test_an_alphabet_of_bytes_alone_is_still_a_bpe() -> None:
    smallest = train_tokenizer(TokenizerConfig(vocab_size=257), TEXTS)
    assert smallest.decode(smallest.encode(["é"])[0]) == "é"


def test_kept_words_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MAX_KEPT_WORDS", 8)
    tokenizer = Tokenizer.from_json(BPE.to_json())
    for start in range(20):
        texts = [f"word{chr(97 + start + offset)}" for offset in range(4)]
        assert [tokenizer.decode(ids) for ids in tokenizer.encode(texts)] == texts
        assert len(tokenizer._kept) <= 8


def test_what_is_no_text_is_refused() -> None:
    for tokenizer in (BPE, BYTES):
        with pytest.raises(UsageError, match="lone surrogate"):
            tokenizer.encode(["fine", "not \ud800 fine"])


def test_decoding_tolerates_what_a_model_may_sample() -> None:
    assert BPE.decode([0, *BPE.encode(["ab"])[0].tolist(), 0, 299, 4000]).startswith("ab")
    assert BYTES.decode([0xC3 + 1]) == "\ufffd"


def test_wide_ids_past_65536() -> None:
    vocabulary = {f"token{number}": number for number in range((1 << 16) + 1)}
    for size, dtype in ((1 << 16, np.uint16), ((1 << 16) + 1, np.uint32)):
        model = models.BPE(vocab={name: number for name, number in vocabulary.items() if number < size}, merges=[])
        assert Tokenizer(tokenizers.Tokenizer(model)).dtype is dtype


def test_config() -> None:
    assert TokenizerConfig(name="bytes").vocab_size == 257
    for wrong in ({"name": "bytes", "vocab_size": 4096}, {"vocab_size": 100}, {"name": "wordpiece"}):
        with pytest.raises(ValidationError):
            TokenizerConfig.model_validate(wrong)
