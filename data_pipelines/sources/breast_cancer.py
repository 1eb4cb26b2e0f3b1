"""Breast cancer, Wisconsin diagnostic: 569 tumours, 30 measurements of cell nuclei each, malignant or benign.

From: scikit-learn, sklearn/datasets/data/breast_cancer.csv; taken from an installed scikit-learn where there is one.
Licence: CC BY 4.0 (W. Wolberg, O. Mangasarian, N. Street, W. Street, UCI Machine Learning Repository).
features: as measured, not scaled. label: 0 malignant (212), 1 benign (357).
It does not show: patients. The nuclei were outlined by hand under a microscope of one hospital, 1992-1995.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from pydantic import Field

from data_pipelines.packages import member
from data_pipelines.sources import Bad, Column, Partition, Row, SourceConfig
from data_pipelines.sources.digits import PACKAGE

NEAR_DUPLICATES_SHARE_A_SPLIT = False  # no text

FILE = "sklearn/datasets/data/breast_cancer.csv"
FILE_SHA256 = "fed3eb72d0575ef6192293f5093c6e801b1476b577d0386bf4455504522172ed"


class Config(SourceConfig):
    """It needs no settings of its own."""

    validation_fraction: float = Field(
        default=0.25, ge=0.0, lt=1.0, description="Share of the tumours that is held out for validation."
    )


def schema(config: Config) -> tuple[Column, ...]:  # noqa: ARG001 - the signature of every source
    """Thirty measurements and the diagnosis."""
    return Column("features", "float32", (30,)), Column("label", "int64")


def partitions(config: Config) -> list[Partition]:  # noqa: ARG001 - the signature of every source
    """All at once."""
    return [Partition("breast_cancer", ())]


def read(config: Config, partition: Partition) -> Iterator[Row | Bad]:  # noqa: ARG001 - the signature of every source
    """The tumours in the order of the file. Raises what `packages.fetch` raises."""
    lines = member(PACKAGE, FILE, FILE_SHA256).decode("ascii").splitlines()[1:]  # the first counts the rest
    for number, line in enumerate(lines):
        *features, label = line.split(",")
        yield Row(f"{number:03d}", {"features": np.array(features, dtype=np.float32), "label": int(label)})


def identity(config: Config) -> list[str]:  # noqa: ARG001 - the signature of every source
    """The file's digest."""
    return [FILE, FILE_SHA256]
