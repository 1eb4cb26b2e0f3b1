"""Counts of the training split, asked for the same hidden tokens: how often a token is, and what stands beside it.

unigram: P(w). bigram: P(w | left) P(w | right) / P(w), as if the neighbours did not depend on each other; each with the
counts of Witten and Bell (1991) below it, where a neighbour is rare. A neighbour that is hidden itself tells nothing.
Both know, as a model learns, that a token that was not replaced by the mark is the right one half of the time.
"""

from __future__ import annotations

import numpy as np

from configs.schema import RunConfig
from data_pipelines.shards import Dataset
from data_pipelines.tokenizer import EOS_ID
from trainer.tasks import masked_language_modeling as task

CHUNK = 512  # sequences that are gathered, or hidden tokens that are told, at a time


def baseline(dataset: Dataset, config: RunConfig) -> dict[str, float]:
    """accuracy and perplexity of the bigrams; of the unigrams with unigram_ before them."""
    settings = task.Config(**config.task.settings)
    size = settings.tokenizer.vocab_size
    pairs = np.zeros((size, size), np.float32)  # [left, right]
    for _, tokens, _ in dataset.documents("train"):
        np.add.at(pairs, (tokens[:-1], tokens[1:]), 1)
        pairs[tokens[-1], EOS_ID] += 1
    unigram = pairs.sum(0) + 1
    unigram[EOS_ID] = 0  # is never hidden
    unigram /= unigram.sum()
    asked, labels = _questions(dataset, settings)
    found = {}
    for name, after, before in (("unigram_", None, None), ("", _smoothed(pairs, unigram), _smoothed(pairs.T, unigram))):
        nats, correct = 0.0, 0
        for start in range(0, len(labels), CHUNK):
            cut = slice(start, start + CHUNK)
            p = _posterior(asked[cut], unigram, after, before)
            nats -= float(np.log(p[np.arange(len(p)), labels[cut]]).sum())
            correct += int((p.argmax(1) == labels[cut]).sum())
        found |= {f"{name}accuracy": correct / len(labels), f"{name}perplexity": float(np.exp(nats / len(labels)))}
    return found


def _questions(dataset: Dataset, settings: task.Config) -> tuple[np.ndarray, np.ndarray]:
    """Of each hidden token: (left, what stands there, right), (N, 3), as a model sees them; and the token, (N,).

    Beyond a sequence's end stands the mark.
    """
    sequences = dataset.packed("validation", settings.seq_len, settings.packing)
    prepare = task.preparation(settings, (), training=False)
    mark = settings.tokenizer.vocab_size
    asked, labels = [], []
    for start in range(0, len(sequences), CHUNK):
        rows = sequences.gather(np.arange(start, min(start + CHUNK, len(sequences))))
        for tokens, valid in zip(rows["tokens"], rows["valid"], strict=True):
            row = prepare({"tokens": tokens, "valid": valid}, np.random.default_rng(0))
            places = np.flatnonzero(row["labels"] != task.IGNORED)
            seen = np.pad(row["tokens"], 1, constant_values=mark)
            asked.append(np.stack([seen[places], seen[places + 1], seen[places + 2]], 1))
            labels.append(row["labels"][places])
    return np.concatenate(asked), np.concatenate(labels)


def _smoothed(counts: np.ndarray, unigram: np.ndarray) -> np.ndarray:
    """P(w | neighbour) / P(w), (V + 1, V): a row for each neighbour, and ones for the mark."""
    total, kinds = counts.sum(1, keepdims=True), (counts > 0).sum(1, keepdims=True)
    given = (counts + kinds * unigram) / np.maximum(total + kinds, 1)
    given[total[:, 0] == 0] = unigram
    return np.vstack([given / np.maximum(unigram, 1e-30), np.ones_like(unigram)])


def _posterior(
    asked: np.ndarray, unigram: np.ndarray, after: np.ndarray | None, before: np.ndarray | None
) -> np.ndarray:
    """P(w), (N, V), of each token that is asked for."""
    left, middle, right = asked.T
    p = np.tile(unigram, (len(asked), 1))
    if after is not None and before is not None:
        p *= after[left] * before[right]
    p /= p.sum(1, keepdims=True)
    shown = np.flatnonzero(middle < len(unigram))  # random as often as unchanged
    p[shown] /= len(unigram)
    p[shown, middle[shown]] *= 1 + len(unigram)
    return p / p.sum(1, keepdims=True)
