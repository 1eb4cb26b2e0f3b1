from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from configs.errors import UsageError
from data_pipelines.tokenizer import TokenizerConfig, train_tokenizer
from tests.trainer.models import small_gpt
from trainer.generate import distinct, generate, generate_text, probabilities

EOS_ID = 0


class Scripted(nn.Module):
    """Says the next id of a script, whatever came before, and remembers what it was shown."""

    def __init__(self, script: list[int], vocab_size: int = 257, seq_len: int = 6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.seq_len = seq_len
        self.script = iter(script)
        self.vocab_size = vocab_size
        self.shown: list[list[int]] = []
        self.modes: list[bool] = []

    def forward(self, tokens: Tensor) -> Tensor:
        self.shown.append(tokens[0].tolist())
        self.modes.append(self.training)
        logits = torch.zeros(1, tokens.shape[1], self.vocab_size)
        logits[0, -1, next(self.script)] = 100.0
        return logits


class Constant(nn.Module):
    """Says the same, whatever came before."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)
        self.seq_len = 1

    def forward(self, tokens: Tensor) -> Tensor:
        return self.logits.expand(1, tokens.shape[1], -1)


class Uncached(nn.Module):
    """A model without its cache."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.seq_len = model, model.seq_len

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(tokens)


def ids(model: nn.Module, prompt: list[int] = [], **settings: Any) -> list[int]:  # noqa: B006
    return list(generate(model, prompt, **({"max_tokens": 12, "seed": 0, "eos_id": EOS_ID} | settings)))


def test_the_seed_decides() -> None:
    model = small_gpt()
    assert ids(model, seed=1) == ids(model, seed=1)
    assert len({tuple(ids(model, seed=seed)) for seed in range(5)}) > 1


def test_temperature_zero_and_one_candidate_take_the_likeliest() -> None:
    model = small_gpt()
    greedy = ids(model, [0, 3], temperature=0)
    assert greedy == ids(model, [0, 3], top_k=1, seed=5) == ids(model, [0, 3], top_p=1e-6, seed=6)
    context = [0, 3]
    for token in greedy:
        with torch.no_grad():
            assert token == int(model.eval()(torch.tensor([context]))[0, -1].argmax())
        context.append(token)


def test_it_stops_at_the_end_of_the_document_and_at_the_limit() -> None:
    assert ids(Scripted([5, 6, EOS_ID, 7])) == [5, 6]
    assert ids(Scripted([5, 6, 7, 8]), max_tokens=3) == [5, 6, 7]
    assert ids(Scripted([]), max_tokens=0) == []


def test_the_model_sees_the_last_tokens_that_it_can_take() -> None:
    model = Scripted([11, 12, 13, 14], seq_len=3)
    ids(model, [0, 9], max_tokens=4)
    assert model.shown == [[0, 9], [0, 9, 11], [9, 11, 12], [11, 12, 13]]


def test_an_empty_prompt_is_the_start_of_a_document() -> None:
    model = Scripted([4])
    ids(model, max_tokens=1)
    assert model.shown == [[EOS_ID]]


def test_the_model_is_in_evaluation_mode_only_meanwhile() -> None:
    model = Scripted([4, 5]).train()
    for _ in generate(model, [], max_tokens=2, seed=0, eos_id=EOS_ID):
        assert model.training
    assert model.modes == [False, False]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 999),
    top_k=st.one_of(st.none(), st.integers(1, 12)),
    top_p=st.one_of(st.none(), st.floats(0.01, 1)),
)
def test_probabilities_keep_the_likeliest(seed: int, top_k: int | None, top_p: float | None) -> None:
    logits = 2 * torch.randn(8, generator=torch.Generator().manual_seed(seed))
    kept = probabilities(logits, top_k, top_p)
    assert float(kept.sum()) == pytest.approx(1, abs=1e-5)
    order = sorted(range(8), key=lambda token: -float(logits[token]))
    allowed = order[: top_k or 8]
    total = sum(float(logits[token].exp()) for token in allowed)
    nucleus, reached = [], 0.0
    for token in allowed:
        if top_p is None or reached < top_p - 1e-6:
            nucleus.append(token)
        reached += float(logits[token].exp()) / total
    expected = torch.full((8,), float("-inf"))
    expected[nucleus] = logits[nucleus]
    torch.testing.assert_close(kept, expected.softmax(0), atol=1e-5, rtol=1e-4)


def test_tokens_are_drawn_with_the_models_probabilities() -> None:
    model = small_gpt(vocab_size=5, seq_len=4)
    with torch.no_grad():
        expected = model.eval()(torch.zeros(1, 1, dtype=torch.int64))[0, -1].softmax(0)
    draws = [ids(model, seed=seed, max_tokens=1) for seed in range(300)]
    counts = torch.bincount(torch.tensor([draw[0] if draw else EOS_ID for draw in draws]), minlength=5)
    assert (counts / 300 - expected).abs().max() < 0.1


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_at_a_temperature_tokens_are_drawn_from_the_softmax_of_the_divided_logits(temperature: float) -> None:
    """Pearson's statistic of many draws: with 4 degrees of freedom it is above 23.5 once in 10,000 times."""
    logits = torch.tensor([0.3, 1.0, -0.5, 0.0, 0.8])
    draws = 2000
    model = Constant(logits)
    found = ids(model, max_tokens=draws, temperature=temperature, seed=11, eos_id=-1)
    expected = draws * (logits / temperature).softmax(0)
    counts = torch.bincount(torch.tensor(found), minlength=5)
    assert float(((counts - expected) ** 2 / expected).sum()) < 23.5
    other = draws * logits.softmax(0)
    assert float(((counts - other) ** 2 / other).sum()) > 23.5, "the bound tells one temperature from another"


@pytest.mark.parametrize("prompt", [[0], [0, 3, 4], list(range(1, 31))])
def test_a_cache_changes_no_text_within_the_context_and_past_it(prompt: list[int]) -> None:
    model = small_gpt(num_kv_heads=2)
    assert ids(model, prompt, max_tokens=40, eos_id=-1) == ids(Uncached(model), prompt, max_tokens=40, eos_id=-1)


def test_with_a_cache_each_token_is_computed_once() -> None:
    model = small_gpt()
    shown: list[int] = []
    model.register_forward_pre_hook(lambda _, inputs: shown.append(inputs[0].shape[1]))
    ids(model, [0, 7, 8], max_tokens=5, eos_id=-1)
    assert shown == [3, 1, 1, 1, 1]


def test_different_phrases_are_counted_over_all_words() -> None:
    text = "a b a b\nc"
    assert [distinct(text, size) for size in (1, 2, 3)] == [3 / 5, 3 / 5, 3 / 5]
    assert [distinct("x x x x", size) for size in (1, 2, 3)] == [1 / 4, 1 / 4, 1 / 4]
    assert [distinct("to be or not", size) for size in (1, 2, 3)] == [1.0, 3 / 4, 2 / 4]
    assert distinct("", 1) == 0 and distinct("one", 2) == 0


@pytest.mark.parametrize(
    "settings", [{"temperature": -1.0}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.5}, {"max_tokens": -1}]
)
def test_settings_out_of_range_are_refused_at_once(settings: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(settings))):
        generate(Scripted([]), [], **({"max_tokens": 1, "seed": 0, "eos_id": EOS_ID} | settings))


@pytest.mark.parametrize("text", ["plain", "naïve 漢字 🙂!", "\ufffd kept"])
def test_pieces_of_text_end_between_characters(text: str) -> None:
    tokenizer = train_tokenizer(TokenizerConfig(name="bytes"), [])
    script = tokenizer.encode([text])[0].tolist()
    pieces = list(generate_text(Scripted([*script, EOS_ID]), tokenizer, "x", max_tokens=99, temperature=0, seed=0))
    assert "".join(pieces) == text
    assert len(pieces) > 1
    if "\ufffd" not in text:
        assert all("\ufffd" not in piece for piece in pieces)


def test_a_character_cut_off_at_the_end_is_shown_as_such() -> None:
    tokenizer = train_tokenizer(TokenizerConfig(name="bytes"), [])
    script = tokenizer.encode(["ab漢"])[0].tolist()[:-1]
    pieces = list(generate_text(Scripted(script), tokenizer, "", max_tokens=len(script), temperature=0, seed=0))
    assert "".join(pieces) == tokenizer.decode(script)
    assert "".join(pieces).startswith("ab\ufffd")


def test_the_prompt_follows_the_mark_that_begins_a_document() -> None:
    tokenizer = train_tokenizer(TokenizerConfig(name="bytes"), [])
    model = Scripted([9], seq_len=50)
    list(generate_text(model, tokenizer, "hi", max_tokens=1, temperature=0, seed=0))
    assert model.shown == [[EOS_ID, *tokenizer.encode(["hi"])[0].tolist()]]
