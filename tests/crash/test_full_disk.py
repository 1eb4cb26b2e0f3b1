"""A disk that fills up at each write of a save: training goes on, and what was saved is as it was."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from configs.schema import CheckpointConfig
from data_pipelines.storage import Store
from tests.crash.own_saves import disk_full_after, engine_digest, make_engine, reader_digest, train
from tests.pool import run_workers
from trainer.checkpoint import Checkpointer, newest
from trainer.checkpoint_files import MANIFEST
from trainer.progress import Progress

WORLD = SimpleNamespace(rank=0, size=1, local_rank=0, device=torch.device("cpu"))


class Run:
    """A run of one rank that has saved step 1."""

    def __init__(self, checkpoints: Path) -> None:
        self.folder = checkpoints
        self.engine = make_engine(WORLD, seed=0)
        self.saver = Checkpointer(Store(checkpoints), WORLD, CheckpointConfig(keep=2), Progress())  # type: ignore[arg-type]
        self.step = 0
        self.saved = ""
        assert self.save() is None

    def save(self) -> str | None:
        """Train a step and save it; why that failed. What was saved last is then the newest, and alone."""
        train(self.engine, self.step)
        self.step += 1
        self.saver.save(self.step, self.engine, {}, wait=True)
        if self.saver.last_error is None:
            self.saved = engine_digest(self.engine, self.step)
        found = newest(Store(self.folder), pytest.fail)
        assert found is not None and reader_digest(found[1]) == self.saved
        for folder in self.folder.iterdir():
            assert sorted(path.name for path in folder.iterdir())[0] == MANIFEST and len(os.listdir(folder)) == 2
        return self.saver.last_error


def test_a_file_that_may_not_grow(tmp_path: Path) -> None:
    """At each size a write stops in the middle, or before it begins: of the tensors, the part or the manifest."""
    run = Run(tmp_path / "checkpoints")
    sizes = {path.stat().st_size for path in (tmp_path / "checkpoints").rglob("*") if path.is_file()}
    failed = 0
    for limit in sorted({0, 1, 100, 300, *sizes, *(size - 1 for size in sizes), max(sizes) + 1000}):
        with disk_full_after(limit):
            error = run.save()
        assert error is None or "would exceed the size limit" in error
        failed += error is not None
        assert run.save() is None, "the next save goes well"
    assert failed >= 5


# --- a real file system; a mount needs root, and a namespace keeps it to its process


def in_small_file_systems(_: Any, folder: str) -> list[str | None]:
    """Saves with little free, of space and of files: what each save said; in a process of its own."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(0x00020000) or libc.mount(b"none", b"/", None, 0x44000, None):  # CLONE_NEWNS; MS_REC | MS_PRIVATE
        return []
    said: list[str | None] = []
    for number, (options, fill) in enumerate([("size=256k", fill_space), ("size=4m,nr_inodes=40", fill_inodes)]):
        disk = Path(folder, f"disk-{number}")
        disk.mkdir()
        if libc.mount(b"tmpfs", str(disk).encode(), b"tmpfs", 0, options.encode()):
            return []
        run = Run(disk / "checkpoints")
        for free in range(10):
            fillers = fill(disk, free)
            said.append(run.save())
            for filler in fillers:
                filler.unlink()
            assert run.save() is None, "the next save goes well"
        libc.umount2(str(disk).encode(), 2)
    return said


def fill_space(disk: Path, free: int) -> list[Path]:
    """Leave `free` pages of 4 KiB."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file:
        for _ in range(os.statvfs(disk).f_bavail - free):
            file.write(bytes(4096))
    return [filler]


def fill_inodes(disk: Path, free: int) -> list[Path]:
    """Leave room for `free` names."""
    fillers = [disk / f"filler-{number}" for number in range(os.statvfs(disk).f_ffree - free)]
    for filler in fillers:
        filler.touch()
    return fillers


@pytest.mark.distributed
def test_a_file_system_that_is_full(tmp_path: Path) -> None:
    (said,) = run_workers(in_small_file_systems, 1, str(tmp_path))
    if not said:
        pytest.skip("mounting a small file system needs root")
    assert all(error is None or "the disk is full" in error for error in said)
    assert sum(error is not None for error in said) >= 6 and None in said
