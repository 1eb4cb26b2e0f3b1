"""Checkpoints that somebody tampered with, digests included: refused as damaged, or read; never another exception."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from configs.errors import Damaged, ShardyardError
from configs.schema import CheckpointConfig
from data_pipelines.storage import Store
from tests.crash.own_saves import make_engine, reader_digest, train
from trainer.checkpoint import Checkpointer, delete_leftovers, newest, open_checkpoint
from trainer.checkpoint_files import MANIFEST, _canonical, _digest
from trainer.progress import Progress

WORLD = SimpleNamespace(rank=0, size=1, local_rank=0, device=torch.device("cpu"))
USED = ("files", "parameters", "buffers", "aliases", "ranges", "scalars", "step", "save", "data", "format")
EXAMPLES = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.integers(-(10**30), 10**30) | st.floats(allow_nan=False)
    | st.sampled_from([-1, 0, 2**31, 2**63, "../../secret", "rank-00000-../x.json", "/etc/passwd", "", "master"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=4,
)  # fmt: skip


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one checkpoint."""
    folder = tmp_path_factory.mktemp("fuzz") / "checkpoints"
    saver = Checkpointer(Store(folder), WORLD, CheckpointConfig(keep=2), Progress())  # type: ignore[arg-type]
    engine = make_engine(WORLD, seed=0)
    train(engine, 1)
    saver.save(1, engine, {"examples_seen": 1}, wait=True)
    assert saver.last_error is None
    return folder


@pytest.fixture
def copied(sound: Path, tmp_path: Path) -> Path:
    return tmp_path / "checkpoints"


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a JSON value."""
    if path:
        yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


def use(checkpoints: Path) -> str | None:
    """Do with a folder all that a start does; the digest of what was read, None if it was refused."""
    told: list[str] = []
    store = Store(checkpoints)
    found = newest(store, told.append)
    delete_leftovers(store)
    if found is None:
        assert told and "step-00000001" in told[0]
    try:
        reader = open_checkpoint(str(checkpoints / "step-00000001"))
        list(reader.weights())
        return reader_digest(reader)
    except ShardyardError as error:
        assert "step-00000001" in str(error)
        return None


def reset(sound: Path, copied: Path) -> dict[str, Any]:
    shutil.rmtree(copied, ignore_errors=True)
    shutil.copytree(sound, copied)
    manifest: dict[str, Any] = json.loads((copied / "step-00000001" / MANIFEST).read_bytes())
    return manifest


def forge(copied: Path, manifest: dict[str, Any]) -> None:
    """Write a manifest that passes its own digest."""
    manifest = {**manifest, "sha256": _digest(manifest)}
    (copied / "step-00000001" / MANIFEST).write_text(_canonical(manifest))


@pytest.mark.parametrize("change", [{"block_bytes": 0}, {"block_bytes": "x"}, {"blocks": []}])
def test_digests_that_do_not_cover_a_file_are_damage(sound: Path, copied: Path, change: dict[str, Any]) -> None:
    manifest = reset(sound, copied)
    manifest["files"][0] |= change
    forge(copied, manifest)
    told: list[str] = []
    assert newest(Store(copied), told.append) is None
    assert "step-00000001" in told[0]
    assert use(copied) is None


@EXAMPLES
@given(data=st.data())
def test_a_forged_manifest(sound: Path, copied: Path, data: st.DataObject) -> None:
    manifest = copy.deepcopy(reset(sound, copied))
    for _ in range(data.draw(st.integers(1, 2))):
        used = [place for place in places({key: manifest[key] for key in USED if key in manifest})]
        *way, last = data.draw(st.sampled_from(used))
        holder = manifest
        for key in way:
            holder = holder[key]
        if data.draw(st.booleans()):
            holder[last] = data.draw(json_values)
        else:
            del holder[last]
    forge(copied, manifest)
    use(copied)


@EXAMPLES
@given(value=json_values)
def test_json_that_is_no_manifest(sound: Path, copied: Path, value: Any) -> None:
    reset(sound, copied)
    (copied / "step-00000001" / MANIFEST).write_text(json.dumps(value))
    assert use(copied) is None


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "", "\0", "NaN", "1e999", "9" * 5000])
def test_text_that_is_hard_to_parse(sound: Path, copied: Path, text: str) -> None:
    reset(sound, copied)
    (copied / "step-00000001" / MANIFEST).write_text(text)
    assert use(copied) is None


@EXAMPLES
@given(data=st.data())
def test_a_forged_header_of_tensors(sound: Path, copied: Path, data: st.DataObject) -> None:
    """The manifest lists the digests of the forged file."""
    manifest = reset(sound, copied)
    (entry,) = manifest["files"]
    path = copied / "step-00000001" / entry["name"]
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    *way, last = data.draw(st.sampled_from(list(places(header))))
    holder = header
    for key in way:
        holder = holder[key]
    holder[last] = data.draw(json_values)
    text = data.draw(st.sampled_from([json.dumps(header).encode(), b"[" * 100_000, b"\xff\xfe"]))
    told = data.draw(st.sampled_from([len(text), 0, 1, len(text) + 1, 2**63, 2**64 - 1]))
    forged = told.to_bytes(8, "little") + text + raw[8 + length :]
    path.write_bytes(forged)
    entry |= {"size": len(forged), "blocks": [xxhash.xxh3_64_hexdigest(forged)]}
    forge(copied, manifest)
    use(copied)


@pytest.mark.parametrize("name", ["../../secret.safetensors", "/tmp/secret.safetensors", "rank-00000-0-000001.pt"])
def test_files_elsewhere_are_not_read(sound: Path, copied: Path, name: str) -> None:
    manifest = reset(sound, copied)
    manifest["files"][0]["name"] = name
    forge(copied, manifest)
    with pytest.raises(Damaged):
        open_checkpoint(str(copied / "step-00000001"))
