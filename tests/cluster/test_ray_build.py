from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from cluster.ray_build import RayTasks, _check_store
from configs.errors import NotFound, RunFailed, UsageError
from data_pipelines.build import ensure_dataset
from data_pipelines.storage import Store
from data_pipelines.tokenizer import TokenizerConfig
from tests.data_pipelines.lines_source import write_lines
from tests.data_pipelines.test_build import contents, texts
from tests.tiny import write_recipe

pytestmark = [pytest.mark.ray, pytest.mark.daemon]
ROOT = Path(__file__).resolve().parents[2]
SMALL_BPE = TokenizerConfig(vocab_size=300)


def square(number: int) -> int:
    return number * number


def die_at_first(path: str) -> int:
    """End this process, unless the file is there; the process id."""
    if not os.path.exists(path):
        Path(path).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return os.getpid()


def die(_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fail(number: int) -> int:
    if number == 3:
        raise NotFound("Cannot read the third: there is no such file.")
    time.sleep(0.01)
    return number


def stumble(_: object) -> None:
    raise ZeroDivisionError("a fault in the program")


class TestTasks:
    """On one Ray."""

    @pytest.fixture(scope="class")
    def tasks(self) -> Iterator[RayTasks]:
        with RayTasks(workers=2) as run_tasks:
            yield run_tasks

    def test_results_of_all_tasks(self, tasks: RayTasks) -> None:
        assert sorted(tasks(square, range(20))) == [number**2 for number in range(20)]
        assert list(tasks(square, [])) == []

    def test_a_killed_task_is_run_again(self, tasks: RayTasks, tmp_path: Path) -> None:
        pids = list(tasks(die_at_first, [str(tmp_path / name) for name in "ab"]))
        assert len(pids) == 2 and (tmp_path / "a").exists() and os.getpid() not in pids

    def test_errors_come_out_as_what_they_are(self, tasks: RayTasks) -> None:
        with pytest.raises(NotFound, match=r"^Cannot read the third: there is no such file\.$"):
            list(tasks(fail, range(8)))
        with pytest.raises(RunFailed, match=r"ZeroDivisionError: a fault in the program"):
            list(tasks(stumble, [1, 2]))
        with pytest.raises(RunFailed, match=r"died 4 times: killed by a signal"):
            list(tasks(die, [1]))
        assert list(tasks(square, [5])) == [25]  # it goes on working

    def test_progress_is_told(self, tasks: RayTasks) -> None:
        seen: list[tuple[int, int]] = []
        with RayTasks(watch=lambda done, of: seen.append((done, of))) as run_tasks:
            list(run_tasks(square, range(3)))
        assert seen[0] == (0, 3) and seen[-1] == (3, 3)
        assert list(tasks(square, [5])) == [25]  # who did not start Ray does not end it

    def test_a_store_that_no_node_sees_is_refused(
        self, tasks: RayTasks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert list(tasks(square, [5])) == [25]
        _check_store(Store(tmp_path))
        # As on a node of its own: what is written here is not there.
        monkeypatch.setattr(Store, "write_atomic", lambda *_: None)
        with pytest.raises(UsageError, match="cannot see the store"):
            _check_store(Store(tmp_path))
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("workers", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_the_same_bytes_with_any_number_of_workers(tmp_path: Path, workers: int) -> None:
    files: list[list[Any]] = [[*texts(40, seed % 5), b"{bad"] for seed in range(7)]
    data = write_lines(tmp_path / "source", files, duplicates="near", max_bad_share=0.1)
    ensure_dataset(Store(tmp_path / "alone"), data, SMALL_BPE)
    with RayTasks(workers=workers) as run_tasks:
        ensure_dataset(Store(tmp_path / "many"), data, SMALL_BPE, run_tasks=run_tasks)
    assert contents(tmp_path / "many") == contents(tmp_path / "alone")


def start_build(recipe: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "cluster.cli", "data", "build", str(recipe), "--json", *more]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command,
        cwd=recipe.parent,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # Where the tests run in the background of a script, Ctrl-C is ignored, and that is inherited.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def test_ctrl_c_keeps_what_is_finished_and_leaves_no_process(tmp_path: Path) -> None:
    data = write_lines(tmp_path / "source", [texts(40, seed) for seed in range(12)], row_s=0.01)
    recipe = write_recipe(tmp_path, data=data.model_dump())
    build = start_build(recipe, "--workers", "2")
    try:
        deadline = time.monotonic() + 120
        while not list(tmp_path.glob("runs/datasets/*/parts/?????.json")):
            assert build.poll() is None and time.monotonic() < deadline, build.communicate()
            time.sleep(0.05)
        below = psutil.Process(build.pid).children(recursive=True)
        os.killpg(build.pid, signal.SIGINT)
        _, said = build.communicate(timeout=60)
    finally:
        if build.poll() is None:
            build.kill()
            build.wait()
    assert build.returncode == 130 and said.endswith("Interrupted.\n"), said
    assert not psutil.wait_procs(below, timeout=10)[1]
    (folder,) = tmp_path.glob("runs/datasets/*")
    done = {path.stem: path.stat().st_mtime_ns for path in folder.glob("parts/?????.json")}
    shards = {path.name: path.stat().st_ino for path in folder.glob("*.arrow")}
    assert 0 < len(done) < 12 and {name.split("-")[1] for name in shards} <= set(done)  # nothing half written
    again = start_build(recipe, "--workers", "1")
    out, said = again.communicate(timeout=120)
    assert again.returncode == 0, said
    built = json.loads(out)
    assert sum(split["rows"] for split in built["splits"].values()) == 480
    assert all((folder / name).stat().st_ino == inode for name, inode in shards.items())
