"""The rows of a CSV file as texts by column, each with its place."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from configs.errors import UsageError
from data_pipelines.input_files import compression_of, without_query
from data_pipelines.records import MAX_RECORD_BYTES, Record, Records
from data_pipelines.sources import Bad

_BOM = "\ufeff"


@dataclass(frozen=True)
class CsvRow:
    """One row."""

    key: str
    values: Mapping[str, str]
    records: Records
    record: Record

    def bad(self, reason: str) -> Bad:
        """The row, which cannot be used."""
        return self.records.bad(self.record, reason)


@dataclass(frozen=True)
class Table:
    """The names of a file's columns, and its rows (or those of a byte range)."""

    names: tuple[str, ...]
    rows: Iterator[CsvRow | Bad]


def read_table(
    records: Records, delimiter: str | None, column_names: Sequence[str] | None, newlines_in_values: bool = False
) -> Table:
    """The table in a file whose records are its lines. delimiter: None is a tab for *.tsv, else a comma.

    column_names: of a file without a header line. Raises UsageError for a header that names no columns.
    """
    csv.field_size_limit(MAX_RECORD_BYTES)
    delimiter = delimiter or ("\t" if _is_tsv(records.path) else ",")
    lines = _Lines(records, delimiter, newlines_in_values)
    if column_names is not None:
        return Table(tuple(column_names), _rows(lines, tuple(column_names), skip=False))
    head = Records(records.path, records.name) if not records.begins_file else records
    first = next(iter(_Lines(head, delimiter, newlines_in_values)), None)
    names = first[1] if first is not None and not isinstance(first, Bad) else []
    names = [name.strip() for name in names]
    if not any(names) or len(set(names)) < len(names):
        raise UsageError(
            f"{without_query(records.path)} begins with no line of different column names, but with "
            f"'{delimiter.join(names)[:200]}'. Set data.column_names for files without such a line."
        )
    return Table(tuple(names), _rows(lines, tuple(names), skip=records.begins_file))


def check_columns(table: Table, names: list[str], file: str) -> None:
    """Raise UsageError where the table lacks one of the columns."""
    missing = [name for name in names if name not in table.names]
    if missing:
        raise UsageError(
            f"{file} has no column '{missing[0]}' (its columns: {', '.join(table.names)[:500]}). Check the names in "
            "data, data.delimiter, and whether the file has a header line (else set data.column_names)."
        )


class _Lines:
    """(record in which the row begins, its values) of each row that is not blank."""

    def __init__(self, records: Records, delimiter: str, newlines_in_values: bool) -> None:
        self._records = records
        self._delimiter = delimiter
        self._newlines_in_values = newlines_in_values
        self._begins: Record | None = None

    def __iter__(self) -> Iterator[tuple[Record, list[str]] | Bad]:
        if self._newlines_in_values:
            yield from self._over_lines()
            return
        for record in self._records:
            if not record.is_whole:
                yield self._records.too_long(record)
                continue
            try:
                text = _decoded(record)
                if text.strip():
                    yield record, next(csv.reader((text,), delimiter=self._delimiter, strict=True))
            except UnicodeDecodeError as error:
                yield self._records.bad(record, f"byte {error.start} of the line is not UTF-8")
            except csv.Error as error:
                reason = f"not CSV ({error}); if values hold line breaks set data.newlines_in_values"
                yield self._records.bad(record, reason)

    def _over_lines(self) -> Iterator[tuple[Record, list[str]] | Bad]:
        reader = csv.reader(self._fed(), delimiter=self._delimiter, strict=True)
        while True:
            self._begins = None
            try:
                values = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                if self._begins is not None:
                    yield self._records.bad(self._begins, f"not CSV ({error})")
                continue
            assert self._begins is not None
            try:
                "".join(values).encode("utf-8")
            except UnicodeEncodeError:
                yield self._records.bad(self._begins, "not UTF-8, or a line that is too long")
            else:
                if any(values):
                    yield self._begins, values

    def _fed(self) -> Iterator[str]:
        """Lines for a csv.reader, with notes of where a row begins."""
        for record in self._records:
            self._begins = self._begins or record
            text = record.raw.decode("utf-8", errors="surrogateescape").removesuffix("\r")
            mark = "" if record.is_whole else "\udcff"  # is refused as what is not UTF-8
            yield (text.removeprefix(_BOM) if record.offset == 0 else text) + mark + "\n"


def _decoded(record: Record) -> str:
    text = record.raw.decode("utf-8")
    return text.removeprefix(_BOM) if record.offset == 0 else text


def _rows(lines: _Lines, names: tuple[str, ...], *, skip: bool) -> Iterator[CsvRow | Bad]:
    records = lines._records
    for line in lines:
        if skip:
            skip = False
        elif isinstance(line, Bad):
            yield line
        elif len(line[1]) != len(names):
            yield records.bad(line[0], f"has {len(line[1])} values, not {len(names)}")
        else:
            yield CsvRow(records.key(line[0]), dict(zip(names, line[1], strict=True)), records, line[0])


def _is_tsv(path: str) -> bool:
    name = without_query(path).lower()
    if compression_of(path):
        name = name.rpartition(".")[0]
    return name.endswith(".tsv")
