"""Runs on a mixture: the same at any world size, resumed; shares that change at a position."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.pool import WorkerFailed
from tests.tiny import tiny_config
from tests.trainer.attempts import curve, data_state, state, train
from trainer.record import RunRecord

pytestmark = pytest.mark.distributed


def config(folder: Path, weights: tuple[float, ...] = (0.75, 0.25), **changes: Any) -> dict[str, Any]:
    """Two sources of text; `changes` to the mixture's settings."""
    tiny = tiny_config(folder)
    (folder / "numbers.txt").write_text("\n\n".join(f"{n} and {n * n} and {n + 7}" for n in range(50)))
    own = {"separator": "\n\n", "validation_fraction": 0.2}
    words = {"name": "text", "paths": [str(folder / "text.txt")]} | own
    numbers = {"name": "text", "paths": [str(folder / "numbers.txt")]} | own
    run = {key: changes.pop(key) for key in ("name", "parent", "steps") if key in changes}
    sources = [{"weight": weight, "data": data} for weight, data in zip(weights, (words, numbers), strict=True)]
    if "max_epochs" in changes:
        sources[1]["max_epochs"] = changes.pop("max_epochs")
    data = {"name": "mixture", "sources": sources} | changes
    task = {"name": "language_modeling", "seq_len": 32, "tokenizer": {"name": "bpe", "vocab_size": 300}}
    return tiny | {"data": data, "task": task} | run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mixture")


@pytest.fixture(scope="module")
def undisturbed(folder: Path) -> RunRecord:
    return train(config(folder, changes=[{"at": 24, "weights": [0.5, 0.5]}]))


def test_shares_are_recorded_and_their_change_is_in_the_state(undisturbed: RunRecord) -> None:
    rows = undisturbed.stitched()
    planned = [0.75] * 4 + [(24 * 0.75 + (examples - 24) * 0.5) / examples for examples in (25, 30, 35, 40)]
    assert [row["data/0-text/planned_share"] for row in rows] == pytest.approx(planned)
    for row in rows:
        assert row["data/0-text/share"] == pytest.approx(row["data/0-text/planned_share"], abs=3 / row["examples"])
    assert rows[3]["data/0-text/share"] == pytest.approx(0.75)
    assert rows[-1]["data/0-text/share"] + rows[-1]["data/1-text/share"] == pytest.approx(1.0)
    assert data_state(undisturbed, 4)["mixture"] == [{"at": 0, "weights": [0.75, 0.25]}]
    assert data_state(undisturbed, 8)["mixture"][1] == {"at": 24, "weights": [0.5, 0.5]}
    assert len(data_state(undisturbed, 8)["dataset"]["sources"]) == 2
    assert rows[-1]["validation/bits_per_byte"] > 0


def test_resumed_on_other_numbers_of_workers_it_sees_the_same(folder: Path, undisturbed: RunRecord) -> None:
    settings = config(folder, changes=[{"at": 24, "weights": [0.5, 0.5]}], name="resized")
    train(settings, world_size=3, stop_after=3)
    resumed = train(settings, world_size=1)
    for row, wanted in zip(curve(resumed), curve(undisturbed), strict=True):
        assert row == pytest.approx(wanted, rel=1e-3, abs=1e-4)
    for name, value in state(undisturbed, 8).items():
        torch.testing.assert_close(state(resumed, 8)[name], value, atol=2e-4, rtol=1e-3, msg=name)


def test_a_branch_may_change_what_is_to_come_but_not_what_was(folder: Path, undisturbed: RunRecord) -> None:
    at_6 = {"checkpoint": undisturbed.store.path("checkpoints/step-00000006"), "state": "all"}
    to_come = [{"at": 24, "weights": [0.5, 0.5]}, {"at": 35, "weights": [0.0, 1.0]}]
    branch = train(config(folder, changes=to_come, name="to-come", parent=at_6), world_size=1)
    planned = (24 * 0.25 + 11 * 0.5 + 5 * 1.0) / 40
    assert branch.stitched()[-1]["data/1-text/planned_share"] == pytest.approx(planned)
    with pytest.raises(WorkerFailed, match=r"shares up to position 30 are from 0: 0\.75, 0\.25, but the run"):
        train(config(folder, changes=[], name="past", parent=at_6), world_size=1)


def test_a_change_at_a_step_is_in_the_state_and_a_resume_checks_it(folder: Path) -> None:
    """At step 4 of 5 examples: the run with the same change at example 20 is the oracle."""
    at_20 = train(config(folder, changes=[{"at": 20, "weights": [0.5, 0.5]}], name="at-20"), world_size=1)
    at_4 = config(folder, changes=[{"step": 4, "weights": [0.5, 0.5]}], name="at-step-4")
    train(at_4, world_size=1, stop_after=5)
    resumed = train(at_4, world_size=1)
    assert curve(resumed) == curve(at_20)
    assert data_state(resumed, 8)["mixture"] == data_state(at_20, 8)["mixture"]
    assert data_state(resumed, 8)["mixture"][1] == {"at": 20, "weights": [0.5, 0.5]}
    at_6 = {"checkpoint": resumed.store.path("checkpoints/step-00000006"), "state": "all"}
    other = config(folder, changes=[{"step": 5, "weights": [0.5, 0.5]}], name="at-step-5", parent=at_6)
    with pytest.raises(WorkerFailed, match=r"from 20: 0\.5, 0\.5: what it has seen would be counted wrongly"):
        train(other, world_size=1)


def test_a_mixture_that_ends_before_the_run_is_refused_at_its_start(folder: Path) -> None:
    ending = config(folder, weights=(0.0, 1.0), max_epochs=0.5, name="ending")
    with pytest.raises(WorkerFailed, match=r"The run takes 40 examples, but after \d+ every source"):
        train(ending, world_size=1)
