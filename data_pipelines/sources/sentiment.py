"""Sentences rated by people: from tweets, film reviews, product reviews, newspaper editorials; in English.

From: PyPI vaderSentiment 2.5, the source archive, additional_resources/hutto_ICWSM_2014.tar.gz. Each sentence has the
mean rating of 20 people, from -4 (extremely negative) to 4. C. Hutto, E. Gilbert, "VADER: A Parsimonious Rule-based
Model for Sentiment Analysis of Social Media Text" (2014). Licence: MIT.
text: the sentence. score: the mean rating. label: 1 where it is positive. Sentences with abs(score) < min_score are
left out, since people themselves find them neutral. The key begins with where a sentence is from.
The split is by review or editorial where the file tells which (amazon, nyt), else by text: sentences of one are near.
It does not show: who wrote them, or language after 2013.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from typing import IO, Literal, cast

from pydantic import Field

from data_pipelines.packages import Package, member
from data_pipelines.sources import Bad, Column, Partition, Row, SourceConfig, excerpt

NEAR_DUPLICATES_SHARE_A_SPLIT = False  # each row names its group

PACKAGE = Package(
    "pip",
    "vaderSentiment",
    "2.5",
    "vaderSentiment-2.5.tar.gz",
    "b960c954831f5ca58afee61780cc04ed48e551b91e783bfcbfb2c18bb8081a84",
)
FILE = "vaderSentiment-2.5/additional_resources/hutto_ICWSM_2014.tar.gz"
GROUND_TRUTH = {
    "tweets": "tweets",
    "movie": "movieReviewSnippets",
    "amazon": "amazonReviewSnippets",
    "nyt": "nytEditorialSnippets",
}


class Config(SourceConfig):
    """Which sentences."""

    domains: tuple[Literal["tweets", "movie", "amazon", "nyt"], ...] = Field(
        default=("tweets", "movie", "amazon"),
        min_length=1,
        description="Where sentences are from. Of nyt (editorials) most are neutral.",
    )
    validation_fraction: float = Field(
        default=0.2, ge=0.0, lt=1.0, description="Share of the sentences that is held out for validation."
    )
    min_score: float = Field(
        default=1.0, ge=0.0, le=4.0, description="Sentences with a smaller absolute rating are left out as neutral."
    )


def schema(config: Config) -> tuple[Column, ...]:  # noqa: ARG001 - the signature of every source
    """A sentence, 1 for positive, its mean rating."""
    return Column("text", "utf8"), Column("label", "int64"), Column("score", "float32")


def partitions(config: Config) -> list[Partition]:  # noqa: ARG001 - the signature of every source
    """All at once."""
    return [Partition("sentiment", ())]


def read(config: Config, partition: Partition) -> Iterator[Row | Bad]:  # noqa: ARG001 - the signature of every source
    """The sentences in the order of the files. Raises what `packages.fetch` raises."""
    with tarfile.open(fileobj=io.BytesIO(member(PACKAGE, FILE))) as archive:
        for domain in dict.fromkeys(config.domains):
            path = f"hutto_ICWSM_2014/{GROUND_TRUTH[domain]}_GroundTruth.txt"
            raw = cast(IO[bytes], archive.extractfile(path)).read()
            for number, line in enumerate(raw.decode("utf-8").split("\r\n"), start=1):
                if line.strip():
                    row = _row(domain, path, number, line)
                    if isinstance(row, Bad) or abs(row.values["score"]) >= config.min_score:
                        yield row


def _row(domain: str, path: str, number: int, line: str) -> Row | Bad:
    try:
        name, score, text = line.split("\t", maxsplit=2)
        rating = float(score)
    except ValueError:
        return Bad(path, number, "not an id, a rating and a text between tabs", excerpt(line))
    review, _, sentence = name.partition("_")
    text = text.strip()
    group = f"{domain}/{review}" if sentence else text.lower()
    return Row(f"{domain}/{name}", {"text": text, "label": int(rating > 0), "score": rating}, group=group)


def identity(config: Config) -> list[str]:  # noqa: ARG001 - the signature of every source
    """The package's version and digest."""
    return PACKAGE.identity
