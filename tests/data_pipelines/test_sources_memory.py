"""Memory does not grow with a source's files: each kind is read in a process of its own, which says what it took."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

_READER = """
import importlib, json, sys

def anonymous_kb():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon"))

source = importlib.import_module("data_pipelines.sources." + sys.argv[1])
found = []
for settings in json.loads(sys.argv[2]):
    config = source.Config.model_validate(settings)
    rows = (row for part in source.partitions(config) for row in source.read(config, part))
    found.append([(number, anonymous_kb()) for number, row in enumerate(rows) if number % 500 == 0])
print(json.dumps(found))
"""
_TEXT_BYTES = 1000


def _texts(rows: int) -> list[str]:
    generator = np.random.default_rng(0)
    return [generator.bytes(_TEXT_BYTES // 2).hex() for _ in range(rows)]


def _parquet(path: Path, rows: int) -> None:
    """One row group, as writers make it by default of up to a million rows."""
    pq.write_table(pa.table({"text": _texts(rows)}), path, row_group_size=rows, use_dictionary=False)


def _jsonl(path: Path, rows: int) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in _texts(rows)))


def _csv(path: Path, rows: int) -> None:
    path.write_text("text\n" + "".join(f"{text}\n" for text in _texts(rows)))


def _stream(path: Path, rows: int) -> None:
    """Compressed: of a file that is not, the pages are only mapped."""
    options = pa.ipc.IpcWriteOptions(compression="lz4")
    table = pa.table({"text": _texts(rows)})
    with pa.ipc.new_file(path, table.schema, options=options) as writer:
        writer.write_table(table, max_chunksize=1000)


def _tar(path: Path, rows: int) -> None:
    """Of ten times as many files, which are small."""
    with tarfile.open(path, "w") as tar:
        for number, text in enumerate(_texts(rows)):
            for part in range(10):
                info = tarfile.TarInfo(f"{number}-{part}.txt")
                info.size = 100
                tar.addfile(info, io.BytesIO(text[100 * part : 100 * part + 100].encode()))


KINDS: dict[str, tuple[Callable[[Path, int], None], str, dict[str, Any]]] = {
    "parquet": (_parquet, "parquet", {}),
    "jsonl": (_jsonl, "jsonl", {}),
    "csv": (_csv, "csv", {"text_columns": {"text": "text"}}),
    "arrow": (_stream, "arrow", {}),
    "webdataset": (_tar, "tar", {"fields": {"text": "txt"}}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_memory_does_not_grow_with_a_file(tmp_path: Path, kind: str) -> None:
    write, suffix, settings = KINDS[kind]
    sizes, configs = [], []
    for rows in (5_000, 60_000) if kind != "webdataset" else (500, 5_000):
        file = tmp_path / f"{rows}.{suffix}"
        write(file, rows)
        sizes.append(file.stat().st_size)
        configs.append({"paths": [str(file)], **settings})
    command = [sys.executable, "-c", _READER, kind, json.dumps(configs)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    small, large = json.loads(done.stdout)
    assert len(large) >= 10 * len(small)
    growth = 1024 * (max(kb for _, kb in large) - max(kb for _, kb in small))
    assert growth < (sizes[1] - sizes[0]) / 3, f"{growth >> 20} MB more for {sizes[1] - sizes[0] >> 20} MB more"
