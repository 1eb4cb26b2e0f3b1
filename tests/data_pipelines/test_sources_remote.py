"""Sources behind URIs: S3 (moto), and what fsspec serves."""

from __future__ import annotations

import gzip
import json
import logging
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from configs.errors import NotFound, ShardyardError, Unreachable, UsageError
from data_pipelines.input_files import join_path, open_decompressed
from data_pipelines.sources import (
    Bad,
    audio,
    csv,
    file_identity,
    find_files,
    image_folder,
    jsonl,
    parquet,
    partition_files,
    text,
    webdataset,
)
from data_pipelines.storage import Store
from tests.data_pipelines.reading import read_all, rows_of
from tests.data_pipelines.test_sources_media import FIELDS, SAMPLES, picture, sound, tar_of

Place = Callable[..., str]  # path in the store -> URI


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    moto_server = pytest.importorskip("moto.server", reason="moto[s3,server] is not installed")
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    running = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    yield ":".join(map(str, running.get_host_and_port()))
    running.stop()


def s3_place(request: pytest.FixtureRequest) -> Place:
    monkeypatch, tmp_path = request.getfixturevalue("monkeypatch"), request.getfixturevalue("tmp_path")
    for name, value in {"AWS_ACCESS_KEY_ID": "id", "AWS_SECRET_ACCESS_KEY": "key"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    address = request.getfixturevalue("server")
    query = f"endpoint_override={address}&scheme=http&region=us-east-1&allow_bucket_creation=true"
    bucket = f"b{uuid4().hex}"
    Store(f"s3://{bucket}?{query}")._remote[0].create_dir(bucket)
    return lambda path="": f"s3://{bucket}/{path}?{query}"


@pytest.fixture(params=["memory", pytest.param("s3", marks=pytest.mark.longer)])
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    if request.param == "s3":
        yield s3_place(request)
        return
    bucket = f"bucket-{uuid4().hex}"
    yield lambda path="": f"memory://{bucket}/{path}"
    memory = fsspec.filesystem("memory")
    if memory.exists(f"/{bucket}"):
        memory.rm(f"/{bucket}", recursive=True)


def put(place: Place, files: dict[str, bytes]) -> None:
    for path, content in files.items():
        folder, _, name = path.rpartition("/")
        Store(place(folder)).write_atomic(name, content)


def test_files_are_found_as_in_a_local_folder(place: Place, tmp_path: Path) -> None:
    names = ("d/b.txt", "d/a.MD", "d/sub/c d%20?#.txt", "d/.hidden.txt", "d/.git/x.txt", "d/skip.bin", "alone.txt")
    names = tuple(name.replace("?", "") if place("x").startswith("memory") else name for name in names)
    put(place, {name: name.encode() for name in names})
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    config = text.Config(paths=(place("d"), place("alone.txt"), place("d/b.txt")))
    here = text.Config(paths=(f"{tmp_path}/d", f"{tmp_path}/alone.txt", f"{tmp_path}/d/b.txt"))
    assert [(row.key, row.values) for row in rows_of(text, config)] == [
        (row.key, row.values) for row in rows_of(text, here)
    ]
    parts = text.partitions(config)
    assert pickle.loads(pickle.dumps(parts)) == parts  # noqa: S301 - our own bytes
    before = text.identity(config)
    json.dumps(before)
    put(place, {"d/b.txt": b"edited, and longer"})
    assert text.identity(config) != before
    with pytest.raises(NotFound, match=r"no file or folder .*nowhere\. Check data\.paths"):
        text.partitions(text.Config(paths=(place("nowhere"),)))


def test_every_kind_of_file_is_read(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [json.dumps({"text": f"text {n}"}).encode() for n in range(500)]
    rows = pa.BufferOutputStream()
    pq.write_table(pa.table({"text": [f"p{n}" for n in range(10)]}), rows)
    put(
        place,
        {
            "j/a.jsonl": b"\n".join(lines),
            "j/b.jsonl.gz": gzip.compress(b"\n".join(lines)),
            "p/a.parquet": rows.getvalue().to_pybytes(),
            "c/a.csv": b"x,y\n1,0\n2,1\n",
            "w/a.tar": tar_of(SAMPLES),
            "i/cat/1.png": picture("png"),
            "i/dog/2.png": picture("png"),
            "s/m.csv": b"path,text\nclips/a b.wav,hello\n",
            "s/clips/a b.wav": sound(),
        },
    )
    limits = {**partition_files.__kwdefaults__, "target_bytes": 2000}
    monkeypatch.setattr(partition_files, "__kwdefaults__", limits)
    config = jsonl.Config(paths=(place("j"),))
    assert len(jsonl.partitions(config)) > 4
    assert [row.values["text"] for row in rows_of(jsonl, config)] == [f"text {n}" for n in range(500)] * 2
    assert len(rows_of(parquet, parquet.Config(paths=(place("p"),)))) == 10
    assert len(rows_of(csv, csv.Config(paths=(place("c/a.csv"),), label_column="y"))) == 2
    assert len(rows_of(webdataset, webdataset.Config(paths=(place("w"),), fields=FIELDS))) == 2
    images = image_folder.Config(path=place("i"))
    assert [(row.key, row.values["label"]) for row in rows_of(image_folder, images)] == [
        ("cat/1.png", 0),
        ("dog/2.png", 1),
    ]
    pytest.importorskip("soundfile")
    (clip,) = rows_of(audio, audio.Config(manifest=place("s/m.csv")))
    assert clip.values["text"] == "hello" and len(clip.values["audio"]) == 1600


def test_a_bad_line_of_a_range_is_told_by_its_byte(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [b'{"text": "fine"}'] * 300
    lines[250] = b"{"
    put(place, {"a.jsonl": b"\n".join(lines)})
    limits = {**partition_files.__kwdefaults__, "target_bytes": 1000}
    monkeypatch.setattr(partition_files, "__kwdefaults__", limits)
    found = read_all(jsonl, jsonl.Config(paths=(place("a.jsonl"),)))
    (bad,) = [row for row in found if isinstance(row, Bad)]
    assert bad.line is None and f"at byte {250 * 17}: " in bad.reason
    assert "?" not in bad.file  # an address may hold what is nobody's business


class Broken:
    def __enter__(self) -> Broken:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def read(self, size: int) -> bytes:
        raise OSError("AWS Error INTERNAL_FAILURE during GetObject operation")


def test_a_compressed_file_whose_store_fails_is_not_called_damaged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Store, "open_input", lambda *_: Broken())
    with (
        pytest.raises(Unreachable, match=r"memory://b/a\.gz: AWS Error INTERNAL_FAILURE.*Check the network"),
        open_decompressed("memory://b/a.gz") as file,
    ):
        file.read(1)


def test_stores_that_are_not_there_are_told() -> None:
    with pytest.raises(UsageError, match=r"nosuch://x .*is not understood.*local folder or a URI"):
        find_files(["nosuch://x/y"], (".txt",))


@pytest.mark.longer
def test_a_store_out_of_reach_is_told() -> None:
    with pytest.raises(ShardyardError, match="s3://bucket"):
        find_files(["s3://bucket/x?endpoint_override=127.0.0.1:9&scheme=http&region=us-east-1"], (".txt",))


@pytest.mark.parametrize(
    ("folder", "relative", "joined"),
    [
        ("a", "b c.wav", "a/b c.wav"),
        ("a", "/b", "/b"),
        ("", "b", "b"),
        ("s3://x/a?q=1", "b c", "s3://x/a/b%20c?q=1"),
        ("a", "s3://x/b", "s3://x/b"),
    ],
)
def test_paths_are_joined(folder: str, relative: str, joined: str) -> None:
    assert join_path(folder, relative) == joined


def test_identity_is_of_all_files(tmp_path: Path) -> None:
    files = [
        find_files([str(tmp_path)], (".txt",)) for name in ("a", "b") if (tmp_path / f"{name}.txt").write_text("x")
    ]
    found: list[Any] = [file_identity(some) for some in files]
    assert [identity[:2] for identity in found] == [[1, 1], [2, 2]]
