"""Image files: whether they can be decoded, and their pixels at one size. Needs Pillow (the extra `images`)."""

from __future__ import annotations

import io
from typing import Any

import numpy as np

from configs.errors import UsageError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm")
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # by values a pixel


def pillow() -> Any:
    """PIL.Image. Raises UsageError where it is not installed."""
    try:
        from PIL import Image
    except ImportError as error:
        raise UsageError(
            "To read images needs Pillow, which is not installed. Run pip install 'shardyard[images]'."
        ) from error
    return Image


def check_image(raw: bytes) -> None:
    """Decode an image file, JPEG at an eighth of its size. Raises ValueError with the reason why it cannot be."""
    with _opened(raw) as image:
        try:
            image.draft(image.mode, (max(1, image.width // 8), max(1, image.height // 8)))
            image.load()
        except Exception as error:  # Pillow's decoders raise what they like of damaged files
            raise ValueError(f"cannot be decoded ({error})") from error


def pixels_of(raw: bytes, size: int, channels: int) -> np.ndarray:
    """The image's pixels, (size, size, channels) uint8: its shorter side scaled to `size`, its middle cut out.

    Raises ValueError with the reason why it cannot be decoded.
    """
    module = pillow()
    with _opened(raw) as image:
        try:
            image.draft(_MODES[channels], (size, size))
            image = image.convert(_MODES[channels])
        except Exception as error:  # as above
            raise ValueError(f"cannot be decoded ({error})") from error
        scale = size / min(image.width, image.height)
        wide, high = max(size, round(image.width * scale)), max(size, round(image.height * scale))
        if (wide, high) != image.size:
            image = image.resize((wide, high), module.Resampling.BILINEAR)
        left, top = (wide - size) // 2, (high - size) // 2
        pixels = np.asarray(image.crop((left, top, left + size, top + size)), np.uint8)
    return pixels.reshape(size, size, channels)


def _opened(raw: bytes) -> Any:
    if not raw:
        raise ValueError("is empty")
    try:
        return pillow().open(io.BytesIO(raw))
    except UsageError:
        raise
    except Exception as error:  # as above; also images so large that they are an attack
        text = "is no image that Pillow reads" if "cannot identify" in str(error) else f"cannot be opened ({error})"
        raise ValueError(text) from error
