"""`xz -9` over all held-out files, one after the other, as one: the strongest of the compressors that every system has.

It may use all of the held-out text as it goes, as a language model within a file does, and more: a model that wins has
brought something with it from the files that it was trained on.
"""

from __future__ import annotations

import lzma

from configs.schema import RunConfig
from data_pipelines.shards import Dataset


def baseline(dataset: Dataset, config: RunConfig) -> dict[str, float]:
    """Bits per byte of the held-out text."""
    tokenizer = dataset.tokenizer
    assert tokenizer is not None
    texts = [tokenizer.decode(tokens).encode() for _, tokens, _ in dataset.documents("validation")]
    raw = b"".join(texts)
    return {"bits_per_byte": 8 * len(lzma.compress(raw, preset=9)) / len(raw)}
