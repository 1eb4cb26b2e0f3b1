"""Ridge regression on how often each run of 1 to 6 characters occurs in a SMILES, weighted by how rare it is.

The strength of the ridge is chosen by leaving out each training molecule in turn.
"""

from __future__ import annotations

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import RidgeCV
from sklearn.metrics import r2_score, root_mean_squared_error
from sklearn.pipeline import make_pipeline

from configs.schema import RunConfig
from data_pipelines.shards import Dataset


def baseline(dataset: Dataset, config: RunConfig) -> dict[str, float]:
    """R^2 and root mean square error of the held-out molecules."""
    train, held_out = (
        [(row["smiles"], row["target"]) for row in dataset.rows(part)] for part in ("train", "validation")
    )
    ngrams = TfidfVectorizer(
        analyzer="char", ngram_range=(1, 6), min_df=2, sublinear_tf=True, norm=None, lowercase=False
    )
    model = make_pipeline(ngrams, RidgeCV(np.logspace(0, 6, 25)))
    model.fit([smiles for smiles, _ in train], [target for _, target in train])
    targets, predicted = [target for _, target in held_out], model.predict([smiles for smiles, _ in held_out])
    return {"r2": r2_score(targets, predicted), "rmse": root_mean_squared_error(targets, predicted)}
