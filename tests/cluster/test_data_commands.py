"""`shardyard data ...`, as a user calls it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from cluster.cli import main
from data_pipelines import writer
from data_pipelines.columns import KEY, Column
from data_pipelines.index import Index
from data_pipelines.storage import Store
from data_pipelines.writer import ShardWriter
from tests.data_pipelines.lines_source import write_lines
from tests.data_pipelines.test_build import texts
from tests.tiny import write_recipe


def ask(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> Any:
    """What a command prints with --json."""
    capsys.readouterr()
    ended = main([*arguments, "--json"])
    output = capsys.readouterr()
    assert ended == code, output.err
    return json.loads(output.out)


def tell(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What a command says to a person."""
    capsys.readouterr()
    assert main(list(arguments)) == 0
    output = capsys.readouterr()
    assert output.err == ""
    return output.out


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    return str(write_recipe(tmp_path))


def test_build_inspect_verify(tmp_path: Path, recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "inspect", recipe]) == 4
    assert f"Build it: shardyard data build {recipe}" in capsys.readouterr().err
    built = ask(capsys, "data", "build", recipe)
    assert built["splits"]["train"]["rows"] + built["splits"]["validation"]["rows"] == 60
    assert re.search(r"SPLIT +ROWS +TOKENS", tell(capsys, "data", "build", recipe, "--workers", "1"))
    shown = ask(capsys, "data", "inspect", recipe, "--examples", "2")
    beginnings = [example["tokens"]["text"] for example in shown["examples"]["train"]]
    assert len(beginnings) == 2 and all(one in (tmp_path / "text.txt").read_text() for one in beginnings)
    lengths = shown["splits"]["train"]["lengths"]["tokens"]
    assert sum(one["rows"] for one in lengths["classes"]) == built["splits"]["train"]["rows"]
    said = tell(capsys, "data", "inspect", recipe)
    assert "begins:" in said and re.search(r"128 to 255 +\d+ +#+", said)
    assert ask(capsys, "data", "verify", recipe)["damage"] == []
    assert "match their digests" in tell(capsys, "data", "verify", built["path"])  # a folder does as well


def test_a_data_set_is_of_use_when_its_source_is_gone(
    tmp_path: Path, recipe: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    was = text.read_text()
    text.unlink()
    error = ask(capsys, "data", "inspect", recipe, code=4)["error"]
    assert "There is no file or folder" in error and "folder of a data set can be given" in error
    text.write_text(was)
    path = ask(capsys, "data", "build", recipe)["path"]
    text.unlink()
    for arguments in (["inspect", recipe], ["verify", recipe], ["export", recipe, "--out", str(tmp_path / "out")]):
        assert ask(capsys, "data", *arguments)["path"] == path
    assert "This is what was built last with the same settings." in tell(capsys, "data", "inspect", recipe)
    assert ask(capsys, "data", "inspect", recipe, "data.validation_fraction=0.3", code=4)["kind"] == "NotFound"


@pytest.mark.parametrize("kind", ["concat", "best_fit"])
def test_the_waste_of_packing_is_told(
    tmp_path: Path, recipe: str, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every token and every end is one label: what is left of the sequences' places is padding."""
    overrides = [f"task.packing={kind}", "task.seq_len=24"]
    built = ask(capsys, "data", "build", recipe, *overrides)
    shown = ask(capsys, "data", "inspect", recipe, *overrides)
    assert shown["packed"] == built["packed"] and shown["packed"]["seq_len"] == 24
    for split, packed in shown["packed"]["splits"].items():
        labels = built["splits"][split]["tokens"] + built["splits"][split]["rows"]
        assert packed["waste"] == pytest.approx(1 - labels / (24 * packed["sequences"]), abs=1e-6)
    said = tell(capsys, "data", "inspect", recipe, *overrides)
    assert re.search(rf"packed +{kind}, 24 tokens a sequence; padding is [\d.]+ % of train, [\d.]+ % of valid", said)
    assert ask(capsys, "data", "inspect", built["path"])["packed"] is None  # a folder knows of no length
    longer = ask(capsys, "data", "inspect", recipe, f"task.packing={kind}", "task.seq_len=25")
    assert (longer["packed"] is None) == (kind == "best_fit"), "what was not counted would have to be read"


def test_inspect_says_where_it_looked_at_some_rows_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "BLOCK_BYTES", 2000)
    data = write_lines(tmp_path / "source", [texts(200)], validation_fraction=0.0)
    recipe = str(write_recipe(tmp_path, data=data.model_dump()))
    ask(capsys, "data", "build", recipe)
    assert "looked at" not in tell(capsys, "data", "inspect", recipe)
    monkeypatch.setattr("data_pipelines.inspect._LOOKED_AT_BLOCKS", 3)
    lengths = ask(capsys, "data", "inspect", recipe)["splits"]["train"]["lengths"]["tokens"]
    assert lengths["is_sample"] and 0 < lengths["rows"] < 200
    assert f"(of {lengths['rows']} rows looked at)" in tell(capsys, "data", "inspect", recipe)


def test_verify_names_what_is_damaged(tmp_path: Path, recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path(ask(capsys, "data", "build", recipe)["path"])
    shard = folder / "validation-00000-000.arrow"
    raw = bytearray(shard.read_bytes())
    raw[len(raw) // 2] ^= 1
    shard.write_bytes(raw)
    error = ask(capsys, "data", "verify", recipe, code=1)
    assert error["kind"] == "DatasetDamaged"
    assert re.search(r"validation-00000-000\.arrow, block 0 \(examples 0 to \d+ of validation", error["error"])
    assert error["error"].endswith(f"shardyard data build {recipe}")
    (damage,) = error["damage"]
    assert (damage["file"], damage["blocks"], damage["split"]) == (shard.name, [0, 0], "validation")
    assert ask(capsys, "data", "verify", str(folder), code=1)["error"].endswith("shardyard data build RECIPE")


def test_a_lost_file_of_many_blocks_is_one_clause(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "BLOCK_BYTES", 500)
    data = write_lines(tmp_path / "source", [texts(200)], validation_fraction=0.0)
    recipe = str(write_recipe(tmp_path, data=data.model_dump()))
    folder = Path(ask(capsys, "data", "build", recipe, "data.shuffle=examples")["path"])
    (folder / "train-00000-000.arrow").unlink()
    error = ask(capsys, "data", "verify", recipe, "data.shuffle=examples", code=1)
    lost, blocks = error["damage"]
    assert (lost["file"], lost["cause"], lost["blocks"]) == ("train-00000-000.arrow", "missing", None)
    assert blocks["blocks"][0] == 0 and blocks["blocks"][1] > 20 and blocks["rows"] == [0, 199]
    assert len(error["error"]) < 700 and error["error"].endswith(f"{recipe} data.shuffle=examples")


def test_diff(tmp_path: Path, recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    one = ask(capsys, "data", "build", recipe)["path"]
    other = ask(capsys, "data", "build", recipe, "data.validation_fraction=0.5")["path"]
    assert one != other
    assert ask(capsys, "data", "diff", recipe, one) == {"a": one, "b": one, "same": True}
    assert "hold the same data" in tell(capsys, "data", "diff", one, one)
    found = ask(capsys, "data", "diff", one, other)
    assert found["source"] == {"validation_fraction": [0.1, 0.5]}
    moved = found["splits"]["train"]["only_a"]
    assert moved > 0 and moved == found["splits"]["validation"]["only_b"]
    said = tell(capsys, "data", "diff", one, other)
    assert "validation_fraction: 0.1 in a, 0.5 in b" in said and f"rows only in a: {moved}" in said


def test_export(tmp_path: Path, recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    built = ask(capsys, "data", "build", recipe)
    out = tmp_path / "parquet"
    assert ask(capsys, "data", "export", recipe, "--out", str(out))["files"] == [
        "train-00000.parquet",
        "validation-00000.parquet",
    ]
    text = (tmp_path / "text.txt").read_text()
    exported = pq.read_table(out / "train-00000.parquet")
    assert exported.num_rows == built["splits"]["train"]["rows"]
    assert all(one in text for one in exported["text"].to_pylist())
    assert ask(capsys, "data", "export", recipe, "--out", str(out), code=2)["kind"] == "UsageError"


def test_pictures_are_written_and_shown_by_their_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import numpy as np
    from PIL import Image

    columns = (KEY, Column("image", "uint8", (6, 4, 3)), Column("label", "int64"))
    images = np.random.default_rng(0).integers(0, 256, (5, 6, 4, 3), np.uint8)
    with ShardWriter(Store(tmp_path / "set"), "train-00000", columns) as writer:
        for number, image in enumerate(images):
            writer.add({"key": str(number), "image": image, "label": number})
    Index("pictures", {}, columns, writer.files, {"train": writer.blocks}).write(Store(tmp_path / "set"))
    shown = ask(capsys, "data", "inspect", str(tmp_path / "set"), "--out", str(tmp_path / "png"), "--examples", "5")
    assert len(shown["pictures"]) == 5
    for path, image in zip(shown["pictures"], images, strict=True):
        assert np.array_equal(np.asarray(Image.open(path)), image)
    said = tell(capsys, "data", "inspect", str(tmp_path / "set"))
    assert "image: a picture of 6 x 4 x 3" in said and "image uint8[6, 4, 3]" in said and "label: 0" in said


def test_bad_rows_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_lines(tmp_path / "source", [[*texts(200), b"{broken"]])
    recipe = str(write_recipe(tmp_path, data=data.model_dump()))
    said = tell(capsys, "data", "build", recipe)
    assert "bad rows     1" in said and "quarantine.jsonl" in said
    write_lines(tmp_path / "source", [[*texts(10), b"{broken"]])
    error = ask(capsys, "data", "build", recipe, code=2)
    assert error["kind"] == "TooManyBadRows" and "000.jsonl:11: no row" in error["error"]


def test_a_mixture_has_a_data_set_for_each_source(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sources = [
        {"weight": 1.0 + number, "data": write_lines(tmp_path / str(number), [texts(30, number)]).model_dump()}
        for number in range(2)
    ]
    recipe = str(write_recipe(tmp_path, data={"name": "mixture", "sources": sources}))
    built = ask(capsys, "data", "build", recipe)
    assert [sum(split["rows"] for split in one["splits"].values()) for one in built["sources"]] == [30, 30]
    assert ask(capsys, "data", "verify", recipe, code=2)["error"].startswith(f"The data of {recipe} is a mixture")
    assert ask(capsys, "data", "verify", built["sources"][1]["path"])["damage"] == []
