from __future__ import annotations

import gzip
import itertools
import json
import os
import pickle
import sysconfig
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.errors import Damaged, NotFound, ShardyardError, UsageError
from configs.load import validate_plugin
from configs.plugins import find_plugin, plugin_names
from configs.schema import Plugin
from data_pipelines import records
from data_pipelines.records import Records
from data_pipelines.sources import (
    READING_SETTINGS,
    Bad,
    InputFile,
    Row,
    SourceConfig,
    file_identity,
    find_files,
    jsonl,
    partition_files,
    python_stdlib,
    text,
)
from tests.data_pipelines.reading import bads_of, read_all, rows_of

SOURCES = plugin_names("data_pipelines.sources")


@pytest.mark.parametrize("name", SOURCES)
def test_every_source_has_what_a_source_has(name: str) -> None:
    module = find_plugin("data_pipelines.sources", name)
    assert issubclass(module.Config, SourceConfig)
    assert isinstance(module.NEAR_DUPLICATES_SHARE_A_SPLIT, bool)
    assert all(callable(getattr(module, part)) for part in ("schema", "partitions", "read", "identity"))
    assert all(field.description for field in module.Config.model_fields.values())


def test_settings_of_reading_are_settings() -> None:
    assert set(SourceConfig.model_fields) >= READING_SETTINGS


def test_wrong_settings_are_named_with_the_right_ones() -> None:
    plugin = Plugin.model_validate(
        {"name": "jsonl", "paths": "a", "text_feild": "x", "filters": {"symbol_ratio": {"maxi": 1}, "min_bytes": -1}}
    )
    _, problems = validate_plugin(jsonl.Config, plugin, "data", {})
    found = {problem.key: problem.message for problem in problems}
    assert "did you mean 'text_field'" in found["data.text_feild"]
    assert "did you mean 'max'" in found["data.filters.symbol_ratio.maxi"]
    assert "at least 0" in found["data.filters.min_bytes"]
    assert "a list is needed" in found["data.paths"]


# --- partitions


def test_small_files_lie_together_and_large_ones_are_cut() -> None:
    sizes = [10, 20, 30, 500, 40, 90, 5]
    files = [InputFile(f"{n}.txt", f"/x/{n}.txt", size, 0) for n, size in enumerate(sizes)]
    found = partition_files(files, cut=True, target_bytes=100)
    ranges = [(part.start, part.stop) for part in found if part.start is not None]
    assert ranges == [(0, 100), (100, 200), (200, 300), (300, 400), (400, 500)]
    whole = [part.keys for part in found if part.start is None]
    assert whole == [("0.txt", "1.txt", "2.txt"), ("4.txt",), ("5.txt", "6.txt")]
    assert len({part.name for part in found}) == len(found)
    assert pickle.loads(pickle.dumps(found)) == found  # noqa: S301 - our own bytes
    uncut = partition_files([InputFile("a.gz", "/a.gz", 500, 0), *files], cut=True, target_bytes=100)
    assert uncut[0].start is None and uncut[0].files == ("/a.gz",)
    assert [len(part.files) for part in partition_files(files, cut=False, target_bytes=10**6, max_files=3)] == [3, 3, 1]


@pytest.mark.parametrize(
    ("sizes", "partitions"),
    [
        ([3 << 20], 1),
        ([6 << 20], 1),
        ([7 << 20], 2),
        ([63 << 20], 16),
        ([1 << 20] * 63, 16),
        ([1 << 30], 32),
        ([3 << 30, 1 << 30], 64),
    ],
)
def test_an_input_of_any_size_is_work_for_many(sizes: list[int], partitions: int) -> None:
    files = [InputFile(f"{n}.txt", f"/x/{n}.txt", size, 0) for n, size in enumerate(sizes)]
    found = partition_files(files, cut=True)
    assert len(found) == partitions
    covered = [(part.stop or 0) - (part.start or 0) for part in found if part.start is not None]
    assert max(covered, default=0) <= 64 << 20 and sum(covered) in (0, sum(sizes))
    compressed = [InputFile(f"{n}.gz", f"/x/{n}.gz", size, 0) for n, size in enumerate(sizes)]
    assert [part.start for part in partition_files(compressed, cut=True)] == [None] * min(len(sizes), partitions)


@settings(max_examples=150, deadline=None)
@given(
    pieces=st.lists(st.text("ab|", max_size=12), max_size=30),
    delimiter=st.sampled_from(["\n", "||", "|||", "ab"]),
    cuts=st.lists(st.integers(0, 400), max_size=6),
    chunk=st.integers(1, 40),
)
def test_ranges_give_each_byte_of_a_file_once(
    tmp_path_factory: pytest.TempPathFactory, pieces: list[str], delimiter: str, cuts: list[int], chunk: int
) -> None:
    file = tmp_path_factory.mktemp("ranges") / "a.txt"
    raw = delimiter.join(pieces).encode()
    file.write_bytes(raw)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records, "_CHUNK_BYTES", chunk)
        edges = [0, *sorted(cut for cut in cuts if cut <= len(raw)), len(raw)]
        ranges = itertools.pairwise(edges)
        found = [record for edge in ranges for record in Records(str(file), "a", *edge, delimiter.encode())]
        whole = list(Records(str(file), "a", delimiter=delimiter.encode()))
    wanted = raw.split(delimiter.encode())
    wanted = wanted[:-1] if wanted[-1] == b"" else wanted
    assert [record.raw for record in whole] == wanted
    assert all(raw[record.offset :].startswith(record.raw) for record in (*whole, *found))
    # Delimiters that overlap themselves may be found one place further, but every other byte is there once.
    assert [record.offset for record in found] == sorted({record.offset for record in found})
    if delimiter in ("\n", "ab"):
        assert [record.raw for record in found] == wanted
    covered = sum(len(record.raw) for record in found)
    assert len(raw) - covered <= len(found) * len(delimiter)


def test_a_record_that_is_too_long_is_let_go_in_little_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "MAX_RECORD_BYTES", 1000)
    monkeypatch.setattr(records, "_CHUNK_BYTES", 100)
    file = tmp_path / "a.txt"
    file.write_bytes(b"one\n" + b"x" * 5000 + b"\ntwo\n" + b"y" * 5000)
    found = list(Records(str(file), "a"))
    assert [(r.offset, r.number, r.is_whole) for r in found] == [
        (0, 0, True),
        (4, 1, False),
        (5005, 2, True),
        (5009, 3, False),
    ]
    assert all(len(record.raw) <= 256 for record in found) and found[2].raw == b"two"


# --- python_stdlib


def fake_stdlib(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        "b.py": b"import os\n",
        "a/z.py": "naïve = 1\n".encode(),
        "a.py": b"first = 2\n",
        "latin.py": b"# caf\xe9\n",
        "empty.py": b"",
        "data.txt": b"not python",
        "site-packages/x.py": b"x = 1",
        "a/__pycache__/y.py": b"y = 1",
        "test/test_a.py": b"test = 1\n",
    }
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    monkeypatch.setattr(sysconfig, "get_path", {"stdlib": str(root)}.__getitem__)


def test_stdlib_is_its_readable_source_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_stdlib(tmp_path, monkeypatch)
    found = rows_of(python_stdlib, python_stdlib.Config())
    assert [row.key for row in found] == ["a/z.py", "a.py", "b.py"]
    assert found[0].values == {"text": "naïve = 1\n"}
    before = python_stdlib.identity(python_stdlib.Config())
    json.dumps(before)
    (tmp_path / "b.py").write_bytes(b"import sys, os\n")
    assert python_stdlib.identity(python_stdlib.Config()) != before


def test_stdlib_leaves_out_what_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_stdlib(tmp_path, monkeypatch)
    read = Path.read_bytes

    def refuse(path: Path) -> bytes:
        if path.name == "b.py":
            raise PermissionError(13, "Permission denied")
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", refuse)
    assert [row.key for row in rows_of(python_stdlib, python_stdlib.Config())] == ["a/z.py", "a.py"]


def test_a_python_without_sources_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sysconfig, "get_path", {"stdlib": str(tmp_path / "python.zip")}.__getitem__)
    with pytest.raises(UsageError, match=r"no \.py files in .*python.zip"):
        python_stdlib.partitions(python_stdlib.Config())


# --- files and text


def test_text_takes_files_and_folders_once_each_in_order(tmp_path: Path) -> None:
    for name in ("d/b.txt", "d/a.MD", "d/sub/c.txt", "d/.hidden.txt", "d/.git/x.txt", "d/skip.bin", "alone.log"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(f"{name}\r\n".encode())
    config = text.Config(paths=(f"{tmp_path}/alone.log", f"file://{tmp_path}/d", f"{tmp_path}/d/b.txt"))
    found = rows_of(text, config)
    assert [row.key for row in found] == ["0/alone.log", "1/a.MD", "1/b.txt", "1/sub/c.txt"]
    assert found[0].values["text"] == "alone.log\r\n"
    every = text.Config(paths=(f"{tmp_path}/d",), suffixes=("",))
    assert [row.key for row in rows_of(text, every)] == ["a.MD", "b.txt", "skip.bin", "sub/c.txt"]


def test_text_separator_cuts_a_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one<END>two<END><END>three")
    config = text.Config(paths=(str(tmp_path / "a.txt"),), separator="<END>")
    assert [(row.key, row.values["text"]) for row in rows_of(text, config)] == [
        ("a.txt:1", "one"),
        ("a.txt:2", "two"),
        ("a.txt:3", ""),
        ("a.txt:4", "three"),
    ]


def test_identity_changes_with_an_edit_of_the_same_length(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("one")
    config = text.Config(paths=(str(file),))
    before = text.identity(config)
    assert before[:2] == [1, 3]
    file.write_text("two")
    os.utime(file, ns=(0, 0))
    assert text.identity(config) != before
    assert file_identity(find_files([str(tmp_path)], (".txt",))) == text.identity(config)  # wherever it is found


def test_text_that_is_not_utf8_is_bad_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "bad.txt").write_bytes(b"fine\nfine\ncaf\xe9\n")
    (tmp_path / "good.txt").write_bytes(b"fine")
    found = read_all(text, text.Config(paths=(str(tmp_path),)))
    assert isinstance(found[0], Bad) and isinstance(found[1], Row)
    assert (found[0].line, found[0].file) == (3, str(tmp_path / "bad.txt"))
    assert "byte 13 (0xe9) is not UTF-8" in found[0].reason and found[0].excerpt.startswith("caf")
    parts = read_all(text, text.Config(paths=(str(tmp_path),), separator="fine\n"))
    assert [type(row) for row in parts] == [Row, Row, Bad, Row]


def test_text_longer_than_memory_is_bad(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "MAX_RECORD_BYTES", 1 << 20)
    (tmp_path / "long.txt").write_bytes(b"x" * (2 << 20))
    (bad,) = bads_of(text, text.Config(paths=(str(tmp_path),)))
    assert "longer than 1 MB; set data.separator" in bad.reason


def test_text_that_is_not_there_or_has_no_files(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"no file or folder .*/nowhere\. Check data\.paths"):
        text.partitions(text.Config(paths=(str(tmp_path / "nowhere"),)))
    with pytest.raises(UsageError, match=r"no \.txt, \.txt\.gz, .*files"):
        text.partitions(text.Config(paths=(str(tmp_path),)))


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("x")
    config = text.Config(paths=(str(tmp_path),))
    (part,) = text.partitions(config)
    file.unlink()
    with pytest.raises(NotFound, match=r"Cannot read .*a\.txt: there is no such file"):
        list(text.read(config, part))
    file.mkdir()
    with pytest.raises(ShardyardError, match=r"Cannot read .*a\.txt: it is a folder"):
        list(text.read(config, part))


# --- jsonl


def jsonl_config(tmp_path: Path, content: bytes, **settings: object) -> jsonl.Config:
    (tmp_path / "rows.jsonl").write_bytes(content)
    return jsonl.Config.model_validate({"paths": [str(tmp_path)], **settings})


def test_jsonl_rows(tmp_path: Path) -> None:
    content = '\ufeff{"text": "é\\n"}\n\n{"text": "", "n": 1}\r\n{"text": "é\\n"}'.encode()
    found = rows_of(jsonl, jsonl_config(tmp_path, content))
    assert [(row.key, row.values["text"]) for row in found] == [
        ("rows.jsonl:1", "é\n"),
        ("rows.jsonl:3", ""),
        ("rows.jsonl:4", "é\n"),
    ]
    assert rows_of(jsonl, jsonl_config(tmp_path, b'{"body": "x"}', text_field="body"))[0].values == {"text": "x"}


def test_jsonl_further_fields(tmp_path: Path) -> None:
    fields = {"source": "text", "label": "int64", "score": "float32", "ids": "list of int64"}
    line = b'{"source": "a", "label": 3, "score": 1, "ids": [1, 2], "text": "left out"}'
    config = jsonl_config(tmp_path, line, text_field=None, fields=fields)
    (row,) = rows_of(jsonl, config)
    assert [column.name for column in jsonl.schema(config)] == list(fields)
    assert row.values["ids"].tolist() == [1, 2] and row.values["label"] == 3 and row.values["score"] == 1.0
    for wrong in (b'"label": 1.5', b'"label": null', b'"score": 1e300', b'"score": NaN', b'"ids": [[1]]', b'"ids": 1'):
        name = wrong.partition(b":")[0]
        bad = b"{" + wrong + b", " + b", ".join(p for p in line[1:-1].split(b", ") if not p.startswith(name)) + b"}"
        bad = bad.replace(b", 2]", b"") if name == b'"ids"' else bad
        assert len(bads_of(jsonl, jsonl_config(tmp_path, bad, text_field=None, fields=fields))) == 1, bad


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "x"', "not a JSON value"),
        (b"[" * 100_000, "not a JSON value"),
        (b'{"text": ' + b"9" * 5000 + b"}", "not a JSON value"),
        (b'"text"', "a JSON str, not an object"),
        (b'{"body": "x"}', "no field 'text' (its fields: body); data.text_field names the one"),
        (b'{"text": 3}', "field 'text' is int, not text"),
        (b'{"text": null}', "field 'text' is null"),
        (b'{"text": "\xe9"}', "byte 10 of the line is not UTF-8"),
        (b'{"text": "\\ud800"}', "surrogate"),
    ],
)
def test_a_bad_line_is_named_and_the_others_are_read(tmp_path: Path, line: bytes, message: str) -> None:
    found = read_all(jsonl, jsonl_config(tmp_path, b'{"text": "a"}\n' + line + b'\n{"text": "b"}\n'))
    assert [type(row) for row in found] == [Row, Bad, Row]
    assert (found[1].line, found[1].file) == (2, str(tmp_path / "rows.jsonl"))
    assert message in found[1].reason and len(found[1].excerpt) <= 200


@settings(max_examples=60, deadline=None)
@given(st.lists(st.one_of(st.binary(max_size=40), st.just(b'{"text": "ok"}')), max_size=20))
def test_whatever_the_lines_hold_no_exception_comes_out(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes]
) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    found = read_all(jsonl, jsonl_config(folder, b"\n".join(lines)))
    whole = b"\n".join(lines).split(b"\n")
    assert len(found) == sum(1 for line in whole if line.strip())


def test_large_files_are_read_in_ranges_with_the_right_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [json.dumps({"text": f"{n} " + "é" * (n % 50)}) for n in range(2000)]
    lines[1500] = "{"
    config = jsonl_config(tmp_path, "\n".join(lines).encode())
    alone = read_all(jsonl, config)
    monkeypatch.setattr(partition_files, "__kwdefaults__", {**partition_files.__kwdefaults__, "target_bytes": 5000})
    parts = jsonl.partitions(config)
    assert len(parts) > 10
    found = [row for part in parts for row in jsonl.read(config, part)]
    assert [row.values for row in found if isinstance(row, Row)] == [
        row.values for row in alone if isinstance(row, Row)
    ]
    assert [row for row in found if isinstance(row, Bad)] == [row for row in alone if isinstance(row, Bad)]
    assert len({row.key for row in found if isinstance(row, Row)}) == 1999


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_compressed_files_are_read_and_what_is_cut_off_is_refused(tmp_path: Path, ending: str) -> None:
    lines = [json.dumps({"text": f"{n} " + os.urandom(200).hex()}).encode() for n in range(3000)]
    halves = b"\n".join(lines[:1000]) + b"\n", b"\n".join(lines[1000:])
    compress = gzip.compress if ending == ".gz" else zstandard.ZstdCompressor(write_checksum=True).compress
    file = tmp_path / f"rows.jsonl{ending}"
    file.write_bytes(b"".join(map(compress, halves)))  # as parallel compressors write them
    config = jsonl.Config(paths=(str(tmp_path),))
    found = rows_of(jsonl, config)
    assert [row.values["text"] for row in found] == [json.loads(line)["text"] for line in lines]
    assert found[-1].key == f"rows.jsonl{ending}:3000"
    whole = file.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"not compressed at all", whole[:1000] + b"\0" * 99 + whole[1099:]):
        file.write_bytes(damaged)
        with pytest.raises(Damaged, match=rf"rows\.jsonl\{ending} cannot be decompressed .* Copy it again"):
            rows_of(jsonl, config)


def test_jsonl_that_is_a_folder_of_none(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no \.jsonl, .*files"):
        jsonl.partitions(jsonl.Config(paths=(str(tmp_path),)))
