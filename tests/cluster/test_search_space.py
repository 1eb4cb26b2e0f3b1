from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.search_space import Choice, Range, corners, draw, explore, grid, overrides, split_space
from configs.errors import UsageError
from configs.load import load

SPACE = split_space(
    ["optimizer.lr=log:1e-5:1e-1", "model.dropout=lin:0:0.5", "model.num_layers=int:1:9", "seed=1,2,3"]
)[1]


def within(space: dict[str, Choice | Range], values: dict[str, object]) -> bool:
    return all(
        value in dimension.values
        if isinstance(dimension, Choice)
        else isinstance(value, int | float)
        and dimension.low <= value <= dimension.high
        and (dimension.scale != "int" or isinstance(value, int))
        for value, dimension in ((values[key], dimension) for key, dimension in space.items())
    )


def test_arguments_are_told_apart() -> None:
    fixed, space = split_space(
        [
            "steps=10",
            "optimizer.betas=[0.9,0.95]",
            "data.paths=['a,b']",
            'data.note="a,b"',
            "model.num_layers=2, 4,8",
            "optimizer.betas2=[0.9,0.95],[0.9,0.999]",
            "optimizer.lr=log:1e-4:1e-2",
            "model.dropout=lin:0:0.5",
            "batch.global_batch_size=int:8:64",
            "schedule.name=cosine,null",
        ]
    )
    assert fixed == ["steps=10", "optimizer.betas=[0.9,0.95]", "data.paths=['a,b']", 'data.note="a,b"']
    assert space == {
        "model.num_layers": Choice((2, 4, 8)),
        "optimizer.betas2": Choice(([0.9, 0.95], [0.9, 0.999])),
        "optimizer.lr": Range("log", 1e-4, 1e-2),
        "model.dropout": Range("lin", 0.0, 0.5),
        "batch.global_batch_size": Range("int", 8, 64),
        "schedule.name": Choice(("cosine", None)),
    }


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("optimizer.lr=log:1e-2:1e-4", "is empty: 0.01 is not less than 0.0001"),
        ("optimizer.lr=lin:1:1", "is empty"),
        ("optimizer.lr=log:0:1", "begins above 0"),
        ("model.num_layers=int:1:2.5", "whole numbers"),
        ("optimizer.lr=log:1e-4", "log:LOW:HIGH"),
        ("optimizer.lr=log:low:high", "are numbers"),
        ("optimizer.lr=log(1e-4,1e-2)", "log:LOW:HIGH"),
        ("model.num_layers=2|4|8", "a,b,c for a choice"),
        ("model.num_layers=2,", "a,b,c for a choice"),
        ("model.num_layers=2,,4", "a,b,c for a choice"),
        ("model.num_layers=2,4,2", "lists a value twice"),
        ("resources.workers=1,2", "does not vary resources.workers"),
        ("name=a,b", "does not vary name"),
    ],
)
def test_what_cannot_be_a_space_is_refused(argument: str, said: str) -> None:
    with pytest.raises(UsageError, match=said.replace("(", r"\(")):
        split_space([argument])


def test_a_key_is_given_once() -> None:
    with pytest.raises(UsageError, match="given twice"):
        split_space(["steps=10", "steps=10,20"])


def test_a_grid_is_every_combination_and_has_no_ranges() -> None:
    space = split_space(["a=1,2", "b=x,y,z"])[1]
    points = grid(space)
    assert [tuple(point.values()) for point in points] == [(a, b) for a in (1, 2) for b in "xyz"]
    with pytest.raises(UsageError, match=r"optimizer\.lr is a range"):
        grid(SPACE)


@given(st.integers(), st.integers(1, 20), st.integers(0, 20))
def test_draws_lie_within_the_space_and_a_longer_list_begins_alike(seed: int, count: int, more: int) -> None:
    trials = draw(SPACE, seed, count)
    assert all(within(SPACE, values) for values in trials)
    assert draw(SPACE, seed, count + more)[:count] == trials


@given(st.integers(), st.integers())
def test_exploring_stays_within_the_space_and_moves(seed: int, other: int) -> None:
    values = draw(SPACE, seed, 1)[0]
    rng = random.Random(other)
    for _ in range(20):
        found = explore(SPACE, values, rng)
        assert within(SPACE, found)
        values = found


def test_exploring_moves_a_number_by_a_quarter_and_a_whole_one_by_one_at_least() -> None:
    rng = random.Random(0)
    lr, layers = Range("log", 1e-6, 1.0), Range("int", 1, 100)
    assert {lr.near(1e-3, rng) for _ in range(50)} == {1.25e-3, 8e-4}
    assert {layers.near(2, rng) for _ in range(50)} == {1, 3}
    assert {layers.near(40, rng) for _ in range(50)} == {32, 50}
    assert {Range("lin", -9, 9).near(-4.0, rng) for _ in range(50)} == {-3.2, -5.0}
    assert {Choice((2, 4, 8)).near(8, rng) for _ in range(50)} == {4, 8}


def test_corners_hold_both_ends_of_each_key() -> None:
    for key, dimension in SPACE.items():
        assert set(dimension.ends()) <= {values[key] for values in corners(SPACE)}


@given(st.integers())
def test_a_drawn_value_is_typed_as_an_override_that_means_the_same(seed: int) -> None:
    values = draw(SPACE, seed, 1)[0]
    loaded = load("image_classification-mlp-digits", overrides(values)).config
    assert loaded.optimizer.lr == values["optimizer.lr"]
    assert loaded.seed == values["seed"]
    assert loaded.model.settings["num_layers"] == values["model.num_layers"]
