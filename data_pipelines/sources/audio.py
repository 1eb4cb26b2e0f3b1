"""Sound files (WAV, FLAC, Ogg, MP3) and what is said in them, by a manifest: a CSV, TSV or JSONL file, a line a clip.

A row has `audio`, float32 samples at sample_rate, the mean of the channels, and `text`. Files are decoded while the
data set is built, by the package soundfile (`pip install shardyard[audio]`), and resampled (sound.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import xxhash
from pydantic import Field

from configs.errors import NotFound, UsageError
from data_pipelines.csv_rows import check_columns, read_table
from data_pipelines.input_files import compression_of, folder_of, join_path, read_file, stat_file, without_query
from data_pipelines.records import Record, Records, records_of
from data_pipelines.row_values import value_of
from data_pipelines.sound import decode_sound
from data_pipelines.sources import (
    MAX_VALUE_BYTES,
    Bad,
    Column,
    InputFile,
    Partition,
    Row,
    SourceConfig,
    file_identity,
    find_files,
    partition_files,
)
from data_pipelines.sources.jsonl import json_object

NEAR_DUPLICATES_SHARE_A_SPLIT = False
_TEXT = Column("text", "utf8")
_MANIFEST_BYTES = 64 << 10  # a partition: some hundred clips, of some hundred kB each
_CSV = (".csv", ".tsv")
_JSON = (".jsonl", ".ndjson", ".json")


class Config(SourceConfig):
    """Which clips, and how they are sampled."""

    manifest: str = Field(
        min_length=1,
        description="File that names a clip and its text in each line: .csv, .tsv, .jsonl, or .json with one object a "
        "line.",
        examples=["clips/metadata.csv"],
    )
    folder: str | None = Field(
        default=None, min_length=1, description="Where the clips' paths start; null is the manifest's folder."
    )
    path_field: str = Field(default="path", min_length=1, description="Column or field with the path of a clip.")
    text_field: str | None = Field(
        default="text", min_length=1, description="Column or field with what is said; null takes no text."
    )
    sample_rate: int = Field(
        default=16_000, ge=1000, le=192_000, description="Samples a second; clips of another rate are resampled."
    )
    speaker_field: str | None = Field(
        default=None,
        min_length=1,
        description="Column or field with who speaks: a speaker is then on one side of the split only.",
    )


def schema(config: Config) -> tuple[Column, ...]:
    """audio: samples from -1 to 1; text, if it is taken."""
    return Column("audio", "float32", (None,)), *((_TEXT,) if config.text_field is not None else ())


def partitions(config: Config) -> list[Partition]:
    """Ranges of the manifest. Raises UsageError without the package soundfile."""
    try:
        import soundfile  # type: ignore[import-untyped]  # noqa: F401 - only whether it is there
    except (ImportError, OSError) as error:  # OSError: its library is not there
        raise UsageError(
            f"To read sound files needs the package soundfile ({error}). Run pip install 'shardyard[audio]'."
        ) from error
    return partition_files(_manifest(config), cut=True, target_bytes=_MANIFEST_BYTES)


def read(config: Config, partition: Partition) -> Iterator[Row | Bad]:
    """A row for each line of the manifest; a Bad for one that names no clip and text, or a clip that cannot be decoded.

    Raises what reading the manifest raises, and Unreachable where the store of the clips is.
    """
    folder = config.folder if config.folder is not None else folder_of(config.manifest)
    for records in records_of(partition):
        for record, fields in _lines(config, records):
            if isinstance(fields, Bad):
                yield fields
                continue
            try:
                values = _values(fields, folder, config)
                group = str(_field(fields, config.speaker_field)) if config.speaker_field is not None else None
            except (ValueError, NotFound) as error:
                yield records.bad(record, str(error).rstrip("."))
                continue
            yield Row(records.key(record), values, group=group)


def identity(config: Config) -> list[int | str]:
    """The manifest's facts, and of clips on this machine's disk their sizes and times of change."""
    files = _manifest(config)
    folder = config.folder if config.folder is not None else folder_of(config.manifest)
    facts = file_identity(files)
    if "://" in folder:
        return facts  # a request a clip: a change of remote clips is noticed with that of their manifest
    state = xxhash.xxh3_128()
    for partition in partition_files(files, cut=False):
        for records in records_of(partition):
            for _, fields in _lines(config, records):
                state.update(_clip_facts(fields, folder, config.path_field))
    return [*facts, state.hexdigest()]


def _clip_facts(fields: dict[str, Any] | Bad, folder: str, path_field: str) -> bytes:
    try:
        assert not isinstance(fields, Bad)
        clip = stat_file(join_path(folder, str(fields[path_field])), "")
    except (AssertionError, KeyError, NotFound):
        return b"-"
    return f"{clip.size}:{clip.changed};".encode()


def _manifest(config: Config) -> list[InputFile]:
    ending = _ending(config.manifest)
    if ending not in (*_CSV, *_JSON):
        raise UsageError(
            f"data.manifest={config.manifest} ends in '{ending}'. It must be a .csv, .tsv or .jsonl file (also .json, "
            "with one object a line)."
        )
    return find_files([config.manifest], ("",), "data.manifest")


def _ending(path: str) -> str:
    name = without_query(path).lower()
    if compression_of(path):
        name = name.rpartition(".")[0]
    return "." + name.rpartition("/")[2].rpartition(".")[2]


def _lines(config: Config, records: Records) -> Iterator[tuple[Record, dict[str, Any] | Bad]]:
    """The fields of each line of a manifest."""
    if _ending(records.path) in _CSV:
        table = read_table(records, None, None)
        wanted = (config.path_field, config.text_field, config.speaker_field)
        check_columns(table, [name for name in wanted if name is not None], without_query(records.path))
        for row in table.rows:
            yield (_NO_RECORD, row) if isinstance(row, Bad) else (row.record, dict(row.values))
        return
    for record in records:
        try:
            fields = json_object(record.raw) if record.is_whole else None
        except ValueError as error:
            yield record, records.bad(record, str(error))
            continue
        if not record.is_whole:
            yield record, records.too_long(record)
        elif fields is not None:
            yield record, fields


_NO_RECORD = Record(0, 0, b"", True)


def _values(fields: dict[str, Any], folder: str, config: Config) -> dict[str, Any]:
    """The clip, decoded, and its text. Raises ValueError with the reason, and NotFound."""
    path = _field(fields, config.path_field)
    if not isinstance(path, str) or not path.strip():
        raise ValueError(f"field '{config.path_field}' names no file")
    values: dict[str, Any] = {}
    if config.text_field is not None:
        try:
            values["text"] = value_of(_field(fields, config.text_field), _TEXT)
        except ValueError as error:
            raise ValueError(f"field '{config.text_field}' {error}") from None
    clip = join_path(folder, path.strip())
    try:
        values["audio"] = decode_sound(read_file(clip, MAX_VALUE_BYTES + 1), config.sample_rate, MAX_VALUE_BYTES)
    except ValueError as error:
        raise ValueError(f"{without_query(clip)}: {error}") from None
    if not len(values["audio"]):
        raise ValueError(f"{without_query(clip)}: has no samples")
    return values


def _field(fields: dict[str, Any], name: str) -> Any:
    if name not in fields:
        raise ValueError(f"no field '{name}' (its fields: {', '.join(fields)[:200] or 'none'})")
    return fields[name]
