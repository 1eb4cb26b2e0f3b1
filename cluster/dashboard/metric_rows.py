"""Rows of a run's metrics, found in its record without reading all of it."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

from data_pipelines.storage import Store
from trainer.record_rows import decode_value

Row = dict[str, Any]

_TAIL_BYTES, _TAIL_ROWS = 64 << 10, 65
_ROW_BYTES = 16 << 10  # read where a row is looked for


def newest(run: Store) -> list[Row]:
    """The last rows of training steps, oldest first: {attempt, step, time, values}; [] before the first.

    At most 65, from the end of the newest file that has one, so that it costs the same for a run of any length.
    """
    for name in reversed(run.list("metrics")):
        with run.open_input(f"metrics/{name}") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - _TAIL_BYTES))
            data = file.read()
        lines = data[: data.rfind(b"\n") + 1].splitlines()[-_TAIL_ROWS:]
        rows = [row for line in lines if (row := _training_row(line)) is not None]
        if rows:
            return rows
    return []


def spread(run: Store, most: int) -> list[Row]:
    """Rows of training steps at even distances in the files of the record, about `most`, oldest first."""
    names = run.list("metrics")
    sizes = [run.size(f"metrics/{name}") for name in names]
    every = max(sum(sizes) / most, 1.0)
    found: list[Row] = []
    place, start = 0.0, 0  # of all files together
    for name, size in zip(names, sizes, strict=True):
        with run.open_input(f"metrics/{name}") as file:
            while place < start + size:
                file.seek(max(int(place) - start - 1, 0))
                lines = file.read(_ROW_BYTES).split(b"\n")
                whole = lines[:-1] if place == start else lines[1:-1]  # it may have begun before
                row = next((row for line in whole if (row := _training_row(line)) is not None), None)
                if row is not None and (not found or row != found[-1]):
                    found.append(row)
                place += every
        start += size
    return found


@lru_cache(256)  # a run that is followed had most of its newest rows in the look before
def _training_row(line: bytes) -> Row | None:
    try:
        row = json.loads(line)
        values = {key: decode_value(value) for key, value in row["values"].items()}
        if "loss" in values:
            return {
                "attempt": int(row["attempt"]),
                "step": int(row["step"]),
                "time": float(row["time"]),
                "values": values,
            }
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    return None
