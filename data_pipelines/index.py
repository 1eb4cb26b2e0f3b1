"""The index of a data set: what is where, with a digest of everything, and one over itself."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import xxhash

from configs.errors import Damaged

FORMAT_VERSION = 1
INDEX_FILE = "index.json"
TOKENIZER_FILE = "tokenizer.json"


@dataclass(frozen=True)
class Block:
    """One record batch: bytes start..stop of a file, rows first_row.. of its split."""

    file: str
    number: int  # within the file
    first_row: int
    rows: int
    start: int
    stop: int
    tokens: int
    text_bytes: int
    xxh3: int


@dataclass(frozen=True)
class Index:
    """All that is known of a data set without reading its Arrow files."""

    name: str
    source: Mapping[str, Any]  # the `data` section it was built from
    token_dtype: str
    vocab_size: int
    eos_id: int
    tokenizer_xxh3: str
    file_sizes: Mapping[str, int]
    splits: Mapping[str, tuple[Block, ...]]

    @property
    def fingerprint(self) -> str:
        """32 hex digits over tokenizer and content: equal for equal data, wherever and whenever it was built."""
        content = [
            FORMAT_VERSION,
            self.tokenizer_xxh3,
            {
                split: [[block.rows, block.tokens, block.xxh3] for block in blocks]
                for split, blocks in self.splits.items()
            },
        ]
        return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())

    def to_json(self) -> str:
        """The text of index.json."""
        content = {
            "format_version": FORMAT_VERSION,
            "fingerprint": self.fingerprint,
            "name": self.name,
            "source": dict(self.source),
            "tokenizer": {"vocab_size": self.vocab_size, "eos_id": self.eos_id, "xxh3": self.tokenizer_xxh3},
            "columns": {"key": "utf8", "tokens": f"list<{self.token_dtype}>", "num_bytes": "int64"},
            "files": dict(self.file_sizes),
            "splits": {split: [_block_to_json(block) for block in blocks] for split, blocks in self.splits.items()},
        }
        return json.dumps({"digest": _digest(content), **content}, indent=1)

    @classmethod
    def from_json(cls, raw: bytes, path: str, remedy: str) -> Index:
        """The index that to_json() wrote. Raises Damaged, with `path` and `remedy`, for anything else."""
        try:
            content = json.loads(raw)
            digest = content.pop("digest")
            version = content["format_version"]
            if version == FORMAT_VERSION and _digest(content) != digest:
                raise Damaged(f"{path} fails its digest. {remedy}")
            if version != FORMAT_VERSION:
                raise Damaged(f"{path} has format version {version}; this program reads {FORMAT_VERSION}. {remedy}")
            return cls(
                name=content["name"],
                source=content["source"],
                token_dtype=content["columns"]["tokens"].removeprefix("list<").removesuffix(">"),
                vocab_size=content["tokenizer"]["vocab_size"],
                eos_id=content["tokenizer"]["eos_id"],
                tokenizer_xxh3=content["tokenizer"]["xxh3"],
                file_sizes=content["files"],
                splits={split: tuple(map(_block_from_json, blocks)) for split, blocks in content["splits"].items()},
            )
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise Damaged(f"{path} cannot be read ({type(error).__name__}: {error}). {remedy}") from error


def _block_to_json(block: Block) -> dict[str, Any]:
    return asdict(block) | {"xxh3": f"{block.xxh3:016x}"}


def _block_from_json(values: Mapping[str, Any]) -> Block:
    return Block(**{**values, "xxh3": int(values["xxh3"], 16)})


def _digest(content: Mapping[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())
