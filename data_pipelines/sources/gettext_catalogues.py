"""Translation: the messages of programs in English and another language, from the gettext catalogues of a system.

From: LOCALE/LC_MESSAGES/*.mo below a folder, on Debian /usr/share/locale: tens of thousands of messages in German or
French on a full system, fewer on a small one. Licence: that of each program.
source, target: a message and its translation; of one with a plural the singular. What is not translated
(source == target) is left out.
The split is by the source's text, so that a message that many programs have is on one side.
It does not show: sentences of more than a line or two, or any text but that of programs; names and placeholders are
the same on both sides: compare a score with that of copying the source. What there is depends on the machine: for
results to compare, keep the folder.
The format: https://www.gnu.org/software/gettext/manual/html_node/MO-Files.html
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from pathlib import Path

from pydantic import Field

from data_pipelines.input_files import read_file
from data_pipelines.sources import (
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

NEAR_DUPLICATES_SHARE_A_SPLIT = False  # each row names its group
_MAGIC = 0x950412DE
_CHARSET = re.compile(rb"charset=([\w.:-]+)")


class Config(SourceConfig):
    """Which language, and where the catalogues are."""

    path: str = Field(
        default="/usr/share/locale", min_length=1, description="Folder that holds a folder for each language."
    )
    language: str = Field(
        default="de", pattern=r"^[A-Za-z_@.-]+$", description="Language to translate to, by its folder's name."
    )
    validation_fraction: float = Field(
        default=0.1, ge=0.0, lt=1.0, description="Share of the messages that is held out for validation."
    )


def schema(config: Config) -> tuple[Column, ...]:  # noqa: ARG001 - the signature of every source
    """A message in both languages."""
    return Column("source", "utf8"), Column("target", "utf8")


def partitions(config: Config) -> list[Partition]:
    """Catalogues together. Raises NotFound where there is no such language."""
    return partition_files(_files(config), cut=False)


def read(config: Config, partition: Partition) -> Iterator[Row | Bad]:  # noqa: ARG001 - the signature of every source
    """The pairs by catalogue, in its order; a Bad for a file that is no catalogue."""
    for path, key in zip(partition.files, partition.keys, strict=True):
        try:
            pairs = parse_catalogue(read_file(path))
        except ValueError as error:
            yield Bad(path, None, str(error))
            continue
        for number, (source, target) in enumerate(pairs, start=1):
            if source.strip() and target.strip() and source != target:
                yield Row(f"{key}:{number}", {"source": source, "target": target}, group=source)


def parse_catalogue(raw: bytes) -> list[tuple[str, str]]:
    """The messages of a .mo file and their translations, without contexts and plurals; its header is left out.

    Raises ValueError for what is no catalogue.
    """
    try:
        order = "<" if int.from_bytes(raw[:4], "little") == _MAGIC else ">"
        magic, _, count, sources_at, targets_at = struct.unpack_from(f"{order}5I", raw)
        if magic != _MAGIC:
            raise ValueError("no gettext catalogue")
        sources, targets = (_texts(raw, order, count, start) for start in (sources_at, targets_at))
    except struct.error:
        raise ValueError("a gettext catalogue that is cut off") from None
    pairs = dict(zip(sources, targets, strict=True))
    found = _CHARSET.search(pairs.pop(b"", b""))
    charset = found[1].decode() if found else "utf-8"
    singular = [(source.rpartition(b"\4")[2].partition(b"\0")[0], target) for source, target in pairs.items()]
    try:
        return [(source.decode(charset), target.partition(b"\0")[0].decode(charset)) for source, target in singular]
    except LookupError:
        raise ValueError(f"a gettext catalogue in the charset {charset}, which is not known") from None


def identity(config: Config) -> list[int | str]:
    """Number, sizes and times of change of the catalogues."""
    return file_identity(_files(config))


def _files(config: Config) -> list[InputFile]:
    return find_files([str(Path(config.path).expanduser() / config.language)], (".mo",), "data.path and data.language")


def _texts(raw: bytes, order: str, count: int, table: int) -> list[bytes]:
    places = struct.unpack_from(f"{order}{2 * count}I", raw, table)
    if any(start + length > len(raw) for length, start in zip(places[::2], places[1::2], strict=True)):
        raise ValueError("a gettext catalogue that is cut off")
    return [raw[start : start + length] for length, start in zip(places[::2], places[1::2], strict=True)]
