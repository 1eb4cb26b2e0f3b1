from __future__ import annotations

import random
import subprocess
import sys
import tracemalloc
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipelines import repeats
from data_pipelines.duplicates import SignatureWriter, content_hash, find_groups, group_number, read_groups
from data_pipelines.near_duplicates import MIN_SIMILARITY, NUM_HASHES, ROWS_PER_BAND, SHINGLE_TOKENS, signature
from data_pipelines.storage import Store

ROOT = Path(__file__).parents[2]
WORDS = [f"word{number}" for number in range(2000)]


def text(seed: int, length: int = 200) -> list[str]:
    return random.Random(seed).choices(WORDS, k=length)


def changed(words: list[str], count: int, seed: int) -> list[str]:
    generator = random.Random(seed)
    copy = list(words)
    for place in generator.sample(range(len(copy)), count):
        copy[place] = generator.choice(WORDS)
    return copy


def similarity(first: list[str], second: list[str]) -> float:
    """The exact intersection / union of the shingles."""
    one, other = (
        {tuple(words[start : start + SHINGLE_TOKENS]) for start in range(len(words) - SHINGLE_TOKENS + 1)}
        for words in (first, second)
    )
    return len(one & other) / len(one | other)


def found(folder: Path, partitions: Sequence[Sequence[str]], near: bool) -> list[tuple[int, bool]]:
    """(group, whether it is the first of it) of each text of partitions, through files."""
    store, scratch = Store(folder), folder / "scratch"
    scratch.mkdir(parents=True)
    for number, texts in enumerate(partitions):
        with SignatureWriter(store, f"{number:05d}", near) as writer:
            for one in texts:
                writer.add(content_hash({"text": one}), one)
    names = [f"{number:05d}" for number in range(len(partitions))]
    written: dict[str, bytes] = {}
    for name, groups in find_groups(folder, names, near, scratch):
        written[name] = written.get(name, b"") + groups.tobytes()
    assert list(written) == names and {path.name for path in scratch.iterdir()} == {"leaders", "lowest"}
    for name, raw in written.items():
        (folder / name).write_bytes(raw)
    counts = [len(list(read_groups(store, name))) for name in names]
    assert counts == [len(texts) for texts in partitions]
    return [one for name in names for one in read_groups(store, name)]


def check(groups: list[tuple[int, bool]], texts: list[str], leaders: list[int]) -> None:
    """leaders: the number of the first text of each one's group."""
    lowest: dict[int, int] = {}
    for one, leader in zip(texts, leaders, strict=True):
        number = group_number(content_hash({"text": one}))
        lowest[leader] = min(number, lowest.get(leader, number))
    assert groups == [(lowest[leader], leader == number) for number, leader in enumerate(leaders)]


def cut(texts: list[str], generator: random.Random) -> list[list[str]]:
    """Partitions of any size, empty ones too."""
    places = sorted(generator.choices(range(len(texts) + 1), k=4))
    return [texts[start:stop] for start, stop in zip([0, *places], [*places, len(texts)], strict=True)]


@pytest.mark.parametrize("seed", range(5))
def test_equal_rows_against_a_dictionary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    monkeypatch.setattr(repeats, "MEMORY_BYTES", (seed + 1) * 3 * 256)  # of 3 to 15 rows
    generator = random.Random(seed)
    texts = [f"text {generator.randrange(60)}" for _ in range(200)]
    leader: dict[str, int] = {}
    for number, one in enumerate(texts):
        leader.setdefault(one, number)
    check(found(tmp_path, cut(texts, generator), near=False), texts, [leader[one] for one in texts])


def brute_force(texts: list[str]) -> list[int]:
    """All pairs: joined when a band agrees and the signatures are similar; the closure, named by the first."""
    signatures = [signature(one.encode()) for one in texts]
    leaders = list(range(len(texts)))
    for one, other in combinations(range(len(texts)), 2):
        agree = signatures[one] == signatures[other]
        if agree.reshape(-1, ROWS_PER_BAND).all(axis=1).any() and agree.mean() >= MIN_SIMILARITY:
            old, new = leaders[other], leaders[one]
            leaders = [min(old, new) if leader in (old, new) else leader for leader in leaders]
    return leaders


@pytest.mark.parametrize("seed", range(3))
def test_near_duplicates_against_all_pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    monkeypatch.setattr(repeats, "MEMORY_BYTES", 3 * 4096 - seed * 4096)  # of MinHashes 3, 2, 1 rows
    generator = random.Random(seed)
    originals = [text(1000 * seed + number) for number in range(20)]
    copies = [changed(originals[generator.randrange(20)], generator.choice([0, 2, 5, 60]), n) for n in range(30)]
    texts = [" ".join(words) for words in originals + copies]
    generator.shuffle(texts)
    expected = brute_force(texts)
    assert 20 <= len(set(expected)) < 45  # some are alike, some are not
    check(found(tmp_path, cut(texts, generator), near=True), texts, expected)


def test_chains_are_one_group(tmp_path: Path) -> None:
    chain = [text(1)]
    for step in range(6):
        chain.append(changed(chain[-1], 6, step))
    assert similarity(chain[0], chain[-1]) < MIN_SIMILARITY
    texts = [" ".join(words) for words in chain]
    check(found(tmp_path, [texts[:3], texts[3:]], near=True), texts, [0] * len(texts))


def test_very_many_alike_are_one_group(tmp_path: Path) -> None:
    texts = ["the same text again"] * 300 + ["another"] * 3
    check(found(tmp_path, [texts], near=True), texts, [0] * 300 + [300] * 3)


def test_spaces_do_not_count_and_short_texts_compare_whole(tmp_path: Path) -> None:
    texts = ["x = [1,2]", "x  =\n[1, 2]\n", "import os", "import re", "import  os", "", " \n"]
    check(found(tmp_path, [texts], near=True), texts, [0, 0, 2, 3, 2, 5, 5])


def test_no_rows(tmp_path: Path) -> None:
    for near in (False, True):
        assert found(tmp_path / str(near), [[], []], near) == []


def test_what_makes_rows_equal() -> None:
    image = np.arange(12, dtype=np.uint8)
    rows: list[dict[str, Any]] = [
        {"text": "a", "label": 1},
        {"text": "a", "label": 2},
        {"text": "b", "label": 1},
        {"text": b"a", "label": 1},
        {"image": image},
        {"image": image.reshape(3, 4)},
        {"image": image.astype(np.uint16)},
        {"text": "ab", "title": "c"},
        {"text": "a", "title": "bc"},
    ]
    assert len({content_hash(row) for row in rows}) == len(rows)
    assert content_hash({"label": 1, "text": "a"}) == content_hash(rows[0])


def random_signatures(folder: Path, names: list[str], count: int) -> None:
    """Files of so many rows each, none like another."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    for name in names:
        generator.integers(0, 1 << 63, (count, 2), np.uint64).tofile(folder / f"{name}.content")
        generator.integers(0, 1 << 32, (count, NUM_HASHES), np.uint32).tofile(folder / f"{name}.minhash")


@pytest.mark.parametrize("near", [False, True])
def test_memory_does_not_grow_with_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, near: bool) -> None:
    monkeypatch.setattr(repeats, "MEMORY_BYTES", 1 << 20)
    names = [str(number) for number in range(10)]
    peaks = []
    for count in (1000, 3000):
        folder, scratch = tmp_path / str(count), tmp_path / f"scratch{count}"
        random_signatures(folder, names, count)
        scratch.mkdir()
        tracemalloc.start()
        rows = sum(len(groups) for _, groups in find_groups(folder, names, near, scratch))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert rows == count * len(names)
    assert max(peaks) < 2 << 20 and (peaks[1] - peaks[0]) / (2000 * len(names)) < 1  # bytes a row


# Groups 2 million rows with 4 MB, and is not given more than 16 MB of memory of its own to do it.
GROUPER = """
import resource, sys
from pathlib import Path
from data_pipelines import repeats
from data_pipelines.duplicates import find_groups

repeats.MEMORY_BYTES = 4 << 20
(now,) = (int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if "VmData" in line)
resource.setrlimit(resource.RLIMIT_DATA, ((now << 10) + (16 << 20),) * 2)
print(sum(int(groups["first"].sum()) for _, groups in find_groups(Path(sys.argv[1]), ["0"], False, Path(sys.argv[2]))))
"""


def test_two_million_rows_take_no_more_memory_than_they_are_given(tmp_path: Path) -> None:
    """Half of them are of one content, and a quarter of others that are there twice. By rows it took 60 MB."""
    hashes = np.random.default_rng(0).integers(0, 1 << 63, (2_000_000, 2), np.uint64)
    hashes[::2] = hashes[0]
    hashes[1_000_001::2] = hashes[1:1_000_000:2]
    hashes.tofile(tmp_path / "0.content")
    (tmp_path / "scratch").mkdir()
    command = [sys.executable, "-c", GROUPER, str(tmp_path), str(tmp_path / "scratch")]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (ended.stdout, ended.returncode) == ("500001\n", 0), ended.stderr
