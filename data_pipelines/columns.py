"""What a data set's columns are, and how their values lie in a block: as the buffers of an Arrow record batch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pyarrow as pa

NUMBERS = (
    *("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    *("float16", "float32", "float64"),
)
TEXT = "utf8"
BINARY = "binary"
DOCUMENT = "text"  # the column that becomes "tokens"
PAIR = ("source", "target")  # of a translation: where there is no document, they become tokens under their own names
_SMALL = ("int8", "int16", "int32", "uint8", "uint16")  # any of their values is an int32


@dataclass(frozen=True)
class Column:
    """One column. No value is ever missing.

    dtype: the name of a numpy number ("uint16", "float32", ...), or "utf8", or "binary".
    shape: of one value. () is a number; (3, 32, 32) an array of that shape; (None,) a list of any length, which utf8
    and binary always are; (None, 80) a list of vectors.
    """

    name: str
    dtype: str
    shape: tuple[int | None, ...] = ()

    def __post_init__(self) -> None:
        bytes_like = self.dtype in (TEXT, BINARY)
        if bytes_like and self.shape == ():
            object.__setattr__(self, "shape", (None,))
        rest = self.shape[1:] if self.is_ragged else self.shape
        sizes = all(isinstance(size, int) and 0 < size < 1 << 31 for size in rest)
        if (
            not self.name
            or not (bytes_like or self.dtype in NUMBERS)
            or (bytes_like and self.shape != (None,))
            or not sizes
            or math.prod(size or 1 for size in rest) * self.itemsize >= 1 << 31
        ):
            raise ValueError(
                f"column '{self.name}': dtype {self.dtype!r} with shape {self.shape} is none. A dtype is one of "
                f"{', '.join(NUMBERS)}, utf8, binary; only the first size of a shape may be None, and one value takes "
                "less than 2 GiB"
            )

    @cached_property
    def is_ragged(self) -> bool:
        """Whether its values differ in length."""
        return bool(self.shape) and self.shape[0] is None

    @cached_property
    def has_length(self) -> bool:
        """Whether lengths.bin tells how long each value is: the length of a list, or the value of a small number."""
        return self.name != "key" and (self.is_ragged or (self.shape == () and self.dtype in _SMALL))

    @property
    def num_buffers(self) -> int:
        """How many data buffers a block holds for it: values; or int32 offsets (rows + 1 of them), then values."""
        return 2 if self.is_ragged else 1

    @cached_property
    def numpy_dtype(self) -> np.dtype[Any]:
        """Of the values; utf8 and binary are bytes."""
        return np.dtype(np.uint8 if self.dtype in (TEXT, BINARY) else self.dtype).newbyteorder("<")

    @cached_property
    def itemsize(self) -> int:
        """Bytes of one number."""
        return 1 if self.dtype in (TEXT, BINARY) else np.dtype(self.dtype).itemsize

    @cached_property
    def item_shape(self) -> tuple[int, ...]:
        """The shape of one value of a column that is not ragged, of one element of a ragged one's lists."""
        return tuple(size for size in self.shape if size is not None)

    @cached_property
    def item_bytes(self) -> int:
        """Bytes of one value, of a ragged column of one element of its lists."""
        return math.prod(self.item_shape) * self.itemsize

    @property
    def arrow_type(self) -> pa.DataType:
        """Arrays of a fixed shape lie flat, in row-major order, in a fixed-size list."""
        import pyarrow as pa

        if self.dtype in (TEXT, BINARY):
            return pa.string() if self.dtype == TEXT else pa.binary()
        numbers: pa.DataType = pa.from_numpy_dtype(np.dtype(self.dtype))
        item = pa.list_(numbers, math.prod(self.item_shape)) if self.item_shape else numbers
        return pa.list_(item) if self.is_ragged else item

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"name": self.name, "dtype": self.dtype, "shape": list(self.shape)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Column:
        """What to_json() gave. Raises ValueError, TypeError or KeyError for anything else."""
        name, dtype = values["name"], values["dtype"]
        if not isinstance(name, str) or not isinstance(dtype, str):
            raise TypeError("a column's name and dtype must be text")
        return cls(name, dtype, tuple(values["shape"]))


KEY = Column("key", TEXT)


def token_columns(dtype: str) -> tuple[Column, ...]:
    """The columns of tokenized text: what the source calls the document, the end mark and its ids, its UTF-8 bytes."""
    return KEY, Column("tokens", dtype, (None,)), Column("num_bytes", "uint32")


def texts_in(columns: Iterable[Column]) -> tuple[str, ...]:
    """The columns that a tokenizer makes ids of; none where the rows hold no text of that kind."""
    texts = {column.name for column in columns if column.dtype == TEXT}
    if DOCUMENT in texts:
        return (DOCUMENT,)
    return PAIR if texts.issuperset(PAIR) else ()


def has_empty_text(values: Mapping[str, Any]) -> bool:
    """Whether a row's document, or a side of its pair, is the empty text."""
    texts = [values.get(name) for name in ((DOCUMENT,) if DOCUMENT in values else PAIR)]
    return any(isinstance(text, str) and not text for text in texts)


def tokenized(columns: Sequence[Column], dtype: str) -> tuple[Column, ...]:
    """What is stored of a source's columns, once its texts are ids: lists, each led by the end mark."""
    texts = texts_in(columns)
    if texts == (DOCUMENT,):
        return (*token_columns(dtype), *(column for column in columns if column.name != DOCUMENT))
    ids = (Column(column.name, dtype, (None,)) if column.name in texts else column for column in columns)
    return (KEY, *ids)


def first_buffers(columns: Sequence[Column]) -> dict[str, int]:
    """The number of each column's first buffer among the buffers of a block."""
    numbers, total = {}, 0
    for column in columns:
        numbers[column.name] = total
        total += column.num_buffers
    return numbers


def num_buffers(columns: Sequence[Column]) -> int:
    """Data buffers of a block."""
    return sum(column.num_buffers for column in columns)


def arrow_schema(columns: Sequence[Column]) -> pa.Schema:
    """The schema of the Arrow files."""
    import pyarrow as pa

    return pa.schema([pa.field(column.name, column.arrow_type, nullable=False) for column in columns])
