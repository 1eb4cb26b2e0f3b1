from __future__ import annotations

import contextlib
import errno
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from configs.errors import Damaged, ShardyardError, TimedOut, Unreachable, UsageError
from data_pipelines import block_cache, cache, local_files, ranges, writer
from data_pipelines.block_cache import BlockCache, CacheFull, block_name
from data_pipelines.damage import BlockDamaged, DamagePolicy
from data_pipelines.fetch import BlockFetcher
from data_pipelines.shards import Dataset
from data_pipelines.storage import Store
from tests.data_pipelines.small_sets import same_rows, some_rows, write_set

PAGE = 4096


def a_block(number: int, size: int = PAGE) -> tuple[str, bytes]:
    """A name and a content, different for each number."""
    return block_name((number + 1) << 40, size), random.Random(number).randbytes(size)


def fill(blocks: BlockCache, *numbers: int) -> None:
    for number in numbers:
        name, content = a_block(number)
        blocks.put(name, content, pin=False, wait_s=0)
        os.utime(blocks.folder / name, (number, number))  # the order of use


def there(blocks: BlockCache) -> list[int]:
    """Numbers of the blocks in the folder."""
    return [number for number in range(100) if a_block(number)[0] in blocks]


def disk_bytes(folder: Path) -> int:
    """What blocks, whole or half written, take."""
    sizes = []
    for entry in os.scandir(folder):
        with contextlib.suppress(FileNotFoundError):  # it may be evicted meanwhile
            sizes.append(entry.stat().st_size if ".block" in entry.name else 0)
    return sum(-(-size // PAGE) * PAGE for size in sizes)


@pytest.fixture
def open_cache(tmp_path: Path) -> Iterator[Callable[..., BlockCache]]:
    """Opens the same folder again and again, as several processes would."""
    opened: list[BlockCache] = []

    def make(pages: int = 8) -> BlockCache:
        opened.append(BlockCache(tmp_path / "cache", pages * PAGE))
        return opened[-1]

    yield make
    for one in opened:
        one.close()


Open = Callable[..., BlockCache]


# --- the folder


def test_a_block_comes_back_as_it_was(open_cache: Open) -> None:
    first, second = open_cache(), open_cache()
    name, content = a_block(1, 5000)
    assert first.pin(name) is None and name not in second
    first.put(name, content, pin=False)
    descriptor = second.pin(name)
    assert descriptor is not None and os.pread(descriptor, 9999, 0) == content
    os.close(descriptor)
    second.unpin(name)


def test_the_limit_is_held_and_what_was_used_longest_ago_goes_first(open_cache: Open) -> None:
    blocks = open_cache(pages=4)
    fill(blocks, 1, 2, 3, 4)
    os.close(blocks.pin(a_block(1)[0]))  # type: ignore[arg-type]
    blocks.unpin(a_block(1)[0])
    fill(blocks, 5)
    assert there(blocks) == [1, 3, 4, 5]
    assert disk_bytes(blocks.folder) == blocks.used_bytes() == 4 * PAGE
    assert blocks.evictions == 1


def test_room_is_made_for_many_at_once_where_blocks_are_small(open_cache: Open) -> None:
    blocks = open_cache(pages=64)
    fill(blocks, *range(65))
    assert there(blocks) == list(range(2, 65))


def test_what_another_process_has_pinned_stays(open_cache: Open) -> None:
    mine, other = open_cache(pages=3), open_cache(pages=3)
    fill(mine, 1, 2, 3)
    for number in (1, 2):
        os.close(other.pin(a_block(number)[0]))  # type: ignore[arg-type]
    fill(mine, 4)
    assert there(mine) == [1, 2, 4]
    other.unpin(a_block(1)[0])
    os.utime(mine.folder / a_block(1)[0], (1, 1))
    fill(mine, 5)
    assert there(mine) == [2, 4, 5]


def test_where_all_is_pinned_nothing_is_evicted_and_the_remedy_is_named(open_cache: Open) -> None:
    blocks = open_cache(pages=2)
    for number in (1, 2):
        name, content = a_block(number)
        blocks.put(name, content, pin=True)
    with pytest.raises(UsageError, match=r"limit is 8192 bytes.*Raise data.cache_bytes"):
        fill(blocks, 3)
    assert there(blocks) == [1, 2]
    with pytest.raises(UsageError, match="9000 bytes finds no room"):
        blocks.put(*a_block(4, 9000), pin=False)


def test_it_waits_for_room_that_another_process_gives_up(open_cache: Open) -> None:
    mine, other = open_cache(pages=1), open_cache(pages=1)
    other.put(*a_block(1), pin=True)
    writing = threading.Thread(target=lambda: mine.put(*a_block(2), pin=False))
    writing.start()
    assert there(mine) == [1]
    other.unpin(a_block(1)[0])
    writing.join(30)
    assert there(mine) == [2]


def test_a_pin_counts(open_cache: Open) -> None:
    mine, other = open_cache(pages=1), open_cache(pages=1)
    mine.put(*a_block(1), pin=True)
    os.close(mine.pin(a_block(1)[0]))  # type: ignore[arg-type]
    mine.unpin(a_block(1)[0])
    with pytest.raises(UsageError):
        fill(other, 2)
    mine.unpin(a_block(1)[0])
    fill(other, 2)
    assert there(other) == [2]


def test_files_of_others_are_never_deleted(open_cache: Open) -> None:
    blocks = open_cache(pages=2)
    strangers = [
        "model.safetensors",
        "0123456789abcdef.block",
        "train-00000-000.arrow",
        "0123456789abcdef-12.block.bak",
    ]
    for name in strangers:
        (blocks.folder / name).write_bytes(bytes(3 * PAGE))
    (blocks.folder / "0123456789abcde0-4096.blocks").mkdir()
    fill(blocks, *range(1, 9))
    again = open_cache(pages=1)
    fill(again, 9)
    assert set(strangers) <= set(os.listdir(blocks.folder))
    assert there(blocks) == [9]


def test_one_claims_a_block_at_a_time(open_cache: Open) -> None:
    mine, other = open_cache(), open_cache()
    name, another = a_block(1)[0], a_block(2)[0]
    with (
        mine.claim(name) as first,
        other.claim(name) as second,
        mine.claim(name) as third,
        other.claim(another) as fourth,
    ):
        assert (first, second, third, fourth) == (True, False, False, True)
    with other.claim(name) as now:
        assert now


def test_a_block_that_came_twice_is_kept_once(open_cache: Open) -> None:
    mine, other = open_cache(), open_cache()
    for one in (mine, other):
        one.put(*a_block(1), pin=False)
    assert there(mine) == [1]
    assert disk_bytes(mine.folder) == mine.used_bytes() == PAGE


def full_disk(monkeypatch: pytest.MonkeyPatch, folder: Path, free_bytes: int) -> None:
    """From now on the folder's disk has room for so many bytes of blocks."""
    write = os.write

    def bounded(descriptor: int, data: Any) -> int:
        if ".block" in os.readlink(f"/proc/self/fd/{descriptor}") and disk_bytes(folder) + len(data) > free_bytes:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, data)

    monkeypatch.setattr(local_files.os, "write", bounded)


def test_on_a_full_disk_the_cache_gives_up_some_of_its_own(open_cache: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = open_cache(pages=8)
    fill(blocks, 1, 2, 3, 4)
    full_disk(monkeypatch, blocks.folder, 4 * PAGE)
    fill(blocks, 5)
    assert there(blocks) == [3, 4, 5]
    assert disk_bytes(blocks.folder) == blocks.used_bytes() <= 4 * PAGE


def test_on_a_full_disk_with_nothing_to_give_up_it_says_so_and_leaves_nothing(
    open_cache: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = open_cache(pages=8)
    full_disk(monkeypatch, blocks.folder, 0)
    with pytest.raises(CacheFull):
        fill(blocks, 1)
    assert disk_bytes(blocks.folder) == blocks.used_bytes() == 0
    assert not [name for name in os.listdir(blocks.folder) if ".tmp-" in name]


def test_a_folder_that_cannot_be_used_is_explained(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ShardyardError, match=r"cannot use the block cache|Cannot use the block cache"):
        BlockCache(tmp_path / "file" / "cache", PAGE)
    with pytest.raises(UsageError, match="cache_bytes=0"):
        BlockCache(tmp_path / "cache", 0)


def test_a_process_that_holds_the_lock_for_ever_is_reported(open_cache: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    mine, other = open_cache(), open_cache()
    monkeypatch.setattr(block_cache, "LOCK_WAIT_S", 0.01)
    with other._locked(), pytest.raises(TimedOut, match=r"locked for 0.01 s by another process"):
        fill(mine, 1)


def test_a_lost_or_torn_count_is_made_anew(open_cache: Open) -> None:
    blocks = open_cache(pages=4)
    fill(blocks, 1, 2, 3)
    for torn in (b"", b"12x"):
        (blocks.folder / "used_bytes").write_bytes(torn)
        fill(blocks, 4 + len(torn))
        assert disk_bytes(blocks.folder) == blocks.used_bytes() <= 4 * PAGE
    (blocks.folder / "used_bytes").unlink()
    assert open_cache(pages=4).used_bytes() == disk_bytes(blocks.folder)


# --- processes that die

KILLED = """
import os, signal, sys
from pathlib import Path
from data_pipelines import block_cache
from data_pipelines.block_cache import BlockCache, block_name
blocks = BlockCache(Path(sys.argv[1]), 4 * 4096)
die = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
name = block_name(7 << 40, 4096)
if sys.argv[2] == "writing":
    block_cache.write_all = lambda descriptor, content: (os.write(descriptor, content[:100]), die())
    blocks.put(name, bytes(4096), pin=True)
if sys.argv[2] == "pinning":
    blocks.put(name, bytes(4096), pin=True)
    die()
if sys.argv[2] == "claiming":
    with blocks.claim(name) as mine:
        die()
if sys.argv[2] == "locking":
    with blocks._locked():
        die()
"""


@pytest.mark.parametrize("when", ["writing", "pinning", "claiming", "locking"])
def test_a_killed_process_leaves_nothing_behind_that_matters(open_cache: Open, when: str) -> None:
    blocks = open_cache(pages=4)
    killed = subprocess.run([sys.executable, "-c", KILLED, str(blocks.folder), when], check=False)
    assert killed.returncode == -signal.SIGKILL
    name = block_name(7 << 40, PAGE)
    with blocks.claim(name) as mine:
        assert mine
    if name in blocks:
        os.utime(blocks.folder / name, (1, 1))  # the first to go, unless it is still pinned
    fill(blocks, 11, 12, 13, 14)
    assert there(blocks) == [11, 12, 13, 14] and name not in blocks
    assert disk_bytes(blocks.folder) == blocks.used_bytes() == 4 * PAGE
    assert not [name for name in os.listdir(blocks.folder) if ".tmp-" in name]
    assert open_cache(pages=4).sharers == 2  # this one and the one before


def test_what_a_living_process_is_writing_is_left_alone(open_cache: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    mine, other = open_cache(pages=4), open_cache(pages=4)
    write_all = block_cache.write_all

    def slowly(descriptor: int, content: bytes) -> None:
        monkeypatch.setattr(block_cache, "write_all", write_all)
        write_all(descriptor, content[:100])
        fill(other, 11, 12, 13, 14)  # lists the folder and makes room
        write_all(descriptor, content[100:])

    monkeypatch.setattr(block_cache, "write_all", slowly)
    mine.put(*a_block(1), pin=False)
    assert (mine.folder / a_block(1)[0]).read_bytes() == a_block(1)[1]
    assert disk_bytes(mine.folder) <= 4 * PAGE


# --- blocks of a data set


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "BLOCK_BYTES", 3000)
    monkeypatch.setattr(ranges, "FIRST_PAUSE_S", 0.001)


ROWS = some_rows(200)


@pytest.fixture(params=[None, "zstd"])
def stored(request: pytest.FixtureRequest, remote: Store) -> Dataset:
    return write_set(remote, {"train": ROWS}, compression=request.param)


@pytest.fixture
def open_set(tmp_path: Path) -> Iterator[Callable[..., Dataset]]:
    """Opens a data set with a cache of its own."""
    opened: list[Dataset] = []

    def make(store: Store, **policy: Any) -> Dataset:
        settings = {"cache_path": str(tmp_path / "blocks"), "cache_bytes": 1 << 20} | policy
        opened.append(Dataset.open(store, damage=DamagePolicy(**settings)))
        return opened[-1]

    yield make
    for one in opened:
        one.close()
    block_cache.shared_cache.cache_clear()


OpenSet = Callable[..., Dataset]


def source_of(opened: Dataset) -> cache.CachedBlocks:
    source = opened.split("train").source
    assert isinstance(source, cache.CachedBlocks)
    return source


def test_rows_are_those_that_were_written(stored: Dataset, open_set: OpenSet, tmp_path: Path) -> None:
    opened = open_set(stored.store)
    assert same_rows(list(opened.rows("train")), ROWS)
    counted = source_of(opened).metrics()
    assert counted["fetches"] == counted["misses"] == len(stored.index.splits["train"])
    again = open_set(stored.store)
    assert same_rows(list(again.rows("train")), ROWS)
    assert source_of(again).metrics()["fetches"] == 0 and source_of(again).metrics()["hit_rate"] == 1
    assert counted["cache_bytes"] == disk_bytes(tmp_path / "blocks")


def test_any_gather_is_that_of_mapped_files_under_a_tight_limit(
    stored: Dataset, open_set: OpenSet, tmp_path: Path
) -> None:
    mapped = write_set(tmp_path / "local", {"train": ROWS}).split("train")
    most = int(stored.index.splits["train"].content_bytes.max())
    limit = 4 * (-(-most // PAGE) * PAGE)
    opened = open_set(stored.store, cache_bytes=limit)
    split = opened.split("train")
    generator = np.random.default_rng(0)
    for _ in range(40):
        block = int(generator.integers(len(split.blocks) - 1))
        first, last = split.first_rows[block], split.first_rows[block] + split.block_examples[block] + 2
        ids = generator.integers(first, min(last, len(ROWS)), 20)
        split.prefetch(generator.integers(0, len(split.blocks), 3))
        got, want = split.gather(ids, ["label", "tokens"]), mapped.gather(ids, ["label", "tokens"])
        assert np.array_equal(got["label"], want["label"])  # type: ignore[arg-type]
        assert all(np.array_equal(a, b) for a, b in zip(got["tokens"], want["tokens"], strict=True))
        assert disk_bytes(tmp_path / "blocks") <= limit
    assert source_of(opened).metrics()["evictions"] > 0


def test_threads_read_the_same_under_a_tight_limit(stored: Dataset, open_set: OpenSet) -> None:
    split = open_set(stored.store, cache_bytes=24 * PAGE).split("train")
    labels = np.array([row["label"] for row in ROWS])
    wrong: list[Any] = []

    def read(seed: int) -> None:
        generator = np.random.default_rng(seed)
        try:
            for _ in range(60):
                ids = np.sort(generator.integers(0, len(ROWS), 2))
                split.prefetch(split.block_of((ids + 9) % len(ROWS)))
                if not np.array_equal(split.gather(ids, ["label"])["label"], labels[ids]):
                    wrong.append(ids)
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong


def test_what_is_prefetched_is_there_when_it_is_asked_for(stored: Dataset, open_set: OpenSet) -> None:
    source = source_of(open_set(stored.store))
    wanted = np.array([3, 1, 4, 1])
    source.prefetch(wanted)
    deadline = time.monotonic() + 30
    while not all(source._name(block) in source._cache for block in (3, 1, 4)):
        assert time.monotonic() < deadline
        time.sleep(0.001)
    source.locate(wanted)
    assert (source.metrics()["hits"], source.metrics()["misses"], source.metrics()["fetches"]) == (3, 0, 3)
    source.release(wanted)


def test_prefetching_takes_no_more_than_a_share_of_the_cache(stored: Dataset, open_set: OpenSet) -> None:
    blocks = stored.index.splits["train"]
    limit = 16 * PAGE
    source = source_of(open_set(stored.store, cache_bytes=limit))
    source.prefetch(np.arange(len(blocks)))
    assert 0 < blocks.content_bytes[list(source._asked)].sum() <= limit // 4


def test_more_than_the_cache_holds_at_once_is_refused(stored: Dataset, open_set: OpenSet) -> None:
    source = source_of(open_set(stored.store, cache_bytes=2 * PAGE))
    with pytest.raises(UsageError, match=r"are read at once.*Raise data.cache_bytes"):
        source.locate(np.arange(len(stored.index.splits["train"])))
    assert not source._held


def test_located_blocks_stay_until_they_are_released(stored: Dataset, open_set: OpenSet, tmp_path: Path) -> None:
    opened = open_set(stored.store, cache_bytes=6 * PAGE)
    source, blocks = source_of(opened), stored.index.splits["train"]
    places = source.locate(np.array([0]))
    content = source.flat()[places[0] : places[0] + blocks.content_bytes[0]]
    kept = content.copy()
    for block in range(1, len(blocks)):
        source.locate(np.array([block]))
        source.release(np.array([block]))
    assert source._name(0) in source._cache and np.array_equal(content, kept)
    assert disk_bytes(tmp_path / "blocks") <= 6 * PAGE
    source.release(np.array([0]))


def test_a_cached_file_that_went_bad_is_fetched_again(stored: Dataset, open_set: OpenSet, tmp_path: Path) -> None:
    first = open_set(stored.store)
    list(first.rows("train"))
    first.close()
    files = sorted((tmp_path / "blocks").glob("*.block"))
    files[0].write_bytes(files[0].read_bytes()[:-1] + b"!")
    files[1].write_bytes(files[1].read_bytes()[:-100])
    again = open_set(stored.store)
    assert same_rows(list(again.rows("train")), ROWS)
    assert source_of(again).metrics()["cache_damaged"] == source_of(again).metrics()["fetches"] == 2


def test_a_full_disk_is_gone_past(
    stored: Dataset, open_set: OpenSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = open_set(stored.store)
    source = source_of(opened)
    full_disk(monkeypatch, tmp_path / "blocks", 0)
    assert same_rows(list(opened.rows("train")), ROWS)
    assert source.metrics()["in_memory"] == len(stored.index.splits["train"])
    assert disk_bytes(tmp_path / "blocks") == 0 and not source._held and not source._arrived


# --- damage and outages


def flip(store: Store, stored: Dataset, block: int) -> None:
    blocks = stored.index.splits["train"]
    name = stored.index.file_names[int(blocks.file[block])]
    raw, position = store.read_bytes(name), int(blocks.stop[block]) - 20
    store.write_atomic(name, raw[:position] + bytes([raw[position] ^ 1]) + raw[position + 1 :])


@pytest.mark.parametrize("action", ["stop", "skip"])
def test_all_damaged_blocks_of_a_read_are_named_and_logged(stored: Dataset, open_set: OpenSet, action: str) -> None:
    for block in (1, 3):
        flip(stored.store, stored, block)
    split = open_set(stored.store, action=action).split("train")
    with pytest.raises(BlockDamaged) as met:
        split.source.locate(np.arange(5))
    assert met.value.blocks == (1, 3) and split.damage.blocks() == [1, 3]
    assert ("data.damage" in str(met.value)) == (action == "stop")
    source = source_of_split(split)
    assert not source._arrived and all(held.users == 0 for held in source._held.values())
    fetches = source.metrics()["fetches"]
    with pytest.raises(BlockDamaged):
        split.source.locate(np.array([1]))
    assert source.metrics()["fetches"] == fetches  # what is known is not fetched again
    split.source.locate(np.array([0, 2, 4]))
    assert source.metrics()["damaged_blocks"] == 2


def source_of_split(split: Any) -> cache.CachedBlocks:
    assert isinstance(split.source, cache.CachedBlocks)
    return split.source


def test_damage_is_found_ahead_of_use(stored: Dataset, open_set: OpenSet) -> None:
    flip(stored.store, stored, 2)
    split = open_set(stored.store, action="skip").split("train")
    split.prefetch(np.arange(4))
    deadline = time.monotonic() + 30
    while split.damage.blocks() != [2]:
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_skipping_ends_where_much_is_gone(stored: Dataset, open_set: OpenSet) -> None:
    split = open_set(stored.store, action="skip").split("train")
    for name in stored.index.file_names:
        stored.store.delete(name)
    with pytest.raises(Damaged, match=r"5 of \d+ blocks are damaged or missing") as met:
        for block in range(len(split.blocks)):
            with pytest.raises(BlockDamaged):
                split.source.locate(np.array([block]))
    assert not isinstance(met.value, BlockDamaged)


def test_an_outage_is_no_damage(stored: Dataset, open_set: OpenSet, monkeypatch: pytest.MonkeyPatch) -> None:
    split = open_set(stored.store, action="skip").split("train")

    def away(self: BlockFetcher, block: int) -> bytes:
        raise Unreachable("the store is away")

    with monkeypatch.context() as patch:
        patch.setattr(BlockFetcher, "content", away)
        with pytest.raises(Unreachable):
            split.source.locate(np.array([0, 1]))
    assert not split.damage.blocks()
    split.source.locate(np.array([0, 1]))  # and when it is back, all is well


# --- several processes

READER = """
import sys, hashlib
import numpy as np
from data_pipelines.damage import DamagePolicy
from data_pipelines.shards import Dataset
folder, blocks, limit, seed = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
split = Dataset.open(folder, damage=DamagePolicy(cache_path=blocks, cache_bytes=limit)).split("train")
print("ready", flush=True)
sys.stdin.readline()
generator, digest = np.random.default_rng(7), hashlib.sha256()
for _ in range(60):
    blocks = generator.integers(0, len(split.blocks), 3)
    split.prefetch((blocks + 1) % len(split.blocks))
    for block, place in zip(blocks, split.source.locate(blocks)):
        digest.update(split.source.flat()[place : place + split.blocks.content_bytes[block]])
    split.source.release(blocks)
print(digest.hexdigest(), int(split.source.metrics()["fetches"]), flush=True)
"""


def start_reader(*arguments: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", READER, *map(str, arguments)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


@pytest.mark.longer
def test_two_processes_share_a_cache_within_its_limit(tmp_path: Path) -> None:
    # Compressed blocks of a local data set go the same way as remote ones, and need no server here.
    stored = write_set(tmp_path / "set", {"train": ROWS}, compression="zstd")
    limit = 9 * PAGE
    folder = tmp_path / "blocks"
    with (
        start_reader(tmp_path / "set", folder, limit, 1) as one,
        start_reader(tmp_path / "set", folder, limit, 2) as two,
    ):
        for reader in (one, two):
            assert reader.stdout is not None and reader.stdin is not None
            assert reader.stdout.readline() == "ready\n"
            reader.stdin.write("\n")
            reader.stdin.flush()
        most = 0
        while one.poll() is None or two.poll() is None:
            most = max(most, seen_bytes(folder))
        results = [reader.stdout.read().split() for reader in (one, two) if reader.stdout is not None]
    assert results[0][0] == results[1][0]
    assert 0 < most <= limit
    assert len(stored.index.splits["train"]) * PAGE > limit  # or nothing had to go


def seen_bytes(folder: Path) -> int:
    """disk_bytes() while others write."""
    total = 0
    for name in os.listdir(folder):
        try:
            size = (folder / name).stat().st_size if ".block" in name else 0
        except FileNotFoundError:
            continue
        total += -(-size // PAGE) * PAGE
    return total


@pytest.mark.longer
def test_one_of_two_processes_fetches_what_both_want(tmp_path: Path) -> None:
    stored = write_set(tmp_path / "set", {"train": ROWS}, compression="zstd")
    folder = tmp_path / "blocks"
    with (
        start_reader(tmp_path / "set", folder, 1 << 24, 1) as one,
        start_reader(tmp_path / "set", folder, 1 << 24, 2) as two,
    ):
        for reader in (one, two):
            assert reader.stdout is not None
            reader.stdout.readline()
        results = [reader.communicate("\n", timeout=60)[0].split() for reader in (one, two)]
    assert results[0][0] == results[1][0]
    assert int(results[0][1]) + int(results[1][1]) <= len(stored.index.splits["train"])


@pytest.mark.longer
def test_a_reader_that_is_killed_in_mid_fetch_harms_nobody(tmp_path: Path) -> None:
    write_set(tmp_path / "set", {"train": ROWS}, compression="zstd")
    folder, limit = tmp_path / "blocks", 9 * PAGE
    for seed in range(3):
        with start_reader(tmp_path / "set", folder, limit, seed) as victim:
            assert victim.stdout is not None and victim.stdin is not None
            victim.stdout.readline()
            victim.stdin.write("\n")
            victim.stdin.flush()
            while not list(folder.glob("*.block*")):
                assert victim.poll() is None
            victim.kill()
    opened = Dataset.open(tmp_path / "set", damage=DamagePolicy(cache_path=str(folder), cache_bytes=limit))
    assert same_rows(list(opened.rows("train")), ROWS)
    assert disk_bytes(folder) <= limit
    assert not list(folder.glob("*.tmp-*")) and len(list((folder / "sharers").iterdir())) == 1
    opened.close()
    block_cache.shared_cache.cache_clear()


def test_a_fork_reads_on_and_leaves_the_parents_pins_alone(stored: Dataset, open_set: OpenSet) -> None:
    opened = open_set(stored.store, cache_bytes=8 * PAGE)
    source = source_of(opened)
    source.locate(np.array([0]))
    child = os.fork()
    if child == 0:
        status = 1
        try:
            source.prefetch(np.array([], np.int64))  # notices the fork
            status = 0 if not source._held and not source._cache._pinned else 2
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    other = BlockCache(source._cache.folder, PAGE)
    with pytest.raises(UsageError):
        other.put(*a_block(1), pin=False, wait_s=0)
    assert source._name(0) in other
    other.close()
