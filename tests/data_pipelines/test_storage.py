from __future__ import annotations

import copy
import errno
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import pyarrow.fs
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from pyarrow.fs import LocalFileSystem

from configs.errors import NotFound, ShardyardError, Unreachable, UsageError
from data_pipelines import file_systems, local_files, segments, storage
from data_pipelines.input_files import read_file
from data_pipelines.storage import Store, explain


@pytest.fixture(params=["local", "remote", "remote folders"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """On a disk; behind a URI, where folders need not be made; behind one where they do."""
    if request.param == "remote":
        return request.getfixturevalue("remote")
    return Store(tmp_path / "store" if request.param == "local" else f"local://{tmp_path}/store")


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


def test_a_tilde_is_what_it_is_in_a_shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    assert Store("~/runs").uri == "/home/me/runs"
    assert Store("~no-user-of-this-name/runs").uri == f"{tmp_path}/~no-user-of-this-name/runs"


def test_a_uri_that_is_none_is_refused() -> None:
    with pytest.raises(UsageError, match="nonsense://x is not understood"):
        Store("nonsense://x").read_bytes("file")


class Failing(MemoryFileSystem):  # type: ignore[misc]
    """A file system of fsspec that fails as `fault` says: with an error, or with silence until `fault` is set."""

    protocol = "failing"
    cachable = False
    fault: Exception | threading.Event | None = None

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(MemoryFileSystem._strip_protocol(path.replace("failing://", "memory://")))

    def _open(self, path: str, *args: Any, **kwargs: Any) -> Any:
        self._fail()
        file = super()._open(path, *args, **kwargs)
        file.read = file.write = self._fail  # what is open already fails too
        return file

    def info(self, path: str, **kwargs: Any) -> Any:
        self._fail()
        return super().info(path, **kwargs)

    def _fail(self, *_: Any) -> bytes:
        if isinstance(Failing.fault, Exception):
            raise Failing.fault
        if isinstance(Failing.fault, threading.Event):
            Failing.fault.wait()
        return b"x"


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    fsspec.register_implementation("failing", Failing)
    monkeypatch.setattr(storage, "_reached", set())
    fsspec.filesystem("memory").pipe("/bucket/file", b"content")
    yield Store("failing://bucket")
    Failing.fault = None
    fsspec.filesystem("memory").rm("/bucket", recursive=True)


def test_whatever_a_remote_store_raises_is_told_with_its_cause(failing: Store) -> None:
    opened = failing.open_input("file")
    for error, told in (
        (RuntimeError("no route\nto host"), (Unreachable, r"RuntimeError: no route\. Check the network")),
        (ValueError("Cannot seek streaming HTTP file"), (ShardyardError, r"from its beginning on\. Copy it")),
        (NotImplementedError(), (ShardyardError, r"read-only\. Choose a store")),
        (TimeoutError(), (Unreachable, r"TimeoutError\. Check the network")),
    ):
        Failing.fault = error
        kind, words = told
        for act in (
            lambda: failing.read_bytes("file"),
            lambda: failing.write_atomic("new", b"x"),
            lambda: failing.exists("file"),
            lambda: read_file("failing://bucket/file"),
        ):
            with pytest.raises(kind, match=rf"Cannot \w+( up)? failing://bucket/(file|new): .*{words}"):
                act()
        with pytest.raises(OSError):
            opened.read()


class WholeFiles(BaseHTTPRequestHandler):
    """Gives no part of a file; says 404 for some, and 503 for others."""

    def do_GET(self) -> None:
        status = 404 if "missing" in self.path else 503 if "busy" in self.path else 200
        self.send_response(status)
        if "endless" not in self.path:
            self.send_header("Content-Length", "10")
        self.end_headers()
        self.wfile.write(b"0123456789" if self.command == "GET" else b"")

    do_HEAD = do_GET

    def log_message(self, *_: Any) -> None:
        pass


def test_an_http_server(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("aiohttp")
    monkeypatch.setattr(storage, "_reached", set())
    with ThreadingHTTPServer(("127.0.0.1", 0), WholeFiles) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        store = Store(f"http://127.0.0.1:{server.server_port}/folder")
        try:
            assert store.read_bytes("whole") == b"0123456789" and not store.exists("missing")
            with pytest.raises(NotFound, match=r"folder/missing: there is no such file"):
                store.read_bytes("missing")
            with pytest.raises(Unreachable, match=r"folder/busy: the server says 503\. Check the network"):
                store.exists("busy")
            with (
                pytest.raises(ShardyardError, match=r"it can only be read from its beginning on\. Copy it to a local"),
                store.explained("read", "endless"),
                store.open_input("endless") as file,
            ):
                file.seek(5)
            with pytest.raises(ShardyardError, match=r"Cannot write .*folder/x: the file system is read-only"):
                store.write_atomic("x", b"x")
        finally:
            server.shutdown()
            thread.join()
    with pytest.raises(Unreachable, match=r"Cannot look up .*folder/x: Connect call failed.*Check the network"):
        store.exists("x")


def test_a_store_that_is_silent_at_first_is_told(failing: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "CONTACT_S", 0.05)
    Failing.fault = threading.Event()
    try:
        with pytest.raises(Unreachable, match=r"failing://bucket has not answered for 0\.05 s\. Check the network"):
            failing.exists("file")
    finally:
        Failing.fault.set()
    assert failing.exists("file")
    Failing.fault = None
    assert failing.child("deep").path() == "failing://bucket/deep" and not failing.child("deep").exists("x")


def test_google_cloud_storage_does_not_try_for_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    fake = SimpleNamespace(from_uri=lambda uri: asked.append(uri) or (LocalFileSystem(), "x"))
    monkeypatch.setattr(pyarrow.fs, "FileSystem", fake)
    for uri in ("gs://anonymous@b/x", "gcs://b/x?a=b", "gs://b/x?retry_limit_seconds=7", "s3://b/x"):
        file_systems.open_file_system(uri)
    assert asked == [
        "gs://anonymous@b/x?retry_limit_seconds=30",
        "gcs://b/x?a=b&retry_limit_seconds=30",
        "gs://b/x?retry_limit_seconds=7",
        "s3://b/x",
    ]


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
