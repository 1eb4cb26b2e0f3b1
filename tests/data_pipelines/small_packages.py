"""Archives as package clients give them, made by hand; and what the rows that are read from them must hold to."""

from __future__ import annotations

import hashlib
import io
import tarfile
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from data_pipelines import sources
from data_pipelines.packages import Package, cache_folder


def archive(file: str, members: Mapping[str, bytes]) -> bytes:
    """An archive of the kind that the file's name says."""
    if file.endswith(".whl"):
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w") as wheel:
            for name, content in members.items():
                wheel.writestr(name, content)
        return out.getvalue()
    if file.endswith(".deb"):
        data = _tar("w:xz", {f"./{name}": content for name, content in members.items()})
        parts = {"debian-binary": b"2.0\n", "control.tar.xz": b"odd", "data.tar.xz": data}
        return b"!<arch>\n" + b"".join(_ar_member(name, content) for name, content in parts.items())
    return _tar("w:gz", members)


def put(monkeypatch: pytest.MonkeyPatch, source: ModuleType, members: Mapping[str, bytes]) -> Package:
    """Let the source's package be an archive of these files, in the cache already."""
    content = archive(source.PACKAGE.file, members)
    package = replace(source.PACKAGE, sha256=hashlib.sha256(content).hexdigest())
    monkeypatch.setattr(source, "PACKAGE", package)
    folder: Path = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / package.file).write_bytes(content)
    return package


def rows(source: ModuleType, **settings: Any) -> list[sources.Row]:
    """All rows, held against the source's schema and the promises that every source makes."""
    config = source.Config(**settings)
    found = [row for part in source.partitions(config) for row in source.read(config, part)]
    assert found and all(isinstance(row, sources.Row) for row in found), found
    assert len({row.key for row in found}) == len(found)
    columns = {column.name: column for column in source.schema(config)}
    for row in found:
        assert row.values.keys() == columns.keys()
        for name, value in row.values.items():
            check_value(columns[name], value)
    identity = source.identity(config)
    assert identity == source.identity(config)
    assert all(isinstance(value, str) for value in identity)
    return found


def check_value(column: sources.Column, value: Any) -> None:
    if column.dtype == "utf8":
        assert isinstance(value, str) and value
    elif column.shape == ():
        assert np.asarray(value).astype(column.dtype) == pytest.approx(value)
    else:
        assert isinstance(value, np.ndarray) and value.dtype == column.dtype, (column, value)
        assert len(value.shape) == len(column.shape)
        assert all(size in (None, actual) for size, actual in zip(column.shape, value.shape, strict=True))


def _tar(mode: str, members: Mapping[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as tar:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return out.getvalue()


def _ar_member(name: str, content: bytes) -> bytes:
    header = f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(content):<10}`\n".encode("ascii")
    assert len(header) == 60
    return header + content + b"\n" * (len(content) % 2)
