"""A source for tests, used as a user's own: each file of a folder is a partition, each line of it a row.

A line is JSON: {"text": ..., "split": ..., "group": ...}, the last two where wanted; any other line is bad.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from configs.schema import Plugin
from data_pipelines.columns import Column
from data_pipelines.sources import Bad, Partition, Row, SourceConfig

NEAR_DUPLICATES_SHARE_A_SPLIT = False


class Config(SourceConfig):
    folder: str
    row_s: float = 0.0  # how long each row takes


def schema(config: Config) -> tuple[Column, ...]:
    return (Column("text", "utf8"),)


def partitions(config: Config) -> list[Partition]:
    return [Partition(path.name, (str(path),)) for path in _files(config)]


def read(config: Config, partition: Partition) -> Iterator[Row | Bad]:
    for number, line in enumerate(Path(partition.files[0]).read_text("utf-8").splitlines(), start=1):
        if config.row_s:
            time.sleep(config.row_s)
        try:
            row = json.loads(line)
            yield Row(f"{partition.name}:{number}", {"text": row["text"]}, row.get("split"), row.get("group"))
        except (ValueError, KeyError) as error:
            yield Bad(partition.files[0], number, f"no row ({type(error).__name__})", line)


def identity(config: Config) -> list[Any]:
    return [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in _files(config)]


def _files(config: Config) -> list[Path]:
    return sorted(Path(config.folder).glob("*.jsonl"))


def write_lines(folder: Path, files: list[list[Any]], **settings: Any) -> Plugin:
    """Files of rows: a text, a mapping, or bytes for a line that is bad. The data section that names them."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, rows in enumerate(files):
        lines = [row if isinstance(row, bytes) else json.dumps(_row(row)).encode() for row in rows]
        (folder / f"{number:03d}.jsonl").write_bytes(b"".join(line + b"\n" for line in lines))
    return Plugin(**{"name": __name__, "folder": str(folder), "validation_fraction": 0.2, **settings})


def _row(row: Any) -> Any:
    return {"text": row} if isinstance(row, str) else row
