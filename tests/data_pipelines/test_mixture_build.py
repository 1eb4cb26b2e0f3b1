from __future__ import annotations

from pathlib import Path

import pytest

from configs.errors import UsageError
from configs.problems import ConfigError
from configs.schema import Plugin
from data_pipelines.build import ensure_dataset
from data_pipelines.mixture_build import ensure_mixture
from data_pipelines.partition_rows import source_of
from data_pipelines.storage import Store
from data_pipelines.tokenizer import TokenizerConfig
from tests.data_pipelines.lines_source import write_lines
from tests.data_pipelines.test_build import contents, rows, shuffled, texts

BPE = TokenizerConfig(vocab_size=400)


def mixture(folder: Path, *weights: float, **settings: object) -> Plugin:
    """A mixture of sources of other words each."""
    sources = []
    for number, weight in enumerate(weights):
        words = [f"{'abc'[number] * 7} {text}" for text in texts(60, number)]
        data = write_lines(folder / str(number), [words[:30], words[30:]])
        sources.append({"weight": weight, "data": data.model_dump()})
    return Plugin.model_validate({"name": "mixture", "sources": sources, **settings})


def test_each_source_is_a_data_set_and_all_share_a_tokenizer(tmp_path: Path) -> None:
    data = mixture(tmp_path, 0.7, 0.3, damage="skip")
    datasets = ensure_mixture(Store(tmp_path / "s"), data, BPE)
    assert [len(rows(dataset)) for dataset in datasets] == [60, 60]
    assert len({dataset.tokenizer.to_json() for dataset in datasets if dataset.tokenizer}) == 1
    tokenizer = datasets[0].tokenizer
    assert tokenizer is not None
    # Seven letters in a row are few tokens where the tokenizer has seen them.
    assert all(len(tokenizer.encode([letter * 7])[0]) == 1 for letter in "ab")
    assert len(tokenizer.encode(["q" * 7])[0]) == 7
    assert [dataset.damage_policy.action for dataset in datasets] == ["skip", "skip"]


def test_weights_change_no_data_set_and_nothing_is_built_twice(tmp_path: Path) -> None:
    ensure_mixture(Store(tmp_path / "s"), mixture(tmp_path, 0.7, 0.3), BPE)
    before = contents(tmp_path / "s")
    stages: list[str] = []
    for weights in ((0.7, 0.3), (0.1, 0.9)):
        data = mixture_of(tmp_path, *weights)
        ensure_mixture(Store(tmp_path / "s"), data, BPE, lambda stage, _: stages.append(stage))
    assert stages == [] and contents(tmp_path / "s") == before


def mixture_of(folder: Path, *weights: float) -> Plugin:
    """The same sources again, their files untouched."""
    sources = [
        {"weight": weight, "data": write_lines(folder / str(number), []).model_dump()}
        for number, weight in enumerate(weights)
    ]
    return Plugin.model_validate({"name": "mixture", "sources": sources})


def test_the_same_bytes_in_any_order_of_the_tasks(tmp_path: Path) -> None:
    data = mixture(tmp_path, 1, 2, 3)
    ensure_mixture(Store(tmp_path / "alone"), data, BPE)
    ensure_mixture(Store(tmp_path / "many"), data, BPE, run_tasks=shuffled(1))
    alone, many = (contents(tmp_path / name) for name in ("alone", "many"))
    for found in (alone, many):
        assert len([name for name in found if name.startswith("tokenizers/")]) == 1
    assert alone == many


def test_what_belongs_to_a_source_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="validation_fraction of a mixture is set in the `data` of each source"):
        ensure_mixture(Store(tmp_path / "s"), mixture(tmp_path, 1, 1, validation_fraction=0.1), BPE)
    with pytest.raises(UsageError, match="Build it with ensure_mixture"):
        ensure_dataset(Store(tmp_path / "s"), mixture(tmp_path, 1, 1), BPE)


@pytest.mark.parametrize(("place", "given"), [({}, "neither"), ({"at": 3, "step": 1}, "at: 3 and step: 1")])
def test_a_change_is_at_one_place(tmp_path: Path, place: dict[str, int], given: str) -> None:
    with pytest.raises(ConfigError, match=rf"either at \(examples\) or step, and this one has {given}"):
        source_of(mixture(tmp_path, 1, 1, changes=[{"weights": [1, 2], **place}]))
