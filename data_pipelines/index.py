"""The index of a data set: what is where, with a digest of everything, and one over itself.

Two files: `blocks.arrow` holds an array a fact, one entry a block; `index.json`, written last, holds all else, and
where in blocks.arrow each array begins, so that it is mapped and read with numpy alone. A third one has the lengths of
rows (lengths.py), and is read where they are asked for. Opening a data set of a million
blocks takes milliseconds and reads no shard. docs/data.md describes both files byte by byte.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import xxhash

from configs.errors import Damaged, NotFound
from data_pipelines import blocks_file
from data_pipelines.blocks import Blocks
from data_pipelines.blocks_file import BLOCKS_FILE, REBUILD, count_of, counts_of, typed
from data_pipelines.columns import PAIR, Column, num_buffers
from data_pipelines.damage import DamagePolicy
from data_pipelines.ranges import Counters, RangeReader
from data_pipelines.storage import Store

__all__ = [
    "BLOCKS_FILE",
    "FORMAT_VERSION",
    "INDEX_FILE",
    "REBUILD",
    "TOKENIZER_FILE",
    "Index",
    "PackingFacts",
    "TokenizerFacts",
]

FORMAT_VERSION = 3
INDEX_FILE = "index.json"
TOKENIZER_FILE = "tokenizer.json"
_NO_INDEX = (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError, IndexError)


@dataclass(frozen=True)
class TokenizerFacts:
    """Of the tokenizer whose ids the data set holds."""

    vocab_size: int
    eos_id: int
    xxh3: str  # XXH3 (128 bits, 32 hex digits) of the bytes of tokenizer.json


@dataclass(frozen=True)
class PackingFacts:
    """The lengths for which the number of best-fit sequences of each block was counted when the data set was built."""

    seq_lens: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Index:
    """All that is known of a data set without reading its Arrow files."""

    name: str
    source: Mapping[str, Any]  # the `data` section it was built from
    columns: tuple[Column, ...]
    files: Mapping[str, int]  # bytes of each Arrow file by name; Blocks.file counts in this order
    splits: Mapping[str, Blocks]
    tokenizer: TokenizerFacts | None = None
    compression: str | None = None  # None or "zstd"
    quarantined: int = 0  # rows that could not be read
    dropped: Mapping[str, int] = field(default_factory=dict)  # rows left out, by reason
    packing: PackingFacts | None = None
    lengths: str | None = None  # XXH3 (128 bits, 32 hex digits) of lengths.bin; None where there is none

    @cached_property
    def blocks(self) -> Blocks:
        """The blocks of all splits, one split after the other."""
        return Blocks.join(list(self.splits.values()), num_buffers(self.columns), self.compression is not None)

    @cached_property
    def ranges(self) -> dict[str, tuple[int, int]]:
        """First and last-but-one number in `blocks` of each split's blocks."""
        ends = np.cumsum([0, *map(len, self.splits.values())]).tolist()
        return {split: (ends[number], ends[number + 1]) for number, split in enumerate(self.splits)}

    @cached_property
    def ids(self) -> tuple[str, ...]:
        """The columns of the tokenizer's ids, each value led by the end mark."""
        if self.tokenizer is None:
            return ()
        return ("tokens",) if any(column.name == "tokens" for column in self.columns) else PAIR

    @cached_property
    def file_names(self) -> tuple[str, ...]:
        """The Arrow files by number."""
        return tuple(self.files)

    @cached_property
    def fingerprint(self) -> str:
        """32 hex digits over columns, tokenizer and content: equal for equal data, wherever and whenever it was built.

        Where rows are cut into blocks counts; names of files, and compression, do not.
        """
        content = [
            FORMAT_VERSION,
            [column.to_json() for column in self.columns],
            self.tokenizer.xxh3 if self.tokenizer else None,
            {split: _content_digest(blocks) for split, blocks in self.splits.items()},
        ]
        return _digest(content)

    # --- on disk

    def write(self, store: Store) -> None:
        """Write blocks.arrow, then index.json."""
        raw, places = blocks_file.to_arrow(self.blocks)
        store.write_atomic(BLOCKS_FILE, raw)
        blocks = {"size": len(raw), "xxh3": xxhash.xxh3_128_hexdigest(raw), "rows": len(self.blocks), "arrays": places}
        store.write_atomic(INDEX_FILE, self._to_json(blocks))

    def _to_json(self, blocks: Mapping[str, Any]) -> str:
        content = {
            "format_version": FORMAT_VERSION,
            "fingerprint": self.fingerprint,
            "name": self.name,
            "source": dict(self.source),
            "columns": [column.to_json() for column in self.columns],
            "tokenizer": vars(self.tokenizer) if self.tokenizer else None,
            "compression": self.compression,
            "files": dict(self.files),
            "splits": {split: list(cut) for split, cut in self.ranges.items()},
            "blocks": dict(blocks),
            "quarantined": self.quarantined,
            "dropped": dict(self.dropped),
            "packing": list(self.packing.seq_lens) if self.packing else None,
            "lengths": self.lengths,
        }
        return json.dumps({"digest": _digest(content), **content}, indent=1)

    @classmethod
    def read(cls, store: Store, policy: DamagePolicy | None = None) -> Index:
        """The index that write() wrote. policy: how patiently a remote store is read.

        Raises NotFound where there is none, and Damaged for anything that is not whole.
        """
        reader = RangeReader(store, policy or DamagePolicy(), Counters())
        try:
            content = _header_in(reader.read_file(INDEX_FILE), store.path(INDEX_FILE))
        except NotFound:
            raise NotFound(
                f"There is no data set in {store.path()}: it has no {INDEX_FILE}, which a build writes last. Build "
                "the data set again (shardyard data build), or check the path."
            ) from None
        try:
            columns = tuple(Column.from_json(values) for values in content["columns"])
            facts = content["blocks"]
            raw = blocks_file.read_bytes(store, reader, BLOCKS_FILE, count_of(facts["size"]), facts["xxh3"])
            blocks = blocks_file.from_arrow(raw, content, columns)
            blocks_file.check(blocks, content, columns)
            return cls._from_json(content, columns, blocks)
        except _NO_INDEX as error:
            raise Damaged(
                f"{store.path(INDEX_FILE)} is not an index ({type(error).__name__}: {error}). {REBUILD}"
            ) from error

    @classmethod
    def _from_json(cls, content: Mapping[str, Any], columns: tuple[Column, ...], blocks: Blocks) -> Index:
        tokenizer, packing, lengths = content["tokenizer"], content["packing"], content["lengths"]
        index = cls(
            name=typed(content["name"], str),
            source=typed(content["source"], dict),
            columns=columns,
            files=counts_of(content["files"]),
            splits={split: blocks[start:stop] for split, (start, stop) in content["splits"].items()},
            tokenizer=_tokenizer_facts(tokenizer) if tokenizer is not None else None,
            compression=content["compression"],
            quarantined=typed(content["quarantined"], int),
            dropped=counts_of(content["dropped"]),
            packing=PackingFacts(tuple(packing)) if packing is not None else None,
            lengths=typed(lengths, str) if lengths is not None else None,
        )
        index.__dict__["blocks"] = blocks
        index.__dict__["fingerprint"] = typed(content["fingerprint"], str)
        return index


def _digest(content: Any) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())


def _content_digest(blocks: Blocks) -> list[Any]:
    digest = xxhash.xxh3_128()
    for array in (blocks.rows, blocks.tokens, blocks.content_xxh3):
        digest.update(np.ascontiguousarray(array).tobytes())
    return [len(blocks), digest.hexdigest()]


# --- index.json


def _header_in(raw: bytes, path: str) -> dict[str, Any]:
    try:
        content = typed(json.loads(raw), dict)
        digest, version = content.pop("digest"), content["format_version"]
        if version != FORMAT_VERSION:
            raise Damaged(f"{path} has format version {version}; this program reads {FORMAT_VERSION}. {REBUILD}")
        if _digest(content) != digest:
            raise Damaged(f"{path} fails its digest. {REBUILD}")
    except _NO_INDEX as error:
        raise Damaged(f"{path} cannot be read ({type(error).__name__}: {error}). {REBUILD}") from error
    return content


def _tokenizer_facts(values: Mapping[str, Any]) -> TokenizerFacts:
    return TokenizerFacts(count_of(values["vocab_size"]), count_of(values["eos_id"]), typed(values["xxh3"], str))
