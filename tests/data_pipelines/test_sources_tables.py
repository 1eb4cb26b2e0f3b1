"""CSV, Parquet, Arrow and Hugging Face data sets."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from configs.errors import Damaged, ShardyardError, Unreachable, UsageError
from data_pipelines import arrow_files, arrow_rows
from data_pipelines.sources import Bad, Row, arrow, csv, huggingface, parquet, partition_files
from tests.data_pipelines.reading import bads_of, read_all, rows_of

# --- csv

PEOPLE = "age,name,score,label\n31,Ann,1.5,yes\n42,Bob,2e3,no\n\n7,Cléo,-0.25,yes\n"


def csv_config(tmp_path: Path, content: str | bytes, name: str = "a.csv", **settings: Any) -> csv.Config:
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return csv.Config.model_validate({"paths": [str(tmp_path / name)], **settings})


def test_csv_infers_features_and_classes(tmp_path: Path) -> None:
    config = csv_config(tmp_path, PEOPLE, label_column="label", text_columns={"text": "name"})
    assert [(column.name, column.dtype, column.shape) for column in csv.schema(config)] == [
        ("text", "utf8", (None,)),
        ("features", "float32", (2,)),
        ("label", "int64", ()),
    ]
    found = rows_of(csv, config)
    assert [row.key for row in found] == ["a.csv:2", "a.csv:3", "a.csv:5"]
    assert [row.values["text"] for row in found] == ["Ann", "Bob", "Cléo"]
    assert [row.values["label"] for row in found] == [1, 0, 1]  # no, yes
    features = np.array([row.values["features"] for row in found])
    np.testing.assert_array_equal(features, np.array([[31, 1.5], [42, 2000], [7, -0.25]], np.float32))


def test_csv_takes_what_it_is_told(tmp_path: Path) -> None:
    told = {"feature_columns": ["score"], "label_column": "age", "label_type": "number"}
    found = rows_of(csv, csv_config(tmp_path, PEOPLE, **told))
    assert [row.values["label"] for row in found] == [31.0, 42.0, 7.0]
    assert [row.values["features"].tolist() for row in found] == [[1.5], [2000.0], [-0.25]]
    named = csv_config(tmp_path, "5\t1\n6\t0\n", "b.tsv", column_names=["x", "y"], label_column="y")
    assert [(row.values["features"].tolist(), row.values["label"]) for row in rows_of(csv, named)] == [
        ([5.0], 1),
        ([6.0], 0),
    ]
    chosen = csv_config(tmp_path, PEOPLE, label_column="label", classes=["yes", "no"], feature_columns=[])
    assert [row.values for row in rows_of(csv, chosen)] == [{"label": 0}, {"label": 1}, {"label": 0}]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("1,2", "has 2 values, not 3"),
        ("1,2,3,4", "has 4 values, not 3"),
        ("x,2,1", "column 'a' is 'x', not a number"),
        (",2,1", "column 'a' is '', not a number (data.missing_value"),
        ("nan,2,1", "column 'a' is nan, not a finite"),
        ("1,1e99,1", "column 'b' is 1e+99, not a finite float32"),
        ("1,2,1.5", "column 'y' is '1.5', not a whole number"),
        ('1,"2,1', "not CSV (unexpected end of data); if values hold line breaks set data.newlines_in_values"),
        ("1,\udce9,1", "byte 2 of the line is not UTF-8"),
    ],
)
def test_a_bad_csv_row_is_named_and_the_others_are_read(tmp_path: Path, line: str, reason: str) -> None:
    content = f"a,b,y\n1,2,0\n{line}\n3,4,1\n".encode(errors="surrogateescape")
    config = csv_config(tmp_path, content, label_column="y", label_type="class", feature_columns=["a", "b"])
    if line.endswith("1.5"):  # else a class of its own
        config = config.model_copy(update={"paths": (csv_config(tmp_path, content, "c.csv").paths[0],)})
        good = csv_config(tmp_path, "a,b,y\n1,2,0\n", "0.csv").paths[0]
        config = config.model_copy(update={"paths": (good, *config.paths)})
    found = read_all(csv, config)
    bad = [row for row in found if isinstance(row, Bad)]
    assert len(bad) == 1 and bad[0].line == 3 and reason in bad[0].reason
    assert sum(isinstance(row, Row) for row in found) >= 2


def test_csv_missing_values_are_stored_as_told(tmp_path: Path) -> None:
    config = csv_config(tmp_path, "a,b\n1,\nNA,2\n?,x\n", missing_value=-1.0, feature_columns=["a", "b"])
    assert [row.values["features"].tolist() for row in read_all(csv, config)[:2]] == [[1, -1], [-1, 2]]
    assert [bad.line for bad in bads_of(csv, config)] == [4]


def test_csv_values_with_line_breaks(tmp_path: Path) -> None:
    content = 'text,y\n"one\ntwo, ""three""",1\n"ok",2\n'
    config = csv_config(tmp_path, content, text_columns={"text": "text"}, label_column="y", newlines_in_values=True)
    found = rows_of(csv, config)
    assert [(row.key, row.values["text"]) for row in found] == [
        ("a.csv:2", 'one\ntwo, "three"'),
        ("a.csv:4", "ok"),
    ]
    broken = csv_config(tmp_path, b'text,y\nfine,1\n"caf\xe9",1\nfine,1\n"open,1\n', newlines_in_values=True)
    broken = broken.model_copy(update={"text_columns": {"text": "text"}})
    found_all = read_all(csv, broken)
    assert [type(row) for row in found_all] == [Row, Bad, Row, Bad]
    assert [row.line for row in found_all if isinstance(row, Bad)] == [3, 5]


def test_large_csv_is_read_in_ranges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ["x,y", *(f"{n},{n % 3}" for n in range(3000))]
    config = csv_config(tmp_path, "\r\n".join(lines), label_column="y")
    alone = rows_of(csv, config)
    monkeypatch.setattr(partition_files, "__kwdefaults__", {**partition_files.__kwdefaults__, "target_bytes": 2000})
    assert len(csv.partitions(config)) > 5
    found = rows_of(csv, config)
    assert (
        [row.values["features"][0] for row in found] == [row.values["features"][0] for row in alone] == [*range(3000)]
    )


def test_csv_settings_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no column 'agee' \(its columns: age, name, score, label\)"):
        csv.schema(csv_config(tmp_path, PEOPLE, label_column="agee"))
    with pytest.raises(UsageError, match=r"no column of numbers .*text_columns, for example \{text: a\}"):
        csv.schema(csv_config(tmp_path, "a\nx\n"))
    for head in ("", "a,a\n1,2\n", ",,\n"):
        with pytest.raises(UsageError, match=r"begins with no line of different column names"):
            csv.schema(csv_config(tmp_path, head))
    config = csv_config(tmp_path, "a,b\n1,2\n", "1.csv")
    other = csv_config(tmp_path, "a,c\n1,2\n", "2.csv")
    both = config.model_copy(update={"paths": config.paths + other.paths})
    with pytest.raises(UsageError, match=r"2\.csv has no column 'b'"):
        read_all(csv, both)


# --- parquet and arrow


def table(rows: int = 100) -> pa.Table:
    numbers = np.arange(rows)
    return pa.table(
        {
            "body": pa.array([f"é{n}" for n in range(rows)]),
            "large": pa.array([f"x{n}" for n in range(rows)], pa.large_string()),
            "kind": pa.array(["a", "b"] * (rows // 2)).dictionary_encode(),
            "raw": pa.array([bytes([n % 256]) * (n % 5) for n in range(rows)], pa.binary()),
            "label": pa.array(numbers, pa.int8()),
            "flag": pa.array(numbers % 2 == 0),
            "ids": pa.array([list(range(n % 4)) for n in range(rows)], pa.list_(pa.int32())),
            "pair": pa.FixedSizeListArray.from_arrays(pa.array(np.arange(rows * 2, dtype=np.float32)), 2),
            "vectors": pa.array([[[n, 1.0, 2.0]] * (n % 3) for n in range(rows)], pa.list_(pa.list_(pa.float64(), 3))),
            "image": pa.array(
                [{"bytes": b"img%d" % n, "path": None} for n in range(rows)],
                pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
            ),
            "when": pa.array(numbers, pa.timestamp("s")),
        }
    )


COLUMNS = {name: name for name in table(2).column_names if name != "when"} | {"text": "body"}
WRITERS = {
    "parquet": (parquet, lambda t, path: pq.write_table(t, f"{path}.parquet", row_group_size=30)),
    "feather": (arrow, lambda t, path: pyarrow.feather.write_feather(t, f"{path}.feather", "zstd", chunksize=30)),
    "stream": (arrow, lambda t, path: _write_stream(t, f"{path}.arrow")),
}


def _write_stream(rows: pa.Table, path: str) -> None:
    with pa.ipc.new_stream(path, rows.schema) as writer:
        writer.write_table(rows, max_chunksize=30)


def written(tmp_path: Path, kind: str, rows: pa.Table, columns: dict[str, str] = COLUMNS) -> tuple[Any, Any]:
    source, write = WRITERS[kind]
    write(rows, tmp_path / "a")
    return source, source.Config(paths=(str(tmp_path),), columns=columns)


def plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray) else value


@pytest.mark.parametrize("kind", WRITERS)
def test_columns_of_every_type_come_out_as_they_are(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrow_rows, "_SLICE_ROWS", 7)
    source, config = written(tmp_path, kind, table())
    expected = table().to_pylist()
    found = rows_of(source, config)
    assert found[0].key.endswith(":1") and len(found) == 100
    for row, wanted in zip(found, expected, strict=True):
        wanted |= {"image": wanted["image"]["bytes"], "text": wanted["body"]}
        assert {name: plain(value) for name, value in row.values.items()} == {name: wanted[name] for name in COLUMNS}
    by_name = {column.name: (column.dtype, column.shape) for column in source.schema(config)}
    assert by_name["vectors"] == ("float64", (None, 3)) and by_name["pair"] == ("float32", (2,))
    assert by_name["image"] == ("binary", (None,)) and by_name["flag"] == ("uint8", ())


@pytest.mark.parametrize("kind", WRITERS)
def test_large_files_are_read_in_pieces_with_the_same_keys(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, config = written(tmp_path, kind, table())
    alone = rows_of(source, config)
    assert len(source.partitions(config)) == 1
    for module in (parquet, arrow_files):
        monkeypatch.setattr(module, "partition_bytes", lambda _files: 1000)
    assert len(source.partitions(config)) == 4
    found = rows_of(source, config)
    assert [(row.key, row.values["text"]) for row in found] == [(row.key, row.values["text"]) for row in alone]


@pytest.mark.parametrize("kind", WRITERS)
def test_rows_with_nulls_or_wrong_numbers_are_bad(tmp_path: Path, kind: str) -> None:
    rows = pa.table(
        {
            "text": ["a", None, "c", "d", "e", "f"],
            "x": pa.array([1.0, 2.0, float("nan"), 4.0, 5.0, 6.0]),
            "v": pa.array([[1], [1], [1], None, [None], [2, 3]], pa.list_(pa.int64())),
            "i": pa.array([{"bytes": b"x"}] * 5 + [None], pa.struct([("bytes", pa.binary())])),
        }
    )
    source, config = written(tmp_path, kind, rows, {name: name for name in rows.column_names})
    found = read_all(source, config)
    assert [(row.line, row.reason) for row in found if isinstance(row, Bad)] == [
        (2, "column 'text' is null"),
        (3, "column 'x' is nan, not a finite number"),
        (4, "column 'v' is null"),
        (5, "column 'v' holds a null"),
        (6, "column 'i' is null"),
    ]
    assert [row.key.rpartition(":")[2] for row in found if isinstance(row, Row)] == ["1"]


@pytest.mark.parametrize("kind", WRITERS)
def test_large_rows_are_taken_few_at_a_time_and_those_that_are_too_large_are_bad(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module, name in ((arrow_rows, "_SLICE_BYTES"), (parquet, "_BATCH_BYTES")):
        monkeypatch.setattr(module, name, 1 << 20)
    monkeypatch.setattr(arrow_rows, "MAX_VALUE_BYTES", 1 << 20)
    lengths = [100_000] * 20 + [(1 << 20) + 1, 1 << 20]
    rows = pa.table({"raw": [bytes(length) for length in lengths], "v": [np.zeros(length // 8) for length in lengths]})
    source, config = written(tmp_path, kind, rows, {"raw": "raw", "v": "v"})
    taken = []
    objects = arrow_rows._objects
    monkeypatch.setattr(arrow_rows, "_objects", lambda array: taken.append(array.nbytes) or objects(array))
    found = read_all(source, config)
    assert [type(row) for row in found] == [Row] * 20 + [Bad, Row]
    assert found[20].line == 21 and "column 'raw' takes more than 1 MB" in found[20].reason
    assert max(taken) < 4 << 20 and sum(taken) > sum(lengths)
    rows = pa.table({"v": [np.zeros(length // 8 + 1) for length in lengths]})
    source, config = written(tmp_path, kind, rows, {"v": "v"})
    assert [row.line for row in bads_of(source, config)] == [21, 22]


def test_text_that_is_not_utf8_is_bad(tmp_path: Path) -> None:
    raw = pa.array([b"fine", b"caf\xe9"], pa.binary())
    text = pa.Array.from_buffers(pa.string(), 2, raw.buffers())
    with pa.ipc.new_file(tmp_path / "a.arrow", pa.schema([("text", pa.string())])) as writer:
        writer.write_batch(pa.record_batch([text], ["text"]))
    found = read_all(arrow, arrow.Config(paths=(str(tmp_path),)))
    assert found[0].values == {"text": "fine"}
    assert found[1].reason == "column 'text' is not UTF-8 (byte 3)"


@pytest.mark.parametrize("kind", WRITERS)
def test_columns_that_are_not_there_or_cannot_be_stored_are_refused(tmp_path: Path, kind: str) -> None:
    source, config = written(tmp_path, kind, table(), {"text": "text"})
    with pytest.raises(UsageError, match=r"has no column 'text'.*its columns: body, .*Set data\.columns"):
        source.schema(config)
    source, config = written(tmp_path, kind, table(), {"text": "when"})
    with pytest.raises(UsageError, match=r"column 'when' is of the type timestamp.*which cannot be stored"):
        source.schema(config)
    source, config = written(tmp_path, kind, table(), {"label": "label"})
    WRITERS[kind][1](pa.table({"label": ["text now"]}), tmp_path / "b")
    with pytest.raises(UsageError, match=r"b\..*: column 'label' is utf8 .* and in the first file int8"):
        read_all(source, config)


@pytest.mark.parametrize("kind", WRITERS)
def test_files_that_are_damaged_are_named_and_no_other_exception_comes_out(tmp_path: Path, kind: str) -> None:
    source, config = written(tmp_path, kind, table())
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    generator = np.random.default_rng(0)
    for _ in range(200):
        damaged = bytearray(whole[: int(generator.integers(0, len(whole)))] if generator.random() < 0.3 else whole)
        for place in generator.integers(0, max(1, len(damaged)), 3 if damaged else 0):
            damaged[place] ^= int(generator.integers(1, 256))
        file.write_bytes(bytes(damaged))
        try:
            read_all(source, config)
        except ShardyardError as error:
            assert str(file) in str(error)
    file.write_bytes(whole[:40])
    with pytest.raises(Damaged, match=rf"{file} cannot be read as .* Copy it again"):
        read_all(source, config)


# --- huggingface


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    features = datasets.Features(
        {
            "text": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["x", "y"]),
            "grid": datasets.Array2D((2, 3), "uint8"),
        }
    )
    grid = np.arange(6).reshape(2, 3).tolist()
    train, test = (
        datasets.Dataset.from_dict({"text": texts, "label": [0, 1] * 5, "grid": [grid] * 10}, features=features)
        for texts in ([f"t{n}" for n in range(10)], [f"v{n}" for n in range(10)])
    )
    train.save_to_disk(str(tmp_path / "one"), num_shards=3)
    datasets.DatasetDict({"train": train, "test": test}).save_to_disk(str(tmp_path / "both"))
    return tmp_path


def test_huggingface_folders(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)  # it is not needed for folders
    columns = {"text": "text", "label": "label", "grid": "grid"}
    one = huggingface.Config(path=str(saved / "one"), columns=columns)
    found = rows_of(huggingface, one)
    assert [row.values["text"] for row in found] == [f"t{n}" for n in range(10)]
    assert {row.split for row in found} == {None}
    assert all(row.values["grid"].tolist() == [[0, 1, 2], [3, 4, 5]] for row in found)
    both = huggingface.Config(path=str(saved / "both"), columns=columns, validation_split="test")
    splits = {row.values["text"]: row.split for row in rows_of(huggingface, both)}
    assert splits == {f"t{n}": "train" for n in range(10)} | {f"v{n}": "validation" for n in range(10)}
    assert huggingface.identity(one) != huggingface.identity(both)


def test_huggingface_what_is_not_there_is_refused(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"has no split 'dev'; it has train, test"):
        huggingface.partitions(huggingface.Config(path=str(saved / "both"), split="dev"))
    with pytest.raises(UsageError, match=r"holds one split only"):
        huggingface.partitions(huggingface.Config(path=str(saved / "one"), validation_split="test"))
    with pytest.raises(UsageError, match=r"is no data set that save_to_disk wrote"):
        huggingface.partitions(huggingface.Config(path=str(saved)))
    (saved / "one" / "state.json").write_text("{")
    with pytest.raises(Damaged, match=r"state\.json is not JSON"):
        huggingface.partitions(huggingface.Config(path=str(saved / "one")))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UsageError, match=r"no folder some/name.*pip install 'shardyard\[huggingface\]'"):
        huggingface.partitions(huggingface.Config(path="some/name"))


@pytest.mark.parametrize("of", ["one", "both", "org/rows"])
def test_a_part_of_a_split_is_refused(of: str, saved: Path) -> None:
    path = of if "/" in of else str(saved / of)
    for settings in ({"split": "train[:3]"}, {"split": "train", "validation_split": "train[8:]"}):
        with pytest.raises(ValidationError, match=r"is a part of a split.*data\.validation_fraction"):
            huggingface.Config(path=path, **settings)


def test_rows_that_are_trained_on_are_not_held_out(saved: Path, hub: Hub) -> None:
    folder = {"path": str(saved / "both"), "split": "train", "validation_split": "train"}
    name = {"path": "org/rows", "split": "train+test", "validation_split": "test"}
    for settings in (folder, name):
        with pytest.raises(UsageError, match=r"data\.split=train.* and data\.validation_split=t.* share rows"):
            huggingface.partitions(huggingface.Config.model_validate(settings))


class Hub:
    """What the package `datasets` does for names on the hub: it holds 10 rows in each of the splits train and test."""

    def __init__(self, folder: Path, load: Any) -> None:
        self.slice = ""  # of the split that is loaded, whatever is asked for
        self.settings: dict[str, Any] = {}
        self.features: Any = None  # that the hub tells before anything is downloaded
        self.fails = False
        self.downloads = 0
        self._folder, self._load = folder, load

    def load_dataset(self, name: str, subset: str | None, split: str, revision: str | None) -> Any:
        self._refuse()
        self.downloads += 1
        files = {}
        for one in ("train", "test"):
            file = self._folder / f"{revision}-{one}.csv"
            if not file.exists():  # its time of change is a part of the package's fingerprint
                file.write_text("text\n" + "".join(f"{one} {number}\n" for number in range(10)))
            files[one] = str(file)
        cache = str(self._folder / "cache")
        return self._load("csv", data_files=files, split=split + self.slice, cache_dir=cache, **self.settings)

    def load_dataset_builder(self, name: str, subset: str | None, revision: str | None) -> Any:
        self._refuse()
        return SimpleNamespace(info=SimpleNamespace(features=self.features))

    def _refuse(self) -> None:
        if self.fails:
            raise ConnectionError("no route\nto host")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    fake = Hub(tmp_path, datasets.load_dataset)
    for name in ("load_dataset", "load_dataset_builder"):
        monkeypatch.setattr(datasets, name, getattr(fake, name))
    yield fake
    for cached in (huggingface._hub_split, huggingface._hub_schema):
        cached.cache_clear()


def test_a_hub_that_is_out_of_reach_is_told(hub: Hub) -> None:
    hub.fails = True
    with pytest.raises(Unreachable, match=r"'some/other' \(split train\) cannot be loaded .*ConnectionError: no route"):
        huggingface.partitions(huggingface.Config(path="some/other"))
    with pytest.raises(Unreachable, match=r"'some/other' cannot be loaded .*ConnectionError: no route"):
        huggingface.schema(huggingface.Config(path="some/other"))


def test_a_hub_data_set_is_read_from_the_packages_cache(hub: Hub) -> None:
    found = rows_of(huggingface, huggingface.Config(path="org/rows", validation_split="test"))
    assert [(row.values["text"], row.split) for row in found] == [
        (f"{split} {number}", side)
        for split, side in (("train", "train"), ("test", "validation"))
        for number in range(10)
    ]
    both = rows_of(huggingface, huggingface.Config(path="org/rows", split="train+test"))
    assert [row.values["text"] for row in both] == [row.values["text"] for row in found]


def test_the_columns_of_a_hub_data_set_are_known_without_a_download(hub: Hub) -> None:
    import datasets

    config = huggingface.Config(path="org/rows", columns={"text": "text", "grid": "grid"})
    hub.features = datasets.Features({"text": datasets.Value("string"), "grid": datasets.Array2D((2, 3), "uint8")})
    assert [(column.dtype, column.shape) for column in huggingface.schema(config)] == [
        ("utf8", (None,)),
        ("uint8", (2, 3)),
    ]
    with pytest.raises(
        UsageError, match=r"'org/rows' has no column 'body'.*its columns: text, grid.*Set data\.columns"
    ):
        huggingface.schema(huggingface.Config(path="org/rows", columns={"text": "body"}))
    assert hub.downloads == 0
    hub.features = None  # then there is no other way
    assert [column.name for column in huggingface.schema(huggingface.Config(path="org/old"))] == ["text"]
    assert hub.downloads == 1


@pytest.mark.parametrize("by", ["slice", "keep_in_memory"])
def test_a_hub_data_set_that_is_not_what_its_files_hold_is_refused(hub: Hub, by: str) -> None:
    hub.slice, hub.settings = ("[:3]", {}) if by == "slice" else ("", {"keep_in_memory": True})
    rows, held = ("3", "10") if by == "slice" else ("10", "0")
    with pytest.raises(
        UsageError, match=rf"has {rows} rows, and its files .* hold {held}\..*data\.validation_fraction"
    ):
        huggingface.partitions(huggingface.Config(path="org/rows"))


def test_another_revision_of_a_hub_data_set_is_another_one(hub: Hub) -> None:
    """Whatever its files are called, and however long they are."""
    first, same, other = (
        huggingface.identity(huggingface.Config(path=name, revision=revision))
        for name, revision in (("org/rows", "a"), ("org/same", "a"), ("org/rows", "b"))
    )
    assert first == same != other and first[:3] == other[:3]
    json.dumps(first)
