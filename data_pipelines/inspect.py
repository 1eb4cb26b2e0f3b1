"""What a data set holds, and how well general-purpose compressors do on it."""

from __future__ import annotations

import gzip
import lzma
from collections.abc import Callable
from typing import Any, TypedDict

import numpy as np

from data_pipelines.shards import Dataset


class CompressedBits(TypedDict):
    """Bits per byte of each compressor, over so many documents and bytes."""

    gzip: float
    xz: float
    documents: int
    bytes: int


def summary(dataset: Dataset) -> dict[str, Any]:
    """Counts and lengths of each split, the tokenizer's size, the source; plain JSON values."""
    return {
        "path": dataset.path,
        "name": dataset.index.name,
        "source": dict(dataset.index.source),
        "fingerprint": dataset.fingerprint,
        "vocab_size": dataset.index.vocab_size,
        "columns": {"key": "utf8", "tokens": f"list<{dataset.index.token_dtype}>", "num_bytes": "int64"},
        "splits": {split: _split_summary(dataset, split) for split in dataset.splits},
    }


def _split_summary(dataset: Dataset, split: str) -> dict[str, Any]:
    blocks = dataset.blocks(split)
    documents = sum(block.rows for block in blocks)
    tokens = sum(block.tokens for block in blocks)
    text_bytes = sum(block.text_bytes for block in blocks)
    lengths = [np.diff(dataset.read(block).offsets) for block in blocks]
    return {
        "documents": documents,
        "tokens": tokens,
        "bytes": text_bytes,
        "bytes_per_token": text_bytes / tokens if tokens else None,
        "blocks": len(blocks),
        "files": len({block.file for block in blocks}),
        "document_tokens": _length_histogram(np.concatenate(lengths)) if lengths else [],
    }


def _length_histogram(lengths: np.ndarray) -> list[dict[str, int]]:
    """Documents by length: at_least <= tokens < below, for powers of two; empty classes at both ends left out."""
    classes = np.bincount(np.frexp(lengths)[1])  # class c: 2**(c - 1) <= length < 2**c; class 0: length 0
    first = int(np.flatnonzero(classes)[0])
    return [
        {"at_least": 2 ** (c - 1) if c else 0, "below": 2**c, "documents": int(classes[c])}
        for c in range(first, len(classes))
    ]


def compressed_bits_per_byte(
    dataset: Dataset, split: str, progress: Callable[[str, int], None] | None = None
) -> CompressedBits:
    """`gzip -9` and `xz -9` of each document by itself: all their compressed bits / all bytes of the documents.

    The texts are decoded from the tokens. Raises NotFound for an unknown split, Damaged for a broken block.
    """
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
