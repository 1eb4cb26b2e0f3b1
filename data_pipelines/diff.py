"""What differs between two data sets, down to the rows, reading only the blocks that are not in both."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import xxhash

from data_pipelines.rows import Split
from data_pipelines.shards import Dataset

_NAMED_ROWS = 5
Progress = Callable[[str, int], None]


def diff(a: Dataset, b: Dataset, progress: Progress | None = None) -> dict[str, Any]:
    """What differs, as plain JSON values; {"same": True} and nothing else where the contents are equal.

    "columns": {"only_a", "only_b", "changed"}, "tokenizer": [a, b], "source": {setting: [a, b]}, each where it differs;
    "splits": for each that differs {"rows": [a, b], "tokens": ..., "bytes": ..., "blocks": ..., and where both have the
    split "first_block": the first number at which the blocks differ, "only_a", "only_b", "changed": counts of rows by
    key, "examples": the first few keys of each}.

    Rows are compared in the columns that both have. Blocks with equal content are not read. Of the rows of the others,
    the keys and digests are all in memory: some 200 bytes a row.
    Raises ShardyardErrors for blocks that cannot be read.
    """
    if a.fingerprint == b.fingerprint:
        return {"same": True}
    found: dict[str, Any] = {"same": False}
    columns = _columns(a, b)
    if any(columns.values()):
        found["columns"] = columns
    tokenizers = [vars(one.index.tokenizer) if one.index.tokenizer else None for one in (a, b)]
    if tokenizers[0] != tokenizers[1]:
        found["tokenizer"] = tokenizers
    source = _differences(a.index.source, b.index.source)
    if source:
        found["source"] = source
    splits = {split: _split(a, b, split, progress) for split in dict.fromkeys((*a.splits, *b.splits))}
    found["splits"] = {split: differences for split, differences in splits.items() if differences}
    return found


def _columns(a: Dataset, b: Dataset) -> dict[str, Any]:
    ours, theirs = ({column.name: column.to_json() for column in one.index.columns} for one in (a, b))
    return {
        "only_a": [name for name in ours if name not in theirs],
        "only_b": [name for name in theirs if name not in ours],
        "changed": _differences(
            {name: ours[name] for name in ours if name in theirs},
            {name: theirs[name] for name in theirs if name in ours},
        ),
    }


def _differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, list[Any]]:
    return {name: [a.get(name), b.get(name)] for name in dict.fromkeys((*a, *b)) if a.get(name) != b.get(name)}


def _split(a: Dataset, b: Dataset, name: str, progress: Progress | None) -> dict[str, Any]:
    ours, theirs = (one.split(name) if name in one.splits else None for one in (a, b))
    found = {
        "rows": [_of(ours, "num_rows"), _of(theirs, "num_rows")],
        "tokens": [_of(ours, "num_tokens"), _of(theirs, "num_tokens")],
        "bytes": [_of(ours, "num_bytes"), _of(theirs, "num_bytes")],
        "blocks": [None if one is None else len(one.blocks) for one in (ours, theirs)],
    }
    if ours is None or theirs is None:
        return found
    same_columns = ours.columns == theirs.columns
    digests = [_digests(ours), _digests(theirs)]
    if same_columns and digests[0] == digests[1]:
        return {}
    common = Counter(digests[0]) & Counter(digests[1]) if same_columns else Counter()
    shorter = min(map(len, digests))
    first = next((number for number in range(shorter) if digests[0][number] != digests[1][number]), shorter)
    columns = [column.name for column in ours.columns if column in theirs.columns]
    rows = [_rows(one, common, columns, progress) for one in (ours, theirs)]
    return {**found, "first_block": first, **_compare(rows[0], rows[1])}


def _of(split: Split | None, name: str) -> int | None:
    return None if split is None else int(getattr(split, name))


def _digests(split: Split) -> list[tuple[int, int]]:
    """What tells a block's content."""
    return list(zip(split.blocks.content_xxh3.tolist(), split.blocks.content_bytes.tolist(), strict=True))


def _rows(
    split: Split, common: Counter[tuple[int, int]], columns: list[str], progress: Progress | None
) -> dict[str, list[int]]:
    """The digests of the rows by key, of the blocks that are not common to both."""
    left, found, done = Counter(common), dict[str, list[int]](), 0
    for block, digest in enumerate(_digests(split)):
        if left[digest] > 0:
            left[digest] -= 1
            continue
        with split.block(block, columns) as values:
            for row in range(int(split.block_examples[block])):
                key = values["key"][row].tobytes().decode("utf-8") if "key" in values else str(row)
                digest_of_row = xxhash.xxh3_64()
                for value in values.values():
                    digest_of_row.update(np.ascontiguousarray(value[row]).tobytes() + b"\0")
                found.setdefault(key, []).append(digest_of_row.intdigest())
                done += 1
        if progress is not None:
            progress(f"comparing {split.name}", done)
    return found


def _compare(a: Mapping[str, list[int]], b: Mapping[str, list[int]]) -> dict[str, Any]:
    only_a = [key for key in a if key not in b]
    only_b = [key for key in b if key not in a]
    changed = [key for key in a if key in b and sorted(a[key]) != sorted(b[key])]
    named = {"only_a": only_a, "only_b": only_b, "changed": changed}
    return {
        **{name: len(keys) for name, keys in named.items()},
        "examples": {name: keys[:_NAMED_ROWS] for name, keys in named.items() if keys},
    }
