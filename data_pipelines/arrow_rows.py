"""Rows out of Arrow record batches: what the sources parquet, arrow and huggingface share.

Texts, binaries, whole and floating-point numbers, booleans (as uint8), lists of numbers and lists of lists of one
length are taken. So are the images and sounds of Hugging Face data sets, which are structs with the file's bytes.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np

from configs.errors import Damaged, UsageError
from data_pipelines.columns import BINARY, TEXT, Column
from data_pipelines.input_files import first_line, without_query
from data_pipelines.sources import MAX_VALUE_BYTES, Bad, InputFile, Partition, Row

if TYPE_CHECKING:
    import pyarrow as pa

_SLICE_ROWS = 1024  # turned into Python objects at once
_SLICE_BYTES = 16 << 20  # of rows that are large

Reader = Callable[[int], Any]  # the value of a row; raises ValueError with the reason why it has none


def columns_of(schema: pa.Schema, wanted: Mapping[str, str], file: str) -> tuple[Column, ...]:
    """The columns that are stored. wanted: stored name -> name in the schema.

    Raises UsageError for one that is not there, or cannot be stored.
    """
    columns = []
    for stored, name in wanted.items():
        if schema.get_field_index(name) < 0:
            raise UsageError(
                f"{file} has no column '{name}', or several (its columns: {', '.join(schema.names)}). Set data.columns "
                "to the stored name and the file's name of each column that is taken, for example {text: content}."
            )
        dtype, shape = _dtype(schema.field(name).type) or _array_of(schema, name) or ("", ())
        try:
            columns.append(Column(stored, dtype, shape))
        except ValueError:
            raise UsageError(
                f"{file}: column '{name}' is of the type {schema.field(name).type}, which cannot be stored. Texts, "
                "binaries, numbers, booleans and lists of numbers can: leave it out of data.columns, or convert it."
            ) from None
    return tuple(columns)


def rows_of(
    batch: pa.RecordBatch, columns: tuple[Column, ...], wanted: Mapping[str, str], *, file: str, key: str, first: int
) -> Iterator[Row | Bad]:
    """The rows of a batch. first: the number of its first row in the file, from 0; a key is key:number from 1."""
    _check_buffers(batch, [wanted[column.name] for column in columns])
    slice_rows = min(_SLICE_ROWS, 1 + batch.num_rows * _SLICE_BYTES // max(1, batch.nbytes))
    item_bytes = {column.name: column.item_bytes for column in columns if column.is_ragged}
    for start in range(0, batch.num_rows, slice_rows):
        piece = batch.slice(start, slice_rows)
        readers = {column.name: _reader(piece.column(wanted[column.name]), column) for column in columns}
        for index in range(piece.num_rows):
            number = first + start + index + 1
            values = {}
            try:
                for name, reader in readers.items():
                    values[name] = value = reader(index)
                    if name in item_bytes and len(value) * item_bytes[name] > MAX_VALUE_BYTES:
                        raise ValueError(f"takes more than {MAX_VALUE_BYTES >> 20} MB, which is no row")
            except ValueError as error:
                yield Bad(file, number, f"column '{wanted[name]}' {error}")
                continue
            yield Row(f"{key}:{number}", values)


def check_same(columns: tuple[Column, ...], others: tuple[Column, ...], file: str) -> None:
    """Raise UsageError where a file's columns are not those of the first file."""
    for column, other in zip(columns, others, strict=True):
        if column != other:
            raise UsageError(
                f"{file}: column '{column.name}' is {other.dtype} of shape {other.shape}, and in the first file "
                f"{column.dtype} of shape {column.shape}. Convert one, or build two data sets."
            )


def partition_pieces(file: InputFile, sizes: list[int], count: int, pieces: str) -> list[Partition]:
    """About `count` partitions of a file that is made of pieces of these sizes, each of about the same size."""
    ends = list(accumulate(sizes))
    starts = [0]
    for number, end in enumerate(ends[:-1], start=1):
        if end * count >= ends[-1] * len(starts):
            starts.append(number)
    return [
        Partition(f"{file.key}, {pieces} {start} to {stop}", (file.path,), start, stop, (file.key,))
        for start, stop in zip(starts, [*starts[1:], len(sizes)], strict=True)
    ]


def _check_buffers(batch: pa.RecordBatch, names: list[str]) -> None:
    """Raise ArrowInvalid where offsets lead out of the buffers of a damaged file, which Arrow does not look at."""
    import pyarrow as pa

    batch.validate()
    as_bytes = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary()}
    for name in names:
        array = batch.column(name)  # texts are looked at one by one, later: one that is not UTF-8 is a bad row
        (array.view(as_bytes[array.type]) if array.type in as_bytes else array).validate(full=True)


@contextlib.contextmanager
def damage_named(path: str, kind: str) -> Iterator[None]:
    """Raise Damaged, which names the file, for what Arrow raises of one that is not whole or not of its kind."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError, SystemError, OverflowError, MemoryError) as error:
        if isinstance(error, OSError) and (error.errno is not None or "://" in path):
            raise  # the disk or the network; open_input says so
        raise Damaged(
            f"{without_query(path)} cannot be read as {kind}: {first_line(error)}. It is cut off or damaged, or of "
            "another kind. Copy it again from where it is whole, or take it out of the data's paths."
        ) from error


def _dtype(kind: pa.DataType) -> tuple[str, tuple[int | None, ...]] | None:
    """(dtype, shape) of what is stored for an Arrow type; None where nothing can be."""
    import pyarrow as pa
    import pyarrow.types as types

    if isinstance(kind, pa.BaseExtensionType):
        kind = kind.storage_type
    if types.is_dictionary(kind):
        kind = kind.value_type
    if types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind):
        return TEXT, (None,)
    if _is_binary(kind) or (types.is_struct(kind) and _bytes_field(kind) >= 0):
        return BINARY, (None,)
    if types.is_boolean(kind):
        return "uint8", ()
    if types.is_integer(kind) or types.is_floating(kind):
        return str(np.dtype(kind.to_pandas_dtype())), ()
    if _is_list(kind):
        inner = _dtype(kind.value_type)
        if inner is None or inner[0] in (TEXT, BINARY) or types.is_boolean(kind.value_type) or None in inner[1]:
            return None
        length = kind.list_size if types.is_fixed_size_list(kind) else None
        return (inner[0], (length, *inner[1])) if length != 0 else None
    return None


def _array_of(schema: pa.Schema, name: str) -> tuple[str, tuple[int | None, ...]] | None:
    """(dtype, shape) of an Array2D, 3D, ... of Hugging Face, a list of lists whose shape stands in the metadata."""
    try:
        feature = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"][name]
        shape = tuple(feature["shape"])
        Column(name, feature["dtype"], shape)
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    return str(feature["dtype"]), shape


def _is_binary(kind: pa.DataType) -> bool:
    import pyarrow.types as types

    return any(test(kind) for test in (types.is_binary, types.is_large_binary, types.is_binary_view)) or (
        types.is_fixed_size_binary(kind) and not types.is_decimal(kind)
    )


def _is_list(kind: pa.DataType) -> bool:
    import pyarrow.types as types

    return bool(types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind))


def _bytes_field(kind: pa.DataType) -> int:
    """The place of the field `bytes` in a struct of an image or a sound; -1 where it is something else."""
    place = int(kind.get_field_index("bytes"))
    return place if place >= 0 and _is_binary(kind.field(place).type) else -1


def _reader(array: pa.Array, column: Column) -> Reader:
    """How to get the values of a short array."""
    import pyarrow as pa
    import pyarrow.compute as compute
    import pyarrow.types as types

    if isinstance(array, pa.ExtensionArray):
        array = array.storage
    if types.is_dictionary(array.type):
        array = array.dictionary_decode()
    if types.is_struct(array.type):
        null, array = compute.is_null(array), array.field(_bytes_field(array.type))
        array = compute.if_else(null, None, array)
    if column.dtype in (TEXT, BINARY):
        return _objects(array)
    if not column.shape:
        return _numbers(array, column)
    return _lists(array, column)


def _objects(array: pa.Array) -> Reader:
    """str and bytes; text is checked, since Arrow does not when it reads."""
    import pyarrow as pa

    try:
        values = array.to_pylist()
    except UnicodeDecodeError:
        values = [_decoded(raw) for raw in array.cast(pa.large_binary(), safe=False).to_pylist()]

    def value(index: int) -> Any:
        found = values[index]
        if found is None:
            raise ValueError("is null")
        if isinstance(found, ValueError):
            raise found
        return found

    return value


def _decoded(raw: bytes | None) -> Any:
    try:
        return None if raw is None else raw.decode("utf-8")
    except UnicodeDecodeError as error:
        return ValueError(f"is not UTF-8 (byte {error.start})")


def _numbers(array: pa.Array, column: Column) -> Reader:
    values = array.to_pylist()
    check = column.numpy_dtype.kind == "f"

    def value(index: int) -> Any:
        found = values[index]
        if found is None:
            raise ValueError("is null")
        if check and not np.isfinite(found):
            raise ValueError(f"is {found}, not a finite number")
        return int(found) if isinstance(found, bool) else found

    return value


def _lists(array: pa.Array, column: Column) -> Reader:
    """Arrays of a list's numbers."""
    if array.null_count:
        return _lists_one_by_one(array, column)
    if column.is_ragged:
        edges = array.offsets.to_numpy() - array.offsets[0].as_py()
    else:
        edges = np.arange(len(array) + 1)
    numbers = array.flatten()
    for _ in column.shape[1:]:
        if numbers.null_count:
            return _lists_one_by_one(array, column)
        numbers = numbers.flatten()
    if numbers.null_count:
        return _lists_one_by_one(array, column)
    values = numbers.to_numpy().astype(column.dtype, copy=False)
    if values.size != edges[-1] * math.prod(column.item_shape):
        return _lists_one_by_one(array, column)
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        return _lists_one_by_one(array, column)
    values = values.reshape(-1, *column.item_shape)

    def value(index: int) -> np.ndarray:
        return values[edges[index] : edges[index + 1]] if column.is_ragged else values[index]

    return value


def _lists_one_by_one(array: pa.Array, column: Column) -> Reader:
    """The same, where some of the lists cannot be used."""

    def value(index: int) -> np.ndarray:
        one = array.slice(index, 1)
        if one.null_count:
            raise ValueError("is null")
        numbers = one.flatten()
        for _ in column.shape[1:]:
            if numbers.null_count:
                raise ValueError("holds a null")
            numbers = numbers.flatten()
        if numbers.null_count:
            raise ValueError("holds a null")
        found = numbers.to_numpy().astype(column.dtype, copy=False)
        if found.dtype.kind == "f" and not np.isfinite(found).all():
            raise ValueError("holds a number that is not finite")
        shape = (-1, *column.item_shape) if column.is_ragged else column.item_shape
        if found.size % math.prod(column.item_shape) or (not column.is_ragged and found.size != math.prod(shape)):
            raise ValueError(f"has {found.size} numbers, which make no array of the shape {column.shape}")
        return found.reshape(shape)

    return value
