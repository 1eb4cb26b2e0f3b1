"""ACTG 175: a trial of four treatments for HIV, 2,139 patients, and whether their disease went on.

From: PyPI lifelines, lifelines/datasets/ACTG175.csv. S. Hammer and others, "A trial comparing nucleoside monotherapy
with combination therapy in HIV-infected adults" (1996). Licence: lifelines MIT; the data has no other.
features: what was known when the trial began (FEATURES), then the treatment, one of four, as 0 and 1. Left out is what
was measured later (CD4 at 20 and 96 weeks, leaving the treatment), since it tells the outcome.
label: 1 where the CD4 count fell by half, AIDS came, or death, 0 where the patient left the study before. days: until
then.
It does not show: treatments of today, and label is no plain class: who left early might have followed (days says
when).
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator

import numpy as np
from pydantic import Field

from data_pipelines.packages import Package, member
from data_pipelines.sources import Bad, Column, Partition, Row, SourceConfig

NEAR_DUPLICATES_SHARE_A_SPLIT = False  # no text

PACKAGE = Package(
    "pip",
    "lifelines",
    "0.30.3",
    "lifelines-0.30.3-py3-none-any.whl",
    "44802480a28d6cb836c7fea4a54ec0ba220eb31c6d7444589637a8bd66066e8c",
)
FEATURES = (
    *("age", "wtkg", "hemo", "homo", "drugs", "karnof", "oprior", "z30", "preanti"),
    *("race", "gender", "str2", "strat", "symptom", "cd40", "cd80"),
)
NUM_ARMS = 4


class Config(SourceConfig):
    """It needs no settings of its own."""

    validation_fraction: float = Field(
        default=0.25, ge=0.0, lt=1.0, description="Share of the patients that is held out for validation."
    )


def schema(config: Config) -> tuple[Column, ...]:  # noqa: ARG001 - the signature of every source
    """What was known at the beginning, the outcome, and when."""
    features = Column("features", "float32", (len(FEATURES) + NUM_ARMS,))
    return features, Column("label", "int64"), Column("days", "float32")


def partitions(config: Config) -> list[Partition]:  # noqa: ARG001 - the signature of every source
    """All at once."""
    return [Partition("actg175", ())]


def read(config: Config, partition: Partition) -> Iterator[Row | Bad]:  # noqa: ARG001 - the signature of every source
    """The patients in the order of the file. Raises what `packages.fetch` raises."""
    text = member(PACKAGE, "lifelines/datasets/ACTG175.csv").decode("ascii")
    for line in csv.DictReader(io.StringIO(text)):
        arms = [float(int(line["arms"]) == arm) for arm in range(NUM_ARMS)]
        features = np.array([float(line[name]) for name in FEATURES] + arms, dtype=np.float32)
        values = {"features": features, "label": int(line["cens"]), "days": float(line["days"])}
        yield Row(line["pidnum"], values, group=line["pidnum"])


def identity(config: Config) -> list[str]:  # noqa: ARG001 - the signature of every source
    """The package's version and digest."""
    return PACKAGE.identity
