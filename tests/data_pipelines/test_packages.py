from __future__ import annotations

import hashlib
import multiprocessing
import os
import sys
from pathlib import Path

import pytest

from configs.errors import Damaged, ShardyardError, Unreachable
from data_pipelines.packages import Package, cache_folder, fetch, member, members, unpacked
from tests.data_pipelines.small_packages import archive

CONTENT = archive("tiny-1.0.tgz", {"package/a.txt": b"one", "package/b/c.txt": b"two", "package/d.bin": b"three"})
NPM = Package("npm", "tiny", "1.0", "tiny-1.0.tgz", hashlib.sha256(CONTENT).hexdigest())


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return cache_folder()


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An `npm` (and an `apt-get`) that copies the archive, and notes each call in the file returned."""
    (tmp_path / "archive").write_bytes(CONTENT)
    return client(tmp_path, monkeypatch, f"sleep 0.2; cp {tmp_path}/archive tiny-1.0.tgz")


def client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> Path:
    calls = tmp_path / "calls"
    calls.write_text("")
    folder = tmp_path / "bin"
    folder.mkdir(exist_ok=True)
    for name in ("npm", "apt-get"):
        (folder / name).write_text(f'#!/bin/sh\necho "$@" >> {calls}\n{body}\n')
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    return calls


def visible(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith(".lock"))


def test_a_package_is_fetched_once_and_read(calls: Path, cache: Path) -> None:
    assert fetch(NPM) == cache / NPM.file
    assert fetch(NPM).read_bytes() == CONTENT
    assert calls.read_text().splitlines() == ["pack --silent --ignore-scripts tiny@1.0"]
    assert dict(members(NPM, "*.txt")) == {"package/a.txt": b"one", "package/b/c.txt": b"two"}
    assert member(NPM, "package/d.bin") == b"three"
    assert visible(cache) == [NPM.file]


def test_a_damaged_file_in_the_cache_is_fetched_again(calls: Path, cache: Path) -> None:
    fetch(NPM).write_bytes(CONTENT[:-1])
    assert fetch(NPM).read_bytes() == CONTENT
    assert len(calls.read_text().splitlines()) == 2


def test_what_a_killed_fetch_left_is_removed(calls: Path, cache: Path) -> None:
    leftover = cache / f".{NPM.file}.tmp-abc"
    leftover.mkdir(parents=True)
    (leftover / "half").write_bytes(b"x")
    fetch(NPM)
    assert visible(cache) == [NPM.file]


def test_another_archive_than_the_pinned_one_is_refused_and_not_kept(calls: Path, cache: Path, tmp_path: Path) -> None:
    (tmp_path / "archive").write_bytes(CONTENT + b"\0")
    with pytest.raises(Damaged, match=f"{NPM.sha256} was pinned"):
        fetch(NPM)
    assert visible(cache) == []


@pytest.mark.parametrize("kind", ["npm", "apt-get"])
def test_offline_the_error_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path, kind: str
) -> None:
    client(tmp_path, monkeypatch, "echo starting; echo 'no address for the host' >&2; exit 1")
    package = Package(kind, "tiny", "1.0", "tiny-1.0.tgz", NPM.sha256)  # type: ignore[arg-type]
    with pytest.raises(Unreachable) as caught:
        fetch(package)
    for part in ("no address for the host", "Check the network", " ".join(package.command(Path())), str(cache)):
        assert part in str(caught.value)
    assert visible(cache) == []


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    client(tmp_path, monkeypatch, "echo 'npm error ENOSPC: No space left on device, write' >&2; exit 228")
    with pytest.raises(ShardyardError, match=f"Cannot write {cache / NPM.file}: the disk is full"):
        fetch(NPM)
    assert visible(cache) == []


def test_put_into_the_cache_by_hand_it_needs_no_client(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(Unreachable, match=f"there is no npm .* put {NPM.file} into {cache}"):
        fetch(NPM)
    (cache / NPM.file).write_bytes(CONTENT)
    assert member(NPM, "package/a.txt") == b"one"


def _fetch_in_a_process(results: multiprocessing.Queue[str]) -> None:
    results.put(hashlib.sha256(fetch(NPM).read_bytes()).hexdigest())


def test_two_processes_at_once_fetch_once(calls: Path, cache: Path) -> None:
    context = multiprocessing.get_context("fork")
    results: multiprocessing.Queue[str] = context.Queue()
    processes = [context.Process(target=_fetch_in_a_process, args=(results,)) for _ in range(3)]
    for process in processes:
        process.start()
    assert [results.get(timeout=60) for _ in processes] == [NPM.sha256] * 3
    for process in processes:
        process.join(60)
    assert len(calls.read_text().splitlines()) == 1


# --- pip itself, without a network: it finds a wheel in a folder


def wheel(folder: Path) -> Package:
    name = "tiny_data-1.0-py3-none-any.whl"
    metadata = b"Metadata-Version: 2.1\nName: tiny-data\nVersion: 1.0\n"
    info = {"METADATA": metadata, "WHEEL": b"Wheel-Version: 1.0\nTag: py3-none-any\n", "RECORD": b""}
    content = archive(
        name, {"tiny_data/a.csv": b"1,2\n", **{f"tiny_data-1.0.dist-info/{key}": info[key] for key in info}}
    )
    folder.mkdir()
    (folder / name).write_bytes(content)
    return Package("pip", "tiny-data", "1.0", name, hashlib.sha256(content).hexdigest())


def test_pip_fetches_a_wheel_and_checks_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    package = wheel(tmp_path / "wheels")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    other = Package("pip", package.name, package.version, package.file, "0" * 64)
    with pytest.raises(Damaged, match="has another sha256"):
        fetch(other)
    assert visible(cache) == []
    assert member(package, "tiny_data/a.csv") == b"1,2\n"
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(Unreachable, match=r"pip says: .*pip download --no-deps .*tiny-data==2.0"):
        fetch(Package("pip", "tiny-data", "2.0", "tiny_data-2.0-py3-none-any.whl", "0" * 64))


def test_a_wheel_of_one_platform_is_chosen_on_every_platform() -> None:
    package = Package("pip", "x", "1", "x-1-cp311-cp311-manylinux_2_27_x86_64.manylinux_2_28_x86_64.whl", "0")
    command = " ".join(package.command(Path("/cache")))
    assert command.startswith(sys.executable)
    chosen = "--python-version 3.11 --implementation cp --abi cp311 --platform manylinux_2_27_x86_64"
    assert f"--only-binary :all: {chosen} --platform manylinux_2_28_x86_64" in command
    assert "--no-binary :all:" in " ".join(Package("pip", "x", "1", "x-1.tar.gz", "0").command(Path()))


def test_the_installed_file_is_taken_only_when_it_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tiny_data").mkdir()
    (tmp_path / "tiny_data" / "a.csv").write_bytes(b"installed")
    (tmp_path / "tiny_data" / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    package = wheel(tmp_path / "wheels")
    monkeypatch.setenv("PATH", os.devnull)
    assert member(package, "tiny_data/a.csv", hashlib.sha256(b"installed").hexdigest()) == b"installed"
    cache_folder().mkdir(parents=True)
    (cache_folder() / package.file).write_bytes((tmp_path / "wheels" / package.file).read_bytes())
    assert member(package, "tiny_data/a.csv", hashlib.sha256(b"1,2\n").hexdigest()) == b"1,2\n"


def test_a_debian_package_is_read_without_dpkg(cache: Path) -> None:
    content = archive("tiny_1.0_all.deb", {"usr/share/a.txt": b"one", "usr/share/b.bin": b"two"})
    package = Package("apt-get", "tiny", "1.0", "tiny_1.0_all.deb", hashlib.sha256(content).hexdigest())
    cache.mkdir(parents=True)
    (cache / package.file).write_bytes(content)
    assert list(members(package, "usr/*.txt")) == [("usr/share/a.txt", b"one")]
    with pytest.raises(Damaged, match="holds no usr/share/c"):
        member(package, "usr/share/c")


def test_a_file_that_is_unpacked_is_checked_whenever_it_is_used(
    cache: Path,
) -> None:
    content = archive("one-1.0-py3-none-any.whl", {"one/weights": b"w" * 1000, "one/other": b"o"})
    package = Package("pip", "one", "1.0", "one-1.0-py3-none-any.whl", hashlib.sha256(content).hexdigest())
    cache.mkdir(parents=True)
    (cache / package.file).write_bytes(content)
    digest = hashlib.sha256(b"w" * 1000).hexdigest()
    path = unpacked(package, "one/weights", digest)
    assert path.read_bytes() == b"w" * 1000
    path.write_bytes(b"w" * 999)
    assert unpacked(package, "one/weights", digest).read_bytes() == b"w" * 1000
    with pytest.raises(Damaged, match="not the file that was pinned"):
        unpacked(package, "one/other", digest)
    assert {file.name for file in cache.iterdir() if file.name[0] != "."} == {package.file, path.name}
