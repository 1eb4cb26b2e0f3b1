from __future__ import annotations

import errno
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from configs.errors import ShardyardError, UsageError
from configs.problems import ConfigError
from configs.schema import Plugin
from data_pipelines import build as module
from data_pipelines import build_lock, partition, storage
from data_pipelines.build import dataset_digest, dataset_name, ensure_dataset, newest_built
from data_pipelines.quarantine import TooManyBadRows
from data_pipelines.shards import Dataset
from data_pipelines.storage import Store
from data_pipelines.tokenizer import TokenizerConfig
from tests.data_pipelines import lines_source
from tests.data_pipelines.lines_source import write_lines

ROOT = Path(__file__).parents[2]
BYTES = TokenizerConfig(name="bytes")

# Builds argv[2] (a data section) into the store argv[1]; says what it does; stops for good at stage argv[3].
BUILDER = """
import json, sys, time
from configs.schema import Plugin
from data_pipelines.build import ensure_dataset
from data_pipelines.storage import Store
from data_pipelines.tokenizer import TokenizerConfig

def progress(stage, rows):
    print(stage, rows, flush=True)
    while stage == sys.argv[3]:
        time.sleep(0.05)

data = Plugin(**json.loads(sys.argv[2]))
dataset = ensure_dataset(Store(sys.argv[1]), data, TokenizerConfig(vocab_size=300), progress)
print("built", dataset.fingerprint, flush=True)
"""
SMALL_BPE = TokenizerConfig(vocab_size=300)


def texts(count: int, seed: int = 0) -> list[str]:
    """Different texts of 1 to 60 words."""
    generator = random.Random(seed)
    words = ["alpha", "beta", "gamma", "naïve", "日本", "x = 1\n", "\n    return", "😀", "0123456789"]
    return [f"{seed}-{n} " + " ".join(generator.choices(words, k=generator.randint(0, 60))) for n in range(count)]


@pytest.fixture
def source(tmp_path: Path) -> Plugin:
    """Five partitions of 30 rows."""
    return write_lines(tmp_path / "source", [texts(30, seed) for seed in range(5)])


def start_builder(store: Path, data: Plugin, stop_at: str = "") -> subprocess.Popen[str]:
    command = [sys.executable, "-c", BUILDER, str(store), json.dumps(data.model_dump()), stop_at]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def wait_for_line(builder: subprocess.Popen[str], wanted: str) -> str:
    assert builder.stdout is not None
    for line in builder.stdout:
        if line.startswith(wanted):
            return line
    raise AssertionError(f"the builder ended with {builder.wait()} and never said '{wanted}'")


def kill(*builders: subprocess.Popen[str]) -> None:
    for builder in builders:
        if builder.poll() is None:
            builder.kill()
        builder.wait()


def everything(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in everything(folder)}


def rows(dataset: Dataset) -> dict[str, tuple[str, str]]:
    """key -> (split, text)"""
    tokenizer = dataset.tokenizer
    assert tokenizer is not None
    return {
        key: (split, tokenizer.decode(tokens))
        for split in dataset.splits
        for key, tokens, _ in dataset.documents(split)
    }


def shuffled(seed: int) -> module.RunTasks:
    """Tasks in any order, as many processes would end them."""

    def run(function: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
        order = list(items)
        random.Random(seed).shuffle(order)
        yield from map(function, order)

    return run


# --- what is built


def test_built_once_then_opened(tmp_path: Path, source: Plugin) -> None:
    stages: list[str] = []
    first = ensure_dataset(Store(tmp_path / "s"), source, BYTES, lambda stage, _: stages.append(stage))
    assert {"reading", "training the tokenizer", "tokenizing"} <= set(stages)
    stages.clear()
    second = ensure_dataset(Store(tmp_path / "s"), source, BYTES, lambda stage, _: stages.append(stage))
    assert stages == [] and second.fingerprint == first.fingerprint and second.verify() == []
    name = dataset_name(source, BYTES)
    assert re.fullmatch(rf"tests-data_pipelines-lines_source-[0-9a-f]{{8}}-{dataset_digest(source, BYTES)[:16]}", name)
    shards = [f"{split}-{number:05d}-000.arrow" for split in ("train", "validation") for number in range(5)]
    expected = sorted(["blocks.arrow", "index.json", "lengths.bin", "tokenizer.json", *shards])
    assert everything(tmp_path / "s") == [f"datasets/{name}/{file}" for file in expected]


@pytest.mark.parametrize("tokenizer", [SMALL_BPE, None])
def test_every_row_is_there_once_as_it_was(tmp_path: Path, source: Plugin, tokenizer: TokenizerConfig | None) -> None:
    dataset = ensure_dataset(Store(tmp_path / "s"), source, tokenizer)
    expected = {f"{n:03d}.jsonl:{m}": one for n in range(5) for m, one in enumerate(texts(30, n), start=1)}
    if tokenizer is None:
        found = {row["key"]: row["text"] for split in dataset.splits for row in dataset.rows(split)}
        num_bytes = sum(dataset.split(split).num_bytes for split in dataset.splits)
        assert num_bytes == sum(len(one.encode()) for one in expected.values())
    else:
        found = {key: text for key, (_, text) in rows(dataset).items()}
        lengths = {key: num_bytes for split in dataset.splits for key, _, num_bytes in dataset.documents(split)}
        assert lengths == {key: len(one.encode()) for key, one in expected.items()}
    assert found == expected
    assert list(found) != sorted(found)  # validation comes behind training
    for split in dataset.splits:
        keys = [row["key"] for row in dataset.rows(split)]
        assert keys == sorted(keys, key=lambda key: (key.split(":")[0], int(key.split(":")[1])))  # the source's order


@pytest.mark.parametrize("duplicates", ["keep", "near"])
def test_the_same_bytes_in_any_order_of_the_tasks(tmp_path: Path, duplicates: str) -> None:
    data = write_lines(tmp_path / "source", [texts(30, seed % 4) for seed in range(6)], duplicates=duplicates)
    ensure_dataset(Store(tmp_path / "alone"), data, SMALL_BPE)
    for seed in range(3):
        ensure_dataset(Store(tmp_path / str(seed)), data, SMALL_BPE, run_tasks=shuffled(seed))
        assert contents(tmp_path / str(seed)) == contents(tmp_path / "alone")


def test_what_was_built_last_with_the_same_settings_is_found_without_the_source(tmp_path: Path, source: Plugin) -> None:
    store = Store(tmp_path / "s")
    assert newest_built(store, source, BYTES) is None
    for number, tokenizer in enumerate([BYTES, BYTES, SMALL_BPE, None]):
        (Path(source.settings["folder"]) / "000.jsonl").write_text(json.dumps({"text": f"state {number}"}) + "\n")
        built = ensure_dataset(store, source, tokenizer)
        os.utime(Path(built.path) / "index.json", (1e9 + number, 1e9 + number))
        if number < 2:
            last = Path(built.path).name
    ensure_dataset(store, Plugin(**(source.model_dump() | {"validation_fraction": 0.3})), BYTES)
    (tmp_path / "s" / "datasets" / f"{last[:-1]}_").mkdir()  # a build that has not ended
    shutil.rmtree(source.settings["folder"])
    assert newest_built(store, source, BYTES) == last


def test_the_digest_follows_what_changes_the_content_alone(source: Plugin) -> None:
    def digest(**settings: Any) -> str:
        return dataset_digest(Plugin(**(source.model_dump() | settings)), BYTES)

    assert digest() == digest(max_bad_share=0.5) == digest(shuffle="examples") == digest(damage="skip")
    folder = Path(source.settings["folder"])
    digests = {digest(), dataset_digest(source, SMALL_BPE), dataset_digest(source, None)}
    digests |= {digest(validation_fraction=0.3), digest(duplicates="near"), digest(filters={"min_bytes": 2})}
    (folder / "000.jsonl").write_text('{"text": "other"}\n')
    digests.add(digest())
    assert len(digests) == 7


def test_packed_sequences_are_counted_on_request(tmp_path: Path, source: Plugin) -> None:
    plain = ensure_dataset(Store(tmp_path / "plain"), source, BYTES)
    counted = ensure_dataset(Store(tmp_path / "counted"), source, BYTES, seq_lens=(64,))
    assert counted.index.packing is not None and counted.index.packing.seq_lens == (64,)
    assert counted.fingerprint == plain.fingerprint
    assert len(counted.packed("train", 64, "best_fit")) == len(plain.packed("train", 64, "best_fit"))
    assert int(counted.index.splits["train"].packed[64].sum()) == len(plain.packed("train", 64, "best_fit"))


# --- the split


def test_the_split_stays_when_data_is_added(tmp_path: Path) -> None:
    files = [texts(50, seed) for seed in range(4)]
    before = rows(ensure_dataset(Store(tmp_path / "s"), write_lines(tmp_path / "source", files[1:3]), BYTES))
    after = rows(ensure_dataset(Store(tmp_path / "s"), write_lines(tmp_path / "source", files), BYTES))
    sides = {text: split for split, text in after.values()}
    assert len(after) == 200 and 20 < list(sides.values()).count("validation") < 60
    assert all(sides[text] == split for split, text in before.values())


@pytest.mark.parametrize("duplicates", ["keep", "near"])
def test_a_held_out_row_stays_so_when_near_duplicates_are_added_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, duplicates: str
) -> None:
    monkeypatch.setattr(lines_source, "NEAR_DUPLICATES_SHARE_A_SPLIT", True)
    generator = random.Random(0)
    words = [f"word{number}" for number in range(500)]
    old = [generator.choices(words, k=100) for _ in range(60)]
    added = [" ".join([*one[:50], "changed", *one[51:]]) for one in old]
    sides = []
    for files in ([[], [" ".join(one) for one in old]], [added, [" ".join(one) for one in old]]):
        data = write_lines(tmp_path / "source", files, duplicates=duplicates, validation_fraction=0.3)
        found = rows(ensure_dataset(Store(tmp_path / "s"), data, BYTES))
        sides.append({key: split for key, (split, _) in found.items()})
    before, after = sides
    of_line = [after.get(f"001.jsonl:{line}", after[f"000.jsonl:{line}"]) for line in range(1, 61)]
    held_out = [before[f"001.jsonl:{line}"] == "validation" for line in range(1, 61)]
    assert 8 < sum(held_out) < 30 and len(after) == (120 if duplicates == "keep" else 60)
    assert all(side == "validation" for side, held in zip(of_line, held_out, strict=True) if held)


def test_equal_texts_and_rows_of_a_group_lie_on_one_side(tmp_path: Path) -> None:
    same = texts(40, 1)
    grouped = [{"text": one, "group": f"group{n % 5}"} for n, one in enumerate(texts(40, 2))]
    found = rows(ensure_dataset(Store(tmp_path / "s"), write_lines(tmp_path / "t", [same, same[::-1], grouped]), BYTES))
    sides = {text: {split for split, other in found.values() if other == text} for text in same}
    assert all(len(splits) == 1 for splits in sides.values())
    groups = [{found[f"002.jsonl:{n + 1}"][0] for n in range(40) if n % 5 == group} for group in range(5)]
    assert all(len(splits) == 1 for splits in groups)


def test_a_row_may_name_its_split(tmp_path: Path) -> None:
    splits = ["train", "validation", "test"]
    data = write_lines(tmp_path / "source", [[{"text": one, "split": splits[n % 3]} for n, one in enumerate(texts(9))]])
    dataset = ensure_dataset(Store(tmp_path / "s"), data, BYTES)
    assert dataset.splits == ("train", "validation", "test")
    assert [split for split, _ in dict(sorted(rows(dataset).items())).values()] == splits * 3
    data = write_lines(tmp_path / "bad", [[*texts(200), {"text": "x", "split": "../up"}]])
    dataset = ensure_dataset(Store(tmp_path / "s"), data, BYTES)
    assert dataset.index.quarantined == 1 and "names no split" in dataset.store.read_text("quarantine.jsonl")


def test_no_validation_split_when_none_is_wanted(tmp_path: Path) -> None:
    data = write_lines(tmp_path / "source", [["only"]], validation_fraction=0.0)
    dataset = ensure_dataset(Store(tmp_path / "s"), data, BYTES)
    assert (len(dataset.packed("train", 2)), len(dataset.packed("validation", 2))) == (3, 0)
    assert dataset.verify() == []


# --- duplicates


def test_only_the_first_of_equal_rows_is_kept(tmp_path: Path) -> None:
    generator = random.Random(0)
    pool = texts(40)
    files = [generator.choices(pool, k=30) for _ in range(4)]
    data = write_lines(tmp_path / "source", files, duplicates="exact")
    dataset = ensure_dataset(Store(tmp_path / "s"), data, BYTES)
    expected: dict[str, str] = {}
    for number, file in enumerate(files):
        for line, one in enumerate(file, start=1):
            expected.setdefault(one, f"{number:03d}.jsonl:{line}")
    assert {text: key for key, (_, text) in rows(dataset).items()} == expected
    assert dataset.index.dropped == {"duplicate": 120 - len(expected)}


def test_only_the_first_of_near_duplicates_is_kept(tmp_path: Path) -> None:
    generator = random.Random(0)
    words = [f"word{number}" for number in range(500)]
    originals = [generator.choices(words, k=150) for _ in range(12)]
    copies = [[*one[:70], "changed", *one[71:]] for one in originals]
    files = [[" ".join(one) for one in originals[:6]], [" ".join(one) for one in copies + originals[6:]]]
    dataset = ensure_dataset(Store(tmp_path / "s"), write_lines(tmp_path / "t", files, duplicates="near"), BYTES)
    kept = {" ".join(one) for one in originals[:6] + copies[6:]}
    assert {text for _, text in rows(dataset).values()} == kept
    assert dataset.index.dropped == {"duplicate": 12}


# --- bad rows


def test_bad_rows_are_listed_in_order(tmp_path: Path) -> None:
    files: list[list[Any]] = [[*texts(60, seed), b"{broken %d" % seed, *texts(60, seed + 10)] for seed in range(3)]
    data = write_lines(tmp_path / "source", files)
    dataset = ensure_dataset(Store(tmp_path / "s"), data, BYTES, run_tasks=shuffled(1))
    listed = [json.loads(line) for line in dataset.store.read_text("quarantine.jsonl").splitlines()]
    folder = tmp_path / "source"
    assert [(row["file"], row["line"], row["excerpt"]) for row in listed] == [
        (str(folder / f"{n:03d}.jsonl"), 61, f"{{broken {n}") for n in range(3)
    ]
    assert dataset.index.quarantined == 3 and len(rows(dataset)) == 360 and dataset.verify() == []


def test_too_many_bad_rows_stop_the_build_and_leave_nothing(tmp_path: Path) -> None:
    files: list[list[Any]] = [texts(60, 1), [*texts(60, 2), b"{broken", b"worse"]]
    data = write_lines(tmp_path / "source", files, max_bad_share=0.01)
    with pytest.raises(TooManyBadRows, match=r"2 of the 122 rows .* data.max_bad_share=0.01 .*001\.jsonl:61: no row"):
        ensure_dataset(Store(tmp_path / "s"), data, BYTES)
    assert everything(tmp_path / "s") == []
    data = write_lines(tmp_path / "source", files, max_bad_share=0.02)
    assert ensure_dataset(Store(tmp_path / "s"), data, BYTES).index.quarantined == 2


def test_a_build_that_cannot_pass_stops_early(tmp_path: Path) -> None:
    data = write_lines(tmp_path / "source", [[*texts(10, n), b"bad", b"bad"] for n in range(20)])
    done: list[int] = []
    with pytest.raises(TooManyBadRows, match=r"read so far"):
        ensure_dataset(Store(tmp_path / "s"), data, BYTES, lambda _, count: done.append(count))
    assert max(done) < 100


def test_the_first_pass_over_a_source_stops_early_too(tmp_path: Path) -> None:
    data = write_lines(tmp_path / "source", [[*texts(10, n), b"bad", b"bad"] for n in range(20)], duplicates="near")
    done: list[tuple[str, int]] = []
    with pytest.raises(TooManyBadRows, match=r"4 of the 24 rows .* read so far .*000\.jsonl:11: no row"):
        ensure_dataset(Store(tmp_path / "s"), data, BYTES, lambda *said: done.append(said))
    assert done[-1] == ("looking for duplicates", 24) and everything(tmp_path / "s") == []


def test_rows_that_are_all_bad_say_why(tmp_path: Path) -> None:
    data = write_lines(tmp_path / "source", [[b"{", b"}"], [b"["]])
    with pytest.raises(TooManyBadRows, match=r"3 of the 3 rows .*000\.jsonl:1: no row"):
        ensure_dataset(Store(tmp_path / "s"), data, BYTES)
    assert everything(tmp_path / "s") == []


# --- refused


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "nothing to read"),
        ([[]], "no rows"),
        ([["", ""]], "no rows"),
        ([["one"], ["one"]], "none can be held out"),
    ],
)
def test_sources_without_text_are_refused_and_leave_nothing(
    tmp_path: Path, files: list[list[Any]], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        ensure_dataset(Store(tmp_path / "s"), write_lines(tmp_path / "source", files), BYTES)
    assert everything(tmp_path / "s") == [] and list((tmp_path / "s" / "datasets").iterdir()) == []


def test_settings_are_checked_and_names_are_found(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="validation_fractoin"):
        ensure_dataset(
            Store(tmp_path), Plugin.model_validate({"name": "jsonl", "paths": ["x"], "validation_fractoin": 0.1}), BYTES
        )
    with pytest.raises(UsageError, match=r"'jsnl'.*Did you mean 'jsonl'"):
        ensure_dataset(Store(tmp_path), Plugin(name="jsnl"), BYTES)


def test_a_source_that_changes_meanwhile_is_refused(tmp_path: Path, source: Plugin) -> None:
    file = Path(source.settings["folder"]) / "000.jsonl"

    def edit(stage: str, _: int) -> None:
        if stage == "tokenizing":
            file.write_text('{"text": "other"}\n')

    with pytest.raises(UsageError, match="was changed while the data set was built"):
        ensure_dataset(Store(tmp_path / "s"), source, BYTES, edit)
    assert everything(tmp_path / "s") == []


# --- what goes wrong


class FullDisk:
    """open() for shards of a disk that takes so many of them."""

    def __init__(self, shards: int) -> None:
        self.left = shards

    def __call__(self, path: Path, *arguments: Any, **options: Any) -> Any:
        if Path(path).suffix == ".arrow":
            self.left -= 1
            if self.left < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
        return open(path, *arguments, **options)


def test_a_full_disk_keeps_finished_partitions_and_other_data_sets(
    tmp_path: Path, source: Plugin, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = ensure_dataset(Store(tmp_path / "s"), source, BYTES)
    before = contents(tmp_path / "s")
    monkeypatch.setattr(storage, "open", FullDisk(5), raising=False)
    with pytest.raises(ShardyardError, match=r"\.arrow: the disk is full\. Free some space"):
        ensure_dataset(Store(tmp_path / "s"), source, SMALL_BPE)
    monkeypatch.undo()
    left = contents(tmp_path / "s")
    assert good.verify() == [] and all(left[name] == raw for name, raw in before.items())
    new = sorted(Path(name).name for name in left.keys() - before.keys())
    shards = [f"{split}-{number:05d}-000.arrow" for split in ("train", "validation") for number in range(2)]
    lengths = [f"{number:05d}.{split}.lengths" for split in ("train", "validation") for number in range(2)]
    assert new == sorted(["00000.json", "00001.json", "tokenizer.json", *shards, *lengths])
    ensure_dataset(Store(tmp_path / "s"), source, SMALL_BPE)
    ensure_dataset(Store(tmp_path / "undisturbed"), source, SMALL_BPE)
    after = contents(tmp_path / "s")
    assert {name: after[name] for name in after.keys() - before.keys()} == contents(tmp_path / "undisturbed")


def test_a_disk_full_from_the_first_leaves_nothing(
    tmp_path: Path, source: Plugin, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "open", FullDisk(0), raising=False)
    with pytest.raises(ShardyardError, match="the disk is full"):
        ensure_dataset(Store(tmp_path / "s"), source, BYTES)
    assert everything(tmp_path / "s") == []


def test_a_really_full_disk(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, check=False, capture_output=True).returncode != 0:
        pytest.skip("only root may mount a small disk")
    try:
        data = write_lines(tmp_path / "rows", [texts(800, seed) for seed in range(8)])
        with pytest.raises(ShardyardError, match="the disk is full"):
            ensure_dataset(Store(disk), data, BYTES)
        assert not any(name.endswith("index.json") for name in everything(disk))
        subprocess.run(["mount", "-o", "remount,size=16m", str(disk)], check=True)
        assert ensure_dataset(Store(disk), data, BYTES).verify() == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def identities(folder: Path) -> dict[str, tuple[int, int]]:
    """Which file it is, and when it was written, of each shard of a finished partition."""
    found = {}
    for path in folder.rglob("parts/[0-9]*.json"):
        if path.name.count(".") == 1:
            for sizes, _ in json.loads(path.read_text())["splits"].values():
                for name in sizes:
                    status = (path.parents[1] / name).stat()
                    found[name] = (status.st_ino, status.st_mtime_ns)
    return found


def wait_for_rows(builder: subprocess.Popen[str], wanted: int) -> None:
    """Until it has written so many rows."""
    assert builder.stdout is not None
    for line in builder.stdout:
        stage, _, count = line.rpartition(" ")
        if stage == "tokenizing" and int(count) >= wanted:
            return
    raise AssertionError(f"the builder ended with {builder.wait()} before row {wanted}")


@pytest.mark.parametrize("duplicates", ["keep", "near"])
def test_kills_at_any_moment_change_nothing(tmp_path: Path, duplicates: str) -> None:
    files = [texts(30, seed) for seed in range(8)]
    undisturbed = write_lines(tmp_path / "source", files, duplicates=duplicates)
    expected = ensure_dataset(Store(tmp_path / "undisturbed"), undisturbed, SMALL_BPE)
    slow = Plugin(**(undisturbed.model_dump() | {"row_s": 0.001}))
    generator = random.Random(7)
    target = tmp_path / "s"
    kept: dict[str, tuple[int, int]] = {}
    for wanted in [0, *sorted(generator.sample(range(30, 200), 3))]:
        builder = start_builder(target, slow)
        try:
            if wanted:
                wait_for_rows(builder, wanted)
            else:
                wait_for_line(builder, "reading")
            time.sleep(generator.uniform(0, 0.3 if not wanted else 0.04))  # any moment will do
        finally:
            kill(builder)
        now = identities(target)
        assert kept.items() <= now.items()  # finished shards were not written again
        kept = now
    assert 4 < len(kept) < 16
    dataset = ensure_dataset(Store(target), slow, SMALL_BPE)
    assert dataset.fingerprint == expected.fingerprint and dataset.verify() == []
    built, wanted_files = (contents(Path(one.path)) for one in (dataset, expected))
    for either in (built, wanted_files):
        del either["index.json"]  # it holds the settings, of which row_s differs
    assert built == wanted_files
    last = {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in Path(dataset.path).glob("*.arrow")}
    assert kept.items() <= last.items()


def test_the_scratch_files_of_a_killed_build_go_before_the_next(tmp_path: Path) -> None:
    data = write_lines(tmp_path / "source", [texts(30, 1), texts(30, 1)], duplicates="near")
    builder = start_builder(tmp_path / "s", data, stop_at="looking for duplicates")
    try:
        wait_for_line(builder, "looking for duplicates")
    finally:
        kill(builder)
    (folder,) = (tmp_path / "s" / "datasets").iterdir()
    (folder / "parts" / "scratch-killed").mkdir(parents=True)
    (folder / "parts" / "scratch-killed" / "leaders").write_bytes(b"left")
    (folder / "parts" / "00000.signed.json").write_text("{}")
    left: list[str] = []
    ensure_dataset(Store(tmp_path / "s"), data, SMALL_BPE, lambda *_: left.extend(map(str, folder.rglob("scratch-*"))))
    assert left == [] and not list(folder.rglob("*scratch*"))


# --- builders beside each other


def test_of_two_builders_one_builds_and_the_other_waits(tmp_path: Path, source: Plugin) -> None:
    builders = [start_builder(tmp_path / "s", source) for _ in range(2)]
    outputs = [builder.communicate(timeout=60)[0] for builder in builders]
    assert [builder.returncode for builder in builders] == [0, 0]
    assert len({output.splitlines()[-1] for output in outputs}) == 1
    assert sum("tokenizing" in output for output in outputs) == 1


def test_a_waiting_builder_takes_over_when_the_first_is_killed(tmp_path: Path, source: Plugin) -> None:
    first = start_builder(tmp_path / "s", source, stop_at="tokenizing")
    second = None
    try:
        wait_for_line(first, "tokenizing")
        second = start_builder(tmp_path / "s", source)
        wait_for_line(second, "waiting for another process")
        first.send_signal(signal.SIGKILL)
        fingerprint = wait_for_line(second, "built").split()[1]
        assert second.wait(timeout=30) == 0
    finally:
        kill(*(builder for builder in (first, second) if builder is not None))
    assert ensure_dataset(Store(tmp_path / "s"), source, SMALL_BPE).fingerprint == fingerprint


def test_a_lock_on_a_folder_that_is_gone_does_not_count(
    tmp_path: Path, source: Plugin, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = build_lock._try_lock, []

    def another_builder_gives_up_first(descriptor: int) -> bool:
        calls.append(descriptor)
        if len(calls) == 1:
            shutil.rmtree(next((tmp_path / "s" / "datasets").iterdir()))
        return real(descriptor)

    monkeypatch.setattr(build_lock, "_try_lock", another_builder_gives_up_first)
    assert ensure_dataset(Store(tmp_path / "s"), source, BYTES).verify() == []
    assert len(calls) == 2


def test_a_builder_that_locks_after_another_has_finished_builds_nothing(
    tmp_path: Path, source: Plugin, monkeypatch: pytest.MonkeyPatch
) -> None:
    finished = ensure_dataset(Store(tmp_path / "other"), source, BYTES)
    real, stages = build_lock._try_lock, []

    def another_builder_finishes_first(descriptor: int) -> bool:
        shutil.copytree(tmp_path / "other", tmp_path / "s", dirs_exist_ok=True)
        return real(descriptor)

    monkeypatch.setattr(build_lock, "_try_lock", another_builder_finishes_first)
    dataset = ensure_dataset(Store(tmp_path / "s"), source, BYTES, lambda stage, _: stages.append(stage))
    assert stages == [] and dataset.verify() == [] and dataset.fingerprint == finished.fingerprint
    assert everything(tmp_path / "s") == everything(tmp_path / "other")


def test_what_a_builder_killed_at_the_very_end_left_goes(tmp_path: Path, source: Plugin) -> None:
    first = ensure_dataset(Store(tmp_path / "s"), source, BYTES)
    before = everything(tmp_path / "s")
    first.store.write_atomic("lock", b"")
    first.store.write_atomic("parts/00000.json", b"{}")
    assert ensure_dataset(Store(tmp_path / "s"), source, BYTES).fingerprint == first.fingerprint
    assert everything(tmp_path / "s") == before


def test_a_data_set_without_its_index_is_built_again(tmp_path: Path, source: Plugin) -> None:
    dataset = ensure_dataset(Store(tmp_path / "s"), source, BYTES)
    path = Path(dataset.path)
    (path / "index.json").unlink()
    (path / "train-00077-000.arrow").write_bytes(b"half")
    assert ensure_dataset(Store(tmp_path / "s"), source, BYTES).verify() == []
    assert not (path / "train-00077-000.arrow").exists()
    (path / "index.json").unlink()
    (path / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"notes\.txt.*Move them away"):
        ensure_dataset(Store(tmp_path / "s"), source, BYTES)
    assert (path / "notes.txt").read_text() == "mine"


def test_parts_of_another_program_or_without_their_shards_are_not_believed(tmp_path: Path, source: Plugin) -> None:
    builder = start_builder(tmp_path / "s", source, stop_at="writing the index")
    try:
        wait_for_line(builder, "writing the index")
    finally:
        kill(builder)
    (folder,) = (tmp_path / "s" / "datasets").iterdir()
    (folder / "train-00001-000.arrow").unlink()
    part = folder / "parts" / "00002.json"
    part.write_text(json.dumps(json.loads(part.read_text()) | {"digest": "0", "splits": {}}))
    (folder / "parts" / "00003.json").write_text("{")
    os.truncate(folder / "train-00004-000.arrow", 100)
    before = (folder / "train-00000-000.arrow").stat()
    ensure_dataset(Store(tmp_path / "undisturbed"), source, SMALL_BPE)
    dataset = ensure_dataset(Store(tmp_path / "s"), source, SMALL_BPE)
    assert contents(tmp_path / "s") == contents(tmp_path / "undisturbed")
    untouched = (Path(dataset.path) / "train-00000-000.arrow").stat()
    assert (untouched.st_ino, untouched.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


# --- remote stores


def test_a_remote_build_goes_on_where_it_was_cut_off(
    remote: Store, tmp_path: Path, source: Plugin, monkeypatch: pytest.MonkeyPatch
) -> None:
    near = ensure_dataset(Store(tmp_path / "s"), source, BYTES)
    real, written = partition.ShardWriter, []

    def writer(store: Store, prefix: str, *rest: Any) -> Any:
        written.append(prefix)
        if len(written) == 7:
            raise ShardyardError("the store is gone")
        return real(store, prefix, *rest)

    monkeypatch.setattr(partition, "ShardWriter", writer)
    with pytest.raises(ShardyardError, match="the store is gone"):
        ensure_dataset(remote, source, BYTES)
    dataset = ensure_dataset(remote, source, BYTES)
    assert len(written) == 7 + 4 and dataset.verify() == []
    assert dataset.fingerprint == near.fingerprint and dataset.index.compression == "zstd"
    assert dataset.store.list("parts") == []


def test_near_duplicates_in_a_remote_store(remote: Store, tmp_path: Path) -> None:
    data = write_lines(tmp_path / "source", [texts(30, 1), texts(30, 2) + texts(30, 1)], duplicates="near")
    near = ensure_dataset(Store(tmp_path / "s"), data, BYTES)
    assert ensure_dataset(remote, data, BYTES).fingerprint == near.fingerprint


def test_the_index_is_plain_json_with_the_source(tmp_path: Path, source: Plugin) -> None:
    dataset = ensure_dataset(Store(tmp_path / "s"), source, BYTES)
    index = json.loads(dataset.store.read_text("index.json"))
    assert index["source"]["folder"] == source.settings["folder"]
    assert index["fingerprint"] == dataset.fingerprint == Dataset.open(dataset.store.path()).fingerprint
