"""What a data set holds: counts, lengths, examples, and how well general-purpose compressors do on its text."""

from __future__ import annotations

import gzip
import lzma
from collections.abc import Callable, Sequence
from typing import Any, TypedDict

import numpy as np

from configs.errors import UsageError
from data_pipelines.columns import BINARY, TEXT, Column
from data_pipelines.pictures import as_picture, decode_picture, half_blocks
from data_pipelines.shards import Dataset

_LOOKED_AT_BLOCKS = 64
_SHOWN_CHARACTERS = 400
_SHOWN_NUMBERS = 8


class CompressedBits(TypedDict):
    """Bits per byte of each compressor, over so many documents and bytes."""

    gzip: float
    xz: float
    documents: int
    bytes: int


def summary(dataset: Dataset) -> dict[str, Any]:
    """Schema, counts and lengths of each split, the tokenizer, the source; plain JSON values.

    The lengths are read from at most 64 blocks of a split, spread evenly; all else stands in the index.
    """
    index = dataset.index
    return {
        "path": dataset.path,
        "name": index.name,
        "source": dict(index.source),
        "fingerprint": dataset.fingerprint,
        "columns": [column.to_json() for column in index.columns],
        "tokenizer": vars(index.tokenizer) if index.tokenizer else None,
        "compression": index.compression,
        "packing": list(index.packing.seq_lens) if index.packing else None,
        "quarantined": index.quarantined,
        "dropped": dict(index.dropped),
        "splits": {split: _split_summary(dataset, split) for split in dataset.splits},
    }


def _split_summary(dataset: Dataset, split: str) -> dict[str, Any]:
    return counts(dataset, split) | {
        "lengths": {
            column.name: length_histogram(dataset, split, column.name)
            for column in dataset.index.columns
            if column.is_ragged and column.name != "key"
        },
    }


def counts(dataset: Dataset, split: str) -> dict[str, Any]:
    """Rows, tokens, bytes, blocks and files of a split, all from the index."""
    rows, blocks = dataset.split(split), dataset.index.splits[split]
    tokens = rows.num_tokens - rows.num_rows if "tokens" in dataset.index.ids else None  # without end marks
    return {
        "rows": rows.num_rows,
        "tokens": tokens,
        "bytes": rows.num_bytes,
        "bytes_per_token": rows.num_bytes / tokens if tokens else None,
        "blocks": len(blocks),
        "files": len(np.unique(blocks.file)),
        "stored_bytes": int((blocks.stop - blocks.start).sum()),
    }


def length_histogram(dataset: Dataset, split: str, column: str) -> dict[str, Any]:
    """Rows by length in a ragged column (of tokens without the mark): at_least <= length < below, by powers of two.

    {"rows": rows looked at, "is_sample": whether the split has more, "shortest", "longest", "classes": [{"at_least",
    "below", "rows"}, ...]}; empty classes at both ends are left out. Raises ShardyardErrors for blocks that cannot be
    read.
    """
    rows = dataset.split(split)
    number = min(len(rows.blocks), _LOOKED_AT_BLOCKS)
    looked_at = np.arange(number) * len(rows.blocks) // max(number, 1)
    parts = [rows.lengths(block, column) for block in looked_at.tolist()]
    lengths = np.concatenate(parts) if parts else np.empty(0, np.int32)
    if column in dataset.index.ids:
        lengths = lengths - 1
    if not len(lengths):
        return {"rows": 0, "is_sample": False, "shortest": None, "longest": None, "classes": []}
    counts = np.bincount(np.frexp(lengths)[1])  # class c: 2**(c - 1) <= length < 2**c; class 0: length 0
    classes = [
        {"at_least": 2 ** (c - 1) if c else 0, "below": 2**c, "rows": int(counts[c])}
        for c in range(int(np.flatnonzero(counts)[0]), len(counts))
    ]
    return {
        "rows": len(lengths),
        "is_sample": len(lengths) < rows.num_rows,
        "shortest": int(lengths.min()),
        "longest": int(lengths.max()),
        "classes": classes,
    }


# --- examples


def examples(dataset: Dataset, split: str, count: int = 3) -> list[dict[str, Any]]:
    """Rows spread evenly over a split (see examples_of)."""
    return examples_of(dataset, split, _spread(dataset, split, count).tolist())


def examples_of(dataset: Dataset, split: str, numbers: Sequence[int]) -> list[dict[str, Any]]:
    """Rows of a split by number, as plain JSON values.

    Tokens become {"text", "length"}, text {"text", "length"} (its beginning), pictures {"shape", "picture": lines of
    coloured half blocks for a terminal}, other arrays {"shape", "dtype", "first", "least", "greatest"}.
    """
    rows = dataset.split(split)
    found = rows.gather(np.array(numbers, np.int64), [column.name for column in rows.columns])
    return [
        {column.name: _shown(dataset, column, found[column.name][place]) for column in rows.columns}
        for place in range(len(numbers))
    ]


def picture_of(dataset: Dataset, split: str, number: int, column: str) -> np.ndarray | None:
    """The picture in a column of a row, (H, W, 3) uint8; None where there is none."""
    return _picture(dataset.split(split).gather(np.array([number], np.int64), [column])[column][0], dataset, column)


def pictures(dataset: Dataset, split: str, count: int = 3) -> dict[str, np.ndarray]:
    """The pictures among those examples: "<row>-<column>" -> (H, W, 3) uint8. See pictures.png for files of them."""
    rows, ids = dataset.split(split), _spread(dataset, split, count)
    names = [column.name for column in rows.columns if column.dtype in ("uint8", BINARY)]
    found = rows.gather(ids, names)
    shown = {}
    for number, row in enumerate(ids.tolist()):
        for name in names:
            picture = _picture(found[name][number], dataset, name)
            if picture is not None:
                shown[f"{row}-{name}"] = picture
    return shown


def _spread(dataset: Dataset, split: str, count: int) -> np.ndarray:
    """Numbers of so many rows, spread evenly over a split."""
    num_rows = dataset.split(split).num_rows
    count = min(count, num_rows)
    return np.arange(count, dtype=np.int64) * num_rows // max(count, 1)


def _picture(value: Any, dataset: Dataset, name: str) -> np.ndarray | None:
    column = next(column for column in dataset.index.columns if column.name == name)
    if column.dtype == BINARY:
        return decode_picture(value.tobytes())
    return as_picture(value) if column.dtype == "uint8" and column.shape else None


def _shown(dataset: Dataset, column: Column, value: Any) -> Any:
    if column.name in dataset.index.ids and dataset.tokenizer is not None:
        text = dataset.tokenizer.decode(value[1 : 1 + _SHOWN_CHARACTERS])
        return {"text": text[:_SHOWN_CHARACTERS], "length": len(value) - 1}
    if column.dtype == TEXT:
        text = value.tobytes().decode("utf-8")
        return text if column.name == "key" else {"text": text[:_SHOWN_CHARACTERS], "length": len(value)}
    if not column.shape:
        return value.item()
    picture = _picture(value, dataset, column.name)
    if picture is not None:
        return {"shape": list(picture.shape), "picture": half_blocks(picture)}
    if column.dtype == BINARY:
        return {"length": len(value), "first": value[:_SHOWN_NUMBERS].tobytes().hex(" ")}
    return {
        "shape": list(value.shape),
        "dtype": column.dtype,
        "first": value.reshape(-1)[:_SHOWN_NUMBERS].tolist(),
        "least": value.min().item() if value.size else None,
        "greatest": value.max().item() if value.size else None,
    }


# --- compressors


def compressed_bits_per_byte(
    dataset: Dataset, split: str, progress: Callable[[str, int], None] | None = None
) -> CompressedBits:
    """`gzip -9` and `xz -9` of each document by itself: all their compressed bits / all bytes of the documents.

    The texts are decoded from the tokens. Raises NotFound for an unknown split, UsageError for data that is no text,
    Damaged for a broken block.
    """
    if dataset.tokenizer is None or "tokens" not in dataset.index.ids:
        raise UsageError(f"The data set {dataset.path} holds no text in documents. Choose one that does.")
    total_bytes = documents = gzip_bytes = xz_bytes = 0
    for _, tokens, _ in dataset.documents(split):
        text = dataset.tokenizer.decode(tokens).encode("utf-8")
        gzip_bytes += len(gzip.compress(text, compresslevel=9, mtime=0))
        xz_bytes += len(lzma.compress(text, filters=_xz_filters(len(text))))
        total_bytes += len(text)
        documents += 1
        if progress is not None:
            progress("compressing", documents)
    return {
        "gzip": 8 * gzip_bytes / max(total_bytes, 1),
        "xz": 8 * xz_bytes / max(total_bytes, 1),
        "documents": documents,
        "bytes": total_bytes,
    }


def _xz_filters(num_bytes: int) -> list[dict[str, int]]:
    """`xz -9`, but with a dictionary no larger than the document needs: the same output, without clearing 64 MB."""
    dictionary = min(64 << 20, max(4096, 1 << (num_bytes - 1).bit_length())) if num_bytes else 4096
    return [{"id": lzma.FILTER_LZMA2, "preset": 9, "dict_size": dictionary}]
