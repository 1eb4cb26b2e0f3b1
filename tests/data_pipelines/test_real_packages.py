"""The real packages, over the network: what the sources' docstrings say of them."""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from configs.plugins import plugin_names
from data_pipelines import pretrained
from data_pipelines.tokenizer import TokenizerConfig
from data_pipelines.tokenizer_file import read_tokenizer
from tests.data_pipelines.small_packages import rows

COUNTS: dict[str, tuple[dict[str, Any], dict[str | None, int]]] = {
    "speeches": ({}, {None: 233}),
    "digits": ({}, {None: 1797}),
    "mnist_5k": ({}, {None: 5000}),
    "composed_digits": ({"num_images": 200}, {"train": 180, "validation": 20}),
    "fashion_mnist": ({}, {"train": 60_000, "validation": 10_000}),
    "orl_faces": ({}, {"train": 300, "validation": 100}),
    "lfw_faces": ({}, {None: 200}),
    "moby_dick": ({}, {None: 138}),
    "tree_boxes": ({}, {"train": 114, "validation": 30}),
    "nuclei": ({}, {"train": 12, "validation": 4}),
    "debian_handbook": ({}, {None: 2998}),
    "sentiment": ({}, {None: 14_295}),
    "stamps_speech": ({"language": "es"}, {None: 750}),
    "robot_drive": ({}, {"train": 2897, "validation": 961}),
    "brain_mri": ({}, {"train": 116, "validation": 31}),
    "breast_cancer": ({}, {None: 569}),
    "diabetes": ({}, {None: 442}),
    "actg175": ({}, {None: 2139}),
    "solubility": ({}, {"train": 1022, "validation": 257}),
    "freesolv": ({}, {None: 642}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", COUNTS)
def test_the_real_package_holds_what_its_source_says(name: str) -> None:
    source = importlib.import_module(f"data_pipelines.sources.{name}")
    settings, counts = COUNTS[name]
    found = rows(source, **settings)
    assert Counter(row.split for row in found) == counts
    facts: dict[str, tuple[Callable[[], float], float]] = {
        "speeches": (lambda: sum(len(row.values["text"].encode()) for row in found) / 1e6, 10.8),
        "lfw_faces": (lambda: sum(row.values["label"] for row in found), 100),
        "moby_dick": (lambda: sum(len(row.values["text"].encode()) for row in found) / 1e6, 1.21),
        "tree_boxes": (lambda: sum(len(row.values["boxes"]) for row in found), 874),
        "sentiment": (lambda: 100 * np.mean([row.values["label"] for row in found]), 55.6),
        "breast_cancer": (lambda: sum(row.values["label"] for row in found), 357),
        "robot_drive": (lambda: sum(abs(row.values["forward"]) for row in found) / 1000, 1.9),
        "stamps_speech": (lambda: sum(len(row.values["audio"]) for row in found) / 8000 / 60, 21.9),
    }
    if name in facts:
        measure, expected = facts[name]
        assert measure() == pytest.approx(expected, rel=0.01)


def test_every_source_that_reads_a_package_is_tested() -> None:
    names = [name for name in plugin_names("data_pipelines.sources") if hasattr(_module(name), "PACKAGE")]
    assert set(names) <= set(COUNTS)


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"data_pipelines.sources.{name}")


@pytest.mark.slow
def test_the_models_that_packages_carry() -> None:
    from safetensors import safe_open

    for name in pretrained.MODELS:
        address = f"{pretrained.SCHEME}{name}"
        config = TokenizerConfig(name="wordpiece", vocab_size=30522, file=f"{address}/tokenizer.json")
        (tokens,) = read_tokenizer(config).encode(["Naïve words, unaffable."])
        assert tokens.tolist() == [15743, 2616, 1010, 14477, 20961, 3468, 1012, 102]
        with safe_open(pretrained.weights_of(address), "pt") as file:
            assert file.get_slice("embeddings.word_embeddings.weight").get_shape() == [30522, 384]
