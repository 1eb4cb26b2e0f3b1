from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from data_pipelines.columns import Column
from data_pipelines.tokenizer import TokenizerConfig, train_tokenizer
from tests.trainer.models import small_gpt
from tests.trainer.packed import EOS_ID, Packed, batch_of
from trainer.bound import BoundTask
from trainer.shapes import Logits, Tokens
from trainer.tasks import language_modeling

CONFIG = language_modeling.Config(seq_len=8)
TASK = BoundTask(language_modeling, CONFIG)
DOCUMENTS = [[5, 6, 7], [], [9, 9, 4, 3, 2, 1, 8], [11], [12, 13, 14, 15]]


class Uniform(nn.Module):
    def forward(self, tokens: Tensor, document: Tensor, position: Tensor) -> Tensor:
        return torch.zeros(*tokens.shape, 50)


documents_of_tokens = st.lists(st.lists(st.integers(1, 49), max_size=20), min_size=1, max_size=6)


@settings(max_examples=40, deadline=None)
@given(documents=documents_of_tokens, seq_len=st.integers(1, 12))
def test_every_token_and_every_end_is_a_label_once_and_follows_its_input(
    documents: list[list[int]], seq_len: int
) -> None:
    split = Packed(documents, seq_len)
    batch = batch_of(split, range(len(split)))
    sequences = language_modeling.unpack(batch["tokens"], batch["valid"])
    counted = sequences.labels[sequences.labels != -100]
    assert counted.tolist() == [token for document in documents for token in [*document, EOS_ID]]
    assert language_modeling.num_items(batch) == split.num_tokens == len(counted)
    inputs, labels = sequences.tokens.flatten(), sequences.labels.flatten()
    follows = labels[:-1] != -100
    assert torch.equal(inputs[1:][follows], labels[:-1][follows])
    assert {each.shape for each in sequences} == {(len(split), seq_len)}
    assert inputs.dtype == labels.dtype == torch.int64


@settings(max_examples=60, deadline=None)
@given(documents=documents_of_tokens, seq_len=st.integers(1, 12))
def test_documents_and_positions_follow_the_end_marks(documents: list[list[int]], seq_len: int) -> None:
    """The oracle walks along each sequence; the first token of the padding begins a document of its own."""
    split = Packed(documents, seq_len)
    batch = batch_of(split, range(len(split)))
    sequences = language_modeling.unpack(batch["tokens"], batch["valid"])
    for number in range(len(split)):
        tokens, valid = split.cut(number)
        document = position = 0
        for place, token in enumerate(tokens[:-1]):
            if place and ((token == EOS_ID and place <= valid) or place == valid + 1):
                document, position = document + 1, 0
            assert sequences.document[number, place] == document
            assert sequences.position[number, place] == position
            position += 1


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32, torch.int32, torch.int64])
def test_tokens_may_be_of_any_integer_type(dtype: torch.dtype) -> None:
    batch = batch_of(Packed(DOCUMENTS, 8), [0, 1])
    expected = language_modeling.unpack(batch["tokens"], batch["valid"])
    found = language_modeling.unpack(batch["tokens"].to(dtype), batch["valid"])
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_shapes_follow_the_tokenizer() -> None:
    config = language_modeling.Config(seq_len=128, tokenizer=TokenizerConfig(name="bytes"))
    assert language_modeling.io(config) == (Tokens(257, 128), Logits(257))
    assert language_modeling.packing(config) == 128


def test_loss_is_the_sum_of_each_document_alone() -> None:
    model = small_gpt().eval()
    config = language_modeling.Config(seq_len=24)
    split = Packed(DOCUMENTS, 24)
    batch = batch_of(split, [0])
    expected = 0.0
    for document in DOCUMENTS:
        text = torch.tensor([EOS_ID, *document, EOS_ID])
        with torch.no_grad():
            expected += float(F.cross_entropy(model(text[None, :-1])[0].double(), text[1:], reduction="sum"))
    loss = language_modeling.loss(model, batch, config)
    assert loss.dtype == torch.float32 and loss.shape == ()
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_an_idle_batch_contributes_exactly_nothing() -> None:
    model = small_gpt()
    batch = TASK.idle(batch_of(Packed(DOCUMENTS, 8), [0, 1]))
    assert TASK.num_items(batch) == 0
    loss = TASK.loss(model, batch)
    loss.backward()
    assert loss.item() == 0.0
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in model.parameters())


def test_idle_leaves_the_batch_as_it_was() -> None:
    batch = batch_of(Packed(DOCUMENTS, 8), [0])
    before = batch["valid"].clone()
    TASK.idle(batch)
    assert torch.equal(batch["valid"], before)


def test_sums_over_batches_are_the_sum_over_all() -> None:
    model = small_gpt().eval()
    split = Packed(DOCUMENTS, 8)
    with torch.no_grad():
        together = TASK.evaluate(model, batch_of(split, range(len(split))))
        apart = [TASK.evaluate(model, batch_of(split, [number])) for number in range(len(split))]
    assert together["tokens"] == split.num_tokens
    for name, value in together.items():
        assert sum(sums[name] for sums in apart) == pytest.approx(value, rel=1e-6)


def test_a_model_that_knows_nothing_takes_log_v_bits_a_token() -> None:
    split = Packed(DOCUMENTS, 8, bytes_a_token=3)
    sums = TASK.evaluate(Uniform(), batch_of(split, range(len(split))))
    metrics = TASK.metrics(sums, split)
    tokens = sum(len(document) + 1 for document in DOCUMENTS)
    text_bytes = 3 * sum(map(len, DOCUMENTS))
    assert metrics["loss"] == pytest.approx(math.log(50))
    assert metrics["perplexity"] == pytest.approx(50)
    assert metrics["bits_per_byte"] == pytest.approx(math.log2(50) * tokens / text_bytes)


def test_bits_per_byte_of_a_part_uses_the_whole_splits_tokens_a_byte() -> None:
    split: Any = SimpleNamespace(num_tokens=500, num_bytes=2000)
    part = {"nll_nats": 100 * math.log(2), "tokens": 50.0, "correct": 10.0}
    metrics = TASK.metrics(part, split)
    assert metrics["bits_per_byte"] == pytest.approx(2 * 500 / 2000)
    assert metrics["accuracy"] == 0.2


def test_nothing_to_evaluate_gives_no_metrics() -> None:
    empty: Any = SimpleNamespace(num_tokens=0, num_bytes=0)
    assert TASK.metrics({"nll_nats": 0.0, "tokens": 0.0, "correct": 0.0}, empty) == {}
    assert TASK.metrics({}, empty) == {}, "the sums over no batch at all, as of data.validation_fraction=0"


def test_accuracy_counts_likeliest_labels_only_where_they_count() -> None:
    class Copy(nn.Module):
        def forward(self, tokens: Tensor, document: Tensor, position: Tensor) -> Tensor:
            return F.one_hot(tokens, 50).float()  # says that every token is repeated

    split = Packed([[7, 7, 7], [8, 9]], 16)
    sums = TASK.evaluate(Copy(), batch_of(split, [0]))
    assert sums["correct"] == 2
    assert sums["tokens"] == 7


def test_sample_is_text_and_the_same_for_the_same_seed() -> None:
    tokenizer = train_tokenizer(TokenizerConfig(name="bytes"), [])
    model = small_gpt(vocab_size=257)
    assert TASK.sample(model, tokenizer, 20, seed=1) == TASK.sample(model, tokenizer, 20, seed=1)
    assert isinstance(TASK.sample(model, tokenizer, 20, seed=1), str)
    assert TASK.sample(model, tokenizer, 0, seed=1) == ""


def test_no_python_runs_for_an_example() -> None:
    assert TASK.preparation([Column("tokens", "uint16", (None,))], training=True) is None
