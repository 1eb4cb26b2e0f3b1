from __future__ import annotations

import copy
import ctypes
import mmap
import pickle
import random
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash

from configs.errors import Damaged, NotFound, UsageError
from data_pipelines import writer as writer_module
from data_pipelines.blocks import Blocks
from data_pipelines.buffers import Buffers
from data_pipelines.columns import Column, first_buffers
from data_pipelines.damage import BlockDamaged, DamagePolicy
from data_pipelines.diff import diff
from data_pipelines.index import TOKENIZER_FILE, Index
from data_pipelines.inspect import summary
from data_pipelines.rows import Ragged
from data_pipelines.shards import Dataset
from data_pipelines.storage import Store
from tests.data_pipelines.small_sets import COLUMNS, damage, same_rows, some_rows, write_set, write_texts

NAMES = tuple(column.name for column in COLUMNS)
ROWS = {"train": some_rows(150), "validation": some_rows(20, seed=1)}
TEXTS = [f"{number} naïve 日本 😀 " * (number % 9) for number in range(80)]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer_module, "BLOCK_BYTES", 3000)
    monkeypatch.setattr(writer_module, "SHARD_BYTES", 12_000)


@pytest.fixture
def small(tmp_path: Path) -> Dataset:
    return write_set(tmp_path / "set", ROWS)


def folder(dataset: Dataset) -> Path:
    path = dataset.store.local_path()
    assert path is not None
    return path


def file_of(dataset: Dataset, split: str, block: int) -> tuple[Path, int, int]:
    """The file of a block, and its first byte and the one after its last."""
    blocks = dataset.index.splits[split]
    name = dataset.index.file_names[int(blocks.file[block])]
    return folder(dataset) / name, int(blocks.start[block]), int(blocks.stop[block])


# --- what was written is read


def test_rows_come_in_order(small: Dataset) -> None:
    for split in small.splits:
        assert same_rows(list(small.rows(split)), ROWS[split])
    assert small.split("train").num_rows == len(small.split("train")) == 150
    assert len(small.split("train").blocks) > 4 and len(small.index.files) > 3
    assert small.verify() == []


@pytest.mark.parametrize("recycled", [False, True])
def test_any_rows_are_gathered(small: Dataset, recycled: bool) -> None:
    generator, out = np.random.default_rng(0), Buffers() if recycled else None
    for count in (64, 0, 1, 150, 7):
        ids = generator.integers(0, 150, count)
        found = small.split("train").gather(ids, NAMES, out)
        assert tuple(found) == NAMES
        for column in COLUMNS:
            values = found[column.name]
            assert isinstance(values, Ragged) is column.is_ragged and len(values) == count
            for number, row in enumerate(ids.tolist()):
                want: Any = ROWS["train"][row][column.name]
                if isinstance(want, str):
                    want = want.encode()
                got = values[number].tobytes() if isinstance(want, bytes) else values[number]
                assert np.array_equal(got, want) and (isinstance(want, bytes) or got.dtype == column.numpy_dtype)


def test_recycled_memory_is_used_again(small: Dataset) -> None:
    out = Buffers()
    first = small.split("train").gather(np.arange(60), ("image", "tokens"), out)
    held = out.num_bytes
    second = small.split("train").gather(np.arange(60), ("image", "tokens"), out)
    assert out.num_bytes == held
    assert np.shares_memory(first["image"], second["image"])
    assert np.shares_memory(first["tokens"].values, second["tokens"].values)


def test_what_is_gathered_is_a_copy(small: Dataset) -> None:
    split = small.split("train")
    found = split.gather(np.arange(5), NAMES)
    for values in found.values():
        array = values.values if isinstance(values, Ragged) else values
        assert array.flags.writeable and not np.shares_memory(array, split._memory)


def test_a_whole_block_is_read_in_place(small: Dataset) -> None:
    split, row = small.split("train"), 0
    for block in range(len(split.blocks)):
        with split.block(block) as values:
            for number in range(int(split.block_examples[block])):
                assert np.array_equal(values["audio"][number], ROWS["train"][row]["audio"])
                assert np.array_equal(values["image"][number], ROWS["train"][row]["image"])
                row += 1
            for value in values.values():
                array = value.values if isinstance(value, Ragged) else value
                assert array.size == 0 or np.shares_memory(array, split._memory)
                assert not array.flags.writeable
    assert row == 150


def test_lengths_of_lists(small: Dataset) -> None:
    split = small.split("train")
    found = np.concatenate([split.lengths(block, "tokens") for block in range(len(split.blocks))])
    assert found.dtype == np.int32 and found.tolist() == [len(row["tokens"]) for row in ROWS["train"]]


def test_counts_stand_in_the_index(small: Dataset) -> None:
    split = small.split("train")
    assert split.num_tokens == sum(len(row["tokens"]) for row in ROWS["train"])
    assert split.num_bytes == 1500
    assert split.block_examples.sum() == 150 and split.first_rows[0] == 0
    ids = np.arange(150)
    blocks = split.block_of(ids)
    assert np.bincount(blocks).tolist() == split.block_examples.tolist()


@pytest.mark.parametrize("ids", [[-1], [150], [0, 3, 10**12]])
def test_rows_beyond_the_split_are_refused(small: Dataset, ids: list[int]) -> None:
    with pytest.raises(IndexError, match="of 150"):
        small.split("train").gather(np.array(ids), NAMES)


def test_unknown_names_are_refused(small: Dataset) -> None:
    with pytest.raises(NotFound, match="no split 'test'; it has train, validation"):
        small.split("test")
    with pytest.raises(NotFound, match="no column 'imag'; it has key, tokens, image"):
        small.split("train").gather(np.arange(3), ["imag"])
    with pytest.raises(UsageError, match="holds no tokens; its columns are key"):
        small.packed("train", 8)


def test_documents_are_texts_without_the_mark(tmp_path: Path) -> None:
    dataset = write_texts(tmp_path / "texts", {"train": TEXTS})
    assert dataset.tokenizer is not None
    found = [(key, dataset.tokenizer.decode(ids), size) for key, ids, size in dataset.documents("train")]
    assert found == [(f"text {number}", text, len(text.encode())) for number, text in enumerate(TEXTS)]
    packed = dataset.packed("train", 16)
    assert packed.num_tokens == dataset.split("train").num_tokens == sum(len(text.encode()) + 1 for text in TEXTS)


def test_the_values_of_a_block_are_its_stream(tmp_path: Path) -> None:
    """What packing relies on: documents with their marks lie one after the other, and addresses lead there."""
    dataset = write_texts(tmp_path / "texts", {"train": TEXTS})
    split, tokenizer = dataset.split("train"), dataset.tokenizer
    assert tokenizer is not None
    blocks = np.arange(len(split.blocks))
    stream: list[int] = []
    with split.located(blocks) as contents:
        places = contents + split.values_at(blocks, "tokens") - split._base
        for place, count in zip(places.tolist(), split.blocks.tokens.tolist(), strict=True):
            stream += split._memory[place : place + 2 * count].view(np.uint16).tolist()
    assert stream == [token for text in TEXTS for token in (0, *(byte + 1 for byte in text.encode()))]


def test_reading_needs_neither_pyarrow_nor_the_rest(tmp_path: Path) -> None:
    write_set(tmp_path / "set", ROWS)
    script = f"""
import sys
import numpy as np
from data_pipelines.shards import Dataset
split = Dataset.open({str(tmp_path / "set")!r}).split("train")
with split.block(0) as values:
    assert len(values["key"])
assert not sys.modules.keys() & {{"pyarrow", "torch", "tokenizers"}}
split.gather(np.arange(100), {NAMES!r})
assert not sys.modules.keys() & {{"pyarrow", "tokenizers"}}
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_opening_reads_no_arrow_file(small: Dataset) -> None:
    for file in folder(small).glob("train-*.arrow"):
        file.unlink()
    opened = Dataset.open(folder(small))
    assert (opened.fingerprint, opened.splits) == (small.fingerprint, ("train", "validation"))
    assert opened.split("train").num_rows == 150
    assert same_rows(list(opened.rows("validation")), ROWS["validation"])


def test_copies_open_the_data_set_anew(small: Dataset) -> None:
    for other in (copy.deepcopy(small), pickle.loads(pickle.dumps(small))):  # noqa: S301
        assert other.fingerprint == small.fingerprint
        assert same_rows(list(other.rows("validation")), ROWS["validation"])
    skipping = Dataset.open(folder(small), damage=DamagePolicy(action="skip"))
    assert pickle.loads(pickle.dumps(skipping)).damage_policy.action == "skip"  # noqa: S301


def test_a_closed_data_set_may_be_used_again(small: Dataset) -> None:
    before = small.split("train").gather(np.arange(9), ["image"])["image"]
    small.close()
    assert np.array_equal(small.split("train").gather(np.arange(9), ["image"])["image"], before)


def test_several_threads_may_read(small: Dataset) -> None:
    opened = Dataset.open(folder(small))
    ids = np.random.default_rng(0).integers(0, 150, (20, 16))
    expected = [small.split("train").gather(row, ["image"])["image"] for row in ids]
    wrong: list[int] = []

    def read() -> None:
        for row, want in zip(ids, expected, strict=True):
            if not np.array_equal(opened.split("train").gather(row, ["image"])["image"], want):
                wrong.append(1)

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


# --- remote and compressed


@pytest.mark.parametrize("compression", [None, "zstd"])
@pytest.mark.parametrize("place", ["local", "remote"])
def test_a_remote_or_compressed_data_set_gives_the_same(
    tmp_path: Path, remote: Store, small: Dataset, place: str, compression: str | None
) -> None:
    store = remote.child("set") if place == "remote" else Store(tmp_path / "other")
    write_set(store, ROWS, compression=compression)
    other = Dataset.open(store, damage=DamagePolicy(cache_path=str(tmp_path / "cache")))
    assert other.fingerprint == small.fingerprint and other.verify() == []
    for split in small.splits:
        assert same_rows(list(other.rows(split)), ROWS[split])
    ids = np.random.default_rng(0).integers(0, 150, 64)
    ours, theirs = small.split("train").gather(ids, NAMES), other.split("train").gather(ids, NAMES)
    for name in NAMES:
        for one, two in zip(ours[name], theirs[name], strict=True):
            assert np.array_equal(one, two)
    assert summary(other)["splits"] == summary(small)["splits"] | {
        split: {**counts, "stored_bytes": summary(other)["splits"][split]["stored_bytes"]}
        for split, counts in summary(small)["splits"].items()
    }
    assert diff(small, other) == {"same": True}
    other.close()


# --- damage


def test_a_damaged_block_is_named_when_it_is_used_and_no_other_suffers(small: Dataset) -> None:
    file, _, stop = file_of(small, "train", 3)
    damage(file, stop - 20)
    opened = Dataset.open(folder(small))
    split = opened.split("train")
    first = int(split.first_rows[3])
    last = first + int(split.block_examples[3]) - 1
    with pytest.raises(BlockDamaged) as error:
        split.gather(np.arange(150), ["label"])
    number = int(split.blocks.number[3])
    keys = f"'{ROWS['train'][first]['key']}' to '{ROWS['train'][last]['key']}'"
    for words in (file.name, f"block {number} ", f"rows {first} to {last}", keys, "shardyard data verify"):
        assert words in str(error.value)
    assert error.value.blocks == (3,) and split.damage.blocks() == [3]
    found = opened.verify()
    assert [(one.file, one.blocks) for one in found] == [(file.name, (number, number))]
    assert f"examples {first} to {last} of train, {keys}" in str(found[0])
    others = np.setdiff1d(np.arange(150), np.arange(first, last + 1))
    assert len(split.gather(others, ["label"])["label"]) == len(others)


@pytest.mark.parametrize("on_disk", [False, True])
def test_a_block_that_is_damaged_in_memory_alone_is_read_from_the_disk(small: Dataset, on_disk: bool) -> None:
    file, start, stop = file_of(small, "train", 2)
    assert small.split("train").name == "train"
    files = small._mapped
    number = list(small.index.files).index(file.name)
    address = files.address + files.offset(number)
    size = files.map(number)
    with file.open("rb") as opened:  # a copy of this process's own, in which the disk is not seen
        private = mmap.MAP_PRIVATE | 0x10
        flags = mmap.PROT_READ | mmap.PROT_WRITE
        assert files._libc.mmap(address, size, flags, private, opened.fileno(), 0) == address
    memory = (ctypes.c_uint8 * size).from_address(address)
    memory[(start + stop) // 2] ^= 1
    if on_disk:
        damage(file, start + 100)
        with pytest.raises(BlockDamaged, match=r"block 2 .* fails its digest"):
            list(small.rows("train"))
    else:
        assert same_rows(list(small.rows("train")), ROWS["train"])


def test_several_damaged_blocks_are_reported_at_once(small: Dataset) -> None:
    for block in (1, 4, 6):
        damage(*file_of(small, "train", block)[:2])
    split = Dataset.open(folder(small), damage=DamagePolicy(action="skip")).split("train")
    with pytest.raises(BlockDamaged) as error:
        split.gather(np.arange(150), ["label"])
    assert error.value.blocks == (1, 4, 6) and split.damage.blocks() == [1, 4, 6]


@pytest.mark.parametrize("seed", range(12))
def test_any_flipped_byte_of_a_block_is_found(small: Dataset, seed: int) -> None:
    generator = random.Random(seed)
    block = generator.randrange(len(small.split("train").blocks))
    file, start, stop = file_of(small, "train", block)
    damage(file, generator.randrange(start, stop))
    opened = Dataset.open(folder(small))
    number = int(opened.index.splits["train"].number[block])
    assert [(one.file, one.blocks) for one in opened.verify()] == [(file.name, (number, number))]
    with pytest.raises(BlockDamaged):
        list(opened.rows("train"))


@pytest.mark.parametrize("keep", [0.0, 0.4, 0.999])
def test_a_truncated_file_is_named_and_the_blocks_before_serve(small: Dataset, keep: float) -> None:
    last = len(small.split("train").blocks) - 1
    file, start, stop = file_of(small, "train", last)
    whole = file.read_bytes()
    file.write_bytes(whole[: int(keep * stop)])
    opened = Dataset.open(folder(small))
    split = opened.split("train")
    with pytest.raises(BlockDamaged, match=rf"{file.name}: block \d+ .*is cut off: the file ends at byte"):
        split.lengths(last, "tokens")
    assert {one.file for one in opened.verify()} == {file.name}
    assert "bytes long instead of" in str(opened.verify()[0])
    if int(keep * stop) >= start and split.blocks.file[last - 1] == split.blocks.file[last]:
        assert split.lengths(last - 1, "tokens").size


def test_a_missing_file_is_named(small: Dataset) -> None:
    (folder(small) / "validation-00000-000.arrow").unlink()
    opened = Dataset.open(folder(small))
    with pytest.raises(BlockDamaged, match=r"validation-00000-000\.arrow: block 0 .*is missing"):
        list(opened.rows("validation"))
    assert str(opened.verify()[0]) == "validation-00000-000.arrow: missing"
    assert same_rows(list(opened.rows("train")), ROWS["train"])


def test_damaged_blocks_that_follow_each_other_are_one(small: Dataset) -> None:
    """Against the blocks one by one, by file."""
    blocks = small.index.splits["train"]
    damaged = [0, 1, 2, 4, 6, 7, 8, 9]
    assert len(blocks) == 10 and len(set(blocks.file.tolist())) > 1
    for block in damaged:
        damage(*file_of(small, "train", block)[:2])
    opened = Dataset.open(folder(small))
    names, first_rows = opened.index.file_names, opened.split("train").first_rows
    expected: list[list[int]] = []
    for block in damaged:
        runs_on = expected and block - 1 == expected[-1][-1] and blocks.file[block] == blocks.file[block - 1]
        expected = [*expected[:-1], [*expected[-1], block]] if runs_on else [*expected, [block]]
    found = opened.verify()
    assert [(one.file, one.blocks, one.rows) for one in found] == [
        (
            names[int(blocks.file[run[0]])],
            (int(blocks.number[run[0]]), int(blocks.number[run[-1]])),
            (int(first_rows[run[0]]), int(first_rows[run[-1]] + blocks.rows[run[-1]] - 1)),
        )
        for run in expected
    ]
    for one in found:
        assert one.rows is not None and one.split == "train" and one.cause == "fails its digest"
        assert one.keys == tuple(ROWS["train"][row]["key"] for row in one.rows)


def test_verify_says_how_far_it_is(small: Dataset) -> None:
    seen: list[int] = []
    small.verify(lambda _, done: seen.append(done))
    assert seen == list(range(1, len(small.index.blocks) + 1))


def test_a_damaged_tokenizer_is_named(tmp_path: Path) -> None:
    dataset = write_texts(tmp_path / "texts", {"train": TEXTS})
    damage(tmp_path / "texts" / TOKENIZER_FILE, 40)
    opened = Dataset.open(folder(dataset))
    with pytest.raises(Damaged, match=r"tokenizer\.json fails its digest"):
        _ = opened.tokenizer
    assert [one.file for one in opened.verify()] == [TOKENIZER_FILE]


@pytest.mark.parametrize("offsets", [[5, 9], [0, -4], [0, 2**31 - 1], [9, 3]])
def test_lists_that_leave_their_block_are_damage_even_with_the_right_digest(tmp_path: Path, offsets: list[int]) -> None:
    """A data set of another writer may lie about its lists; reading beside the block could end the process."""
    rows = [{"key": str(number), "audio": np.zeros((3, 5), np.float32)} for number in range(20)]
    dataset = write_set(tmp_path, {"train": rows}, (COLUMNS[0], Column("audio", "float32", (None, 5))), parts=1)
    file, start, stop = file_of(dataset, "train", 0)
    blocks = dataset.index.splits["train"]
    place = start + int(blocks.content_buffers[0, first_buffers(dataset.index.columns)["audio"]])
    raw = bytearray(file.read_bytes())
    raw[place : place + 8] = np.array(offsets, "<i4").tobytes()
    file.write_bytes(raw)
    arrays = {name: array.copy() for name, array in blocks.arrays().items()}
    arrays["xxh3"][0] = xxhash.xxh3_64_intdigest(bytes(raw[start:stop]))
    changed = {name: getattr(dataset.index, name) for name in Index.__dataclass_fields__}
    Index(**{**changed, "splits": {"train": Blocks.from_arrays(arrays, False)}}).write(Store(tmp_path))
    with pytest.raises(BlockDamaged, match="holds lists beyond its end"):
        Dataset.open(tmp_path).split("train").gather(np.arange(20), ["audio"])
