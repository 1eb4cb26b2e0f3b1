"""Translation: the Debian Administrator's Handbook, paragraph by paragraph, in English and other languages.

From: Debian debian-handbook, html/{en-US,fr-FR,de-DE,...}/*.html. R. Hertzog, R. Mas and its translators.
Licence: GPL-2+ or CC BY-SA 3.0.
source, target: the same paragraph, or title, in both languages, aligned by its place in the page (a page is used where
both have as many paragraphs); without markup, spaces made one. Paragraphs that are not translated (source == target)
are left out.
With `unit: sentence` the sentences of paragraphs that have as many in both languages, each once: shorter, and without
those that were not translated. The split is by the source's paragraph, so that what occurs twice is on one side.
It does not show: anything but one technical book of some 3,000 paragraphs by the same authors; what is held out comes
from chapters whose other paragraphs were trained on. Paragraphs are long, and names of commands are the same on both
sides: compare a score with that of copying the source.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import PurePosixPath
from typing import Literal

from pydantic import Field

from configs.errors import UsageError
from data_pipelines.packages import Package, members
from data_pipelines.sources import Bad, Column, Partition, Row, SourceConfig

NEAR_DUPLICATES_SHARE_A_SPLIT = False  # each row names its group

PACKAGE = Package(
    "apt-get",
    "debian-handbook",
    "11.20220922",
    "debian-handbook_11.20220922_all.deb",
    "3d5dbeac1f1afc9c094eab9d0f701f6ecff99c4927d5a4794cf6c85678134faa",
)

_BLOCKS = frozenset(
    {*("div", "p", "h1", "h2", "h3", "h4", "h5", "pre"), *("table", "td", "ul", "ol", "li", "dl", "dt", "dd")}
)
_SENTENCE_END = re.compile(r"[.!?]\)?(?= .)")
_NUMBER = re.compile(r"^\d+(\.\d+)*\. ")


class Config(SourceConfig):
    """Which two languages."""

    source_language: str = Field(
        default="en-US", pattern=r"^[a-z]{2}-[A-Z]{2}$", description="Language to translate from."
    )
    target_language: str = Field(
        default="fr-FR",
        pattern=r"^[a-z]{2}-[A-Z]{2}$",
        description="Language to translate to: nb-NO, es-ES, de-DE and fr-FR are the most complete.",
    )
    unit: Literal["paragraph", "sentence"] = Field(default="paragraph", description="What a row is.")
    validation_fraction: float = Field(
        default=0.1, ge=0.0, lt=1.0, description="Share of the paragraphs that is held out for validation."
    )


def schema(config: Config) -> tuple[Column, ...]:  # noqa: ARG001 - the signature of every source
    """A paragraph in both languages."""
    return Column("source", "utf8"), Column("target", "utf8")


def partitions(config: Config) -> list[Partition]:  # noqa: ARG001 - the signature of every source
    """All at once."""
    return [Partition("debian_handbook", ())]


def read(config: Config, partition: Partition) -> Iterator[Row | Bad]:  # noqa: ARG001 - the signature of every source
    """The pairs by page and place in it. Raises UsageError for an unknown language, and as `packages.fetch` does."""
    known: set[str] = set()
    for key, source, target in _paragraphs(config):
        if config.unit == "paragraph":
            yield Row(key, {"source": source, "target": target}, group=source)
            continue
        before, after = sentences(source), sentences(target)
        if len(before) != len(after):
            continue
        for number, (one, other) in enumerate(zip(before, after, strict=True)):
            if one != other and one not in known:
                known.add(one)
                yield Row(f"{key}:{number}", {"source": one, "target": other}, group=source)


def _paragraphs(config: Config) -> Iterator[tuple[str, str, str]]:
    """(page and place in it, the paragraph in both languages) of those that are translated."""
    sources, targets = _pages(config)
    for page in sorted(sources.keys() & targets.keys()):
        before, after = paragraphs(sources[page]), paragraphs(targets[page])
        if len(before) != len(after):
            continue
        for number, (source, target) in enumerate(zip(before, after, strict=True)):
            if source and target and source != target:
                yield f"{page}:{number}", source, target


def _pages(config: Config) -> tuple[dict[str, str], dict[str, str]]:
    """Page name -> HTML, of both languages."""
    languages = (config.source_language, config.target_language)
    pages: dict[str, dict[str, str]] = {language: {} for language in languages}
    for name, content in members(PACKAGE, *(f"*/html/{language}/*.html" for language in languages)):
        path = PurePosixPath(name)
        pages[path.parent.name][path.name] = content.decode("utf-8")
    for language, found in pages.items():
        if not found:
            raise UsageError(
                f"The Debian handbook has no language '{language}'. It has, for example, en-US, fr-FR, de-DE, es-ES, "
                "nb-NO, it-IT, pt-BR, ja-JP, ru-RU. Check data.source_language and data.target_language."
            )
    return pages[languages[0]], pages[languages[1]]


def paragraphs(html: str) -> list[str]:
    """The texts of a page in order: its paragraphs, and its titles without their number.

    Left out: program listings, addresses, the navigation, and the table of contents (which repeats the titles).
    """
    parser = _Paragraphs()
    parser.feed(html)
    parser.close()
    return [_NUMBER.sub("", " ".join("".join(parts).split())) for parts in parser.found]


def sentences(paragraph: str) -> list[str]:
    """Cut behind each . ! or ? (and a bracket) that a space and a capital letter follow."""
    ends = [match.end() for match in _SENTENCE_END.finditer(paragraph) if paragraph[match.end() + 1].isupper()]
    return [paragraph[start:end].strip() for start, end in pairwise([0, *ends, len(paragraph)])]


class _Paragraphs(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.found: list[list[str]] = []
        self._open: list[list[str] | None] = []  # of each block that is open, what its text goes to

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in _BLOCKS:
            is_text = ("class", "para") in attrs or ("class", "title") in attrs
            if is_text:
                self.found.append([])
            self._open.append(self.found[-1] if is_text else None)

    def handle_endtag(self, tag: str) -> None:
        if tag in _BLOCKS and self._open:
            self._open.pop()

    def handle_data(self, data: str) -> None:
        if self._open and (text := self._open[-1]) is not None:
            text.append(data)


def identity(config: Config) -> list[str]:  # noqa: ARG001 - the signature of every source
    """The package's version and digest."""
    return PACKAGE.identity
