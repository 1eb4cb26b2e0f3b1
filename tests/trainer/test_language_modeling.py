from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from data_pipelines.tokenizer import TokenizerConfig, train_tokenizer
from tests.trainer.models import small_gpt
from tests.trainer.packed import EOS_ID, batch_of, packed_split
from trainer.bound import BoundTask
from trainer.shapes import Logits, Tokens
from trainer.tasks import language_modeling

CONFIG = language_modeling.Config(seq_len=8)
TASK = BoundTask(language_modeling, CONFIG)
DOCUMENTS = [[5, 6, 7], [], [9, 9, 4, 3, 2, 1, 8], [11], [12, 13, 14, 15]]


class Uniform(nn.Module):
    def forward(self, tokens: Tensor, document: Tensor, position: Tensor) -> Tensor:
        return torch.zeros(*tokens.shape, 50)


@settings(max_examples=40, deadline=None)
@given(
    documents=st.lists(st.lists(st.integers(1, 49), max_size=20), min_size=1, max_size=6), seq_len=st.integers(1, 12)
)
def test_every_token_and_every_end_is_a_label_once_and_follows_its_input(
    documents: list[list[int]], seq_len: int
) -> None:
    split = packed_split(documents, seq_len)
    config = language_modeling.Config(seq_len=seq_len)
    batch = batch_of(split, config, range(len(split)))
    counted = batch["labels"][batch["labels"] != -100]
    assert counted.tolist() == [token for document in documents for token in [*document, EOS_ID]]
    assert language_modeling.num_items(batch) == split.num_tokens == len(counted)
    inputs, labels = batch["tokens"].flatten(), batch["labels"].flatten()
    follows = labels[:-1] != -100
    assert torch.equal(inputs[1:][follows], labels[:-1][follows])
    assert batch["tokens"].shape == batch["document"].shape == (len(split), seq_len)
    assert batch["tokens"].dtype == batch["labels"].dtype == torch.int64


def test_shapes_follow_the_tokenizer() -> None:
    config = language_modeling.Config(seq_len=128, tokenizer=TokenizerConfig(name="bytes"))
    assert language_modeling.io(config) == (Tokens(257, 128), Logits(257))
    assert language_modeling.packing(config) == 128


def test_loss_is_the_sum_of_each_document_alone() -> None:
    model = small_gpt().eval()
    config = language_modeling.Config(seq_len=24)
    split = packed_split(DOCUMENTS, 24)
    batch = batch_of(split, config, [0])
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
    batch = TASK.idle(batch_of(packed_split(DOCUMENTS, 8), CONFIG, [0, 1]))
    assert TASK.num_items(batch) == 0
    loss = TASK.loss(model, batch)
    loss.backward()
    assert loss.item() == 0.0
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in model.parameters())


def test_idle_leaves_the_batch_as_it_was() -> None:
    batch = batch_of(packed_split(DOCUMENTS, 8), CONFIG, [0])
    before = batch["labels"].clone()
    TASK.idle(batch)
    assert torch.equal(batch["labels"], before)


def test_sums_over_batches_are_the_sum_over_all() -> None:
    model = small_gpt().eval()
    split = packed_split(DOCUMENTS, 8)
    with torch.no_grad():
        together = TASK.evaluate(model, batch_of(split, CONFIG, range(len(split))))
        apart = [TASK.evaluate(model, batch_of(split, CONFIG, [number])) for number in range(len(split))]
    assert together["tokens"] == split.num_tokens
    for name, value in together.items():
        assert sum(sums[name] for sums in apart) == pytest.approx(value, rel=1e-6)


def test_a_model_that_knows_nothing_takes_log_v_bits_a_token() -> None:
    split = packed_split(DOCUMENTS, 8, bytes_a_token=3)
    sums = TASK.evaluate(Uniform(), batch_of(split, CONFIG, range(len(split))))
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

    split = packed_split([[7, 7, 7], [8, 9]], 16)
    sums = TASK.evaluate(Copy(), batch_of(split, language_modeling.Config(seq_len=16), [0]))
    assert sums["correct"] == 2
    assert sums["tokens"] == 7


def test_sample_is_text_and_the_same_for_the_same_seed() -> None:
    tokenizer = train_tokenizer(TokenizerConfig(name="bytes"), [])
    model = small_gpt(vocab_size=257)
    assert TASK.sample(model, tokenizer, 20, seed=1) == TASK.sample(model, tokenizer, 20, seed=1)
    assert isinstance(TASK.sample(model, tokenizer, 20, seed=1), str)
    assert TASK.sample(model, tokenizer, 0, seed=1) == ""


def test_prepare_uses_no_randomness() -> None:
    row = packed_split(DOCUMENTS, 8)[0]
    rng = np.random.default_rng(0)
    state = rng.bit_generator.state
    TASK.prepare(row, rng)
    assert rng.bit_generator.state == state
