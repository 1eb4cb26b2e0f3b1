from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from configs.errors import ShardyardError, UsageError
from configs.problems import ConfigError
from configs.schema import Plugin
from data_pipelines import build as module
from data_pipelines import storage
from data_pipelines.build import Split, dataset_digest, ensure_dataset
from data_pipelines.shards import Dataset
from data_pipelines.sources import Document
from data_pipelines.storage import Store
from data_pipelines.tokenizer import TokenizerConfig
from tests.data_pipelines.conftest import BYTES, sample_texts, write_jsonl

ROOT = Path(__file__).parents[2]

# Builds the jsonl source argv[2] into the store argv[1]; says what it does, one line a stage; sleeps at stage argv[3].
BUILDER = """
import sys, time
from configs.schema import Plugin
from data_pipelines.build import ensure_dataset
from data_pipelines.storage import Store
from data_pipelines.tokenizer import TokenizerConfig

def progress(stage, documents):
    print(stage, flush=True)
    while stage == sys.argv[3]:
        time.sleep(0.05)

data = Plugin(name="jsonl", paths=[sys.argv[2]], validation_fraction=0.2)
dataset = ensure_dataset(Store(sys.argv[1]), data, TokenizerConfig(name="bytes"), progress)
print("built", dataset.fingerprint, flush=True)
"""


def start_builder(store: Path, source: Plugin, stop_at: str = "") -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", BUILDER, str(store), source.settings["paths"][0], stop_at],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )


def wait_for_line(builder: subprocess.Popen[str], wanted: str) -> str:
    assert builder.stdout is not None
    for line in builder.stdout:
        if line.startswith(wanted):
            return line
    raise AssertionError(f"the builder ended with {builder.wait()} and never said '{wanted}'")


def everything(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_built_once_then_opened(tmp_path: Path, source: Plugin) -> None:
    stages: list[str] = []
    first = ensure_dataset(Store(tmp_path / "s"), source, BYTES, lambda stage, _: stages.append(stage))
    assert {"reading", "training the tokenizer", "tokenizing"} <= set(stages)
    stages.clear()
    second = ensure_dataset(Store(tmp_path / "s"), source, BYTES, lambda stage, _: stages.append(stage))
    assert stages == [] and second.fingerprint == first.fingerprint
    name = f"jsonl-{dataset_digest(source, BYTES)[:16]}"
    assert everything(tmp_path / "s") == [
        f"datasets/{name}/{file}"
        for file in ("index.json", "tokenizer.json", "train-00000.arrow", "validation-00000.arrow")
    ]


def test_the_same_source_gives_the_same_bytes(tmp_path: Path, source: Plugin) -> None:
    config = TokenizerConfig(vocab_size=300)
    contents = []
    for name in ("one", "two"):
        ensure_dataset(Store(tmp_path / name), source, config)
        contents.append([(tmp_path / name / file).read_bytes() for file in everything(tmp_path / name)])
    assert contents[0] == contents[1]


def test_the_digest_follows_settings_and_content(tmp_path: Path, source: Plugin) -> None:
    file = Path(source.settings["paths"][0])
    digests = {
        dataset_digest(source, BYTES),
        dataset_digest(source, TokenizerConfig()),
        dataset_digest(Plugin(name="jsonl", paths=[str(file)], validation_fraction=0.3), BYTES),
    }
    file.write_text(file.read_text() + '{"text": "one more"}\n')
    digests.add(dataset_digest(source, BYTES))
    assert len(digests) == 4


def test_documents_are_split_by_their_group_and_stay_where_they_are(tmp_path: Path) -> None:
    texts = sample_texts(400)
    sides: list[dict[str, str]] = []
    for count in (200, 400):
        data = write_jsonl(tmp_path / f"{count}.jsonl", texts[:count] + texts[: count // 2])
        dataset = ensure_dataset(Store(tmp_path / "s"), data, BYTES)
        found: dict[str, str] = {}
        for split in dataset.splits:
            for _, tokens, _ in dataset.documents(split):
                text = dataset.tokenizer.decode(tokens)
                assert found.setdefault(text, split) == split  # the same text is on one side
        sides.append(found)
    assert 0.1 < list(sides[1].values()).count("validation") / 400 < 0.3
    assert all(sides[1][text] == side for text, side in sides[0].items())


def test_both_sides_get_something() -> None:
    documents = [Document(str(n), "x", f"group{n}") for n in range(3)]
    for fraction in (1e-9, 0.5, 1 - 1e-9):
        held_out = [Split.of(documents, fraction, "s").is_validation(document) for document in documents]
        assert 0 < sum(held_out) < 3
    assert not any(Split.of(documents, 0.0, "s").is_validation(document) for document in documents)


def test_sources_without_text_are_refused_and_leave_nothing(tmp_path: Path) -> None:
    for texts, message in (([], "has no text"), (["", ""], "has no text"), (["one", "one"], "none can be held out")):
        data = write_jsonl(tmp_path / "rows.jsonl", texts)
        with pytest.raises(UsageError, match=message):
            ensure_dataset(Store(tmp_path / "s"), data, BYTES)
        assert everything(tmp_path / "s") == []


def test_no_validation_split_when_none_is_wanted(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "rows.jsonl", ["only"])
    data = Plugin(name="jsonl", paths=[str(tmp_path / "rows.jsonl")], validation_fraction=0.0)
    dataset = ensure_dataset(Store(tmp_path / "s"), data, BYTES)
    assert (len(dataset.packed("train", 2)), len(dataset.packed("validation", 2))) == (3, 0)
    assert dataset.verify() == []


def test_a_bad_row_far_behind_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_HELD_BACK_BYTES", 100)
    monkeypatch.setattr(module, "_BATCH_DOCUMENTS", 4)
    data = write_jsonl(tmp_path / "rows.jsonl", ["same"] * 50 + sample_texts(50))
    rows = Path(data.settings["paths"][0])
    rows.write_text(rows.read_text() + "{broken\n")
    with pytest.raises(UsageError, match=r"rows\.jsonl:101: not a JSON value"):
        ensure_dataset(Store(tmp_path / "s"), data, BYTES)
    assert list((tmp_path / "s" / "datasets").iterdir()) == []


def test_settings_are_checked_and_names_are_found(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="validation_fractoin"):
        ensure_dataset(Store(tmp_path), Plugin(name="jsonl", paths=["x"], validation_fractoin=0.1), BYTES)
    with pytest.raises(UsageError, match=r"'jsnl'.*Did you mean 'jsonl'"):
        ensure_dataset(Store(tmp_path), Plugin(name="jsnl"), BYTES)


def test_a_full_disk_leaves_nothing_of_the_build(
    tmp_path: Path, source: Plugin, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = ensure_dataset(Store(tmp_path / "s"), source, BYTES)
    before = everything(tmp_path / "s")

    class FullDisk:
        def __init__(self, *_: object, **__: object) -> None:
            self.real = open(os.devnull, "wb")  # noqa: SIM115 - closed by its user

        def write(self, data: bytes) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

        def __getattr__(self, name: str) -> object:
            return getattr(self.real, name)

    monkeypatch.setattr(storage, "open", FullDisk, raising=False)
    with pytest.raises(ShardyardError, match=r"\.arrow: the disk is full\. Free some space"):
        ensure_dataset(Store(tmp_path / "s"), source, TokenizerConfig(vocab_size=300))
    monkeypatch.undo()
    assert everything(tmp_path / "s") == before and good.verify() == []


def test_a_really_full_disk(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, check=False, capture_output=True).returncode != 0:
        pytest.skip("only root may mount a small disk")
    try:
        data = write_jsonl(tmp_path / "rows.jsonl", sample_texts(4000))
        with pytest.raises(ShardyardError, match="the disk is full"):
            ensure_dataset(Store(disk), data, BYTES)
        assert everything(disk) == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("stage", ["reading", "training the tokenizer", "tokenizing"])
def test_a_killed_build_is_cleared_by_the_next(tmp_path: Path, source: Plugin, stage: str) -> None:
    store = tmp_path / "s"
    builder = start_builder(store, source, stop_at=stage)
    try:
        wait_for_line(builder, stage)
    finally:
        builder.send_signal(signal.SIGKILL)
        builder.wait()
    leftovers = list((store / "datasets").iterdir())
    assert [path.name.endswith(".building") for path in leftovers] == [True]
    (leftovers[0] / "train-00007.arrow").write_bytes(b"half")
    dataset = ensure_dataset(Store(store), source, BYTES)
    assert dataset.verify() == []
    assert "train-00007.arrow" not in dataset.store.list()
    assert [path.name.endswith(".building") for path in (store / "datasets").iterdir()] == [False]


def test_of_two_builders_one_builds_and_the_other_waits(tmp_path: Path, source: Plugin) -> None:
    store = tmp_path / "s"
    builders = [start_builder(store, source) for _ in range(2)]
    outputs = [builder.communicate(timeout=60)[0] for builder in builders]
    assert [builder.returncode for builder in builders] == [0, 0]
    assert len({output.splitlines()[-1] for output in outputs}) == 1
    assert sum("tokenizing" in output for output in outputs) == 1


def test_a_waiting_builder_takes_over_when_the_first_is_killed(tmp_path: Path, source: Plugin) -> None:
    store = tmp_path / "s"
    first = start_builder(store, source, stop_at="tokenizing")
    second = None
    try:
        wait_for_line(first, "tokenizing")
        second = start_builder(store, source)
        wait_for_line(second, "waiting for another process")
        first.send_signal(signal.SIGKILL)
        fingerprint = wait_for_line(second, "built").split()[1]
        assert second.wait(timeout=30) == 0
    finally:
        for builder in (first, second):
            if builder is not None and builder.poll() is None:
                builder.kill()
                builder.wait()
    assert ensure_dataset(Store(store), source, BYTES).fingerprint == fingerprint


def test_a_lock_on_a_folder_that_is_gone_does_not_count(
    tmp_path: Path, source: Plugin, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = module._try_lock, []

    def another_builder_gives_up_first(descriptor: int) -> bool:
        calls.append(descriptor)
        if len(calls) == 1:
            shutil.rmtree(next((tmp_path / "s" / "datasets").iterdir()))
        return real(descriptor)

    monkeypatch.setattr(module, "_try_lock", another_builder_gives_up_first)
    assert ensure_dataset(Store(tmp_path / "s"), source, BYTES).verify() == []
    assert len(calls) == 2


def test_a_data_set_without_its_index_is_built_again(tmp_path: Path, source: Plugin) -> None:
    dataset = ensure_dataset(Store(tmp_path / "s"), source, BYTES)
    path = dataset.store.local_path()
    assert path is not None
    (path / "index.json").unlink()
    assert ensure_dataset(Store(tmp_path / "s"), source, BYTES).verify() == []
    (path / "index.json").unlink()
    (path / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"notes\.txt.*Move them away"):
        ensure_dataset(Store(tmp_path / "s"), source, BYTES)
    assert (path / "notes.txt").read_text() == "mine"
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_a_remote_build_that_was_cut_off_is_done_again(remote: Store, source: Plugin) -> None:
    dataset = ensure_dataset(remote, source, BYTES)
    dataset.store.delete("index.json")
    again = ensure_dataset(remote, source, BYTES)
    assert again.fingerprint == dataset.fingerprint and again.verify() == []


def test_the_index_is_plain_json_with_the_source(tmp_path: Path, source: Plugin) -> None:
    dataset = ensure_dataset(Store(tmp_path / "s"), source, BYTES)
    index = json.loads(dataset.store.read_text("index.json"))
    assert index["source"]["paths"] == source.settings["paths"]
    assert index["fingerprint"] == dataset.fingerprint == Dataset.open(dataset.store.path()).fingerprint


def test_the_lock_stands_until_the_data_set_has_its_name(
    tmp_path: Path, source: Plugin, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, locked = os.rename, []

    def rename(old: Path, new: Path) -> None:
        if str(old).endswith(".building"):
            locked.append((old / "lock").exists())
        real(old, new)

    monkeypatch.setattr(module.os, "rename", rename)
    dataset = ensure_dataset(Store(tmp_path / "s"), source, BYTES)
    assert locked == [True] and "lock" not in dataset.store.list()


def test_a_builder_that_locks_after_another_has_finished_builds_nothing(
    tmp_path: Path, source: Plugin, monkeypatch: pytest.MonkeyPatch
) -> None:
    finished = ensure_dataset(Store(tmp_path / "other"), source, BYTES)
    real, stages = module._try_lock, []

    def another_builder_finishes_first(descriptor: int) -> bool:
        shutil.copytree(tmp_path / "other", tmp_path / "s", dirs_exist_ok=True)
        return real(descriptor)

    monkeypatch.setattr(module, "_try_lock", another_builder_finishes_first)
    dataset = ensure_dataset(Store(tmp_path / "s"), source, BYTES, lambda stage, _: stages.append(stage))
    assert stages == [] and dataset.verify() == [] and dataset.fingerprint == finished.fingerprint
    assert everything(tmp_path / "s") == everything(tmp_path / "other")
    assert len(list((tmp_path / "s" / "datasets").iterdir())) == 1


def test_what_a_builder_killed_at_the_very_end_left_is_no_obstacle(tmp_path: Path, source: Plugin) -> None:
    first = ensure_dataset(Store(tmp_path / "s"), source, BYTES)
    first.store.write_atomic("lock", b"")
    assert ensure_dataset(Store(tmp_path / "s"), source, BYTES).fingerprint == first.fingerprint
    first.store.delete("index.json")
    dataset = ensure_dataset(Store(tmp_path / "s"), source, BYTES)
    assert dataset.fingerprint == first.fingerprint and "lock" not in dataset.store.list()
