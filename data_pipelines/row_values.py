"""Values as a column stores them, out of what JSON, CSV and tar files hold."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from data_pipelines.columns import BINARY, TEXT, Column


def value_of(value: Any, column: Column) -> Any:
    """`value` as the column takes it: str, bytes, a number, or an array.

    Raises ValueError with the reason, in words that follow the name of a field: "is null", "is int, not text".
    """
    if value is None:
        raise ValueError("is null")
    if column.dtype == TEXT:
        return _text(value)
    if column.dtype == BINARY:
        if not isinstance(value, bytes):
            raise ValueError(f"is {_kind(value)}, not bytes")
        return value
    if column.shape:
        return _array(value, column)
    return _number(value, column.dtype)


def number_in(text: str, dtype: str) -> int | float:
    """The number that a text says. Raises ValueError as value_of does."""
    try:
        value: int | float = int(text) if _limits(dtype)[0] else float(text)
    except ValueError:
        whole = "whole number" if _limits(dtype)[0] else "number"
        raise ValueError(f"is '{text[:40]}', not a {whole}") from None
    return _number(value, dtype)


@cache
def _limits(dtype: str) -> tuple[bool, int | float, int | float]:
    """(whether it holds whole numbers, the least, the most) of a numpy number."""
    if np.dtype(dtype).kind in "iu":
        return True, int(np.iinfo(dtype).min), int(np.iinfo(dtype).max)
    return False, float(np.finfo(dtype).min), float(np.finfo(dtype).max)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"is {_kind(value)}, not text")
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            raise ValueError("holds half of a surrogate pair, which is no text") from None
    return value


def _number(value: Any, dtype: str) -> int | float:
    if not isinstance(value, int | float):  # bool is one
        raise ValueError(f"is {_kind(value)}, not a number")
    is_whole, least, most = _limits(dtype)
    if is_whole:
        if isinstance(value, float) and not value.is_integer():
            raise ValueError(f"is {value}, not a whole number")
        if not least <= value <= most:
            raise ValueError(f"is {value}, out of the range of {dtype}")
        return int(value)
    if not least <= value <= most:  # NaN is not either
        raise ValueError(f"is {value}, not a finite {dtype}")
    return float(value)


def _array(value: Any, column: Column) -> np.ndarray:
    if not isinstance(value, list | tuple | np.ndarray):
        raise ValueError(f"is {_kind(value)}, not a list of numbers")
    try:
        given = np.array(value)
    except (ValueError, OverflowError):
        raise ValueError("is a list of lists of different lengths") from None
    if given.size and given.dtype.kind not in "biuf":
        raise ValueError("is a list that holds something that is no number")
    shape = column.shape
    if not given.size and column.is_ragged:
        return np.zeros((0, *column.item_shape), column.dtype)
    fits = len(given.shape) == len(shape) and all(
        size in (None, have) for size, have in zip(shape, given.shape, strict=True)
    )
    if not fits:
        wanted = " x ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"has the shape {' x '.join(map(str, given.shape))}, not {wanted}")
    if not np.isfinite(given).all():
        raise ValueError("holds a number that is not finite")
    stored = given.astype(column.dtype)
    if column.numpy_dtype.kind in "iu" and (stored != given).any():
        raise ValueError(f"holds a number that is no {column.dtype}")
    if not np.isfinite(stored).all():
        raise ValueError(f"holds a number out of the range of {column.dtype}")
    return stored


def _kind(value: Any) -> str:
    return type(value).__name__
