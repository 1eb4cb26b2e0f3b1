"""The real writes of two ranks' saves, cut off at every call, in every way that the model of tests/crash/disk.py has.

What is replayed is recorded by the test itself where strace may trace, and what `python -m tests.crash` recorded.
"""

from __future__ import annotations

import random
import shutil
import socket
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from configs.errors import Damaged, NotFound
from data_pipelines.storage import Store
from tests.crash.disk import CrashState, Disk, Files, damaged, read_calls, read_files, write_files
from tests.crash.outcomes import GOOD, LOST, OLDER, Expected, Loaded, classify, differing_paths
from tests.crash.own_saves import GOLDEN, load, reader_digest, save
from tests.crash.recorder import record, strace_works
from trainer.checkpoint import find

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def golden() -> Disk:
    return Disk(read_calls(GOLDEN))


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Disk:
    if not strace_works():
        pytest.skip("strace is not installed, or may not trace; the kept recording is replayed all the same")
    work = tmp_path_factory.mktemp("recording") / "work"
    disk = Disk(record(save, 2, work))
    found = {
        path.replace(socket.gethostname(), "host"): content for path, content in read_files(work / "store").items()
    }
    assert disk.files() == found, "what was recorded does not explain what is on the disk"
    return disk


def loaded(folder: Path, files: Files) -> Loaded:
    shutil.rmtree(folder, ignore_errors=True)
    write_files(folder, files)
    return load(folder)


def outcomes(disk: Disk, states: Iterable[CrashState], folder: Path) -> Iterator[tuple[CrashState, str, Loaded]]:
    for state in states:
        result = loaded(folder, state.files)
        yield state, classify(result, Expected.at(disk.calls, state.index), (), crash=True), result


def assert_nothing_lost(disk: Disk, states: Iterable[CrashState], folder: Path) -> int:
    """Every state gives the newest checkpoint that was saved, and every newer folder is named; how many states."""
    count = 0
    for state, outcome, result in outcomes(disk, states, folder):
        assert outcome == GOOD, f"{state.variant}, before call {state.index}: {outcome}: {result}"
        for path, content in state.files.items():
            name = path.rpartition("/")[2]
            if content is None and name.startswith("step-") and name > result.source:
                assert any(name in text for text in result.told), f"{name} is passed over without a word: {state}"
        count += 1
    return count


def test_after_a_crash_at_any_call_the_newest_checkpoint_is_found(golden: Disk, tmp_path: Path) -> None:
    states = list(golden.crash_states(random_subsets=0))
    writes = {index for index, call in enumerate(golden.calls) if call.kind == "write"}
    assert len(writes) > 25 and {state.index - 1 for state in states} >= writes
    assert assert_nothing_lost(golden, states, tmp_path / "disk") > 200


def test_so_is_it_in_the_writes_of_now(fresh: Disk, tmp_path: Path) -> None:
    states = list(fresh.crash_states(random_subsets=2))
    assert_nothing_lost(fresh, random.Random(0).sample(states, 150), tmp_path / "disk")


@pytest.mark.slow
@pytest.mark.parametrize("recording", ["golden", "fresh"])
def test_any_subset_of_the_unsynced_writes(recording: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    disk: Disk = request.getfixturevalue(recording)
    assert assert_nothing_lost(disk, disk.crash_states(random_subsets=50, seed=1), tmp_path / "disk") > 1000


def test_without_its_syncs_the_same_writes_would_lose_checkpoints(golden: Disk, tmp_path: Path) -> None:
    """What the other tests would see of a missing fsync."""
    kept = [call for call in golden.calls if call.kind != "sync" or not call.path.endswith(".safetensors")]
    unsynced = Disk(kept)
    last = [state for state in unsynced.crash_states(random_subsets=0) if state.index == len(kept)]
    assert LOST in {outcome for _, outcome, _ in outcomes(unsynced, last, tmp_path / "disk")}
    nameless = Disk(
        [call for call in golden.calls if call.kind != "sync" or "manifest" in call.path or "." in call.path]
    )
    last = [state for state in nameless.crash_states(random_subsets=0) if state.index == len(nameless.calls)]
    assert LOST in {outcome for _, outcome, _ in outcomes(nameless, last, tmp_path / "disk")}


def test_damage_is_named_and_never_loaded(golden: Disk, tmp_path: Path) -> None:
    whole = golden.files()
    expected = Expected.at(golden.calls, len(golden.calls))
    newest = max(path for path, content in whole.items() if content is None)
    folder = tmp_path / "disk"
    for damage, path, files in damaged(whole, "checkpoints", flips=4):
        result = loaded(folder, files)
        wanted = OLDER if path.startswith(newest) else GOOD
        assert classify(result, expected, differing_paths(files, whole), crash=False) == wanted, (damage, path, result)
        shutil.rmtree(folder)
        write_files(folder, files)
        step = int(path.split("-")[1].partition("/")[0])
        with pytest.raises(
            (Damaged, NotFound)
        ) as refused:  # asked for by its step, it is refused, at once or when read
            reader_digest(find(Store(folder / "checkpoints"), step))
        assert path.rpartition("/")[0] in str(refused.value) or f"step {step} " in str(refused.value)
