"""Random data sets are read as they were written; damaged ones are read rightly or refused, never wrongly."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from configs.errors import ShardyardError
from data_pipelines import block_cache, block_source, ranges
from data_pipelines import writer as writer_module
from data_pipelines.columns import BINARY, KEY, NUMBERS, TEXT, Column
from data_pipelines.damage import BlockDamaged, DamagePolicy
from data_pipelines.index import BLOCKS_FILE, FORMAT_VERSION, INDEX_FILE
from data_pipelines.lengths import LENGTHS_FILE
from data_pipelines.shards import Dataset
from tests.data_pipelines.small_sets import COLUMNS, same_rows, some_rows, write_set

ROWS = {"train": some_rows(80), "validation": some_rows(9, seed=1)}
QUICK = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

item_shapes = st.lists(st.integers(1, 4), max_size=3)
columns_of_numbers = st.tuples(st.sampled_from(NUMBERS), st.booleans(), item_shapes).map(
    lambda drawn: (drawn[0], ((None,) if drawn[1] else ()) + tuple(drawn[2]))
)
kinds = st.one_of(columns_of_numbers, st.sampled_from([(TEXT, (None,)), (BINARY, (None,))]))


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer_module, "BLOCK_BYTES", 1500)
    monkeypatch.setattr(writer_module, "SHARD_BYTES", 6000)


@pytest.fixture(scope="module", params=[None, "zstd"])
def written(request: pytest.FixtureRequest) -> Iterator[Path]:
    """A data set as on a disk, and one as in an object store, whose blocks are read through a cache."""
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer_module, "BLOCK_BYTES", 1500)
        patch.setattr(writer_module, "SHARD_BYTES", 6000)
        patch.setattr(ranges, "FIRST_PAUSE_S", 0.0005)
        patch.setattr(block_source, "PAUSE_S", 0.0)
        write_set(Path(name) / "set", ROWS, compression=request.param)
        yield Path(name) / "set"
        block_cache.shared_cache.cache_clear()


@contextlib.contextmanager
def opened(folder: Path) -> Iterator[Dataset]:
    """With a cache of its own, which is empty."""
    policy = DamagePolicy(cache_path=str(folder.parent / "cache"), cache_bytes=1 << 20)
    with contextlib.closing(Dataset.open(folder, damage=policy)) as dataset:
        yield dataset


def value_of(column: Column, draw: Any) -> Any:
    if column.dtype == TEXT:
        return draw(st.text(st.characters(exclude_categories=["Cs"]), max_size=20))
    if column.dtype == BINARY:
        return draw(st.binary(max_size=20))
    shape = tuple(draw(st.integers(0, 5)) if size is None else size for size in column.shape)
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    raw = generator.integers(-128, 127, shape)
    array = (raw / 3 if column.dtype.startswith("float") else abs(raw)).astype(column.dtype)
    return array if column.shape else array.item()


@st.composite
def data_sets(draw: Any) -> tuple[tuple[Column, ...], list[dict[str, Any]]]:
    drawn = draw(st.lists(kinds, min_size=1, max_size=4))
    columns = (KEY, *(Column(f"c{number}", dtype, shape) for number, (dtype, shape) in enumerate(drawn)))
    rows = [
        {"key": f"row {number}", **{column.name: value_of(column, draw) for column in columns[1:]}}
        for number in range(draw(st.integers(0, 25)))
    ]
    return columns, rows


@settings(QUICK, max_examples=25)
@given(data=data_sets(), parts=st.integers(1, 3))
def test_any_data_set_is_read_as_it_was_written(
    data: tuple[tuple[Column, ...], list[dict[str, Any]]], parts: int
) -> None:
    columns, rows = data
    with tempfile.TemporaryDirectory() as name:
        dataset = write_set(Path(name), {"train": rows}, columns, parts=parts)
        assert same_rows(list(dataset.rows("train")), rows)
        assert dataset.verify() == []
        ids = np.arange(len(rows))[::-1].copy()
        found = dataset.split("train").gather(ids, [column.name for column in columns])
        for column in columns:
            for number, row in enumerate(ids.tolist()):
                got, want = found[column.name][number], rows[row][column.name]
                if column.dtype in (TEXT, BINARY):
                    got, want = got.tobytes(), want.encode() if isinstance(want, str) else want
                assert np.array_equal(got, want)


@st.composite
def mutations(draw: Any) -> Any:
    """What happens to the bytes of a file: (kind, place as a share of the file, bytes)."""
    kind = draw(st.sampled_from(["flip", "overwrite", "cut", "insert", "delete", "append", "empty", "missing"]))
    return kind, draw(st.floats(0, 1, exclude_max=True)), draw(st.binary(min_size=1, max_size=40))


def mutate(file: Path, kind: str, share: float, extra: bytes) -> None:
    raw = file.read_bytes()
    place = int(share * len(raw))
    changed = {
        "flip": raw[:place] + bytes([raw[place] ^ (extra[0] or 1)]) + raw[place + 1 :],
        "overwrite": raw[:place] + extra + raw[place + len(extra) :],
        "cut": raw[:place],
        "insert": raw[:place] + extra + raw[place:],
        "delete": raw[:place] + raw[place + len(extra) :],
        "append": raw + extra,
        "empty": b"",
    }
    file.unlink()
    if kind != "missing":
        file.write_bytes(changed[kind])


@pytest.mark.parametrize("pattern", [INDEX_FILE, BLOCKS_FILE, LENGTHS_FILE, "train-*.arrow"])
@QUICK
@given(mutation=mutations(), which=st.integers(0, 10))
def test_damage_is_refused_or_does_not_matter(written: Path, pattern: str, mutation: Any, which: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "set"
        shutil.copytree(written, folder)
        files = sorted(folder.glob(pattern))
        file = files[which % len(files)]
        mutate(file, *mutation)
        unharmed = file.exists() and file.read_bytes() == (written / file.name).read_bytes()
        try:
            with opened(folder) as dataset:
                read = {split: list(dataset.rows(split)) for split in dataset.splits}
                lengths = {split: dataset.lengths(split, "tokens")(np.arange(len(ROWS[split]))) for split in ROWS}
                damaged = {found.file for found in dataset.verify()}
        except ShardyardError as error:
            assert not unharmed and file.name in str(error)
            return
        assert all(same_rows(read[split], ROWS[split]) for split in ROWS)
        assert all(lengths[split].tolist() == [len(row["tokens"]) for row in ROWS[split]] for split in ROWS)
        # White space in index.json, and what lies around the blocks of an Arrow file, may change; lengths are verified.
        assert unharmed or pattern not in (BLOCKS_FILE, LENGTHS_FILE)
        assert damaged <= {file.name}


@QUICK
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), split=st.sampled_from(sorted(ROWS)))
def test_one_bit_of_a_block_is_noticed(written: Path, place: float, bit: int, split: str) -> None:
    """And the other blocks are read on."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "set"
        shutil.copytree(written, folder)
        with opened(folder) as dataset:
            blocks = dataset.index.splits[split]
            number = int(place * len(blocks))
            start, stop = int(blocks.start[number]), int(blocks.stop[number])
            file = folder / dataset.index.file_names[int(blocks.file[number])]
            raw = bytearray(file.read_bytes())
            raw[start + int((place * len(blocks) - number) * (stop - start))] ^= 1 << bit
            file.write_bytes(raw)
            for block in range(len(blocks)):
                if block == number:
                    with pytest.raises(BlockDamaged, match="fails its digest"), dataset.split(split).block(block):
                        pass
                    continue
                first = int(blocks.rows[:block].sum())
                with dataset.split(split).block(block, ["label"]) as columns:
                    wanted = [row["label"] for row in ROWS[split][first : first + int(blocks.rows[block])]]
                    assert columns["label"].tolist() == wanted


@QUICK
@given(
    header=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=4)
            | st.dictionaries(
                st.sampled_from(["digest", "format_version", "columns", "blocks", "splits", "files", "x"]),
                inner,
                max_size=6,
            )
        ),
        max_leaves=12,
    )
)
def test_any_json_in_place_of_the_index_is_refused(tmp_path: Path, header: Any) -> None:
    """With the right digest and version, where it is a mapping."""
    import json

    import xxhash

    if isinstance(header, dict):
        header["format_version"] = FORMAT_VERSION
        header.pop("digest", None)
        header["digest"] = xxhash.xxh3_128_hexdigest(json.dumps(header, sort_keys=True).encode())
    (tmp_path / INDEX_FILE).write_text(json.dumps(header))
    (tmp_path / BLOCKS_FILE).write_bytes(b"")
    with pytest.raises(ShardyardError, match=r"index\.json|blocks\.arrow"):
        Dataset.open(tmp_path)


def test_the_columns_of_the_fixed_rows_are_of_every_kind() -> None:
    """Otherwise the damage above would be done to less than there is."""
    assert {column.dtype for column in COLUMNS} >= {TEXT, BINARY, "uint16", "float32", "int64"}
    assert {(column.is_ragged, bool(column.item_shape)) for column in COLUMNS} == {
        (True, True), (True, False), (False, True), (False, False)
    }  # fmt: skip
