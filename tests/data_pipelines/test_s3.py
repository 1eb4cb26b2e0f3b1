"""Remote data sets against an S3 server, with a proxy that makes it fail; `moto` is in the extra "dev"."""

from __future__ import annotations

import logging
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from configs.errors import ShardyardError, Unreachable
from configs.schema import Plugin
from data_pipelines import block_cache, cache, ranges, writer
from data_pipelines.build import ensure_dataset
from data_pipelines.damage import BlockDamaged, DamagePolicy
from data_pipelines.loader import Loader
from data_pipelines.order import choose_order
from data_pipelines.shards import Dataset
from data_pipelines.storage import Store
from tests.data_pipelines.conftest import BYTES
from tests.data_pipelines.fault_proxy import FAULTS, FaultProxy
from tests.data_pipelines.small_sets import same_rows, some_rows, write_set, write_texts

moto_server = pytest.importorskip("moto.server", reason="moto[s3,server] is not installed")
pytestmark = pytest.mark.longer

ROWS = some_rows(120)
KINDS = {"throttle": "throttled", "error": "failed_requests", "reset": "failed_requests", "truncate": "cut_short"}
KINDS |= {"stall": "stalls", "corrupt": "damaged_fetches"}


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[str, int]]:
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    running = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    yield running.get_host_and_port()
    running.stop()


@pytest.fixture
def s3(server: tuple[str, int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FaultProxy]:
    for name, value in {"AWS_ACCESS_KEY_ID": "id", "AWS_SECRET_ACCESS_KEY": "key"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setattr(writer, "BLOCK_BYTES", 3000)
    monkeypatch.setattr(ranges, "FIRST_PAUSE_S", 0.01)
    with FaultProxy(*server) as proxy:
        yield proxy
    block_cache.shared_cache.cache_clear()


def uri(port: int, path: str) -> str:
    return (
        f"s3://bucket/{path}?endpoint_override=127.0.0.1:{port}&scheme=http&region=us-east-1&allow_bucket_creation=true"
    )


@pytest.fixture(params=[None, "zstd"])
def stored(request: pytest.FixtureRequest, server: tuple[str, int], s3: FaultProxy, tmp_path: Path) -> Dataset:
    """A data set in a bucket."""
    direct = Store(uri(server[1], tmp_path.name))
    file_system, _ = direct._remote
    file_system.create_dir("bucket")
    return write_set(direct, {"train": ROWS}, compression=request.param)


@pytest.fixture
def texts(server: tuple[str, int], s3: FaultProxy, tmp_path: Path) -> Dataset:
    """A data set of texts in a bucket."""
    here = write_texts(tmp_path / "here", {"train": ["one", "two"]})
    there = Store(uri(server[1], tmp_path.name))
    there._remote[0].create_dir("bucket")
    for name in here.store.list():
        there.write_atomic(name, here.store.read_bytes(name))
    return here


def open_through(proxy: FaultProxy, tmp_path: Path, **policy: Any) -> Dataset:
    settings: dict[str, Any] = {"cache_path": str(tmp_path / "blocks"), "cache_bytes": 1 << 20} | policy
    return Dataset.open(Store(uri(proxy.port, tmp_path.name)), damage=DamagePolicy(**settings))


def metrics(opened: Dataset) -> dict[str, float]:
    source = opened.split("train").source
    assert isinstance(source, cache.CachedBlocks)
    return source.metrics()


def test_each_block_is_read_once_in_one_request(stored: Dataset, s3: FaultProxy, tmp_path: Path) -> None:
    opened = open_through(s3, tmp_path)
    s3.gets.clear()
    for _ in range(2):
        assert same_rows(list(opened.rows("train")), ROWS)
    assert set(s3.gets.values()) == {1} and len(s3.gets) == len(stored.index.splits["train"])
    opened.close()
    again = open_through(s3, tmp_path)
    s3.gets.clear()
    assert same_rows(list(again.rows("train")), ROWS) and not s3.gets
    again.close()


@pytest.mark.parametrize("fault", [fault for fault in FAULTS if fault != "corrupt"])
def test_a_data_set_is_opened_through_faults_in_passing(
    texts: Dataset, s3: FaultProxy, tmp_path: Path, fault: str
) -> None:
    s3.plan.extend([fault, fault, None] * 3)  # of index.json, blocks.arrow and tokenizer.json
    opened = open_through(s3, tmp_path, stall_s=0.3)
    assert opened.fingerprint == texts.fingerprint and opened.tokenizer is not None
    assert s3.met[fault] == 6 and not s3.plan


@pytest.mark.parametrize("fault", ["error", "truncate", "stall"])
@pytest.mark.parametrize("file", ["index.json", "blocks.arrow", "tokenizer.json"])
def test_a_data_set_whose_store_stays_away_is_not_opened_and_the_budget_holds(
    texts: Dataset, s3: FaultProxy, tmp_path: Path, file: str, fault: str
) -> None:
    s3.plan.extend([None] * ["index.json", "blocks.arrow", "tokenizer.json"].index(file))
    s3.always = fault
    with pytest.raises(
        Unreachable, match=rf"{tmp_path.name}/{file} could not be read: \d+ tries .*data\.retry_s \(now 1"
    ):
        _ = open_through(s3, tmp_path, stall_s=0.3, retry_s=1.0).tokenizer
    assert 2 <= s3.met[fault] <= 10
    s3.always = None
    assert open_through(s3, tmp_path).tokenizer is not None


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_passing_costs_time_only_and_is_counted(
    stored: Dataset, s3: FaultProxy, tmp_path: Path, fault: str
) -> None:
    opened = open_through(s3, tmp_path, stall_s=0.3)
    s3.plan.extend([None, fault, fault, None, fault])
    assert same_rows(list(opened.rows("train")), ROWS)
    assert s3.met[fault] == 3
    assert metrics(opened)[KINDS[fault]] >= 1
    assert metrics(opened)["damaged_blocks"] == 0
    opened.close()


def test_a_bad_day_is_survived(stored: Dataset, s3: FaultProxy, tmp_path: Path) -> None:
    opened = open_through(s3, tmp_path, stall_s=0.3, attempts=10, cache_bytes=12 * 4096)
    split = opened.split("train")
    generator = random.Random(0)
    s3.plan.extend(generator.choices([None, *FAULTS], [12, 2, 2, 2, 2, 1, 2], k=150))
    labels = np.array([row["label"] for row in ROWS])
    found = np.full(len(ROWS), -1)
    for start in range(0, len(ROWS), 5):
        ids = np.arange(start, start + 5)
        split.prefetch(split.block_of((ids + 20) % len(ROWS)))
        found[ids] = [row["label"] for row in _rows_at(split, ids)]
    assert np.array_equal(found, labels)
    assert metrics(opened)["retries"] > 0 and metrics(opened)["wait_s"] > 0
    opened.close()


def _rows_at(split: Any, ids: np.ndarray) -> list[dict[str, Any]]:
    rows = []
    for number in ids.tolist():
        block = int(split.block_of(np.array([number]))[0])
        with split.block(block, ["label"]) as columns:
            rows.append({"label": int(columns["label"][number - split.first_rows[block]])})
    return rows


def test_a_store_that_stays_away_stops_within_the_budget_and_goes_on_when_it_is_back(
    stored: Dataset, s3: FaultProxy, tmp_path: Path
) -> None:
    opened = open_through(s3, tmp_path, retry_s=0.2, action="skip")
    s3.always = "throttle"
    with pytest.raises(Unreachable, match=r"could not be read: \d+ tries.*data.retry_s"):
        list(opened.rows("train"))
    assert not opened.split("train").damage.blocks()
    s3.always = None
    assert same_rows(list(opened.rows("train")), ROWS)
    opened.close()


def test_a_block_that_stays_damaged_is_named(stored: Dataset, s3: FaultProxy, tmp_path: Path) -> None:
    opened = open_through(s3, tmp_path)
    s3.always = "corrupt"
    with pytest.raises(BlockDamaged, match=rf"s3://bucket/{tmp_path.name}/train-00000-000.arrow: block 0 \(rows 0 to"):
        opened.split("train").source.locate(np.array([0]))
    opened.close()


def test_a_missing_shard_is_named(stored: Dataset, s3: FaultProxy, tmp_path: Path) -> None:
    opened = open_through(s3, tmp_path)
    stored.store.delete("train-00001-000.arrow")
    with pytest.raises(BlockDamaged, match=r"train-00001-000.arrow: block 0 .* is missing"):
        list(opened.rows("train"))
    opened.close()


def test_a_wrong_bucket_is_told_at_once(stored: Dataset, s3: FaultProxy) -> None:
    with pytest.raises(ShardyardError, match=r"no data set|Cannot"):
        Dataset.open(Store(uri(s3.port, "nowhere").replace("bucket/", "no-such-bucket/")))


# --- builds


def first_batches(dataset: Dataset) -> list[tuple[list[int], dict[str, Any]]]:
    """Sample ids and tensors of a step, as training gets them."""
    packed = dataset.packed("train", 64)
    order = choose_order("blocks", 3, packed.block_examples)
    settings: dict[str, Any] = {"seed": 3, "global_batch_size": 8, "micro_batch_size": 4, "rank": 0, "world_size": 1}
    loader = Loader(packed, order, **settings)
    try:
        return [
            (batch.sample_ids.tolist(), {name: tensor.tolist() for name, tensor in batch.tensors.items()})
            for batch in loader.step(0)
        ]
    finally:
        loader.close()


def test_a_build_into_s3_is_the_same_data_set_as_one_here(
    server: tuple[str, int], s3: FaultProxy, source: Plugin, tmp_path: Path
) -> None:
    settings = {**source.settings, "cache_dir": str(tmp_path / "blocks"), "cache_bytes": 64 << 20}
    data = Plugin(name=source.name, **settings)
    there = Store(uri(server[1], tmp_path.name))
    there._remote[0].create_dir("bucket")
    built, local = (ensure_dataset(store, data, BYTES) for store in (there, Store(tmp_path / "store")))
    assert (built.index.compression, local.index.compression) == ("zstd", None)
    assert built.fingerprint == local.fingerprint and len(built.index.splits["train"]) > 2
    assert built.verify() == []
    assert same_rows(list(built.rows("validation")), list(local.rows("validation")))
    batches = first_batches(built)
    assert batches == first_batches(local) and len(batches) == 2
    assert ensure_dataset(there, data, BYTES).fingerprint == built.fingerprint  # opened, and not built again
    for dataset in (built, local):
        dataset.close()


# --- processes

READER = """
import sys
import numpy as np
from data_pipelines.damage import DamagePolicy
from data_pipelines.shards import Dataset
from data_pipelines.storage import Store
uri, blocks, act, stall_s = sys.argv[1:]
policy = DamagePolicy(cache_path=blocks, cache_bytes=1 << 20, stall_s=float(stall_s))
split = Dataset.open(Store(uri), damage=policy).split("train")
print("ready", flush=True)
sys.stdin.readline()
if act == "prefetch":
    split.prefetch(np.arange(len(split.blocks)))
    sys.stdin.readline()
else:
    print(sum(row["label"] % 1000 for row in split.rows(["label"])))
"""


def start_reader(proxy: FaultProxy, tmp_path: Path, act: str, stall_s: float = 60) -> subprocess.Popen[str]:
    command = [
        sys.executable,
        "-c",
        READER,
        uri(proxy.port, tmp_path.name),
        str(tmp_path / "blocks"),
        act,
        str(stall_s),
    ]
    reader = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert reader.stdout is not None and reader.stdout.readline() == "ready\n"
    return reader


def go(reader: subprocess.Popen[str]) -> None:
    assert reader.stdin is not None
    reader.stdin.write("\n")
    reader.stdin.flush()


def wait_for_stall(proxy: FaultProxy) -> None:
    deadline = time.monotonic() + 30
    while not proxy.met["stall"]:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_reader_killed_in_mid_fetch_is_made_up_for(stored: Dataset, s3: FaultProxy, tmp_path: Path) -> None:
    with start_reader(s3, tmp_path, "read") as victim:
        s3.always = "stall"
        go(victim)
        wait_for_stall(s3)
        victim.kill()
    s3.always = None
    opened = open_through(s3, tmp_path)
    assert same_rows(list(opened.rows("train")), ROWS)
    opened.close()
    assert len(os.listdir(tmp_path / "blocks" / "sharers")) == 1  # this process


def test_a_read_that_hangs_keeps_a_process_alive_no_longer_than_a_stall(
    stored: Dataset, s3: FaultProxy, tmp_path: Path
) -> None:
    with start_reader(s3, tmp_path, "prefetch", stall_s=2) as reader:  # pyarrow waits for its requests at exit
        s3.always = "stall"
        go(reader)
        wait_for_stall(s3)
        go(reader)
        assert reader.wait(30) == 0


def test_processes_of_a_node_fetch_each_block_once(stored: Dataset, s3: FaultProxy, tmp_path: Path) -> None:
    with start_reader(s3, tmp_path, "read") as one, start_reader(s3, tmp_path, "read") as two:
        s3.gets.clear()
        for reader in (one, two):
            go(reader)
        sums = [reader.communicate(timeout=60)[0].strip() for reader in (one, two)]
    assert sums == [str(sum(row["label"] % 1000 for row in ROWS))] * 2
    assert set(s3.gets.values()) == {1} and len(s3.gets) == len(stored.index.splits["train"])


def test_no_thread_is_left_waiting_once_closed(stored: Dataset, s3: FaultProxy, tmp_path: Path) -> None:
    before = set(threading.enumerate())  # a read that another test gave up may still hang
    opened = open_through(s3, tmp_path, retry_s=1e6)
    s3.always = "throttle"
    opened.split("train").prefetch(np.arange(3))
    deadline = time.monotonic() + 30
    while not s3.met["throttle"]:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    opened.close()
    while any(thread.name in ("fetch", "read") for thread in set(threading.enumerate()) - before):
        assert time.monotonic() < deadline
        time.sleep(0.01)
