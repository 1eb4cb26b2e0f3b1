"""Copying the source, which names, numbers and commands survive; and the nearest neighbour in a translation memory.

The memory answers a sentence with the translation of the training sentence that is most like it: the cosine of words
and pairs of words, weighed by how rare they are (tf-idf, Salton & Buckley 1988).
"""

from __future__ import annotations

from configs.schema import RunConfig
from data_pipelines.shards import Dataset
from trainer.tasks.machine_translation import translation_scores


def baseline(dataset: Dataset, config: RunConfig) -> dict[str, float]:
    """bleu and chrf of copying; those of the memory by names of their own."""
    sources, references = texts(dataset, "validation")
    known, translations = texts(dataset, "train")
    memory = translation_scores([translations[number] for number in nearest(known, sources)], references)
    return translation_scores(sources, references) | {f"memory_{name}": score for name, score in memory.items()}


def texts(dataset: Dataset, split: str) -> tuple[list[str], list[str]]:
    """Those that are read, and those that are written."""
    tokenizer = dataset.tokenizer
    assert tokenizer is not None
    rows = list(dataset.split(split).rows(("source", "target")))
    return [tokenizer.decode(row["source"]) for row in rows], [tokenizer.decode(row["target"]) for row in rows]


def nearest(known: list[str], asked: list[str]) -> list[int]:
    """For each text that is asked, the number of the one most like it."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
    memory = vectorizer.fit_transform(known)  # rows of length 1
    likeness = vectorizer.transform(asked) @ memory.T
    numbers: list[int] = likeness.toarray().argmax(1).tolist()
    return numbers
