from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from configs.errors import UsageError
from data_pipelines.split import GROUP_RANGE, LOOK_BYTES, Member, Split


def members(shares: list[float], own: str | None = None, num_bytes: int = 10) -> list[Member]:
    return [Member(own, int(share * GROUP_RANGE), num_bytes) for share in shares]


def names(split: Split, rows: list[Member]) -> list[str]:
    return [split.name(row.own, row.group) for row in rows]


def test_a_row_is_held_out_by_its_hash_alone() -> None:
    rows = members([0.05, 0.5, 0.19, 0.2, 0.9])
    assert names(Split.of(rows, 0.2, "s"), rows) == ["validation", "train", "validation", "train", "train"]


@pytest.mark.parametrize("fraction", [1e-9, 0.3, 1 - 1e-9])
def test_both_sides_get_something(fraction: float) -> None:
    rows = members([0.5, 0.4, 0.6, 0.4])
    found = names(Split.of(rows, fraction, "s"), rows)
    assert set(found) == {"train", "validation"}
    assert found[1] == found[3]  # one group
    if fraction < 0.4:
        assert found == ["train", "validation", "train", "validation"]  # the lowest hash
    else:
        assert found == ["validation", "validation", "train", "validation"]  # all but the highest


def test_nothing_moves_when_rows_are_added() -> None:
    generator = random.Random(0)
    rows = members([generator.random() for _ in range(500)])
    before = names(Split.of(rows[:200], 0.1, "s"), rows[:200])
    assert names(Split.of(rows, 0.1, "s"), rows)[:200] == before


def test_no_more_is_read_than_has_to_be() -> None:
    read = []

    def endless() -> Iterator[Member]:
        for number in range(10**9):
            read.append(number)
            yield members([0.9 if number < 30 else 0.01])[0]

    assert Split.of(endless(), 0.1, "s") == Split(0.1)
    assert len(read) == 31
    large = iter(members([0.5, 0.6] * 100, num_bytes=LOOK_BYTES // 10))
    assert Split.of(large, 1e-9, "s").lowest == int(0.5 * GROUP_RANGE)
    assert len(list(large)) > 150


def test_rows_that_name_their_split_are_left_there() -> None:
    rows = [*members([0.5], "test"), *members([0.01], "train"), *members([0.01, 0.9])]
    assert names(Split.of(rows, 0.1, "s"), rows) == ["test", "train", "validation", "train"]
    own = members([0.5, 0.6], "train")
    assert names(Split.of(own, 0.1, "s"), own) == ["train", "train"]  # the source wants nothing held out
    with pytest.raises(UsageError, match=r"none is 'train' \(test, valid\)"):
        Split.of([*members([0.5], "test"), *members([0.5], "valid")], 0.1, "s")


def test_what_cannot_be_split_is_refused() -> None:
    with pytest.raises(UsageError, match="The source s has no rows"):
        Split.of([], 0.1, "s")
    with pytest.raises(UsageError, match="none can be held out"):
        Split.of(members([0.5, 0.5]), 0.1, "s")
    assert Split.of(members([0.5, 0.5]), 0.0, "s").name(None, 0) == "train"
