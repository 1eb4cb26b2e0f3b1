"""Which rows are left out: by length, and by rules of quality, each a small function of a row's text.

The rules are those of Gopher (Rae et al. 2021, https://arxiv.org/abs/2112.11446, section A.1.1 and table A1), made for
English web pages; the defaults are its figures. Each has a name, which is its setting: `filters: {symbol_ratio: {}}`
switches it on, `{symbol_ratio: {max: 0.2}}` with another bound. A row is dropped by the first rule that it breaks, and
the index counts how many were dropped by which.

A word is a run of characters that are no space; a line ends at "\\n"; a paragraph at an empty line.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field

from configs.schema import Section

if TYPE_CHECKING:
    from data_pipelines.sources import Row, SourceConfig

_STOP_WORDS = frozenset(("the", "be", "to", "of", "and", "that", "have", "with"))
_BULLETS = ("-", "*", "•", "‣", "▪", "●", "–")
_ELLIPSES = ("...", "…")


class NumWords(Section):
    """How many words a text has."""

    min: int = Field(default=50, ge=0, description="Fewest words.")
    max: int = Field(default=100_000, ge=1, description="Most words.")

    def keeps(self, text: Text) -> bool:
        """Whether a text has neither too few words nor too many."""
        return self.min <= len(text.words) <= self.max


class MeanWordLength(Section):
    """How long words are: tables and code without spaces have long ones."""

    min: float = Field(default=3.0, ge=0, description="Shortest mean length of words, in characters.")
    max: float = Field(default=10.0, gt=0, description="Longest mean length of words, in characters.")

    def keeps(self, text: Text) -> bool:
        """Whether the mean is within the bounds; a text without words has none."""
        return bool(text.words) and self.min <= sum(map(len, text.words)) / len(text.words) <= self.max


class SymbolRatio(Section):
    """Hash marks and ellipses, for each word."""

    max: float = Field(default=0.1, ge=0, description="Most '#' a word, and most '...' a word.")

    def keeps(self, text: Text) -> bool:
        """Whether neither symbol is too frequent."""
        ellipses = sum(map(text.text.count, _ELLIPSES))
        return max(text.text.count("#"), ellipses) <= self.max * max(1, len(text.words))


class BulletShare(Section):
    """Lines that begin with a bullet: lists, menus."""

    max: float = Field(default=0.9, ge=0, le=1, description="Largest share of lines that begin with a bullet.")

    def keeps(self, text: Text) -> bool:
        """Whether not too many lines are items of lists."""
        return _share(line.startswith(_BULLETS) for line in text.lines) <= self.max


class EllipsisShare(Section):
    """Lines that end in an ellipsis: beginnings of articles, cut off."""

    max: float = Field(default=0.3, ge=0, le=1, description="Largest share of lines that end in '...'.")

    def keeps(self, text: Text) -> bool:
        """Whether not too many lines are cut off."""
        return _share(line.endswith(_ELLIPSES) for line in text.lines) <= self.max


class AlphabeticShare(Section):
    """Words with at least one letter: prices, dates and tables have few."""

    min: float = Field(default=0.8, ge=0, le=1, description="Smallest share of words that have a letter.")

    def keeps(self, text: Text) -> bool:
        """Whether enough words have letters; a text without words has none."""
        return bool(text.words) and _share(any(map(str.isalpha, word)) for word in text.words) >= self.min


class StopWords(Section):
    """The commonest English words: a text without them is a list of keywords, or not English."""

    min: int = Field(
        default=2, ge=0, le=8, description="How many of the, be, to, of, and, that, have, with occur at least."
    )

    def keeps(self, text: Text) -> bool:
        """Whether enough of them occur."""
        return len(_STOP_WORDS.intersection(word.lower().strip(".,;:!?\"'()") for word in text.words)) >= self.min


class Repetition(Section):
    """Lines, paragraphs and phrases that come again: boilerplate, spam (table A1)."""

    max_lines: float = Field(default=0.3, ge=0, le=1, description="Largest share of lines that came before.")
    max_line_characters: float = Field(default=0.2, ge=0, le=1, description="Largest share of characters in them.")
    max_paragraphs: float = Field(default=0.3, ge=0, le=1, description="Largest share of paragraphs that came before.")
    max_paragraph_characters: float = Field(default=0.2, ge=0, le=1, description="Largest share of characters in them.")
    max_top_ngram: tuple[float, float, float] = Field(
        default=(0.2, 0.18, 0.16),
        description="Largest share of characters in the most frequent phrase of 2, 3 and 4 words.",
    )
    max_duplicate_ngrams: tuple[float, float, float, float, float, float] = Field(
        default=(0.15, 0.14, 0.13, 0.12, 0.11, 0.1),
        description="Largest share of characters in phrases of 5, 6, 7, 8, 9 and 10 words that occur more than once.",
    )

    def keeps(self, text: Text) -> bool:
        """Whether a text repeats itself within all bounds; the cheap ones are looked at first."""
        for pieces, most, most_characters in (
            (text.lines, self.max_lines, self.max_line_characters),
            (text.paragraphs, self.max_paragraphs, self.max_paragraph_characters),
        ):
            count, characters = _repeated(pieces)
            if count > most * len(pieces) or characters > most_characters * sum(map(len, pieces)):
                return False
        words = _Words(text.words)
        return all(words.top_share(n) <= most for n, most in enumerate(self.max_top_ngram, start=2)) and all(
            words.duplicate_share(n) <= most for n, most in enumerate(self.max_duplicate_ngrams, start=5)
        )


class FiltersConfig(Section):
    """Which rows are left out. A rule that is null leaves out none; {} is the rule with its defaults."""

    min_bytes: int | None = Field(
        default=None, ge=0, description="Shortest row that is kept: UTF-8 bytes of its texts, bytes of its arrays."
    )
    max_bytes: int | None = Field(default=None, ge=1, description="Longest row that is kept, in the same bytes.")
    num_words: NumWords | None = Field(default=None, description="How many words a text has.")
    mean_word_length: MeanWordLength | None = Field(default=None, description="How long words are.")
    symbol_ratio: SymbolRatio | None = Field(default=None, description="Hash marks and ellipses, for each word.")
    bullet_share: BulletShare | None = Field(default=None, description="Lines that begin with a bullet.")
    ellipsis_share: EllipsisShare | None = Field(default=None, description="Lines that end in an ellipsis.")
    alphabetic_share: AlphabeticShare | None = Field(default=None, description="Words with at least one letter.")
    stop_words: StopWords | None = Field(default=None, description="The commonest English words.")
    repetition: Repetition | None = Field(
        default=None, description="Lines, paragraphs and phrases that come again; it takes ten times as long as others."
    )


class Text:
    """A text, and its words, lines and paragraphs, taken apart when a rule asks for them."""

    def __init__(self, text: str) -> None:
        self.text = text
        self._words: list[str] | None = None
        self._lines: list[str] | None = None

    @property
    def words(self) -> list[str]:
        """Runs of characters that are no space."""
        if self._words is None:
            self._words = self.text.split()
        return self._words

    @property
    def lines(self) -> list[str]:
        """Lines that are not blank, without the spaces around them."""
        if self._lines is None:
            self._lines = [stripped for line in self.text.split("\n") if (stripped := line.strip())]
        return self._lines

    @property
    def paragraphs(self) -> list[str]:
        """What stands between empty lines."""
        return [stripped for part in re.split(r"\n\s*\n", self.text) if (stripped := part.strip())]


def reason_to_drop(config: SourceConfig, row: Row) -> str | None:
    """The name of the first filter that drops the row; None keeps it.

    Lengths are those of all its texts, binaries and arrays together; the rules look at its texts, each by itself.
    """
    filters = config.filters
    if filters.min_bytes is not None or filters.max_bytes is not None:
        size = sum(map(_num_bytes, row.values.values()))
        if filters.min_bytes is not None and size < filters.min_bytes:
            return "min_bytes"
        if filters.max_bytes is not None and size > filters.max_bytes:
            return "max_bytes"
    rules = rules_of(filters)
    texts = [Text(value) for value in row.values.values() if isinstance(value, str)] if rules else []
    for name, rule in rules.items():
        if not all(rule.keeps(text) for text in texts):
            return name
    return None


def rules_of(filters: FiltersConfig) -> Mapping[str, Any]:
    """The rules of quality that are switched on, by name."""
    return {name: rule for name, rule in filters if isinstance(rule, Section)}


def _num_bytes(value: Any) -> int:
    if isinstance(value, str):
        return len(value) if value.isascii() else len(value.encode("utf-8", "surrogatepass"))
    if isinstance(value, bytes | bytearray | memoryview):
        return len(value)
    return value.nbytes if isinstance(value, np.ndarray) and value.ndim else 0


def _share(flags: Any) -> float:
    found = list(flags)
    return sum(found) / len(found) if found else 0.0


def _repeated(pieces: list[str]) -> tuple[int, int]:
    """(how many of the pieces came before, characters in them)."""
    seen: set[str] = set()
    count = characters = 0
    for piece in pieces:
        if piece in seen:
            count, characters = count + 1, characters + len(piece)
        seen.add(piece)
    return count, characters


class _Words:
    """The words of a text, W of them, numbered so that phrases are compared as arrays. Lengths are in characters."""

    def __init__(self, words: list[str]) -> None:
        numbers: dict[str, int] = {}
        self._numbers = np.array([numbers.setdefault(word, len(numbers)) for word in words], np.int64)  # (W,)
        self._ends = np.cumsum([0, *map(len, words)])  # (W + 1,)
        self._phrases = self._numbers  # phrases of `_length` words by number, (W - length + 1,)
        self._length = 1

    def top_share(self, n: int) -> float:
        """Share of the characters that the most frequent phrase of n words makes up; 0 where none comes again."""
        phrases = self._phrases_of(n)
        if not len(phrases):
            return 0.0
        counts = np.bincount(phrases)
        most = int(counts.max())
        if most < 2:
            return 0.0
        first = int(np.flatnonzero(counts[phrases] == most)[0])
        return most * int(self._ends[first + n] - self._ends[first]) / int(self._ends[-1])

    def duplicate_share(self, n: int) -> float:
        """Characters in phrases of n words that occur more than once, each character counted once, of all."""
        phrases = self._phrases_of(n)
        if not len(phrases):
            return 0.0
        again = np.bincount(phrases)[phrases] > 1  # (W - n + 1,)
        edges = np.zeros(len(self._numbers) + 1, np.int64)
        edges[: len(again)] += again
        edges[n : n + len(again)] -= again
        covered = np.cumsum(edges)[:-1] > 0  # (W,)
        return int(np.diff(self._ends)[covered].sum()) / int(self._ends[-1])

    def _phrases_of(self, n: int) -> np.ndarray:
        """Each phrase of n words as a number below their count; equal phrases have equal numbers. n never falls."""
        while self._length < n and len(self._phrases) > 1:
            pairs = self._phrases[:-1] * (len(self._numbers) + 1) + self._numbers[self._length :]
            _, self._phrases = np.unique(pairs, return_inverse=True)
            self._length += 1
        return self._phrases if self._length == n else self._phrases[:0]
