"""Pictures among the values of a data set: told apart from other arrays, shown in a terminal, written as PNG."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np

_MAGIC = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"BM", b"RIFF", b"II*\x00", b"MM\x00*")
_CHANNELS = (1, 3, 4)


def as_picture(values: np.ndarray) -> np.ndarray | None:
    """(H, W), (H, W, C) or (C, H, W) uint8 of 1, 3 or 4 channels as (H, W, 3) uint8; None for what is no picture."""
    if values.ndim == 2:
        values = values[:, :, None]
    if values.ndim != 3 or values.size == 0 or values.dtype != np.uint8:
        return None
    first, last = values.shape[0], values.shape[2]
    if first in _CHANNELS and (last not in _CHANNELS or first < last):
        values = values.transpose(1, 2, 0)
    if values.shape[2] not in _CHANNELS:
        return None
    colours = values if values.shape[2] == 1 else values[:, :, :3]
    return np.ascontiguousarray(np.broadcast_to(colours, (*values.shape[:2], 3)))


def decode_picture(raw: bytes) -> np.ndarray | None:
    """The picture in the bytes of a PNG, JPEG, ... file, (H, W, 3) uint8; None for other bytes, or without Pillow."""
    if not raw.startswith(_MAGIC):
        return None
    try:
        from PIL import Image

        with Image.open(io.BytesIO(raw)) as image:
            return np.asarray(image.convert("RGB"), np.uint8)
    except (ImportError, OSError, ValueError, SyntaxError):
        return None


def half_blocks(picture: np.ndarray, max_columns: int = 48) -> list[str]:
    """Lines for a terminal: each character shows two pixels, one above the other. Large pictures are thinned out."""
    step = max(1, -(-picture.shape[1] // max_columns))
    small = picture[::step, ::step]
    if len(small) % 2:
        small = np.concatenate([small, small[-1:]])
    return [
        "".join(
            f"\x1b[38;2;{a[0]};{a[1]};{a[2]};48;2;{b[0]};{b[1]};{b[2]}m▀"
            for a, b in zip(upper.tolist(), lower.tolist(), strict=True)
        )
        + "\x1b[0m"
        for upper, lower in zip(small[::2], small[1::2], strict=True)
    ]


def png(picture: np.ndarray) -> bytes:
    """A PNG file of (H, W, 3) uint8."""
    height, width, _ = picture.shape
    lines = np.concatenate([np.zeros((height, 1), np.uint8), picture.reshape(height, width * 3)], axis=1)
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(lines.tobytes(), 6)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in chunks
    )
