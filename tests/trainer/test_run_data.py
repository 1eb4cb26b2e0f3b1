"""What a run tells of its data, against what its loader gave."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from configs.load import load
from data_pipelines import writer
from data_pipelines.data_state import Exceptions
from data_pipelines.mixture import MixtureExamples
from tests.trainer import test_mixture_runs as mixtures
from trainer.distributed import World
from trainer.run_data import Position, RunData, open_datasets
from trainer.validate import validate


def test_the_shares_of_a_mixture_are_those_of_what_was_delivered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A block of the first source is skipped from a position on; every example that the loader gives is counted."""
    monkeypatch.setattr(writer, "BLOCK_BYTES", 1000)
    plan = validate(load(mixtures.config(tmp_path, steps=40, changes=[{"step": 20, "weights": [0.5, 0.5]}])))
    data = RunData.of(open_datasets(plan), plan)
    assert isinstance(data.train, MixtureExamples) and len(data.train.parts[0].block_examples) >= 3
    exceptions = Exceptions().skip([("train", 1)], 60)
    loader = data.loader(plan.config, World(0, 1, 0, torch.device("cpu")), Position(0, 0, exceptions))
    given = [each.sample_ids for step in range(40) for each in loader.step(step) if not each.idle]
    sources = data.train.bases[1:].searchsorted(np.concatenate(given), side="right")
    assert len(sources) < 200
    found = data.metrics(Position(40, 200, exceptions))
    loader.close()
    data.close()
    assert found["data/0-text/share"] == pytest.approx(np.mean(sources == 0))
    assert found["data/1-text/share"] == pytest.approx(np.mean(sources == 1))
    assert found["data/0-text/planned_share"] == pytest.approx((100 * 0.75 + 100 * 0.5) / 200)
    assert found["data/skipped_blocks"] == 1
