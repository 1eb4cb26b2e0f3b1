from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from functools import cache
from itertools import pairwise, product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from configs.errors import Damaged, UsageError
from data_pipelines import batches as batches_module
from data_pipelines import loader as loader_module
from data_pipelines import writer as writer_module
from data_pipelines.buckets import BucketOrder
from data_pipelines.columns import KEY, Column
from data_pipelines.data_state import Exceptions
from data_pipelines.examples import Examples, Rows
from data_pipelines.lengths import MixtureLengths
from data_pipelines.loader import Loader, MicroBatch, evaluation_batches
from data_pipelines.mixture import Change, MixtureExamples, MixtureOrder, Schedule
from data_pipelines.order import BlockOrder, ExampleOrder, Order, SequentialOrder, choose_order
from data_pipelines.shards import Dataset
from tests.data_pipelines.fakes import Lists, Numbers, packed, random_documents
from tests.data_pipelines.small_sets import write_set

WORLD_SIZES = (1, 2, 3, 4, 6)


@pytest.fixture(scope="module", autouse=True)
def little_read_ahead() -> Iterator[None]:
    """Few examples are planned at once, so that a plan ends within a test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loader_module, "_AHEAD", 40)
        yield


def with_noise(row: dict[str, np.ndarray], generator: np.random.Generator) -> dict[str, np.ndarray]:
    return {**row, "noise": generator.random(3)}


def copied(batch: MicroBatch) -> MicroBatch:
    """As it is now: tensors lie in memory that is used again."""
    return MicroBatch(
        batch.index,
        batch.idle,
        batch.sample_ids.copy(),
        {name: tensor.clone() for name, tensor in batch.tensors.items()},
    )


def global_batch(micro_batches: list[MicroBatch]) -> list[MicroBatch]:
    """A step's micro-batches in the order of k, over all ranks; checks that each k comes once."""
    real = sorted((batch for batch in micro_batches if not batch.idle), key=lambda batch: batch.index)
    assert len({batch.index for batch in real}) == len(real)
    return real


def ids_of(batches: list[MicroBatch]) -> list[int]:
    return [sample_id for batch in batches for sample_id in batch.sample_ids.tolist()]


def same(first: list[MicroBatch], second: list[MicroBatch]) -> bool:
    return len(first) == len(second) and all(
        one.index == other.index
        and one.sample_ids.tolist() == other.sample_ids.tolist()
        and one.tensors.keys() == other.tensors.keys()
        and all(
            tensor.dtype == other.tensors[name].dtype and torch.equal(tensor, other.tensors[name])
            for name, tensor in one.tensors.items()
        )
        for one, other in zip(first, second, strict=True)
    )


def steps_of(make: Callable[..., Loader], world_size: int, steps: range, **options: Any) -> dict[int, list[MicroBatch]]:
    """The global batches of some steps, read by `world_size` ranks."""
    found: dict[int, list[MicroBatch]] = {step: [] for step in steps}
    for rank in range(world_size):
        loader = make(rank=rank, world_size=world_size, start_step=steps.start, **options)
        try:
            for step in steps:
                found[step] += map(copied, loader.step(step))
        finally:
            loader.close()
    return {step: global_batch(batches) for step, batches in found.items()}


def some_data(kind: str, seed: int, global_batch_size: int, micro_batch_size: int) -> tuple[Examples, Order]:
    """Examples and an order of each kind; a few dozen examples each, so that epochs end often."""
    if kind == "concat":
        examples: Examples = packed(random_documents(seed, 7), 12)
        return examples, BlockOrder(seed, examples.block_examples, 3)
    if kind == "best_fit":
        examples = packed(random_documents(seed, 5), 16, "best_fit")
        return examples, ExampleOrder(seed, len(examples))
    if kind == "mixture":
        parts = [packed(random_documents(seed + i, 2 + i), 12, ("concat", "best_fit")[i % 2]) for i in range(3)]
        orders = [
            choose_order(name, seed, part.block_examples, 2)
            for name, part in zip(("blocks", "examples", "sequential"), parts, strict=True)
        ]
        schedule = Schedule([5, 2, 3], [None, 2 * len(parts[1]), None], [Change(31, (1, 1, 1))])
        return MixtureExamples(parts), MixtureOrder(orders, schedule)
    sizes = {"global_batch_size": global_batch_size, "micro_batch_size": micro_batch_size}
    datasets = stored_lists()
    rows = [Rows(dataset.split("train"), ("list", "pixels")) for dataset in datasets]
    lengths = [dataset.lengths("train", "list") for dataset in datasets]
    base = [BlockOrder(seed, part.block_examples, 2) for part in rows]
    if kind == "ragged":
        return rows[0], BucketOrder(base[0], lengths[0], seed=seed, window=20, **sizes)
    mixed = MixtureOrder(base, Schedule([1, 2], [None, 2 * len(rows[1])], [Change(31, (1, 1))]))
    cuts = mixed.schedule.changes
    return MixtureExamples(rows), BucketOrder(mixed, MixtureLengths(lengths), seed=seed, window=20, cuts=cuts, **sizes)


@cache
def stored_lists() -> tuple[Dataset, ...]:
    """Two data sets on disk, of lists of 0 to 12 numbers, in several blocks each; they stay mapped."""
    columns = (KEY, Column("list", "int32", (None,)), Column("pixels", "int32"))
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer_module, "BLOCK_BYTES", 300)
        found = []
        for number, count in enumerate((34, 21)):
            rows = [
                {"key": f"{row}", "list": np.full(row * 7 % 13, row, np.int32), "pixels": row} for row in range(count)
            ]
            dataset = write_set(Path(folder) / str(number), {"train": rows}, columns)
            split = dataset.split("train")
            assert len(split.blocks) > 3
            split.gather(np.arange(count), ("list", "pixels"))  # maps the files, which may go then
            dataset.lengths("train", "list")
            found.append(dataset)
    return tuple(found)


@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.too_slow])
@given(st.data(), st.sampled_from(["concat", "best_fit", "mixture", "ragged", "ragged mixture"]), st.integers(0, 2**40))
def test_identical_global_batches_whatever_the_cluster(data: st.DataObject, kind: str, seed: int) -> None:
    """World sizes, threads, read-ahead and where a run was stopped and resumed change nothing; blocks are skipped."""
    global_batch_size = data.draw(st.integers(1, 14), "global batch")
    micro_batch_size = data.draw(st.integers(1, global_batch_size), "micro batch")
    num_steps = data.draw(st.integers(1, 12), "steps")
    examples, order = some_data(kind, seed, global_batch_size, micro_batch_size)
    prepare = data.draw(st.sampled_from([None, with_noise]), "prepare")
    blocks = data.draw(st.sets(st.integers(0, len(examples.block_examples) - 1), max_size=2), "skipped")
    exceptions = Exceptions()
    for block in blocks:
        exceptions = exceptions.skip([("train", block)], data.draw(st.integers(0, 60), "from"))
    if blocks and sum(np.delete(examples.block_examples, list(blocks))) == 0:
        return

    def make(**options: Any) -> Loader:
        return Loader(
            examples,
            order,
            prepare,
            seed=seed,
            global_batch_size=global_batch_size,
            micro_batch_size=micro_batch_size,
            ragged={"list": 1},
            exceptions=exceptions,
            **options,
        )

    reference = steps_of(make, 1, range(num_steps))
    cuts = sorted(data.draw(st.sets(st.integers(0, num_steps), max_size=3), "stops") | {0, num_steps})
    seen: dict[int, list[MicroBatch]] = {}
    for start, stop in pairwise(cuts):
        seen |= steps_of(
            make,
            data.draw(st.sampled_from(WORLD_SIZES), "world"),
            range(start, stop),
            examples_seen=start * global_batch_size,
            threads=data.draw(st.sampled_from([1, 3]), "threads"),
            prefetch_bytes=data.draw(st.sampled_from([1, 2000, 1 << 20]), "prefetch"),
        )
    for step in range(num_steps):
        assert same(seen[step], reference[step])
    ends = np.cumsum(examples.block_examples)
    for step, batches in reference.items():
        positions = np.arange(step * global_batch_size, (step + 1) * global_batch_size)
        ids = order.sample_ids(positions)
        kept = exceptions.kept("train", ends.searchsorted(ids, side="right"), positions)
        assert ids_of(batches) == ids[kept].tolist()


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_each_example_once_an_epoch_across_uneven_steps_and_resumes(world_size: int) -> None:
    examples, ids, noise = Numbers([30, 41, 30]), [], []
    order = BlockOrder(5, examples.block_examples)

    def make(**options: Any) -> Loader:
        return Loader(examples, order, with_noise, seed=5, global_batch_size=10, micro_batch_size=4, **options)

    for start, stop in ((0, 7), (7, 20), (20, 31)):  # stopped and resumed twice
        for batches in steps_of(make, world_size, range(start, stop), examples_seen=10 * start).values():
            assert [batch.index for batch in batches] == [0, 1, 2]
            ids += ids_of(batches)
            noise += [row for batch in batches for row in batch.tensors["noise"].tolist()]
            assert ids_of(batches) == [row for batch in batches for row in batch.tensors["id"][:, 0].tolist()]
    assert ids == order.sample_ids(np.arange(310)).tolist()
    assert len({tuple(row) for row in noise}) == 310  # each position has random numbers of its own
    for epoch in range(3):
        assert sorted(ids[101 * epoch : 101 * (epoch + 1)]) == list(range(101))


def numbers_loader(examples: Numbers | None = None, order: Order | None = None, **options: Any) -> Loader:
    examples = Numbers([20, 30]) if examples is None else examples
    settings = {"seed": 0, "global_batch_size": 4, "micro_batch_size": 2, "rank": 0, "world_size": 1}
    return Loader(examples, SequentialOrder(len(examples)) if order is None else order, **(settings | options))


def test_every_rank_has_as_many_slots_and_idle_ones_repeat_the_last() -> None:
    for world_size in WORLD_SIZES:
        for rank in range(world_size):
            loader = numbers_loader(global_batch_size=10, micro_batch_size=3, rank=rank, world_size=world_size)
            batches = loader.step(0)
            assert len(batches) == -(-4 // world_size)
            for slot, batch in enumerate(batches):
                k = rank + slot * world_size
                assert (batch.index, batch.idle) == (min(k, 3), k > 3)
                assert ids_of([batch]) == list(range(10))[3 * batch.index : 3 * batch.index + 3]
            loader.close()


def test_any_step_may_be_asked_and_nothing_stays_behind() -> None:
    before = set(threading.enumerate())
    num_threads = torch.get_num_threads()
    loader = numbers_loader(prepare=with_noise, threads=3)
    assert torch.get_num_threads() == num_threads
    for step in (*range(9), 40, 41, 3, 3, 0, *range(1, 30), 7):
        batches = loader.step(step)
        assert ids_of(batches) == [position % 50 for position in range(4 * step, 4 * step + 4)]
        assert [row for batch in batches for row in batch.tensors["id"][:, 1].tolist()] == ids_of(batches)
        assert loader.wait_s >= 0
    assert set(threading.enumerate()) > before
    loader.close()
    loader.close()
    assert set(threading.enumerate()) == before


def test_reading_ahead_uses_one_core_and_training_keeps_its_own() -> None:
    seen = {}

    class Watched(Numbers):
        def gather(self, ids: np.ndarray, out: Any = None, blocks: Any = None) -> dict[str, Any]:
            seen[threading.current_thread() is threading.main_thread()] = torch.get_num_threads()
            return super().gather(ids, out, blocks)

    num_threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        loader = numbers_loader(Watched([20, 30]))
        for step in range(40):
            loader.step(step)
            time.sleep(0.001)  # so that there is something to read ahead
        loader.close()
        assert torch.get_num_threads() == 2
        assert seen.pop(False) == 1  # in the reader's thread
        assert set(seen.values()) <= {2}
    finally:
        torch.set_num_threads(num_threads)


def test_a_caller_who_comes_first_makes_the_step_himself() -> None:
    may_go_on = threading.Event()
    readers = set()

    class Slow(Numbers):
        def gather(self, ids: np.ndarray, out: Any = None, blocks: Any = None) -> dict[str, Any]:
            readers.add(threading.current_thread().name)
            if threading.current_thread() is not threading.main_thread():
                assert may_go_on.wait(30)
            return super().gather(ids, out, blocks)

    loader = numbers_loader(Slow([400]))
    loader._reader.submit(may_go_on.wait)  # the reader is busy
    before = [loader.step(step)[0].sample_ids.tolist() for step in range(3)]
    assert readers == {threading.main_thread().name}
    may_go_on.set()
    after = [loader.step(step)[0].sample_ids.tolist() for step in range(3, 30)]
    loader.close()
    plain = numbers_loader(Numbers([400]))
    assert before + after == [plain.step(step)[0].sample_ids.tolist() for step in range(30)]
    plain.close()


def test_steps_ahead_are_read_before_they_are_asked_for() -> None:
    read = threading.Event()

    class Watched(Numbers):
        def gather(self, ids: np.ndarray, out: Any = None, blocks: Any = None) -> dict[str, Any]:
            if 30 in ids:
                read.set()
            return super().gather(ids, out, blocks)

    examples = Watched([20, 30])
    loader = numbers_loader(examples)
    try:
        for step in range(4):
            loader.step(step)
        assert read.wait(timeout=10)
        assert examples.asked == {0, 1}  # blocks were announced
    finally:
        loader.close()


def test_memory_is_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader_module, "_HAND_OVER_BYTES", 1 << 10)
    examples = packed(random_documents(0, 6), 12)
    loader = numbers_loader(examples, SequentialOrder(len(examples)), prefetch_bytes=1 << 12)  # type: ignore[arg-type]
    for step in range(100):  # hand-overs have reached their size
        loader.step(step)
    addresses = {loader.step(step)[0].tensors["tokens"].untyped_storage().data_ptr() for step in range(100, 600)}
    loader.close()
    assert len(addresses) <= 6


def test_hand_overs_grow_but_not_beyond_their_size(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []

    class Watched(Numbers):
        def gather(self, ids: np.ndarray, out: Any = None, blocks: Any = None) -> dict[str, Any]:
            sizes.append(len(ids) // 4)
            return super().gather(ids, out, blocks)

    monkeypatch.setattr(loader_module, "_HAND_OVER_BYTES", 64 * 10)  # a step is 4 rows of 16 bytes
    loader = numbers_loader(Watched([20, 30]))
    for step in range(100):
        loader.step(step)
    loader.close()
    assert sizes[0] == 1 and max(sizes) == 10


def test_an_error_is_raised_by_its_own_step() -> None:
    loader = numbers_loader(Numbers([90, 4, 100], broken=[1]))  # steps 22 and 23 read block 1
    try:
        for step in range(22):
            assert ids_of(loader.step(step)) == list(range(4 * step, 4 * step + 4))
        for _ in range(2):
            with pytest.raises(Damaged, match="block 1"):
                loader.step(22)
        with pytest.raises(Damaged, match="block 1"):
            loader.step(23)
        for step in range(24, 40):
            assert ids_of(loader.step(step)) == list(range(4 * step, 4 * step + 4))
    finally:
        loader.close()


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_damaged_blocks_are_left_out_as_agreed(world_size: int) -> None:
    """As a run does it: before each step the ranks tell each other what they found, and skip it from there on."""
    examples = Numbers([10, 5, 10, 8], broken=[1, 3])
    order = BlockOrder(3, examples.block_examples)
    ranks = [
        numbers_loader(examples, order, rank=rank, world_size=world_size, global_batch_size=7, damage="skip")
        for rank in range(world_size)
    ]
    try:
        for step in range(30):
            while True:
                batches = [copied(batch) for loader in ranks for batch in loader.step(step)]
                found = sorted({block for loader in ranks for block in loader.found_damage()})
                if not found:
                    break
                for loader in ranks:
                    loader.skip(found, 7 * step)
            expected = [
                number
                for number in order.sample_ids(np.arange(7 * step, 7 * step + 7)).tolist()
                if not (10 <= number < 15 or number >= 25)
            ]
            assert ids_of(global_batch(batches)) == expected
            for batch in batches:  # also an idle one can be run
                assert len(batch.sample_ids) and batch.tensors["id"][:, 0].tolist() == batch.sample_ids.tolist()
        states = [loader.exceptions.state() for loader in ranks]
        assert all(state == states[0] for state in states)
        assert {entry["block"] for entry in states[0]} == {1, 3}
        with pytest.raises(Damaged, match="Every block"):
            ranks[0].skip([("train", 0), ("train", 2)], 0)
    finally:
        for loader in ranks:
            loader.close()


@pytest.mark.parametrize("world_size", [1, 3])
def test_going_back_without_some_examples(world_size: int) -> None:
    """Later examples move up, steps read ahead are forgotten, and a resume sees the same."""
    order = ExampleOrder(3, 20)
    expected = order.sample_ids(np.arange(100)).tolist()
    del expected[14:21], expected[14:21]

    def make(**options: Any) -> Loader:
        return numbers_loader(Numbers([9, 11]), order, global_batch_size=7, micro_batch_size=2, **options)

    loaders = [make(rank=rank, world_size=world_size) for rank in range(world_size)]
    for wrong in (2, 2):
        for loader in loaders:
            for step in range(4):
                loader.step(step)
            loader.go_back(1, 7, loader.positions(wrong))
    found = {step: [copied(each) for loader in loaders for each in loader.step(step)] for step in range(1, 9)}
    for step, batches in found.items():
        assert ids_of(global_batch(batches)) == expected[7 * step : 7 * step + 7]
    loader = loaders[0]
    assert [loader.position(step) for step in (1, 2, 3)] == [7, 14, 35]
    assert loader.examples(2)[0].tolist() == list(range(28, 35))
    for step in (2, 5):
        again = steps_of(
            make, 2, range(step, step + 2), examples_seen=loader.position(step), exceptions=loader.exceptions
        )
        assert ids_of(again[step]) == expected[7 * step : 7 * step + 7]
    for each in loaders:
        each.close()


def test_skipping_the_last_whole_block_is_damage() -> None:
    loader = numbers_loader(Numbers([4, 4], broken=[0, 1]), damage="skip")
    with pytest.raises(Damaged):
        loader.step(0)
    loader.close()


def test_a_mixture_that_ends_is_read_to_its_end() -> None:
    parts = [Numbers([9]), Numbers([12])]
    schedule = Schedule([1, 2], [2 * 9, 12])
    order = MixtureOrder([SequentialOrder(9), SequentialOrder(12)], schedule)
    for bucketed in (False, True):
        if bucketed:
            whole: Order = BucketOrder(
                order, lambda ids: ids, seed=1, global_batch_size=4, micro_batch_size=2, window=8
            )
        else:
            whole = order
        loader = numbers_loader(MixtureExamples(parts), whole)  # type: ignore[arg-type]
        ids = [number for step in range(7) for number in ids_of(loader.step(step))]
        assert sorted(ids)[-12:] == list(range(9, 21)) and len(ids) == 28
        with pytest.raises(UsageError, match="has 30 examples"):
            loader.step(7)
        loader.close()


@pytest.mark.parametrize("long_row", [1, 1 << 20])
def test_lists_are_padded_to_the_longest_of_their_micro_batch(long_row: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches_module, "_LONG_ROW", long_row)
    lists = Lists([50])
    for prepare in (None, lambda row, _: {"list": row["list"].astype(np.float32)}):
        loader = numbers_loader(lists, prepare=prepare, pad=-1, ragged={"list": 1})
        for step in range(12):
            for batch in loader.step(step):
                lengths = [number * 7 % 10 for number in batch.sample_ids.tolist()]
                values = batch.tensors["list"]
                assert values.shape == (2, max(lengths))
                assert values.tolist() == [
                    [number] * length + [-1] * (max(lengths) - length)
                    for number, length in zip(batch.sample_ids.tolist(), lengths, strict=True)
                ]
                assert batch.tensors["list_length"].tolist() == lengths
                assert batch.tensors["list_length"].dtype == torch.int32
        loader.close()


def picture(row: dict[str, np.ndarray], _: np.random.Generator) -> dict[str, np.ndarray]:
    """Of a height and a width of its own."""
    number = int(row["id"][0])
    return {"image": np.full((*size_of(number), 3), number, np.int16)}


def size_of(number: int) -> tuple[int, int]:
    return 1 + number % 4, 1 + number // 3 % 5


def test_pictures_are_padded_to_the_highest_and_widest_of_their_micro_batch() -> None:
    loader = numbers_loader(prepare=picture, pad=-1, ragged={"image": 2})
    for step in range(12):
        for batch in loader.step(step):
            sizes = [size_of(number) for number in batch.sample_ids.tolist()]
            expected = np.full((2, *np.max(sizes, axis=0), 3), -1)
            for row, (number, (high, wide)) in enumerate(zip(batch.sample_ids.tolist(), sizes, strict=True)):
                for down, right in product(range(high), range(wide)):
                    expected[row, down, right] = number
            assert batch.tensors["image"].tolist() == expected.tolist()
            assert batch.tensors["image_size"].tolist() == list(map(list, sizes))
            assert batch.tensors.keys() == {"image", "image_size"}
    loader.close()


def test_what_a_batch_holds_does_not_depend_on_the_neighbours() -> None:
    """Sizes come also where all are alike."""
    for axes, key in ((1, "image_length"), (2, "image_size")):
        loader = numbers_loader(prepare=lambda *_: {"image": np.ones((4, 5, 3))}, ragged={"image": axes})
        assert loader.step(0)[0].tensors[key].tolist() == ([4, 4] if axes == 1 else [[4, 5], [4, 5]])
        loader.close()


@pytest.mark.parametrize("ragged", [0, 1])
def test_shapes_that_differ_where_the_task_does_not_say_so_are_refused(ragged: int) -> None:
    loader = numbers_loader(
        prepare=lambda row, _: {"x": np.zeros((2, int(row["id"][0]) + 1))}, ragged={"x": ragged} if ragged else {}
    )
    with pytest.raises(UsageError, match=rf"shapes \(2, 1\), \(2, 2\); it may differ in its first {ragged} .*RAGGED"):
        loader.step(0)
    loader.close()


def test_an_empty_split_is_refused() -> None:
    with pytest.raises(UsageError, match="empty"):
        numbers_loader(Numbers([0]), SequentialOrder(1))


@pytest.mark.parametrize("num_examples", [None, 1, 7, 64, 1000])
@pytest.mark.parametrize("total", [0, 1, 5, 64, 101])
def test_evaluation_counts_each_example_once(total: int, num_examples: int | None) -> None:
    count = total if num_examples is None else min(total, num_examples)
    reference: list[int] | None = None
    for world_size in WORLD_SIZES:
        ranks = [list(evaluation(total, num_examples, rank, world_size)) for rank in range(world_size)]
        assert len({len(batches) for batches in ranks}) == 1
        real = [batch for batches in ranks for batch in batches if not batch.idle]
        ids = sorted(ids_of(real))
        assert sorted(row for batch in real for row in batch.tensors["id"][:, 0].tolist()) == ids
        assert len(ids) == len(set(ids)) == count
        assert reference is None or ids == reference
        reference = ids


def evaluation(total: int, num_examples: int | None, rank: int, world_size: int) -> Iterator[MicroBatch]:
    sizes = {"micro_batch_size": 4, "rank": rank, "world_size": world_size}
    return evaluation_batches(Numbers([total]), with_noise, num_examples=num_examples, **sizes)


def test_an_evaluation_reads_one_micro_batch_ahead_in_threads_that_change_nothing() -> None:
    before = set(threading.enumerate())
    asked: list[int] = []
    read = threading.Event()

    class Watched(Numbers):
        def gather(self, ids: np.ndarray, out: Any = None, blocks: Any = None) -> dict[str, Any]:
            asked.append(int(ids[0]))
            if len(asked) == 2:
                read.set()
            return super().gather(ids, out, blocks)

    def evaluated(threads: int) -> Iterator[MicroBatch]:
        options: dict[str, Any] = {"micro_batch_size": 4, "rank": 0, "world_size": 1, "threads": threads}
        return evaluation_batches(Watched([40]), with_noise, **options)

    batches = evaluated(3)
    next(batches)
    assert read.wait(10) and asked == [0, 4]  # and no more than that
    batches.close()
    assert set(threading.enumerate()) == before
    assert same(list(evaluated(3)), list(evaluated(1)))
    assert set(threading.enumerate()) == before


def test_an_error_in_an_evaluation_comes_with_its_own_micro_batch() -> None:
    batches = evaluation_batches(Numbers([8, 4, 8], broken=[1]), micro_batch_size=4, rank=0, world_size=1)
    assert [next(batches).sample_ids.tolist() for _ in range(2)] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    with pytest.raises(Damaged, match="block 1"):
        next(batches)
