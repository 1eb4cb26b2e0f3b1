"""CSV and TSV files (UTF-8, also .gz and .zst): numbers as features, a label, texts.

Features become one column `features`, float32; the label becomes `label`, a class (int64) or a number (float32); texts
become columns of their own. What is not told about the columns is found in the first rows of the first file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import Any, Literal

import numpy as np
from pydantic import Field

from configs.errors import UsageError
from data_pipelines.csv_rows import check_columns, read_table
from data_pipelines.input_files import without_query
from data_pipelines.records import records_of
from data_pipelines.row_values import number_in, value_of
from data_pipelines.sources import (
    Bad,
    Column,
    Partition,
    Row,
    SourceConfig,
    file_identity,
    find_files,
    partition_files,
)

NEAR_DUPLICATES_SHARE_A_SPLIT = False
SUFFIXES = tuple(kind + ending for kind in (".csv", ".tsv") for ending in ("", ".gz", ".zst"))
_LOOK_ROWS = 1000  # from which kinds of columns are inferred
_MAX_CLASSES = 100_000


class Config(SourceConfig):
    """Which files, how they are written, and what their columns are."""

    paths: tuple[str, ...] = Field(
        min_length=1, description="Files, and folders that are searched for *.csv and *.tsv.", examples=[["table.csv"]]
    )
    delimiter: str | None = Field(
        default=None, min_length=1, max_length=1, description="Between values; null is a tab in *.tsv, else a comma."
    )
    column_names: tuple[str, ...] | None = Field(
        default=None, min_length=1, description="Of files that have no header line; null takes the first line."
    )
    newlines_in_values: bool = Field(
        default=False, description="Whether quoted values may hold line breaks; large files are then not read in parts."
    )
    feature_columns: tuple[str, ...] | None = Field(
        default=None, description="Stored as numbers; null is all other columns that hold numbers only, [] none."
    )
    label_column: str | None = Field(default=None, min_length=1, description="What is to be predicted.")
    label_type: Literal["class", "number"] | None = Field(
        default=None, description="null infers it: whole numbers and texts are classes."
    )
    classes: tuple[str, ...] | None = Field(
        default=None,
        min_length=1,
        description="Names of the classes in the order of their numbers; null takes whole numbers as they are, and of "
        "texts all that there are, sorted, for which all files are read.",
    )
    text_columns: Mapping[str, str] = Field(
        default={}, description="Columns of text: the name under which each is stored, and the file's."
    )
    missing_value: float | None = Field(
        default=None, description="Stored for a feature that is empty or NA; null takes no row with one."
    )


@dataclass(frozen=True)
class Layout:
    """What is taken of a row. label: (column, its dtype, number of each class name or None for numbers as they are)."""

    features: tuple[str, ...]
    texts: Mapping[str, str]
    label: tuple[str, str, Mapping[str, int] | None] | None

    @property
    def names(self) -> list[str]:
        """The file's columns that are needed."""
        return [*self.features, *self.texts.values(), *([self.label[0]] if self.label else [])]


def schema(config: Config) -> tuple[Column, ...]:
    """features, label, and the texts: those that there are."""
    layout = _layout_of(config)
    columns = [Column(stored, "utf8") for stored in layout.texts]
    if layout.features:
        columns.append(Column("features", "float32", (len(layout.features),)))
    if layout.label:
        columns.append(Column("label", layout.label[1]))
    return tuple(columns)


def partitions(config: Config) -> list[Partition]:
    """Small files together; large ones in byte ranges, where a line is a row."""
    return partition_files(find_files(config.paths, SUFFIXES), cut=not config.newlines_in_values)


def read(config: Config, partition: Partition) -> Iterator[Row | Bad]:
    """The rows; a Bad for one with too few or too many values, or with one that is not of its column's kind.

    Raises UsageError for a file that lacks a column.
    """
    layout = _layout_of(config)
    for records in records_of(partition):
        table = read_table(records, config.delimiter, config.column_names, config.newlines_in_values)
        check_columns(table, layout.names, without_query(records.path))
        for row in table.rows:
            if isinstance(row, Bad):
                yield row
                continue
            try:
                yield Row(row.key, _values(row.values, layout, config.missing_value))
            except ValueError as error:
                yield row.bad(str(error))


def identity(config: Config) -> list[int | str]:
    """Number, sizes and times of change of the files."""
    return file_identity(find_files(config.paths, SUFFIXES))


def _values(row: Mapping[str, str], layout: Layout, missing_value: float | None) -> dict[str, Any]:
    values: dict[str, Any] = {stored: value_of(row[name], _TEXT) for stored, name in layout.texts.items()}
    if layout.features:
        features = np.empty(len(layout.features), np.float32)
        for place, name in enumerate(layout.features):
            features[place] = _feature(row[name], name, missing_value)
        values["features"] = features
    if layout.label:
        name, dtype, classes = layout.label
        try:
            if classes is None:
                values["label"] = number_in(row[name].strip(), dtype)
            elif row[name].strip() in classes:
                values["label"] = classes[row[name].strip()]
            else:
                raise ValueError(f"is '{row[name][:40]}', which is not one of data.classes")
        except ValueError as error:
            raise ValueError(f"column '{name}' {error}") from None
    return values


_TEXT = Column("text", "utf8")
_MISSING = {"", "na", "n/a", "nan", "null", "none", "?"}


def _feature(text: str, name: str, missing_value: float | None) -> float:
    stripped = text.strip()
    if missing_value is not None and stripped.lower() in _MISSING:
        return missing_value
    try:
        return number_in(stripped, "float32")
    except ValueError as error:
        hint = " (data.missing_value says what is stored instead)" if stripped.lower() in _MISSING else ""
        raise ValueError(f"column '{name}' {error}{hint}") from None


# --- inference


def _layout_of(config: Config) -> Layout:
    files = find_files(config.paths, SUFFIXES)
    return _layout(config.model_dump_json(), " ".join(map(str, file_identity(files))))


@lru_cache(maxsize=8)
def _layout(config_json: str, _identity: str) -> Layout:
    """What is told, and what the first rows say; kept for as long as the files stay as they are."""
    config = Config.model_validate_json(config_json)
    files = find_files(config.paths, SUFFIXES)
    head = next(iter(records_of(partition_files(files[:1], cut=False)[0])))
    table = read_table(head, config.delimiter, config.column_names, config.newlines_in_values)
    rows = [row.values for row in islice(table.rows, _LOOK_ROWS) if not isinstance(row, Bad)]
    label = config.label_column
    taken = [*config.text_columns.values(), *([label] if label else []), *(config.feature_columns or ())]
    check_columns(table, taken, without_query(files[0].path))
    features = config.feature_columns
    if features is None:
        others = [name for name in table.names if name not in taken]
        features = tuple(name for name in others if _all_are(rows, name, float))
    if not (features or config.text_columns or label):
        raise UsageError(
            f"{without_query(files[0].path)} has no column of numbers ({', '.join(table.names)[:500]}). Set "
            "data.text_columns, for example {text: " + table.names[0] + "}, data.label_column or data.feature_columns."
        )
    return Layout(tuple(features), dict(config.text_columns), _label(config, rows) if label else None)


def _label(config: Config, rows: list[Mapping[str, str]]) -> tuple[str, str, Mapping[str, int] | None]:
    assert config.label_column is not None
    name, kind = config.label_column, config.label_type
    whole = _all_are(rows, name, int)
    if kind is None:
        kind = "class" if whole or config.classes or not _all_are(rows, name, float) else "number"
    if kind == "number":
        return name, "float32", None
    if config.classes is None and whole:
        return name, "int64", None
    classes = config.classes if config.classes is not None else _find_classes(config, name)
    return name, "int64", {value: number for number, value in enumerate(classes)}


def _find_classes(config: Config, name: str) -> list[str]:
    found: set[str] = set()
    for partition in partitions(config):
        for records in records_of(partition):
            table = read_table(records, config.delimiter, config.column_names, config.newlines_in_values)
            check_columns(table, [name], without_query(records.path))
            found.update(row.values[name].strip() for row in table.rows if not isinstance(row, Bad))
            if len(found) > _MAX_CLASSES:
                raise UsageError(
                    f"Column '{name}' has more than {_MAX_CLASSES:,} different texts, which are no classes. Set "
                    "data.label_type=number, or another data.label_column."
                )
    return sorted(found - {""})


def _all_are(rows: list[Mapping[str, str]], name: str, kind: type) -> bool:
    """Whether a column holds numbers of a kind, and at least one; what is missing says nothing."""
    values = [value for row in rows if (value := row[name].strip()).lower() not in _MISSING]
    try:
        return all(kind(value) is not None for value in values) and bool(values)
    except ValueError:
        return False
