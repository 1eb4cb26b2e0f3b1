from __future__ import annotations

import ctypes
import gc
import mmap
import multiprocessing
import os
import pickle
import resource
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from configs.errors import ShardyardError
from data_pipelines.mapped import MappedFiles
from data_pipelines.native import address_of, copy_rows


def write_files(folder: Path) -> dict[str, bytes]:
    generator = np.random.default_rng(0)
    contents = {f"{name}.arrow": generator.bytes(size) for name, size in [("a", 5000), ("b", 4096), ("c", 1)]}
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return contents


def maps_of(folder: Path) -> int:
    return sum(str(folder) in line for line in Path("/proc/self/maps").read_text().splitlines())


def test_files_lie_behind_each_other_in_one_array(tmp_path: Path) -> None:
    contents = write_files(tmp_path)
    files = MappedFiles(tmp_path, {name: len(content) for name, content in contents.items()})
    for number, content in enumerate(contents.values()):
        assert files.map(number) == len(content)
        start = files.offset(number)
        assert start % 4096 == 0
        assert files.array[start : start + len(content)].tobytes() == content
    assert not files.array.flags.writeable and files.array.ctypes.data == files.address


def test_a_file_is_mapped_when_it_is_first_asked_for(tmp_path: Path) -> None:
    files = MappedFiles(tmp_path, {name: len(content) for name, content in write_files(tmp_path).items()})
    assert maps_of(tmp_path) == 0
    for _ in range(3):
        files.map(1)
    assert maps_of(tmp_path) == 1


def test_slices_of_all_files_are_gathered_in_one_call(tmp_path: Path) -> None:
    contents = write_files(tmp_path)
    files = MappedFiles(tmp_path, {name: len(content) for name, content in contents.items()})
    cuts = [(0, 17), (1, 4096 - 33), (0, 4967), (1, 0), (0, 1)]
    for number in (0, 1):
        files.map(number)
    out = np.empty((len(cuts), 33), np.uint8)
    copy_rows(np.array([files.address + files.offset(file) + start for file, start in cuts]), out)
    for row, (file, start) in enumerate(cuts):
        assert out[row].tobytes() == list(contents.values())[file][start : start + 33]


@pytest.mark.parametrize("row_bytes", [65_535, 65_536, 200_000])
def test_rows_of_any_size_are_gathered(row_bytes: int) -> None:
    """A matrix of all memory with rows of 2^16 bytes has more values than 63 bits count."""
    memory = np.random.default_rng(0).integers(0, 256, 500_000).astype(np.uint8)
    starts = np.array([123_456, 0, 299_999])
    out = np.empty((3, row_bytes), np.uint8)
    copy_rows(address_of(memory) + starts, out)
    for row, start in zip(out, starts.tolist(), strict=True):
        np.testing.assert_array_equal(row, memory[start : start + row_bytes])


@pytest.mark.parametrize(("actual", "readable"), [(None, None), (0, 0), (3000, 3000), (9000, 5000)])
def test_a_file_of_another_length_is_readable_as_far_as_it_goes(
    tmp_path: Path, actual: int | None, readable: int | None
) -> None:
    if actual is not None:
        (tmp_path / "a.arrow").write_bytes(b"x" * actual)
    files = MappedFiles(tmp_path, {"a.arrow": 5000})
    assert files.map(0) == readable
    assert files.array[: readable or 0].tobytes() == b"x" * (readable or 0)


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.arrow").mkdir()
    with pytest.raises(ShardyardError, match=r"a\.arrow"):
        MappedFiles(tmp_path, {"a.arrow": 10}).map(0)


def test_the_range_is_given_back_when_nothing_reads_it(tmp_path: Path) -> None:
    contents = write_files(tmp_path)
    files = MappedFiles(tmp_path, {name: len(content) for name, content in contents.items()})
    files.map(0)
    view = files.array[10:20]
    del files
    gc.collect()
    assert view.tobytes() == contents["a.arrow"][10:20] and maps_of(tmp_path) == 1
    del view
    gc.collect()
    assert maps_of(tmp_path) == 0


def test_a_copy_opens_the_files_anew(tmp_path: Path) -> None:
    contents = write_files(tmp_path)
    files = MappedFiles(tmp_path, {name: len(content) for name, content in contents.items()})
    files.map(0)
    again = pickle.loads(pickle.dumps(files))  # noqa: S301
    assert again.map(0) == 5000 and again.address != files.address
    assert again.array[:5000].tobytes() == contents["a.arrow"]


def _child(files: MappedFiles, content: bytes) -> None:
    files.map(1)
    same = files.array[files.offset(1) :][:4096].tobytes() == content and files.array[0] is not None
    sys.exit(0 if same else 1)


def test_a_forked_process_reads_on(tmp_path: Path) -> None:
    contents = write_files(tmp_path)
    files = MappedFiles(tmp_path, {name: len(content) for name, content in contents.items()})
    files.map(0)
    child = multiprocessing.get_context("fork").Process(target=_child, args=(files, contents["b.arrow"]))
    child.start()
    child.join()
    assert child.exitcode == 0


def test_threads_may_map_at_once(tmp_path: Path) -> None:
    sizes = {f"{number}.arrow": 100 + number for number in range(50)}
    for name, size in sizes.items():
        (tmp_path / name).write_bytes(name.encode() * size)
    files = MappedFiles(tmp_path, sizes)
    threads = [threading.Thread(target=lambda: [files.map(number) for number in range(50)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert maps_of(tmp_path) == 50
    for number, name in enumerate(sizes):
        assert files.array[files.offset(number) :][:6].tobytes() == (name.encode() * 9)[:6]


def test_a_terabyte_takes_addresses_and_no_memory(tmp_path: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    files = MappedFiles(tmp_path, {f"{number}.arrow": 1 << 30 for number in range(1024)})
    assert len(files.array) > 1 << 40
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000  # KiB


def test_too_little_address_space_is_explained(tmp_path: Path) -> None:
    script = """
import resource
from pathlib import Path
from data_pipelines.mapped import MappedFiles
resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
MappedFiles(Path("folder"), {"a.arrow": 1 << 40})
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert "Cannot reserve" in done.stderr and "ulimit -v unlimited" in done.stderr


def resident(files: MappedFiles, start: int, num_bytes: int) -> int:
    """How many of the pages are in memory."""
    pages = (ctypes.c_ubyte * (-(-num_bytes // mmap.PAGESIZE)))()
    libc = ctypes.CDLL(None)
    assert libc.mincore(ctypes.c_void_p(files.address + start), ctypes.c_size_t(num_bytes), pages) == 0
    return sum(page & 1 for page in pages)


def test_what_is_to_be_read_again_leaves_the_memory(tmp_path: Path) -> None:
    folio, page = 2 << 20, mmap.PAGESIZE
    content = np.random.default_rng(0).bytes(4 * folio)
    with (tmp_path / "a.arrow").open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())  # a page that is not on the disk yet has to stay
    (tmp_path / "b.arrow").write_bytes(b"x")
    files = MappedFiles(tmp_path, {"b.arrow": 1, "a.arrow": len(content)})
    files.map(1)
    start = files.offset(1)
    assert files.array[start : start + len(content)].tobytes() == content
    assert resident(files, start, len(content)) == len(content) // page
    files.read_again(1, folio + 10 * page + 5, 2 * folio + 5)
    if resident(files, start, len(content)) == len(content) // page:
        pytest.skip("this file system keeps all of its pages")  # as one in memory does
    assert [resident(files, start + part * folio, folio) * page for part in range(4)] == [folio, 0, 0, folio]
    assert files.array[start : start + len(content)].tobytes() == content
