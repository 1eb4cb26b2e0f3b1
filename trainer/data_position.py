"""What a checkpoint says of the data that led to it, and what has changed where it does not fit the data any more."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from configs.errors import UsageError
from configs.schema import flatten
from data_pipelines.sources import READING_SETTINGS

if TYPE_CHECKING:
    from data_pipelines.blocks import Blocks
    from data_pipelines.index import Index

_MOST_SHOWN = 6


def describe(index: Index) -> dict[str, Any]:
    """The data set's parts, each so that a change shows: plain values for a checkpoint."""
    tokenizer = index.tokenizer
    return {
        "source": {key: value for key, value in index.source.items() if key not in READING_SETTINGS},
        "columns": [column.to_json() for column in index.columns],
        "tokenizer": None if tokenizer is None else {"vocab_size": tokenizer.vocab_size, "xxh3": tokenizer.xxh3},
        "splits": {split: _describe_split(blocks) for split, blocks in index.splits.items()},
    }


def _describe_split(blocks: Blocks) -> dict[str, Any]:
    digest = xxhash.xxh3_128()
    for array in (blocks.rows, blocks.tokens, blocks.content_xxh3):
        digest.update(np.ascontiguousarray(array).tobytes())
    return {
        "rows": int(blocks.rows.sum()),
        "tokens": int(blocks.tokens.sum()),
        "bytes": int(blocks.text_bytes.sum()),
        "blocks": len(blocks),
        "content": digest.hexdigest(),
    }


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What `now` has otherwise than `then` (both of `describe`), a clause each; the cause before its consequences."""
    if "sources" in then or "sources" in now:
        return _differences_of_sources(then, now)
    found = [
        f"data.{key} was {before} and is {after}"
        for key, before, after in _changed(flatten(then.get("source", {})), flatten(now["source"]))
    ]
    columns = [
        {column["name"]: f"{column['dtype']}{column['shape']}" for column in each.get("columns", ())}
        for each in (then, now)
    ]
    found += [f"column '{name}' was {before} and is {after}" for name, before, after in _changed(*columns)]
    found += _tokenizer_differences(then.get("tokenizer"), now["tokenizer"])
    for split, before, after in _changed(then.get("splits", {}), now["splits"]):
        if not isinstance(before, Mapping) or not isinstance(after, Mapping):
            found.append(f"split '{split}' is {'new' if isinstance(after, Mapping) else 'gone'}")
            continue
        counts = [(name, before.get(name), after.get(name)) for name in ("rows", "tokens", "bytes", "blocks")]
        changed = [f"{was:,} {name} and has {now_:,}" for name, was, now_ in counts if was != now_]
        what = f"had {', '.join(changed)}" if changed else "has as many rows and tokens, but other content"
        found.append(f"split '{split}' {what}")
    return found[:_MOST_SHOWN]


def check_buckets(then: Mapping[str, Any] | None, now: Mapping[str, Any] | None, position: int, source: str) -> None:
    """Refuse to go on inside a window of buckets whose order is another one now (both as RunData.state has them).

    Raises UsageError: some examples of the window would come twice, and others not at all.
    """
    inside = [each for each in (then, now) if each is not None and each["window"][1] > position]
    if then == now or not inside:
        return
    raise UsageError(
        f"{source} stands at position {position:,}, among examples that are sorted by length: {_named(then)} then, "
        f"{_named(now)} now. In another order some of them would be seen twice and others not at all. Set "
        "batch.global_batch_size and batch.micro_batch_size as they were, and let changes of a mixture begin at "
        f"position {max(each['window'][1] for each in inside):,} or later; or take the weights alone (train --from "
        "without --branch)."
    )


def _named(buckets: Mapping[str, Any] | None) -> str:
    if buckets is None:
        return "not at all"
    sizes, (start, stop) = f"{buckets['global_batch_size']} and {buckets['micro_batch_size']}", buckets["window"]
    return f"by '{buckets['column']}' in batches of {sizes}, positions {start:,} to {stop:,}"


def _differences_of_sources(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Of mixtures."""
    before, after = (each.get("sources", [each]) for each in (then, now))
    if len(before) != len(after):
        return [f"there were {len(before)} sources and are {len(after)}"]
    pairs = enumerate(zip(before, after, strict=True))
    found = [f"source {number}: {change}" for number, pair in pairs for change in differences(*pair)]
    return found[:_MOST_SHOWN]


def _tokenizer_differences(then: Mapping[str, Any] | None, now: Mapping[str, Any] | None) -> list[str]:
    if then == now:
        return []
    if then is None or now is None:
        return [f"the data was {'not ' * (then is None)}tokenized"]
    if then["vocab_size"] != now["vocab_size"]:
        return [f"the tokenizer had {then['vocab_size']:,} ids and has {now['vocab_size']:,}"]
    return ["the tokenizer is another one of the same size"]


def _changed(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    names = dict.fromkeys([*then, *now])
    pairs = [(name, then.get(name, "unset"), now.get(name, "unset")) for name in names]
    return [(name, before, after) for name, before, after in pairs if before != after]
