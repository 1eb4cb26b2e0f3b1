"""The blocks of a data set as arrays: what the index knows of each, a row a block."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

_DTYPES = {"file": "<i4", "number": "<i4", "xxh3": "<u8", "content_xxh3": "<u8"}
_PACKED = "packed_"  # begins the name of an array of `packed` in files


@dataclass(frozen=True, eq=False)
class Blocks:
    """Struct of arrays, one entry a block, in the order of the data; slices are views.

    A block is one encapsulated IPC message in a file. Its *content* is what it holds in memory: the message itself, or,
    where it is compressed, the body of the same message written without compression (`decompressed` in writer.py).
    """

    file: np.ndarray  # int32: the file's number in the index's `files`
    number: np.ndarray  # int32: of the record batch within its file
    start: np.ndarray  # int64: first byte of the message in the file
    stop: np.ndarray  # int64: the byte after its last
    rows: np.ndarray  # int64
    tokens: np.ndarray  # int64: elements of the column "tokens", end marks among them; 0 where there is none
    text_bytes: np.ndarray  # int64: of the rows' text as UTF-8
    xxh3: np.ndarray  # uint64: XXH3 (64 bits) of bytes start .. stop
    content_xxh3: np.ndarray  # uint64: XXH3 (64 bits) of the body of the uncompressed message
    content_bytes: np.ndarray  # int64: length of the content
    content_buffers: np.ndarray  # (blocks, buffers) int64: where each data buffer begins in the content
    compressed: bool = False
    packed: Mapping[int, np.ndarray] = field(default_factory=dict)  # seq_len -> int64: best-fit sequences

    def __len__(self) -> int:
        return len(self.file)

    def __getitem__(self, cut: slice) -> Blocks:
        """Some of the blocks, as views."""
        arrays = {name: array[cut] for name, array in self.arrays().items()}
        return Blocks.from_arrays(arrays, self.compressed)

    @property
    def buffers(self) -> np.ndarray:
        """(blocks, buffers) int64: the byte in the file where each data buffer begins; -1 in compressed blocks."""
        if self.compressed:
            return np.full_like(self.content_buffers, -1)
        return self.content_buffers + self.start[:, None]

    def arrays(self) -> dict[str, np.ndarray]:
        """Every array by its name in blocks.arrow."""
        named = {name: getattr(self, name) for name in ARRAYS}
        return named | {f"{_PACKED}{seq_len}": counts for seq_len, counts in sorted(self.packed.items())}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray], compressed: bool) -> Blocks:
        """The blocks of arrays by name. Raises KeyError or ValueError where one is missing or has a wrong name."""
        packed = {}
        for name in arrays.keys() - set(ARRAYS):
            if not name.startswith(_PACKED):
                raise ValueError(f"'{name}' is no array of blocks")
            packed[int(name.removeprefix(_PACKED))] = arrays[name]
        named = {name: arrays[name] for name in ARRAYS}
        return cls(**named, compressed=compressed, packed=dict(sorted(packed.items())))

    @classmethod
    def of(cls, rows: Sequence[Mapping[str, Any]], num_buffers: int, compressed: bool) -> Blocks:
        """The blocks of a list with a mapping for each: array names, and "packed" as {seq_len: count}, to values."""
        arrays = {
            name: np.array([row[name] for row in rows], array_dtype(name)).reshape(
                array_shape(name, len(rows), num_buffers)
            )
            for name in ARRAYS
        }
        for seq_len in rows[0].get("packed", {}) if rows else ():
            arrays[f"{_PACKED}{seq_len}"] = np.array([row["packed"][seq_len] for row in rows], "<i8")
        return cls.from_arrays(arrays, compressed)

    @classmethod
    def join(cls, parts: Sequence[Blocks], num_buffers: int, compressed: bool) -> Blocks:
        """One after the other."""
        parts = [part for part in parts if len(part)]
        if not parts:
            return cls.of([], num_buffers, compressed)
        every = [part.arrays() for part in parts]
        assert all(arrays.keys() == every[0].keys() for arrays in every), "parts packed for different lengths"
        return cls.from_arrays(
            {name: np.concatenate([arrays[name] for arrays in every]) for name in every[0]}, compressed
        )

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; for the parts of a build, a data set has blocks.arrow."""
        return {name: array.tolist() for name, array in self.arrays().items()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any], num_buffers: int, compressed: bool) -> Blocks:
        """What to_json() gave."""
        arrays = {name: np.array(numbers, array_dtype(name)) for name, numbers in values.items()}
        count = len(values["file"])
        arrays["content_buffers"] = arrays["content_buffers"].reshape(count, num_buffers)
        return cls.from_arrays(arrays, compressed)


ARRAYS = tuple(one.name for one in fields(Blocks) if one.name not in ("compressed", "packed"))


def array_dtype(name: str) -> str:
    """The numpy dtype of an array in blocks.arrow."""
    return _DTYPES.get(name, "<i8")


def array_shape(name: str, num_blocks: int, num_buffers: int) -> tuple[int, ...]:
    """The shape of an array in blocks.arrow."""
    return (num_blocks, num_buffers) if name == "content_buffers" else (num_blocks,)


def join_parts(
    parts: Mapping[str, Sequence[tuple[Mapping[str, int], Blocks]]], num_buffers: int, compressed: bool
) -> tuple[dict[str, int], dict[str, Blocks]]:
    """What several writers wrote, as one: for each split the writers' (files, blocks) in order -> (files, splits).

    A writer numbers its own files from 0; here they get their numbers in the whole.
    """
    files: dict[str, int] = {}
    splits = {}
    for split, written in parts.items():
        renumbered = []
        for sizes, blocks in written:
            arrays = blocks.arrays()
            arrays["file"] = arrays["file"] + np.int32(len(files))
            renumbered.append(Blocks.from_arrays(arrays, compressed))
            assert not files.keys() & sizes.keys(), "two writers wrote a file of the same name"
            files |= sizes
        splits[split] = Blocks.join(renumbered, num_buffers, compressed)
    return files, splits


def names_of(seq_lens: Sequence[int]) -> Iterator[str]:
    """The arrays of `packed` for these lengths, by name."""
    return (f"{_PACKED}{seq_len}" for seq_len in seq_lens)
