from __future__ import annotations

import copy
import errno
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from configs.errors import NotFound, ShardyardError, UsageError
from data_pipelines import local_files, segments
from data_pipelines.storage import Store, explain


@pytest.fixture(params=["local", "remote"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return Store(tmp_path / "store") if request.param == "local" else request.getfixturevalue("remote")


def test_files_and_folders(store: Store) -> None:
    child = store.child("a", "b")
    child.write_atomic("x/one.txt", "é")
    child.write_atomic("x/two.bin", b"\x00\x01")
    assert (child.read_text("x/one.txt"), child.size("x/two.bin")) == ("é", 2)
    assert store.list("a/b/x") == ["one.txt", "two.bin"]
    assert (store.list("a/b"), store.list_dirs("a/b"), store.list("nowhere"), store.list_dirs("nowhere")) == (
        [],
        ["x"],
        [],
        [],
    )
    assert child.exists("x/one.txt") and child.exists("x") and not child.exists("y")
    child.write_atomic("x/one.txt", b"new")
    assert store.read_bytes("a/b/x/one.txt") == b"new"
    child.delete("x/one.txt")
    child.delete("x/one.txt")
    assert child.list("x") == ["two.bin"]
    child.delete_dir("x")
    child.delete_dir("x")
    assert not child.exists("x/two.bin")


def test_streams(store: Store) -> None:
    with store.open_output("deep/file.bin") as file:
        file.write(b"0123")
        file.write(memoryview(b"456"))
        assert file.tell() == 7
    with store.open_input("deep/file.bin") as file:
        file.seek(2)
        assert file.read(3) == b"234"
    with pytest.raises(RuntimeError, match="stop"), store.open_output("deep/half.bin") as file:
        file.write(b"half")
        raise RuntimeError("stop")
    assert store.list("deep") == ["file.bin"]


def test_what_is_missing_is_named(store: Store) -> None:
    for ask in (store.read_bytes, store.open_input, store.size):
        with pytest.raises(NotFound, match=r"store/no/file.*Check the path"):
            ask("no/file")


def test_a_store_means_the_same_folder_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    store = Store("runs")
    assert store.uri == str(tmp_path / "runs") == Store(f"file://{tmp_path}/runs").uri
    assert copy.deepcopy(store.child("a")).uri == str(tmp_path / "runs" / "a")
    assert Store("s3://bucket/p?region=x").child("a", "b").uri == "s3://bucket/p/a/b?region=x"


def test_a_uri_that_is_none_is_refused() -> None:
    with pytest.raises(UsageError, match="nonsense://x is not understood"):
        Store("nonsense://x").read_bytes("file")


def full_disk(descriptor: int, data: bytes | memoryview) -> int:
    """Half of the bytes still fit."""
    half = len(data) // 2
    if half == 0:
        raise OSError(errno.ENOSPC, "No space left on device")
    return real_write(descriptor, data[:half])


real_write = os.write


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path)
    store.write_atomic("file", b"good")
    monkeypatch.setattr(local_files.os, "write", full_disk)
    with pytest.raises(ShardyardError, match=r"file: the disk is full. Free some space"):
        store.write_atomic("file", b"new content")
    assert store.read_bytes("file") == b"good"
    assert os.listdir(tmp_path) == ["file"]


def test_leftovers_of_a_killed_writer_are_removed_by_the_next(tmp_path: Path) -> None:
    code = (
        "import os, sys; from data_pipelines import local_files\n"
        "local_files.os.fsync = lambda descriptor: os.kill(os.getpid(), 9)\n"
        "from pathlib import Path; local_files.replace_file(Path(sys.argv[1]), b'half')\n"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path / "file")], check=False)
    assert killed.returncode == -9
    assert len(os.listdir(tmp_path)) == 1
    store = Store(tmp_path)
    assert (store.list(), store.exists("file")) == ([], False)
    store.write_atomic("file", b"whole")
    assert os.listdir(tmp_path) == ["file"]


def test_each_cause_has_a_remedy() -> None:
    for number, words in [(errno.EACCES, "permission denied"), (errno.EROFS, "read-only"), (errno.EDQUOT, "quota")]:
        assert words in str(explain(OSError(number, os.strerror(number)), "write", "/x"))
    assert "credentials" in str(explain(OSError("AWS Error ACCESS_DENIED\nlong story"), "read", "s3://b/x"))


# --- segments


def test_segments_are_joined_in_order(store: Store) -> None:
    first = store.appender("metrics/0001")
    for number in range(5):
        first.write(b"%d\n" % number)
        first.flush()
    first.close()
    second = store.appender("metrics/0001")
    second.write(b"5\n")
    assert store.read_segments("metrics/0001") == b"0\n1\n2\n3\n4\n"
    second.close()
    assert store.read_segments("metrics/0001") == b"0\n1\n2\n3\n4\n5\n"
    assert store.read_segments("metrics/000") == b""


def test_local_segments_roll_and_a_torn_line_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments, "_SEGMENT_BYTES", 10)
    store = Store(tmp_path)
    writer = store.appender("e")
    for number in range(12):
        writer.write(b"line %02d\n" % number)
        writer.flush()
    writer.close()
    assert len(store.segments("e")) == 6
    last = tmp_path / "e-000006.jsonl"
    last.write_bytes(last.read_bytes() + b"torn")
    after = store.appender("e")
    after.write(b"after\n")
    after.close()
    assert store.read_segments("e") == b"".join(b"line %02d\n" % n for n in range(12)) + b"after\n"


def test_a_failed_flush_keeps_the_lines_for_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path)
    writer = store.appender("e")
    writer.write(b"one\n")
    writer.flush()
    writer.write(b"two\n")
    with monkeypatch.context() as patch:
        patch.setattr(local_files.os, "write", full_disk)
        with pytest.raises(ShardyardError, match="disk is full"):
            writer.flush()
    assert (tmp_path / "e-000001.jsonl").read_bytes() == b"one\n"
    writer.write(b"three\n")
    writer.close()
    assert store.read_segments("e") == b"one\ntwo\nthree\n"


def test_two_writers_of_one_prefix_keep_apart(tmp_path: Path) -> None:
    store = Store(tmp_path)
    writers = [store.appender("e") for _ in range(4)]

    def write(number: int) -> None:
        for line in range(50):
            writers[number].write(b"%d %d\n" % (number, line))
            writers[number].flush()

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for writer in writers:
        writer.close()
    lines = store.read_segments("e").split()
    assert sorted(zip(lines[::2], lines[1::2], strict=True)) == sorted(
        (b"%d" % number, b"%d" % line) for number in range(4) for line in range(50)
    )


def test_a_name_does_not_make_a_remote_store_compress(remote: Store) -> None:
    remote.write_atomic("a.gz", b"as it is")
    with remote.open_output("b.gz") as output:
        output.write(b"as it is")
    assert remote.read_bytes("a.gz") == remote.read_bytes("b.gz") == b"as it is"


@pytest.mark.parametrize("kind", ["local", "remote"])
def test_what_there_is_and_all_files_below(kind: str, remote: Store, tmp_path: Path) -> None:
    store = remote if kind == "remote" else Store(tmp_path / "store")
    for name in ("a.txt", "d/b.txt", "d/e/c.txt"):
        store.write_atomic(name, name)
    assert sorted((file.path, file.size) for file in store.walk("d")) == [("b.txt", 7), ("e/c.txt", 9)]
    assert {file.path for file in store.walk()} == {"a.txt", "d/b.txt", "d/e/c.txt"}
    file, folder = store.info("a.txt"), store.info("d")
    assert file is not None and (file.size, file.is_folder) == (5, False)
    assert folder is not None and folder.is_folder
    assert store.info("nothing") is None
