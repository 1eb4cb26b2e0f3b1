"""Pictures of what a model makes: arrays of pixels put together, marked, and written as PNG (ISO/IEC 15948)."""

from __future__ import annotations

import struct
import unicodedata
import zlib
from collections.abc import Sequence

import numpy as np

_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def encode_png(pixels: np.ndarray) -> bytes:
    """A PNG file of uint8 pixels, (H, W) grey or (H, W, 3) colour."""
    assert pixels.dtype == np.uint8 and (pixels.ndim == 2 or pixels.shape[2:] == (3,)), (pixels.dtype, pixels.shape)
    height, width = pixels.shape[:2]
    rows = np.ascontiguousarray(pixels).reshape(height, -1)
    filtered = np.pad(rows, ((0, 0), (1, 0)))  # each row is led by its filter: 0, none
    header = struct.pack(">IIBBBBB", width, height, 8, 0 if pixels.ndim == 2 else 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(filtered.tobytes(), 6)), (b"IEND", b"")]
    return _SIGNATURE + b"".join(
        struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in chunks
    )


def grid(pictures: Sequence[np.ndarray], columns: int, gap: int = 2) -> np.ndarray:
    """Pictures of one shape side by side, row after row, on grey."""
    height, width, *colours = pictures[0].shape
    rows = -(-len(pictures) // columns)
    shape = (rows * (height + gap) - gap, columns * (width + gap) - gap, *colours)
    sheet = np.full(shape, 128, np.uint8)
    for number, picture in enumerate(pictures):
        top, left = number // columns * (height + gap), number % columns * (width + gap)
        sheet[top : top + height, left : left + width] = picture
    return sheet


def enlarged(picture: np.ndarray, times: int) -> np.ndarray:
    """Each pixel as a square of times x times."""
    return picture.repeat(times, 0).repeat(times, 1)


def coloured(picture: np.ndarray) -> np.ndarray:
    """(H, W) or (H, W, 1) grey, or (H, W, 3), as (H, W, 3); a copy."""
    flat = picture[..., 0] if picture.ndim == 3 and picture.shape[2] == 1 else picture
    return np.stack([flat] * 3, axis=-1) if flat.ndim == 2 else flat.copy()


def outline(picture: np.ndarray, box: Sequence[float], colour: tuple[int, int, int]) -> None:
    """Draw the edge of a box (left, top, right, bottom in pixels), of one pixel at least, into an (H, W, 3) picture."""
    height, width = picture.shape[:2]
    left, top, right, bottom = (round(float(side)) for side in box)
    left, top = max(0, min(left, width - 1)), max(0, min(top, height - 1))
    right, bottom = max(left, min(right - 1, width - 1)), max(top, min(bottom - 1, height - 1))
    picture[[top, bottom], left : right + 1] = colour
    picture[top : bottom + 1, [left, right]] = colour


def _plain(text: str) -> str:
    """As Pillow's own font can show it: letters without accents, ? for those of other scripts."""
    parts = unicodedata.normalize("NFKD", text.strip())
    return "".join(part for part in parts if not unicodedata.combining(part)).encode("ascii", "replace").decode()


def heat_map(values: np.ndarray, rows: Sequence[str], columns: Sequence[str], cell: int = 14) -> np.ndarray:
    """(R, C) values from 0, white, to 1, dark blue, as squares with the names of their rows and columns: (H, W, 3)."""
    from PIL import Image, ImageDraw, ImageFont

    assert values.shape == (len(rows), len(columns)), values.shape
    font = ImageFont.load_default()

    def written(names: Sequence[str]) -> Image.Image:
        """One below the other, flush right."""
        texts = [_plain(name) for name in names]
        widths = [round(font.getlength(text)) for text in texts]
        label = Image.new("RGB", (max(widths, default=0) + 4, cell * len(texts)), "white")
        for number, (text, width) in enumerate(zip(texts, widths, strict=True)):
            ImageDraw.Draw(label).text((label.width - width - 2, cell * number + 1), text, "black", font)
        return label

    left = written(rows)
    top = written(columns[::-1]).transpose(Image.Transpose.ROTATE_270)  # read downwards, the first one leftmost
    shade = np.clip(values, 0, 1)[..., None]
    squares = np.round(255 * (1 - shade) + shade * np.array([10, 30, 120])).astype(np.uint8)
    picture = Image.new("RGB", (left.width + cell * len(columns), top.height + cell * len(rows)), "white")
    picture.paste(top, (left.width, 0))
    picture.paste(left, (0, top.height))
    picture.paste(Image.fromarray(enlarged(squares, cell)), (left.width, top.height))
    return np.asarray(picture)
