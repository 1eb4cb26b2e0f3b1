"""Logistic regression on which words, and pairs of words, a sentence holds, weighted by how rare they are."""

from __future__ import annotations

from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from configs.schema import RunConfig
from data_pipelines.shards import Dataset


def baseline(dataset: Dataset, config: RunConfig) -> dict[str, float]:
    """Accuracy on the held-out sentences."""
    tokenizer = dataset.tokenizer
    assert tokenizer is not None
    texts, labels = {}, {}
    for part in ("train", "validation"):
        rows = list(dataset.rows(part))
        texts[part] = [tokenizer.decode(row["tokens"]) for row in rows]
        labels[part] = [int(row["label"]) for row in rows]
    model = make_pipeline(
        TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True), LogisticRegression(C=10, max_iter=1000)
    )
    model.fit(texts["train"], labels["train"])
    return {"accuracy": float(model.score(texts["validation"], labels["validation"]))}
