"""Reading sources in tests."""

from __future__ import annotations

from typing import Any

from data_pipelines.sources import Bad, Row


def read_all(source: Any, config: Any) -> list[Any]:
    """Everything that all partitions of a source give."""
    return [row for part in source.partitions(config) for row in source.read(config, part)]


def rows_of(source: Any, config: Any) -> list[Row]:
    """The rows of a source that has no bad ones; they have what the schema says."""
    found = read_all(source, config)
    assert not [row for row in found if isinstance(row, Bad)]
    names = {column.name for column in source.schema(config)}
    assert all(set(row.values) == names for row in found)
    assert len({row.key for row in found}) == len(found)
    return found


def bads_of(source: Any, config: Any) -> list[Bad]:
    """The bad rows."""
    return [row for row in read_all(source, config) if isinstance(row, Bad)]
