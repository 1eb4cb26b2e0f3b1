"""What the tests of every task cannot see of the prediction of molecules' properties."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from configs.errors import RunFailed, UsageError
from data_pipelines.columns import Column
from trainer.bound import BoundTask
from trainer.parts.smiles import encode
from trainer.tasks import drug_discovery

STORED = [Column("smiles", "utf8"), Column("target", "float32")]


def task(**settings: Any) -> BoundTask:
    return BoundTask(drug_discovery, drug_discovery.Config(**({"seq_len": 20, "mean": -2.0, "std": 3.0} | settings)))


def prepared(smiles: str, seed: int = 0, *, training: bool = True, **settings: Any) -> list[int]:
    prepare = task(**settings).preparation(STORED, training=training)
    assert prepare is not None
    row = {"smiles": np.frombuffer(smiles.encode(), np.uint8), "target": np.float32(1)}
    return prepare(row, np.random.default_rng(seed))["tokens"].tolist()


class Says(nn.Module):
    """Gives these standardised numbers, and keeps what it was asked."""

    def __init__(self, values: list[float]) -> None:
        super().__init__()
        self.values = torch.tensor(values).unsqueeze(1)
        self.asked: tuple[Tensor, ...] = ()

    def forward(self, *inputs: Tensor) -> Tensor:
        self.asked = inputs
        return self.values


def batch(targets: list[float]) -> dict[str, Tensor]:
    tokens = torch.tensor([[3, 4, 5], [3, 0, 0], [3, 4, 0]], dtype=torch.uint8)
    return {"tokens": tokens, "tokens_length": torch.tensor([3, 1, 2]), "target": torch.tensor(targets)}


def test_molecules_are_written_anew_in_training_alone() -> None:
    smiles = "CC(=O)OCCN"
    stored = encode(smiles).tolist()
    assert prepared(smiles) == stored
    assert len({tuple(prepared(smiles, seed, rewrite=True)) for seed in range(20)}) > 5
    assert prepared(smiles, rewrite=True, training=False) == stored
    for seed in range(20):  # as it was, where another way to write it is too long
        assert len(prepared(smiles, seed, rewrite=True, seq_len=len(stored))) <= len(stored)


def test_figures_are_by_definition() -> None:
    targets, said = [-1.0, 2.0, -8.0], [0.0, 1.0, -1.5]  # in the data's units: -2, 1, -6.5
    model = Says(said)
    found = task().metrics(task().evaluate(model, batch(targets)), None)
    errors = np.array([-2.0, 1.0, -6.5]) - targets
    assert found["rmse"] == pytest.approx(np.sqrt((errors**2).mean()))
    assert found["r2"] == pytest.approx(1 - (errors**2).sum() / ((np.array(targets) - np.mean(targets)) ** 2).sum())
    assert task().loss(model, batch(targets)).item() == pytest.approx((errors**2).sum() / 9)
    assert found["loss"] == pytest.approx((errors**2).mean() / 9)
    assert model.asked[1].tolist() == [[0, 0, 0], [0, 1, 1], [0, 0, 1]]  # padding is a document of its own


def test_a_target_that_does_not_count_changes_nothing() -> None:
    two = task().evaluate(Says([0.0, 1.0, float("nan")]), batch([-1.0, 2.0, float("nan")]))
    assert two["molecules"] == 2 and two["squared_error"] == pytest.approx(2.0)
    assert task().metrics(task().evaluate(Says([0.0] * 3), batch([1.0] * 3)), None).keys() == {"loss", "rmse"}


def test_what_cannot_be_read_is_told() -> None:
    with pytest.raises(RunFailed, match=r"has 21 symbols; task\.seq_len=20 .*Set task\.seq_len"):
        prepared("C" * 21)
    with pytest.raises(UsageError, match="is no SMILES"):
        prepared("what is this")
    with pytest.raises(UsageError, match="text and one number"):
        task().preparation([Column("smiles", "uint8", (None,)), STORED[1]], training=True)
