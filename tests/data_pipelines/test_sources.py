from __future__ import annotations

import json
import os
import sysconfig
from pathlib import Path

import pytest

from configs.errors import NotFound, ShardyardError, UsageError
from configs.plugins import find_plugin, plugin_names
from data_pipelines.sources import Document, SourceConfig, jsonl, python_stdlib, text


@pytest.mark.parametrize("name", plugin_names("data_pipelines.sources"))
def test_every_source_has_what_a_source_has(name: str) -> None:
    module = find_plugin("data_pipelines.sources", name)
    assert issubclass(module.Config, SourceConfig)
    assert callable(module.documents) and callable(module.identity)
    assert all(field.description for field in module.Config.model_fields.values())


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
    found = list(python_stdlib.documents(python_stdlib.Config()))
    assert [document.key for document in found] == ["a/z.py", "a.py", "b.py"]
    assert found[0].text == "naïve = 1\n"
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
    keys = [document.key for document in python_stdlib.documents(python_stdlib.Config())]
    assert keys == ["a/z.py", "a.py"]


def test_a_python_without_sources_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sysconfig, "get_path", {"stdlib": str(tmp_path / "python.zip")}.__getitem__)
    with pytest.raises(UsageError, match=r"no \.py files in .*python.zip"):
        list(python_stdlib.documents(python_stdlib.Config()))


def test_this_machines_stdlib_groups_its_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    encodings = Path(sysconfig.get_path("stdlib")) / "encodings"
    monkeypatch.setattr(sysconfig, "get_path", {"stdlib": str(encodings)}.__getitem__)
    found = {document.key: document.group for document in python_stdlib.documents(python_stdlib.Config())}
    assert found["cp1250.py"] == found["cp1251.py"] != found["aliases.py"]
    assert not any("site-packages" in key for key in found)


# --- text


def test_text_takes_files_and_folders_once_each_in_order(tmp_path: Path) -> None:
    for name in ("d/b.txt", "d/a.md", "d/sub/c.txt", "d/.hidden.txt", "d/.git/x.txt", "d/skip.bin", "alone.log"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(f"{name}\r\n".encode())
    config = text.Config(paths=(f"{tmp_path}/alone.log", f"{tmp_path}/d", f"{tmp_path}/d/b.txt"))
    found = list(text.documents(config))
    assert [document.key for document in found] == ["0/alone.log", "1/a.md", "1/b.txt", "1/sub/c.txt"]
    assert found[0].text == "alone.log\r\n"
    every = text.Config(paths=(f"{tmp_path}/d",), suffixes=("",))
    assert [document.key for document in text.documents(every)] == ["a.md", "b.txt", "skip.bin", "sub/c.txt"]


def test_text_separator_cuts_a_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one<END>two<END>")
    config = text.Config(paths=(str(tmp_path / "a.txt"),), separator="<END>")
    assert [(d.key, d.text) for d in text.documents(config)] == [
        ("a.txt:0", "one"),
        ("a.txt:1", "two"),
        ("a.txt:2", ""),
    ]


def test_text_identity_changes_with_an_edit_of_the_same_length(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("one")
    config = text.Config(paths=(str(file),))
    before = text.identity(config)
    file.write_text("two")
    os.utime(file, ns=(0, 0))
    assert text.identity(config) != before


def test_text_that_is_not_utf8_is_named_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "bad.txt").write_bytes(b"fine\nfine\ncaf\xe9\n")
    with pytest.raises(UsageError, match=r"bad\.txt:3: byte 13 \(0xe9\) is not UTF-8.*iconv"):
        list(text.documents(text.Config(paths=(str(tmp_path),))))


def test_text_that_is_not_there_or_has_no_files(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"no file or folder .*/nowhere\. Check data\.paths"):
        list(text.documents(text.Config(paths=(str(tmp_path / "nowhere"),))))
    with pytest.raises(UsageError, match=r"no \.txt, \.md files"):
        list(text.documents(text.Config(paths=(str(tmp_path),))))


def test_text_that_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("secret")

    def refuse(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(ShardyardError, match=r"Cannot read .*a\.txt: permission denied\. Give this user access"):
        list(text.documents(text.Config(paths=(str(tmp_path),))))


# --- jsonl


def read_jsonl(tmp_path: Path, content: bytes, **settings: object) -> list[Document]:
    (tmp_path / "rows.jsonl").write_bytes(content)
    return list(jsonl.documents(jsonl.Config.model_validate({"paths": [str(tmp_path)], **settings})))


def test_jsonl_rows(tmp_path: Path) -> None:
    found = read_jsonl(tmp_path, '{"text": "é\\n"}\n\n{"text": "", "n": 1}\r\n{"text": "é\\n"}'.encode())
    assert [(d.key, d.text) for d in found] == [("rows.jsonl:1", "é\n"), ("rows.jsonl:3", ""), ("rows.jsonl:4", "é\n")]
    assert found[0].group == found[2].group != found[1].group
    assert read_jsonl(tmp_path, b'{"body": "x"}', text_field="body")[0].text == "x"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (b'{"text": "x"', "not a JSON value"),
        (b"[" * 100_000, "not a JSON value"),
        (b'"text"', "a JSON str, not an object"),
        (b'{"body": "x"}', r"no field 'text' \(its fields: body\)"),
        (b'{"text": 3}', "field 'text' is int, not text"),
        (b'{"text": "\xe9"}', "byte 10 of the line is not UTF-8"),
        (b'{"text": "\\ud800"}', "surrogate"),
    ],
)
def test_a_bad_row_is_named_with_file_and_line(tmp_path: Path, row: bytes, message: str) -> None:
    with pytest.raises(UsageError, match=rf"rows\.jsonl:2: .*{message}.*"):
        read_jsonl(tmp_path, b'{"text": "fine"}\n' + row + b"\n")


def test_jsonl_that_is_a_folder_of_none(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no \.jsonl files"):
        list(jsonl.documents(jsonl.Config(paths=(str(tmp_path),))))
