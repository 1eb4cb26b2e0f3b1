from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
import pytest

from configs.errors import NotFound, ShardyardError, Unreachable
from data_pipelines import ranges, writer
from data_pipelines.damage import BlockDamaged, DamagePolicy
from data_pipelines.fetch import BlockFetcher
from data_pipelines.ranges import Counters, RangeReader, Truncated, in_passing, kind_of, pauses
from data_pipelines.shards import Dataset
from data_pipelines.storage import Store
from data_pipelines.time_limit import within
from tests.data_pipelines.small_sets import some_rows, write_set

CONTENT = random.Random(0).randbytes(1000)
FAULTS = {
    "throttled": OSError("AWS Error SLOW_DOWN during GetObject operation: Please reduce your request rate."),
    "failed_requests": OSError("AWS Error INTERNAL_FAILURE during GetObject operation"),
    "stalls": OSError("AWS Error NETWORK_CONNECTION during GetObject operation: curlCode: 28, Timeout was reached"),
    "cut_short": "short",
}


class Scripted:
    """A file system with one file, whose reads go as a script says; then they go well."""

    def __init__(self, *script: Any, content: bytes = CONTENT) -> None:
        self.script = list(script)
        self.content = content
        self.opened = 0
        self.requests: list[tuple[int, int]] = []
        self.released = threading.Event()

    def open_input_file(self, path: str) -> Scripted:
        self.opened += 1
        if not path.endswith("/there"):
            raise FileNotFoundError(path)
        return self

    def size(self) -> int:
        return len(self.content)

    def read_at(self, count: int, start: int) -> bytes:
        self.requests.append((start, count))
        act = self.script.pop(0) if self.script else None
        if isinstance(act, Exception):
            raise act
        if act == "stall":
            self.released.wait(30)
        return self.content[start : start + (count // 2 if act == "short" else count)]


Make = Callable[..., RangeReader]


@pytest.fixture
def reader(monkeypatch: pytest.MonkeyPatch) -> Make:
    """A reader of a scripted file system, with short pauses."""

    def make(file_system: Scripted, **policy: Any) -> RangeReader:
        monkeypatch.setattr(Store, "_remote", property(lambda self: (file_system, "root")))
        return RangeReader(Store("memory://root"), DamagePolicy(**policy), Counters(), seed=1)

    monkeypatch.setattr(ranges, "FIRST_PAUSE_S", 0.001)
    return make


# --- pauses


def test_pauses_double_up_to_a_limit_with_jitter_fixed_by_the_seed() -> None:
    found = list(islice(pauses("a"), 12))
    longest = 0.1
    for pause in found:
        assert longest / 2 <= pause <= longest
        longest = min(10.0, 2 * longest)
    assert found == list(islice(pauses("a"), 12)) != list(islice(pauses("b"), 12))


# --- ranges


@pytest.mark.parametrize("kind", FAULTS)
def test_a_fault_in_passing_is_survived_and_counted(reader: Make, kind: str) -> None:
    file_system = Scripted(FAULTS[kind], FAULTS[kind])
    ranged = reader(file_system)
    assert ranged.read("there", 100, 300) == CONTENT[100:300]
    counted = ranged._counters.values()
    assert (counted["requests"], counted["retries"], counted[kind], counted["fetched_bytes"]) == (3, 2, 2, 200)
    assert file_system.opened == 3  # a connection that failed is not used again


def test_an_open_file_is_kept(reader: Make) -> None:
    file_system = Scripted()
    ranged = reader(file_system)
    assert [ranged.read("there", start, start + 5) for start in (0, 5)] == [CONTENT[:5], CONTENT[5:10]]
    assert file_system.opened == 1


def test_a_silent_read_is_abandoned_and_made_again(reader: Make) -> None:
    file_system = Scripted("stall")
    ranged = reader(file_system, stall_s=0.05)
    try:
        assert ranged.read("there", 0, 10) == CONTENT[:10]
        assert ranged._counters.values()["stalls"] == 1
        assert len(file_system.requests) == 2  # while the first one still hangs
    finally:
        file_system.released.set()


def test_the_budget_ends_in_unreachable_and_a_remedy(reader: Make) -> None:
    ranged = reader(Scripted(*[FAULTS["throttled"]] * 1000), retry_s=0.05)
    with pytest.raises(
        Unreachable, match=r"memory://root/there could not be read: \d+ tries.*SLOW_DOWN.*retry_s"
    ) as met:
        ranged.read("there", 0, 10)
    assert isinstance(met.value.__cause__, OSError)
    assert ranged._counters.values()["retries"] > 1


def test_success_begins_a_new_budget(reader: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(ranges.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(RangeReader, "pause", lambda self, seconds: clock.__setitem__(0, clock[0] + 40))
    fault = FAULTS["throttled"]
    ranged = reader(Scripted(fault, fault, None, fault, fault, None), retry_s=100.0)
    assert [ranged.read("there", 0, 9) for _ in range(2)] == [CONTENT[:9]] * 2


def test_no_access_is_told_at_once(reader: Make) -> None:
    file_system = Scripted(OSError("AWS Error ACCESS_DENIED during GetObject operation: Access Denied"))
    with pytest.raises(ShardyardError, match=r"memory://root/there: .*ACCESS_DENIED.*credentials"):
        reader(file_system).read("there", 0, 10)
    assert len(file_system.requests) == 1


def test_what_is_not_there_is_told_at_once(reader: Make) -> None:
    file_system = Scripted()
    with pytest.raises(NotFound, match="memory://root/none"):
        reader(file_system).read("none", 0, 10)
    with pytest.raises(Truncated) as met:
        reader(file_system).read("there", 990, 1001)
    assert met.value.size == 1000
    assert not file_system.requests


def test_a_long_range_is_read_in_requests_and_only_what_failed_again(
    reader: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranges, "REQUEST_BYTES", 300)
    file_system = Scripted(None, FAULTS["throttled"])
    assert reader(file_system).read("there", 10, 1000) == CONTENT[10:]
    assert file_system.requests == [(10, 300), (310, 300), (310, 300), (610, 300), (910, 90)]


def test_closing_ends_the_wait_for_another_try(reader: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranges, "FIRST_PAUSE_S", 100.0)
    file_system = Scripted(*[FAULTS["throttled"]] * 10)
    ranged = reader(file_system, retry_s=1e6)
    met: list[Exception] = []

    def read() -> None:
        try:
            ranged.read("there", 0, 10)
        except ShardyardError as error:
            met.append(error)

    thread = threading.Thread(target=read)
    thread.start()
    while not file_system.requests:
        time.sleep(0.001)
    ranged.close()
    thread.join(20)
    assert not thread.is_alive() and isinstance(met[0], Unreachable)


def test_within_passes_results_and_errors_on() -> None:
    assert within(5, lambda: 7) == 7
    with pytest.raises(ZeroDivisionError):
        within(5, lambda: 1 // 0)


def test_kinds_of_errors() -> None:
    assert in_passing(ConnectionResetError("reset")) and kind_of(ConnectionResetError("reset")) == "failed_requests"
    assert in_passing(Unreachable("away")) and not in_passing(NotFound("x")) and not in_passing(PermissionError("x"))
    assert not in_passing(TypeError("a bug"))


# --- blocks


@pytest.fixture(params=[None, "zstd"])
def stored(request: pytest.FixtureRequest, remote: Store, monkeypatch: pytest.MonkeyPatch) -> Dataset:
    """A data set in a remote store, of several blocks and files."""
    monkeypatch.setattr(writer, "BLOCK_BYTES", 3000)
    monkeypatch.setattr(ranges, "FIRST_PAUSE_S", 0.001)
    return write_set(remote, {"train": some_rows(120)}, compression=request.param)


def fetcher(stored: Dataset) -> BlockFetcher:
    index = stored.index
    policy = DamagePolicy(attempts=3)
    return BlockFetcher(stored.store, index.file_names, index.splits["train"], index.columns, policy, Counters())


def flip(store: Store, path: str, position: int) -> bytes:
    """Damage one bit; the whole file as it was."""
    raw = store.read_bytes(path)
    store.write_atomic(path, raw[:position] + bytes([raw[position] ^ 1]) + raw[position + 1 :])
    return raw


def test_contents_are_what_the_index_says(stored: Dataset) -> None:
    blocks = stored.index.splits["train"]
    assert len(blocks) > 4 and blocks.file.max() > 0
    contents = [fetcher(stored).content(block) for block in range(len(blocks))]
    assert [len(content) for content in contents] == blocks.content_bytes.tolist()


def test_a_block_that_is_damaged_on_the_way_is_fetched_again(stored: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    name = stored.index.file_names[0]
    whole = flip(stored.store, name, int(stored.index.splits["train"].stop[0]) - 20)
    heal = RangeReader.pause

    def pause(self: RangeReader, seconds: float) -> None:
        stored.store.write_atomic(name, whole)
        heal(self, seconds)

    monkeypatch.setattr(RangeReader, "pause", pause)
    fetching = fetcher(stored)
    assert len(fetching.content(0)) == stored.index.splits["train"].content_bytes[0]
    counted = fetching._counters.values()
    assert (counted["fetches"], counted["damaged_fetches"]) == (2, 1)


def test_a_damaged_block_is_named(stored: Dataset) -> None:
    blocks = stored.index.splits["train"]
    flip(stored.store, stored.index.file_names[0], int(blocks.stop[1]) - 20)
    fetching = fetcher(stored)
    with pytest.raises(BlockDamaged) as met:
        fetching.content(1)
    first = int(blocks.rows[0])
    (found,) = met.value.found
    assert (found.block, found.number, found.first_row, found.rows) == (1, 1, first, int(blocks.rows[1]))
    assert stored.store.path(stored.index.file_names[0]) in str(met.value)
    if stored.index.compression is None:
        assert found.keys == (f"row 0:{first}", f"row 0:{first + found.rows - 1}")
    assert fetching._counters.values()["damaged_fetches"] == 3
    assert len(fetching.content(0)) == blocks.content_bytes[0]


def test_missing_and_truncated_files_are_damage(stored: Dataset) -> None:
    blocks = stored.index.splits["train"]
    last = len(blocks) - 1
    name = stored.index.file_names[int(blocks.file[last])]
    raw = stored.store.read_bytes(name)
    stored.store.write_atomic(name, raw[: int(blocks.stop[last]) - 1])
    with pytest.raises(BlockDamaged, match=rf"is cut off: the file ends at byte {blocks.stop[last] - 1}"):
        fetcher(stored).content(last)
    stored.store.delete(name)
    with pytest.raises(BlockDamaged, match=rf"{name}: block {blocks.number[last]} .* is missing"):
        fetcher(stored).content(last)


def test_a_content_that_fails_its_digest_is_refused_though_its_stored_bytes_hold(stored: Dataset) -> None:
    index, blocks = stored.index, stored.index.splits["train"]
    others = replace(blocks, content_xxh3=blocks.content_xxh3 ^ np.uint64(1))
    fetching = BlockFetcher(stored.store, index.file_names, others, index.columns, DamagePolicy(), Counters())
    if blocks.compressed:
        with pytest.raises(BlockDamaged, match="fails its digest"):
            fetching.content(0)
    else:
        assert fetching.content(0)  # the stored bytes are the content
