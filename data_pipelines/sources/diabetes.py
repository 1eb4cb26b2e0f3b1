"""Diabetes progression: 442 patients, 10 measurements each, and a score of the disease one year later.

From: scikit-learn, sklearn/datasets/data/diabetes_{data_raw,target}.csv.gz; taken from an installed scikit-learn where
there is one. B. Efron, T. Hastie, I. Johnstone, R. Tibshirani, "Least Angle Regression" (2004). Licence: no other than
scikit-learn's, BSD-3.
features: age, sex, body mass index, blood pressure, six blood serum values; as measured, not scaled.
target: 25 to 346.
It does not show: much. Linear models explain about half of the variance, and 442 rows leave wide error bars.
"""

from __future__ import annotations

import gzip
from collections.abc import Iterator

import numpy as np
from pydantic import Field

from data_pipelines.packages import member
from data_pipelines.sources import Bad, Column, Partition, Row, SourceConfig
from data_pipelines.sources.digits import PACKAGE

NEAR_DUPLICATES_SHARE_A_SPLIT = False  # no text

FEATURES = "sklearn/datasets/data/diabetes_data_raw.csv.gz"
FEATURES_SHA256 = "7fc0ded571454b1982210d3bb43f0aca44eae01a0b8654a3b24022bdb6b38009"
TARGETS = "sklearn/datasets/data/diabetes_target.csv.gz"
TARGETS_SHA256 = "8e53f65eb811df43c206f3534bb3af0e5fed213bc37ed6ba36310157d6023803"


class Config(SourceConfig):
    """It needs no settings of its own."""

    validation_fraction: float = Field(
        default=0.25, ge=0.0, lt=1.0, description="Share of the patients that is held out for validation."
    )


def schema(config: Config) -> tuple[Column, ...]:  # noqa: ARG001 - the signature of every source
    """Ten measurements and the score."""
    return Column("features", "float32", (10,)), Column("target", "float32")


def partitions(config: Config) -> list[Partition]:  # noqa: ARG001 - the signature of every source
    """All at once."""
    return [Partition("diabetes", ())]


def read(config: Config, partition: Partition) -> Iterator[Row | Bad]:  # noqa: ARG001 - the signature of every source
    """The patients in the order of the files. Raises what `packages.fetch` raises."""
    features = gzip.decompress(member(PACKAGE, FEATURES, FEATURES_SHA256)).decode("ascii").splitlines()
    targets = gzip.decompress(member(PACKAGE, TARGETS, TARGETS_SHA256)).decode("ascii").splitlines()
    for number, (line, target) in enumerate(zip(features, targets, strict=True)):
        yield Row(f"{number:03d}", {"features": np.array(line.split(), dtype=np.float32), "target": float(target)})


def identity(config: Config) -> list[str]:  # noqa: ARG001 - the signature of every source
    """The files' digests."""
    return [FEATURES, FEATURES_SHA256, TARGETS, TARGETS_SHA256]
