"""A tokenizer that was trained elsewhere: read for a data set, and kept in the store for the runs that need it.

Weights know the ids of one tokenizer. Who trains them on other data has to encode that with the same one, so
`task.tokenizer.file` names it, and the digest of the file's bytes is part of the data set's name.
"""

from __future__ import annotations

import json
from typing import Any

import xxhash

from configs.errors import Damaged, UsageError
from data_pipelines import pretrained
from data_pipelines.storage import Store
from data_pipelines.tokenizer import WORDPIECE_MARKS, Tokenizer, TokenizerConfig, train_tokenizer

FOLDER = "tokenizers"  # in the store


def read_tokenizer(config: TokenizerConfig) -> Tokenizer:
    """The tokenizer in config.file, which must be set.

    Raises:
        NotFound: there is no such file. Damaged, UsageError: see parse_tokenizer.
    """
    assert config.file is not None
    return parse_tokenizer(_read(config.file), config.file, config.vocab_size, wordpiece=config.name == "wordpiece")


def parse_tokenizer(text: str | bytes, source: str, vocab_size: int, *, wordpiece: bool = False) -> Tokenizer:
    """The tokenizer of a tokenizer.json; `source` says in messages where it is from.

    Raises:
        Damaged: it is no tokenizer.json.
        UsageError: it is no WordPiece where that is wanted; else, it cuts text in another way than ours do. Or it has
            more than `vocab_size` ids.
    """
    try:
        definition = json.loads(text)
        definition |= {"post_processor": None, "truncation": None, "padding": None}  # marks and lengths are set here
        tokenizer = Tokenizer.from_json(json.dumps(definition))
        if wordpiece:
            model = definition["model"]
            same_kind = model["type"] == "WordPiece" and all(mark in model["vocab"] for mark in WORDPIECE_MARKS)
        else:  # read by the library, so that what a file leaves out has its default
            same_kind = _kind(tokenizer) == _kind(train_tokenizer(TokenizerConfig(name="bytes"), []))
    except (ValueError, TypeError, KeyError, Damaged) as error:
        raise Damaged(
            f"The tokenizer {source} cannot be read: {error.__cause__ or error}. Copy it again, or leave "
            "task.tokenizer.file out to train one on the data."
        ) from error
    if not same_kind and wordpiece:
        raise UsageError(
            f"The tokenizer {source} is no WordPiece with {' and '.join(WORDPIECE_MARKS)}, as a BERT's is. Use the "
            "tokenizer.json of the model that the weights are of."
        )
    if not same_kind:
        raise UsageError(
            f"The tokenizer {source} is of another kind. Use one that Shardyard trained: tokenizer.json in a data "
            "set's folder, or in one of `shardyard export`. For a BERT's, set task.tokenizer.name=wordpiece."
        )
    if tokenizer.vocab_size > vocab_size:
        raise UsageError(
            f"The tokenizer {source} has {tokenizer.vocab_size} ids, more than task.tokenizer.vocab_size={vocab_size}. "
            f"Set task.tokenizer.vocab_size to at least {tokenizer.vocab_size}; with another run's "
            "weights, to what that run has."
        )
    return tokenizer


def file_digest(path: str) -> str:
    """32 hex digits over the bytes of a file at a path or URI. Raises NotFound for none."""
    return xxhash.xxh3_128_hexdigest(_read(path))


def keep_tokenizer(store: Store, tokenizer: Tokenizer) -> str:
    """Write a tokenizer.json into the store, once; its path or URI, for task.tokenizer.file."""
    raw = tokenizer.to_json().encode("utf-8")
    name = f"{xxhash.xxh3_128_hexdigest(raw)}.json"
    folder = store.child(FOLDER)
    if not folder.exists(name):
        folder.write_atomic(name, raw)
    return folder.child(name).uri


def same_ids(one: str, other: str) -> bool:
    """Whether two tokenizers (texts of a tokenizer.json) give the same ids."""
    model: Any = json.loads(one)["model"]
    return bool(model == json.loads(other)["model"])


def _read(path: str) -> bytes:
    if path.startswith(pretrained.SCHEME):
        return pretrained.tokenizer_of(path)
    base, question_mark, query = path.partition("?") if "://" in path else (path, "", "")  # a query is the store's
    folder, slash, name = base.rpartition("/")
    return Store(f"{folder or slash or '.'}{question_mark}{query}").read_bytes(name)


def _kind(tokenizer: Tokenizer) -> Any:
    """What all tokenizers of ours have in common: all but the merged pairs; the bytes, and ids without gaps."""
    definition = json.loads(tokenizer.to_json())
    vocabulary = definition["model"].pop("vocab")
    definition["model"].pop("merges", None)
    marks = sorted(token for token in vocabulary if len(token) == 1)
    complete = sorted(vocabulary.values()) == list(range(len(vocabulary)))
    return definition, marks, complete
