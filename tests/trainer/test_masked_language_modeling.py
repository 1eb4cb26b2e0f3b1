"""Which tokens are hidden, and how; that the model is told nothing else."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from data_pipelines.tokenizer import EOS_ID, TokenizerConfig
from trainer.tasks import masked_language_modeling as task

SIZE, LENGTH = 400, 512
CONFIG = task.Config(seq_len=LENGTH, tokenizer=TokenizerConfig(vocab_size=SIZE))


def sequence(valid: int = LENGTH, seed: int = 0) -> dict[str, Any]:
    tokens = np.random.default_rng(seed).integers(1, SIZE, LENGTH + 1).astype(np.uint16)
    tokens[[0, 100]] = EOS_ID
    tokens[valid + 1 :] = EOS_ID
    return {"tokens": tokens, "valid": np.int32(valid)}


def prepared(row: dict[str, Any], seed: int = 0, *, training: bool = True) -> dict[str, np.ndarray]:
    return task.preparation(CONFIG, (), training=training)(row, np.random.default_rng(seed))


def test_the_shares_are_the_papers() -> None:
    fates: Counter[str] = Counter()
    for seed in range(100):
        row, made = sequence(seed=seed), prepared(sequence(seed=seed), seed)
        original, chosen = row["tokens"][:-1].astype(np.int32), made["labels"] != task.IGNORED
        assert chosen.sum() == round(0.15 * (LENGTH - 2))
        assert (made["labels"][chosen] == original[chosen]).all()
        assert (made["tokens"][~chosen] == original[~chosen]).all()
        assert not chosen[[0, 100]].any(), "an end mark is hidden"
        fates["mark"] += int((made["tokens"][chosen] == SIZE).sum())
        fates["same"] += int((made["tokens"][chosen] == original[chosen]).sum())
        fates["all"] += int(chosen.sum())
    assert fates["mark"] / fates["all"] == pytest.approx(0.8, abs=0.02)
    assert fates["same"] / fates["all"] == pytest.approx(0.1, abs=0.02)


def test_padding_is_neither_hidden_nor_part_of_a_document_of_text() -> None:
    made = prepared(sequence(valid=40))
    assert (made["labels"][40:] == task.IGNORED).all() and (made["labels"] != task.IGNORED).sum() == 6
    tokens, valid = (torch.from_numpy(np.stack([made[name]])) for name in ("tokens", "valid"))
    document, position = task._documents(tokens.long(), valid)
    assert document[0].tolist() == [0] * 40 + [1] * (LENGTH - 40)
    assert position[0, :40].tolist() == list(range(40))


def test_a_document_begins_at_its_end_mark() -> None:
    row = sequence()
    tokens = torch.from_numpy(row["tokens"][:-1].astype(np.int64)).unsqueeze(0)
    document, position = task._documents(tokens, torch.tensor([LENGTH]))
    assert document[0].tolist() == [0] * 100 + [1] * (LENGTH - 100)
    assert position[0].tolist() == [*range(100), *range(LENGTH - 100)]


def test_training_hides_others_each_time_and_evaluation_the_same() -> None:
    first, second = (prepared(sequence(), seed)["labels"] for seed in (1, 2))
    assert (first != second).any()
    first, second = (prepared(sequence(), seed, training=False)["labels"] for seed in (1, 2))
    assert (first == second).all()
    other = prepared(sequence(seed=7), 1, training=False)["labels"]
    assert ((first != task.IGNORED) != (other != task.IGNORED)).any()


class Uniform(nn.Module):
    """Knows nothing, but that the answer is no mark."""

    def forward(self, tokens: torch.Tensor, document: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros(*tokens.shape, SIZE + 1)
        logits[..., SIZE] = -1e9
        return logits


def test_metrics_of_a_model_that_knows_nothing() -> None:
    made = prepared(sequence())
    batch = {name: torch.from_numpy(np.stack([values])) for name, values in made.items()}
    found = task.metrics(task.evaluate(Uniform(), batch, CONFIG), CONFIG, None)
    assert found["perplexity"] == pytest.approx(SIZE, rel=1e-4)
    assert found["accuracy"] < 0.05
