"""Text to token ids and back: a byte-level BPE, or bytes, lossless for any text; or a BERT's WordPiece, from a file.

Byte-pair encoding: Sennrich et al. 2016, https://arxiv.org/abs/1508.07909; over bytes: Radford et al. 2019 (GPT-2).
Both kinds are Hugging Face `tokenizers` files (tokenizer.json). Id 0 is the end of a document, and begins the next.

The text is first cut into words by WORDS. It uses explicit character ranges and looks neither ahead nor behind, so
that Python's `re` and the library's engine cut alike and a word alone is cut as it is within a text. That allows the
fast way: cut with `re`, keep the ids of each word ever seen, and ask the library about new words only. It also makes
"<|endoftext|>" inside a text plain text, since no word holds it whole.

WordPiece (Devlin et al. 2018) is for models that were trained with it elsewhere. [CLS] begins a text in the place of
the end mark, [SEP] ends it. It loses case and spaces, and its id 0 is padding, so documents cannot be packed with it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from configs.errors import Damaged, UsageError
from configs.schema import Section

if TYPE_CHECKING:
    import tokenizers

EOS = "<|endoftext|>"
EOS_ID = 0
WORDPIECE_MARKS = "[CLS]", "[SEP]"
_NUM_BYTES = 256
_MAX_KEPT_WORDS = 1 << 20

# Letters of any script (ASCII letters, and everything beyond Latin-1 controls but general and CJK punctuation).
_LETTERS = "A-Za-z\u00a0-\u1fff\u2070-\u2fff\u3040-\ufeff\U00010000-\U0010ffff"
_MARK = f"[^{_LETTERS}0-9 \t\r\n]"
WORDS = "|".join(
    [
        "[\r\n]+[ \t]*",  # line ends with the indent that follows: often one token in source code
        f" ?{_MARK}?[{_LETTERS}]+",  # a word with the space and the mark before it: " self", "._name"
        "[0-9]{1,3}",
        f" ?{_MARK}+(?:[\r\n]+[ \t]*| )?",  # marks with what sets the next word apart: "):\n        ", " = "
        "[ \t]+",
    ]
)


class TokenizerConfig(Section):
    """How text becomes token ids."""

    name: Literal["bpe", "bytes", "wordpiece"] = Field(
        default="bpe", description="bpe: byte-level BPE trained on the data; bytes; wordpiece: a BERT's, from a file."
    )
    vocab_size: int = Field(default=4096, ge=_NUM_BYTES + 1, description="Most token ids (bytes: always 257).")
    file: str | None = Field(
        default=None,
        min_length=1,
        description="Path or URI of a tokenizer.json to use instead of training one; every worker reads it. "
        "`train --from` sets it where the data is not the parent's; package:NAME/tokenizer.json is a package's.",
    )

    @model_validator(mode="before")
    @classmethod
    def _bytes_have_one_size(cls, values: object) -> object:
        if isinstance(values, dict) and values.get("name") == "bytes":
            return {"vocab_size": _NUM_BYTES + 1, **values}
        return values

    @model_validator(mode="after")
    def _check_file(self) -> Self:
        if self.name == "bytes" and self.vocab_size != _NUM_BYTES + 1:
            raise ValueError(f"vocab_size={self.vocab_size} does not fit bytes, which have 257 ids; leave it out")
        if self.name == "bytes" and self.file is not None:
            raise ValueError("file goes with bpe: bytes need no file; leave it out")
        if self.name == "wordpiece" and self.file is None:
            raise ValueError("wordpiece is not trained here; set file to the tokenizer.json of the model it goes with")
        return self


class Tokenizer:
    """A trained tokenizer. Pickles; may be used from several threads."""

    def __init__(self, library_tokenizer: tokenizers.Tokenizer) -> None:
        self._tokenizer = library_tokenizer
        self.vocab_size: int = library_tokenizer.get_vocab_size()
        self._is_wordpiece = type(library_tokenizer.model).__name__ == "WordPiece"
        own = map(library_tokenizer.token_to_id, WORDPIECE_MARKS)
        marks: list[Any] = list(own) if self._is_wordpiece else [EOS_ID]
        self.eos_id: int = marks[0]  # begins a document
        self._last = marks[1:]
        self.dtype: type[np.unsignedinteger] = np.uint16 if self.vocab_size <= 1 << 16 else np.uint32
        in_byte_order = library_tokenizer.token_to_id(_byte_characters()[0]) == 1  # a BPE's alphabet is sorted
        self._is_bytes = in_byte_order and self.vocab_size == _NUM_BYTES + 1
        self._kept: dict[str, tuple[int, ...]] = {}

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Tokenizer.from_json, (self.to_json(),)

    @cached_property
    def _words(self) -> re.Pattern[str]:
        return re.compile(WORDS)

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The token ids of each text: 1-D uint16 (uint32 past 65,536 ids), with no mark at its beginning.

        Raises UsageError for a text that is no Unicode (a lone surrogate).
        """
        try:
            if self._is_bytes:
                return [
                    np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.uint16) + np.uint16(1) for text in texts
                ]
            if self._is_wordpiece:
                for text in texts:
                    text.encode("utf-8")
                encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
                return [np.array([*encoding.ids, *self._last], self.dtype) for encoding in encodings]
            return self._encode_words([self._words.findall(text) for text in texts])
        except UnicodeEncodeError as error:
            raise UsageError(
                f"A text holds a lone surrogate, {error.object[error.start]!r} at character {error.start}, which is no "
                f"Unicode text. Remove it, or decode the text with errors='replace'."
            ) from error

    def _encode_words(self, word_lists: list[list[str]]) -> list[np.ndarray]:
        kept = self._kept
        new = sorted(set().union(*word_lists).difference(kept))
        if len(kept) + len(new) > _MAX_KEPT_WORDS:
            new = sorted(set().union(*word_lists))
            kept = self._kept = {}
        if new:
            for word in new:
                word.encode("utf-8")  # the library would answer a lone surrogate with a TypeError
            encodings = self._tokenizer.encode_batch_fast(new, add_special_tokens=False)
            kept.update(zip(new, (tuple(encoding.ids) for encoding in encodings), strict=True))
        ids = [list(chain.from_iterable(map(kept.__getitem__, words))) for words in word_lists]
        return [np.array(document, self.dtype) for document in ids]

    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        """The text of token ids; end marks and unknown ids give nothing, incomplete UTF-8 gives U+FFFD."""
        numbers = ids.tolist() if isinstance(ids, np.ndarray) else [int(number) for number in ids]
        text: str = self._tokenizer.decode(numbers, skip_special_tokens=True)
        return text

    def to_json(self) -> str:
        """The text of a Hugging Face tokenizer.json."""
        text: str = self._tokenizer.to_str()
        return text

    @classmethod
    def from_json(cls, text: str) -> Tokenizer:
        """The tokenizer that to_json() wrote. Raises Damaged for what is none."""
        import tokenizers

        try:
            return cls(tokenizers.Tokenizer.from_str(text))
        except Exception as error:  # the library raises bare Exception
            raise Damaged(f"The tokenizer's JSON cannot be read: {error}. Build the data set again.") from error


def train_tokenizer(config: TokenizerConfig, texts: Iterable[str]) -> Tokenizer:
    """A tokenizer of at most config.vocab_size ids (fewer where the texts hold too few pairs), in seconds a few MB.

    The same texts give the same tokenizer. config.file is not looked at (see data_pipelines/tokenizer_file.py).
    """
    from tokenizers import trainers

    byte_characters = _byte_characters()
    tokenizer = _of_bytes()
    if config.name == "bytes":
        tokenizer.add_special_tokens([EOS])
        return Tokenizer(tokenizer)
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        min_frequency=2,
        special_tokens=[EOS],
        initial_alphabet=byte_characters,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return Tokenizer(tokenizer)


def _of_bytes() -> tokenizers.Tokenizer:
    """Ids for the end mark and the 256 bytes, no merges; how text is cut and put together again."""
    import tokenizers
    from tokenizers import Regex, decoders, models, pre_tokenizers

    vocabulary = {EOS: EOS_ID} | {character: 1 + byte for byte, character in enumerate(_byte_characters())}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(WORDS), "isolated"), to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _byte_characters() -> list[str]:
    """The printable character that stands for each byte 0..255 in a byte-level vocabulary (GPT-2's table)."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = (byte for byte in range(_NUM_BYTES) if byte not in printable)
    shifted = {byte: chr(_NUM_BYTES + index) for index, byte in enumerate(others)}
    return [shifted.get(byte, chr(byte)) for byte in range(_NUM_BYTES)]
