"""The table of results: each small recipe of real data has a row, and each row a recipe and a baseline."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest

from configs.load import recipe_names

ROOT = Path(__file__).parent.parent
WITHOUT = {  # no data of their own, or no small machine's work
    "image_classification-cnn-folder",
    "language_modeling-gpt-124m",
    "language_modeling-gpt-1b",
    "language_modeling-gpt-7b",
    "language_modeling-gpt-70b",
}


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "benchmarks" / "results.py"))


def test_rows_and_recipes_are_the_same(script: dict[str, Any]) -> None:
    assert {row.recipe for row in script["ROWS"]} == set(recipe_names()) - WITHOUT


def test_each_row_has_a_baseline(script: dict[str, Any]) -> None:
    for row in script["ROWS"]:
        assert (ROOT / "benchmarks" / "baselines" / f"{script['task_of'](row)}.py").exists(), row.recipe


def test_the_page_shows_the_median_and_the_range_beside_the_baseline(script: dict[str, Any]) -> None:
    seeds = {str(seed): {"accuracy": value, "wall_s": 10.0} for seed, value in enumerate((0.9, 0.7, 0.8))}
    entry = {"seeds": seeds, "baseline": {"accuracy": 0.75}, "commit": "abc1234"}
    page = script["page"]({"image_classification-cnn-digits": entry})
    (line,) = [line for line in page.splitlines() if "cnn-digits" in line]
    assert "| accuracy | 0.8 (0.7 to 0.9) | 0.75 | 0.98 | 10 | abc1234 |" in line
